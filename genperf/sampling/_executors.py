"""Which executor runs a program, and why."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from genperf import _backend
from genperf.sampling._program import Program

EXECUTORS = ("auto", "cpu", "cuda", "reference")


class Executor(Protocol):
    """See :class:`genperf.sampling._reference.ReferenceExecutor`."""

    program: Program
    makes_noise: bool  # whether run takes a key instead of noise

    def start(self, batch: int) -> Any: ...
    def run(
        self, state: Any, begin: int, end: int, noise: Tensor | None, temperature: float = 1.0,
        top_k: int = 0, known: tuple[Tensor, Tensor] | None = None,
    ) -> None: ...  # fmt: skip
    def params(self, state: Any, slot: int) -> Tensor: ...
    def feed(self, state: Any, slot: int, value: Tensor) -> None: ...


def choose(executor: str, device: torch.device) -> tuple[str, str]:
    """An executor's name for programs on ``device``, and why it is that one.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the one that was asked for cannot run there.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"compile: executor is {executor!r}, expected one of {', '.join(EXECUTORS)}")
    asked, by = (executor, "asked for") if executor != "auto" else (_backend.forced(), "GENPERF_BACKEND")
    if asked == "triton":
        raise RuntimeError("compile: the sampler has no triton executor; use cpu, cuda or reference")
    if asked is not None:
        if reason := _backend.unusable(asked, device.type):
            raise RuntimeError(f"compile: executor {asked} cannot run on {device}: {reason}")
        return asked, by
    best = "cuda" if device.type == "cuda" else "cpu"
    if reason := _backend.unusable(best, device.type):
        return "reference", f"{best} cannot run: {reason}"
    return best, f"the best on {device.type}"


def build(name: str, program: Program, device: torch.device, like: Executor | None = None) -> Executor:
    """An executor of that name; ``like`` is one of a program with the same weights, if there is one."""
    if name == "cpu":
        from genperf.sampling._native import CPUExecutor

        return CPUExecutor(program, like=like if isinstance(like, CPUExecutor) else None)
    if name == "cuda":
        from genperf.sampling._cuda import CUDAExecutor

        return CUDAExecutor(program, device)
    from genperf.sampling._reference import ReferenceExecutor

    return ReferenceExecutor(program, device)
