"""Values replaced where a constant mask holds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genperf.sampling._aten.registry import handles
from genperf.sampling._ir import FAR, Window
from genperf.sampling._layout import Sym
from genperf.sampling._lower import Lowering, is_number
from genperf.sampling._program import Op


@handles("masked_fill", deferred=True)
def masked_fill(state: Lowering, x: Any, mask: Any, value: Any) -> Any:
    if not isinstance(mask, Tensor) or not isinstance(x, Sym) or isinstance(value, Sym):
        raise state.fail("fills by a mask, or with a value, that depends on the sampled pixels")
    if x.deferred:
        return x.masked(state, mask, float(value))
    return filled(state, x, mask.bool(), float(value))


@handles("where", deferred=True)
def where(state: Lowering, mask: Any, a: Any, b: Any) -> Any:
    if not isinstance(mask, Tensor):
        raise state.fail("chooses by a mask that depends on the sampled pixels")
    mask = mask.bool()
    for x, other, out in ((a, b, ~mask), (b, a, mask)):
        if isinstance(x, Sym) and x.deferred:
            if not is_number(other) and not (isinstance(other, Tensor) and other.numel() == 1):
                raise state.fail("chooses between attention scores and something else than a number")
            return x.masked(state, out, float(other))
    kept = [filled(state, x, out, 0.0) for x, out in ((a, ~mask), (b, mask)) if isinstance(x, Sym)]
    if len(kept) == 2:
        return state.binary(kept[0], kept[1], Op.ADD)
    other, inside = (b, ~mask) if isinstance(a, Sym) else (a, mask)
    if is_number(other):
        x, out = (a, ~mask) if isinstance(a, Sym) else (b, mask)
        return filled(state, x, out, float(other))
    return state.binary(kept[0], torch.where(inside, other, 0), Op.ADD)


def filled(state: Lowering, x: Sym, mask: Tensor, value: float) -> Any:
    """``x`` with a constant where ``mask`` holds; what is there in ``x``, infinite too, does not count."""
    keep = ~mask
    if not bool(mask.any()):
        return x if mask.dim() <= len(x.dims) else state.binary(x, torch.zeros(mask.shape), Op.ADD)
    if value == 0 and keep.dim() <= len(x.dims):
        window = _kept_window(x, keep)
        if window is not None:
            return replace(x, window=x.own_window.then(window))
    zeros = torch.zeros(keep.shape, dtype=state.dtype)
    low = zeros.masked_fill(keep, -math.inf).masked_fill(mask, value)
    high = zeros.masked_fill(keep, math.inf).masked_fill(mask, value)
    return state.binary(state.binary(x, high, Op.MINIMUM), low, Op.MAXIMUM)


def _kept_window(x: Sym, keep: Tensor) -> Window | None:
    """The window that reads 0 where ``keep`` does not hold, if that is outside of some rows and columns."""
    bounds = {"Y": (0, FAR), "X": (0, FAR)}
    box = torch.ones((), dtype=torch.bool)
    for i, dim in enumerate(x.dims[len(x.dims) - keep.dim() :]):
        if keep.shape[i] == 1:
            continue
        others = [d for d in range(keep.dim()) if d != i]
        along = keep.any(dim=others) if others else keep
        if [a.kind for a in dim] in (["Y"], ["X"]):
            at = torch.nonzero(along).flatten().tolist()
            if not at:
                return None
            bounds[dim[0].kind] = (at[0], at[-1] + 1)
            inside = torch.zeros_like(along)
            inside[at[0] : at[-1] + 1] = True
        elif bool(along.all()):
            inside = along
        else:
            return None
        box = box & inside.view([-1 if d == i else 1 for d in range(keep.dim())])
    if not bool((box.expand(keep.shape) == keep).all()):
        return None
    return Window(0, 0, *bounds["Y"], *bounds["X"])
