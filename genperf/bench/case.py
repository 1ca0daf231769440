"""What the author of an op writes down: inputs, baselines, truth, and the least work the op can do."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MODES = ("fwd", "bwd", "fwd+bwd", "sample", "train_step")
GRADIENT_MODES = ("bwd", "fwd+bwd")

Inputs = dict[str, Any]
Function = Callable[..., tuple[Tensor, ...]]


class CheckError(AssertionError):
    """Raised by a benchmark's own functions where a provider's result is wrong; the text says how."""


@dataclass(frozen=True)
class Case:
    """One problem: ``shape`` is the op's own notion of size, written ``16384x512x64`` in results."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    modes: tuple[str, ...] = ("fwd", "bwd", "fwd+bwd")

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown:
            raise ValueError(f"modes: expected some of {MODES}, got {unknown[0]!r}")

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Benchmark:
    """An op with its cases, its competitors and its truth.

    Every provider is a function of the inputs (by name) that returns a tuple of tensors. Tensors among the
    inputs that require a gradient are the leaves of ``bwd`` and ``fwd+bwd``; cotangents are made by the
    harness, one for each floating-point output.

    Attributes:
        op: name in the results.
        cases: the problems.
        inputs: ``inputs(shape, dtype, device)`` makes the inputs of a case.
        reference: the definition. Called with the inputs in float64 and with what ``draws`` returns.
        genperf: the public function, run once for each backend in ``backends`` that serves the device.
        baselines: provider name to function. ``"eager"`` (or ``"naive"``, of samplers) is what speed-ups
            are measured against; ``"eager"`` is also compiled for the provider ``compile``. Others are
            ``"peer/<library>"``, ``"cached"`` (of samplers) or ``"native"`` (the bare kernel). One that
            raises NotImplementedError is left out of that case.
        bytes, flops: ``f(shape, dtype, mode)``, the least memory traffic and arithmetic the op needs.
        draws: for random ops, ``draws(provider, inputs, outputs)`` returns extra arguments for
            ``reference``: what the provider drew. It runs with torch's default generators in the state the
            provider found them in. Raises CheckError where no such draw is plausible.
        backends: genperf backends to measure.
        compile: whether ``eager`` is also measured under ``torch.compile``.
        group: what selects it together with others; those with a group are left out of a run of everything.
        parts: for a provider too slow to be timed whole, ``parts[name](shape)`` is how many times the work
            that its function does makes up the case; its times are multiplied by that.
        floor: ``floor(inputs)``, seconds that this machine needs at least, from rates measured there and
            then; by default from ``bytes``, ``flops`` and the rates of the run.
    """

    op: str
    cases: tuple[Case, ...]
    inputs: Callable[[tuple[int, ...], torch.dtype, torch.device], Inputs]
    reference: Function
    bytes: Callable[[tuple[int, ...], torch.dtype, str], int]
    flops: Callable[[tuple[int, ...], torch.dtype, str], int]
    genperf: Function | None = None
    baselines: Mapping[str, Function] = field(default_factory=dict)
    draws: Callable[[str, Inputs, tuple[Tensor, ...]], Inputs] | None = None
    backends: tuple[str, ...] = ("cpu", "triton", "cuda")
    compile: bool = True
    group: str = ""
    parts: Mapping[str, Callable[[tuple[int, ...]], int]] = field(default_factory=dict)
    floor: Callable[[Inputs], float] | None = None


def discover() -> list[Benchmark]:
    """Every Benchmark at module level of a ``bench_*`` module below ``genperf.benchmarks``, by name."""
    try:
        package = importlib.import_module("genperf.benchmarks")
    except ModuleNotFoundError as error:
        if error.name != "genperf.benchmarks":
            raise
        raise ModuleNotFoundError(
            "genperf.benchmarks is not installed; in a checkout, run `pip install -e .` first",
            name=error.name,
        ) from None
    found: dict[str, Benchmark] = {}
    for info in pkgutil.walk_packages(package.__path__, "genperf.benchmarks."):
        if info.name.rpartition(".")[2].startswith("bench_"):
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, Benchmark):
                    if found.get(value.op, value) is not value:
                        raise ValueError(f"two benchmarks are named {value.op!r}")
                    found[value.op] = value
    return [found[op] for op in sorted(found)]
