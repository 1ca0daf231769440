"""Views, permutations and parts: they move nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from genperf.sampling import _layout
from genperf.sampling._aten import sequence
from genperf.sampling._aten.lookup import looked_up
from genperf.sampling._aten.registry import handles
from genperf.sampling._layout import Sym
from genperf.sampling._lower import Lowering
from genperf.sampling._program import Op


def dim_of(x: Sym, dim: int, extra: int = 0) -> int:
    return dim % (len(x.dims) + extra)


@handles("view", "_unsafe_view", "reshape", "_reshape_alias", deferred=True)
def view(state: Lowering, x: Sym, shape: Sequence[int], *_: Any) -> Sym:
    return replace(x, dims=_layout.regroup(x.dims, list(shape)))


@handles("flatten", deferred=True)
def flatten(state: Lowering, x: Sym, start: int = 0, end: int = -1) -> Sym:
    start, end = dim_of(x, start), dim_of(x, end)
    merged = tuple(a for d in x.dims[start : end + 1] for a in d)
    return replace(x, dims=(*x.dims[:start], merged, *x.dims[end + 1 :]))


@handles("permute", deferred=True)
def permute(state: Lowering, x: Sym, order: Sequence[int]) -> Sym:
    return replace(x, dims=tuple(x.dims[dim_of(x, d)] for d in order))


@handles("transpose", deferred=True)
def transpose(state: Lowering, x: Sym, a: int, b: int) -> Sym:
    dims = list(x.dims)
    a, b = dim_of(x, a), dim_of(x, b)
    dims[a], dims[b] = dims[b], dims[a]
    return replace(x, dims=tuple(dims))


@handles("t", deferred=True)
def t(state: Lowering, x: Sym) -> Sym:
    return replace(x, dims=x.dims[::-1])


@handles("unsqueeze", deferred=True)
def unsqueeze(state: Lowering, x: Sym, dim: int) -> Sym:
    dim = dim_of(x, dim, 1)
    return replace(x, dims=(*x.dims[:dim], (), *x.dims[dim:]))


@handles("squeeze", deferred=True)
def squeeze(state: Lowering, x: Sym, dim: int | Sequence[int] | None = None) -> Sym:
    drop = range(len(x.dims)) if dim is None else [dim] if isinstance(dim, int) else dim
    dropped = {dim_of(x, d) for d in drop}
    return replace(x, dims=tuple(d for i, d in enumerate(x.dims) if i not in dropped or d))


@handles("expand", deferred=True)
def expand(state: Lowering, x: Sym, shape: Sequence[int], implicit: bool = False) -> Any:
    result = replace(x, dims=((),) * (len(shape) - len(x.dims)) + x.dims)
    wanted = [own if size == -1 else size for size, own in zip(shape, result.shape, strict=True)]
    if tuple(wanted) == result.shape:
        return result
    for i, size in enumerate(wanted):
        if size != result.shape[i] and state.kind_of(result, i) != "C":
            raise state.fail("repeats an input-dependent tensor over images, rows or columns")
    return state.binary(state.settled(result), torch.zeros(wanted), Op.ADD)


def part(state: Lowering, x: Sym, dim: int, start: int, length: int, step: int = 1) -> Sym:
    if length == x.shape[dim] and step == 1:
        return x
    if step == 1 and sequence.is_flat(x, dim):
        return sequence.taken(state, x, dim, start, length)
    return _layout.narrow(state.settled(x), dim, start, length, step)


@handles("slice", deferred=True)
def slice_(
    state: Lowering, x: Sym, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Sym:
    dim = dim_of(x, dim)
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    return part(state, x, dim, first, max(0, -(-(last - first) // step)), step)


@handles("narrow", deferred=True)
def narrow(state: Lowering, x: Sym, dim: int, start: int, length: int) -> Sym:
    return part(state, x, dim_of(x, dim), start % x.shape[dim], length)


@handles("select", deferred=True)
def select(state: Lowering, x: Sym, dim: int, index: int) -> Sym:
    dim = dim_of(x, dim)
    one = part(state, x, dim, index % x.shape[dim], 1)
    if isinstance(one, sequence.Run):
        one = one.settled(state)
    return replace(one, dims=(*one.dims[:dim], *one.dims[dim + 1 :]))


@handles("alias", "detach", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "dropout", deferred=True)
def same(state: Lowering, x: Sym, *_: Any, **__: Any) -> Sym:
    return x


@handles("_to_copy", "to", deferred=True)
def to_copy(state: Lowering, x: Sym, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Sym:
    if dtype is None:
        return x
    index = x.node is state.input and state.input.form == "index"
    if index and dtype.is_floating_point:
        if state.classes is None:
            raise state.fail("converts class indices to float, but the head has no number of classes")
        return looked_up(state, x, torch.arange(state.classes, dtype=torch.float32)[:, None])
    if not index and not dtype.is_floating_point:
        raise state.fail("rounds an input-dependent tensor to integers")
    return x
