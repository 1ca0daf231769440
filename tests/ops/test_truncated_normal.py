"""genperf.ops.truncated_normal against SciPy's distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import EMPTY, SHAPES, Case
from scipy import stats

import genperf
from genperf.ops import draw_key, philox_random, truncated_normal
from genperf.ops._truncated_normal_reference import _rounded

OPS = ("reference", "cpu", "triton")
INF = math.inf

#: low, high, mean and std: the middle, one side, both far tails, almost none of it.
LAWS = (
    (-2, 2, 0, 1), (-INF, INF, 0, 1), (1, 3, 0, 1), (-1, 8, 0, 1), (4, 6, 0, 1), (5, INF, 0, 1),
    (-9.9, -9, 0, 1), (10.1, 11, 0, 1), (-INF, -30, 0, 1), (0, 1e-3, 0, 1), (-4, -3.9, 0.3, 0.7),
    (0, INF, -100, 1), (200, 201, 0, 1), (-6, 0.5, 3, 2),
)  # fmt: skip


@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS[1:]))
def kernel(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


def _case(name, keys=lambda shape: torch.tensor([3, 7]), **options):
    return Case(
        name, lambda like, key: (truncated_normal(like.shape, key=key, dtype=like.dtype, **options),),
        constants=lambda shape: [torch.zeros(shape), keys(shape)], backends=OPS,
        shapes=SHAPES + EMPTY, elementwise=False,
    )  # fmt: skip


CASES = (
    _case("BigGAN", scale=0.4),
    _case("a tail, a key a sample", lambda shape: torch.arange(2 * shape[0]).view(-1, 2), low=-13, high=-12),
)


def law_of(low, high, mean, std):
    return stats.truncnorm((low - mean) / std, (high - mean) / std, mean, std)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_quantiles(law, backend):
    """Within what a change of the uniform by a few float32 roundings makes, and those of the result."""
    n = 333 if backend.costly else 20_000
    u = torch.linspace(0, 1, n, dtype=torch.float64)[1:-1].float().to(backend.device)
    low, high, mean, std = law
    x = truncated_normal(len(u), low=low, high=high, mean=mean, std=std, noise=u).cpu().double().numpy()
    u = u.cpu().double().numpy()
    with np.errstate(all="ignore"):
        exact = law_of(*law).ppf(u)
    rounding = np.spacing(np.abs(exact).astype(np.float32)) + 4e-7 * std
    assert (np.abs(x - exact) <= 4 * rounding).all()
    assert (np.diff(x) >= -rounding[1:]).all()
    assert x.min() >= low
    assert x.max() <= high


@pytest.mark.parametrize(("low", "high"), [(10.0, 11.0), (20.0, INF), (-150.0, -149.99), (3e4, INF)])
def test_far_tails_near_their_bound(low, high, backend):
    """The distance from the bound keeps its digits, where x itself has none left for it."""
    mean = -low if low > 0 else -high  # the bound becomes 0
    u = torch.tensor([2.0**-20, 1e-3, 0.1, 0.5, 0.9, 0.999], device=backend.device)
    x = truncated_normal(6, low=low + mean, high=high + mean, mean=mean, noise=u).cpu().double().numpy()
    v = u.cpu().double().numpy()
    near = abs(mean)
    if low < 0:
        x, v = -x[::-1], (1 - v)[::-1]
    width = high - low
    share = -np.expm1(stats.norm.logsf(near + width) - stats.norm.logsf(near)) if width < INF else 1.0
    for value, u0 in zip(x, v, strict=True):
        # log of the survival function by Gauss-Legendre quadrature of the hazard, to 1e-12
        nodes, weights = np.polynomial.legendre.leggauss(24)
        at = near + value * (nodes + 1) / 2
        hazard = np.exp(-(at**2) / 2 - stats.norm.logsf(at) - 0.5 * math.log(2 * math.pi))
        if near > 1000:
            hazard = at + 1 / at
        passed = (hazard * weights).sum() * value / 2
        assert passed == pytest.approx(-math.log1p(-u0 * share), rel=3e-6)


def test_the_same_bits(kernel):
    """Of keys and of noise, in every dtype."""
    n = 700 if kernel.costly else 2**16 + 5
    key, u = torch.tensor([2**40 + 3, -5]), torch.rand(n, generator=torch.Generator().manual_seed(1))
    u[:4] = torch.tensor([0.0, 1.0, 0.5, 2.0**-30])
    for low, high, mean, std in LAWS[:: 3 if kernel.costly else 1]:
        options = {"low": low, "high": high, "mean": mean, "std": std, "scale": 0.7}
        with genperf.backend("reference"):
            expected = truncated_normal(n, key=key, **options), truncated_normal(n, noise=u, **options)
        drawn = truncated_normal(n, key=key.to(kernel.device), **options)
        assert torch.equal(drawn.cpu(), expected[0])
        assert torch.equal(truncated_normal(n, noise=u.to(kernel.device), **options).cpu(), expected[1])
    for dtype in (torch.float16, torch.bfloat16):
        with genperf.backend("reference"):
            expected = truncated_normal((3, n // 3), key=key, dtype=dtype)
        assert torch.equal(
            truncated_normal((3, n // 3), key=key.to(kernel.device), dtype=dtype).cpu(), expected
        )


@pytest.mark.parametrize("law", [LAWS[i] for i in (0, 7, 13)], ids=str)
def test_the_distribution(law):
    """Kolmogorov-Smirnov; the p-values of many seeds are uniform themselves."""
    low, high, mean, std = law
    p = [
        stats.kstest(
            truncated_normal(
                2000, low=low, high=high, mean=mean, std=std, key=torch.tensor([seed, 1])
            ).numpy(),
            law_of(*law).cdf,
        ).pvalue
        for seed in range(60)
    ]
    assert stats.kstest(p, "uniform").pvalue > 1e-4
    assert min(p) > 1e-5


def test_the_statistics_can_fail():
    x = truncated_normal(50_000, key=torch.tensor([1, 1])).double().numpy()
    for wrong in (1.06 * x, x + 0.05, np.clip(x, -1.7, 1.7)):
        assert stats.kstest(wrong, law_of(*LAWS[0]).cdf).pvalue < 1e-4


@pytest.mark.parametrize("law", [LAWS[i] for i in (0, 2, 5, 8, 12, 13)], ids=str)
def test_moments(law):
    low, high, mean, std = law
    x = truncated_normal(400_000, low=low, high=high, mean=mean, std=std, key=torch.tensor([5, 5])).double()
    if law[0] == 200:  # beyond SciPy's moments: an exponential law of this rate, to its square
        x = (x - 200) * 200
        expected = (1.0 - 200 * math.exp(-200) - 1 / 200**2, 1.0)
    else:
        x = (x - mean) / std
        z = law_of((low - mean) / std, (high - mean) / std, 0, 1)
        expected = tuple(z.stats("mv"))
    error = math.sqrt(expected[1] / len(x))
    assert x.mean().item() == pytest.approx(expected[0], abs=5 * error)
    assert x.var().item() == pytest.approx(expected[1], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_within_the_bounds_after_rounding(dtype, backend):
    """Bounds that no number of the dtype is equal to."""
    n = 500 if backend.costly else 20_000
    for low, high, scale in (
        (-0.3, 0.3, 1.0),
        (0.1, 0.10013 if dtype.itemsize > 2 else 0.107, 1.0),
        (-2, 2, 0.3),
    ):
        key = torch.tensor([1, 2], device=backend.device)
        x = truncated_normal(n, low=low, high=high, scale=scale, key=key, dtype=dtype)
        assert x.dtype == dtype
        assert x.double().min() >= low * scale
        assert x.double().max() <= high * scale
        assert len(x.unique()) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_of_bounds(dtype):
    values = [*np.random.RandomState(0).normal(size=50) * 10.0 ** np.arange(-9, 41).astype(float)]
    for value in [*map(float, values), 0.1, -0.3, 65504.0, 65520.0, 1e-8, 2.0**-24]:
        nearest, up, down = (_rounded(value, dtype, d) for d in (0, 1, -1))
        assert nearest == torch.tensor(value, dtype=torch.float64).to(dtype).item()
        assert down <= value <= up
        for y in (up, down):
            assert torch.tensor(y, dtype=torch.float64).to(dtype).item() == y
        assert up == down or nearest in (up, down)


def test_biggan():
    """What public code draws: SciPy's numbers times the truncation, from the same uniforms."""
    state = np.random.RandomState(7)
    expected = 0.5 * stats.truncnorm.rvs(-2, 2, size=(4, 128), random_state=state)
    u = torch.from_numpy(np.random.RandomState(7).uniform(size=(4, 128))).float()
    np.testing.assert_allclose(truncated_normal((4, 128), scale=0.5, noise=u).numpy(), expected, atol=1e-6)


def test_randomness():
    torch.manual_seed(3)
    first = truncated_normal((2, 3))
    torch.manual_seed(3)
    assert torch.equal(truncated_normal((2, 3)), first)
    torch.manual_seed(3)
    assert torch.equal(truncated_normal((2, 3), key=draw_key("cpu")), first)
    generator = torch.Generator().manual_seed(4)
    drawn = truncated_normal(9, rng="torch", generator=generator)
    u = torch.rand(9, generator=generator.manual_seed(4))
    assert torch.equal(drawn, truncated_normal(9, noise=u))
    both = truncated_normal((2, 50), generator=[torch.Generator().manual_seed(i) for i in (1, 1)])
    assert torch.equal(both[0], both[1])
    assert both.dtype == torch.float32
    # The sign of a number is that of Philox's uniform less one half.
    key = draw_key("cpu")
    assert torch.equal(truncated_normal(1000, key=key) > 0, philox_random((1000,), key, "uniform") > 0.5)


def test_compiled():
    def function(like, low):
        return truncated_normal(like.shape, low=low, high=3.0, scale=0.5)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for low in (-1.0, -1.5):
        torch.manual_seed(0)
        expected = function(torch.zeros(4, 5), low)
        torch.manual_seed(0)
        assert torch.equal(compiled(torch.zeros(4, 5), low), expected)


@pytest.mark.parametrize(
    ("error", "message", "size", "options"),
    [
        (ValueError, "low is 2, expected less than high, 2", 3, {"low": 2}),
        (ValueError, "low is nan, expected no NaN", 3, {"low": math.nan}),
        (ValueError, "mean is inf, expected a finite number", 3, {"mean": INF}),
        (ValueError, "std is 0, expected a finite number > 0", 3, {"std": 0}),
        (ValueError, "std is -1.0", 3, {"std": -1.0}),
        (ValueError, "scale is 0.0", 3, {"scale": 0.0}),
        (TypeError, "mean is Tensor, expected a number", 3, {"mean": torch.zeros(3)}),
        (TypeError, "low is bool", 3, {"low": True}),
        (ValueError, "expected bounds with a number of torch.bfloat16 between", 3,
         {"low": 0.3001, "high": 0.3002, "dtype": torch.bfloat16}),
        (ValueError, "within its range", 3, {"low": 1e300, "high": INF, "std": 1e-300}),
        (TypeError, "dtype is torch.int64", 3, {"dtype": torch.int64}),
        (ValueError, r"size is \(2, -1\)", (2, -1), {}),
        (TypeError, "size is 2.0, expected integers", 2.0, {}),
        (TypeError, "noise is torch.float64, expected a torch.float32", 3, {"noise": torch.rand(3).double()}),
        (ValueError, r"noise has shape \(4,\)", 3, {"noise": torch.rand(4)}),
        (ValueError, r"key has shape \(3,\)", 3, {"key": torch.arange(3)}),
        (ValueError, "rng is 'x'", 3, {"rng": "x"}),
        (ValueError, "generator has 1 entries", 3, {"generator": [torch.Generator()]}),
    ],
)  # fmt: skip
def test_bad_input(error, message, size, options):
    with pytest.raises(error, match=message):
        truncated_normal(size, **options)
