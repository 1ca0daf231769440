"""The distributions of genperf.nn are their ops."""

import pytest
import torch
from genperf_testing.mixture import eager_nll, eager_sample, parameters_of, random_levels

from genperf.nn import DiscretizedLogistic, MixtureLogistic
from genperf.ops import discretized_logistic_nll


@pytest.mark.parametrize("channels", [1, 3])
def test_mixture(channels):
    params = parameters_of(2, 4, channels, 5, 6).requires_grad_()
    x = random_levels((2, channels, 5, 6), unit=True)
    p = MixtureLogistic(params, 4, channels, convention="nvae")
    log_prob = p.log_prob(x.float())
    torch.testing.assert_close(
        log_prob.double(), -eager_nll(params.double(), x, "nvae"), rtol=3e-5, atol=3e-5
    )
    torch.testing.assert_close(p.nll(x.float(), "sum"), -log_prob.sum())
    log_prob.sum().backward()
    assert params.grad.isfinite().all()
    torch.manual_seed(1)
    drawn = p.sample(0.9)
    torch.manual_seed(1)
    u = [torch.empty(2, n, 5, 6).uniform_(1e-5, 1 - 1e-5) for n in (4, channels)]
    torch.testing.assert_close(drawn, eager_sample(params.detach(), *u, 0.9, nvae=True), rtol=1e-5, atol=1e-5)


def test_single_logistics():
    params, x = torch.randn(2, 6, 4), random_levels((2, 3, 4)).float()
    p = DiscretizedLogistic(params)
    torch.testing.assert_close(p.log_prob(x), -discretized_logistic_nll(params, x))
    assert p.nll(x, "sample").shape == (2,)
    assert p.sample().shape == x.shape
    assert p.sample().abs().max() <= 1
