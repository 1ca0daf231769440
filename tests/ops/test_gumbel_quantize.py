"""genperf.ops.gumbel_quantize against torch's gumbel_softmax, and its noise against its distribution."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import SHAPES, Case, normals
from genperf_testing.contract import threads

import genperf
from genperf.ops import draw_key, gumbel_quantize
from genperf.ops._gumbel_quantize_reference import reference_gumbels

OPS = ("reference", "cpu")
both = pytest.mark.parametrize("backend", OPS)
hard_or_mixed = pytest.mark.parametrize("hard", [True, False], ids=["hard", "mixed"])


def _case(name, hard, temperature=1.0, with_noise=False, keys=False, triton=False):
    def function(logits, codebook, key_or_noise):
        given = {"noise" if with_noise else "key": key_or_noise}
        out = gumbel_quantize(logits, codebook, temperature, hard, **given)
        return out.quantized, out.kl, out.indices

    def constants(shape):
        codebook = normals((max(1, shape[1]), 3), "codebook")
        if with_noise:
            return [codebook, gumbels(shape, "noise")]
        seeds = torch.arange(2 * shape[0]).view(-1, 2) + 3
        return [codebook, seeds if keys else torch.tensor([11, 5])]

    return Case(
        name, function, lambda shape: [normals(shape)], constants, smooth=not hard, elementwise=False,
        backends=OPS + ("triton",) * triton,
        shapes=(*(s for s in SHAPES if len(s) > 1), (0, 4), (0, 2, 3), (3, 2, 0)),
    )  # fmt: skip


def gumbels(shape, *seed):
    return -(-(normals(shape, *seed) * 0.5).sigmoid().log()).log()


CASES = (
    _case("hard", True, triton=True),
    _case("mixed", False, temperature=0.7),
    _case("hard, given noise", True, temperature=2.0, with_noise=True),
    _case("mixed, keys", False, temperature=2.0, keys=True, triton=True),
)


def eager(logits, codebook, temperature, hard, noise):
    """As taming-transformers does, but for the draw."""
    soft = ((logits + noise) / temperature).softmax(1)
    y = soft
    if hard:
        y = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0) - soft.detach() + soft
    q = logits.softmax(1)
    kl = (q * (q * logits.shape[1] + 1e-10).log()).sum(1)
    return torch.einsum("bkhw,kd->bdhw", y, codebook), y.argmax(1), kl


@both
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@hard_or_mixed
def test_definition(hard, temperature, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    shape = (2, 70, 9, 11)
    tensors = [normals(shape, "l").to(dtype), normals((70, 13), "c").to(dtype)]
    noise = gumbels(shape, "g").to(dtype)
    mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    with genperf.backend(backend):
        out = gumbel_quantize(*mine, temperature, hard, noise=noise)
        expected = eager(*theirs, temperature, hard, noise)
        assert torch.equal(out.indices, expected[1])
        for a, b in ((out.quantized, expected[0]), (out.kl, expected[2])):
            torch.testing.assert_close(a, b)
            weight = normals(tuple(a.shape), "weight").to(dtype)
            grads = [
                torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True, allow_unused=True,
                                    materialize_grads=True)
                for y, leaves in ((a, mine), (b, theirs))
            ]  # fmt: skip
            torch.testing.assert_close(*grads, rtol=1e-4 if dtype == torch.float32 else 1e-7, atol=1e-5)
    if hard:
        assert torch.equal(out.quantized, tensors[1][out.indices].movedim(-1, 1))


def test_gradients_of_both_operands():
    logits, codebook = normals((2, 5, 3), "l").double(), normals((5, 4), "c").double()
    key = torch.tensor([1, 2])
    function = lambda *t: gumbel_quantize(*t, 0.7, False, key=key)[::2]  # noqa: E731
    leaves = logits.requires_grad_(), codebook.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def _run(logits, codebook, temperature, hard, cotangents, backend, dtype):
    leaves = [logits.to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_()]
    with genperf.backend(backend):
        out = gumbel_quantize(*leaves, temperature, hard, key=torch.tensor([3, 4]))
        results = [out.quantized, out.kl]
        cotangents = [g.to(y) for g, y in zip(cotangents, results, strict=True)]
        return [*(y.detach() for y in results), *torch.autograd.grad(results, leaves, cotangents)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "dim", "temperature"),
    [((3, 300, 20, 15), 40, 1.0), ((1, 3000, 9), 8, 0.1), ((2, 65, 300), 130, 1.0), ((70, 65, 3), 9, 1.0)],
)
@hard_or_mixed
def test_accuracy(hard, shape, dim, temperature, dtype):
    """No more than twice the error of the formulas in torch, against float64."""
    logits, codebook = normals(shape, "l").to(dtype), normals((shape[1], dim), "c").to(dtype)
    cotangents = [normals((shape[0], dim, *shape[2:]), 1), normals((shape[0], *shape[2:]), 2)]
    arguments = (logits, codebook, temperature, hard, cotangents)
    truth = _run(*arguments, "reference", torch.float64)
    torchs = _run(*arguments, "reference", dtype)
    for i, (a, t, e) in enumerate(zip(_run(*arguments, "cpu", dtype), torchs, truth, strict=True)):
        assert a.dtype == t.dtype
        error, theirs = ((y.double() - e).norm() / e.norm() for y in (a, t))
        assert error <= 2 * theirs + 2e-7, (i, error, theirs)


@hard_or_mixed
def test_bits_do_not_depend_on_threads(hard):
    logits, codebook = normals((3, 90, 17, 23), "l"), normals((90, 20), "c")
    cotangents = [normals((3, 20, 17, 23), 1), normals((3, 17, 23), 2)]
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(_run(logits, codebook, 1.0, hard, cotangents, "cpu", torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# The noise.


def test_distribution_of_the_noise():
    n = 1 << 20
    noise = reference_gumbels((n,), torch.tensor([7, 9])).double().sort().values
    assert noise[0] > -3.3
    assert noise[-1] < 22.9
    cdf = (-(-noise).exp()).exp()
    steps = torch.arange(n + 1) / n
    distance = torch.maximum((cdf - steps[:-1]).abs().max(), (cdf - steps[1:]).abs().max())
    assert distance < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov at 1 %


def test_noise_of_given_words():
    """Against float64, over the range of the words, its ends and both sides of its middle."""
    words = torch.cat([torch.arange(64), 2**31 + torch.arange(-32, 32), 2**32 - 64 + torch.arange(64),
                       torch.arange(0, 2**32, 2**32 // 4999)])  # fmt: skip
    module = "genperf.ops._gumbel_quantize_reference.reference_words"
    with mock.patch(module, return_value=words):
        noise = reference_gumbels((len(words),), torch.zeros(2, dtype=torch.int64)).double()
    v = (words.double() + 0.5) / 2**32
    expected = -(-torch.log1p(-v)).log()
    assert ((noise - expected).abs() <= 4e-7 * (1 + expected.abs())).all()


@pytest.mark.parametrize("backend", parameters(b for b in BACKENDS if b.backend == "cpu"))
def test_noise_of_the_kernels(backend):
    """The same bits as the reference: a draw and its mix at once, for every element of odd shapes."""
    skip_if_missing(backend)
    for shape in ((3, 5, 7), (2, 66, 70), (1, 3, 601), (130, 67, 1)):
        logits, codebook = torch.zeros(shape), torch.eye(shape[1])
        for key in (torch.tensor([5, 8]), torch.arange(2 * shape[0]).view(-1, 2)):
            noise = reference_gumbels(shape, key)
            with backend.active():
                drawn = gumbel_quantize(logits, codebook, key=key)
                given = gumbel_quantize(logits, codebook, noise=noise)
                assert torch.equal(drawn.indices, noise.argmax(1))
                mixes = [gumbel_quantize(logits, codebook, 1.0, False, **k).quantized
                         for k in ({"key": key}, {"noise": noise})]  # fmt: skip
            assert torch.equal(given.indices, drawn.indices)
            assert torch.equal(*mixes)


def test_draws_follow_the_logits():
    """Chi-square of the counts."""
    n, logits = 200_000, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    out = gumbel_quantize(
        logits[None, :, None].expand(1, 6, n), torch.zeros(6, 1), generator=torch.Generator().manual_seed(1)
    )
    counts, expected = out.indices.flatten().bincount(minlength=6), n * logits.softmax(0)
    assert ((counts - expected).square() / expected).sum() < 20.5  # 5 degrees of freedom at 0.1 %


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@hard_or_mixed
def test_torch_rng_is_that_of_gumbel_softmax(hard, dtype):
    logits, codebook = normals((2, 30, 8, 9), "l").to(dtype), torch.eye(30, dtype=dtype)
    torch.manual_seed(5)
    theirs = F.gumbel_softmax(logits, tau=0.8, hard=hard, dim=1)
    after = torch.rand(3)
    torch.manual_seed(5)
    out = gumbel_quantize(logits, codebook, 0.8, hard, rng="torch")
    assert torch.equal(torch.rand(3), after)
    torch.testing.assert_close(
        out.quantized, theirs, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-3
    )
    assert torch.equal(out.indices, theirs.argmax(1))


def test_a_sample_does_not_depend_on_its_batch():
    """Also where positions of several samples are computed together."""
    for shape in ((70, 33, 1), (40, 200, 3), (3, 40, 35)):
        logits, codebook = normals(shape, "l"), normals((shape[1], 6), "c")
        keys = torch.arange(2 * shape[0]).view(-1, 2)
        weights = [normals((shape[0], 6, shape[2]), 1), normals((shape[0], shape[2]), 2)]

        def results(rows, hard):
            x = logits[rows].requires_grad_()  # noqa: B023
            out = gumbel_quantize(x, codebook, 0.8, hard, key=keys[rows])  # noqa: B023
            grads = torch.autograd.grad([out.quantized, out.kl], x, [w[rows] for w in weights])  # noqa: B023
            return out.quantized.detach(), out.kl.detach(), out.indices, *grads

        for hard in (True, False):
            every, some = results(slice(None), hard), results(slice(1, 3), hard)
            assert all(torch.equal(a[1:3], b) for a, b in zip(every, some, strict=True))


def test_generators():
    logits, codebook = normals((2, 9, 30), "l"), normals((9, 4), "c")
    seeded = lambda: [torch.Generator().manual_seed(s) for s in (1, 2)]  # noqa: E731
    for rng in ("philox", "torch"):
        both = gumbel_quantize(logits, codebook, rng=rng, generator=seeded())
        for i, generator in enumerate(seeded()):
            one = gumbel_quantize(logits[i : i + 1], codebook, rng=rng, generator=[generator])
            assert torch.equal(both.indices[i], one.indices[0])
    a, b = (gumbel_quantize(logits, codebook, generator=seeded()[0]).indices for _ in range(2))
    assert torch.equal(a, b)


# Extremes.


@both
@hard_or_mixed
@pytest.mark.parametrize("temperature", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 3e38])
def test_finite_logits_give_no_nan(scale, temperature, hard, backend):
    logits = (normals((2, 40, 20), "l").clamp(-1, 1) * scale).requires_grad_()
    codebook = normals((40, 3), "c").requires_grad_()
    with genperf.backend(backend):
        out = gumbel_quantize(logits, codebook, temperature, hard, key=torch.tensor([1, 2]))
        grads = torch.autograd.grad(out.quantized.sum() + out.kl.sum(), [logits, codebook])
    assert all(y.isfinite().all() for y in (out.quantized, out.kl, *grads))
    assert (out.kl <= math.log(40) + 1e-5).all()
    assert (out.kl >= -1e-5).all()


@both
def test_infinite_noise(backend):
    """As an exponential variate of 0 gives: its codeword, once."""
    noise = torch.zeros(1, 4, 20)
    noise[0, 2] = torch.inf
    logits = normals((1, 4, 20), "l").requires_grad_()
    with genperf.backend(backend):
        out = gumbel_quantize(logits, torch.eye(4), hard=False, noise=noise)
        (grad,) = torch.autograd.grad(out.quantized[:, 0].sum(), logits)
    assert (out.indices == 2).all()
    assert out.quantized.isfinite().all()
    assert grad.isfinite().all()


@both
def test_masked_logits(backend):
    """Codewords of -inf are never drawn, and have no part in the divergence."""
    logits = normals((2, 6, 50), "l")
    logits[:, [0, 3]] = -torch.inf
    logits.requires_grad_()
    with genperf.backend(backend):
        out = gumbel_quantize(logits, torch.eye(6), key=torch.tensor([1, 2]))
        grads = torch.autograd.grad(out.kl.sum() + out.quantized[:, 1].sum(), logits)
    assert set(out.indices.unique().tolist()) <= {1, 2, 4, 5}
    q = logits.detach()[:, [1, 2, 4, 5]].log_softmax(1)
    torch.testing.assert_close(out.kl, math.log(6) + (q.exp() * q).sum(1))
    assert grads[0].isfinite().all()
    assert not grads[0][:, [0, 3]].any()


@both
@hard_or_mixed
def test_nan(hard, backend):
    logits = normals((1, 5, 40), "l")
    logits[0, 3, 17] = torch.nan
    with genperf.backend(backend):
        out = gumbel_quantize(logits, normals((5, 2), "c"), 1.0, hard, key=torch.tensor([1, 2]))
    bad = torch.arange(40) == 17
    assert torch.equal(out.kl[0].isnan(), bad)
    assert torch.equal(out.quantized[0].isnan(), bad.expand(2, 40))
    assert out.indices[0, 17] == 0


@both
def test_ties_go_to_the_lowest(backend):
    with genperf.backend(backend):
        out = gumbel_quantize(torch.ones(2, 9, 33), torch.eye(9), noise=torch.zeros(2, 9, 33))
    assert not out.indices.any()


def test_channels_last_is_not_copied():
    logits = normals((2, 24, 5, 6), "l").to(memory_format=torch.channels_last)
    codebook, key = normals((24, 3), "c"), torch.tensor([1, 2])
    a, b = (gumbel_quantize(y, codebook, key=key) for y in (logits, logits.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_without_divergence():
    out = gumbel_quantize(normals((2, 4, 5), "l"), torch.eye(4), kl=False)
    assert out.kl is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": 1}, TypeError, "logits is int"),
        ({"codebook": [1]}, TypeError, "codebook is list"),
        ({"logits": torch.zeros(2, 5, 3).long()}, TypeError, "logits is torch.int64"),
        ({"codebook": torch.zeros(5, 4).half()}, TypeError, "codebook is torch.float16, expected torch"),
        ({"codebook": torch.zeros(5, 4, device="meta")}, ValueError, "codebook is on meta"),
        ({"codebook": torch.zeros(0, 4)}, ValueError, r"codebook has shape \(0, 4\)"),
        ({"codebook": torch.zeros(5)}, ValueError, r"codebook has shape \(5,\)"),
        ({"logits": torch.zeros(2, 6, 3)}, ValueError, r"logits has shape \(2, 6, 3\), expected \[B, 5"),
        ({"logits": torch.zeros(5)}, ValueError, r"logits has shape \(5,\)"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"temperature": math.inf}, ValueError, "temperature is inf"),
        ({"temperature": None}, TypeError, "temperature is NoneType"),
        ({"hard": 1}, TypeError, "hard is int"),
        ({"kl": None}, TypeError, "kl is NoneType"),
        ({"rng": "xorshift"}, ValueError, "rng is 'xorshift'"),
        ({"noise": torch.zeros(2, 5, 2)}, ValueError, r"noise has shape \(2, 5, 2\)"),
        ({"noise": 0.5}, TypeError, "noise is float"),
        ({"noise": torch.zeros(2, 5, 3, requires_grad=True)}, ValueError, "noise requires a gradient"),
        ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, r"key has shape \(3,\)"),
        ({"key": torch.zeros(2)}, TypeError, "key is torch.float32"),
        ({"generator": [torch.Generator()]}, ValueError, "generator has 1 entries"),
        ({"generator": 5, "rng": "torch"}, TypeError, "generator is int"),
        ({"key": draw_key("cpu"), "generator": torch.Generator()}, ValueError, "more than one"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {"logits": torch.zeros(2, 5, 3), "codebook": torch.zeros(5, 4), **change}
    with pytest.raises(error, match=message):
        gumbel_quantize(**arguments)
