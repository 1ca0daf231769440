"""genperf.ops.discretized_logistic_sample against its definition."""

from __future__ import annotations

import pytest
import torch
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import SHAPES, Case, normals
from scipy import stats

import genperf
from genperf.ops import discretized_logistic_sample, philox_random

OPS = ("reference", "cpu", "triton")


# On a GPU the contract suite runs the ops; these tensors are on the CPU.
@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS and b.device == "cpu"))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


CASES = (
    Case(
        "each", lambda params, key: (discretized_logistic_sample(params, key=key),),
        constants=lambda shape: [
            normals((shape[0], 2 * shape[1], *shape[2:]), "p") * 0.25, torch.tensor([3, 7])
        ],
        shapes=(*(s for s in SHAPES if len(s) > 1), (0, 4), (3, 0)), backends=OPS, elementwise=False,
    ),
)  # fmt: skip


@pytest.mark.parametrize("convention", ["default", "nvae"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_definition(convention, channel_dim, backend):
    means, log_scales = normals((2, 5, 4, 7), "m") * 0.6, normals((2, 5, 4, 7), "s") * 2 - 4
    shape = (2, 5, 4, 7) if channel_dim == 1 else (2, 4, 7, 5)
    u = philox_random(shape, torch.tensor([4, 4]), "uniform")
    params = torch.cat([means, log_scales], 1).movedim(1, channel_dim)
    options = {"channel_dim": channel_dim, "convention": convention, "temperature": 0.5}
    out = discretized_logistic_sample(params, key=torch.tensor([4, 4]), **options)
    assert torch.equal(out, discretized_logistic_sample(params, noise=u, **options))
    v = u.double().movedim(channel_dim, 1).clamp(1e-5, 1 - 1e-5)
    low = -8.0 if convention == "nvae" else -7.0
    x = means + 0.5 * log_scales.double().clamp(min=low).exp() * (v.log() - (1 - v).log())
    x = x.clamp(-1, 1) * (0.5 if convention == "nvae" else 1.0) + (0.5 if convention == "nvae" else 0.0)
    torch.testing.assert_close(out.double().movedim(channel_dim, 1), x, rtol=1e-5, atol=1e-5)


def test_every_backend_draws_the_same_bits(backend):
    if backend.backend == "reference":
        pytest.skip("takes torch's own exponential")
    params, key = normals((2, 6, 3, 7), "p"), torch.tensor([3, 1])
    out = discretized_logistic_sample(params, key=key)
    with genperf.backend("cpu"), genperf.cpu_isa("baseline"):
        assert torch.equal(out, discretized_logistic_sample(params, key=key))


def test_the_noise_of_public_code():
    params = torch.zeros(2, 6, 5)
    params[:, 3:] = -3.0
    torch.manual_seed(2)
    out = discretized_logistic_sample(params, rng="torch", convention="nvae")
    torch.manual_seed(2)
    u = torch.empty(2, 3, 5).uniform_(1e-5, 1 - 1e-5)
    torch.testing.assert_close(out, (0.049787068 * (u.log() - (1 - u).log())) / 2 + 0.5)


def test_the_distribution(backend):
    n = 500 if backend.costly else 20_000
    params = torch.tensor([0.1, -4.0]).view(1, 2, 1).expand(1, 2, n)
    x = discretized_logistic_sample(params, key=torch.tensor([8, 8])).flatten().numpy()
    assert stats.kstest(x, stats.logistic(0.1, 0.018315639).cdf).pvalue > 1e-3


def test_bad_arguments():
    for error, match, call in (
        (ValueError, "expected an even size", lambda: discretized_logistic_sample(torch.zeros(2, 5))),
        (ValueError, "noise has shape", lambda: discretized_logistic_sample(
            torch.zeros(2, 6, 4), noise=torch.zeros(2, 6, 4))),
        (ValueError, "convention is 'x'", lambda: discretized_logistic_sample(
            torch.zeros(2, 6, 4), convention="x")),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
