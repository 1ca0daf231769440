"""From recorded aten calls to the sampler's graph.

Each handler of ``_aten`` gets the recorded arguments with Values replaced by the :class:`Sym` of their
layout, or by a tensor where they turn out to be constant, and returns the layout of the result, after
adding the nodes that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from genperf.sampling import _layout
from genperf.sampling._calls import Call, Recording, Value
from genperf.sampling._errors import CaptureError
from genperf.sampling._ir import ConvNode, Input, Node, PointwiseNode, Ref, Source
from genperf.sampling._layout import Atom, Dim, LayoutError, Sym, reference, wide
from genperf.sampling._program import Op


class Lowering:
    """State of one lowering: the nodes so far, and the layout of each recorded value."""

    def __init__(self, input: Input, classes: int | None) -> None:
        self.nodes: list[Node] = [input]
        self.syms: dict[Value, Sym | Tensor] = {}
        self.classes = classes
        self.call: Call | None = None
        self.input = input

    @property
    def name(self) -> str:
        return self.call.name if self.call is not None else "the model's output"

    @property
    def operation(self) -> str:
        """The name of the recorded function, without the underscore of one that works in place."""
        assert self.call is not None
        return str(self.call.target.overloadpacket).removeprefix("aten.").rstrip("_")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the recorded result."""
        assert self.call is not None
        return next(r.dtype for r in self.call.results if r is not None)

    def fail(self, why: str) -> CaptureError:
        return CaptureError(f"{self.name}: {why}")

    def add(self, node: Node) -> Node:
        self.nodes.append(node)
        return node

    def settled(self, x: Any) -> Any:
        """A layout over nodes, also of what is kept symbolic (windows, attention scores)."""
        return x.settled(self) if isinstance(x, Sym) else x

    def allowed(self, x: Any) -> Any:
        """The same, settled if this operation is not one that takes it as it is."""
        unfit = isinstance(x, Sym) and x.only is not None and self.operation not in x.only
        return x.settled(self) if unfit else x

    def ref(self, sym: Sym, atoms: list[Atom] | None = None) -> Ref:
        return reference(sym, self.nodes, self.name, atoms)

    def plain_ref(self, sym: Sym) -> Ref:
        return _layout.plain(self.ref(sym), sym.size("Y"), sym.size("X"), self.nodes, self.name)

    def finished(self, sym: Sym, make: Callable[..., Node], *args: Any, **kwargs: Any) -> Sym:
        """``sym``'s dimensions over a new node of their grid and channels."""
        node = make(self.name, sym.size("Y"), sym.size("X"), sym.channels, *args, **kwargs)
        return sym.fresh(self.add(node))

    def linear(self, source: Ref, out: Sym, weight: Tensor, init: Source | None = None) -> Sym:
        """``out``'s dimensions over weight [channels_in, channels] times the channels of each cell."""
        return self.finished(out, ConvNode, source, [(0, 0)], wide(weight)[None], init)

    def kind_of(self, x: Sym, dim: int) -> str:
        """What a dimension runs over; where it has one element, what is missing elsewhere."""
        kinds = {a.kind for a in x.dims[dim]}
        if len(kinds) > 1:
            raise self.fail("cuts or joins a dimension of several merged ones")
        if kinds:
            return kinds.pop()
        elsewhere = {a.kind for d in x.dims for a in d}
        missing = [k for k in "BYX" if k not in elsewhere]
        if self.input.rows == 1 and "Y" in missing:
            missing.remove("Y")
        last_channels = any(a.kind == "C" for a in x.dims[-1])
        maps = self.input.rows > 1 and x.channels == 1  # [B, H, W]
        order = {
            3: "BXC" if last_channels else "BYX" if maps else "BCX",
            4: "BYXC" if last_channels else "BCYX",
        }
        expected = order.get(len(x.dims), "")[dim : dim + 1]
        if expected in missing:
            return expected
        return missing[0] if missing and expected != "C" else "C"

    # pointwise functions

    def unary(self, x: Sym, op: Op, p: float = 0.0, q: float = 0.0) -> Sym:
        return self.finished(x, PointwiseNode, op, self.ref(x), None, float(p), float(q))

    def binary(self, a: Any, b: Any, op: Op) -> Any:
        if is_number(a) or is_number(b):
            return self._with_number(a, b, op)
        for constant in (a, b):
            if op == Op.MUL and isinstance(constant, Tensor) and not bool(constant.any()):
                return torch.zeros(torch.broadcast_shapes(a.shape, b.shape), dtype=self.dtype)
        dims = self._common_dims(a, b)
        template = Sym(self.nodes[0], dims)
        sources = [self._source(s, dims, template) for s in (a, b)]
        return self.finished(template, PointwiseNode, op, *sources)

    def _with_number(self, a: Any, b: Any, op: Op) -> Any:
        x, c = (a, float(b)) if isinstance(a, Sym) else (b, float(a))
        swapped = not isinstance(a, Sym)
        if op == Op.ADD:
            return self.unary(x, Op.AFFINE, 1.0, c)
        if op == Op.SUB:
            return self.unary(x, Op.AFFINE, -1.0, c) if swapped else self.unary(x, Op.AFFINE, 1.0, -c)
        if op == Op.MUL and c == 0:  # so that it depends on nothing
            return torch.zeros(x.shape, dtype=self.dtype)
        if op == Op.MUL:
            return self.unary(x, Op.AFFINE, c, 0.0)
        if op == Op.DIV and not swapped and c != 0:
            return self.unary(x, Op.AFFINE, 1.0 / c, 0.0)
        if op == Op.DIV and swapped:
            return self.unary(self.unary(x, Op.RECIPROCAL), Op.AFFINE, c, 0.0)
        filled = torch.full((1,) * len(x.shape), c, dtype=self.dtype)
        return self.binary(filled, x, op) if swapped else self.binary(x, filled, op)

    def _common_dims(self, a: Any, b: Any) -> tuple[Dim, ...]:
        """The dimensions of two broadcast operands."""
        syms = [s for s in (a, b) if isinstance(s, Sym)]
        rank = max(len(s.shape) for s in (a, b))
        dims: list[Dim] = [()] * rank
        for sym in syms:
            for i, dim in enumerate(sym.dims, start=rank - len(sym.dims)):
                if dims[i] and dim:
                    dims[i] = self._same_dim(dims[i], dim)
                else:
                    dims[i] = dims[i] or dim
        for other in (a, b):
            if isinstance(other, Tensor):
                for i, size in enumerate(other.shape, start=rank - other.dim()):
                    if size != 1 and not dims[i]:
                        dims[i] = (Atom("C", size),)
        return tuple(dims)

    def _same_dim(self, a: Dim, b: Dim) -> Dim:
        """One dimension of two operands, cut as finely as either of them."""
        try:
            fine = _layout.regroup([a], [x.size for x in b]) if len(b) > len(a) else [a]
            dim = tuple(atom for part in fine for atom in part)
            other = _layout.regroup([b], [x.size for x in dim])
        except LayoutError:
            other, dim = (), a
        if [x.like for x in dim] != [x.like for part in other for x in part]:
            raise self.fail("combines tensors whose dimensions mean different things")
        return dim

    def _source(self, operand: Sym | Tensor, dims: tuple[Dim, ...], template: Sym) -> Source:
        if isinstance(operand, Tensor):
            return _layout.constant(operand, dims)
        for kind in ("Y", "X"):
            if operand.size(kind) != template.size(kind):
                raise self.fail("broadcasts an input-dependent tensor over rows or columns")
        own: list[Atom] = []
        spread: list[int] = []  # by channel atom of the template: its size in the operand
        padded = ((),) * (len(dims) - len(operand.dims)) + operand.dims
        for dim, mine in zip(dims, padded, strict=True):
            cut = _layout.regroup([mine], [a.size for a in dim]) if mine else ()
            own += [a for d in cut for a in d]
            spread += [a.size if mine else 1 for a in dim if a.kind == "C"]
        ref = self.ref(operand, own)
        if operand.channels == template.channels:
            return ref
        sizes = [a.size for a in template.atoms if a.kind == "C"]
        index = torch.arange(operand.channels).view(spread).expand(sizes).flatten()
        weight = torch.nn.functional.one_hot(index, operand.channels).t()
        return self.ref(self.linear(ref, template, weight))


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float, bool)) or (isinstance(x, Tensor) and x.dim() == 0)


def lower(recording: Recording, input: Input, input_dims: tuple[Dim, ...], classes: int | None) -> Lowering:
    """Turn a recording into nodes; the layouts of its values are in ``Lowering.syms``."""
    from genperf.sampling._aten import HANDLERS

    state = Lowering(input, classes)
    state.syms[recording.input] = Sym(input, input_dims)
    live = _needed(recording)
    for i, call in enumerate(recording.calls):
        if i not in live:
            continue
        state.call = call
        swap = lambda a: state.syms[a] if isinstance(a, Value) else a  # noqa: E731
        args, kwargs = tree_map(swap, (call.args, call.kwargs))
        if any(isinstance(a, Sym) for a in tree_leaves((args, kwargs))):
            handler = HANDLERS.get(state.operation)
            if handler is None:
                raise state.fail(
                    "the sampler has no incremental form of this operation; replace it, or keep it out of "
                    "what depends on the sampled pixels"
                )
            try:
                if not handler.takes_deferred:
                    args, kwargs = tree_map(state.settled, (args, kwargs))
                args, kwargs = tree_map(state.allowed, (args, kwargs))
                result = handler(state, *args, **kwargs)
            except LayoutError as error:
                raise state.fail(str(error)) from None
        else:
            args, kwargs = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, (args, kwargs))
            result = call.target(*args, **kwargs)
        results = result if isinstance(result, (list, tuple)) else [result]
        for value, sym in zip(call.results, results, strict=False):
            if value is None or sym is None:
                continue
            if tuple(sym.shape) != value.shape:
                raise state.fail(f"gave a layout of shape {sym.shape} for a tensor of shape {value.shape}")
            state.syms[value] = sym
    state.call = None
    return state


def _needed(recording: Recording) -> set[int]:
    """The calls that the output depends on."""
    needed: set[int] = set()
    stack = [v for v in tree_leaves(recording.output) if isinstance(v, Value)]
    while stack:
        value = stack.pop()
        if value.call >= 0 and value.call not in needed:
            needed.add(value.call)
            call = recording.calls[value.call]
            stack.extend(v for v in tree_leaves((call.args, call.kwargs)) if isinstance(v, Value))
    return needed


def output_value(recording: Recording) -> Value:
    """The first tensor of the model's output that depends on the input."""
    for leaf in tree_leaves(recording.output):
        if isinstance(leaf, Value):
            return leaf
    raise CaptureError("the model's output does not depend on its input")
