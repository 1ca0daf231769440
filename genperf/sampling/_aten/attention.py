"""Causal attention: scores stay symbolic until they are multiplied with the values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from genperf.sampling._aten.convolution import product
from genperf.sampling._aten.layout import transpose
from genperf.sampling._aten.registry import handles
from genperf.sampling._ir import AttentionNode, Ref
from genperf.sampling._layout import Atom, Dim, Sym
from genperf.sampling._lower import Lowering, is_number
from genperf.sampling._program import Op

MASKED = -1e3  # attention scores filled with less than this are masked


@dataclass(frozen=True)
class Scores(Sym):
    """Attention scores or weights: dimensions over query cells (Y, X) and key cells (KY, KX)."""

    deferred = True

    q: Ref = field(default=None)  # type: ignore[assignment]
    k: Ref = field(default=None)  # type: ignore[assignment]
    heads: int = 1
    dim_k: int = 1
    scale: float = 1.0
    allowed: Tensor | None = None  # bool [queries, keys]
    soft: bool = False
    dead: Tensor | None = None  # bool [queries]: weights that were multiplied by 0

    def settled(self, state: Lowering) -> Sym:
        raise state.fail("uses attention scores for more than scale, mask, softmax, product with values")

    def combined(self, state: Lowering, a: Any, b: Any, op: Op) -> Scores | None:
        other = b if a is self else a
        if is_number(other) and not self.soft and self.allowed is None and a is self:
            if op == Op.MUL:
                return replace(self, scale=self.scale * float(other))
            if op == Op.DIV:
                return replace(self, scale=self.scale / float(other))
        if isinstance(other, Tensor) and op == Op.ADD and not self.soft:
            masked = other <= MASKED
            if bool(((other == 0) | masked).all()):
                return self.without(state, masked)
            raise state.fail(f"adds to attention scores what is neither 0 nor at most {MASKED}")
        if isinstance(other, Tensor) and op == Op.MUL and self.soft:
            rows = self.map_of(state, other != 0)
            one_or_zero = bool(((other == 0) | (other == 1)).all())
            if one_or_zero and bool((rows == rows[:, :1]).all()):
                return replace(self, dead=~rows[:, 0])
        return None

    def masked(self, state: Lowering, mask: Tensor, value: float) -> Scores:
        if value > MASKED or self.soft:
            raise state.fail(f"masks attention scores with {value}; expected at most {MASKED}")
        return self.without(state, mask)

    def without(self, state: Lowering, masked: Tensor) -> Scores:
        allowed = ~self.map_of(state, masked)
        return replace(self, allowed=allowed if self.allowed is None else allowed & self.allowed)

    def softmax(self, safe: bool = False) -> Scores:
        """The weights; where all keys are masked, those of ``safe`` are 0."""
        dead = ~self.allowed.any(1) if safe and self.allowed is not None else None
        return replace(self, soft=True, dead=dead)

    def map_of(self, state: Lowering, tensor: Tensor) -> Tensor:
        """A tensor broadcast against the scores as [queries, keys]; the same for all heads and images."""
        full = tensor.expand(torch.broadcast_shapes(tensor.shape, self.shape))
        if full.dim() != len(self.dims):
            raise state.fail("combines attention scores with a tensor of more dimensions")
        for i, dim in enumerate(self.dims):
            if any(a.kind in ("B", "C") for a in dim):
                first = full.narrow(i, 0, 1)
                if not bool((full == first).all()):
                    raise state.fail("an attention mask that differs by head or image is not supported")
                full = first
        return full.reshape(_positions(self, "Y", "X"), _positions(self, "KY", "KX"))


def _attend(state: Lowering, scores: Scores, v: Sym, dims: tuple[Dim, ...], dim_v: int) -> Sym:
    if not scores.soft:
        raise state.fail("multiplies attention scores with values without a softmax")
    rows, cols = scores.size("Y"), scores.size("X")
    length = rows * cols
    allowed = scores.allowed
    if allowed is None:
        allowed = torch.ones(length, length, dtype=torch.bool)
    count = allowed.sum(1)
    if not bool((allowed == (torch.arange(length)[None] < count[:, None])).all()):
        raise state.fail("an attention mask must allow a prefix of the cells in raster order")
    dead = torch.zeros(length, dtype=torch.bool) if scores.dead is None else scores.dead
    name = state.name
    blind = (count == 0) & ~dead
    if bool(blind.any()):  # a softmax over masked scores alone looks everywhere
        cell = divmod(int(blind.nonzero()[0]), cols)
        name += f", whose mask leaves pixel {cell} no key, so that its softmax is over all of them,"
        count = torch.where(blind, length, count)
    count = torch.where(dead, 0, count)
    node = AttentionNode(
        name, rows, cols, scores.heads * dim_v, scores.q, scores.k, state.plain_ref(v),
        scores.heads, scores.dim_k, dim_v, scores.scale, count,
    )  # fmt: skip
    return Sym(state.add(node), dims)


def matmul(state: Lowering, a: Sym, b: Sym) -> Sym:
    """Scores from queries and keys, or the result from weights and values; dimensions [..., m, n]."""
    if b.deferred and not a.deferred:
        raise state.fail("multiplies with attention scores from the right; expected scores @ values")
    batch, (m, k), n = a.dims[0], (a.dims[-2], a.dims[-1]), b.dims[-1]
    heads = [x for x in batch if x.kind == "C"]
    if isinstance(a, Scores) and not b.deferred:
        inner = [x for x in n if x.kind == "C"]
        dim_v = _size(inner)
        ordered = [x for dim in b.dims[:-2] for x in dim if x.kind == "C"] + inner
        v = replace(b, dims=(*_cells(b), tuple(ordered)))
        out_batch = tuple(replace(x, stride=dim_v) if x.kind == "C" else x for x in batch)
        dims = (out_batch, *a.dims[1:-2], m, (Atom("C", dim_v, 1),) if dim_v > 1 else ())
        return _attend(state, a, v, dims, dim_v)
    positions = [x for x in n if x.kind in ("Y", "X")]
    if [x for x in m if x.kind in ("Y", "X")] and positions and all(x.kind == "C" for x in k):
        q_atoms = [x for dim in a.dims[:-2] for x in dim if x.kind == "C"] + list(k)
        k_atoms = [x for dim in b.dims[:-2] for x in dim if x.kind == "C"] + list(b.dims[-2])
        q_ref = state.plain_ref(replace(a, dims=(*_cells(a), tuple(q_atoms))))
        k_ref = state.plain_ref(replace(b, dims=(*_cells(b), tuple(k_atoms))))
        dims = (batch, *a.dims[1:-2], m, tuple(Atom("K" + x.kind, x.size) for x in positions))
        return Scores(q_ref.node, dims, q=q_ref, k=k_ref, heads=_size(heads), dim_k=_size(k))
    raise state.fail("a product of two input-dependent tensors is supported only as attention")


def _size(atoms: Any) -> int:
    return math.prod(a.size for a in atoms)


def _positions(sym: Sym, *kinds: str) -> int:
    return _size(a for a in sym.atoms if a.kind in kinds)


def _cells(sym: Sym) -> tuple[Dim, ...]:
    return tuple((a,) for a in sym.atoms if a.kind in ("B", "Y", "X"))


@handles("bmm", "baddbmm", deferred=True)
def bmm(state: Lowering, a: Any, b: Any, *rest: Any, beta: float = 1, alpha: float = 1) -> Any:
    if rest:
        raise state.fail("baddbmm is not supported; use a matrix product and an addition")
    if isinstance(a, Sym) and isinstance(b, Sym):
        return matmul(state, a, b)
    if isinstance(a, Sym) and isinstance(b, Tensor) and bool((b == b[:1]).all()):
        return product(state, a, b[0])
    if isinstance(b, Sym) and isinstance(a, Tensor) and bool((a == a[:1]).all()):
        return transpose(state, product(state, transpose(state, b, -1, -2), a[0].t()), -1, -2)
    raise state.fail("a batched product with a constant that differs by image is not supported")


@handles("_softmax", "softmax", "_safe_softmax", deferred=True)
def softmax(state: Lowering, x: Sym, dim: int, *_: Any) -> Sym:
    if isinstance(x, Scores) and not x.soft and all(a.kind in ("KY", "KX") for a in x.dims[dim]):
        return x.softmax(safe=state.operation == "_safe_softmax")
    raise state.fail("a softmax that is not over the keys of an attention is not supported; return logits")


@handles("_log_softmax", "log_softmax")
def log_softmax(state: Lowering, x: Sym, *_: Any) -> Sym:
    raise state.fail("a log-softmax is not supported in what is sampled; return logits")


@handles("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention")
def scaled_dot_product_attention(
    state: Lowering, q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, *_: Any,
    attn_mask: Any = None, scale: float | None = None, **__: Any,
) -> list[Sym | None]:  # fmt: skip
    if dropout != 0:
        raise state.fail(f"draws random numbers (dropout_p {dropout}); call model.eval() first")
    if not all(isinstance(x, Sym) for x in (q, k, v)) or isinstance(attn_mask, Sym):
        raise state.fail("attention with constant queries, keys or values, or a mask by the pixels")
    merged = [replace(s, dims=(tuple(a for d in s.dims[:-2] for a in d), *s.dims[-2:])) for s in (q, k, v)]
    scores = matmul(state, merged[0], transpose(state, merged[1], -1, -2))
    assert isinstance(scores, Scores)
    scores = replace(scores, scale=scale if scale is not None else scores.dim_k**-0.5)
    if causal:
        n, m = scores.shape[-2:]
        scores = scores.without(state, torch.ones(n, m, dtype=torch.bool).triu(1))
    if attn_mask is not None:
        flat = attn_mask.reshape(-1, *attn_mask.shape[-2:])
        if not bool((flat == flat[:1]).all()):
            raise state.fail("an attention mask that differs by head or image is not supported")
        masked = ~flat[0] if flat.dtype == torch.bool else flat[0] <= MASKED
        if flat.dtype != torch.bool and not bool(((flat[0] == 0) | masked).all()):
            raise state.fail(f"adds to attention scores what is neither 0 nor at most {MASKED}")
        scores = scores.without(state, masked)
    out = matmul(state, scores.softmax(safe=True), merged[2])
    if len(q.dims) == 4:  # images and heads apart again
        images = tuple(a for a in out.dims[0] if a.kind == "B")
        heads = tuple(a for a in out.dims[0] if a.kind != "B")
        out = replace(out, dims=(images, heads, *out.dims[1:]))
    return [out, None]
