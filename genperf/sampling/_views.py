"""Views as steps from a whole tensor to a part of it, and what a write into the part makes of the whole.

This is the functionalisation of torch.func.functionalize: an in-place write into a view becomes a new value
of the whole, from which every other view is read again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Target = torch._ops.OpOverload


@dataclass(frozen=True)
class Step:
    """One view operation, without its first argument."""

    target: Target
    args: tuple[Any, ...] = ()

    def operands(self) -> list[Any]:
        return [list(a) if isinstance(a, tuple) else a for a in self.args]


@dataclass(frozen=True)
class Undo:
    """The whole from a part: ``target(part, *args)``, or ``target(whole, part, *args)`` if ``into``."""

    target: Target
    args: tuple[Any, ...]
    into: bool = False


# Functions that return their argument, or a part of it, without saying so in their schema.
SILENT_VIEWS = {
    aten._unsafe_view.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unsafe_chunk.default,
}
SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}
_RESHAPES = ("view", "_unsafe_view", "_reshape_alias", "reshape", "squeeze", "unsqueeze", "flatten")
IN_PLACE = {
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
}


def name_of(target: Target) -> str:
    return str(target.overloadpacket).removeprefix("aten.")


def steps_of(target: Target, args: Sequence[Any], result: Any, rank: int) -> list[Step] | None:
    """The step to each result of ``target`` on a tensor of that rank, other arguments ``args``.

    Empty where the result is the tensor itself, None where it is not known how to take the step again.
    """
    if target in SAME:
        return []
    if not isinstance(result, (tuple, list)):
        return [Step(target, _hashable(args))]
    name = name_of(target)
    if "split" in name or "chunk" in name:
        dim = (args[1] if len(args) > 1 else 0) % rank
        ends = [0, *itertools.accumulate(part.shape[dim] for part in result)]
        return [Step(aten.slice.Tensor, (dim, i, j)) for i, j in itertools.pairwise(ends)]
    if name == "unbind":
        return [Step(aten.select.int, (args[0] if args else 0, i)) for i in range(len(result))]
    return None


def undo(step: Step, shape: tuple[int, ...]) -> Undo | None:
    """How a part of a tensor of that shape goes back into it; None if it cannot."""
    name, args = name_of(step.target), step.args
    rank = len(shape)
    if name == "slice":
        return Undo(aten.slice_scatter.default, args, into=True)
    if name == "select":
        return Undo(aten.select_scatter.default, args, into=True)
    if name in _RESHAPES:
        return Undo(aten.reshape.default, (list(shape),))
    if name in ("transpose", "t"):
        return Undo(step.target, args)
    if name == "permute":
        order = [d % rank for d in args[0]]
        return Undo(step.target, (sorted(range(rank), key=order.__getitem__),))
    if name == "expand" and _expanded(args[0], shape) == shape:
        return Undo(aten.reshape.default, (list(shape),))
    return None


def _expanded(sizes: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    padded = (1,) * (len(sizes) - len(shape)) + shape
    return tuple(own if size == -1 else size for size, own in zip(sizes, padded, strict=True))


def meta_result(target: Target, args: Sequence[Any], is_value: Callable[[Any], bool]) -> Any:
    """What ``target`` returns, as meta tensors: shapes and dtypes alone."""

    def shape_only(a: Any) -> Any:
        if is_value(a) or isinstance(a, Tensor):
            return torch.empty(tuple(a.shape), dtype=a.dtype, device="meta")
        return a

    return target(*map(shape_only, args))


def _hashable(args: Any) -> Any:
    return tuple(_hashable(a) if isinstance(a, (list, tuple)) else a for a in args)
