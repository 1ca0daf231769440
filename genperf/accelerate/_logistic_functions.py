"""Functions of a mixture of logistics that public code defines: which there are, and their replacements."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

from genperf.accelerate import _logistic_loss, _logistic_sampler
from genperf.accelerate._logistic_probe import Unknown

_NAMES = re.compile(r".*mix.*logistic.*", re.IGNORECASE)
_MARK = "_genperf_replaces"


def looks_like_one(value: Any) -> bool:
    """Whether ``value`` is a function with such a name, and neither genperf's own nor a replacement."""
    if not isinstance(value, FunctionType) or (value.__module__ or "").startswith("genperf."):
        return False
    return bool(_NAMES.fullmatch(value.__name__)) and not replaces(value)


def replaces(function: Any) -> Any:
    """The function that ``function`` is the replacement of, or None."""
    return getattr(function, "__dict__", {}).get(_MARK)


@functools.cache
def replacement(function: FunctionType, rng: str) -> tuple[str, Callable[..., Any]]:
    """The kernel's name and the function that takes the place of ``function``.

    Raises:
        Unknown: it is neither a loss nor a sampler of the mixture, with the reason.
    """
    if "sampl" in function.__name__:
        kernel = "mixture_logistic_sample"
        made = _logistic_sampler.replacement(function, _logistic_sampler.recognised(function), rng)
    else:
        kernel = "mixture_logistic_nll"
        made = _logistic_loss.replacement(function, _logistic_loss.recognised(function))
    vars(made)[_MARK] = function
    return kernel, made


__all__ = ["Unknown", "looks_like_one", "replacement", "replaces"]
