"""The loss of a decoder of binary images: the cross-entropy of logits, summed over each image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.bernoulli_nll import bernoulli_nll


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    logits = 3.0 * torch.randn(shape)
    return {
        "logits": logits.to(device, dtype).requires_grad_(),
        "x": (torch.randn(shape) > 0).float().to(device),
    }


def eager(logits: Tensor, x: Tensor) -> tuple[Tensor]:
    each = F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none")
    return (each.flatten(1).sum(1),)


def genperf(logits: Tensor, x: Tensor) -> tuple[Tensor]:
    return (bernoulli_nll(logits, x, reduction="sample"),)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads logits and values; backward writes a gradient."""
    read = math.prod(shape) * (dtype.itemsize + 4)
    written = math.prod(shape) * dtype.itemsize
    return {"fwd": read, "bwd": read + written, "fwd+bwd": 2 * read + written}[mode]


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return {"fwd": 8, "bwd": 6, "fwd+bwd": 14}[mode] * math.prod(shape)


each = Benchmark(
    op="bernoulli_nll",
    cases=(
        Case((64, 1, 28, 28), modes=("fwd", "fwd+bwd")),
        Case((128, 3, 64, 64), modes=("fwd", "fwd+bwd")),
        Case((128, 3, 64, 64), torch.bfloat16, modes=("fwd", "fwd+bwd")),
    ),
    inputs=inputs,
    reference=eager,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager},
    backends=("cpu", "triton"),
)
