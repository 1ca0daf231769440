"""From class indices to channels: embeddings and one-hot codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from genperf.sampling._aten.registry import handles
from genperf.sampling._ir import EmbedNode
from genperf.sampling._layout import Atom, Dim, Sym, wide
from genperf.sampling._lower import Lowering


def looked_up(state: Lowering, index: Sym, table: Tensor | int, dims: tuple[Dim, ...] | None = None) -> Sym:
    """Rows of ``table`` [classes, channels] for the sampled classes; ``dims`` of the result.

    A number stands for the identity of that size, whose rows are one-hot codes.
    """
    if index.node is not state.input or state.input.form != "index":
        raise state.fail("looks up a table with something else than the sampled classes")
    if not index.window.is_plain:
        raise state.fail("looks up shifted classes; shift the embedding instead")
    draw, count = index.base, index.channels
    if count != 1:
        raise state.fail("looks up the classes of several image channels at once")
    channels = table if isinstance(table, int) else table.shape[1]
    dims = dims or (*index.dims, (Atom("C", channels, 1),))
    rows, cols = index.size("Y"), index.size("X")
    rows_of = None if isinstance(table, int) else wide(table)[None]
    node = EmbedNode(state.name, rows, cols, channels, input=state.input, table=rows_of, draw=draw)
    template = Sym(state.add(node), dims)
    if channels == 1:
        return replace(template, dims=tuple(tuple(a for a in d if a.size > 1) for d in dims))
    return template


@handles("embedding")
def embedding(state: Lowering, table: Any, index: Any, *_: Any) -> Sym:
    if not isinstance(table, Tensor):
        raise state.fail("looks up a table that depends on the sampled pixels")
    return looked_up(state, index, table)


@handles("one_hot")
def one_hot(state: Lowering, index: Sym, classes: int) -> Sym:
    return looked_up(state, index, classes)


@handles("scatter")
def scatter(state: Lowering, base: Any, dim: int, index: Any, value: Any, **_: Any) -> Sym:
    """One-hot codes: zeros with 1 scattered in."""
    if isinstance(base, Tensor) and isinstance(index, Sym) and not bool((base != 0).any()):
        dim = dim % base.dim()
        ones = bool((value == 1).all()) if isinstance(value, Tensor) else value == 1
        if ones and index.shape[dim] == 1:
            classes = base.shape[dim]
            dims = list(index.dims)
            dims[dim] = (Atom("C", classes, 1),)
            return looked_up(state, index, classes, tuple(dims))
    raise state.fail("scatters in a way that is not a one-hot code of the sampled classes")
