"""Kernels that make the classic generative models fast without changing them.

``genperf.accelerate(model)`` speeds up a model in place; ``genperf.sampling`` draws from autoregressive
models; ``genperf.ops`` has the operators, ``genperf.nn`` the modules; ``python -m genperf`` tells what
this machine can run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genperf import nn, ops, sampling
    from genperf._backend import backend, cpu_isa, cpu_isas
    from genperf._op import explain
    from genperf.accelerate import accelerate

__all__ = ["accelerate", "backend", "cpu_isa", "cpu_isas", "explain", "nn", "ops", "sampling"]

_HOME = {
    "backend": "genperf._backend",
    "cpu_isa": "genperf._backend",
    "cpu_isas": "genperf._backend",
    "explain": "genperf._op",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in __all__:
        return importlib.import_module(f"genperf.{name}")
    raise AttributeError(f"module 'genperf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
