"""Draws from categorical distributions and their log-probabilities, in torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genperf.ops._inverse_cdf import Weights, descend, exp_float32, weigh
from genperf.ops.philox_random import _log, reference_uniforms


def reference_sample(
    logits: Tensor, noise: Any, key: Any, temperature: float, top_k: int, top_p: float, want_log_prob: bool
) -> tuple[Tensor, Tensor | None]:
    """Classes [*] of logits [*, K], and the logarithms of their probabilities."""
    shape = logits.shape[:-1]
    u = reference_uniforms(shape, key) if noise is None else noise
    weights = weigh(_rows(logits), temperature, top_k, top_p, exp_float32)
    index, _ = descend(weights, u.reshape(-1))
    log_prob = _log_prob(weights, index).view(shape) if want_log_prob else None
    return index.view(shape), log_prob


def reference_log_prob(logits: Tensor, index: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """[*], of classes [*] of logits [*, K]; NaN for a class that there is not."""
    weights = weigh(_rows(logits), temperature, top_k, top_p, exp_float32)
    return _log_prob(weights, index.reshape(-1)).view(index.shape)


def reference_log_prob_backward(
    grad: Tensor, logits: Tensor, index: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """The gradient by logits [*, K]."""
    weights = weigh(_rows(logits), temperature, top_k, top_p)
    chosen = index.reshape(-1, 1)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    of_logits = ((classes == chosen).to(weights.values.dtype) - weights.values / weights.total) / temperature
    of_logits = of_logits * grad.to(of_logits.dtype).reshape(-1, 1)
    if weights.excluded is not None:
        of_logits = of_logits.masked_fill(weights.excluded, 0.0)
    defined = _defined(weights, chosen[:, 0])[:, None]
    return torch.where(defined, of_logits, math.nan).view(logits.shape).to(logits.dtype)


def _rows(logits: Tensor) -> Tensor:
    """[N, K], float32 or float64."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])


def _defined(weights: Weights, index: Tensor) -> Tensor:
    return weights.valid & (index >= 0) & (index < weights.scaled.shape[1])


def _log_prob(weights: Weights, index: Tensor) -> Tensor:
    at = index.clamp(0, weights.scaled.shape[1] - 1)[:, None]
    scaled = weights.scaled.gather(1, at)
    if weights.excluded is not None:
        scaled = scaled.masked_fill(weights.excluded.gather(1, at), -math.inf)
    log = torch.log if scaled.dtype == torch.float64 else _log
    return torch.where(_defined(weights, index), (scaled - log(weights.total))[:, 0], math.nan)
