"""The formulas of :func:`genperf.ops.soft_assignment` in plain torch, on parts of the vectors at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_L2, _COSINE, _DOT, _EUCLIDEAN = range(4)
IGNORED = -1
_LEAST_SQUARE = 1e-8  # of a distance whose root is taken
_PART = 1 << 24  # elements of the matrix of scores that are held at a time


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _inverse_length(x: Tensor) -> Tensor:
    """1 / |x| along the last dimension; 0, without gradient, for zero."""
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length == 0, 0.0, 1 / torch.where(length == 0, 1.0, length))


def scores(x: Tensor, codebook: Tensor, metric: int, temperature: float) -> Tensor:
    """[N, K] of vectors [N, D] and codewords [K, D], as the public libraries compute them."""
    if metric == _DOT:
        return x @ codebook.T / temperature
    if metric == _COSINE:
        return (x * _inverse_length(x)) @ (codebook * _inverse_length(codebook)).T / temperature
    square = x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * (x @ codebook.T)
    if metric == _L2:
        return -square / temperature
    return -square.clamp(min=_LEAST_SQUARE).sqrt() / temperature


def _statistics(
    x: Tensor, codebook: Tensor, targets: Tensor | None, metric: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log-sum-exp [N], entropy [N], sum of the probabilities [K] and negative log-likelihood [N]."""
    s = scores(x, codebook, metric, temperature)
    lse = s.logsumexp(1)
    p, log_p = s.softmax(1), s.log_softmax(1)
    entropy = -(p * log_p.clamp(min=torch.finfo(s.dtype).min)).sum(1)
    nll = None
    if targets is not None:
        nll = -log_p.gather(1, targets.clamp(0, len(codebook) - 1)[:, None])[:, 0]
        nll = torch.where(targets == IGNORED, 0.0, nll)
        nll = torch.where((targets < IGNORED) | (targets >= len(codebook)), torch.nan, nll)
    return lse, entropy, p.sum(0), nll


def reference(
    x: Tensor, codebook: Tensor, targets: Tensor | None, metric: int, temperature: float, want_mean: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype, shape = wide_dtype(x), x.shape[:-1]
    lse, entropy, mean, nll = [], [], [], []
    for h, words in enumerate(codebook.to(dtype)):
        rows = x[h].reshape(-1, x.shape[-1]).to(dtype)
        total = rows.new_zeros(len(words))
        step = max(1, _PART // len(words))
        wanted = None if targets is None else targets[h].reshape(-1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            these = None if wanted is None else wanted[part]
            a, b, c, d = _statistics(rows[part], words, these, metric, temperature)
            lse.append(a)
            entropy.append(b)
            total = total + c
            if d is not None:
                nll.append(d)
        mean.append(total / max(1, len(rows)))

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).reshape(shape) if parts else x.new_empty(shape, dtype=dtype)

    return (
        joined(lse),
        joined(entropy),
        torch.stack(mean) if want_mean else None,
        None if targets is None else joined(nll),
    )


def reference_backward(
    grad_lse: Tensor | None, grad_entropy: Tensor | None, grad_mean: Tensor | None, grad_nll: Tensor | None,
    x: Tensor, codebook: Tensor, targets: Tensor | None, metric: int, temperature: float,
    want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    dtype = wide_dtype(x)
    of_x, of_codebook = [], []
    for h, words in enumerate(codebook.to(dtype)):
        rows = x[h].reshape(-1, x.shape[-1]).to(dtype)
        total = torch.zeros_like(words)
        step = max(1, _PART // len(words))

        def at(y: Tensor | None, start: int, h: int = h, step: int = step) -> Tensor | None:
            return None if y is None else y[h].reshape(-1)[start : start + step]

        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            of_scores = _gradient_of_scores(
                part, words, metric, temperature, at(targets, start), at(grad_lse, start),
                at(grad_entropy, start), at(grad_nll, start),
                None if grad_mean is None else grad_mean[h] / len(rows),
            )  # fmt: skip
            a, b = _through_scores(of_scores, part, words, metric, temperature)
            of_x.append(a)
            total = total + b
        of_codebook.append(total)
    grad_x = torch.cat(of_x).reshape(x.shape) if of_x else x.new_zeros(x.shape)
    return (
        grad_x.to(x.dtype).contiguous() if want_x else None,
        torch.stack(of_codebook).to(codebook.dtype) if want_codebook else None,
    )


def _gradient_of_scores(
    x: Tensor, words: Tensor, metric: int, temperature: float, targets: Tensor | None,
    grad_lse: Tensor | None, grad_entropy: Tensor | None, grad_nll: Tensor | None, grad_sum: Tensor | None,
) -> Tensor:  # fmt: skip
    """[N, K]"""
    s = scores(x, words, metric, temperature)
    p, log_p = s.softmax(1), s.log_softmax(1).clamp(min=torch.finfo(s.dtype).min)
    factor = torch.zeros_like(p)
    if grad_lse is not None:
        factor = factor + grad_lse[:, None]
    if grad_entropy is not None:
        entropy = -(p * log_p).sum(1, keepdim=True)
        factor = factor - grad_entropy[:, None] * (log_p + entropy)
    if grad_sum is not None:
        factor = factor + grad_sum - (p * grad_sum).sum(1, keepdim=True)
    if grad_nll is None:
        return p * factor
    assert targets is not None
    known = (targets >= 0) & (targets < len(words))
    weight = torch.where(known, grad_nll, 0.0)[:, None]
    hit = torch.arange(len(words), device=x.device) == targets[:, None]
    return p * (factor + weight) - torch.where(hit, weight, 0.0)


def _through_scores(
    grad: Tensor, x: Tensor, words: Tensor, metric: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The gradients by x and by the codewords, of those by the scores."""
    grad = grad / temperature
    if metric == _DOT:
        return grad @ words, grad.T @ x
    if metric == _COSINE:
        inverse_x, inverse_c = _inverse_length(x), _inverse_length(words)
        unit_x, unit_c = x * inverse_x, words * inverse_c
        return (
            _off(grad @ unit_c, unit_x) * inverse_x,
            _off(grad.T @ unit_x, unit_c) * inverse_c,
        )
    if metric == _EUCLIDEAN:
        square = x.square().sum(1, keepdim=True) + words.square().sum(1) - 2 * (x @ words.T)
        far = square > _LEAST_SQUARE
        grad = torch.where(far, grad / (2 * torch.where(far, square, 1.0).sqrt()), 0.0)
    return (
        2 * (grad @ words - grad.sum(1, keepdim=True) * x),
        2 * (grad.T @ x - grad.sum(0)[:, None] * words),
    )


def _off(grad: Tensor, unit: Tensor) -> Tensor:
    """What is left of grad without its part along a unit vector."""
    return grad - unit * (unit * grad).sum(1, keepdim=True)
