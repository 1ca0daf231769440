"""genperf.ops.gumbel_softmax against torch's, its draws against their distribution, and its extremes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import SHAPES, Case, normals
from genperf_testing.contract import threads

import genperf
from genperf.ops import draw_key, gumbel_softmax
from genperf.ops._gumbel_quantize_reference import reference_gumbels

OPS = ("reference", "cpu")
both = pytest.mark.parametrize("backend", OPS)
hard_or_soft = pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
KEY = torch.tensor([11, 5])


def _case(name, hard, tau=1.0, dim=-1, with_noise=False, keys=False, triton=False):
    def function(logits, key_or_noise):
        given = {"noise" if with_noise else "key": key_or_noise}
        return (gumbel_softmax(logits, tau, hard, dim, **given),)

    def constants(shape):
        if with_noise:
            return [gumbels(shape, "noise")]
        return [torch.arange(2 * shape[0]).view(-1, 2) + 3 if keys else KEY]

    return Case(
        name, function, lambda shape: [normals(shape)], constants, smooth=not hard, elementwise=False,
        saves_outputs=not hard, backends=OPS + ("triton",) * triton,
        shapes=(*(s for s in SHAPES if len(s) > 1), (0, 4), (0, 2, 3), (3, 0)),
    )  # fmt: skip


def gumbels(shape, *seed):
    return -(-(normals(shape, *seed) * 0.5).sigmoid().log()).log()


CASES = (
    _case("hard", True, triton=True),
    _case("soft, dim=1", False, tau=2.0, dim=1, triton=True),
    _case("soft, given noise", False, tau=2.0, with_noise=True),
    _case("hard, dim=1, keys", True, tau=2.0, dim=1, keys=True),
)


def eager(logits, noise, tau, hard, dim):
    """As torch does, but for the draw."""
    soft = ((logits + noise) / tau).softmax(dim)
    if not hard:
        return soft
    return torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0) - soft.detach() + soft


# Few positions side by side, many, none; short and long rows; tails.
LAYOUTS = [((2, 70, 9, 11), 1), ((3, 40, 3), 1), ((4, 600), -1), ((37, 10), -1), ((50, 2, 3), 0), ((33,), 0)]


@both
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
@pytest.mark.parametrize("tau", [1.0, 0.3])
@hard_or_soft
def test_definition(hard, tau, shape, dim, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    logits, weight = normals(shape, "l").to(dtype), normals(shape, "w").to(dtype)
    noise = reference_gumbels(shape, KEY).to(dtype)
    theirs = logits.clone().requires_grad_()
    expected = eager(theirs, noise, tau, hard, dim)
    (gradient,) = torch.autograd.grad(expected, theirs, weight)
    for given in ({"noise": noise}, {"key": KEY}):
        mine = logits.clone().requires_grad_()
        with genperf.backend(backend):
            y = gumbel_softmax(mine, tau, hard, dim, **given)
            (grad,) = torch.autograd.grad(y, mine, weight)
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, gradient, rtol=1e-4 if dtype == torch.float32 else 1e-7, atol=1e-5)
        if hard:
            assert torch.equal(y.sum(dim), torch.ones_like(y.sum(dim)))
            assert set(y.unique().tolist()) == {0.0, 1.0}


@hard_or_soft
def test_gradients(hard):
    logits = normals((2, 5, 3), "l").double().requires_grad_()

    def function(x):  # of the soft result: what the gradient of the hard one is too
        return gumbel_softmax(x, 0.7, False, 1, key=KEY)

    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)
    weight = normals((2, 5, 3), "w").double()
    y = [gumbel_softmax(logits, 0.7, h, 1, key=KEY) for h in (hard, False)]
    first = [torch.autograd.grad(x, logits, weight, create_graph=True)[0] for x in y]
    second = [torch.autograd.grad(g.square().sum(), logits)[0] for g in first]
    torch.testing.assert_close(first[0], first[1])
    torch.testing.assert_close(second[0], second[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(("shape", "dim"), [((3, 300, 20, 15), 1), ((400, 300), -1)])
def test_accuracy(shape, dim, tau, dtype):
    """No more than twice the error of eager torch, against float64."""
    logits, weight = normals(shape, "l").to(dtype), normals(shape, "w").to(dtype)
    noise = reference_gumbels(shape, KEY)

    def run(function, dtype):
        x = logits.to(dtype).requires_grad_()
        y = function(x)
        return y.detach().double(), torch.autograd.grad(y, x, weight.to(dtype))[0].double()

    truth = run(lambda x: eager(x, noise.double(), tau, False, dim), torch.float64)
    theirs = run(lambda x: eager(x, noise.to(dtype), tau, False, dim), dtype)
    ours = run(lambda x: gumbel_softmax(x, tau, False, dim, key=KEY), dtype)
    for a, t, e in zip(ours, theirs, truth, strict=True):
        error, yardstick = ((y - e).norm() / e.norm() for y in (a, t))
        assert error <= 2 * yardstick + 2e-7


def test_accuracy_at_low_temperature():
    """A thousand times better than eager torch, which rounds sums of logit and noise before it divides."""
    noise = gumbels((200, 300), "g")
    logits = 1 - noise + 1e-4 * normals(noise.shape, "l")
    truth = eager(logits.double(), noise.double(), 1e-4, False, -1)
    for backend in OPS:
        with genperf.backend(backend):
            error = (gumbel_softmax(logits, 1e-4, noise=noise) - truth).norm()
        assert error * 1000 < (eager(logits, noise, 1e-4, False, -1) - truth).norm()


def test_sums_are_compared_without_rounding():
    """A shift of the logits by 2^20 rounds nothing off these, and leaves draws and mixes."""
    logits = (normals((300, 50), "l") * 8).round() / 8
    hard, soft = (gumbel_softmax(logits, 0.5, h, key=KEY) for h in (True, False))
    for backend in OPS:
        with genperf.backend(backend):
            assert torch.equal(gumbel_softmax(logits + 2**20, 0.5, True, key=KEY), hard)
            moved = gumbel_softmax(logits + 2**20, 0.5, key=KEY)
            torch.testing.assert_close(moved, soft, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", parameters(b for b in BACKENDS if b.backend == "cpu"))
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_draws_are_those_of_the_noise(shape, dim, backend):
    """The very index of the largest sum in real arithmetic, from every kernel."""
    skip_if_missing(backend)
    logits = normals(shape, "l")
    keys = [KEY] if dim == 0 else [KEY, torch.arange(2 * shape[0]).view(-1, 2)]
    for key in keys:
        noise = reference_gumbels(shape, key)
        expected = (logits.double() + noise.double()).argmax(dim)
        with backend.active():
            for given in ({"key": key}, {"noise": noise}):
                assert torch.equal(gumbel_softmax(logits, 2.0, True, dim, **given).argmax(dim), expected)


def test_bits_do_not_depend_on_threads():
    for shape, dim in (((5, 90, 17, 23), 1), ((70, 1000), -1), ((9, 900, 5), 1)):
        logits, weight = normals(shape, "l").requires_grad_(), normals(shape, "w")
        results = []
        for count in (1, 2, 5):
            with threads(count):
                y = [gumbel_softmax(logits, 0.6, hard, dim, key=KEY) for hard in (True, False)]
                results.append([*y, *(torch.autograd.grad(x, logits, weight)[0] for x in y)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@hard_or_soft
def test_torch_rng_is_that_of_torch(hard, dtype):
    for shape, dim in (((2, 30, 8, 9), 1), ((60, 100), -1)):
        logits = normals(shape, "l").to(dtype).transpose(0, -1).contiguous().transpose(0, -1)
        torch.manual_seed(5)
        theirs = F.gumbel_softmax(logits, 0.8, hard, dim=dim)
        after = torch.rand(3)
        torch.manual_seed(5)
        ours = gumbel_softmax(logits, 0.8, hard, dim, rng="torch")
        assert torch.equal(torch.rand(3), after)
        torch.testing.assert_close(ours, theirs, rtol=4e-3 if dtype == torch.float16 else 1e-5, atol=1e-3)


def test_generators():
    logits = normals((2, 9, 30), "l")
    for rng in ("philox", "torch"):
        seeded = lambda: [torch.Generator().manual_seed(s) for s in (1, 2)]  # noqa: E731
        both = gumbel_softmax(logits, dim=1, rng=rng, generator=seeded())
        for i, generator in enumerate(seeded()):
            one = gumbel_softmax(logits[i : i + 1], dim=1, rng=rng, generator=[generator])
            assert torch.equal(both[i], one[0])


# Distributions.


def test_p_values_of_hard_draws_are_uniform():
    """Chi-square of the counts for many seeds; then Kolmogorov-Smirnov of the p-values at 0.1 %."""
    n, seeds = 2000, 300
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    expected = n * logits.double().softmax(0)
    p = []
    for seed in range(seeds):
        draws = gumbel_softmax(logits.expand(n, 6), 1.0, True, key=torch.tensor([seed, 17]))
        statistic = ((draws.double().sum(0) - expected).square() / expected).sum()
        p.append(torch.special.gammaincc(torch.tensor(2.5).double(), statistic / 2))
    p = torch.stack(p).sort().values
    steps = torch.arange(seeds + 1) / seeds
    distance = torch.maximum((p - steps[:-1]).abs().max(), (p - steps[1:]).abs().max())
    assert distance < 1.95 / math.sqrt(seeds)


def test_distribution_of_soft_samples():
    """Two samples, torch's and ours: Kolmogorov-Smirnov of each class's share at 0.1 %."""
    n, logits = 20_000, torch.tensor([0.3, -0.5, 1.0]).expand(20_000, 3)
    ours = gumbel_softmax(logits, 0.7, key=KEY)
    theirs = F.gumbel_softmax(logits.double(), 0.7)
    for a, b in zip(ours.double().unbind(1), theirs.unbind(1), strict=True):
        points = torch.cat([a, b])
        shares = [torch.searchsorted(x.sort().values, points, right=True) / n for x in (a, b)]
        assert (shares[0] - shares[1]).abs().max() < 1.95 * math.sqrt(2 / n)


# Extremes.

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@both
@hard_or_soft
@pytest.mark.parametrize("tau", [1e-4, 1.0, 1e4])
def test_finite_logits_give_no_nan(tau, hard, backend):
    for dtype in DTYPES:
        for scale in (0.0, 1e4, 1e30, torch.finfo(dtype).max):
            for shape, dim in (((2, 40, 50), 1), ((3, 40), -1)):
                logits = (normals(shape, "l").clamp(-1, 1).double() * scale).clamp(
                    -torch.finfo(dtype).max, torch.finfo(dtype).max
                )
                logits = logits.to(dtype).requires_grad_()
                with genperf.backend(backend):
                    y = gumbel_softmax(logits, tau, hard, dim, key=KEY)
                    (grad,) = torch.autograd.grad(y[:, :7].sum(), logits)
                assert y.isfinite().all()
                assert grad.isfinite().all()
                torch.testing.assert_close(y.double().sum(dim), torch.ones_like(y.double().sum(dim)),
                                           rtol=0, atol=0.02)  # fmt: skip


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_is_nan_where_this_is_not(dtype, backend):
    """Infinite logits: the draw is among those that go there together."""
    logits = normals((6, 40, 35), "l").to(dtype)
    logits[0, 3] = logits[0, 9] = torch.inf
    logits[1] = -torch.inf
    logits[2, :-2] = -torch.inf
    assert F.gumbel_softmax(logits, dim=1)[:2].isnan().all()
    for layout in (logits, logits.transpose(1, 2).contiguous().transpose(1, 2)):
        for tau in (1.0, 0.1):
            with genperf.backend(backend):
                x = layout.detach().requires_grad_()
                soft, hard = (gumbel_softmax(x, tau, h, 1, key=KEY) for h in (False, True))
                grads = [torch.autograd.grad(y[:, 3].float().square().sum(), x)[0] for y in (soft, hard)]
                equal = gumbel_softmax(torch.zeros(6, 40, 35, dtype=dtype), tau, False, 1, key=KEY)
            for y in (soft, hard, *grads):
                assert y.isfinite().all()
            assert set(hard[0].argmax(0).unique().tolist()) == {3, 9}
            assert not soft[0, [i for i in range(40) if i not in (3, 9)]].any()
            torch.testing.assert_close(soft[1], equal[1])
            assert set(hard[2].argmax(0).unique().tolist()) == {38, 39}
            assert not grads[0][2, :-2].any()


@both
@hard_or_soft
def test_nan_and_infinite_noise(hard, backend):
    noise = torch.zeros(4, 20)
    noise[1, 7] = torch.inf
    logits = normals((4, 20), "l")
    logits[2, 3] = torch.nan
    noise[3, 5] = torch.nan
    with genperf.backend(backend):
        x = logits.requires_grad_()
        y = gumbel_softmax(x, 1.0, hard, noise=noise)
        (grad,) = torch.autograd.grad(y[:, :3].sum(), x)
        keyed = gumbel_softmax(logits, 1.0, hard, key=KEY)
    assert torch.equal(y.isnan().any(1), torch.tensor([False, False, True, True]))
    assert y[2:].isnan().all()
    assert y[1, 7] == 1
    assert grad[:2].isfinite().all()
    assert torch.equal(keyed.isnan().all(1), torch.tensor([False, False, True, False]))


@both
def test_ties_go_to_the_lowest(backend):
    for shape, dim in (((2, 9, 33), 1), ((2, 9, 3), 1), ((5, 33), 1)):
        with genperf.backend(backend):
            y = gumbel_softmax(torch.ones(shape), 1.0, True, dim, noise=torch.zeros(shape))
        assert not y.argmax(dim).any()


def test_nothing_but_the_key_is_kept():
    logits, kept = normals((4, 100), "l").requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gumbel_softmax(logits, 0.5, True)
    assert sorted(x.numel() for x in kept) == [2, 400]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": 1}, TypeError, "logits is int"),
        ({"logits": torch.zeros(2, 5).long()}, TypeError, "logits is torch.int64"),
        ({"logits": torch.zeros(())}, ValueError, r"logits has shape \(\)"),
        ({"tau": 0.0}, ValueError, "tau is 0.0"),
        ({"tau": math.nan}, ValueError, "tau is nan"),
        ({"tau": "1"}, TypeError, "tau is str"),
        ({"hard": 1}, TypeError, "hard is int"),
        ({"dim": 2}, IndexError, "dim is 2, expected one of -2 to 1"),
        ({"dim": 1.0}, TypeError, "dim is float"),
        ({"rng": "xorshift"}, ValueError, "rng is 'xorshift'"),
        ({"noise": torch.zeros(2, 4)}, ValueError, r"noise has shape \(2, 4\)"),
        ({"key": torch.zeros(2, 2, dtype=torch.int64), "dim": 0}, ValueError, "one for each entry"),
        ({"key": draw_key("cpu"), "generator": torch.Generator()}, ValueError, "more than one"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.zeros(2, 5), **change}
    with pytest.raises(error, match=message):
        gumbel_softmax(**arguments)
