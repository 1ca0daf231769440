"""The distributions of genperf.nn are their ops."""

import torch
from genperf_testing.cases import normals
from scipy import stats

from genperf.nn import Bernoulli, Gaussian, TruncatedNormal, trunc_normal_
from genperf.ops import truncated_normal


def test_bernoulli():
    logits, x = normals((3, 4, 5), "l"), (normals((3, 4, 5), "x") > 0).float()
    ours, theirs = Bernoulli(logits), torch.distributions.Bernoulli(logits=logits)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.mean, theirs.mean)
    assert ours.nll(x, "sample").shape == (3,)
    torch.manual_seed(2)
    drawn = ours.sample()
    torch.manual_seed(2)
    assert torch.equal(drawn, theirs.sample())


def test_gaussian():
    params, x = normals((3, 4, 5), "p"), normals((3, 2, 5), "x")
    mean, logvar = params.chunk(2, 1)
    ours, theirs = Gaussian(params), torch.distributions.Normal(mean, (0.5 * logvar).exp())
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    assert torch.equal(ours.mean, mean)
    torch.manual_seed(2)
    drawn = ours.sample()
    torch.manual_seed(2)
    torch.testing.assert_close(drawn, theirs.rsample())
    scale = torch.tensor(-1.0, requires_grad=True)
    shared = Gaussian(mean, scale, parametrization="logsigma", rng="philox")
    shared.nll(x, "sum").backward()
    assert scale.grad.isfinite()
    assert shared.sample(0.5).shape == mean.shape
    assert torch.equal(shared.mean, mean)


def test_truncated_normals():
    noise = TruncatedNormal(scale=0.4)
    torch.manual_seed(1)
    z = noise.sample((3, 4))
    torch.manual_seed(1)
    assert torch.equal(z, truncated_normal((3, 4), scale=0.4))
    weight = torch.nn.Parameter(torch.empty(50, 60))
    assert trunc_normal_(weight, 0.1, 0.02, 0.07, 0.2, torch.Generator().manual_seed(1)) is weight
    law = stats.truncnorm((0.07 - 0.1) / 0.02, (0.2 - 0.1) / 0.02, 0.1, 0.02)
    assert stats.kstest(weight.detach().flatten().double().numpy(), law.cdf).pvalue > 1e-3
    assert weight.requires_grad
