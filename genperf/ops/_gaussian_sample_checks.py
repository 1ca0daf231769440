"""What :func:`genperf.ops.gaussian_sample` asks of its arguments, and the noise that it draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf._torch_normal import torch_normal
from genperf.ops import _noise
from genperf.ops._gaussian_sample_reference import TRANSFORMS
from genperf.ops.philox_random import FLOATS

_DEFAULT_OFFSET = {"softplus": 0.0, "soft_clamp": 1e-2}
_REDUCTIONS = ("none", "sample", "mean")


def check_pair(mean: Any, scale: Any, first: str, second: str) -> tuple[Tensor, Tensor]:
    for name, x in ((first, mean), (second, scale)):
        if not isinstance(x, Tensor):
            raise TypeError(f"gaussian_sample: {name} is {type(x).__name__}, expected a tensor")
        if x.dtype not in FLOATS:
            raise TypeError(f"gaussian_sample: {name} is {x.dtype}, expected one of {FLOATS}")
    if scale.dtype != mean.dtype:
        raise TypeError(f"gaussian_sample: {second} is {scale.dtype}, expected {mean.dtype}, as {first}")
    if scale.device != mean.device:
        raise ValueError(
            f"gaussian_sample: {second} is on {scale.device}, expected {mean.device}, as {first}"
        )
    if scale.shape != mean.shape:
        try:
            mean, scale = torch.broadcast_tensors(mean, scale)
        except RuntimeError:
            raise ValueError(
                f"gaussian_sample: {second} has shape {tuple(scale.shape)}, expected one that broadcasts "
                f"with {first}, {tuple(mean.shape)}"
            ) from None
    return mean, scale


def check_halves(packed: Any, dim: int) -> tuple[Tensor, Tensor]:
    if not isinstance(packed, Tensor):
        raise TypeError(f"gaussian_sample: mean is {type(packed).__name__}, expected a tensor")
    if not -packed.dim() <= dim < packed.dim() or packed.shape[dim] % 2:
        raise ValueError(
            f"gaussian_sample: mean has shape {tuple(packed.shape)}, expected an even size in dimension "
            f"{dim} to halve, since scale is None"
        )
    mean, scale = packed.detach().chunk(2, dim) if packed.shape[dim] else (packed.detach(), packed.detach())
    return check_pair(mean, scale, "mean", "scale")


def check_prior(prior: Any, mean: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(prior, (tuple, list)) or len(prior) != 2:
        raise TypeError(f"gaussian_sample: prior is {type(prior).__name__}, expected a pair (mean, scale)")
    prior_mean, prior_scale = check_pair(prior[0], prior[1], "prior[0]", "prior[1]")
    if prior_mean.dtype != mean.dtype:
        raise TypeError(f"gaussian_sample: prior is {prior_mean.dtype}, expected {mean.dtype}, as mean")
    if prior_mean.device != mean.device:
        raise ValueError(f"gaussian_sample: prior is on {prior_mean.device}, expected {mean.device}, as mean")
    try:
        return prior_mean.expand(mean.shape), prior_scale.expand(mean.shape)
    except RuntimeError:
        raise ValueError(
            f"gaussian_sample: prior has shape {tuple(prior_mean.shape)}, expected one that broadcasts to "
            f"{tuple(mean.shape)}"
        ) from None


def check_settings(
    parametrization: str,
    clamp: tuple[float, float] | None,
    offset: float | None,
    temperature: float,
    reduction: str,
) -> tuple[int, float, float, float, float, bool]:
    """The torch op's transform, low, high, offset, temperature and reduce."""
    if parametrization not in TRANSFORMS:
        raise ValueError(
            f"gaussian_sample: parametrization is {parametrization!r}, "
            f"expected one of {', '.join(TRANSFORMS)}"
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"gaussian_sample: reduction is {reduction!r}, expected one of {', '.join(_REDUCTIONS)}"
        )
    low, high = -math.inf, math.inf
    if clamp is not None:
        if parametrization not in ("logvar", "logsigma"):
            raise ValueError(
                f"gaussian_sample: clamp is {clamp} for parametrization {parametrization!r}, expected None "
                "(only logvar and logsigma are clamped)"
            )
        if not isinstance(clamp, tuple) or len(clamp) != 2 or not clamp[0] <= clamp[1]:
            raise ValueError(f"gaussian_sample: clamp is {clamp}, expected (low, high) with low <= high")
        low, high = map(float, clamp)
    if offset is None:
        offset = _DEFAULT_OFFSET.get(parametrization, 0.0)
    elif parametrization not in _DEFAULT_OFFSET or not 0 <= offset < math.inf:
        raise ValueError(
            f"gaussian_sample: offset is {offset} for parametrization {parametrization!r}, expected a finite "
            f"number >= 0, for {' or '.join(_DEFAULT_OFFSET)} only"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"gaussian_sample: temperature is {temperature}, expected a finite number > 0")
    return TRANSFORMS[parametrization], low, high, float(offset), float(temperature), reduction != "none"


#: The same, remembered.
checked_settings = functools.lru_cache(maxsize=256)(check_settings)


def check_noise(
    mean: Tensor, noise: Any, key: Any, rng: str, generator: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The noise or the key to use, drawn where neither was given."""
    return _noise.check_noise("gaussian_sample", "mean", mean, noise, key, rng, generator, torch_normal)


def torch_noise(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """The noise that eager code would draw with ``torch.randn``: shape, dtype and device of ``like``.

    A list of generators draws one sample each; a CPU generator draws on the CPU for any device.
    """
    return _noise.drawn("gaussian_sample", like, generator, torch_normal)
