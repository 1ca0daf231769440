"""What :func:`genperf.ops.invertible_conv1x1` asks of its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf.ops._invertible_conv1x1_reference import PLU
from genperf.ops.philox_random import FLOATS


class Checked(NamedTuple):
    """Arguments in the form of the torch op."""

    x: Tensor  # [B, C, *]
    weight: Tensor | PLU  # [C, C]
    shift: Tensor | None  # [C]
    scale: Tensor | None  # [C]
    log: bool
    lengths: Tensor | None


def check(
    op: str,
    name: str,
    x: Any,
    weight: Any,
    shift: Any,
    scale: Any,
    log_scale: Any,
    lengths: Any,
    channel_dim: Any,
) -> Checked:
    """``name`` is what the caller calls ``x``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is {x.dtype}, expected one of {FLOATS}")
    if not isinstance(channel_dim, int) or isinstance(channel_dim, bool):
        raise TypeError(f"{op}: channel_dim is {type(channel_dim).__name__}, expected an integer")
    if x.dim() < 2 or not -x.dim() < channel_dim < x.dim() or channel_dim == 0:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)} and channel_dim is {channel_dim}, expected [B, C, *] "
            "or [B, *, C] and a dimension of it that is not the first"
        )
    if channel_dim not in (1, 1 - x.dim()):
        x = x.movedim(channel_dim, 1)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(weight, tuple):
        matrix: Tensor | PLU = _check_plu(op, weight, x, dtype)
    else:
        _check_tensor(op, "weight", weight, x, dtype)
        channels = x.shape[1]
        if weight.shape[:2] != (channels, channels) or weight.shape[2:].numel() != 1:
            raise ValueError(
                f"{op}: weight has shape {tuple(weight.shape)}, expected ({channels}, {channels}), and 1 in "
                f"any further dimension, for {channels} channels"
            )
        matrix = weight.view(channels, channels) if weight.dim() > 2 else weight
    if scale is not None and log_scale is not None:
        raise ValueError(f"{op}: scale and log_scale are given, expected one of them")
    shift = _check_channels(op, "shift", shift, x, dtype)
    log = log_scale is not None
    factor = _check_channels(op, "log_scale" if log else "scale", log_scale if log else scale, x, dtype)
    if lengths is not None:
        _check_lengths(op, name, lengths, x)
    return Checked(x, matrix, shift, factor, log, lengths)


def _check_tensor(op: str, name: str, tensor: Any, x: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}, expected a tensor")
    if tensor.dtype != dtype:
        raise TypeError(
            f"{op}: {name} is {tensor.dtype}, expected {dtype} for inputs of {x.dtype}: a flow is invertible "
            "only as far as its parameters are exact"
        )
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {x.device}")


def _check_channels(op: str, name: str, tensor: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A number for each channel, [C] or [1, C, 1, ...], as [C]."""
    if tensor is None:
        return None
    _check_tensor(op, name, tensor, x, dtype)
    channels = x.shape[1]
    if tensor.numel() != channels or channels not in tensor.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({channels},) or (1, {channels}, 1, ...)"
        )
    return tensor.reshape(-1) if tensor.dim() > 1 else tensor


def _check_plu(op: str, weight: tuple[Any, ...], x: Tensor, dtype: torch.dtype) -> PLU:
    if len(weight) != 5:
        raise TypeError(f"{op}: weight is a tuple of {len(weight)}, expected a tensor or a PLU of 5 tensors")
    plu, channels = PLU(*weight), x.shape[1]
    for name, tensor in plu._asdict().items():
        _check_tensor(op, f"weight.{name}", tensor, x, dtype)
        expected = (channels,) if name.endswith("_s") else (channels, channels)
        if tensor.shape != expected:
            raise ValueError(f"{op}: weight.{name} has shape {tuple(tensor.shape)}, expected {expected}")
    return plu


def _check_lengths(op: str, name: str, lengths: Any, x: Tensor) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{op}: lengths is {got}, expected an int64 tensor")
    if x.dim() != 3:
        raise ValueError(
            f"{op}: lengths are given for {name} of {x.dim() - 2} dimensions, expected sequences"
        )
    if lengths.shape != x.shape[:1] or lengths.device != x.device:
        raise ValueError(
            f"{op}: lengths has shape {tuple(lengths.shape)} on {lengths.device}, expected ({len(x)},) on "
            f"{x.device}"
        )
    # Where a number can be read without waiting, and is one.
    if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_dynamo_compiling():
        low, high = (int(n) for n in lengths.aminmax())
        if low < 0 or high > x.shape[2]:
            raise ValueError(f"{op}: lengths has values from {low} to {high}, expected 0 to {x.shape[2]}")


def check_slogdet(op: str, slogdet: Any, x: Tensor, inverse: bool) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    expected = {"logabsdet": (), "inverse": (x.shape[1],) * 2} if inverse else {"logabsdet": ()}
    for name, shape in expected.items():
        tensor = getattr(slogdet, name, None)
        _check_tensor(op, f"slogdet.{name}", tensor, x, dtype)
        if tensor.shape != shape:  # type: ignore[union-attr]
            raise ValueError(
                f"{op}: slogdet.{name} has shape {tuple(tensor.shape)}, expected {shape}, of one matrix"  # type: ignore[union-attr]
            )
