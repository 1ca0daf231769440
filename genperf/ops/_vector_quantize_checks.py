"""What :func:`genperf.ops.vector_quantize` refuses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genperf.ops._vector_quantize_reference import REDUCTIONS

ESTIMATORS = ("straight_through", "rotation")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_options(
    estimator: Any, commitment_weight: Any, codebook_weight: Any, reduction: Any, **flags: Any
) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"vector_quantize: estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}"
        )
    for name, weight in (("commitment_weight", commitment_weight), ("codebook_weight", codebook_weight)):
        if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"vector_quantize: {name} is {weight!r}, expected a finite number >= 0")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            f"vector_quantize: reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}"
        )
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise TypeError(f"vector_quantize: {name} is {type(flag).__name__}, expected a bool")


def check_rows(x: Tensor, dim: int, heads: bool, reduction: str, indices: Any, mask: Any) -> None:
    """Of tensors that ``check_operands`` of vq_nearest has passed."""
    dim %= x.dim()
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    for name, tensor, dtypes in (("indices", indices, INTEGERS), ("mask", mask, (torch.bool,))):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"vector_quantize: {name} is {type(tensor).__name__}, expected a tensor")
        if tensor.dtype not in dtypes:
            one_of = f"one of {dtypes}" if len(dtypes) > 1 else f"{dtypes[0]}"
            raise TypeError(f"vector_quantize: {name} is {tensor.dtype}, expected {one_of}")
        if tensor.device != x.device:
            raise ValueError(f"vector_quantize: {name} is on {tensor.device}, expected {x.device}, as x")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"vector_quantize: {name} has shape {tuple(tensor.shape)}, expected {shape}, that of x, "
                f"{tuple(x.shape)}, without dimension {dim}"
            )
    if reduction == "sample" and len(shape) <= heads:
        raise ValueError(
            f"vector_quantize: x has shape {tuple(x.shape)}, expected a dimension of samples before the "
            "vectors for reduction 'sample'"
        )
