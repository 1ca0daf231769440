"""What each aten operation means on a grid of cells: one handler an operation, found by its name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genperf.sampling import _layout
from genperf.sampling._ir import ConcatNode, ConvNode, EmbedNode, GlobalNode, Source
from genperf.sampling._layout import Atom, Dim, Sym
from genperf.sampling._lower import Lowering, Scores
from genperf.sampling._program import Op

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def _dim(sym: Sym, dim: int, extra: int = 0) -> int:
    return dim % (len(sym.dims) + extra)


# layout


@_handles("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(state: Lowering, x: Sym, shape: Sequence[int], *_: Any) -> Sym:
    return replace(x, dims=_layout.regroup(x.dims, list(shape)))


@_handles("flatten")
def _flatten(state: Lowering, x: Sym, start: int = 0, end: int = -1) -> Sym:
    start, end = _dim(x, start), _dim(x, end)
    return replace(
        x, dims=(*x.dims[:start], tuple(a for d in x.dims[start : end + 1] for a in d), *x.dims[end + 1 :])
    )


@_handles("permute")
def _permute(state: Lowering, x: Sym, order: Sequence[int]) -> Sym:
    return replace(x, dims=tuple(x.dims[_dim(x, d)] for d in order))


@_handles("transpose")
def _transpose(state: Lowering, x: Sym, a: int, b: int) -> Sym:
    dims = list(x.dims)
    a, b = _dim(x, a), _dim(x, b)
    dims[a], dims[b] = dims[b], dims[a]
    return replace(x, dims=tuple(dims))


@_handles("t")
def _t(state: Lowering, x: Sym) -> Sym:
    return replace(x, dims=x.dims[::-1])


@_handles("unsqueeze")
def _unsqueeze(state: Lowering, x: Sym, dim: int) -> Sym:
    dim = _dim(x, dim, 1)
    return replace(x, dims=(*x.dims[:dim], (), *x.dims[dim:]))


@_handles("squeeze")
def _squeeze(state: Lowering, x: Sym, dim: int | Sequence[int] | None = None) -> Sym:
    drop = range(len(x.dims)) if dim is None else [dim] if isinstance(dim, int) else dim
    dropped = {_dim(x, d) for d in drop}
    return replace(x, dims=tuple(d for i, d in enumerate(x.dims) if i not in dropped or d))


@_handles("expand")
def _expand(state: Lowering, x: Sym, shape: Sequence[int], implicit: bool = False) -> Sym:
    dims = ((),) * (len(shape) - len(x.dims)) + x.dims
    result = replace(x, dims=dims)
    if any(s not in (-1, own) for s, own in zip(shape, result.shape, strict=True)):
        raise state.fail("repeats an input-dependent tensor along a new dimension")
    return result


@_handles("slice")
def _slice(
    state: Lowering, x: Sym, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Sym:
    dim = _dim(x, dim)
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    return _layout.narrow(x, dim, first, max(0, -(-(last - first) // step)), step)


@_handles("narrow")
def _narrow(state: Lowering, x: Sym, dim: int, start: int, length: int) -> Sym:
    return _layout.narrow(x, _dim(x, dim), start % x.shape[dim], length)


@_handles("select")
def _select(state: Lowering, x: Sym, dim: int, index: int) -> Sym:
    dim = _dim(x, dim)
    one = _layout.narrow(x, dim, index % x.shape[dim], 1)
    return replace(one, dims=(*one.dims[:dim], *one.dims[dim + 1 :]))


@_handles("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def _split(state: Lowering, x: Sym, sizes: int | Sequence[int], dim: int = 0) -> list[Sym]:
    dim = _dim(x, dim)
    total = x.shape[dim]
    if isinstance(sizes, int):
        name = str(state.call.target.overloadpacket) if state.call else ""
        size = -(-total // sizes) if "chunk" in name else sizes
        sizes = [min(size, total - at) for at in range(0, total, size)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_layout.narrow(x, dim, start, size) for start, size in zip(starts, sizes, strict=True)]


@_handles("unbind")
def _unbind(state: Lowering, x: Sym, dim: int = 0) -> list[Sym]:
    return [_select(state, x, dim, i) for i in range(x.shape[_dim(x, dim)])]


@_handles("alias", "detach", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "dropout", "view_as")
def _same(state: Lowering, x: Sym, *_: Any, **__: Any) -> Sym:
    return x


@_handles("_to_copy", "to")
def _to_copy(state: Lowering, x: Sym, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Sym:
    if (
        dtype is not None
        and x.node is state.input
        and state.input.form == "index"
        and dtype.is_floating_point
    ):
        if state.classes is None:
            raise state.fail("converts class indices to float, but the head has no number of classes")
        return _looked_up(state, x, torch.arange(state.classes, dtype=torch.float32)[:, None])
    if (
        dtype is not None
        and not dtype.is_floating_point
        and (x.node is not state.input or state.input.form != "index")
    ):
        raise state.fail("rounds an input-dependent tensor to integers")
    return x


@_handles("constant_pad_nd")
def _pad(state: Lowering, x: Sym, pad: Sequence[int], value: float = 0.0) -> Sym:
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        dim = len(x.dims) - 1 - i
        if before == after == 0:
            continue
        kinds = {a.kind for a in x.dims[dim]} or _missing(x)
        if kinds == {"C"}:
            x = _pad_channels(state, x, dim, before, after, value)
        elif kinds not in ({"Y"}, {"X"}):
            raise state.fail("pads a dimension that is neither channels, rows nor columns")
        elif value != 0 and (before > 0 or after > 0):
            shifted = state.unary(x, Op.AFFINE, 1.0, -value)
            shifted = _layout.pad_cells(shifted, dim, kinds.pop(), before, after)
            x = state.unary(shifted, Op.AFFINE, 1.0, value)
        else:
            x = _layout.pad_cells(x, dim, kinds.pop(), before, after)
    return x


def _missing(x: Sym) -> set[str]:
    """What a dimension of size 1 stands for: rows or columns, if those are nowhere else."""
    return next(({kind} for kind in ("Y", "X") if x.size(kind) == 1), {"C"})


def _pad_channels(state: Lowering, x: Sym, dim: int, before: int, after: int, value: float) -> Sym:
    shape = list(x.shape)
    parts: list[Sym | Tensor] = [x]
    for size, at in ((before, 0), (after, 2)):
        if size < 0:
            raise state.fail("crops channels by a negative pad; use a slice")
        if size:
            parts.insert(at, torch.full([*shape[:dim], size, *shape[dim + 1 :]], float(value)))
    return _cat(state, parts, dim)


@_handles("cat")
def _cat(state: Lowering, tensors: Sequence[Sym | Tensor], dim: int = 0) -> Sym:
    syms = [t for t in tensors if isinstance(t, Sym)]
    first = syms[0]
    dim = dim % len(first.dims)
    kinds = {a.kind for s in syms for a in s.dims[dim]}
    if kinds & {"Y", "X"}:
        return _cat_cells(state, tensors, dim, (kinds & {"Y", "X"}).pop())
    others = [i for s in syms for i, d in enumerate(s.dims) if i != dim and any(a.kind == "C" for a in d)]
    if others or kinds - {"C"}:
        raise state.fail("concatenates along a dimension that is neither channels, rows nor columns")
    parts: list[tuple[Source, int]] = []
    for t in tensors:
        size = t.shape[dim]
        if isinstance(t, Sym):
            parts.append((state.ref(t), size))
        else:
            dims: list[Dim] = list(first.dims)
            dims[dim] = (Atom("C", size, 1),) if size > 1 else ()
            parts.append((state.laid_out(t, tuple(dims)), size))
    total = sum(n for _, n in parts)
    dims = list(first.dims)
    dims[dim] = (Atom("C", total, 1),) if total > 1 else ()
    return state.finished(Sym(first.node, tuple(dims)), ConcatNode, parts)


def _cat_cells(state: Lowering, tensors: Sequence[Sym | Tensor], dim: int, kind: str) -> Sym:
    """Zeros above or below an image: a shift."""
    live = [i for i, t in enumerate(tensors) if isinstance(t, Sym)]
    if len(live) != 1 or any(isinstance(t, Tensor) and bool((t != 0).any()) for t in tensors):
        raise state.fail("concatenates rows or columns of anything but one tensor and zeros")
    x = tensors[live[0]]
    assert isinstance(x, Sym)
    before = sum(t.shape[dim] for t in tensors[: live[0]])
    after = sum(t.shape[dim] for t in tensors[live[0] + 1 :])
    return _layout.pad_cells(x, dim, kind, before, after)


# from indices


def _looked_up(state: Lowering, index: Sym, table: Tensor, dims: tuple[Dim, ...] | None = None) -> Sym:
    if index.node is not state.input or state.input.form != "index":
        raise state.fail("looks up a table with something else than the sampled classes")
    if not index.window.is_plain:
        raise state.fail("looks up shifted classes; shift the embedding instead")
    draw, count = index.base, index.channels
    if count != 1:
        raise state.fail("looks up the classes of several image channels at once")
    channels = table.shape[1]
    dims = dims or (*index.dims, (Atom("C", channels, 1),))
    node = EmbedNode(
        state.name,
        index.size("Y"),
        index.size("X"),
        channels,
        input=state.input,
        table=table.float(),
        draw=draw,
    )
    template = Sym(state.add(node), dims)
    if channels == 1:
        return replace(template, dims=tuple(tuple(a for a in d if a.size > 1) for d in dims))
    return template


@_handles("embedding")
def _embedding(state: Lowering, table: Any, index: Sym, *_: Any) -> Sym:
    if not isinstance(table, Tensor):
        raise state.fail("looks up a table that depends on the sampled pixels")
    return _looked_up(state, index, table)


@_handles("one_hot")
def _one_hot(state: Lowering, index: Sym, classes: int) -> Sym:
    return _looked_up(state, index, torch.eye(classes))


@_handles("scatter")
def _scatter(state: Lowering, base: Any, dim: int, index: Any, value: Any, **_: Any) -> Sym:
    """One-hot codes: zeros with 1 scattered in."""
    if isinstance(base, Tensor) and isinstance(index, Sym) and not bool((base != 0).any()):
        dim = dim % base.dim()
        ones = (_is_one(value)) and index.shape[dim] == 1
        if ones:
            classes = base.shape[dim]
            dims = list(index.dims)
            dims[dim] = (Atom("C", classes, 1),)
            return _looked_up(state, index, torch.eye(classes), tuple(dims))
    raise state.fail("scatters in a way that is not a one-hot code of the sampled classes")


def _is_one(value: Any) -> bool:
    return bool((value == 1).all()) if isinstance(value, Tensor) else value == 1


# convolutions and products with a constant matrix


@_handles("convolution", "_convolution", "conv2d", "conv1d", "mkldnn_convolution")
def _convolution(
    state: Lowering, x: Any, weight: Any, bias: Any = None, stride: Any = (1,), padding: Any = (0,),
    dilation: Any = (1,), transposed: Any = False, output_padding: Any = (0,), groups: int = 1, *_: Any,
) -> Sym:  # fmt: skip
    if not isinstance(x, Sym) or not isinstance(weight, Tensor):
        raise state.fail("a convolution whose weight depends on the sampled pixels is not supported")
    assert state.call is not None
    (value,) = [v for v in state.call.results if v is not None]
    spatial = weight.dim() - 2
    stride, padding, dilation = (list(v) * (spatial // len(v)) for v in (stride, padding, dilation))
    kinds = _spatial_kinds(state, x, spatial)
    steps = {s for s, size in zip(stride, weight.shape[2:], strict=True) if s != 1}
    if len(steps) > 1 or (steps and any(s == 1 and n > 1 for s, n in zip(stride, x.shape[2:], strict=True))):
        raise state.fail(f"strides {tuple(stride)} that differ by dimension are not supported")
    step = steps.pop() if steps else 1
    if groups > 1:
        weight = _ungrouped(weight, groups, transposed)
    if transposed:
        weight = weight.transpose(0, 1)
    taps: list[tuple[int, int]] = []
    kernels: list[Tensor] = []
    positions = itertools.product(*(range(n) for n in weight.shape[2:]))
    for position, tap in zip(positions, weight.flatten(2).unbind(2), strict=True):
        if bool((tap != 0).any()):
            offset = {"Y": 0, "X": 0}
            for kind, k, pad, spread in zip(kinds, position, padding, dilation, strict=True):
                offset[kind] = pad - k * spread if transposed else k * spread - pad
            taps.append((offset["Y"], offset["X"]))
            kernels.append(tap.t())
    channels = weight.shape[0]
    dims: list[Dim] = [x.dims[0], (Atom("C", channels, 1),) if channels > 1 else ()]
    dims += [
        (Atom(kind, size),) if size > 1 else () for kind, size in zip(kinds, value.shape[2:], strict=True)
    ]
    out = Sym(x.node, tuple(dims))
    packed = torch.stack(kernels).float() if kernels else weight.new_zeros(0, x.channels, channels)
    init = None if bias is None else _layout.constant(bias.view(-1, *[1] * spatial), out.dims)
    num, den = (1, step) if transposed else (step, 1)
    return state.finished(out, ConvNode, state.ref(x), taps, packed, init, num, den)


def _spatial_kinds(state: Lowering, x: Sym, spatial: int) -> list[str]:
    if any(a.kind != "B" for a in x.dims[0]) or any(a.kind != "C" for a in x.dims[1]):
        raise state.fail("expects images [B, channels, rows, columns]")
    kinds: list[str | None] = []
    for dim in x.dims[2:]:
        found = {a.kind for a in dim}
        if len(found) > 1 or not found <= {"Y", "X"}:
            raise state.fail("convolves over a dimension that is not the rows or the columns of the image")
        kinds.append(found.pop() if found else None)
    default = ["X"] if spatial == 1 else ["Y", "X"]
    free = [k for k in default if k not in kinds]
    return [k if k is not None else free.pop(0) for k in kinds]


def _ungrouped(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """The block-diagonal weight of a grouped convolution."""
    blocks = weight.chunk(groups, 0)
    outs, ins = (weight.shape[1], blocks[0].shape[0]) if transposed else (blocks[0].shape[0], weight.shape[1])
    rows, cols = (ins, outs) if transposed else (outs, ins)
    full = weight.new_zeros(rows * groups, cols * groups, *weight.shape[2:])
    for g, block in enumerate(blocks):
        full[g * rows : (g + 1) * rows, g * cols : (g + 1) * cols] = block
    return full


def _product(state: Lowering, x: Any, matrix: Any, bias: Any = None) -> Sym:
    """x [..., channels_in] @ matrix [channels_in, channels]."""
    if not isinstance(x, Sym) or not isinstance(matrix, Tensor) or matrix.dim() != 2:
        raise state.fail("a matrix product whose matrix depends on the sampled pixels is not supported")
    if any(a.kind != "C" for a in x.dims[-1]) or any(a.kind == "C" for d in x.dims[:-1] for a in d):
        raise state.fail("multiplies along something else than the channels")
    channels = matrix.shape[1]
    out = Sym(x.node, (*x.dims[:-1], (Atom("C", channels, 1),) if channels > 1 else ()))
    init = None if bias is None else _layout.constant(bias, out.dims)
    return state.finished(out, ConvNode, state.ref(x), [(0, 0)], matrix.float()[None], init)


@_handles("mm", "matmul")
def _mm(state: Lowering, a: Any, b: Any) -> Sym:
    return _product(state, a, b)


@_handles("addmm")
def _addmm(state: Lowering, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Sym:
    if beta != 1 or alpha != 1 or isinstance(bias, Sym):
        raise state.fail("addmm with factors is not supported")
    return _product(state, a, b, bias)


@_handles("linear")
def _linear(state: Lowering, x: Any, weight: Any, bias: Any = None) -> Sym:
    if not isinstance(weight, Tensor):
        raise state.fail("a linear layer whose weight depends on the sampled pixels is not supported")
    return _product(state, x, weight.t(), bias)


# normalisation


@_handles(
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "batch_norm"
)
def _batch_norm(
    state: Lowering, x: Sym, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any
) -> list[Sym | None]:
    if isinstance(rest[0], bool) and rest[0]:
        raise state.fail("BatchNorm in training mode looks at the whole batch; call model.eval()")
    eps = rest[-1]
    if isinstance(mean, Sym) or isinstance(var, Sym) or mean is None:
        raise state.fail("BatchNorm without running statistics looks at the whole batch")
    scale = (var.double() + eps).rsqrt() * (1.0 if weight is None else weight.double())
    shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
    shape = (-1, *[1] * (len(x.dims) - 2))
    y = state.binary(x, scale.float().view(shape), Op.MUL)
    return [state.binary(y, shift.float().view(shape), Op.ADD), None, None]


@_handles(
    "native_group_norm",
    "mean",
    "var_mean",
    "amax",
    "amin",
    "sum",
    "std_mean",
    "_adaptive_avg_pool2d",
    "cumsum",
)
def _global(state: Lowering, x: Sym, *_: Any, **__: Any) -> Sym:
    """Looks at every cell, so that the causality proof will name it (or it works along channels)."""
    assert state.call is not None
    value = next(v for v in state.call.results if v is not None)
    if value.shape == x.shape:
        return state.finished(x, GlobalNode, state.ref(x))
    raise state.fail("a reduction over rows, columns or channels is not supported in what is sampled")


# attention


@_handles("bmm")
def _bmm(state: Lowering, a: Any, b: Any) -> Sym:
    if isinstance(a, Sym) and isinstance(b, Sym):
        return state.bmm(a, b)
    if isinstance(a, Sym) and isinstance(b, Tensor) and bool((b == b[:1]).all()):
        return _product(state, a, b[0])
    raise state.fail("a batched product with a constant that differs by image is not supported")


@_handles("masked_fill")
def _masked_fill(state: Lowering, x: Any, mask: Any, value: Any) -> Sym:
    if isinstance(mask, Sym) or not isinstance(x, Sym):
        raise state.fail("fills by a mask that depends on the sampled pixels")
    number = float(value)
    if isinstance(x, Scores):
        return state.mask_scores(x, mask, number <= -1e3)
    kept = state.binary(x, (~mask).float(), Op.MUL)
    return kept if number == 0 else state.binary(kept, mask.float() * number, Op.ADD)


@_handles("where")
def _where(state: Lowering, mask: Any, a: Any, b: Any) -> Sym:
    if isinstance(mask, Tensor) and isinstance(a, Sym) and not isinstance(b, Sym) and _single(b):
        return _masked_fill(state, a, ~mask, b)
    if isinstance(mask, Tensor) and isinstance(b, Sym) and not isinstance(a, Sym) and _single(a):
        return _masked_fill(state, b, mask, a)
    raise state.fail("chooses by a mask that depends on the sampled pixels, or between two such tensors")


def _single(x: Any) -> bool:
    return not isinstance(x, Tensor) or x.numel() == 1


@_handles("_softmax", "softmax")
def _softmax(state: Lowering, x: Sym, dim: int, *_: Any) -> Sym:
    if isinstance(x, Scores) and not x.soft and all(a.kind in ("KY", "KX") for a in x.dims[dim]):
        return replace(x, soft=True)
    raise state.fail("a softmax that is not over the keys of an attention is not supported; return logits")


@_handles("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention")
def _sdpa(
    state: Lowering, q: Sym, k: Sym, v: Sym, dropout: float = 0.0, causal: bool = False, *_: Any,
    attn_mask: Any = None, scale: float | None = None, **__: Any,
) -> list[Sym | None]:  # fmt: skip
    merged = [replace(s, dims=(tuple(a for d in s.dims[:-2] for a in d), *s.dims[-2:])) for s in (q, k, v)]
    scores = state.bmm(merged[0], _transpose(state, merged[1], -1, -2))
    assert isinstance(scores, Scores)
    scores = replace(scores, scale=scale if scale is not None else scores.dim_k**-0.5)
    if causal:
        n, m = scores.shape[-2:]
        scores = state.mask_scores(scores, torch.ones(n, m, dtype=torch.bool).triu(1))
    if attn_mask is not None:
        flat = attn_mask.reshape(-1, *attn_mask.shape[-2:])[0]
        if isinstance(attn_mask, Sym) or not bool((attn_mask == flat).all()):
            raise state.fail("an attention mask that differs by head or image is not supported")
        masked = ~flat if flat.dtype == torch.bool else flat <= -1e3
        scores = state.mask_scores(scores, masked)
    out = state.bmm(replace(scores, soft=True), merged[2])
    return [replace(out, dims=_split_first(out.dims, q.dims)), None]


def _split_first(dims: tuple[Dim, ...], like: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The merged batch and heads as two dimensions again."""
    images = tuple(a for a in dims[0] if a.kind == "B")
    heads = tuple(a for a in dims[0] if a.kind != "B")
    return (images, heads, *dims[1:]) if len(like) == 4 else (dims[0], *dims[1:])


# pointwise


def _unary(name: str, op: Op) -> None:
    HANDLERS[name] = lambda state, x, *_, **__: state.unary(x, op)


for _name, _op in {
    "relu": Op.RELU, "tanh": Op.TANH, "sigmoid": Op.SIGMOID, "silu": Op.SILU, "exp": Op.EXP, "log": Op.LOG,
    "sqrt": Op.SQRT, "reciprocal": Op.RECIPROCAL, "square": Op.SQUARE, "abs": Op.ABS, "erf": Op.ERF,
}.items():  # fmt: skip
    _unary(_name, _op)


@_handles("neg")
def _neg(state: Lowering, x: Sym) -> Sym:
    return state.unary(x, Op.AFFINE, -1.0, 0.0)


@_handles("rsqrt")
def _rsqrt(state: Lowering, x: Sym) -> Sym:
    return state.unary(state.unary(x, Op.SQRT), Op.RECIPROCAL)


@_handles("gelu")
def _gelu(state: Lowering, x: Sym, *, approximate: str = "none") -> Sym:
    return state.unary(x, Op.GELU if approximate == "none" else Op.GELU_TANH)


@_handles("leaky_relu")
def _leaky_relu(state: Lowering, x: Sym, slope: float = 0.01) -> Sym:
    return state.unary(x, Op.LEAKY_RELU, slope)


@_handles("elu")
def _elu(state: Lowering, x: Sym, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Sym:
    if input_scale != 1:
        raise state.fail("elu with an input scale is not supported")
    y = state.unary(x, Op.ELU, alpha)
    return y if scale == 1 else state.unary(y, Op.AFFINE, scale, 0.0)


@_handles("softplus")
def _softplus(state: Lowering, x: Sym, beta: float = 1.0, threshold: float = 20.0) -> Sym:
    return state.unary(x, Op.SOFTPLUS, beta, threshold)


@_handles("hardtanh", "clamp", "clamp_min", "clamp_max")
def _clamp(
    state: Lowering, x: Sym, low: Any = None, high: Any = None, *, min: Any = None, max: Any = None
) -> Sym:
    name = str(state.call.target.overloadpacket) if state.call else ""
    low, high = low if low is not None else min, high if high is not None else max
    if "hardtanh" in name:
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    elif "clamp_max" in name:
        low, high = None, low
    big = torch.finfo(torch.float32).max
    return state.unary(x, Op.CLAMP, -big if low is None else float(low), big if high is None else float(high))


@_handles("glu")
def _glu(state: Lowering, x: Sym, dim: int = -1) -> Sym:
    dim = _dim(x, dim)
    half = x.shape[dim] // 2
    a, b = _layout.narrow(x, dim, 0, half), _layout.narrow(x, dim, half, half)
    return state.binary(a, b, Op.MUL_SIGMOID)


@_handles("pow")
def _pow(state: Lowering, x: Any, exponent: Any) -> Sym:
    if isinstance(x, Sym) and exponent == 2:
        return state.unary(x, Op.SQUARE)
    raise state.fail(f"the power {exponent} is not supported")


def _scaled(state: Lowering, x: Any, alpha: float) -> Any:
    if alpha == 1:
        return x
    return state.unary(x, Op.AFFINE, alpha, 0.0) if isinstance(x, Sym) else x * alpha


@_handles("add")
def _add(state: Lowering, a: Any, b: Any, alpha: float = 1) -> Any:
    return state.binary(a, _scaled(state, b, alpha), Op.ADD)


@_handles("sub")
def _sub(state: Lowering, a: Any, b: Any, alpha: float = 1) -> Any:
    return state.binary(a, _scaled(state, b, alpha), Op.SUB)


@_handles("rsub")
def _rsub(state: Lowering, a: Any, b: Any, alpha: float = 1) -> Any:
    return state.binary(b, _scaled(state, a, alpha), Op.SUB)


@_handles("mul")
def _mul(state: Lowering, a: Any, b: Any) -> Any:
    return state.binary(a, b, Op.MUL)


@_handles("div")
def _div(state: Lowering, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise state.fail("rounds an input-dependent tensor")
    return state.binary(a, b, Op.DIV)


@_handles("maximum")
def _maximum(state: Lowering, a: Any, b: Any) -> Any:
    return state.binary(a, b, Op.MAXIMUM)


@_handles("minimum")
def _minimum(state: Lowering, a: Any, b: Any) -> Any:
    return state.binary(a, b, Op.MINIMUM)
