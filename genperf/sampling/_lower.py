"""From recorded aten calls to the sampler's graph.

Each handler gets the recorded arguments with Values replaced by :class:`Sym` (or :class:`Scores`) and
returns the layout of the result, after adding the nodes that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from genperf.sampling import _layout
from genperf.sampling._capture import Call, Recording, Value, _Pick
from genperf.sampling._errors import CaptureError
from genperf.sampling._ir import (
    AttentionNode,
    Constant,
    ConvNode,
    Input,
    Node,
    PointwiseNode,
    Ref,
    Source,
)
from genperf.sampling._layout import Atom, Dim, LayoutError, Sym, reference
from genperf.sampling._program import Op

MASKED = -1e3  # attention scores filled with less than this are masked


@dataclass(frozen=True)
class Scores(Sym):
    """Attention scores or weights: dimensions over query cells (Y, X) and key cells (KY, KX)."""

    q: Ref = field(default=None)  # type: ignore[assignment]
    k: Ref = field(default=None)  # type: ignore[assignment]
    heads: int = 1
    dim_k: int = 1
    scale: float = 1.0
    allowed: Tensor | None = None  # bool [queries, keys]
    soft: bool = False
    dead: Tensor | None = None  # bool [queries]: weights that were multiplied by 0


class Lowering:
    """State of one lowering: the nodes so far, and the layout of each recorded value."""

    def __init__(self, classes: int | None) -> None:
        self.nodes: list[Node] = []
        self.syms: dict[Value, Sym] = {}
        self.classes = classes
        self.call: Call | None = None
        self.input: Input | None = None

    @property
    def name(self) -> str:
        return self.call.name if self.call is not None else "the model's output"

    def add(self, node: Node) -> Node:
        self.nodes.append(node)
        return node

    def ref(self, sym: Sym, atoms: list[Atom] | None = None) -> Ref:
        return reference(sym, self.nodes, self.name, atoms)

    def plain_ref(self, sym: Sym) -> Ref:
        return _layout.plain(self.ref(sym), sym.size("Y"), sym.size("X"), self.nodes, self.name)

    def fail(self, why: str) -> CaptureError:
        return CaptureError(f"{self.name}: {why}")

    def finished(self, sym: Sym, make: Callable[..., Node], *args: Any, **kwargs: Any) -> Sym:
        """``sym``'s dimensions over a new node of their grid and channels."""
        node = make(self.name, sym.size("Y"), sym.size("X"), sym.channels, *args, **kwargs)
        return sym.fresh(self.add(node))

    # pointwise functions

    def unary(self, x: Sym, op: Op, p: float = 0.0, q: float = 0.0) -> Sym:
        return self.finished(x, PointwiseNode, op, self.ref(x), None, float(p), float(q))

    def common_dims(self, a: Any, b: Any) -> tuple[Dim, ...]:
        """The dimensions of two broadcast operands."""
        syms = [s for s in (a, b) if isinstance(s, Sym)]
        rank = max(len(s.shape) if isinstance(s, Sym) else s.dim() for s in (a, b) if not _is_number(s))
        dims: list[Dim] = [()] * rank
        for sym in syms:
            for i, dim in enumerate(sym.dims, start=rank - len(sym.dims)):
                if dims[i] and dim:
                    dims[i] = self.same_dim(dims[i], dim)
                else:
                    dims[i] = dims[i] or dim
        for other in (a, b):
            if isinstance(other, Tensor):
                for i, size in enumerate(other.shape, start=rank - other.dim()):
                    if size != 1 and not dims[i]:
                        dims[i] = (Atom("C", size),)
        return tuple(dims)

    def same_dim(self, a: Dim, b: Dim) -> Dim:
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

    def binary(self, a: Any, b: Any, op: Op) -> Any:
        if isinstance(a, Scores) or isinstance(b, Scores):
            return self.scores_binary(a, b, op)
        number = b if _is_number(b) else a if _is_number(a) else None
        if number is not None:
            return self.with_number(a, b, op)
        dims = self.common_dims(a, b)
        template = Sym(self.nodes[0], dims)
        sources = [self.source(s, dims, template) for s in (a, b)]
        return self.finished(template, PointwiseNode, op, *sources)

    def source(self, operand: Sym | Tensor, dims: tuple[Dim, ...], template: Sym) -> Source:
        if isinstance(operand, Tensor):
            return self.laid_out(operand, dims)
        for kind in ("Y", "X"):
            if operand.size(kind) != template.size(kind):
                raise self.fail("broadcasts an input-dependent tensor over rows or columns")
        if operand.channels == template.channels:
            own = _layout.regroup(operand.dims, _atom_sizes(dims, operand)) if operand.atoms else ()
            return self.ref(operand, [x for dim in own for x in dim])
        if operand.channels == 1:
            ones = torch.ones(1, 1, template.channels)
            node = ConvNode(
                self.name,
                template.size("Y"),
                template.size("X"),
                template.channels,
                self.ref(operand),
                [(0, 0)],
                ones,
            )
            return Ref(self.add(node), 0, template.channels)
        raise self.fail("broadcasts an input-dependent tensor over a part of its channels")

    def laid_out(self, tensor: Tensor, dims: tuple[Dim, ...]) -> Constant:
        return _layout.constant(tensor, dims)

    def with_number(self, a: Any, b: Any, op: Op) -> Sym:
        x, c = (a, float(b)) if isinstance(a, Sym) else (b, float(a))
        swapped = not isinstance(a, Sym)
        if op == Op.ADD:
            return self.unary(x, Op.AFFINE, 1.0, c)
        if op == Op.SUB:
            return self.unary(x, Op.AFFINE, -1.0, c) if swapped else self.unary(x, Op.AFFINE, 1.0, -c)
        if op == Op.MUL:
            return self.unary(x, Op.AFFINE, c, 0.0)
        if op == Op.DIV and not swapped:
            return self.unary(x, Op.AFFINE, 1.0 / c, 0.0)
        if op == Op.DIV:
            return self.unary(self.unary(x, Op.RECIPROCAL), Op.AFFINE, c, 0.0)
        filled = torch.full((1,) * len(x.shape), c)
        return self.binary(x, filled, op)

    # attention

    def scores_binary(self, a: Any, b: Any, op: Op) -> Scores:
        scores, other = (a, b) if isinstance(a, Scores) else (b, a)
        if _is_number(other) and not scores.soft and scores.allowed is None and isinstance(a, Scores):
            if op == Op.MUL:
                return replace(scores, scale=scores.scale * float(other))
            if op == Op.DIV:
                return replace(scores, scale=scores.scale / float(other))
        if isinstance(other, Tensor) and op == Op.ADD and not scores.soft:
            return self.mask_scores(scores, other <= MASKED, bool(((other == 0) | (other <= MASKED)).all()))
        if isinstance(other, Tensor) and op == Op.MUL and scores.soft:
            rows = self.score_map(scores, other != 0)
            one_or_zero = bool(((other == 0) | (other == 1)).all())
            if one_or_zero and bool((rows == rows[:, :1]).all()):
                return replace(scores, dead=~rows[:, 0])
        raise self.fail("uses attention scores for more than scale, mask, softmax, product with values")

    def score_map(self, scores: Scores, tensor: Tensor) -> Tensor:
        """A tensor broadcast against the scores as [queries, keys]; the same for all heads and images."""
        dims = scores.dims
        full = tensor.expand(torch.broadcast_shapes(tensor.shape, scores.shape))
        if full.dim() != len(dims):
            raise self.fail("combines attention scores with a tensor of more dimensions")
        for i, dim in enumerate(dims):
            if any(a.kind in ("B", "C") for a in dim):
                first = full.narrow(i, 0, 1)
                if not bool((full == first).all()):
                    raise self.fail("an attention mask that differs by head or image is not supported")
                full = first
        return full.reshape(_positions(scores, "Y", "X"), _positions(scores, "KY", "KX"))

    def mask_scores(self, scores: Scores, masked: Tensor, certain: bool = True) -> Scores:
        if not certain or scores.soft:
            raise self.fail(f"masks attention with values that are neither 0 nor at most {MASKED}")
        allowed = ~self.score_map(scores, masked)
        return replace(scores, allowed=allowed if scores.allowed is None else allowed & scores.allowed)

    def scores_of(self, q: Sym, k: Sym, dims: tuple[Dim, ...], heads: int, dim_k: int) -> Scores:
        """Scores of query cells against key cells; the channels of q and k are heads, then dim_k."""
        q_ref, k_ref = self.plain_ref(q), self.plain_ref(k)
        return Scores(q_ref.node, dims, q=q_ref, k=k_ref, heads=heads, dim_k=dim_k)

    def attend(self, scores: Scores, v: Sym, dims: tuple[Dim, ...], dim_v: int) -> Sym:
        if not scores.soft:
            raise self.fail("multiplies attention scores with values without a softmax")
        rows, cols = scores.size("Y"), scores.size("X")
        length = rows * cols
        allowed = (
            scores.allowed if scores.allowed is not None else torch.ones(length, length, dtype=torch.bool)
        )
        count = allowed.sum(1)
        if not bool((allowed == (torch.arange(length)[None] < count[:, None])).all()):
            raise self.fail("an attention mask must allow a prefix of the cells in raster order")
        count = torch.where(count == 0, length, count)  # a softmax over masked scores alone looks everywhere
        if scores.dead is not None:
            count = torch.where(scores.dead, 0, count)
        node = AttentionNode(
            self.name, rows, cols, scores.heads * dim_v, scores.q, scores.k, self.plain_ref(v),
            scores.heads, scores.dim_k, dim_v, scores.scale, count,
        )  # fmt: skip
        return Sym(self.add(node), dims)

    def bmm(self, a: Sym, b: Sym) -> Sym:
        batch, (m, k), n = a.dims[0], (a.dims[-2], a.dims[-1]), b.dims[-1]
        heads = [x for x in batch if x.kind == "C"]
        n_heads = heads[0].size if heads else 1
        if isinstance(a, Scores) and not isinstance(b, Scores):
            inner = [x for x in n if x.kind == "C"]
            dim_v = _product(inner)
            ordered = [x for dim in b.dims[:-2] for x in dim if x.kind == "C"] + inner
            v = replace(b, dims=(*_cells(b), tuple(ordered)))
            out_batch = tuple(replace(x, stride=dim_v) if x.kind == "C" else x for x in batch)
            dims = (out_batch, *a.dims[1:-2], m, (Atom("C", dim_v, 1),) if dim_v > 1 else ())
            return self.attend(a, v, dims, dim_v)
        positions = [x for x in n if x.kind in ("Y", "X")]
        if [x for x in m if x.kind in ("Y", "X")] and positions and all(x.kind == "C" for x in k):
            dim_k = _product(k)
            q_atoms = [x for dim in a.dims[:-2] for x in dim if x.kind == "C"] + list(k)
            k_atoms = [x for dim in b.dims[:-2] for x in dim if x.kind == "C"] + list(b.dims[-2])
            q_sym = replace(a, dims=(*_cells(a), tuple(q_atoms)))
            k_sym = replace(b, dims=(*_cells(b), tuple(k_atoms)))
            dims = (batch, *a.dims[1:-2], m, tuple(Atom("K" + x.kind, x.size) for x in positions))
            return self.scores_of(q_sym, k_sym, dims, n_heads, dim_k)
        raise self.fail("a product of two input-dependent tensors is supported only as attention")


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, bool)) or (isinstance(x, Tensor) and x.dim() == 0)


def _product(atoms: Any) -> int:
    n = 1
    for a in atoms:
        n *= a.size
    return n


def _positions(sym: Sym, *kinds: str) -> int:
    return _product(a for a in sym.atoms if a.kind in kinds)


def _cells(sym: Sym) -> tuple[Dim, ...]:
    return tuple((a,) for a in sym.atoms if a.kind in ("B", "Y", "X"))


def _atom_sizes(dims: tuple[Dim, ...], operand: Sym) -> list[int]:
    """Sizes that cut the operand's dimensions as finely as ``dims``."""
    skip = len(dims) - len(operand.dims)
    return [a.size for dim, own in zip(dims[skip:], operand.dims, strict=True) if own for a in dim]


def lower(recording: Recording, input: Input, input_dims: tuple[Dim, ...], classes: int | None) -> Lowering:
    """Turn a recording into nodes; the layouts of its values are in ``Lowering.syms``."""
    from genperf.sampling._aten import HANDLERS

    state = Lowering(classes)
    state.input = input
    state.add(input)
    state.syms[recording.input] = Sym(input, input_dims)
    live = _needed(recording)
    for i, call in enumerate(recording.calls):
        if i not in live:
            continue
        state.call = call
        target = call.target.func if isinstance(call.target, _Pick) else call.target
        name = str(target.overloadpacket).removeprefix("aten.").rstrip("_")
        handler = HANDLERS.get(name)
        if handler is None:
            raise state.fail(
                "the sampler has no incremental form of this operation; replace it, or keep it out of what "
                "depends on the sampled pixels"
            )
        swap = lambda a: state.syms[a] if isinstance(a, Value) else a  # noqa: E731
        args, kwargs = tree_map(swap, (call.args, call.kwargs))
        try:
            result = handler(state, *args, **kwargs)
        except LayoutError as error:
            raise state.fail(str(error)) from None
        if isinstance(call.target, _Pick):
            result = result[call.target.index]
        results = result if isinstance(result, (list, tuple)) else [result]
        for value, sym in zip(call.results, results, strict=False):
            if value is None or sym is None:
                continue
            if sym.shape != value.shape:
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
