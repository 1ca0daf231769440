"""The formulas of genperf.ops.gaussian_sample in float64, by the definitions alone, and keys."""

from __future__ import annotations

import torch
from torch.distributions import Normal

KEY = torch.tensor([0x1234_5678_9ABC, -7])


def keys_of(shape):
    return [torch.stack([KEY + (i << 31) for i in range(shape[0])]) if shape[0] else KEY.new_empty(0, 2)]


def posterior(mean, scale, parametrization, clamp=None, offset=None, temperature=1.0):
    """torch.distributions.Normal of the parameters."""
    mean, scale = mean.double(), scale.double()
    if clamp:
        scale = scale.clamp(*clamp)
    if parametrization == "logvar":
        sigma = torch.exp(scale / 2)
    elif parametrization == "logsigma":
        sigma = torch.exp(scale)
    elif parametrization == "std":
        sigma = scale
    elif parametrization == "softplus":
        sigma = torch.nn.functional.softplus(scale) + (offset or 0.0)
    else:
        sigma = torch.exp(5 * torch.tanh(scale / 5)) + (1e-2 if offset is None else offset)
        mean = 5 * torch.tanh(mean / 5)
    return Normal(mean, sigma * temperature, validate_args=False)


def reduced(x, reduction):
    if reduction == "none":
        return x
    sums = x.flatten(1).sum(1)
    return sums if reduction == "sample" else sums.mean()
