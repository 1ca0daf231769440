"""Which cells and channels of a node each dimension of a recorded tensor runs over.

A dimension is a list of *atoms*, outer first: the batch ``B``, rows ``Y``, columns ``X``, a run of
channels ``C`` with a stride in the node, the rows and columns of the keys of an attention, ``KY`` and
``KX``, or the taps ``T`` of unfolded windows. Views, permutations and slices rearrange atoms and move
nothing. Atoms of size 1 are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from genperf.sampling._ir import WHOLE, ConcatNode, Constant, Node, Op, PointwiseNode, Ref, Source, Window


@dataclass(frozen=True)
class Atom:
    kind: str
    size: int
    stride: int = 0  # of a C atom, in channels of the node

    @property
    def like(self) -> tuple[str, int]:
        return self.kind, self.size


Dim = tuple[Atom, ...]


class LayoutError(Exception):
    """A rearrangement that has no meaning on a grid; the caller adds where it happened."""


@dataclass(frozen=True)
class Sym:
    """A recorded tensor: a node, the atoms of each dimension, its first channel and its window.

    Subclasses are *deferred*: they stand for something that no node computes. They say what they become
    when they are ``combined`` with another operand, ``masked``, or multiplied (``times``) with a matrix,
    None meaning that they have to be ``settled`` into a layout over a node first.
    """

    deferred: ClassVar[bool] = False
    only: ClassVar[frozenset[str] | None] = None  # operations that take it unsettled; None for all that may

    node: Node
    dims: tuple[Dim, ...]
    base: int = 0
    window: Window = WHOLE

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(a.size for a in dim) for dim in self.dims)

    @property
    def atoms(self) -> list[Atom]:
        return [a for dim in self.dims for a in dim]

    @property
    def channels(self) -> int:
        return math.prod(a.size for a in self.atoms if a.kind == "C")

    def settled(self, state: Any) -> Sym:
        return self

    def combined(self, state: Any, a: Any, b: Any, op: Op) -> Sym | None:
        return None

    def masked(self, state: Any, mask: Tensor, value: float) -> Sym:
        raise NotImplementedError

    def times(self, state: Any, matrix: Tensor, out: Sym, bias: Any) -> Sym | None:
        return None

    def size(self, kind: str) -> int:
        return math.prod(a.size for a in self.atoms if a.kind == kind)

    @property
    def own_window(self) -> Window:
        """The window, with nothing to be read outside of this tensor's own rows and columns."""
        return self.window.then(Window(y1=self.size("Y"), x1=self.size("X")))

    def is_contiguous(self, atoms: Sequence[Atom] | None = None) -> bool:
        """Whether the channels, in the order of the dimensions (or of ``atoms``), lie side by side."""
        stride = 1
        for atom in reversed([a for a in (atoms or self.atoms) if a.kind == "C"]):
            if atom.stride != stride:
                return False
            stride *= atom.size
        return True

    def fresh(self, node: Node) -> Sym:
        """The same dimensions over a new node whose channels stand in the order of the dimensions."""
        dims: list[Dim] = []
        stride = 1
        for dim in reversed(self.dims):
            out: list[Atom] = []
            for atom in reversed(dim):
                if atom.kind == "C":
                    out.append(replace(atom, stride=stride))
                    stride *= atom.size
                else:
                    out.append(atom)
            dims.append(tuple(reversed(out)))
        return Sym(node, tuple(reversed(dims)))


def regroup(dims: Sequence[Dim], shape: Sequence[int]) -> tuple[Dim, ...]:
    """The atoms of ``dims`` as dimensions of another shape with as many elements."""
    atoms = [a for dim in dims for a in dim]
    total = math.prod(a.size for a in atoms)
    if -1 in shape:
        known = -math.prod(shape)
        shape = [total // known if s == -1 else s for s in shape]
    if math.prod(shape) != total:
        raise LayoutError(f"views {total} elements as {tuple(shape)}")
    out: list[Dim] = []
    for size in shape:
        dim: list[Atom] = []
        while size > 1:
            atom = atoms.pop(0)
            if size % atom.size == 0:
                dim.append(atom)
                size //= atom.size
            elif atom.kind in ("C", "T") and atom.size % size == 0:
                inner = atom.size // size
                dim.append(Atom(atom.kind, size, atom.stride * inner))
                atoms.insert(0, Atom(atom.kind, inner, atom.stride))
                size = 1
            else:
                raise LayoutError(
                    f"cuts a dimension of {atom.size} {_NAMES[atom.kind]} into pieces of {size}"
                )
        out.append(tuple(dim))
    return tuple(out)


_NAMES = {
    "B": "images",
    "Y": "rows",
    "X": "columns",
    "C": "channels",
    "T": "taps of a window",
    "S": "cells in a row",
    "KY": "key rows",
    "KX": "key columns",
}


def merge(dim: Dim) -> Dim:
    """Neighbouring channel atoms joined where their strides allow."""
    out: list[Atom] = []
    for atom in dim:
        if out and out[-1].kind == atom.kind == "C" and out[-1].stride == atom.size * atom.stride:
            out[-1] = Atom("C", out[-1].size * atom.size, atom.stride)
        else:
            out.append(atom)
    return tuple(out)


def narrow(sym: Sym, dim: int, start: int, length: int, step: int = 1) -> Sym:
    """``sym[..., start : start + length * step : step, ...]`` along one dimension."""
    atoms = merge(sym.dims[dim])
    if length == sym.shape[dim] and step == 1:
        return sym
    if len(atoms) != 1:
        raise LayoutError("takes a part of several merged dimensions")
    (atom,) = atoms
    dims, base, window = list(sym.dims), sym.base, sym.window
    if atom.kind == "C":
        base += start * atom.stride
        dims[dim] = (Atom("C", length, atom.stride * step),) if length > 1 else ()
    elif atom.kind in ("Y", "X") and step == 1:
        window = shifted(sym, atom.kind, start)
        dims[dim] = (Atom(atom.kind, length),) if length > 1 else ()
    else:
        raise LayoutError(
            f"takes a part of the {_NAMES[atom.kind]}" + (f" with step {step}" if step > 1 else "")
        )
    return replace(sym, dims=tuple(dims), base=base, window=window)


def shifted(sym: Sym, kind: str, start: int) -> Window:
    """The window that reads ``start`` rows or columns further on."""
    outer = Window(dy=start) if kind == "Y" else Window(dx=start)
    return sym.own_window.then(outer)


def pad_cells(sym: Sym, dim: int, kind: str, before: int, after: int) -> Sym:
    """Zeros (or, where negative, a crop) before and after the rows or columns."""
    size = sym.shape[dim] + before + after
    dims = list(sym.dims)
    dims[dim] = (Atom(kind, size),) if size > 1 else ()
    return replace(sym, dims=tuple(dims), window=shifted(sym, kind, -before))


def wide(tensor: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def constant(tensor: Tensor, dims: Sequence[Dim]) -> Constant:
    """A constant tensor that is broadcast against dimensions ``dims``, as [B, rows, columns, channels]."""
    shape = [1] * (len(dims) - tensor.dim()) + list(tensor.shape)
    split: list[int] = []
    kinds: list[str] = []
    for size, dim in zip(shape, dims, strict=True):
        for atom in dim:
            split.append(atom.size if size != 1 else 1)
            kinds.append(atom.kind)
    tensor = wide(tensor).reshape(split)
    order = [i for kind in ("B", "Y", "X", "C") for i, k in enumerate(kinds) if k == kind]
    if len(order) != len(kinds):
        raise LayoutError("combines attention scores with a constant in an unknown way")
    tensor = tensor.permute(order)
    sizes = [math.prod(d.size for dim in dims for d in dim if d.kind == kind) for kind in "BYXC"]
    flat: list[int] = []
    at = 0
    for kind, size in zip("BYXC", sizes, strict=True):
        n = kinds.count(kind)
        part = tensor.shape[at : at + n]
        if math.prod(part) not in (1, size):  # some of several channel atoms are broadcast
            full = [a.size for dim in dims for a in dim if a.kind == kind]
            tensor = tensor.expand(*tensor.shape[:at], *full, *tensor.shape[at + n :])
            part = torch.Size(full)
        flat.append(math.prod(part))
        at += n
    return Constant(tensor.reshape(flat).contiguous())


def reference(sym: Sym, add: list[Node], name: str, atoms: Sequence[Atom] | None = None) -> Ref:
    """The channels of ``sym`` side by side, in the order of its dimensions (or of ``atoms``).

    Where they do not lie so, a node that gathers them is appended to ``add``.
    """
    channels = [a for a in (atoms or sym.atoms) if a.kind == "C"]
    if sym.is_contiguous(channels):
        return Ref(sym.node, sym.base, sym.channels, sym.own_window)
    index = torch.tensor([sym.base])
    for atom in channels:
        index = (index[:, None] + torch.arange(atom.size) * atom.stride).flatten()
    breaks = [0, *(torch.nonzero(index.diff() != 1).flatten() + 1).tolist(), len(index)]
    parts: list[tuple[Source, int]] = [
        (Ref(sym.node, int(index[i]), j - i), j - i) for i, j in itertools.pairwise(breaks)
    ]
    gathered = ConcatNode(name, sym.node.rows, sym.node.cols, len(index), parts)
    add.append(gathered)
    return Ref(gathered, 0, len(index), sym.own_window)


def plain(ref: Ref, rows: int, cols: int, add: list[Node], name: str) -> Ref:
    """The same without a window: a copy where there is one."""
    full = ref.window.is_plain and ref.window.y1 >= rows and ref.window.x1 >= cols
    if full and (ref.node.rows, ref.node.cols) == (rows, cols):
        return replace(ref, window=WHOLE)
    copy = PointwiseNode(name, rows, cols, ref.channels, Op.COPY, ref)
    add.append(copy)
    return Ref(copy, 0, ref.channels)
