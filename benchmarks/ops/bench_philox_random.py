"""Standard normals from a key, against ``torch.randn``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.bench.noise import philox_normal, plausible_normal
from genperf.ops import draw_key, philox_random


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {"template": torch.empty(shape, dtype=dtype, device=device), "key": draw_key(device)}


def eager(template: Tensor, key: Tensor) -> tuple[Tensor]:
    return (torch.randn_like(template),)


def genperf(template: Tensor, key: Tensor) -> tuple[Tensor]:
    return (philox_random(template.shape, key, dtype=template.dtype),)


def draws(provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    if provider.startswith("genperf/"):
        return {"noise": philox_normal(outputs[0].shape, inputs["key"])}
    return {"noise": plausible_normal(outputs[0])}


def reference(template: Tensor, key: Tensor, noise: Tensor) -> tuple[Tensor]:
    return (noise,)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return math.prod(shape) * dtype.itemsize


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """A logarithm, a square root, a sine or cosine and two products a number; Philox is integer work."""
    return 5 * math.prod(shape)


normal = Benchmark(
    op="philox_random",
    cases=(Case((256, 128), modes=("fwd",)), Case((64, 4, 64, 64), modes=("fwd",))),
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager},
    draws=draws,
)
