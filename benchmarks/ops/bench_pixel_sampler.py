"""What bounds the sampler's CPU executor: how fast it multiplies by its weights, and how fast they are read.

A chain of convolutions of one tap, each with weights of its own, over some rows (cells times images): with
one row the time is that of reading the weights, with many that of the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf.bench import Benchmark, Case
from genperf.sampling._native import CPUExecutor, CPUState
from genperf.sampling._program import Buffer, Conv, FeedbackKind, Head, HeadKind, Operand, Program


def products(depth: int, channels: int, layers: int, weights: Tensor) -> Program:
    """Slot 0: ``layers`` products of cell (0, 0), side by side in one buffer."""
    program = Program(Head(HeadKind.CALLBACK, 1, 1, 1, 1, 1, 1, 1, 1, 0, FeedbackKind.NONE, -1, 1.0, 0.0))
    program.buffers = [Buffer(0, 1, 1, depth), Buffer(depth, 1, 1, layers * channels)]
    program.workspace = depth + layers * channels
    program.operands = [Operand(False, 0), Operand(False, 1)]
    program.taps = [(0, 0)]
    program.weights = [weight[None] for weight in weights]
    program.instructions = [
        Conv(1, layer * channels, channels, 0, depth, 0, 1, 1, 1, layer) for layer in range(layers)
    ]
    program.segments = torch.tensor([[layer, 0, 0, 1] for layer in range(layers)], dtype=torch.int32)
    program.slot_begin = torch.tensor([0, layers])
    return program


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    rows, depth, channels, layers = shape
    x = torch.randn(rows, depth, dtype=dtype, device=device)
    weights = torch.randn(layers, depth, channels, dtype=dtype, device=device) * depth**-0.5
    if _backend.unusable("cpu", device.type):
        return {"x": x, "weights": weights, "executor": None, "state": None}
    executor = CPUExecutor(products(depth, channels, layers, weights))
    state = executor.start(rows)
    state.workspace[: x.numel()] = x.flatten()
    return {"x": x, "weights": weights, "executor": executor, "state": state}


def eager(x: Tensor, weights: Tensor, **_: Any) -> tuple[Tensor]:
    layers, _, channels = weights.shape
    out = x.new_empty(x.shape[0], layers, channels)
    for layer in range(layers):
        torch.mm(x, weights[layer], out=out[:, layer])
    return (out,)


def native(x: Tensor, weights: Tensor, executor: CPUExecutor, state: CPUState) -> tuple[Tensor]:
    if executor is None:
        raise NotImplementedError("the executor runs on the CPU only")
    executor.run(state, 0, 1, None)
    return (executor.params(state, 0).view(x.shape[0], *weights.shape[::2]),)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    rows, depth, channels, layers = shape
    return (layers * channels * (depth + rows) + rows * depth) * dtype.itemsize


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    rows, depth, channels, layers = shape
    return 2 * rows * depth * channels * layers


def floats(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {"x": torch.rand(shape, dtype=dtype, device=device)}


def eager_sum(x: Tensor) -> tuple[Tensor]:
    return (x.sum(),)


def native_sum(x: Tensor) -> tuple[Tensor]:
    if _backend.unusable("cpu", x.device.type):
        raise NotImplementedError("the bare kernel is called on the CPU only")
    return (torch.tensor(_backend.native.cpu.sum_floats(x), dtype=x.dtype),)


product = Benchmark(
    op="pixel_sampler_product",
    cases=tuple(
        Case(shape, modes=("fwd",))
        for shape in (
            (1, 128, 256, 48),
            (1, 64, 128, 40),
            (4, 128, 256, 48),
            (16, 128, 256, 48),
            (32, 256, 256, 8),
            (512, 256, 256, 2),
        )
    ),
    inputs=inputs,
    reference=eager,
    bytes=traffic,
    flops=arithmetic,
    baselines={"eager": eager, "native": native},
    compile=False,
)

read = Benchmark(
    op="pixel_sampler_read",
    cases=(Case((327_680,), modes=("fwd",)), Case((1_572_864,), modes=("fwd",))),
    inputs=floats,
    reference=eager_sum,
    bytes=lambda shape, dtype, mode: shape[0] * dtype.itemsize,
    flops=lambda shape, dtype, mode: shape[0],
    baselines={"eager": eager_sum, "native": native_sum},
    compile=False,
)
