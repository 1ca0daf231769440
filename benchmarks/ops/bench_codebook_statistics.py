"""Counts and sums of vectors by codeword: shapes are ``vectors x codewords x dimensions``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.codebook_statistics import codebook_statistics


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    n, n_codewords, dim = shape
    return {
        "x": torch.randn(n, dim).to(device, dtype),
        "indices": torch.randint(n_codewords, (n,), device=device),
        "n_codewords": n_codewords,
    }


def index_add(x: Tensor, indices: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    """The fewest operations that give it; on a GPU the order of its sums is any."""
    sums = x.new_zeros(n_codewords, x.shape[1], dtype=torch.float32)
    return torch.bincount(indices, minlength=n_codewords).float(), sums.index_add_(0, indices, x.float())


def one_hot(x: Tensor, indices: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    """How vector-quantize-pytorch, EnCodec and rosinality's VQ-VAE-2 compute it."""
    hot = F.one_hot(indices, n_codewords).float()
    return hot.sum(0), hot.T @ x.float()


def genperf(x: Tensor, indices: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    counts, sums = codebook_statistics(x, indices, n_codewords)
    return counts, sums


def reference(x: Tensor, indices: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    sums = x.new_zeros(n_codewords, x.shape[1]).index_add_(0, indices, x)
    return torch.bincount(indices, minlength=n_codewords).to(x.dtype), sums


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads the vectors and their indices, writes the sums and counts."""
    n, n_codewords, dim = shape
    return n * (dim * dtype.itemsize + 8) + n_codewords * (dim + 1) * 4


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    n, _, dim = shape
    return n * dim


FORWARD = ("fwd",)

codebook_statistics_sums = Benchmark(
    op="codebook_statistics",
    cases=(
        Case((16384, 512, 64), modes=FORWARD),
        Case((16384, 8192, 32), modes=FORWARD),
        Case((65536, 1024, 256), modes=FORWARD),
        Case((65536, 1024, 256), torch.bfloat16, modes=FORWARD),
        Case((64, 1024, 256), modes=FORWARD),
    ),
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": index_add, "peer/one-hot": one_hot},
    backends=("cpu", "triton"),
)
