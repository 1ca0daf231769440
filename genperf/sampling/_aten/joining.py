"""Padding, concatenation, and channels picked by number.

Along channels the parts stand side by side in a new node. Along rows and columns each part is read through
a window, which gives 0 outside of it, and the parts are added: nothing that is left out can leak in.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genperf.sampling import _layout
from genperf.sampling._aten import sequence
from genperf.sampling._aten.layout import part as part_of
from genperf.sampling._aten.registry import handles
from genperf.sampling._ir import ConcatNode, Source
from genperf.sampling._layout import Atom, Dim, Sym
from genperf.sampling._lower import Lowering
from genperf.sampling._program import Op


@handles("constant_pad_nd", deferred=True)
def pad(state: Lowering, x: Sym, sizes: Sequence[int], value: float = 0.0) -> Any:
    for i in range(len(sizes) // 2):
        before, after = sizes[2 * i], sizes[2 * i + 1]
        dim = len(x.dims) - 1 - i
        if before == after == 0:
            continue
        if sequence.is_flat(x, dim):
            x = _pad_flat(state, x, dim, before, after, value)
            continue
        x = state.settled(x)
        kind = state.kind_of(x, dim)
        if kind == "C":
            x = _pad_channels(state, x, dim, before, after, value)
        elif kind == "B":
            raise state.fail("pads a dimension that is neither channels, rows nor columns")
        else:
            padded = _layout.pad_cells(x, dim, kind, before, after)
            if value != 0 and (before > 0 or after > 0):
                # x is 0 where the constant is not
                shape = [padded.shape[dim] if d == dim else 1 for d in range(len(x.dims))]
                border = torch.zeros(shape, dtype=state.dtype)
                border.narrow(dim, 0, max(before, 0)).fill_(value)
                border.narrow(dim, border.shape[dim] - max(after, 0), max(after, 0)).fill_(value)
                padded = state.binary(padded, border, Op.ADD)
            x = padded
    return x


def _pad_flat(state: Lowering, x: Sym, dim: int, before: int, after: int, value: float) -> Any:
    start, end = max(0, -before), x.shape[dim] - max(0, -after)
    pieces = sequence.cut(x, dim, start, end - start)
    for size, at in ((before, 0), (after, len(pieces) + 1)):
        if size > 0:
            shape = [size if d == dim else 1 for d in range(len(x.dims))]
            pieces.insert(at, sequence.Piece(torch.full(shape, float(value), dtype=state.dtype), 0, size))
    return sequence.joined(state, pieces, dim)


def _pad_channels(state: Lowering, x: Sym, dim: int, before: int, after: int, value: float) -> Any:
    size = x.shape[dim]
    start, end = max(0, -before), size - max(0, -after)
    parts: list[Sym | Tensor] = [part_of(state, x, dim, start, end - start)]
    for count, at in ((before, 0), (after, 2)):
        if count > 0:
            shape = [count if d == dim else 1 for d in range(len(x.dims))]
            parts.insert(
                at, torch.full(shape, float(value), dtype=state.dtype).expand(*_with(x.shape, dim, count))
            )
    return join(state, parts, dim, "C") if len(parts) > 1 else parts[0]


def _with(shape: Sequence[int], dim: int, size: int) -> list[int]:
    return [*shape[:dim], size, *shape[dim + 1 :]]


@handles("cat", deferred=True)
def cat(state: Lowering, tensors: Sequence[Sym | Tensor], dim: int = 0) -> Any:
    rank = max(len(t.shape) for t in tensors)
    dim = dim % rank
    parts = [t for t in tensors if len(t.shape) == rank and t.shape[dim] > 0]
    if any(sequence.is_flat(t, dim) for t in parts):
        return sequence.joined(state, [p for t in parts for p in sequence.pieces_of(t, dim)], dim)
    parts = [state.settled(t) for t in parts]
    syms = [t for t in parts if isinstance(t, Sym)]
    kinds = {a.kind for s in syms for a in s.dims[dim]} or {state.kind_of(syms[0], dim)}
    if len(kinds) > 1:
        raise state.fail("concatenates tensors whose dimensions mean different things")
    return join(state, parts, dim, kinds.pop())


@handles("stack")
def stack(state: Lowering, tensors: Sequence[Sym | Tensor], dim: int = 0) -> Any:
    dim = dim % (len(tensors[0].shape) + 1)
    return join(state, [unsqueezed(t, dim) for t in tensors], dim, "C")


def unsqueezed(x: Sym | Tensor, dim: int) -> Sym | Tensor:
    if isinstance(x, Tensor):
        return x.unsqueeze(dim)
    return replace(x, dims=(*x.dims[:dim], (), *x.dims[dim:]))


@handles("roll")
def roll(state: Lowering, x: Sym, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if len(dims) != len(shifts):
        raise state.fail("rolls a flattened tensor; name the dimension")
    for shift, dim in zip(shifts, dims, strict=True):
        dim = dim % len(x.dims)
        size = x.shape[dim]
        cut = size - shift % size
        if cut < size and sequence.is_flat(x, dim):
            pieces = sequence.cut(x, dim, cut, size - cut) + sequence.cut(x, dim, 0, cut)
            x = sequence.joined(state, pieces, dim)
        elif cut < size:
            parts = [part_of(state, x, dim, cut, size - cut), part_of(state, x, dim, 0, cut)]
            x = join(state, parts, dim, state.kind_of(x, dim))
    return x


def join(state: Lowering, parts: Sequence[Sym | Tensor], dim: int, kind: str) -> Any:
    """Parts one after another along a dimension of that kind."""
    if len(parts) == 1:
        return parts[0]
    if kind == "C":
        return _join_channels(state, parts, dim)
    if kind not in ("Y", "X"):
        raise state.fail("concatenates along a dimension that is neither channels, rows nor columns")
    total = sum(t.shape[dim] for t in parts)
    whole: Any = None
    constant: Tensor | None = None
    at = 0
    for t in parts:
        after = total - at - t.shape[dim]
        if isinstance(t, Sym):
            padded = _layout.pad_cells(t, dim, kind, at, after)
            whole = padded if whole is None else state.binary(whole, padded, Op.ADD)
        elif bool(t.any()):
            padding = (0, 0) * (t.dim() - 1 - dim) + (at, after)
            padded_t = torch.nn.functional.pad(t, padding)
            constant = padded_t if constant is None else constant + padded_t
        at += t.shape[dim]
    return whole if constant is None else state.binary(whole, constant, Op.ADD)


def _join_channels(state: Lowering, parts: Sequence[Sym | Tensor], dim: int) -> Sym:
    # with the dimension first, the parts of its channels are runs, whatever channels other dimensions have
    template = next(t for t in parts if isinstance(t, Sym))
    others = (*template.dims[:dim], *template.dims[dim + 1 :])
    sources: list[tuple[Source, int]] = []
    inner = Sym(template.node, others).channels
    for t in parts:
        size = t.shape[dim]
        if isinstance(t, Sym):
            front = replace(t, dims=(t.dims[dim], *t.dims[:dim], *t.dims[dim + 1 :]))
            sources.append((state.ref(front), size * inner))
        else:
            first: Dim = (Atom("C", size, 1),) if size > 1 else ()
            sources.append((_layout.constant(t.movedim(dim, 0), (first, *others)), size * inner))
    total = sum(t.shape[dim] for t in parts)
    joined = Sym(template.node, ((Atom("C", total, 1),) if total > 1 else (), *others))
    joined = state.finished(joined, ConcatNode, sources)
    return replace(joined, dims=(*joined.dims[1 : dim + 1], joined.dims[0], *joined.dims[dim + 1 :]))


@handles("index_select")
def index_select(state: Lowering, x: Sym, dim: int, index: Any) -> Any:
    if not isinstance(x, Sym) or not isinstance(index, Tensor):
        raise state.fail("picks by numbers that depend on the sampled pixels")
    dim = dim % len(x.dims)
    chosen = [i % x.shape[dim] for i in index.flatten().tolist()]
    kind = state.kind_of(x, dim)
    if kind != "C":
        raise state.fail("picks images, rows or columns by number; use slices")
    breaks = [0, *(i for i in range(1, len(chosen)) if chosen[i] != chosen[i - 1] + 1), len(chosen)]
    runs = [part_of(state, x, dim, chosen[i], j - i) for i, j in itertools.pairwise(breaks)]
    return join(state, runs, dim, kind)


@handles("index")
def index(state: Lowering, x: Sym, indices: Sequence[Any]) -> Any:
    given = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    if len(given) != 1 or not isinstance(given[0][1], Tensor) or given[0][1].dim() != 1:
        raise state.fail("picks by more than one list of numbers")
    dim, chosen = given[0]
    return index_select(state, x, dim, chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen)


@handles("repeat")
def repeat(state: Lowering, x: Sym, times: Sequence[int]) -> Any:
    x = replace(x, dims=((),) * (len(times) - len(x.dims)) + x.dims)
    for dim, n in enumerate(times):
        if n != 1:
            kind = state.kind_of(x, dim)
            if kind != "C":
                raise state.fail("repeats an input-dependent tensor over images, rows or columns")
            x = join(state, [x] * n, dim, kind)
    return x
