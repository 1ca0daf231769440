"""genperf.ops.residual_vector_quantize against autograd through the formulas of the public libraries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.cases import SHAPES, Case, normals

from genperf.ops import residual_vector_quantize, vq_nearest

BACKENDS = ("reference", "cpu", "triton")


def grid(shape, unit, *seed):
    """Multiples of ``unit`` whose residuals are exact in bfloat16."""
    return (normals(shape, *seed) / 2 / unit).round().clamp(-1 / unit, 1 / unit) * unit


def _case(name, shapes=None, stages=2, limits=None, **options):
    def function(x, codebooks):
        extra = {} if limits is None else {"n_stages": torch.arange(len(x), device=x.device) % (stages + 1)}
        out = residual_vector_quantize(x, codebooks, **options, **extra)
        return out.quantized, out.indices, *out.losses.unbind()

    return Case(
        name, function, lambda shape: [grid(shape, 1 / 64)],
        lambda shape: [grid((stages, 37, shape[-1]), 1 / 16, "codebooks")], smooth=False, elementwise=False,
        shapes=shapes or (*(s for s in SHAPES if len(s) > 1), (0, 4), (0, 2, 3)), backends=BACKENDS,
    )  # fmt: skip


CASES = (
    _case("straight-through", codebook_weight=0.25),
    _case("rotation", estimator="rotation", commitment_weight=0.25),
    _case("sum", estimator_of="sum", limits=True),
    _case("encodec", residual_gradient=1.0),
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


def expected(x, codebooks, indices, estimator, of, fraction, weights):
    estimate = straight_through if estimator == "straight_through" else rotation
    residual, total, losses = x, 0, []
    for i, codebook in enumerate(codebooks):
        active = (indices[..., i] >= 0)[..., None]
        q = codebook[indices[..., i].clamp(min=0)]
        y = estimate(residual, q.detach()) if of == "stages" else q.detach()
        errors = [(q.detach() - residual).square(), (q - residual.detach()).square()]
        losses.append(
            sum(w * torch.where(active, e, 0.0).mean() for w, e in zip(weights, errors, strict=True))
        )
        taken = fraction * y + (1 - fraction) * y.detach()
        residual = torch.where(active, residual - taken, residual)
        total = total + torch.where(active, y, 0.0)
    if of == "sum":
        total = torch.where(indices[..., :1] >= 0, estimate(x, total), 0.0)
    return total, torch.stack(losses)


def gradients(outputs, leaves, *seed):
    """Of each output by itself."""
    return [
        torch.autograd.grad(
            (y * normals(tuple(y.shape), "weight", *seed).to(y)).sum(), leaves, retain_graph=True,
            allow_unused=True, materialize_grads=True,
        )
        for y in outputs
    ]  # fmt: skip


FLOWS = [("stages", 0.0), ("stages", 1.0), ("stages", 0.3), ("sum", 0.0)]


@pytest.mark.parametrize("limits", [None, 2, "samples", "mask"])
@pytest.mark.parametrize(("of", "fraction"), FLOWS)
@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_definition(estimator, of, fraction, limits):
    """Values and gradients, by autograd through the formulas in float64."""
    tensors = [normals((6, 5, 4), "x").double(), normals((3, 9, 4), "c").double() / 2]
    mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    options, scale = {}, 1.0
    if limits == 2:
        options = {"n_stages": 2}
    elif limits == "samples":
        options = {"n_stages": torch.tensor([0, 1, 2, 3, -1, 5])}
    elif limits == "mask":
        options = {"mask": normals((6, 5), "mask") > 0}
        scale = options["mask"].numel() / options["mask"].sum()
    out = residual_vector_quantize(
        *mine, estimator=estimator, estimator_of=of, residual_gradient=fraction, commitment_weight=0.25,
        codebook_weight=0.5, **options,
    )  # fmt: skip
    rows = torch.ones(6, 5, dtype=torch.int64)
    last = {None: rows * 3, 2: rows * 2, "samples": rows * torch.tensor([0, 1, 2, 3, 0, 3])[:, None]}
    last["mask"] = 3 * options.get("mask", rows)
    assert torch.equal((out.indices >= 0).sum(-1), last[limits])
    total, losses = expected(*theirs, out.indices, estimator, of, fraction, (0.25, 0.5))
    torch.testing.assert_close(out.quantized, total)
    torch.testing.assert_close(out.losses, losses * scale)
    torch.testing.assert_close(
        gradients(out[::2], mine), gradients((total, losses * scale), theirs)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stages_are_those_of_a_loop(dtype):
    """Indices and residuals as the libraries compute them, stage by stage in the dtype of x."""
    x, codebooks = normals((3, 70, 24), "x").to(dtype), (normals((5, 65, 24), "c") / 2).to(dtype)
    out = residual_vector_quantize(x, codebooks)
    residual, total = x, torch.zeros(x.shape)
    for i, codebook in enumerate(codebooks):
        index = vq_nearest(residual, codebook).indices
        assert torch.equal(out.indices[..., i], index)
        loss = (residual.double() - codebook[index].double()).square().mean()
        torch.testing.assert_close(out.losses[i], loss.float(), rtol=1e-5, atol=0)
        residual = residual - codebook[index]
        total = total + codebook[index].float()
    assert torch.equal(out.quantized, total.to(dtype))


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_groups_are_independent(metric):
    x = normals((2, 7, 5, 6), "x").requires_grad_()
    codebooks = (normals((2, 3, 9, 6), "c") / 2).requires_grad_()
    mask = normals((7, 5), "mask") > 0
    names = {"mask": mask, "n_stages": torch.arange(7), "codebook_weight": 0.5, "estimator": "rotation"}
    out = residual_vector_quantize(x, codebooks, metric, **names)
    each = [residual_vector_quantize(x[g], codebooks[g], metric, **names) for g in range(2)]
    for a, b in zip(out, zip(*each, strict=True), strict=True):
        assert torch.equal(a, torch.stack(b))
    leaves = (x, codebooks)
    grads = gradients((out.quantized, out.losses), leaves)
    stacked = [torch.stack([e.quantized for e in each]), torch.stack([e.losses for e in each])]
    torch.testing.assert_close(grads, gradients(stacked, leaves))


def test_codebooks_of_different_sizes():
    x = normals((40, 6), "x").requires_grad_()
    books = [(normals((k, 6), "c") / 2).requires_grad_() for k in (5, 1, 33)]
    out = residual_vector_quantize(x, books, codebook_weight=1.0)
    total, losses = expected(x, books, out.indices, "straight_through", "stages", 0.0, (1.0, 1.0))
    torch.testing.assert_close(out.quantized, total)
    torch.testing.assert_close(out.losses, losses)
    torch.testing.assert_close(
        gradients(out[::2], (x, *books)), gradients((total, losses), (x, *books)), atol=1e-6, rtol=1e-4
    )
    nested = residual_vector_quantize(x[None].expand(2, -1, -1), [books, books])
    assert all(torch.equal(nested.indices[g], out.indices) for g in range(2))


@pytest.mark.parametrize("dim", [1, -1])
def test_layouts(dim):
    """Channels first, as audio codecs have it, and a part of the channels, as groups are cut."""
    whole = normals((2, 12, 6, 12), "x")
    codebooks = normals((3, 9, 6), "c")
    for x in (whole[:, :6, :, :6], whole[:, :6, :, 6:].contiguous(), whole[:, ::2, :, ::2]):
        out = residual_vector_quantize(x, codebooks, dim=dim)
        rows = residual_vector_quantize(x.movedim(dim, -1).contiguous(), codebooks)
        assert torch.equal(out.quantized, rows.quantized.movedim(-1, dim))
        assert torch.equal(out.indices, rows.indices)
        torch.testing.assert_close(out.losses, rows.losses)
        assert out.quantized.is_contiguous() >= x.is_contiguous()


@pytest.mark.parametrize("n", [5, 90, 300])
def test_indices_are_exact_with_an_offset(n):
    """Where the expanded formula of the libraries is wrong."""
    x, codebooks = normals((n, 8), "x") + 1000, normals((3, 64, 8), "c")
    codebooks[0] += 1000
    out = residual_vector_quantize(x, codebooks)
    residual = x
    for i, codebook in enumerate(codebooks):
        distances = (residual.double()[:, None] - codebook.double()).square().sum(-1)
        assert torch.equal(out.indices[:, i], distances.argmin(-1))
        residual = residual - codebook[out.indices[:, i]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_indices_are_exact_among_far_codewords(dtype):
    """Codebooks are then centred on the residuals of some vectors, not finite ones among them."""
    x, codebooks = normals((300, 8), "x").to(dtype), normals((3, 96, 8), "c")
    x[::50, 3] = math.nan
    codebooks = (codebooks * 10.0 ** torch.linspace(0, 6, 96)[:, None]).to(dtype)
    codebooks[1, 5:] = normals((91, 8), "second").to(dtype)  # a stage without far ones in between
    out = residual_vector_quantize(x, codebooks)
    residual = x
    for i, codebook in enumerate(codebooks):
        distances = (residual.double()[:, None] - codebook.double()).square().sum(-1)
        expected = torch.where(residual.isfinite().all(-1), distances.argmin(-1), 0)
        assert torch.equal(out.indices[:, i], expected)
        residual = (residual.float() - codebook[expected].float()).to(dtype)


def test_a_frame_at_a_time_gives_the_same():
    """Streaming: nothing depends on the vectors around."""
    x, codebooks = normals((200, 37), "x"), normals((8, 100, 37), "c") / 2
    out = residual_vector_quantize(x, codebooks)
    for first, n in [*((i, 1) for i in range(20)), (20, 2), (22, 7), (29, 60), (90, 110)]:
        part = residual_vector_quantize(x[first : first + n], codebooks)
        assert torch.equal(part.quantized, out.quantized[first : first + n])
        assert torch.equal(part.indices, out.indices[first : first + n])


@pytest.mark.parametrize("n", [1, 6, 90, 300])
@pytest.mark.parametrize("scale", [1.0, 2.0**70, 2.0**-80, 2.0**-140], ids=str)
def test_ties_and_extremes(n, scale):
    """Duplicates, the middle of two codewords, codewords that are not finite, subnormal numbers."""
    words = torch.tensor([[math.nan, 0.0], [4.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, math.inf]])
    x = torch.tensor([[0.0, 1.0], [1.0, 0.5], [2.5, 0.0], [-1.0, 0.0]]).repeat(n, 1)[:n] * scale
    out = residual_vector_quantize(x, words[None] * scale)
    assert torch.equal(out.indices[:, 0], torch.tensor([2, 2, 1, 3]).repeat(n)[:n])


def test_not_finite():
    x = normals((4, 3), "x")
    x[1, 1], x[2, 0] = math.nan, math.inf
    codebooks = normals((3, 5, 3), "c")
    out = residual_vector_quantize(x, codebooks)
    assert torch.equal(out.quantized.isnan(), ~x.isfinite())
    assert out.losses.isnan().all() | out.losses.isinf().all()
    assert out.indices[1:3].eq(0).all()
    masked = residual_vector_quantize(x, codebooks, mask=torch.tensor([True, False, False, True]))
    assert masked.quantized[1:3].eq(0).all()
    assert masked.indices[1:3].eq(-1).all()
    assert masked.losses.isfinite().all()
    assert torch.equal(masked.quantized[::3], out.quantized[::3])


def test_nothing_to_do():
    x, codebooks = normals((4, 3), "x").requires_grad_(), normals((3, 5, 3), "c")
    for options in ({"n_stages": 0}, {"mask": torch.zeros(4, dtype=torch.bool)}):
        out = residual_vector_quantize(x, codebooks, **options)
        assert out.indices.eq(-1).all()
        assert out.quantized.eq(0).all()
        assert out.losses.eq(0).all()
        (grad,) = torch.autograd.grad(out.quantized.sum() + out.losses.sum(), x)
        assert grad.eq(0).all()
    empty = residual_vector_quantize(x[:0], codebooks)
    assert empty.quantized.shape == (0, 3)
    assert empty.indices.shape == (0, 3)
    assert empty.losses.tolist() == [0, 0, 0]


def test_compile_of_a_training_step():
    x, codebooks = normals((10, 4), "x").requires_grad_(), normals((3, 9, 4), "c").requires_grad_()

    def step(x, codebooks, mask):
        out = residual_vector_quantize(x, codebooks, estimator="rotation", codebook_weight=1.0, mask=mask)
        return out.quantized.square().sum() + out.losses.sum(), out.indices

    args = (x, codebooks, torch.arange(10) % 3 > 0)
    results = [f(*args) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r[0], (x, codebooks)) for r in results))


X, C = torch.zeros(2, 3), torch.zeros(4, 5, 3)

BAD = {
    "x": (TypeError, r"x is list, expected a tensor", [[1.0], C], {}),
    "dtype": (TypeError, r"x is torch.int64, expected one of", [X.long(), C], {}),
    "codebooks": (TypeError, r"codebooks is int, expected a tensor or a sequence", [X, 3], {}),
    "codebooks' dtype": (
        TypeError,
        r"codebook 0 is torch.float16, expected torch.float32, as x",
        [X, C.half()],
        {},
    ),
    "no codewords": (
        ValueError,
        r"codebooks has shape \(4, 0, 3\), expected \[stages, K, D\] or",
        [X, C[:, :0]],
        {},
    ),
    "one codebook": (ValueError, r"codebooks has shape \(5, 3\), expected", [X, C[0]], {}),
    "no stages": (ValueError, r"codebooks is empty, expected at least one stage", [X, []], {}),
    "D": (ValueError, r"codebook 0 has shape \(5, 2\), expected \[K, 3\], as x, of", [X, C[..., :2]], {}),
    "ragged": (
        ValueError,
        r"codebooks has groups of different numbers of stages",
        [X, [list(C), list(C[:1])]],
        {},
    ),
    "in a sequence": (
        ValueError,
        r"codebook 1 has shape \(4, 5, 3\), expected \[K, D\]",
        [X, [C[0], C]],
        {},
    ),
    "not a tensor": (TypeError, r"codebook 1 is int, expected a tensor", [X, [C[0], 3]], {}),
    "groups": (
        ValueError,
        r"x has shape \(2, 3\), expected 3 groups in dimension 0",
        [X, C[None].expand(3, -1, -1, -1)],
        {},
    ),
    "dim": (ValueError, r"dim is 2 for x of shape \(2, 3\), expected a dimension of it", [X, C], {"dim": 2}),
    "metric": (ValueError, r"metric is 'L2', expected one of l2, cosine, dot", [X, C], {"metric": "L2"}),
    "n_stages": (ValueError, r"n_stages is 5, expected 0 to 4", [X, C], {"n_stages": 5}),
    "n_stages' type": (
        TypeError,
        r"n_stages is float, expected an integer or a tensor",
        [X, C],
        {"n_stages": 1.0},
    ),
    "n_stages' dtype": (
        TypeError,
        r"n_stages is torch.float32, expected integers",
        [X, C],
        {"n_stages": torch.ones(2)},
    ),
    "n_stages' shape": (
        ValueError,
        r"n_stages has shape \(3,\), expected the leading dimensions of \(2,\)",
        [X, C],
        {"n_stages": torch.ones(3, dtype=torch.int64)},
    ),
    "mask": (
        TypeError,
        r"mask is torch.int64, expected a tensor of bool",
        [X, C],
        {"mask": torch.ones(2).long()},
    ),
    "mask's shape": (
        ValueError,
        r"mask has shape \(3,\), expected \(2,\)",
        [X, C],
        {"mask": torch.ones(3, dtype=torch.bool)},
    ),
    "estimator": (
        ValueError,
        r"estimator is 'gumbel', expected one of straight_through, rotation",
        [X, C],
        {"estimator": "gumbel"},
    ),
    "estimator_of": (
        ValueError,
        r"estimator_of is 'all', expected one of stages, sum",
        [X, C],
        {"estimator_of": "all"},
    ),
    "fraction": (
        ValueError,
        r"residual_gradient is 2, expected a number from 0 to 1",
        [X, C],
        {"residual_gradient": 2},
    ),
    "fraction of a sum": (
        ValueError,
        r"residual_gradient is 1, expected 0 with estimator_of='sum'",
        [X, C],
        {"residual_gradient": 1, "estimator_of": "sum"},
    ),
    "weight": (
        ValueError,
        r"commitment_weight is -1, expected a finite number >= 0",
        [X, C],
        {"commitment_weight": -1},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, args, options = BAD[name]
    with pytest.raises(error, match=f"residual_vector_quantize: {message}"):
        residual_vector_quantize(*args, **options)
