"""Modules that construct a diagonal Gaussian posterior: diffusers' AutoencoderKL family, and all others
whose methods call a class of the same structure, such as latent-diffusion's ``DiagonalGaussianDistribution``.

Libraries import that class by name into many modules, so the methods that construct it are rewritten: the
name stands for a class that is both :class:`genperf.nn.DiagonalGaussian` and a subclass of theirs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._rewrite import CannotRewrite, methods_of, rebind, referenced
from genperf.nn import DiagonalGaussian
from genperf.nn._eager_sample import Bounds

_STRUCTURE = ("sample", "mode", "kl", "nll")


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match for each posterior class that methods of ``cls`` construct."""
    for posterior, users in _constructed(cls).items():
        was = f"{cls.__name__}.{', '.join(users)}: {posterior.__name__}"
        clamp, reason = _probe(posterior)
        if reason:
            yield Refusal(was, reason)
            continue
        overridden = sorted(set(users) & set(module.__dict__))
        if overridden:
            yield Refusal(was, f"{', '.join(overridden)} is set on the module itself")
            continue
        replacement = posterior_class(posterior, options.rng, clamp)
        try:
            methods = {name: rebind(function, posterior, replacement) for name, function in users.items()}
        except CannotRewrite as error:
            yield Refusal(was, str(error))
            continue
        yield Match(was, "gaussian_sample", ("diagonal_gaussian", replacement), methods)


@functools.cache
def _constructed(cls: type) -> dict[type, dict[str, FunctionType]]:
    """The posterior classes that methods of ``cls`` refer to, with those methods by name."""
    found: dict[type, dict[str, FunctionType]] = {}
    for name, function in methods_of(cls).items():
        for value in set(filter(_looks_like_posterior, referenced(function).values())):
            found.setdefault(value, {})[name] = function
    return found


def _looks_like_posterior(value: Any) -> bool:
    if not isinstance(value, type) or issubclass(value, (nn.Module, torch.distributions.Distribution)):
        return False
    if issubclass(value, DiagonalGaussian):
        return False
    has_methods = sum(callable(getattr(value, name, None)) for name in _STRUCTURE)
    return has_methods >= 2 and "gaussian" in value.__name__.lower()


@functools.cache
def _probe(posterior: type) -> tuple[Bounds | None, str]:
    """The clamp on the log-variance, or the reason why ``posterior`` is not the standard definition."""
    parameters = list(inspect.signature(posterior).parameters)
    if parameters[:1] != ["parameters"] or len(parameters) > 2:
        return None, f"it is constructed from ({', '.join(parameters)}), not (parameters, deterministic)"
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(2, 6, 5, 7, generator=generator)
    try:
        with torch.random.fork_rng(devices=[]):
            return _compare(posterior, plain)
    except Exception as error:
        return None, f"the probe failed with {type(error).__name__}: {error}"


def _compare(posterior: type, plain: Tensor) -> tuple[Bounds | None, str]:
    extreme = torch.linspace(-1e4, 1e4, plain.numel()).view_as(plain)
    logvar = posterior(extreme).logvar
    low, high = logvar.min().item(), logvar.max().item()
    raw = extreme.chunk(2, dim=1)[1]
    clamp = None if torch.equal(logvar, raw) else (low, high)
    for parameters in (plain, 8 * plain, extreme):
        theirs = posterior(parameters)
        ours = DiagonalGaussian(parameters, clamp=clamp)
        for name in ("mean", "logvar", "std", "var"):
            if not torch.equal(getattr(theirs, name), getattr(ours, name)):
                return None, f"its {name} is not that of a Gaussian given by mean and log-variance"
        torch.manual_seed(1)
        expected = theirs.sample()
        torch.manual_seed(1)
        if not torch.equal(ours.sample(), expected):
            return None, "its sample is not mean + std * randn"
        if not torch.equal(theirs.mode(), ours.mode()):
            return None, "its mode is not the mean"
    theirs, ours = posterior(plain), DiagonalGaussian(plain, clamp=clamp)
    other = plain.flip(0)
    pairs = [
        ("kl", theirs.kl(), ours.kl()),
        ("kl", theirs.kl(posterior(other)), ours.kl(DiagonalGaussian(other, clamp=clamp))),
        ("nll", theirs.nll(ours.mean + 1), ours.nll(ours.mean + 1)),
    ]
    for name, expected, actual in pairs:
        if expected.shape != actual.shape or not torch.allclose(expected, actual, rtol=1e-5, atol=1e-4):
            return None, f"its {name} is another definition"
    return clamp, ""


@functools.cache
def posterior_class(original: type, rng: str, clamp: Bounds | None) -> type:
    """A :class:`DiagonalGaussian` with the given options that is also an ``original``."""
    on_cpu = _draws_on_cpu(original)

    def init(self: Any, parameters: Tensor, deterministic: bool = False) -> None:
        DiagonalGaussian.__init__(self, parameters, deterministic, rng=rng, clamp=clamp)
        if on_cpu and rng == "torch":
            self._noise_device = torch.device("cpu")

    def reduce(self: Any) -> tuple[type, tuple[Tensor, bool]]:
        return original, (self.parameters, self.deterministic)

    namespace = {
        "__init__": init,
        "__reduce__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (DiagonalGaussian, original), namespace)


def _draws_on_cpu(original: type) -> bool:
    """Whether ``sample`` draws from the CPU's generator and moves the noise, as latent-diffusion does."""
    function = inspect.getattr_static(original, "sample", None)
    return isinstance(function, FunctionType) and {"randn", "to"} <= set(function.__code__.co_names)
