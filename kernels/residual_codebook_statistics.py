"""Counts and sums of residuals by codeword; the op is ``genperf/ops/residual_codebook_statistics.py``."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ._segments import segmented_sums
from ._tile import Example
from ._vq_words import joined


def residual_codebook_statistics(
    x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, differences: bool
) -> tuple[Tensor, Tensor]:
    """The torch op ``genperf::residual_codebook_statistics`` for codebooks of one size."""
    books, stages = joined(codebooks), len(codebooks) // max(1, len(x))
    minus_one = x.new_full((1,), -1.0, dtype=torch.float32) if differences else None
    counts, sums = segmented_sums(
        x, indices.contiguous(), books.shape[1], books, minus_one, of_group=max(1, x.numel()), stages=stages
    )
    return counts.flatten().float(), sums.flatten(0, 1)


def _example(n: int, n_words: int, dim: int, stages: int, dtype: torch.dtype, differences: bool) -> None:
    """Launch on meta tensors."""
    x = torch.empty(1, n, dim, dtype=dtype, device="meta")
    books = list(torch.empty(stages, n_words, dim, dtype=dtype, device="meta").unbind(0))
    indices = torch.empty(1, n, stages, dtype=torch.int64, device="meta")
    residual_codebook_statistics(x, books, indices, differences)


AOT = {
    "8 stages": Example(partial(_example, 16384, 1024, 128, 8, torch.float32, False), wide=False, quick=True),
    "bfloat16, differences": Example(
        partial(_example, 1 << 20, 2048, 256, 32, torch.bfloat16, True), wide=False
    ),
}
