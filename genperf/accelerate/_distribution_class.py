"""Distribution classes that public code defines: which there are, and their methods with kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from genperf.accelerate import _gaussian_class, _logistic_class
from genperf.accelerate._logistic_probe import Unknown

_MARK = "_genperf_replaces"


def looks_like_one(value: Any) -> bool:
    """Whether ``value`` is such a class, and its methods are its own."""
    if not isinstance(value, type) or _MARK in vars(value):
        return False
    return _logistic_class.looks_like_one(value) or _gaussian_class.looks_like_one(value)


@functools.cache
def methods(cls: type, rng: str) -> tuple[str, dict[str, Any]]:
    """The kernel's name, and the methods that take the place of those of ``cls``, with a mark.

    Raises:
        Unknown: it is another distribution, with the reason.
    """
    made: dict[str, Callable[..., Any]]
    if _logistic_class.looks_like_one(cls):
        mixture = _logistic_class.recognised(cls).mixture
        kernel = f"{'mixture' if mixture else 'discretized'}_logistic_nll"
        made = _logistic_class.methods(cls, rng)
        if "sample" in made:
            kernel += ", _sample"
    else:
        kernel, made = "gaussian_sample", _gaussian_class.methods(cls, rng)
    return kernel, {**made, _MARK: cls}


@functools.cache
def subclass(cls: type, rng: str) -> tuple[str, type]:
    """The kernel's name, and a subclass of ``cls`` under its name with those methods.

    Raises:
        Unknown: see :func:`methods`.
    """
    kernel, made = methods(cls, rng)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return kernel, type(cls)(cls.__name__, (cls,), {**made, **names})


__all__ = ["Unknown", "looks_like_one", "methods", "subclass"]
