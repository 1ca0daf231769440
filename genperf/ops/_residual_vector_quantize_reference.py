"""The formulas of residual vector quantization in torch.

Everywhere x is [groups, *, D], ``codebooks`` a list of the codebooks [K, D] of all stages of the first group,
then of the second, and so on, and ``indices`` [groups, *, stages], -1 where a stage was left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genperf.ops._vector_quantize_reference import rotated_back
from genperf.ops.vq_nearest import METRICS, vq_nearest


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Stage(NamedTuple):
    """One stage of one group."""

    residual: Tensor  # [*, D]: what it quantizes
    codeword: Tensor  # [*, D]
    difference: Tensor  # [*, D]: the two's, not rounded to their dtype
    active: Tensor  # [*, 1]: whether it was not left out


def stages(x: Tensor, codebooks: Sequence[Tensor], indices: Tensor) -> Iterator[Stage]:
    """Of one group."""
    residual = x
    for i, codebook in enumerate(codebooks):
        index = indices[..., i]
        codeword, active = codebook[index.clamp(min=0)], (index >= 0)[..., None]
        yield Stage(residual, codeword, wide(residual) - wide(codeword), active)
        residual = torch.where(active, residual - codeword, residual)


def _group(
    x: Tensor, codebooks: Sequence[Tensor], limits: Tensor | None, n_stages: int, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    indices = x.new_full((*x.shape[:-1], len(codebooks)), -1, dtype=torch.int64)
    squares, total = wide(x.new_zeros(len(codebooks))), torch.zeros_like(wide(x))
    residual = x
    for i, codebook in enumerate(codebooks[:n_stages]):
        index = vq_nearest(residual, codebook, metric).indices
        codeword = codebook[index]
        active = torch.ones_like(index, dtype=torch.bool) if limits is None else limits > i
        indices[..., i] = torch.where(active, index, -1)
        difference = torch.where(active[..., None], wide(residual) - wide(codeword), 0.0)
        squares[i] = difference.double().square().sum()
        addend = wide(codeword) if i else wide(codeword) + 0.0 * wide(x)  # NaN where x is not finite
        total = torch.where(active[..., None], total + addend, total)
        residual = residual - codeword
    return total.to(x.dtype), indices, squares


def reference(
    x: Tensor, codebooks: Sequence[Tensor], limits: Tensor | None, n_stages: int, metric: int
) -> tuple[Tensor, Tensor, Tensor]:
    name, per_group = list(METRICS)[metric], len(codebooks) // max(1, len(x))
    results = [
        _group(one, codebooks[g * per_group : (g + 1) * per_group], limits, n_stages, name)
        for g, one in enumerate(x)
    ]
    quantized, indices, squares = (torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.empty_like(x).copy_(quantized), indices, squares


def _group_backward(
    grad: Tensor, coefficients: Tensor, x: Tensor, codebooks: Sequence[Tensor], indices: Tensor,
    rotation: bool, of_sum: bool, fraction: float,
) -> Tensor:  # fmt: skip
    grad, total = wide(grad), torch.zeros_like(wide(x))
    passed = list(stages(x, codebooks, indices))
    for stage, coefficient in zip(reversed(passed), coefficients.flip(0), strict=True):
        here = coefficient * stage.difference
        if not of_sum:
            of_codeword = grad - fraction * total
            here = here + (
                rotated_back(of_codeword, wide(stage.residual), wide(stage.codeword))
                if rotation
                else of_codeword
            )
        total = torch.where(stage.active, total + here, total)
    if of_sum and passed:
        here = grad
        if rotation:
            parts = [torch.where(stage.active, wide(stage.codeword), 0.0) for stage in passed]
            here = rotated_back(grad, wide(x), torch.stack(parts).sum(0))
        total = torch.where(passed[0].active, total + here, total)
    return total.to(x.dtype)


def reference_backward(
    grad: Tensor, coefficients: Tensor, x: Tensor, codebooks: Sequence[Tensor], indices: Tensor,
    rotation: bool, of_sum: bool, fraction: float,
) -> Tensor:  # fmt: skip
    """The gradient by x. ``coefficients`` [groups, stages] are those of the differences in it."""
    per_group = len(codebooks) // max(1, len(x))
    of_groups = [
        _group_backward(
            grad[g], coefficients[g], x[g], codebooks[g * per_group : (g + 1) * per_group], indices[g],
            rotation, of_sum, fraction,
        )
        for g in range(len(x))
    ]  # fmt: skip
    gathered = torch.stack(of_groups)
    return gathered if torch.is_grad_enabled() else torch.empty_like(x).copy_(gathered)


def _sums(values: Tensor, indices: Tensor, n_codewords: int) -> Tensor:
    """The sum of the values [N, D] of each index [N], [K, D]; of index -1 of none."""
    rows = torch.where(indices < 0, n_codewords, indices)
    zeros = values.new_zeros(n_codewords + 1, values.shape[1])
    if values.is_cuda:  # where it sorts, and index_add adds in any order
        return zeros.index_put((rows,), values, accumulate=True)[:-1]
    return zeros.index_add(0, rows, values)[:-1]


def reference_statistics(
    x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, differences: bool
) -> tuple[Tensor, Tensor]:
    """Counts [sum of K] and sums [sum of K, D] of the residuals, or of the differences to the codewords."""
    counts, sums = [], []
    per_group = len(codebooks) // max(1, len(x))
    for g, one in enumerate(x):
        books = codebooks[g * per_group : (g + 1) * per_group]
        for i, stage in enumerate(stages(one, books, indices[g])):
            index, n_codewords = indices[g, ..., i].flatten(), len(books[i])
            values = stage.difference if differences else wide(stage.residual)
            sums.append(_sums(values.flatten(0, -2), index, n_codewords))
            ones = values.new_ones(len(index), 1)
            counts.append(_sums(ones, index, n_codewords)[:, 0])
    return torch.cat(counts), torch.cat(sums)
