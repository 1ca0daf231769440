"""genperf.ops.gaussian_nll against torch.distributions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import EMPTY, SHAPES, Case, normals
from torch.distributions import Normal

import genperf
from genperf.bench.measure import peak_bytes
from genperf.ops import gaussian_nll

OPS = ("reference", "cpu", "triton")


@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


def _case(name, own_scale=False, **options):
    """Of x, too, where the scale is a tensor of its own."""

    def halves(mean, scale, x):
        return (gaussian_nll(torch.stack([mean, scale], 1).flatten(1, 2), x, **options),)

    def separate(mean, scale, x):
        return (gaussian_nll(mean, x, scale=scale, **options),)

    return Case(
        name, separate if own_scale else halves,
        lambda s: [normals(s, "m"), normals(s, "s"), normals(s, "x")][: 2 + own_scale],
        lambda s: [] if own_scale else [normals(s, "x")],
        backends=OPS, elementwise=own_scale and options.get("reduction") != "sum", packs=not own_scale,
        per_sample=options.get("reduction") != "sum",
        shapes=tuple(s for s in SHAPES + EMPTY if own_scale or len(s) > 1),
    )  # fmt: skip


CASES = (
    _case("each"),
    _case("its own scale, by sample", own_scale=True, reduction="sample", parametrization="logsigma"),
    _case("sum, bounded", reduction="sum", clamp=(-0.75, 0.8), parametrization="logsigma"),
)


@pytest.mark.parametrize("reduction", ["none", "sample", "sum"])
@pytest.mark.parametrize("parametrization", ["logvar", "logsigma"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_definition(reduction, parametrization, channel_dim, backend):
    params = normals((3, 8, 5, 6), "p").movedim(1, channel_dim).contiguous().requires_grad_()
    x = normals((3, 4, 5, 6), "x").movedim(1, channel_dim).contiguous().requires_grad_()
    options = {"parametrization": parametrization, "channel_dim": channel_dim, "clamp": (-1.0, 1.5)}
    out = gaussian_nll(params, x, reduction=reduction, **options)
    exact = [t.detach().double().requires_grad_() for t in (params, x)]
    mean, scale = exact[0].chunk(2, channel_dim)
    sigma = (scale.clamp(-1.0, 1.5) * (0.5 if parametrization == "logvar" else 1.0)).exp()
    each = -Normal(mean, sigma).log_prob(exact[1])
    expected = {"none": each, "sample": each.sum((1, 2, 3)), "sum": each.sum()}[reduction]
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    cotangent = normals(tuple(out.shape), "g")
    grads = torch.autograd.grad(out, (params, x), cotangent)
    for g, e in zip(grads, torch.autograd.grad(expected, exact, cotangent.double()), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=3e-6, atol=2e-6)


def test_one_scale_for_all_values(backend):
    """The decoder of sigma-VAE: the best scale is that of the mean squared error."""
    mean, x = normals((4, 3, 6), "m"), normals((4, 3, 6), "x")
    log_sigma = (x - mean).square().mean().sqrt().log().to(backend.device).requires_grad_()
    out = gaussian_nll(
        mean.to(backend.device), x.to(backend.device), scale=log_sigma, parametrization="logsigma",
        reduction="sum",
    )  # fmt: skip
    expected = 72 * (0.5 + log_sigma.item() + 0.5 * math.log(2 * math.pi))
    assert out.item() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad(out, log_sigma)
    assert grad.shape == ()
    assert abs(grad.item()) < 1e-4


def test_the_gradient_in_forward_and_in_backward():
    params, x = normals((5, 6, 100), "p").requires_grad_(), normals((5, 3, 100), "x")
    for reduction, shape in (("none", (5, 3, 100)), ("sample", (5,))):
        out = gaussian_nll(params, x, reduction=reduction)
        g = normals(shape, "g")
        first, second = (torch.autograd.grad(out, params, g, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        with torch.no_grad():
            assert torch.equal(gaussian_nll(params, x, reduction=reduction), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extremes(dtype, backend):
    """Finite where the formulas of public code overflow; a scale of 1e-18 and a distance of 1e18 count."""
    most = torch.finfo(dtype).max
    mean = torch.tensor([0.0, most, -most, 1.0, 1.0, 0.0], dtype=dtype)
    scale = torch.tensor([-most, -most, most, 2.0, -60.0, most], dtype=dtype)
    x = torch.tensor([0.0, -most, most, 1.0, 2.0, 0.0], dtype=dtype)
    params = torch.stack([mean, scale])[None].to(backend.device).requires_grad_()
    out = gaussian_nll(params, x[None, None].to(backend.device))
    assert out.isfinite().all()
    assert out[0, 0, 3].item() == pytest.approx(1 + 0.5 * math.log(2 * math.pi), rel=1e-3)
    assert out[0, 0, 4].item() == pytest.approx(0.5 * math.exp(60) - 30, rel=1e-3)
    (grad,) = torch.autograd.grad(out.sum(), params)
    assert not grad.isnan().any()
    if dtype != torch.float16:
        assert grad.isfinite().all()
    assert grad[0, 1, 0] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(dtype):
    """Nothing of the size of the values but the gradient, which is returned."""
    n = 1 << 14
    params = normals((2, 2, n), "p").to(dtype).requires_grad_()
    x = normals((2, 1, n), "x").sigmoid()

    def run(_):
        return torch.autograd.grad(gaussian_nll(params, x, reduction="sum"), params)

    with genperf.backend("cpu"):
        assert peak_bytes(lambda: None, run, torch.device("cpu")) < 1024


def test_bad_arguments():
    params, x = torch.zeros(2, 6, 4), torch.zeros(2, 3, 4)
    for error, match, call in (
        (TypeError, "params is NoneType", lambda: gaussian_nll(None, x)),
        (ValueError, "expected an even size in dimension 1", lambda: gaussian_nll(params[:, :5], x)),
        (ValueError, r"x has shape \(2, 3, 5\), expected \(2, 3, 4\)",
         lambda: gaussian_nll(params, torch.zeros(2, 3, 5))),
        (ValueError, "scale has shape", lambda: gaussian_nll(x, x, scale=torch.zeros(5))),
        (ValueError, "parametrization is 'std'", lambda: gaussian_nll(params, x, parametrization="std")),
        (ValueError, r"clamp is \(2, 1\)", lambda: gaussian_nll(params, x, clamp=(2, 1))),
        (ValueError, "channel_dim is 2", lambda: gaussian_nll(params, x, channel_dim=2)),
        (ValueError, "reduction is 'mean'", lambda: gaussian_nll(params, x, reduction="mean")),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
