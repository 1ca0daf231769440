"""Classes of a Gaussian given by a mean and a log-scale, both softly clamped: ``Normal`` of NVAE.

The clamps, the standard deviation, the sample and the divergence are one pass of the kernel each time;
``mu`` and ``sigma`` are computed where they are read.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from genperf.accelerate._lazy import Lazy, kept_by
from genperf.accelerate._logistic_probe import Unknown, on_this_device, values_of
from genperf.nn._eager_sample import draw_noise
from genperf.ops.gaussian_sample import gaussian_sample

_SEED = 11
_LOG_SCALE = re.compile(r"log_?(sigma|scale|std)\w*", re.IGNORECASE)
_METHODS = ("__init__", "sample", "kl")


@dataclass(frozen=True)
class Arguments:
    """Of one Gaussian: mean and log-scale before the clamps, and what multiplies the standard deviation."""

    mean: Tensor
    scale: Tensor
    temperature: float


def looks_like_one(value: Any) -> bool:
    if not isinstance(value, type) or issubclass(value, (torch.nn.Module, torch.distributions.Distribution)):
        return False
    is_named = "normal" in value.__name__.lower() or "gauss" in value.__name__.lower()
    own = vars(value)
    if not is_named or not all(isinstance(own.get(n), FunctionType) for n in _METHODS):
        return False
    parameters = list(inspect.signature(value).parameters.values())
    is_scale = len(parameters) in (2, 3) and _LOG_SCALE.fullmatch(parameters[1].name)
    return bool(is_scale) and all(p.default is not p.empty for p in parameters[2:])


@functools.cache
def check(cls: type) -> None:
    """That ``cls`` is such a Gaussian, and that ``sample`` returns the sample twice, as NVAE's does, whose
    noise is overwritten with it.

    Raises:
        Unknown: it is another Gaussian, with the reason.
    """
    generator = torch.Generator().manual_seed(0)
    tempered = len(inspect.signature(cls).parameters) > 2
    for temperature in (1.0, 0.7) if tempered else (1.0,):
        tensors = [2 * torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(4)]
        more = (temperature,) if tempered else ()
        try:
            theirs = _theirs(cls, more, tensors)
        except Unknown:
            raise
        except Exception as error:
            raise Unknown(f"the probe failed with {type(error).__name__}: {error}") from error
        ours = _ours(temperature, tensors)
        names = ("sample", "kl", *["gradient"] * 4)
        for name, a, b in zip(names, theirs, ours, strict=True):
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-8, atol=1e-9):
                raise Unknown(
                    f"its {name} is not that of a Gaussian with 5 tanh(x / 5) of its mean and log-scale"
                )


def methods(cls: type, rng: str) -> dict[str, Callable[..., Any]]:
    """The methods that take the place of those of ``cls``.

    Raises:
        Unknown: see :func:`check`.
    """
    check(cls)
    values = values_of(inspect.signature(cls))
    theirs = {name: vars(cls)[name] for name in _METHODS}
    lazy = Lazy(cls, theirs["__init__"])

    @functools.wraps(theirs["sample"])
    def sample(self: Any) -> Any:
        found = kept_by(self)
        if found is None:
            return theirs["sample"](self)
        z = _sample(found, rng)
        return z, z

    @functools.wraps(theirs["kl"])
    def kl(self: Any, other: Any) -> Tensor:
        mine = kept_by(self)
        its = kept_by(other)
        if mine is None or its is None or not _pair(mine, its):
            return theirs["kl"](self, other)
        return _kl(mine, its)

    return {
        **lazy.methods(lambda args, kwargs: _prepared(values(args, kwargs))),
        "sample": sample,
        "kl": kl,
    }


def _prepared(values: list[Any]) -> Arguments | None:
    mean, scale, *more = values
    temperature = more[0] if more else 1.0
    if not (isinstance(mean, Tensor) and isinstance(scale, Tensor)) or mean.shape != scale.shape:
        return None
    if mean.dtype != scale.dtype or mean.device != scale.device or not mean.is_floating_point():
        return None
    if type(temperature) not in (int, float) or not 0 < temperature <= 1e6 or mean.dim() == 0:
        return None
    return Arguments(mean, scale, float(temperature))


def _pair(mine: Arguments, its: Arguments) -> bool:
    same = mine.mean.shape == its.mean.shape and mine.mean.dtype == its.mean.dtype
    return same and mine.mean.device == its.mean.device and its.temperature == 1.0


def _sample(found: Arguments, rng: str) -> Tensor:
    mean, noise = found.mean, None
    if rng == "torch":  # the noise has the layout of the mean
        noise = draw_noise(mean) if mean.is_contiguous() else torch.empty_like(mean).normal_()
    z = gaussian_sample(
        mean, found.scale, parametrization="soft_clamp", temperature=found.temperature, kl=False,
        noise=noise, rng=rng,
    ).z  # fmt: skip
    assert z is not None
    return z


def _kl(mine: Arguments, its: Arguments) -> Tensor:
    divergence = gaussian_sample(
        mine.mean, mine.scale, parametrization="soft_clamp", temperature=mine.temperature,
        prior=(its.mean, its.scale), sample=False, reduction="none",
    ).kl  # fmt: skip
    assert divergence is not None
    return divergence.to(mine.mean.dtype)


def _theirs(cls: Any, more: tuple[float, ...], tensors: list[Tensor]) -> list[Tensor]:
    """What ``sample`` returns, the divergence, and the gradients of both."""
    arguments = [t.clone().requires_grad_() for t in tensors]
    with torch.enable_grad(), on_this_device():
        torch.manual_seed(_SEED)
        q = cls(*arguments[:2], *more)
        z, second = q.sample()
        if second is not z:
            raise Unknown("its sample returns something else than the sample, twice")
        return _with_gradients(z, q.kl(cls(*arguments[2:])), arguments)


def _ours(temperature: float, tensors: list[Tensor]) -> list[Tensor]:
    arguments = [t.clone().requires_grad_() for t in tensors]
    with torch.enable_grad(), on_this_device():
        torch.manual_seed(_SEED)
        q = Arguments(arguments[0], arguments[1], temperature)
        p = Arguments(arguments[2], arguments[3], 1.0)
        return _with_gradients(_sample(q, "torch"), _kl(q, p), arguments)


def _with_gradients(z: Tensor, divergence: Tensor, arguments: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(0.5, 1.5, z.numel()).view_as(z)
    total = (z * weights).sum() + divergence.square().sum()
    return [z, divergence, *torch.autograd.grad(total, arguments)]
