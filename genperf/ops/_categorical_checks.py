"""What the ops of categorical distributions ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genperf.ops._mixture_logistic_checks import check_integer, check_number, check_tensor
from genperf.ops._noise import check_noise

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_CLASSES = 2**31 - 32
#: temperature, top_k and top_p, as the torch ops take them.
Settings = tuple[float, int, float]


def check_logits(op: str, logits: Any, dim: Any) -> Tensor:
    """[*, K], a view."""
    check_tensor(op, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{op}: logits has shape (), expected at least one dimension")
    dim = check_integer(op, "dim", dim, -logits.dim(), logits.dim() - 1)
    if logits.shape[dim] == 0:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}, expected a class in dimension {dim}")
    return logits if dim in (-1, logits.dim() - 1) else logits.movedim(dim, -1)


def check_settings(op: str, temperature: Any, top_k: Any, top_p: Any) -> Settings:
    return (
        check_number(op, "temperature", temperature, 1e-6, 1e6, "1e-6 to 1e6"),
        check_integer(op, "top_k", top_k, 0, 2**62),
        check_number(op, "top_p", top_p, 1e-30, 1.0, "a positive number of at most 1"),
    )


def check_uniforms(
    op: str, logits: Tensor, noise: Any, key: Any, rng: str, generator: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Uniforms [*] for logits [*, K], or a key."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if isinstance(noise, Tensor) and noise.dtype in (torch.float32, torch.float64):
        dtype = noise.dtype
    like = logits.new_empty(logits.shape[:-1], dtype=dtype)
    return check_noise(op, "logits", like, noise, key, rng, generator, torch.rand)


def refuses_triton(logits: Tensor, top_k: int, top_p: float) -> str | None:
    from genperf.kernels._categorical_rows import refuses as refuses_rows

    if logits.dtype not in _NATIVE_DTYPES:
        return f"{logits.dtype} is left to the reference"
    return refuses_rows(logits, top_k, top_p)


def refuses(logits: Tensor, *_: Any) -> str | None:
    if logits.dtype not in _NATIVE_DTYPES:
        return f"{logits.dtype} is left to the reference"
    if logits.shape[-1] > _MOST_CLASSES:
        return f"{logits.shape[-1]} classes, at most {_MOST_CLASSES}"
    return f"{logits.dim()} dimensions, at most 8" if logits.dim() > 8 else None
