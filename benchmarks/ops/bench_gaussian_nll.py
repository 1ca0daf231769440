"""The loss of a Gaussian decoder: means and log-variances of each value, summed over each image.

``params`` [B, 2 C, *] holds the halves; shapes name x [B, C, *].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.gaussian_nll import gaussian_nll

_BOUNDS = (-30.0, 20.0)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    batch, channels, *space = shape
    params = torch.randn(batch, 2 * channels, *space)
    return {"params": params.to(device, dtype).requires_grad_(), "x": torch.randn(shape).to(device)}


def eager(params: Tensor, x: Tensor) -> tuple[Tensor]:
    mean, logvar = params.chunk(2, dim=1)
    logvar = torch.clamp(logvar, *_BOUNDS)
    each = math.log(2.0 * math.pi) + logvar + torch.pow(x - mean, 2) / torch.exp(logvar)
    return (0.5 * each.flatten(1).sum(1),)


def genperf(params: Tensor, x: Tensor) -> tuple[Tensor]:
    return (gaussian_nll(params, x, clamp=_BOUNDS, reduction="sample"),)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads means, scales and values; backward writes two gradients."""
    read = math.prod(shape) * (2 * dtype.itemsize + 4)
    written = 2 * math.prod(shape) * dtype.itemsize
    return {"fwd": read, "bwd": read + written, "fwd+bwd": 2 * read + written}[mode]


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return {"fwd": 10, "bwd": 12, "fwd+bwd": 22}[mode] * math.prod(shape)


halves = Benchmark(
    op="gaussian_nll",
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
