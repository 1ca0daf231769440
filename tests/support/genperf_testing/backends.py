"""Every way to run an op: the reference, the CPU kernels at each instruction set, Triton and CUDA.

Without a GPU, Triton is interpreted and CUDA emulated (tests/simt), both on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import genperf

TESTS = Path(__file__).resolve().parents[2]


def load(path: Path, name: str) -> ModuleType:
    """A module that lies outside the import path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def simt() -> ModuleType:
    """tests/simt/build.py"""
    return load(TESTS / "simt" / "build.py", "genperf_simt_build")


@dataclass(frozen=True)
class Backend:
    """``name`` is the tests' name for genperf's ``backend`` on ``device`` with instruction set ``isa``."""

    name: str
    backend: str
    device: str = "cpu"
    isa: str | None = None

    @property
    def costly(self) -> bool:
        """Whether the smallest call takes a tenth of a second, interpreted, or each new shape a second."""
        return self.backend == "triton"

    @property
    def compiling(self) -> bool:
        """Whether new shapes and layouts are compiled when they come."""
        return self.name == "triton-gpu"

    def missing(self) -> str | None:
        """What this machine lacks to run it; None if nothing."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.isa not in (None, *genperf.cpu_isas()):
            return f"this processor has no {self.isa}"
        if self.backend == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if self.name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton compiles for the GPU here"
        return None

    @contextmanager
    def active(self) -> Iterator[Backend]:
        """Every op runs on it, or raises."""
        with ExitStack() as stack:
            if self.isa:
                stack.enter_context(genperf.cpu_isa(self.isa))
            if self.name == "cuda":
                stack.enter_context(simt().emulated_cuda())
            stack.enter_context(genperf.backend(self.backend))
            yield self


BACKENDS = (
    Backend("reference", "reference"),
    Backend("cpu-baseline", "cpu", isa="baseline"),
    Backend("cpu-avx2", "cpu", isa="avx2"),
    Backend("cpu-avx512", "cpu", isa="avx512"),
    Backend("triton", "triton"),
    Backend("cuda", "cuda"),
    Backend("triton-gpu", "triton", device="cuda"),
    Backend("cuda-gpu", "cuda", device="cuda"),
)


def parameters(backends: Iterable[Backend]) -> list:
    """For pytest.mark.parametrize."""
    return [
        pytest.param(b, id=b.name, marks=[pytest.mark.gpu] if b.device == "cuda" else []) for b in backends
    ]


def skip_if_missing(backend: Backend) -> None:
    if reason := backend.missing():
        pytest.skip(reason)
