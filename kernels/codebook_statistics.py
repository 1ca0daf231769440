"""Counts and sums of vectors by their codeword; the op is ``genperf/ops/codebook_statistics.py``."""

from functools import partial

import torch
from torch import Tensor

from ._segments import segmented_sums
from ._tile import Example


def codebook_statistics(x: Tensor, indices: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    """The torch op ``genperf::codebook_statistics``."""
    counts, sums = segmented_sums(x, indices, n_codewords)
    return counts.float(), sums


def _example(n: int, n_codewords: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
    """Launch on meta tensors."""
    x = torch.empty(1, n, dim, dtype=dtype, device="meta")
    codebook_statistics(x, torch.empty(1, n, dtype=torch.int64, device="meta"), n_codewords)


AOT = {
    "64": Example(partial(_example, 16384, 512, 64), wide=False, quick=True),
    "8": Example(partial(_example, 1 << 20, 16384, 8), wide=False),
    "256, bfloat16": Example(partial(_example, 65536, 1024, 256, torch.bfloat16), wide=False),
}
