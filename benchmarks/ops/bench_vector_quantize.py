"""A training step of a quantizer with a moving average, without the average itself, over normal vectors.

Shapes are ``vectors x codewords x dimensions``. Forward: indices, codewords, loss, counts and sums;
backward: the gradient of the vectors, straight-through.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.codebook_statistics import codebook_statistics
from genperf.ops.vector_quantize import vector_quantize


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    n, n_codewords, dim = shape
    return {
        "x": torch.randn(n, dim).to(device, dtype).requires_grad_(),
        "codebook": torch.randn(n_codewords, dim).to(device, dtype),
    }


def _step(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        q = codebook[indices]
        torch.bincount(indices, minlength=len(codebook))
        torch.zeros_like(codebook).index_add_(0, indices, x)
    return x + (q - x).detach(), F.mse_loss(x, q)


def eager(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The fewest operations that give it."""
    with torch.no_grad():
        indices = torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)
    return _step(x, codebook, indices)


def reference(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        parts = x.split(max(1, 2**24 // len(codebook)))
        indices = torch.cat([torch.cdist(part, codebook).argmin(1) for part in parts])
    return _step(x, codebook, indices)


@functools.lru_cache(maxsize=1)
def _module(n_codewords: int, dim: int) -> Any:
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(dim=dim, codebook_size=n_codewords, rotation_trick=False)


def vector_quantize_pytorch(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The module in training, which updates the average too."""
    module = _module(*codebook.shape).to(x.device)
    with torch.no_grad():
        module._codebook.embed.copy_(codebook[None])
    quantized, _, loss = module(x[None])
    return quantized[0], loss.reshape(())


def genperf(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    out = vector_quantize(x, codebook)
    codebook_statistics(x, out.indices, len(codebook))
    return out.quantized, out.loss


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads vectors and codebook, writes codewords, indices and sums; backward, reads twice more, writes."""
    n, n_codewords, dim = shape
    forward = (2 * n + n_codewords) * dim * dtype.itemsize + n * 8 + n_codewords * (dim + 1) * 4
    backward = (3 * n + n_codewords) * dim * dtype.itemsize + n * 8
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    n, n_codewords, dim = shape
    return {"fwd": 2, "bwd": 0, "fwd+bwd": 2}[mode] * n * n_codewords * dim + 6 * n * dim


MODES = ("fwd", "bwd", "fwd+bwd")

vector_quantize_step = Benchmark(
    op="vector_quantize",
    cases=(
        Case((16384, 512, 64), modes=MODES),
        Case((16384, 8192, 32), modes=("fwd+bwd",)),
        Case((16384, 1024, 256), modes=("fwd+bwd",)),
        Case((64, 1024, 256), modes=("fwd+bwd",)),
    ),
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager, "peer/vector-quantize-pytorch": vector_quantize_pytorch},
    backends=("cpu", "triton"),
)
