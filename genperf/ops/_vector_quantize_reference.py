"""The formulas of :func:`genperf.ops.vector_quantize` in torch, forward and backward.

Vectors are [heads, *, D], codebooks [heads, K, D], indices [heads, *] with -1 for a vector that is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: How losses are averaged: over all elements, over those of a sample, over those of a vector.
REDUCTIONS = {"mean": 0, "sample": 1, "none": 2}
MEAN, SAMPLE, NONE = REDUCTIONS.values()


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def loss_shape(x: Tensor, reduction: int) -> tuple[int, ...]:
    """[], [heads, B] or [heads, *]."""
    return ((), tuple(x.shape[:2]), tuple(x.shape[:-1]))[reduction]


def averaged(rows: Tensor, dim: int, indices: Tensor, reduction: int) -> Tensor:
    """Means of sums over vectors of D elements, [heads, *], in which those left out do not count."""
    if reduction == NONE:
        return rows / dim
    kept = indices >= 0
    over = tuple(range(2 if reduction == SAMPLE else 0, rows.dim()))
    number = kept.sum(over) if over else kept.long()
    total = rows.sum(over) if over else rows
    return total / (number.clamp(min=1) * dim)


def spread(coefficient: Tensor, dim: int, indices: Tensor, reduction: int) -> Tensor:
    """For each element of a vector, [heads, *, 1], what a mean's coefficient becomes."""
    if reduction == NONE:
        return (coefficient / dim)[..., None]
    kept = indices >= 0
    over = tuple(range(2 if reduction == SAMPLE else 0, indices.dim()))
    number = kept.sum(over, keepdim=True) if over else kept.long()
    if reduction == SAMPLE:
        coefficient = coefficient.reshape(*coefficient.shape, *[1] * (indices.dim() - 2))
    return (coefficient / (number.clamp(min=1) * dim))[..., None]


def codewords(codebook: Tensor, indices: Tensor) -> Tensor:
    """[heads, *, D]; the first codeword where a vector is left out."""
    return codebook.flatten(0, 1)[_rows(codebook, indices.clamp(min=0))]


def _rows(codebook: Tensor, indices: Tensor) -> Tensor:
    heads, n_codewords = codebook.shape[:2]
    head = torch.arange(heads, device=indices.device).view(-1, *[1] * (indices.dim() - 1))
    return indices + head * n_codewords


def quantized(x: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """The codewords; NaN where x is not finite, 0 where the vector is left out. In the layout of x."""
    q = torch.where(x.isfinite(), codewords(codebook, indices), torch.nan)
    return torch.empty_like(x).copy_(torch.where(indices[..., None] >= 0, q, 0.0))


def squares(x: Tensor, codebook: Tensor, indices: Tensor, reduction: int) -> Tensor:
    """The mean of (x - q)^2, of ``loss_shape``."""
    difference = wide(x) - wide(codewords(codebook, indices))
    rows = torch.where(indices >= 0, difference.square().sum(-1), 0.0)
    return averaged(rows, x.shape[-1], indices, reduction)


def counts(codebook: Tensor, indices: Tensor) -> Tensor:
    """How often each codeword was chosen, int64 [heads, K]."""
    heads, n_codewords = codebook.shape[:2]
    rows = torch.where(indices >= 0, _rows(codebook, indices), heads * n_codewords).flatten()
    result = torch.zeros(heads * n_codewords + 1, dtype=torch.int64, device=rows.device)
    return result.scatter_add(0, rows, torch.ones_like(rows))[:-1].view(heads, n_codewords).contiguous()


SHORTEST = 1e-6  # a length that something is divided by, as in vector-quantize-pytorch


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its length along the last dimension, and the length."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.clamp(min=SHORTEST), length


def rotated_back(grad: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """The gradient by x of (|q| / |x|) R x, constants but for x, where the rotation R turns x to q.

    A length that divides is at least ``SHORTEST``, so that the gradient of a shorter x stays bounded.
    """
    x_unit, x_length = _unit(x)
    q_unit, q_length = _unit(q)
    middle, _ = _unit(x_unit + q_unit)
    turned = grad - 2 * middle * (middle * grad).sum(-1, keepdim=True)
    turned = turned + 2 * x_unit * (q_unit * grad).sum(-1, keepdim=True)
    return turned * (q_length / x_length.clamp(min=SHORTEST))


def backward(
    grad: Tensor | None, of_commitment: Tensor | None, of_codebook: Tensor | None, x: Tensor,
    codebook: Tensor, indices: Tensor, reduction: int, rotation: bool, want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients by x and the codebook, from those of the quantized vectors and of the two mean squares."""
    kept = indices[..., None] >= 0
    dim, wide_x, q = x.shape[-1], torch.where(kept, wide(x), 0.0), wide(codewords(codebook, indices))
    grad_x = grad_codebook = None
    if want_x:
        grad_x = torch.zeros_like(wide_x)
        if grad is not None:
            grad_x = rotated_back(wide(grad), wide_x, q) if rotation else wide(grad)
        if of_commitment is not None:
            grad_x = grad_x + 2 * spread(of_commitment, dim, indices, reduction) * (wide_x - q)
        grad_x = torch.where(kept, grad_x, 0.0).to(x.dtype)
    if want_codebook:
        flat = torch.zeros_like(wide(codebook.flatten(0, 1)))
        if of_codebook is not None:
            by_row = 2 * spread(of_codebook, dim, indices, reduction) * (q - wide_x)
            by_row = torch.where(kept, by_row, 0.0).flatten(0, -2)
            rows = _rows(codebook, indices.clamp(min=0)).flatten()
            # On a GPU index_put sorts, where index_add adds in any order.
            on_gpu = x.is_cuda
            flat = (
                flat.index_put((rows,), by_row, accumulate=True)
                if on_gpu
                else flat.index_add(0, rows, by_row)
            )
        grad_codebook = flat.view(codebook.shape).to(codebook.dtype)
    return grad_x, grad_codebook
