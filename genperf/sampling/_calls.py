"""What was recorded of a forward: functional calls on values and constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from genperf.sampling._views import Target


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that depends on the input: result ``index`` of recorded call ``call``; -1 is the input."""

    call: int
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One aten call: ``args`` and ``kwargs`` hold Values, constant tensors and plain numbers."""

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Value | None, ...]
    module: str

    @property
    def name(self) -> str:
        where = self.module or "the model's own forward"
        return f"{where} ({self.target.overloadpacket})"


@dataclass
class Recording:
    """The calls of one forward, and its output with Values in the place of tensors."""

    input: Value
    calls: list[Call]
    output: Any
    host_reads: list[str]

    def on_cpu(self) -> None:
        """Bring the constants to the CPU, where graphs and plans are made."""

        def moved(a: Any) -> Any:
            return a.cpu() if isinstance(a, Tensor) else a

        for i, call in enumerate(self.calls):
            args, kwargs = tree_map(moved, (call.args, call.kwargs))
            self.calls[i] = replace(call, args=args, kwargs=kwargs)


def equal(a: Any, b: Any) -> bool:
    """Whether two calls, or arguments of theirs, are the same; constants by their values."""
    if isinstance(a, Call):
        return a.target == b.target and equal((a.args, a.kwargs), (b.args, b.kwargs))
    if isinstance(a, Value):
        return isinstance(b, Value) and (a.call, a.index, a.shape) == (b.call, b.index, b.shape)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(a == b)
