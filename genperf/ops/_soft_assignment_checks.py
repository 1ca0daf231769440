"""What :func:`genperf.ops.soft_assignment` asks of its arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genperf.ops.vq_nearest import check_operands

METRICS = {"l2": 0, "cosine": 1, "dot": 2, "euclidean": 3}


def check(x: Any, codebook: Any, metric: Any, temperature: Any, dim: Any, mean_prob: Any) -> None:
    check_operands("soft_assignment", x, codebook, metric, dim, METRICS)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"soft_assignment: temperature is {type(temperature).__name__}, expected a number")
    if not 1e-30 <= temperature < math.inf:
        raise ValueError(f"soft_assignment: temperature is {temperature}, expected a finite number >= 1e-30")
    if type(mean_prob) is not bool:
        raise TypeError(f"soft_assignment: mean_prob is {type(mean_prob).__name__}, expected a bool")


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
