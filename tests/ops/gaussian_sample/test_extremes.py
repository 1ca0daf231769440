"""genperf.ops.gaussian_sample where eager gives inf, NaN or a negative divergence, or loses all digits."""

from __future__ import annotations

import math

import pytest
import torch
from genperf_testing.gaussian import posterior, reduced

from genperf.ops import gaussian_sample

EXTREMES = {
    # name: (options, mean, scale, prior)
    "log-variance 20": ({}, 0.0, 20.0, None),
    "log-variance -30": ({}, 0.0, -30.0, None),
    "log-variance 11.1": ({}, 0.0, 11.1, None),
    "log-variance 100": ({}, 1.0, 100.0, None),
    "log-variance -200": ({}, 1.0, -200.0, None),
    "log-variance 1e-4": ({}, 0.0, 1e-4, None),
    "log-variance 0.01": ({}, 0.0, 0.01, None),
    "log-variance -0.01": ({}, 0.0, -0.01, None),
    "mean 1e15": ({}, 1e15, 0.0, None),
    "both log-sigmas -60": ({"parametrization": "logsigma"}, 0.25, -60.0, (0.25, -60.0)),
    "prior's log-sigma -45": ({"parametrization": "logsigma"}, 0.0, -1.0, (0.0, -45.0)),
    "prior's log-sigma -45, other mean": ({"parametrization": "logsigma"}, 1.0, -1.0, (0.0, -45.0)),
    "equal": ({}, 0.3, 0.7, (0.3, 0.7)),
    "softplus -80": ({"parametrization": "softplus"}, 0.0, -80.0, None),
    "soft clamp -1e4": ({"parametrization": "soft_clamp"}, 1e4, -1e4, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(backend, name, dtype):
    """Finite and never negative, and near the exact value wherever float32 can hold it."""
    options, mean, scale, prior = EXTREMES[name]
    tensors = [torch.full((2, 3), x, device=backend.device).to(dtype) for x in (mean, scale, *(prior or ()))]
    if not all(x.isfinite().all() for x in tensors):
        pytest.skip(f"{dtype} does not hold the parameters")
    given = {"prior": tensors[2:] if prior else None, "noise": torch.ones_like(tensors[0]), **options}
    parametrization = options.get("parametrization", "logvar")
    q = posterior(*tensors[:2], parametrization)
    p = (
        posterior(*tensors[2:], parametrization)
        if prior
        else posterior(*map(torch.zeros_like, tensors[:2]), "logvar")
    )
    shift = torch.where(q.mean == p.mean, 0.0, (q.mean - p.mean) / p.stddev)
    ratio = 2 * (q.stddev.log() - p.stddev.log())
    exact = 0.5 * shift**2 + 0.5 * (torch.expm1(ratio) - ratio)
    for reduction in ("none", "sample"):
        kl = gaussian_sample(*tensors[:2], reduction=reduction, **given).kl
        assert kl.isfinite().all()
        assert (kl >= 0).all()
        expected = reduced(exact, reduction).clamp(max=torch.finfo(torch.float32).max)
        # Float64 loses 1e-16 to the cancellation in e^x - 1 - x; and a rounding of an exponent of 200 is 200
        # roundings of its power.
        torch.testing.assert_close(kl.double(), expected, rtol=2e-5, atol=1e-12)


def test_softplus_of_infinity(backend):
    """softplus(-inf) is 0, as that of -200, and softplus(inf) is inf; a NaN stays at its place."""
    scale = torch.tensor([[-math.inf, -200.0, math.nan, 0.0]], device=backend.device, requires_grad=True)
    mean = torch.full_like(scale, 0.25)
    options = {"parametrization": "softplus", "noise": torch.ones_like(mean), "reduction": "none"}
    out = gaussian_sample(mean, scale, offset=0.5, log_prob=True, **options)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in out), scale)
    for x in (*out, gradient):
        assert x[0, 0] == x[0, 1]
        assert x.isnan().tolist() == [[False, False, True, False]]
    assert (out.z[0, 0], gradient[0, 0]) == (0.75, 0)
    assert gaussian_sample(mean, scale, **options).z[0, 0] == 0.25
    assert (gaussian_sample(mean, torch.full_like(mean, math.inf), **options).z == math.inf).all()


def test_eager_is_worse():
    """The cases above are not vacuous: the usual formula fails in them."""

    def eager(mean, logvar):
        return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)

    zero = torch.zeros(())
    assert eager(zero.half(), torch.tensor(11.1).half()).isinf()
    assert eager(zero.bfloat16(), torch.tensor(0.01).bfloat16()) < 0
    assert abs(eager(zero, torch.tensor(1e-4)) - 2.5e-9) > 2e-9


def test_small_divergences_are_accurate(backend):
    """Each to a dozen roundings, where 1 + x - e^x would cancel."""
    logvar = torch.cat([s * torch.logspace(-7, 0, 400) for s in (-1.0, 1.0)])[None].to(backend.device)
    kl = gaussian_sample(torch.zeros_like(logvar), logvar, sample=False, reduction="none").kl.cpu().double()
    x = logvar.cpu().double()
    series = sum(x**k / math.factorial(k) for k in range(2, 20))
    torch.testing.assert_close(kl, 0.5 * series, rtol=2e-6, atol=0)


def test_sums_saturate(backend):
    mean = torch.full((2, 64), 1e19, device=backend.device)
    kl = gaussian_sample(mean, torch.zeros_like(mean), sample=False).kl
    assert (kl == torch.finfo(torch.float32).max).all()


def test_no_early_overflow(kernel):
    mean = torch.full((1, 1), 2.4e19, device=kernel.device)
    kl = gaussian_sample(mean, torch.zeros_like(mean), sample=False).kl
    torch.testing.assert_close(kl.item(), 0.5 * mean.double().item() ** 2, rtol=1e-6, atol=0)
