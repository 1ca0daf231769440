"""The likelihoods of the Bernoulli and Gaussian heads, an element at a time, in torch: the specification.

Parameters are [B, 1, *] (logits, or means with a scale of their own [B, *]) or [B, 2, *] (means and scales),
values [B, *].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genperf.ops._mixture_logistic_reference import FAR, wide
from genperf.ops._mixture_logistic_reference import _reduced as _reduced_planes

_LARGEST = torch.finfo(torch.float32).max
#: Below this log-scale its inverse is FAR.
LEAST_LOG_SCALE = -math.log(FAR)


def _reduced(nll: Tensor, reduction: int) -> Tensor:
    return _reduced_planes(nll[:, None] if reduction and nll.dim() == 1 else nll, reduction)


def _weighted(grad: Tensor, like: Tensor, reduction: int) -> Tensor:
    """The gradient by each element's likelihood, which broadcasts with ``like`` [B, *]."""
    grad = grad.to(like.dtype)
    return grad.view(-1, *(1,) * (like.dim() - 1)) if reduction == 1 else grad


def bernoulli(params: Tensor, scale: None, x: Tensor, factor, low, high, reduction: int) -> Tensor:
    """The torch op ``genperf::bernoulli_nll``: |l| (1 - x or x) + log(1 + exp(-|l|)), no term negative."""
    logits = wide(params[:, 0])
    x = x.to(logits.dtype)
    share = torch.where(logits > 0, 1.0 - x, x)
    wrong = torch.where(share == 0, share, logits.abs() * share)  # 0 where that is infinity times 0
    return _reduced(wrong + torch.log1p((-logits.abs()).exp()), reduction)


def bernoulli_backward(grad, params, scale, x, factor, low, high, reduction, want_params, want_scale, want_x):
    """The torch op ``genperf::bernoulli_nll_backward``."""
    logits = wide(params[:, 0])
    grad = _weighted(grad, logits, reduction)
    of_params = ((logits.sigmoid() - x.to(logits.dtype)) * grad)[:, None].to(params.dtype)
    return of_params if want_params else None, None, (-logits * grad).to(x.dtype) if want_x else None


def _distance(params: Tensor, scale: Tensor | None, x: Tensor, factor, low, high):
    """(x - mean) / sigma, 1 / sigma and log sigma, and where the scale is not at a bound."""
    mean = wide(params[:, 0])
    raw = wide(params[:, 1] if scale is None else scale).to(mean.dtype)
    log_sigma = factor * raw.clamp(low, high)
    inverse = (-log_sigma.clamp(min=LEAST_LOG_SCALE)).exp()
    away = (x.to(mean.dtype) - mean).clamp(-_LARGEST, _LARGEST)
    free = ~((raw < low) | (raw > high))
    return (away * inverse).clamp(-FAR, FAR), inverse, log_sigma, free


def gaussian(params: Tensor, scale: Tensor | None, x: Tensor, factor, low, high, reduction: int) -> Tensor:
    """The torch op ``genperf::gaussian_nll``: (distance^2 + log 2 pi) / 2 + log sigma."""
    distance, _, log_sigma, _ = _distance(params, scale, x, factor, low, high)
    return _reduced(0.5 * distance * distance + log_sigma + 0.5 * math.log(2 * math.pi), reduction)


def gaussian_backward(grad, params, scale, x, factor, low, high, reduction, want_params, want_scale, want_x):
    """The torch op ``genperf::gaussian_nll_backward``."""
    distance, inverse, _, free = _distance(params, scale, x, factor, low, high)
    grad = _weighted(grad, distance, reduction)
    of_x = distance * inverse * grad
    of_scale = torch.where(free, factor * (1.0 - distance * distance) * grad, 0.0)
    of_params = -of_x[:, None] if scale is not None else torch.stack([-of_x, of_scale], 1)
    return (
        of_params.to(params.dtype) if want_params else None,
        of_scale.to(scale.dtype) if want_scale and scale is not None else None,
        of_x.to(x.dtype) if want_x else None,
    )
