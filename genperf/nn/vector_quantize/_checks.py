"""What the modules accept; errors name the argument, what it was and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_sizes(sizes: Mapping[str, Any]) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


def check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r}, expected a number")
        if not math.isfinite(value) or value < 0 or (name == "decay" and value > 1):
            raise ValueError(
                f"{name} is {value}, expected a number {'of 0 to 1' if name == 'decay' else '>= 0'}"
            )


def check_options(learnable: bool, ema: bool, cosine: bool, images: bool, volumes: bool) -> None:
    if learnable and ema:
        raise ValueError("ema_update is True with learnable_codebook=True, expected one of them")
    if learnable and cosine:
        raise ValueError("learnable_codebook is True with use_cosine_sim=True, expected one of them")
    if images and volumes:
        raise ValueError("accept_image_fmap is True with accept_3d_fmap=True, expected one of them")


def check_stages(
    sizes: tuple[int, ...], n_stages: int, shared: bool, cutoff: int, options: Mapping[str, Any]
) -> None:
    if len(sizes) != n_stages:
        raise ValueError(f"codebook_size is {sizes}, expected one for each of {n_stages} quantizers")
    if shared and len(set(sizes)) > 1:
        raise ValueError(f"codebook_size is {sizes} with shared_codebook=True, expected equal numbers")
    if isinstance(cutoff, bool) or not isinstance(cutoff, int):
        raise TypeError(f"quantize_dropout_cutoff_index is {cutoff!r}, expected an integer")
    if not 0 <= cutoff < n_stages:
        raise ValueError(f"quantize_dropout_cutoff_index is {cutoff}, expected 0 to {n_stages - 1}")
    for name in ("heads", "codebook_dim", "channel_last"):
        if name in options:
            raise ValueError(f"{name} is {options[name]!r}, expected nothing: residual stages do not take it")


def check_input(x: Tensor, dim: int, channel: int, name: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: x is {x.dtype}, expected a floating dtype")
    if x.dim() < 2:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected at least 2 dimensions")
    if x.shape[channel] != dim:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, expected {dim} channels in dimension {channel}"
        )


def checked_mask(x: Tensor, mask: Any, lens: Any, channel: int, name: str) -> Tensor | None:
    """The mask of padding, from either argument."""
    shape = x.shape[:channel] + x.shape[channel + 1 :]
    if mask is not None and lens is not None:
        raise ValueError(f"{name}: mask and lens are both given, expected one of them")
    if lens is not None:
        if not isinstance(lens, Tensor) or lens.is_floating_point() or lens.dtype == torch.bool:
            raise TypeError(f"{name}: lens is {_kind(lens)}, expected a tensor of integers")
        if len(shape) != 2 or lens.shape != shape[:1]:
            raise ValueError(
                f"{name}: lens has shape {tuple(lens.shape)} for x of shape {tuple(x.shape)}, expected "
                "one length for each of a batch of sequences"
            )
        return torch.arange(shape[1], device=x.device) < lens.to(x.device)[:, None]
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask is {_kind(mask)}, expected a bool tensor")
    if mask.shape != shape:
        raise ValueError(
            f"{name}: mask has shape {tuple(mask.shape)}, expected {tuple(shape)} for x of shape "
            f"{tuple(x.shape)}"
        )
    return mask


def check_targets(indices: Any, x: Tensor, channel: int, heads: int) -> None:
    if indices is None:
        return
    if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
        raise TypeError(f"VectorQuantize: indices is {_kind(indices)}, expected a tensor of integers")
    shape = x.shape[:channel] + x.shape[channel + 1 :] + ((heads,) if heads > 1 else ())
    if indices.shape != shape:
        raise ValueError(
            f"VectorQuantize: indices has shape {tuple(indices.shape)}, expected {tuple(shape)} for x of "
            f"shape {tuple(x.shape)}"
        )


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
