"""What :func:`genperf.ops.affine_coupling` asks of its arguments."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from genperf.ops._affine_coupling_reference import SCALES, Settings
from genperf.ops.philox_random import FLOATS

FORMS = {"shift_scale": (True, 1.0), "scale_shift": (False, 1.0), "unshift_scale": (True, -1.0)}
LAYOUTS = ("halves", "interleaved")
PARTS = ("first", "second")

#: Of each scale, the numbers that it takes, with their defaults.
_NUMBERS: dict[str, dict[str, float | None]] = {
    "sigmoid": {"offset": 2.0, "eps": 0.0},
    "exp": {},
    "tanh": {"clamp": 2.0, "slope": None},
    "softplus": {"eps": 1e-3, "clamp": 3.0},
    "additive": {},
}


def _one_of(op: str, name: str, value: Any, names: Any) -> None:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(names)}")


def _number(op: str, name: str, value: Any, low: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
        raise ValueError(f"{op}: {name} is {value!r}, expected a number >= {low:g}")
    return float(value)


def _finite(op: str, name: str, value: Any, zero: bool = True) -> float:
    value = _number(op, name, value, -math.inf)
    if not math.isfinite(value) or (value == 0 and not zero):
        raise ValueError(f"{op}: {name} is {value!r}, expected a finite number{'' if zero else ', not 0'}")
    return value


def check_options(
    op: str,
    scale: Any,
    form: Any,
    layout: Any,
    shift_first: Any,
    transformed: Any,
    volume_preserving: Any,
    inverse: Any,
    prefactor: Any,
    numbers: tuple[tuple[str, Any], ...],
) -> Settings:
    """The settings for as yet unknown channels."""
    for name, value, names in (
        ("scale", scale, SCALES),
        ("form", form, FORMS),
        ("layout", layout, LAYOUTS),
        ("transformed", transformed, PARTS),
    ):
        _one_of(op, name, value, names)
    for name, value in (
        ("shift_first", shift_first),
        ("volume_preserving", volume_preserving),
        ("inverse", inverse),
    ):
        if type(value) is not bool:
            raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a bool")
    taken: dict[str, Any] = dict(_NUMBERS[scale])
    for name, value in numbers:
        if value is None:
            continue
        if name not in taken:
            takers = [k for k, names in _NUMBERS.items() if name in names]
            raise ValueError(
                f"{op}: {name} is {value!r} for scale {scale!r}, expected None (it is of {', '.join(takers)})"
            )
        taken[name] = value
    offset = _finite(op, "offset", taken.get("offset", 0.0))
    eps = _number(op, "eps", taken.get("eps", 0.0), 0.0)
    clamp = _number(op, "clamp", taken.get("clamp", 1.0), 0.0)
    if clamp == 0 or (scale == "tanh" and clamp == math.inf) or eps == math.inf:
        raise ValueError(f"{op}: clamp is {clamp:g} and eps {eps:g}, expected a positive and a finite number")
    slope = taken.get("slope")
    slope = 1 / clamp if slope is None else _finite(op, "slope", slope, zero=False)
    if volume_preserving and scale == "additive":
        raise ValueError(
            f"{op}: volume_preserving is True for scale 'additive', expected False: it always is"
        )
    pre, sign = FORMS[form]
    settings = Settings(
        SCALES[scale], pre, sign, False, _finite(op, "prefactor", prefactor, zero=False), offset, eps, clamp,
        slope, volume_preserving, layout == "interleaved", shift_first, int(transformed == "second"), 0,
    )  # fmt: skip
    return settings.inverted() if inverse else settings


checked_options = functools.lru_cache(maxsize=256, typed=True)(check_options)


def check_tensors(op: str, named: dict[str, Any], like: str) -> None:
    """Float tensors, on one device; float64 with nothing else."""
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a tensor")
        if x.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} is {x.dtype}, expected one of {FLOATS}")
        first = named[like]
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(
                f"{op}: {name} is {x.dtype} and {like} {first.dtype}: float64 goes with float64 only"
            )
        if x.device != first.device:
            raise ValueError(f"{op}: {name} is on {x.device}, expected {first.device}, as {like}")


def check_channels(op: str, name: str, x: Tensor, h: Tensor, split: Any, settings: Settings) -> Settings:
    """The settings with the channels; ``x`` and ``h`` have theirs in dimension 1."""
    channels, parts = x.shape[1], 1 if settings.kind == SCALES["additive"] else 2
    if split is None:
        if channels % 2:
            raise ValueError(
                f"{op}: {name} has {channels} channels, expected an even number to halve, since split is None"
            )
        split = channels // 2
    elif isinstance(split, bool) or not isinstance(split, int) or not 0 <= split <= channels:
        raise ValueError(f"{op}: split is {split!r}, expected an integer from 0 to {channels}")
    count = channels - split if settings.start else split
    if h.shape != (x.shape[0], parts * count, *x.shape[2:]):
        raise ValueError(
            f"{op}: h has shape {tuple(h.shape)}, expected {(x.shape[0], parts * count, *x.shape[2:])} with "
            f"channels in dimension 1: {parts} for each of the {count} transformed channels of {name}, "
            f"{tuple(x.shape)}"
        )
    return settings._replace(start=split if settings.start else 0, n=count)


def check_dim(op: str, x: Tensor, h: Tensor, name: str, channel_dim: Any) -> int:
    if x.dim() < 2 or h.dim() != x.dim():
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)} and h {tuple(h.shape)}, expected a batch dimension, a "
            "channel dimension and the same number of others"
        )
    if (
        isinstance(channel_dim, bool)
        or not isinstance(channel_dim, int)
        or not -x.dim() <= channel_dim < x.dim()
    ):
        raise ValueError(
            f"{op}: channel_dim is {channel_dim!r}, expected a dimension of {name}, {tuple(x.shape)}"
        )
    if channel_dim % x.dim() == 0:
        raise ValueError(f"{op}: channel_dim is {channel_dim}, expected another than that of the batch")
    return channel_dim % x.dim()


def check_h_scale(op: str, h_scale: Any, h: Tensor) -> Tensor | None:
    """[C], which may come as [1, C, 1, 1]."""
    if h_scale is None:
        return None
    check_tensors(op, {"h": h, "h_scale": h_scale}, "h")
    if h_scale.numel() != h.shape[1] or (h_scale.dim() and max(h_scale.shape) != h_scale.numel()):
        raise ValueError(
            f"{op}: h_scale has shape {tuple(h_scale.shape)}, expected {(h.shape[1],)}, one a channel of h"
        )
    return h_scale.reshape(-1)


def check_mask(op: str, mask: Any, lengths: Any, x: Tensor, name: str) -> Tensor | None:
    """bool [B, *spatial]."""
    shape = (x.shape[0], *x.shape[2:])
    if lengths is not None:
        if mask is not None:
            raise ValueError(f"{op}: mask and lengths were given, expected one of them at most")
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
            got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"{op}: lengths is {got}, expected an int64 or int32 tensor")
        if x.dim() != 3 or lengths.shape != x.shape[:1] or lengths.device != x.device:
            raise ValueError(
                f"{op}: lengths has shape {tuple(lengths.shape)} on {lengths.device} for {name} of shape "
                f"{tuple(x.shape)} on {x.device}, expected [B] for [B, C, T] there"
            )
        return torch.arange(x.shape[2], device=x.device) < lengths[:, None]
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask is {got}, expected a bool tensor")
    if mask.dim() == x.dim() and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    if mask.shape != shape or mask.device != x.device:
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)} on {mask.device}, expected {shape}, the batch and the "
            f"positions of {name}, on {x.device}"
        )
    return mask
