"""Unfolded windows (im2col), which become a convolution when they are multiplied with a weight.

Between the two a model may multiply them by a constant map for each tap: a mask for each location, as in
locally masked convolutions (Jain et al. 2020, arXiv:2006.12486). Where a tap's map is the same for all the
cells that look inside of the image, it is a plain tap, or none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genperf.sampling import _layout
from genperf.sampling._aten.convolution import at_the_cell
from genperf.sampling._aten.layout import dim_of
from genperf.sampling._aten.masks import filled
from genperf.sampling._aten.registry import handles
from genperf.sampling._ir import ConcatNode, Constant, ConvNode, PointwiseNode, Ref, Source, Window
from genperf.sampling._layout import Atom, Dim, Sym, wide
from genperf.sampling._lower import Lowering
from genperf.sampling._program import Op

Tap = tuple[int, int]


@dataclass(frozen=True)
class Unfolded(Sym):
    """Windows of a node: atoms ``T`` run over ``taps``, with a stride in them.

    ``base``, ``window`` and channel strides are those of the node; rows and columns those of the result.
    """

    deferred = True

    taps: tuple[Tap, ...] = ((0, 0),)
    factor: Tensor | None = None  # [taps, rows, columns]

    @property
    def grid(self) -> tuple[int, int]:
        return self.size("Y"), self.size("X")

    def source(self, state: Lowering) -> Ref:
        atoms = tuple(a for a in self.atoms if a.kind == "C")
        return replace(state.ref(Sym(self.node, (atoms,), self.base)), window=self.window)

    def settled(self, state: Lowering) -> Sym:
        """All windows as channels of one node."""
        source = self.source(state)
        rows, cols = self.grid
        parts: list[tuple[Source, int]] = [
            (replace(source, window=source.window.then(Window(*tap))), source.channels) for tap in self.taps
        ]
        node = state.add(ConcatNode(state.name, rows, cols, source.channels * len(parts), parts))
        dims: list[Dim] = []
        stride = 1
        for dim in reversed(self.dims):
            atoms: list[Atom] = []
            for atom in reversed(dim):
                if atom.kind == "C":
                    atom = replace(atom, stride=stride)
                    stride *= atom.size
                elif atom.kind == "T":
                    atom = Atom("C", atom.size, atom.stride * source.channels)
                atoms.insert(0, atom)
            dims.insert(0, tuple(atoms))
        whole = Sym(node, tuple(dims))
        if self.factor is None:
            return whole
        factor = self.factor.permute(1, 2, 0)[..., None].expand(rows, cols, -1, source.channels)
        maps = Constant(factor.reshape(1, rows, cols, -1))
        ref = Ref(node, 0, node.channels)
        return replace(
            whole, node=state.add(PointwiseNode(state.name, rows, cols, node.channels, Op.MUL, ref, maps))
        )

    def combined(self, state: Lowering, a: Any, b: Any, op: Op) -> Unfolded | None:
        other = b if a is self else a
        if not isinstance(other, Tensor) or not (op == Op.MUL or (op == Op.DIV and a is self)):
            return None
        factor = self._maps(other)
        if factor is None:
            return None
        factor = factor.reciprocal() if op == Op.DIV else factor
        return replace(self, factor=factor if self.factor is None else self.factor * factor)

    def _maps(self, tensor: Tensor) -> Tensor | None:
        """A broadcast tensor as [taps, rows, columns]; None if it differs by image or channel."""
        tensor = tensor.reshape([1] * (len(self.dims) - tensor.dim()) + list(tensor.shape))
        split: list[int] = []
        for size, dim in zip(tensor.shape, self.dims, strict=True):
            split += [a.size if size != 1 else 1 for a in dim]
        tensor = tensor.reshape(split)
        atoms = self.atoms
        for i, atom in enumerate(atoms):
            if atom.kind in ("B", "C"):
                if not bool((tensor == tensor.narrow(i, 0, 1)).all()):
                    return None
                tensor = tensor.narrow(i, 0, 1)
        order = sorted((i for i, a in enumerate(atoms) if a.kind == "T"), key=lambda i: -atoms[i].stride)
        order += [i for kind in "YX" for i, a in enumerate(atoms) if a.kind == kind]
        rest = [i for i in range(len(atoms)) if i not in order]
        tensor = tensor.permute(*rest, *order).expand([1] * len(rest) + [atoms[i].size for i in order])
        return wide(tensor).reshape(len(self.taps), *self.grid)

    def masked(self, state: Lowering, mask: Tensor, value: float) -> Any:
        maps = self._maps((~mask).float()) if value == 0 else None
        if maps is None:
            return filled(state, self.settled(state), mask, value)
        return replace(self, factor=maps if self.factor is None else self.factor * maps)

    def times(self, state: Lowering, matrix: Tensor, out: Sym, bias: Any) -> Sym | None:
        """The product over all channels and taps with matrix [taps and channels, channels out]."""
        atoms = self.dims[-1]
        if any(a.kind in ("T", "C") for d in self.dims[:-1] for a in d) or any(
            a.kind not in ("T", "C") for a in atoms
        ):
            return None
        order = sorted((i for i, a in enumerate(atoms) if a.kind == "T"), key=lambda i: -atoms[i].stride)
        order += [i for i, a in enumerate(atoms) if a.kind == "C"]
        weight = wide(matrix).view(*(a.size for a in atoms), -1).permute(*order, len(atoms))
        weight = weight.reshape(len(self.taps), -1, matrix.shape[1])
        source = self.source(state)
        rows, cols = self.grid
        init: Source | None = None if bias is None else _layout.constant(bias, out.dims)
        groups: dict[Window, list[tuple[Tap, Tensor]]] = {source.window: []}
        varied: list[tuple[Constant, Window, Tensor]] = []
        for t, tap in enumerate(self.taps):
            found = self._region(t, source)
            if found is None:
                factor = self.factor[t][None, :, :, None]  # type: ignore[index]
                varied.append((Constant(factor), source.window.then(Window(*tap)), weight[t]))
            elif found[1] != 0:
                groups.setdefault(found[0], []).append((tap, weight[t] * found[1]))
        result: Sym | None = None
        for window, taps in groups.items():
            if taps:
                stacked = torch.stack([w for _, w in taps])
                ref, offsets = at_the_cell(replace(source, window=window), [t for t, _ in taps])
                result = state.finished(out, ConvNode, ref, offsets, stacked, init)
                init = state.ref(result)
        for maps, window, w in varied:
            shifted = replace(source, window=window)
            node = PointwiseNode(state.name, rows, cols, source.channels, Op.MUL, shifted, maps)
            result = state.linear(Ref(state.add(node), 0, source.channels), out, w, init)
            init = state.ref(result)
        if result is None:  # every tap is masked
            zeros = weight.new_zeros(0, source.channels, out.channels)
            result = state.finished(out, ConvNode, source, [], zeros, init)
        return result

    def _region(self, t: int, source: Ref) -> tuple[Window, float] | None:
        """The window in which tap ``t`` has one factor, and that factor; None if it has several."""
        if self.factor is None:
            return source.window, 1.0
        (dy, dx), w = self.taps[t], source.window
        y, x = (torch.arange(n) for n in self.grid)
        y, x = y + w.dy + dy, x + w.dx + dx
        y_in = (y >= max(w.y0, 0)) & (y < min(w.y1, source.node.rows))
        x_in = (x >= max(w.x0, 0)) & (x < min(w.x1, source.node.cols))
        inside = self.factor[t][y_in][:, x_in]
        if inside.numel() == 0 or not bool(inside.any()):
            return w, 0.0
        if bool((inside == inside[0, 0]).all()):
            return w, float(inside[0, 0])
        y, x = y[y_in], x[x_in]
        used_y, used_x = (torch.nonzero(inside.any(d)).flatten() for d in (1, 0))
        box = inside[used_y[0] : used_y[-1] + 1, used_x[0] : used_x[-1] + 1]
        if not bool((box == box[0, 0]).all()):
            return None
        first, last = (int(y[used_y[0]]), int(x[used_x[0]])), (int(y[used_y[-1]]), int(x[used_x[-1]]))
        return Window(w.dy, w.dx, first[0], last[0] + 1, first[1], last[1] + 1), float(box[0, 0])


def unfolded(state: Lowering, x: Sym, dim: int, size: int, spread: int = 1) -> tuple[Unfolded, Dim]:
    """Windows of ``size`` cells, ``spread`` apart, along one dimension; and the atom of their taps."""
    kind = state.kind_of(x, dim)
    if kind not in ("Y", "X"):
        raise state.fail("unfolds a dimension that is not the rows or the columns of the image")
    start = x if isinstance(x, Unfolded) else Unfolded(x.node, x.dims, x.base, x.own_window)
    taps = [
        (dy + i * spread, dx) if kind == "Y" else (dy, dx + i * spread)
        for dy, dx in start.taps
        for i in range(size)
    ]
    count = x.shape[dim] - (size - 1) * spread
    dims = [tuple(replace(a, stride=a.stride * size) if a.kind == "T" else a for a in d) for d in start.dims]
    dims[dim] = (Atom(kind, count),) if count > 1 else ()
    return replace(start, dims=tuple(dims), taps=tuple(taps)), (Atom("T", size, 1),) if size > 1 else ()


@handles("unfold", deferred=True)
def unfold(state: Lowering, x: Sym, dim: int, size: int, step: int) -> Sym:
    if step != 1 or (x.deferred and not isinstance(x, Unfolded)) or getattr(x, "factor", None) is not None:
        raise state.fail("unfolds with a step, or windows that were multiplied, which is not supported")
    result, taps = unfolded(state, x, dim_of(x, dim), size)
    return replace(result, dims=(*result.dims, taps))


@handles("im2col")
def im2col(
    state: Lowering, x: Sym, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    stride: Sequence[int],
) -> Sym:  # fmt: skip
    if len(x.dims) != 4 or math.prod(stride) != 1:
        raise state.fail(
            f"unfolding with stride {tuple(stride)} of {len(x.dims)} dimensions; expected 1 of 4"
        )
    taps: list[Dim] = []
    for dim, kind in ((2, "Y"), (3, "X")):
        if state.kind_of(x, dim) != kind:
            raise state.fail("unfolds dimensions that are not rows and columns")
        x = _layout.pad_cells(x, dim, kind, padding[dim - 2], padding[dim - 2])
    result: Sym = x
    for i, dim in enumerate((2, 3)):
        result, atom = unfolded(state, result, dim, kernel[i], dilation[i])
        taps = [tuple(replace(a, stride=a.stride * kernel[i]) for a in d) for d in taps] + [atom]
    b, c, y, x_dim = result.dims
    return replace(result, dims=(b, (*c, *taps[0], *taps[1]), (*y, *x_dim)))
