"""What a random op drew, for its truth: see ``Benchmark.draws``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from ..ops.philox_random import philox_random
from .case import CheckError


def torch_normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """float64: what ``torch.randn`` draws now."""
    return torch.randn(shape, dtype=dtype, device=device).double()


def philox_normal(shape: tuple[int, ...], key: Tensor) -> Tensor:
    """float64: genperf's normals for ``key``, from the reference backend."""
    with _backend.backend("reference"):
        return philox_random(shape, key).double()


def plausible_normal(noise: Tensor) -> Tensor:
    """``noise``, if it could be independent standard normals.

    For providers whose generator has no outside specification (``torch.compile``), or where the test is of
    the generator itself: mean, variance, fourth moment, correlation of neighbours, each within six standard
    errors. Raises CheckError otherwise.
    """
    x = noise.double().flatten()
    n = x.numel()
    moments = {
        "mean": (x.mean(), 0.0, 1.0),
        "variance": (x.square().mean(), 1.0, 2.0),
        "fourth moment": (x.pow(4).mean(), 3.0, 96.0),
        "correlation of neighbours": (x[1:].mul(x[:-1]).mean() if n > 1 else x.new_zeros(()), 0.0, 1.0),
    }
    for name, (value, expected, variance) in moments.items():
        if not abs(value.item() - expected) <= 6 * (variance / n) ** 0.5:
            raise CheckError(f"noise is not standard normal: {name} {value:.4f}, expected {expected:g}")
    return noise.double()
