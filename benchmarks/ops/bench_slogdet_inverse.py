"""Determinants and inverses of a flow's mixing matrices: shapes are ``layers of each size x sizes``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.slogdet_inverse import slogdet_inverse


def _sizes(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape[1:] for _ in range(shape[0])]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """A parameter a layer, near the rotation that it began as."""
    weights = (torch.linalg.qr(torch.randn(n, n)).Q + 0.1 * torch.randn(n, n) / n**0.5 for n in _sizes(shape))
    return {f"w{i}": w.to(device, dtype).requires_grad_() for i, w in enumerate(weights)}


def matrices(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    return {name: w.detach() for name, w in inputs(shape, dtype, device).items()}  # type: ignore[attr-defined]


def each(**weights: Tensor) -> tuple[Tensor]:
    """A layer at a time, as flow libraries do."""
    return (torch.stack([torch.linalg.slogdet(w).logabsdet for w in weights.values()]),)


def each_in_float64(**weights: Tensor) -> tuple[Tensor]:
    return (torch.stack([torch.linalg.slogdet(w.double()).logabsdet.to(w.dtype) for w in weights.values()]),)


def _batches(weights: dict[str, Tensor]) -> Iterator[Tensor]:
    sizes = dict.fromkeys(len(w) for w in weights.values())
    return (torch.stack([w for w in weights.values() if len(w) == size]) for size in sizes)


def batched(**weights: Tensor) -> tuple[Tensor]:
    """Layers of one size at once."""
    return (torch.cat([torch.linalg.slogdet(batch).logabsdet for batch in _batches(weights)]),)


def genperf(**weights: Tensor) -> tuple[Tensor]:
    return (slogdet_inverse(list(weights.values()), inverses=False).logabsdet,)


def each_with_inverse(**weights: Tensor) -> tuple[Tensor, ...]:
    return *each(**weights), *(torch.linalg.inv(w) for w in weights.values())


def batched_with_inverse(**weights: Tensor) -> tuple[Tensor, ...]:
    return *batched(**weights), *(x for batch in _batches(weights) for x in torch.linalg.inv(batch).unbind())


def genperf_with_inverse(**weights: Tensor) -> tuple[Tensor, ...]:
    result = slogdet_inverse(list(weights.values()))
    return result.logabsdet, *result.inverse


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads the matrices; with gradients or inverses, writes as much."""
    return (1 if mode == "fwd" else 2) * sum(n * n for n in _sizes(shape)) * dtype.itemsize


def traffic_with_inverse(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return traffic(shape, dtype, "fwd+bwd")


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Elimination, and with gradients the inverse."""
    return sum(2 * n**3 if mode != "fwd" else 2 * n**3 // 3 for n in _sizes(shape))


def arithmetic_with_inverse(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return arithmetic(shape, dtype, "fwd+bwd")


SHAPES = ((32, 12), (32, 48), (32, 96), (32, 192), (32, 384), (32, 12, 24, 48))

slogdet = Benchmark(
    op="slogdet_inverse",
    cases=tuple(Case(shape, modes=("fwd", "fwd+bwd")) for shape in SHAPES),
    inputs=inputs,
    reference=each,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": each, "peer/batched": batched, "peer/float64": each_in_float64},
    backends=("cpu", "cuda"),
    compile=False,  # torch compiles none of it
)

slogdet_and_inverses = Benchmark(
    op="slogdet_inverse, inverses",
    cases=tuple(Case(shape, modes=("fwd",)) for shape in SHAPES),
    inputs=matrices,
    reference=each_with_inverse,
    bytes=traffic_with_inverse,
    flops=arithmetic_with_inverse,
    genperf=genperf_with_inverse,
    baselines={"eager": each_with_inverse, "peer/batched": batched_with_inverse},
    backends=("cpu", "cuda"),
    compile=False,
)
