"""The formulas of :func:`genperf.ops.gumbel_softmax` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from genperf.ops._gumbel_quantize_reference import reference_gumbels, wide


def _noisy(logits: Tensor, noise: Tensor | None, key: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Logits with noise as a sum of two floats, the exact value of which is that of logit + noise.

    Infinite logits, or all of -inf, are replaced by what leaves their limit.
    """
    if noise is None:
        assert key is not None
        noise = reference_gumbels(logits.shape, key)
    a = wide(logits)
    b = noise.to(a.dtype)
    top = a.detach().amax(dim, keepdim=True)
    among = torch.where(a == top, torch.zeros_like(a), torch.where(a.isnan(), a, -torch.inf))
    a = torch.where(top.isinf(), among, a)
    total = (a + b).clamp(max=torch.finfo(a.dtype).max)
    of_b = total.detach() - a.detach()
    rest = (a.detach() - (total.detach() - of_b)) + (b - of_b)
    return total, torch.where(rest.isfinite(), rest, 0.0)


def _largest(total: Tensor, rest: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest of sums of two floats, and where it is."""
    most = total.amax(dim, keepdim=True)
    of_most = torch.where(total == most, rest, -torch.inf)
    return most, of_most.amax(dim, keepdim=True)


def soft_of(logits: Tensor, noise: Tensor | None, key: Tensor | None, tau: float, dim: int) -> Tensor:
    """softmax((logits + noise) / tau), float32 or float64."""
    total, rest = _noisy(logits, noise, key, dim)
    most, of_most = _largest(total.detach(), rest, dim)
    return (((total - most) + (rest - of_most)) / tau).softmax(dim)


def reference(
    logits: Tensor, noise: Tensor | None, key: Tensor | None, tau: float, hard: bool, dim: int
) -> Tensor:
    if logits.numel() == 0:
        return logits.new_empty(logits.shape)
    if not hard:
        return soft_of(logits, noise, key, tau, dim).to(logits.dtype).contiguous()
    total, rest = _noisy(logits, noise, key, dim)
    most, of_most = _largest(total, rest, dim)
    index = ((total == most) & (rest == of_most)).to(torch.uint8).argmax(dim, keepdim=True)
    one = logits.new_zeros(logits.shape).scatter_(dim, index, 1.0)
    return one.masked_fill(total.isnan().any(dim, keepdim=True), torch.nan)


def reference_backward(
    grad: Tensor, y: Tensor | None, logits: Tensor | None, noise: Tensor | None, key: Tensor | None,
    tau: float, dim: int,
) -> Tensor:  # fmt: skip
    """Of the soft ``y``, which may be given; of a hard one it is made again."""
    if grad.numel() == 0:
        return grad.new_zeros(grad.shape)
    if y is None:
        assert logits is not None
        y = soft_of(logits, noise, key, tau, dim)
    soft, by_y = wide(y), wide(grad)
    gradient = soft * (by_y - (soft * by_y).sum(dim, keepdim=True)) / tau
    return gradient.to(grad.dtype).contiguous()
