"""Images flattened to a sequence of cells in raster order, cut into runs and put together again.

A run has no grid, so that it stays symbolic until the runs are as long as the image once more: then cell i
reads cell i + shift, which is two windows, since what leaves a row on the right enters the next on the left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from genperf.sampling._ir import FAR, Window
from genperf.sampling._layout import Atom, Sym
from genperf.sampling._lower import Lowering
from genperf.sampling._program import Op


@dataclass(frozen=True)
class Piece:
    """``length`` cells from ``start`` on of a flattened image, or of a constant tensor."""

    source: Sym | Tensor
    start: int
    length: int


@dataclass(frozen=True)
class Run(Sym):
    """Pieces one after another along ``dim``, not as many cells as the image has."""

    deferred = True
    only: ClassVar[frozenset[str] | None] = frozenset(
        ("slice", "narrow", "cat", "constant_pad_nd", "slice_scatter", "alias", "detach", "clone")
    )

    dim: int = 0
    pieces: tuple[Piece, ...] = ()

    def settled(self, state: Lowering) -> Sym:
        cells = state.input.rows * state.input.cols
        raise state.fail(
            f"works on {self.shape[self.dim]} of the image's {cells} cells in a row; pad or concatenate them "
            f"to {cells} first"
        )


def is_flat(x: Any, dim: int) -> bool:
    """Whether a dimension runs over rows and columns, or over cells cut from them."""
    return isinstance(x, Sym) and [a.kind for a in x.dims[dim]] in (["Y", "X"], ["S"])


def cut(x: Sym, dim: int, start: int, length: int) -> list[Piece]:
    """The pieces of ``length`` cells from ``start`` on of a flattened image or a run."""
    if not isinstance(x, Run):
        return [Piece(x, start, length)]
    found = []
    for piece in x.pieces:
        low, high = max(start, 0), min(start + length, piece.length)
        if low < high:
            found.append(replace(piece, start=piece.start + low, length=high - low))
        start -= piece.length
    return found


def taken(state: Lowering, x: Sym, dim: int, start: int, length: int) -> Sym:
    return joined(state, cut(x, dim, start, length), dim)


def pieces_of(x: Sym | Tensor, dim: int) -> list[Piece]:
    if isinstance(x, Tensor):
        return [Piece(x, 0, x.shape[dim])]
    return cut(x, dim, 0, x.shape[dim])


def joined(state: Lowering, pieces: Sequence[Piece], dim: int) -> Any:
    """An image if the pieces are as many cells, else a run."""
    total = sum(p.length for p in pieces)
    template = next(p.source for p in pieces if isinstance(p.source, Sym))
    if total == template.shape[dim]:
        return _assembled(state, pieces, dim, template)
    dims = list(template.dims)
    dims[dim] = (Atom("S", total),)  # also of one cell, to be known as a run
    return Run(template.node, tuple(dims), dim=dim, pieces=tuple(pieces))


def _assembled(state: Lowering, pieces: Sequence[Piece], dim: int, template: Sym) -> Any:
    rows, cols = template.size("Y"), template.size("X")
    whole: Any = None
    constants: list[Tensor] = []
    at = 0
    for piece in pieces:
        source = piece.source
        if isinstance(source, Tensor):
            constants.append(source.narrow(dim, piece.start, piece.length))
        else:
            shape = [piece.length if d == dim else 1 for d in range(len(template.dims))]
            constants.append(torch.zeros(shape, dtype=state.dtype))
            for window in raster_windows(rows, cols, piece.start - at, piece.start, piece.length):
                read = replace(source, window=source.own_window.then(window))
                whole = read if whole is None else state.binary(whole, read, Op.ADD)
        at += piece.length
    if not any(bool(c.any()) for c in constants):
        return whole
    shape = list(torch.broadcast_shapes(*([*c.shape[:dim], 1, *c.shape[dim + 1 :]] for c in constants)))
    full = [c.expand(*shape[:dim], c.shape[dim], *shape[dim + 1 :]) for c in constants]
    constant = torch.cat(full, dim)
    return constant if whole is None else state.binary(whole, constant, Op.ADD)


def raster_windows(rows: int, cols: int, shift: int, start: int, length: int) -> Iterator[Window]:
    """Windows that together read, for cell i in raster order, cell i + shift of those of a run.

    Each of its ``length`` cells from ``start`` on is read by one window, for one cell.
    """
    dy, dx = divmod(shift, cols)
    for oy, ox in ((dy, dx), (dy + 1, dx - cols)) if dx else ((dy, dx),):
        y_low, y_high = max(0, oy), min(rows, rows + oy)
        x_low, x_high = max(0, ox), min(cols, cols + ox)
        found = []
        for y0, y1, x0, x1 in rectangles(start, start + length, cols):
            window = Window(oy, ox, max(y0, y_low), min(y1, y_high), max(x0, x_low), min(x1, x_high))
            if window.y0 < window.y1 and window.x0 < window.x1:
                found.append(window)
        area = sum((w.y1 - w.y0) * (w.x1 - w.x0) for w in found)
        if area == max(0, y_high - y_low) * max(0, x_high - x_low) and found:
            yield Window(oy, ox)
        else:
            yield from found


def rectangles(start: int, end: int, cols: int) -> Iterator[tuple[int, int, int, int]]:
    """(y0, y1, x0, x1) of at most three rectangles that make up cells start to end in raster order."""
    while start < end:
        y, x = divmod(start, cols)
        rows = (end - start) // cols if x == 0 else 0
        if rows:
            yield y, y + rows, 0, FAR
            start += rows * cols
        else:
            stop = min(end, (y + 1) * cols)
            yield y, y + 1, x, x + stop - start
            start = stop
