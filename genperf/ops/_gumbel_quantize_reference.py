"""The formulas of :func:`genperf.ops.gumbel_quantize` in plain torch, and its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genperf.ops.philox_random import _log, reference_words

_FLOAT_MAX = torch.finfo(torch.float32).max


def reference_gumbels(shape: Sequence[int], key: Tensor) -> Tensor:
    """Standard Gumbel variates, float32, of a key int64 [2], or [B, 2] where ``shape[0] == B``."""
    if key.dim() == 2:
        rows = [reference_gumbels(shape[1:], k) for k in key.unbind()]
        return torch.stack(rows) if rows else torch.empty(tuple(shape), device=key.device)
    words = reference_words(math.prod(shape), key)
    below_half = words < 1 << 31
    w = torch.where(below_half, words, (1 << 32) - 1 - words).to(torch.float32) * 2.0**-32 + 2.0**-33
    rest = 1.0 - w
    logarithm = _log(torch.where(below_half, rest, w))
    lost = (-w - (rest - 1.0)) / rest
    return -_log(-torch.where(below_half, logarithm + lost, logarithm)).view(tuple(shape))


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _noisy(logits: Tensor, noise: Tensor | None, key: Tensor | None) -> Tensor:
    """Of logits [B, K, P], those with noise, [B, P, K], less the largest of each position."""
    if noise is None:
        assert key is not None
        noise = reference_gumbels(logits.shape, key)
    z = (wide(logits) + noise.to(wide(logits).dtype)).clamp(max=_FLOAT_MAX).transpose(1, 2)
    return z - z.amax(2, keepdim=True)


def _log_probabilities(logits: Tensor) -> Tensor:
    """log softmax, [B, P, K]."""
    return wide(logits).transpose(1, 2).contiguous().log_softmax(2).clamp(min=-_FLOAT_MAX)


def reference(
    logits: Tensor, codebook: Tensor, noise: Tensor | None, key: Tensor | None,
    temperature: float, hard: bool, want_kl: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Of logits [B, K, P]: quantized [B, D, P], indices and kl [B, P]; -1 is the index with a NaN."""
    if logits.numel() == 0:
        shape = (logits.shape[0], logits.shape[2])
        kl = wide(logits).new_empty(shape) if want_kl else None
        empty = logits.new_empty(shape[0], codebook.shape[1], shape[1])
        return empty, logits.new_empty(shape, dtype=torch.int64), kl
    z = _noisy(logits, noise, key)
    flaw = logits.isnan().any(1)
    indices = torch.where(flaw, -1, z.nan_to_num(nan=-torch.inf).argmax(2))
    if hard:
        quantized = gathered(codebook, indices)
    else:
        mixed = (z / temperature).softmax(2) @ wide(codebook)
        quantized = mixed.transpose(1, 2).to(codebook.dtype).contiguous()
    if not want_kl:
        return quantized, indices, None
    log_q = _log_probabilities(logits)
    return quantized, indices, math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(2)


def gathered(codebook: Tensor, indices: Tensor) -> Tensor:
    """Codewords [B, D, P] of indices [B, P]; NaN where the index is -1."""
    words = codebook[indices.clamp(min=0)]
    return words.masked_fill((indices < 0)[..., None], torch.nan).movedim(-1, 1).contiguous()


def reference_backward(
    grad: Tensor | None, grad_kl: Tensor | None, logits: Tensor, codebook: Tensor,
    noise: Tensor | None, key: Tensor | None, indices: Tensor,
    temperature: float, hard: bool, want_logits: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape), codebook.new_zeros(codebook.shape)
    of_logits, words = torch.zeros_like(wide(logits)).transpose(1, 2), wide(codebook)
    of_codebook = torch.zeros_like(words)
    if grad is not None:
        by_mix = wide(grad).transpose(1, 2)
        y = (_noisy(logits, noise, key) / temperature).softmax(2)
        by_y = by_mix @ words.T
        of_logits = of_logits + y * (by_y - (y * by_y).sum(2, keepdim=True)) / temperature
        if hard:
            y = torch.nn.functional.one_hot(indices.clamp(min=0), len(words)).to(y)
        of_codebook = y.flatten(0, 1).T @ by_mix.flatten(0, 1)
    if grad_kl is not None:
        log_q = _log_probabilities(logits)
        q = log_q.exp()
        of_logits = of_logits + grad_kl[..., None] * q * (log_q - (q * log_q).sum(2, keepdim=True))
    return (
        of_logits.transpose(1, 2).to(logits.dtype).contiguous() if want_logits else None,
        of_codebook.to(codebook.dtype).contiguous() if want_codebook else None,
    )
