"""Writes into a part of a tensor, as a new value of the whole: the parts around it, and what is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genperf.sampling._aten import sequence
from genperf.sampling._aten.joining import join, unsqueezed
from genperf.sampling._aten.layout import part as part_of
from genperf.sampling._aten.registry import handles
from genperf.sampling._layout import Sym
from genperf.sampling._lower import Lowering


@handles("slice_scatter", deferred=True)
def slice_scatter(
    state: Lowering, whole: Any, part: Any, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Any:  # fmt: skip
    rank = len(whole.shape)
    dim = dim % rank
    first, last, step = slice(start, end, step).indices(whole.shape[dim])
    count = part.shape[dim]
    if count == whole.shape[dim]:
        return part
    if sequence.is_flat(whole, dim) or sequence.is_flat(part, dim):
        if step != 1:
            raise state.fail("writes with a step into cells of an image that is flattened to a sequence")
        ends = [_flat_part(state, whole, dim, i, j) for i, j in ((0, first), (last, whole.shape[dim]))]
        return sequence.joined(state, [*ends[0], *sequence.pieces_of(part, dim), *ends[1]], dim)
    whole, part = state.settled(whole), state.settled(part)
    kind = _kind(state, whole, part, dim)
    if step != 1 and kind != "C":
        raise state.fail("writes into every second row or column of a tensor that depends on the input")
    pieces = [_piece(state, whole, dim, 0, first)]
    if step == 1:
        pieces += [part, _piece(state, whole, dim, last, whole.shape[dim])]
    else:
        for i in range(count):
            end = first + (i + 1) * step if i + 1 < count else whole.shape[dim]
            pieces += [
                _piece(state, part, dim, i, i + 1),
                _piece(state, whole, dim, first + i * step + 1, end),
            ]
    return join(state, [p for p in pieces if p.shape[dim] > 0], dim, kind)


def _flat_part(state: Lowering, x: Any, dim: int, start: int, end: int) -> list[sequence.Piece]:
    if start == end:
        return []
    if isinstance(x, Tensor):
        return [sequence.Piece(x, start, end - start)]
    return sequence.cut(x, dim, start, end - start)


@handles("select_scatter")
def select_scatter(state: Lowering, whole: Any, part: Any, dim: int, index: int) -> Any:
    dim = dim % len(whole.shape)
    index = index % whole.shape[dim]
    return slice_scatter(state, whole, unsqueezed(part, dim), dim, index, index + 1)


def _kind(state: Lowering, whole: Any, part: Any, dim: int) -> str:
    known = {a.kind for t in (whole, part) if isinstance(t, Sym) for a in t.dims[dim]}
    if len(known) > 1:
        raise state.fail("writes into a dimension that means something else than what is written")
    return known.pop() if known else state.kind_of(part, dim)


def _piece(state: Lowering, x: Any, dim: int, start: int, end: int) -> Any:
    size = max(0, end - start)
    if isinstance(x, Tensor):
        return x.narrow(dim, start, size)
    if size == 0:
        return torch.empty([*x.shape[:dim], 0, *x.shape[dim + 1 :]])
    return part_of(state, x, dim, start, size)
