"""What :func:`genperf.ops.soft_assignment` asks of its arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genperf.ops.philox_random import FLOATS

METRICS = {"l2": 0, "cosine": 1, "dot": 2, "euclidean": 3}


def check(x: Any, codebook: Any, metric: Any, temperature: Any, dim: Any, mean_prob: Any) -> None:
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"soft_assignment: {name} is {type(tensor).__name__}, expected a tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"soft_assignment: x is {x.dtype}, expected one of {FLOATS}")
    if codebook.dtype != x.dtype:
        raise TypeError(f"soft_assignment: codebook is {codebook.dtype}, expected {x.dtype}, as x")
    if codebook.device != x.device:
        raise ValueError(f"soft_assignment: codebook is on {codebook.device}, expected {x.device}, as x")
    if not isinstance(metric, str) or metric not in METRICS:
        raise ValueError(f"soft_assignment: metric is {metric!r}, expected one of {', '.join(METRICS)}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"soft_assignment: temperature is {type(temperature).__name__}, expected a number")
    if not 1e-30 <= temperature < math.inf:
        raise ValueError(f"soft_assignment: temperature is {temperature}, expected a finite number >= 1e-30")
    if type(mean_prob) is not bool:
        raise TypeError(f"soft_assignment: mean_prob is {type(mean_prob).__name__}, expected a bool")
    _check_shapes(x, codebook, dim)


def _check_shapes(x: Tensor, codebook: Tensor, dim: Any) -> None:
    if codebook.dim() not in (2, 3) or codebook.numel() == 0:
        raise ValueError(
            f"soft_assignment: codebook has shape {tuple(codebook.shape)}, expected [K, D] or [heads, K, D], "
            "each at least 1"
        )
    heads = codebook.dim() - 2
    if type(dim) is not int:
        raise TypeError(f"soft_assignment: dim is {type(dim).__name__}, expected an integer")
    if not -x.dim() <= dim < x.dim() or (heads and dim % x.dim() == 0):
        raise ValueError(
            f"soft_assignment: dim is {dim} for x of shape {tuple(x.shape)}, expected a dimension of it"
            + " after that of the heads" * heads
        )
    if x.shape[dim] != codebook.shape[-1]:
        raise ValueError(
            f"soft_assignment: x has shape {tuple(x.shape)}, expected {codebook.shape[-1]} in dimension "
            f"{dim}, as the codebook, {tuple(codebook.shape)}"
        )
    if heads and len(x) != len(codebook):
        raise ValueError(
            f"soft_assignment: x has shape {tuple(x.shape)}, expected {len(codebook)} heads in dimension 0, "
            f"as the codebook, {tuple(codebook.shape)}"
        )


def check_targets(targets: Any, vectors: Tensor, n_codewords: int) -> Tensor:
    """The targets, contiguous."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"soft_assignment: targets is {got}, expected an int64 tensor")
    if targets.shape != vectors.shape[:-1] or targets.device != vectors.device:
        raise ValueError(
            f"soft_assignment: targets has shape {tuple(targets.shape)} on {targets.device}, expected "
            f"{tuple(vectors.shape[:-1])} on {vectors.device}"
        )
    # Where a number can be read without waiting, and is one.
    if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_dynamo_compiling():
        low, high = (int(y) for y in targets.aminmax())
        if low < -1 or high >= n_codewords:
            raise ValueError(
                f"soft_assignment: targets has values from {low} to {high}, expected 0 to {n_codewords - 1}, "
                "or -1 for none"
            )
    return targets.contiguous()
