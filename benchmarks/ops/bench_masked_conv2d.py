"""A layer of a PixelCNN: ``conv2d(x, weight * mask, bias)``, size kept; forward and with three gradients.

Shapes are ``batch x in x out x size x kernel``, the mask is "A" where there is one input channel, else "B".
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.masked_conv2d import masked_conv2d


def causal(ins: int, kernel: int) -> Tensor:
    mask = torch.zeros(1, 1, kernel, kernel)
    mask[:, :, : kernel // 2] = 1
    mask[:, :, kernel // 2, : kernel // 2 + (ins > 1)] = 1
    return mask


def by_channel(outs: int, ins: int, kernel: int) -> Tensor:
    """Mask "B" of an RGB model: at the centre, channels see those of the same colour and of those before."""
    mask = causal(1, kernel).repeat(outs, ins, 1, 1)
    mask[:, :, kernel // 2, kernel // 2] = (torch.arange(outs)[:, None] % 3 >= torch.arange(ins) % 3).float()
    return mask


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mask: Tensor
) -> dict[str, Tensor]:
    batch, ins, outs, size, kernel = shape
    weight = torch.randn(outs, ins, kernel, kernel) / (ins * kernel * kernel) ** 0.5
    leaves = {"x": torch.randn(batch, ins, size, size), "weight": weight, "bias": torch.randn(outs)}
    made = {name: leaf.to(device, dtype).requires_grad_() for name, leaf in leaves.items()}
    return {**made, "mask": mask.expand(weight.shape).contiguous().to(device, dtype)}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return _inputs(shape, dtype, device, causal(shape[1], shape[4]))


def inputs_rgb(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return _inputs(shape, dtype, device, by_channel(shape[2], shape[1], shape[4]))


def eager(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (F.conv2d(x, weight * mask, bias, padding=weight.shape[2] // 2),)


def genperf(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (masked_conv2d(x, weight, mask, bias, padding=weight.shape[2] // 2),)


def _products(shape: tuple[int, ...], taps: float, mode: str) -> int:
    batch, ins, outs, size, _ = shape
    return int({"fwd": 2, "bwd": 4, "fwd+bwd": 6}[mode] * batch * ins * outs * size * size * taps)


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Of the taps that the mask keeps."""
    return _products(shape, causal(shape[1], shape[4]).sum().item(), mode)


def arithmetic_rgb(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    mask = by_channel(shape[2], shape[1], shape[4])
    return _products(shape, mask.sum(dim=(2, 3)).mean().item(), mode)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """fwd reads x and the weight and writes y; bwd reads those and y's cotangent and writes two gradients."""
    batch, ins, outs, size, kernel = shape
    x, y, weight = batch * ins * size * size, batch * outs * size * size, ins * outs * kernel * kernel
    fwd, bwd = x + y + 2 * weight, 2 * x + y + 3 * weight
    return {"fwd": fwd, "bwd": bwd, "fwd+bwd": fwd + bwd}[mode] * dtype.itemsize


spatial = Benchmark(
    op="masked_conv2d",
    cases=(
        Case((16, 1, 128, 28, 7)),
        Case((16, 64, 64, 28, 3)),
        Case((16, 64, 64, 28, 7)),
        Case((64, 64, 64, 28, 7)),
        Case((16, 128, 128, 32, 3)),
        Case((16, 128, 128, 32, 7)),
        Case((16, 256, 256, 32, 5)),
        Case((16, 64, 64, 28, 3), torch.bfloat16),
        Case((16, 128, 128, 32, 1)),
    ),
    inputs=inputs,
    reference=eager,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager},
    backends=("cpu",),
)

rgb = dataclasses.replace(
    spatial,
    op="masked_conv2d_rgb",
    cases=(Case((16, 126, 126, 32, 3)), Case((16, 126, 126, 32, 1)), Case((16, 3, 126, 32, 7))),
    inputs=inputs_rgb,
    flops=arithmetic_rgb,
)
