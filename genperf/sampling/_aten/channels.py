"""Sums, means and normalisation over the channels of a cell, as 1x1 convolutions with constant weights.

What goes over rows and columns too (GroupNorm, InstanceNorm, pooling of a map) looks at pixels that are not
drawn yet. Where it keeps the shape it becomes a node that depends on every cell, for the proof to name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf.sampling._aten.joining import index_select
from genperf.sampling._aten.layout import dim_of
from genperf.sampling._aten.registry import handles
from genperf.sampling._ir import GlobalNode
from genperf.sampling._layout import Dim, Sym
from genperf.sampling._lower import Lowering
from genperf.sampling._program import Op


@handles(
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "batch_norm"
)
def batch_norm(
    state: Lowering, x: Sym, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any
) -> list[Sym | None]:
    if mean is None or (isinstance(rest[0], bool) and rest[0]):
        raise state.fail(
            "normalises by statistics of the batch or the whole map, pixels not drawn yet included; if this "
            "is BatchNorm in training mode, call model.eval()"
        )
    if isinstance(mean, Sym) or isinstance(var, Sym):
        raise state.fail("statistics that depend on the sampled pixels are not supported")
    scale = (var.double() + rest[-1]).rsqrt() * (1.0 if weight is None else weight.double())
    shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
    shape = (-1, *[1] * (len(x.dims) - 2))
    y = state.binary(x, scale.to(var.dtype).view(shape), Op.MUL)
    return [state.binary(y, shift.to(var.dtype).view(shape), Op.ADD), None, None]


def _dims(x: Sym, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(len(x.dims)))
    return [dim_of(x, d) for d in ([dim] if isinstance(dim, int) else dim)]


def over_cells(x: Sym, dims: Sequence[int]) -> bool:
    return any(a.kind != "C" for d in dims for a in x.dims[d])


def total(state: Lowering, x: Sym, dims: Sequence[int], keepdim: bool, factor: float = 1.0) -> Sym:
    """Sum over dimensions of channels, times ``factor``."""
    if over_cells(x, dims):
        raise state.fail(
            "a reduction over rows, columns or images is not supported in what is sampled: it looks at "
            "pixels that are not drawn yet"
        )
    atoms = [(a.size, i in dims) for i, dim in enumerate(x.dims) for a in dim if a.kind == "C"]
    kept = [1 if gone else size for size, gone in atoms]
    count = torch.Size(kept).numel()
    index = torch.arange(count).view(kept).expand([size for size, _ in atoms]).flatten()
    weight = torch.nn.functional.one_hot(index, count).double() * factor
    out_dims: list[Dim] = [() if i in dims else d for i, d in enumerate(x.dims) if keepdim or i not in dims]
    out = Sym(x.node, tuple(out_dims))
    if not any(gone for _, gone in atoms) and factor == 1:
        return Sym(x.node, tuple(out_dims), x.base, x.window)
    return state.linear(state.ref(x), out, weight)


def _count(x: Sym, dims: Sequence[int]) -> int:
    return torch.Size([x.shape[d] for d in dims]).numel()


@handles("mean")
def mean(state: Lowering, x: Sym, dim: Any = None, keepdim: bool = False, **_: Any) -> Sym:
    dims = _dims(x, dim)
    return total(state, x, dims, keepdim, 1 / _count(x, dims))


@handles("sum")
def sum_(state: Lowering, x: Sym, dim: Any = None, keepdim: bool = False, **_: Any) -> Sym:
    return total(state, x, _dims(x, dim), keepdim)


def moments(
    state: Lowering, x: Sym, dims: Sequence[int], keepdim: bool, correction: float
) -> tuple[Sym, Sym, Sym]:
    """Variance, mean, and the difference of ``x`` from its mean."""
    n = _count(x, dims)
    middle = total(state, x, dims, True, 1 / n)
    centred = state.binary(x, middle, Op.SUB)
    squared = total(state, state.unary(centred, Op.SQUARE), dims, keepdim, 1 / max(n - correction, 0.0))
    if not keepdim:
        middle = Sym(middle.node, tuple(d for i, d in enumerate(middle.dims) if i not in dims), middle.base)
    return squared, middle, centred


@handles("var", "std", "var_mean", "std_mean")
def variance(
    state: Lowering, x: Sym, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: float | None = None,
) -> Any:  # fmt: skip
    dims = _dims(x, dim)
    if correction is None:
        correction = 0.0 if unbiased is False else 1.0
    if not over_cells(x, dims) and _count(x, dims) <= correction:
        raise state.fail("the variance of a single channel is not defined")
    var, middle, _ = moments(state, x, dims, keepdim, correction)
    result = state.unary(var, Op.SQRT) if "std" in state.operation else var
    return [result, middle] if "mean" in state.operation else result


@handles("linalg_vector_norm", "norm")
def vector_norm(
    state: Lowering, x: Sym, order: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Sym:
    dims = _dims(x, dim)
    if order == 1:
        return total(state, state.unary(x, Op.ABS), dims, keepdim)
    if order not in (2, None):
        raise state.fail(f"the norm of order {order} is not supported")
    return state.unary(total(state, state.unary(x, Op.SQUARE), dims, keepdim), Op.SQRT)


@handles("native_layer_norm")
def layer_norm(
    state: Lowering, x: Sym, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> list[Sym | None]:
    dims = list(range(len(x.dims) - len(shape), len(x.dims)))
    if over_cells(x, dims):
        return [_global(state, x), None, None]
    var, _, centred = moments(state, x, dims, True, 0.0)
    scale = state.unary(state.unary(state.unary(var, Op.AFFINE, 1.0, eps), Op.SQRT), Op.RECIPROCAL)
    y = state.binary(centred, scale, Op.MUL)
    y = y if weight is None else state.binary(y, weight, Op.MUL)
    return [y if bias is None else state.binary(y, bias, Op.ADD), None, None]


@handles("_fused_rms_norm")
def rms_norm(
    state: Lowering, x: Sym, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> list[Sym | None]:
    dims = list(range(len(x.dims) - len(shape), len(x.dims)))
    if over_cells(x, dims):
        return [_global(state, x), None]
    if eps is None:
        assert state.call is not None
        eps = max(torch.finfo(r.dtype).eps for r in state.call.results[:1] if r is not None)
    squared = total(state, state.unary(x, Op.SQUARE), dims, True, 1 / _count(x, dims))
    scale = state.unary(state.unary(state.unary(squared, Op.AFFINE, 1.0, eps), Op.SQRT), Op.RECIPROCAL)
    y = state.binary(x, scale, Op.MUL)
    return [y if weight is None else state.binary(y, weight, Op.MUL), None]


def _global(state: Lowering, x: Sym) -> Sym:
    return state.finished(x, GlobalNode, state.ref(x))


@handles("flip")
def flip(state: Lowering, x: Sym, dims: Sequence[int]) -> Any:
    if over_cells(x, [dim_of(x, d) for d in dims]):
        return _global(state, x)
    for dim in dims:
        x = index_select(state, x, dim, torch.arange(x.shape[dim]).flip(0))
    return x


@handles("native_group_norm", "cumsum")
def over_the_map(state: Lowering, x: Sym, *_: Any, **__: Any) -> Any:
    """Keeps the shape and looks at every cell."""
    return [_global(state, x), None, None] if "norm" in state.operation else _global(state, x)


@handles("amax", "amin", "max", "min", "argmax", "_adaptive_avg_pool2d", "logsumexp", "prod", "any", "all")
def reduction(state: Lowering, x: Sym, *_: Any, **__: Any) -> Any:
    raise state.fail("this reduction is not supported in what is sampled")
