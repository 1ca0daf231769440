"""The formulas of :func:`genperf.ops.gaussian_sample` in plain torch: the specification."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.ops.philox_random import reference_normals

#: What the scale means, by its number in the torch op.
TRANSFORMS = {"logvar": 0, "logsigma": 1, "std": 2, "softplus": 3, "soft_clamp": 4}
_LARGEST = torch.finfo(torch.float32).max


class _Gaussian(NamedTuple):
    """mu, sigma and log sigma, and the derivatives of them by the raw mean and scale."""

    mu: Tensor
    sigma: Tensor
    log_sigma: Tensor
    d_mu: Tensor
    d_sigma: Tensor
    d_log_sigma: Tensor


def _gaussian(
    mean: Tensor, scale: Tensor, transform: int, low: float, high: float, offset: float, temperature: float
) -> _Gaussian:
    mean, scale = _widened(mean), _widened(scale)
    one = torch.ones_like(mean)
    mu, d_mu = mean, one
    if transform in (TRANSFORMS["logvar"], TRANSFORMS["logsigma"]):
        factor = 0.5 if transform == TRANSFORMS["logvar"] else 1.0
        log_sigma = factor * scale.clamp(low, high)
        sigma = log_sigma.exp()
        d_log_sigma = factor * ((scale >= low) & (scale <= high)).to(scale.dtype)
        d_sigma = sigma * d_log_sigma
    elif transform == TRANSFORMS["std"]:
        sigma, log_sigma = scale, scale.log()
        d_sigma, d_log_sigma = one, scale.reciprocal()
    else:
        if transform == TRANSFORMS["softplus"]:
            sigma, d_sigma = F.softplus(scale) + offset, scale.sigmoid()
        else:
            e = (5 * torch.tanh(scale / 5)).exp()
            mu, d_mu = 5 * torch.tanh(mean / 5), torch.cosh(mean / 5) ** -2
            sigma, d_sigma = e + offset, e * torch.cosh(scale / 5) ** -2
        # 1 is the limit of the softplus, where both underflow.
        log_sigma, d_log_sigma = sigma.log(), torch.where(sigma == 0, one, d_sigma / sigma)
    return _Gaussian(
        mu, sigma * temperature, log_sigma + math.log(temperature), d_mu, d_sigma * temperature, d_log_sigma
    )


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _exp_m1_mx(x: Tensor) -> Tensor:
    """e^x - 1 - x, never negative: the series near 0, where the difference would cancel."""
    series = torch.full_like(x, 1 / math.factorial(14))
    for k in range(13, 1, -1):
        series = series * x + 1 / math.factorial(k)
    return torch.where(x.abs() <= 1, series * x * x, x.exp() - 1 - x)


def _divergence_parts(q: _Gaussian, prior: _Gaussian | None) -> tuple[Tensor, Tensor, Tensor]:
    """(mu - mu') / sigma', the same once more over sigma', and 2 (log sigma - log sigma')."""
    if prior is None:
        return q.mu, q.mu, 2 * q.log_sigma
    difference, precision = q.mu - prior.mu, (-prior.log_sigma).exp()
    shift = torch.where(difference == 0, difference, difference * precision)
    return shift, torch.where(shift == 0, shift, shift * precision), 2 * (q.log_sigma - prior.log_sigma)


def _noise(mean: Tensor, noise: Tensor | None, key: Tensor | None) -> Tensor:
    if noise is None:
        assert key is not None
        noise = reference_normals(mean.shape, key)
    return noise.to(_widened(mean).dtype)


def _reduced(x: Tensor, reduce: bool) -> Tensor:
    if not reduce:
        return x
    return x.flatten(1).sum(1, dtype=torch.float64).clamp(max=_LARGEST).to(x.dtype) if x.dim() > 1 else x


def _spread(grad: Tensor, mean: Tensor, reduce: bool) -> Tensor:
    """The gradient of a per-sample sum, for each element."""
    return grad.view([-1] + [1] * (mean.dim() - 1)) if reduce else grad


def reference(
    mean, scale, prior_mean, prior_scale, noise, key,
    transform, low, high, offset, temperature, reduce, want_z, want_kl, want_log_prob,
):  # fmt: skip
    q = _gaussian(mean, scale, transform, low, high, offset, temperature)
    eps = _noise(mean, noise, key) if want_z or want_log_prob else torch.empty(0)
    z = kl = log_prob = None
    if want_z:
        z = torch.empty_like(mean).copy_(q.mu + q.sigma * eps)
    if want_kl:
        prior = prior_mean is not None and _gaussian(
            prior_mean, prior_scale, transform, low, high, offset, 1.0
        )
        shift, _, difference = _divergence_parts(q, prior or None)
        kl = (0.5 * shift * shift + 0.5 * _exp_m1_mx(difference)).clamp(max=_LARGEST)
        kl = _reduced(kl, reduce)
    if want_log_prob:
        log_prob = _reduced(-0.5 * eps * eps - q.log_sigma - 0.5 * math.log(2 * math.pi), reduce)
    return z, kl, log_prob


def reference_backward(
    grad_z, grad_kl, grad_log_prob, mean, scale, prior_mean, prior_scale, noise, key,
    transform, low, high, offset, temperature, reduce,
):  # fmt: skip
    q = _gaussian(mean, scale, transform, low, high, offset, temperature)
    by_mu = by_scale = torch.zeros_like(q.mu)
    by_prior_mean = by_prior_scale = None
    if grad_z is not None:
        by_mu = by_mu + grad_z
        by_scale = by_scale + grad_z * _noise(mean, noise, key) * q.d_sigma
    if grad_log_prob is not None:
        by_scale = by_scale - _spread(grad_log_prob, mean, reduce) * q.d_log_sigma
    if grad_kl is not None:
        prior = None
        if prior_mean is not None:
            prior = _gaussian(prior_mean, prior_scale, transform, low, high, offset, 1.0)
        grad_kl = _spread(grad_kl, mean, reduce)
        shift, scaled_shift, difference = _divergence_parts(q, prior)
        by_mu = by_mu + grad_kl * scaled_shift
        by_scale = by_scale + grad_kl * difference.expm1() * q.d_log_sigma
        if prior is not None:
            by_prior_mean = -grad_kl * scaled_shift * prior.d_mu
            by_prior_scale = -grad_kl * (shift * shift + difference.expm1()) * prior.d_log_sigma
    grads = [(by_mu * q.d_mu).to(mean.dtype), by_scale.to(scale.dtype)]
    if by_prior_mean is None or by_prior_scale is None:
        return *grads, None, None
    return *grads, by_prior_mean.to(mean.dtype), by_prior_scale.to(mean.dtype)
