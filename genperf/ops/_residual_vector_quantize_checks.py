"""What the arguments of residual vector quantization must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf.ops.philox_random import FLOATS
from genperf.ops.vq_nearest import METRICS

Codebooks = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]
NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def refuses(x: Tensor, codebooks: Sequence[Tensor], *_: Any) -> str | None:
    """Why the native kernels cannot run."""
    if x.dtype not in NATIVE_DTYPES:
        return f"{x.dtype} is left to the reference"
    if x.dim() > 8:
        return f"{x.dim()} dimensions, at most 8"
    most = max(codebook.shape[0] for codebook in codebooks)
    return None if most < 2**31 else f"{most} codewords, below 2^31"


def refuses_triton(x: Tensor, codebooks: Sequence[Tensor], *_: Any) -> str | None:
    if len({codebook.shape[0] for codebook in codebooks}) > 1:
        return "codebooks of different sizes are left to the reference"
    return refuses(x.reshape(-1), codebooks)  # of any number of dimensions


def unpacked(op: str, codebooks: Any) -> tuple[list[Tensor], int | None]:
    """The codebooks [K, D] of all stages, group by group, and the number of groups, if there are any."""
    if isinstance(codebooks, Tensor):
        if codebooks.dim() not in (3, 4) or 0 in codebooks.shape:
            raise ValueError(
                f"{op}: codebooks has shape {tuple(codebooks.shape)}, expected [stages, K, D] or "
                "[groups, stages, K, D], with none of them 0"
            )
        if codebooks.dim() == 3:
            return list(codebooks.unbind(0)), None
        return list(codebooks.flatten(0, 1).unbind(0)), len(codebooks)
    if not isinstance(codebooks, Sequence) or isinstance(codebooks, str):
        raise TypeError(
            f"{op}: codebooks is {type(codebooks).__name__}, expected a tensor or a sequence of tensors"
        )
    if not codebooks:
        raise ValueError(f"{op}: codebooks is empty, expected at least one stage")
    groups = None if isinstance(codebooks[0], Tensor) else len(codebooks)
    parts: Any = [codebooks] if groups is None else codebooks
    books: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor) or not isinstance(part, Sequence) or len(part) != len(parts[0]):
            raise ValueError(
                f"{op}: codebooks has groups of different numbers of stages, expected one number"
            )
        books += part
    if not books:
        raise ValueError(f"{op}: codebooks is empty, expected at least one stage")
    for i, book in enumerate(books):
        if isinstance(book, Tensor) and book.dim() == 2 and book.numel() > 0:
            continue
        if not isinstance(book, Tensor):
            raise TypeError(f"{op}: codebook {i} is {type(book).__name__}, expected a tensor")
        raise ValueError(f"{op}: codebook {i} has shape {tuple(book.shape)}, expected [K, D], with neither 0")
    return books, groups


def check_vectors(op: str, x: Any, codebooks: Any, dim: Any) -> tuple[list[Tensor], int | None]:
    """x and the codebooks; returns what ``unpacked`` does."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is {type(x).__name__}, expected a tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}, expected one of {FLOATS}")
    books, groups = unpacked(op, codebooks)
    dtype, device = x.dtype, x.device
    for i, book in enumerate(books):
        if book.dtype == dtype and book.device == device:
            continue
        if book.dtype != dtype:
            raise TypeError(f"{op}: codebook {i} is {book.dtype}, expected {x.dtype}, as x")
        raise ValueError(f"{op}: codebook {i} is on {book.device}, expected {x.device}, as x")
    if type(dim) is not int:
        raise TypeError(f"{op}: dim is {type(dim).__name__}, expected an integer")
    if not -x.dim() <= dim < x.dim() or (groups is not None and dim % x.dim() == 0):
        raise ValueError(
            f"{op}: dim is {dim} for x of shape {tuple(x.shape)}, expected a dimension of it"
            + " after that of the groups" * (groups is not None)
        )
    size = x.shape[dim]
    for i, book in enumerate(books):
        if book.shape[1] != size:
            raise ValueError(
                f"{op}: codebook {i} has shape {tuple(book.shape)}, expected [K, {x.shape[dim]}], as x, of "
                f"shape {tuple(x.shape)}, has in dimension {dim}"
            )
    if groups is not None and len(x) != groups:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, expected {groups} groups in dimension 0, as codebooks"
        )
    return books, groups


def _check_limits(op: str, x: Tensor, shape: torch.Size, n_stages: Any, mask: Any, most: int) -> None:
    if isinstance(n_stages, Tensor):
        if n_stages.dtype not in _INTEGERS:
            raise TypeError(f"{op}: n_stages is {n_stages.dtype}, expected integers")
        if n_stages.device != x.device:
            raise ValueError(f"{op}: n_stages is on {n_stages.device}, expected {x.device}, as x")
        if n_stages.shape != shape[: n_stages.dim()]:
            raise ValueError(
                f"{op}: n_stages has shape {tuple(n_stages.shape)}, expected the leading dimensions of "
                f"{tuple(shape)}"
            )
    elif n_stages is not None:
        if type(n_stages) is not int:
            raise TypeError(f"{op}: n_stages is {type(n_stages).__name__}, expected an integer or a tensor")
        if not 0 <= n_stages <= most:
            raise ValueError(f"{op}: n_stages is {n_stages}, expected 0 to {most}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask is {what}, expected a tensor of bool")
    if mask.device != x.device:
        raise ValueError(f"{op}: mask is on {mask.device}, expected {x.device}, as x")
    if mask.shape != shape:
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}, expected {tuple(shape)}")


def check(
    x: Any, codebooks: Any, metric: Any, dim: Any, n_stages: Any, mask: Any, estimator: Any,
    estimator_of: Any, residual_gradient: Any, commitment_weight: Any, codebook_weight: Any,
) -> tuple[list[Tensor], int | None]:  # fmt: skip
    op = "residual_vector_quantize"
    books, groups = check_vectors(op, x, codebooks, dim)
    if n_stages is not None or mask is not None:
        sizes = list(x.shape)
        del sizes[dim]
        shape = torch.Size(sizes if groups is None else sizes[1:])
        _check_limits(op, x, shape, n_stages, mask, len(books) // (groups or 1))
    names = (
        ("metric", metric, METRICS),
        ("estimator", estimator, ("straight_through", "rotation")),
        ("estimator_of", estimator_of, ("stages", "sum")),
    )
    for name, value, known in names:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(known)}")
    if not isinstance(residual_gradient, (int, float)) or not 0 <= residual_gradient <= 1:
        raise ValueError(f"{op}: residual_gradient is {residual_gradient!r}, expected a number from 0 to 1")
    if residual_gradient and estimator_of == "sum":
        raise ValueError(
            f"{op}: residual_gradient is {residual_gradient!r}, expected 0 with estimator_of='sum'"
        )
    for name, weight in (("commitment_weight", commitment_weight), ("codebook_weight", codebook_weight)):
        if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"{op}: {name} is {weight!r}, expected a finite number >= 0")
    return books, groups
