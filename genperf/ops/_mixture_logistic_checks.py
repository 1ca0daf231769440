"""What the ops of discretized logistics ask of their arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf.ops._mixture_logistic_reference import Definition
from genperf.ops.philox_random import FLOATS

REDUCTIONS = ("none", "sample", "sum", "sample_mean")
CONVENTIONS = ("default", "openai", "vdvae", "nvae")
MAX_MIXTURES = 1 << 16
_LOG_SCALES = (-30.0, 30.0)


def check_number(op: str, name: str, value: Any, low: float, high: float, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a number")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} is {value}, expected {expected}")
    return float(value)


def check_integer(op: str, name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected an integer")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} is {value}, expected {low} to {high}")
    return value


def check_one_of(op: str, name: str, value: Any, among: Sequence[str]) -> None:
    if value not in among:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(among)}")


def check_min_log_scale(op: str, value: Any) -> float:
    return check_number(op, "min_log_scale", value, *_LOG_SCALES, "-30 to 30")


@functools.lru_cache(maxsize=256)
def checked_settings(
    op: str,
    mixtures: int,
    logits: bool,
    levels: int,
    convention: str,
    edge: float | tuple[float, float] | None,
    min_log_scale: float,
    reduction: str,
) -> tuple[Any, ...]:
    """The torch op's arguments after the tensors."""
    check_integer(op, "levels", levels, 2, 1 << 16)
    check_one_of(op, "convention", convention, CONVENTIONS)
    check_one_of(op, "reduction", reduction, REDUCTIONS)
    if edge is not None:
        low, high = edge if isinstance(edge, (tuple, list)) and len(edge) == 2 else (-edge, edge)
        if not (isinstance(low, float) and isinstance(high, float) and low < 0 < high):
            raise ValueError(
                f"{op}: edge is {edge!r}, expected a positive number or (low, high) of both signs"
            )
    elif convention == "default":
        high = 1.0 - 1.0 / (levels - 1)
        low = -high
    else:
        low, high = -0.999, 0.99 if convention == "nvae" else 0.999
    definition = Definition(
        mixtures, logits, levels, low, high, convention == "default", convention == "nvae",
        check_min_log_scale(op, min_log_scale),
    )  # fmt: skip
    return (*definition, 1 if reduction == "sample_mean" else REDUCTIONS.index(reduction))


def check_tensor(op: str, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected one of {FLOATS}")


def check_channel_dim(op: str, channel_dim: Any) -> None:
    if channel_dim not in (1, -1) or isinstance(channel_dim, bool):
        raise ValueError(f"{op}: channel_dim is {channel_dim!r}, expected 1 or -1")


def channels_first(op: str, name: str, tensor: Any, channel_dim: int) -> Tensor:
    """[B, channels, *], a view."""
    check_tensor(op, name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected [B, channels, *]")
    return tensor if channel_dim == 1 else tensor.movedim(-1, 1)


def check_channels(op: str, channels: Any) -> None:
    if channels not in (1, 3):
        raise ValueError(f"{op}: image_channels is {channels}, expected 1 (grey) or 3 (RGB)")


def check_mixtures(op: str, params: Tensor, channels: int, mixtures: int | None) -> int:
    """K, of P = 3 K parameters for grey and 10 K for RGB."""
    check_channels(op, channels)
    each, n_params = 3 if channels == 1 else 10, params.shape[1]
    if mixtures is None:
        if n_params == 0 or n_params % each:
            raise ValueError(
                f"{op}: params has {n_params} channels, expected a multiple of {each} for an image of "
                f"{channels} channels"
            )
        mixtures = n_params // each
    check_integer(op, "mixtures", mixtures, 1, MAX_MIXTURES)
    if n_params != each * mixtures:
        raise ValueError(
            f"{op}: params has {n_params} channels, expected {each * mixtures} for {mixtures} mixtures and "
            f"an image of {channels} channels"
        )
    return mixtures


def check_values(op: str, x: Tensor, params: Tensor, check: bool, unit: bool) -> None:
    if x.device != params.device:
        raise ValueError(f"{op}: x is on {x.device}, expected {params.device}, as params")
    if x.shape[0] != params.shape[0] or x.shape[2:] != params.shape[2:]:
        raise ValueError(
            f"{op}: x has batch {x.shape[0]} and space {tuple(x.shape[2:])}, expected {params.shape[0]} "
            f"and {tuple(params.shape[2:])}, as params"
        )
    if check and x.numel():
        low = 0.0 if unit else -1.0
        least, most = torch.aminmax(x)
        if not (least >= low and most <= 1.0):  # NaN among them
            raise ValueError(
                f"{op}: x has values {least.item()} to {most.item()}, expected {low:g} to 1 and no NaN"
            )


def scaled(nll: Tensor, reduction: str, x: Tensor) -> Tensor:
    """Sums by sample over the number of values in one."""
    return nll / max(1, math.prod(x.shape[1:])) if reduction == "sample_mean" else nll
