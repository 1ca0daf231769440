"""genperf.ops.discretized_logistic_nll against the definition, and against a mixture of one."""

from __future__ import annotations

import math

import pytest
import torch
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import SHAPES, Case, normals
from genperf_testing.mixture import eager_nll, level_values, random_levels

from genperf.ops import discretized_logistic_nll, mixture_logistic_nll

OPS = ("reference", "cpu", "triton")


# On a GPU the contract suite runs the ops; these tensors are on the CPU.
@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS and b.device == "cpu"))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


def _case(name, **options):
    def function(mean, log_scale, x):
        params = torch.stack([mean, log_scale], 1)
        return (discretized_logistic_nll(params.flatten(1, 2), x, **options),)

    unit = options.get("convention") == "nvae"
    return Case(
        name, function, lambda shape: [normals(shape, "m") * 0.5, normals(shape, "s") * 0.5 - 1.0],
        lambda shape: [random_levels(shape, 256, unit).float()], backends=OPS,
        elementwise=False, packs=True, per_sample=options.get("reduction") != "sum",
        shapes=(*(s for s in SHAPES if len(s) > 1), (0, 4), (3, 0)),
    )  # fmt: skip


CASES = (
    _case("each"),
    _case("NVAE, by sample", convention="nvae", reduction="sample"),
)


@pytest.mark.parametrize("convention", ["default", "openai", "nvae"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_definition(convention, channel_dim, backend):
    means, log_scales = normals((2, 5, 4, 7), "m") * 0.6, normals((2, 5, 4, 7), "s") * 2 - 3
    x = random_levels((2, 5, 4, 7), unit=convention == "nvae")
    low = -8.0 if convention == "nvae" else -7.0
    alone = [t.double().reshape(1, 1, -1) for t in (torch.zeros_like(means), means, log_scales)]
    expected = eager_nll(torch.cat(alone, 1), x.reshape(1, 1, -1), convention, low=low).view_as(x)
    params = torch.cat([means, log_scales], 1).movedim(1, channel_dim)
    out = discretized_logistic_nll(
        params, x.float().movedim(1, channel_dim), channel_dim=channel_dim, convention=convention
    )
    torch.testing.assert_close(out.double().movedim(channel_dim, 1), expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("convention", ["default", "openai", "nvae"])
@pytest.mark.parametrize("value", [0, 254, 255])
def test_values_at_the_ends(convention, value, backend):
    params = torch.cat([normals((4, 3, 5), "m"), normals((4, 3, 5), "s") - 2], 1)
    x = level_values(256, convention == "nvae")[value].expand(4, 3, 5)
    flat = torch.stack([torch.zeros(60), params[:, :3].flatten(), params[:, 3:].flatten()])[None].double()
    expected = eager_nll(flat, x.reshape(1, 1, -1), convention).view(4, 3, 5)
    out = discretized_logistic_nll(params, x.float(), convention=convention)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


def test_it_is_a_mixture_of_one(backend):
    mean, log_scale = normals((3, 1, 9), "m"), normals((3, 1, 9), "s")
    x = random_levels((3, 1, 9)).float()
    mixture = torch.cat([torch.zeros(3, 1, 9), mean, log_scale], 1)
    for reduction in ("none", "sample", "sum", "sample_mean"):
        one = discretized_logistic_nll(torch.cat([mean, log_scale], 1), x, reduction=reduction)
        other = mixture_logistic_nll(mixture, x, reduction=reduction)
        torch.testing.assert_close(one, other[:, None] if reduction == "none" else other)


def test_a_bound_on_the_scales(backend):
    params = torch.tensor([0.1, -9.0]).view(1, 2, 1).requires_grad_()
    x = torch.tensor([0.1]).view(1, 1, 1)
    for bound in (-7.0, -8.5):
        out = discretized_logistic_nll(params, x, min_log_scale=bound)
        v = math.exp(-bound) / 255
        assert out.item() == pytest.approx(-math.log(math.tanh(v / 2)), rel=1e-4, abs=2e-7)
        assert torch.autograd.grad(out.sum(), params)[0][0, 1] == 0


def test_bad_arguments():
    x = torch.zeros(2, 3, 4)
    for error, match, call in (
        (TypeError, "params is NoneType", lambda: discretized_logistic_nll(None, x)),
        (TypeError, "params is torch.int32", lambda: discretized_logistic_nll(torch.zeros(2, 6, 4).int(), x)),
        (ValueError, "expected an even size", lambda: discretized_logistic_nll(torch.zeros(2, 5, 4), x)),
        (ValueError, "space", lambda: discretized_logistic_nll(torch.zeros(2, 8, 4), x)),
    ):
        with pytest.raises(error, match=match):
            call()
