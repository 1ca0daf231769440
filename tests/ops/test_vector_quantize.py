"""genperf.ops.vector_quantize against autograd through the formulas of the public libraries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.cases import SHAPES, Case, normals
from genperf_testing.contract import threads
from genperf_testing.nearest import CPU, REFERENCE, TRITON

import genperf
from genperf.ops import vector_quantize, vq_nearest


def _grid(shape, *seed):
    return (normals(shape, *seed) * 8).round() / 8


def _case(name, constants=lambda shape: [], **options):
    def function(x, codebook, *more):
        out = vector_quantize(x, codebook, **options, **dict(zip(("mask", "indices"), more, strict=False)))
        return [y for y in out if y is not None]

    return Case(
        name, function, lambda shape: [normals(shape)],
        lambda shape: [_grid((37, shape[-1]), "codebook"), *constants(shape)], smooth=False,
        elementwise=False, shapes=(*(s for s in SHAPES if len(s) > 1), (0, 4), (0, 2, 3)),
        backends=("reference", "cpu", "triton"),
    )  # fmt: skip


def _mask(shape):
    return [normals(shape[:-1], "mask") > -0.5]


def _mask_and_indices(shape):
    return [*_mask(shape), (normals(shape[:-1], "indices") * 1e4).round().long().remainder(38) - 1]


CASES = (
    _case("straight-through", codebook_weight=0.25),
    _case("rotation", estimator="rotation", commitment_weight=0.25),
    _case("by sample", _mask, reduction="sample", return_losses=True),
    _case("by vector, of given indices", _mask_and_indices, reduction="none", estimator="rotation"),
)


# What the libraries compute, written out.


def straight_through(x, q):
    return x + (q - x).detach()


def rotation(x, q):
    """The rotation as a matrix for each vector."""
    u, v = F.normalize(x, dim=-1), F.normalize(q, dim=-1)
    r = F.normalize(u + v, dim=-1)
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    turn = eye - 2 * r[..., :, None] * r[..., None, :] + 2 * v[..., :, None] * u[..., None, :]
    scale = q.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True)
    return (turn.detach() @ x[..., None])[..., 0] * scale.detach()


def expected(x, codebook, indices, estimator, commitment_weight, codebook_weight):
    q = codebook[indices]
    y = (straight_through if estimator == "straight_through" else rotation)(x, q.detach())
    loss = commitment_weight * F.mse_loss(q.detach(), x) + codebook_weight * F.mse_loss(q, x.detach())
    return y, loss


def gradients(results, leaves):
    """Of each result, for a cotangent that depends on nothing but its place."""
    return [
        torch.autograd.grad(
            y, leaves, normals(tuple(y.shape), "cotangent", i).to(y), retain_graph=True, allow_unused=True,
            materialize_grads=True,
        )
        for i, y in enumerate(results)
    ]  # fmt: skip


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.25, 1.0), (1.0, 0.25), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_definition(estimator, weights):
    """Values and gradients, by autograd through the formulas in float64."""
    tensors = [normals((6, 5, 4), "x").double(), normals((9, 4), "c").double()]
    mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    names = dict(zip(("commitment_weight", "codebook_weight"), weights, strict=True))
    out = vector_quantize(*mine, estimator=estimator, **names)
    assert torch.equal(out.indices, torch.cdist(*tensors).argmin(-1))
    y, loss = expected(*theirs, out.indices, estimator, *weights)
    assert torch.equal(out.quantized, tensors[1][out.indices])
    torch.testing.assert_close(out.quantized, y)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(gradients(out[:3:2], mine), gradients((y, loss), theirs))


@pytest.mark.parametrize("backend", REFERENCE + CPU + TRITON, indirect=True)
def test_rotations_of_short_vectors_are_those_of_the_library(backend):
    """Which takes no length below 1e-6, of a vector, a codeword, or the sum of their units."""
    library = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    x, codebook = normals((13, 4), "x") * torch.logspace(-11, 1, 13)[:, None], normals((9, 4), "c")
    x[3], codebook[7] = 0.0, 0.0
    codebook[8] *= 1e-8
    x[12], codebook[0] = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])  # opposite
    indices = torch.arange(13) % 9
    indices[12] = 0
    grad = normals(tuple(x.shape), "grad")
    mine, theirs = (x.to(backend.device).clone().requires_grad_() for _ in range(2))
    words = codebook.to(backend.device)
    quantized = vector_quantize(
        mine, words, indices=indices.to(backend.device), estimator="rotation", commitment_weight=0.0
    ).quantized
    assert torch.equal(quantized, words[indices])
    quantized.backward(grad.to(backend.device))
    library.rotate_to(theirs, words[indices]).backward(grad.to(backend.device))
    size = theirs.grad.norm(dim=1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(mine.grad / size, theirs.grad / size, rtol=0, atol=2e-6)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sample", "none"])
def test_reductions_masks_and_losses(reduction, masked, estimator):
    tensors = [normals((6, 5, 4), "x").double(), normals((9, 4), "c").double()]
    mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    mask = normals((6, 5), "mask") > 0 if masked else torch.ones(6, 5, dtype=torch.bool)
    mask[3] = not masked  # a sample of which nothing is left
    out = vector_quantize(
        *mine, mask=mask if masked else None, estimator=estimator, commitment_weight=0.25,
        codebook_weight=2.0, reduction=reduction, return_losses=True, return_usage=True,
    )  # fmt: skip
    x, codebook = theirs
    q = codebook[torch.cdist(*tensors).argmin(-1)]
    y = (straight_through if estimator == "straight_through" else rotation)(x, q.detach())
    keep = mask[..., None]

    def mean(squares):
        if reduction == "none":
            return torch.where(keep, squares, 0).mean(-1)
        over = (0, 1, 2) if reduction == "mean" else (1, 2)
        number = keep.expand_as(squares).sum(over)
        return torch.where(keep, squares, 0).sum(over) / number.clamp(min=1)

    terms = mean((q.detach() - x).square()), mean((q - x.detach()).square())
    loss = 0.25 * terms[0] + 2 * terms[1]
    assert torch.equal(out.indices, torch.where(mask, torch.cdist(*tensors).argmin(-1), -1))
    assert torch.equal(out.counts, torch.bincount(out.indices[mask], minlength=9))
    actual = out.quantized, out.loss, out.commitment_loss, out.codebook_loss
    ours = torch.where(keep, y, 0), loss, *terms
    assert out.loss.shape == {"mean": (), "sample": (6,), "none": (6, 5)}[reduction]
    torch.testing.assert_close(actual, ours)
    torch.testing.assert_close(gradients(actual, mine), gradients(ours, theirs))


def test_given_indices():
    x, codebook = normals((6, 5, 4), "x"), normals((9, 4), "c")
    searched = vector_quantize(x, codebook, codebook_weight=1.0, return_usage=True)
    given = vector_quantize(
        x, codebook, indices=searched.indices.int(), codebook_weight=1.0, return_usage=True
    )
    for a, b in zip(searched[:5], given[:5], strict=True):
        assert torch.equal(a, b)
    others = (searched.indices + 1) % 9
    out = vector_quantize(x, codebook, indices=others, return_losses=True)
    assert torch.equal(out.quantized, codebook[others])
    torch.testing.assert_close(out.loss, F.mse_loss(codebook[others], x))
    mask = normals((6, 5), "mask") > 0
    masked = vector_quantize(x, codebook, indices=others, mask=mask)
    left_out = vector_quantize(x, codebook, indices=torch.where(mask, others, -1))
    for name in ("quantized", "indices", "loss"):
        assert torch.equal(getattr(masked, name), getattr(left_out, name)), name


def test_losses_of_a_learnable_codebook():
    """One mean square with a gradient to both, as vector-quantize-pytorch's learnable codebooks have it."""
    tensors = [normals((6, 4), "x"), normals((9, 4), "c")]
    mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    out = vector_quantize(*mine, return_losses=True)
    loss = out.commitment_loss + out.codebook_loss - out.codebook_loss.detach()
    other = F.mse_loss(theirs[1][out.indices], theirs[0])
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradients([loss], mine), gradients([other], theirs))


def test_nan_in_what_is_left_out():
    x, mask = normals((5, 4), "x"), torch.tensor([True, False, True, False, True])
    codebook = normals((9, 4), "c").requires_grad_()
    bad = x.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    out = vector_quantize(bad, codebook, mask=mask, codebook_weight=1.0, estimator="rotation")
    kept = vector_quantize(x[mask], codebook, codebook_weight=1.0)
    assert torch.equal(out.quantized[mask], kept.quantized)
    assert (out.quantized[~mask] == 0).all()
    torch.testing.assert_close(out.loss, kept.loss)
    grads = torch.autograd.grad(out.loss + out.quantized.sum(), (bad, codebook))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][~mask] == 0).all()


@pytest.mark.parametrize("dim", [1, -1])
def test_images(dim):
    x = normals((2, 6, 4, 6), "x").requires_grad_()
    codebook = normals((9, 6), "c").requires_grad_()
    out = vector_quantize(x, codebook, dim=dim, codebook_weight=1.0)
    rows = vector_quantize(x.movedim(dim, -1).contiguous(), codebook, codebook_weight=1.0)
    assert out.quantized.shape == x.shape
    assert out.quantized.is_contiguous()
    assert torch.equal(out.quantized, rows.quantized.movedim(-1, dim))
    torch.testing.assert_close(out.loss, rows.loss)
    channels_last = x.detach().to(memory_format=torch.channels_last)
    kept = vector_quantize(channels_last, codebook, dim=1).quantized
    assert kept.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_heads(estimator):
    x, codebook = normals((3, 7, 4), "x").requires_grad_(), normals((3, 9, 4), "c").requires_grad_()
    out = vector_quantize(x, codebook, estimator=estimator, codebook_weight=0.5, return_usage=True)
    grads = torch.autograd.grad(out.loss + out.quantized.square().sum(), (x, codebook))
    each = [
        vector_quantize(x[h], codebook[h], estimator=estimator, codebook_weight=0.5, return_usage=True)
        for h in range(3)
    ]
    for name in ("quantized", "indices", "counts", "perplexity"):
        assert torch.equal(getattr(out, name), torch.stack([getattr(e, name) for e in each])), name
    loss = sum(e.loss for e in each) / 3
    torch.testing.assert_close(out.loss, loss)
    total = loss + sum(e.quantized.square().sum() for e in each)
    torch.testing.assert_close(grads, torch.autograd.grad(total, (x, codebook)))


def test_usage():
    codebook = torch.eye(4)
    out = vector_quantize(codebook[[0, 0, 1, 1, 2, 2]], codebook, return_usage=True)
    assert out.counts.tolist() == [2, 2, 2, 0]
    torch.testing.assert_close(out.perplexity, torch.tensor(3.0))
    empty = vector_quantize(codebook[:0], codebook, return_usage=True)
    assert empty.counts.tolist() == [0, 0, 0, 0]
    assert empty.perplexity == 1
    assert empty.loss == 0
    assert vector_quantize(codebook, codebook).counts is None


def test_indices_are_exact_and_codewords_not_rounded():
    x, codebook = normals((200, 8), "x").bfloat16() + 30, normals((64, 8), "c").bfloat16() + 30
    out = vector_quantize(x, codebook)
    assert torch.equal(out.indices, vq_nearest(x.double(), codebook.double()).indices)
    assert torch.equal(out.quantized, codebook[out.indices])
    assert out.loss.dtype == torch.float32
    x, codebook = normals((200, 8), "x"), normals((64, 8), "c") / 8
    out = vector_quantize(x, codebook)
    assert torch.equal(out.quantized, codebook[out.indices])
    assert not torch.equal(straight_through(x, codebook[out.indices]), out.quantized)


def test_not_finite():
    x = normals((4, 3), "x")
    x[1, 1], x[2, 0] = math.nan, math.inf
    out = vector_quantize(x, normals((5, 3), "c"))
    assert torch.equal(out.quantized.isnan(), ~x.isfinite())
    assert out.loss.isnan()


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_zero_vectors(estimator):
    x = torch.zeros(2, 3, requires_grad=True)
    out = vector_quantize(x, torch.cat([torch.zeros(1, 3), torch.ones(1, 3)]), estimator=estimator)
    (grad,) = torch.autograd.grad(out.quantized.sum() + out.loss, x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e25])
def test_rotation_of_tiny_and_huge_vectors(scale, kernel):
    if kernel.backend == "cuda":
        pytest.skip("the op has no such backend")
    tensors = [normals((50, 20), "x") * scale, normals((9, 20), "c") * scale]
    indices, grads = torch.arange(50) % 9, []
    for x, codebook in (tensors, [t.double() for t in tensors]):
        x = x.to(kernel.device).requires_grad_()
        backend = "reference" if x.dtype == torch.float64 else kernel.backend
        with genperf.backend(backend):
            out = vector_quantize(
                x, codebook.to(x), indices=indices.to(x.device), estimator="rotation", commitment_weight=0.0
            )
            weight = normals((50, 20), "g").to(x)
            grads.append(torch.autograd.grad((out.quantized * weight).sum(), x)[0].cpu())
    if scale < 1e-40:  # lengths of few bits
        torch.testing.assert_close(grads[0].double(), grads[1], rtol=0.1, atol=0.1)
    else:
        torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sample", "none"])
def test_same_bits_for_any_threads(reduction, dtype):
    for shape in ((3, 2000, 24), (300, 7, 5), (2, 4, 3)):
        x, codebook = normals(shape, "x").to(dtype), normals((37, shape[-1]), "c").to(dtype)
        mask = normals(shape[:-1], "mask") > -1
        results = []
        for count in (1, 2, 5):
            leaves = x.clone().requires_grad_(), codebook.clone().requires_grad_()
            with threads(count):
                out = vector_quantize(
                    *leaves, mask=mask, reduction=reduction, codebook_weight=1.0, estimator="rotation",
                    return_usage=True,
                )  # fmt: skip
                total = out.loss.sum() + out.quantized.float().square().sum()
                results.append([*out[:5], *torch.autograd.grad(total, leaves)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_heads_of_few_vectors():
    x, codebook = normals((40, 3, 6), "x").requires_grad_(), normals((40, 5, 6), "c").requires_grad_()
    out = vector_quantize(x, codebook, codebook_weight=1.0, reduction="sample", return_usage=True)
    assert out.loss.shape == (40, 3)
    grads = torch.autograd.grad(out.loss.sum(), (x, codebook))
    for h in range(40):
        one = vector_quantize(x[h], codebook[h], codebook_weight=1.0, reduction="none", return_usage=True)
        torch.testing.assert_close(out.loss[h], one.loss)
        assert torch.equal(out.counts[h], one.counts)
        each = torch.autograd.grad(one.loss.sum(), (x, codebook))
        torch.testing.assert_close([g[h] for g in grads], [g[h] for g in each])


def test_compile_of_a_training_step():
    x, codebook = normals((10, 4), "x").requires_grad_(), normals((9, 4), "c").requires_grad_()

    def step(x, codebook):
        out = vector_quantize(x, codebook, estimator="rotation", codebook_weight=1.0, return_usage=True)
        return out.quantized.square().sum() + out.loss, out.perplexity

    results = [f(x, codebook) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r[0], (x, codebook)) for r in results))


X, C = torch.zeros(2, 3), torch.zeros(5, 3)

BAD = {
    "estimator": (
        r"estimator is 'gumbel', expected one of straight_through, rotation",
        {"estimator": "gumbel"},
    ),
    "commitment": (r"commitment_weight is -1, expected a finite number >= 0", {"commitment_weight": -1}),
    "codebook": (r"codebook_weight is nan, expected a finite number", {"codebook_weight": math.nan}),
    "reduction": (r"reduction is 'sum', expected one of mean, sample, none", {"reduction": "sum"}),
    "metric": (r"metric is 'l1', expected one of", {"metric": "l1"}),
    "dim": (r"x has shape \(2, 3\), expected 3 in dimension 0", {"dim": 0}),
    "mask": (r"mask has shape \(3,\), expected \(2,\)", {"mask": torch.ones(3) > 0}),
    "indices": (r"indices has shape \(2, 3\), expected \(2,\)", {"indices": X.long()}),
    "device": (r"indices is on meta, expected cpu, as x", {"indices": torch.zeros(2).long().to("meta")}),
    "index above": (r"indices contains 5, expected -1 to 4", {"indices": torch.tensor([0, 5])}),
    "index below": (r"indices contains -2, expected -1 to 4", {"indices": torch.tensor([-2, 0])}),
    "no number": (r"codebook_weight is None, expected a finite number", {"codebook_weight": None}),
}


TYPES = {
    "x": (r"x is list, expected a tensor", ([1.0], C), {}),
    "codebook dtype": (r"codebook is torch.float16, expected torch.float32, as x", (X, C.half()), {}),
    "flag": (r"return_losses is int, expected a bool", (X, C), {"return_losses": 1}),
    "mask": (r"mask is torch.int64, expected torch.bool", (X, C), {"mask": torch.zeros(2).long()}),
    "indices": (r"indices is torch.float32, expected one of", (X, C), {"indices": torch.zeros(2)}),
    "indices list": (r"indices is list, expected a tensor", (X, C), {"indices": [0, 1]}),
}


def test_one_vector_has_no_samples():
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected a dimension of samples"):
        vector_quantize(X[0], C, reduction="sample")


@pytest.mark.parametrize("name", TYPES)
def test_bad_types(name):
    message, args, options = TYPES[name]
    with pytest.raises(TypeError, match=f"vector_quantize: {message}"):
        vector_quantize(*args, **options)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    message, options = BAD[name]
    with pytest.raises(ValueError, match=f"vector_quantize: {message}"):
        vector_quantize(X, C, **options)
