"""Binary images from the logits of a decoder, against ``torch.bernoulli``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.bernoulli_sample import bernoulli_sample
from genperf.ops.philox_random import draw_key, philox_random


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    logits = 3.0 * torch.randn(shape)
    return {"logits": logits.to(device, dtype), "key": draw_key(device)}


def eager(logits: Tensor, key: Tensor) -> tuple[Tensor]:
    return (torch.bernoulli(torch.sigmoid(logits)),)


def genperf(logits: Tensor, key: Tensor) -> tuple[Tensor]:
    return (bernoulli_sample(logits, key=key),)


def draws(provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    logits = inputs["logits"]
    if provider.startswith("genperf/"):
        return {"u": (philox_random(logits.shape, inputs["key"], "bits").double() + 0.5) * 2.0**-32}
    return {"u": torch.rand(logits.shape, device=logits.device).double()}


def reference(logits: Tensor, key: Tensor, u: Tensor) -> tuple[Tensor]:
    return ((u < torch.sigmoid(logits)).to(logits.dtype),)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return 2 * math.prod(shape) * dtype.itemsize


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Two logarithms; Philox is integer work."""
    return 20 * math.prod(shape)


drawn = Benchmark(
    op="bernoulli_sample",
    cases=(Case((64, 1, 28, 28), modes=("fwd",)), Case((64, 3, 64, 64), modes=("fwd",))),
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager},
    draws=draws,
    backends=("cpu", "triton"),
    compile=False,  # its draws are not torch's
)
