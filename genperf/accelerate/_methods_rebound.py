"""Methods of a class in which global names stand for other objects: what several patterns do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

from genperf.accelerate._logistic_probe import Unknown
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._rewrite import CannotRewrite, methods_of, rebind_all, referenced, syntax_tree


def rebound(
    module: nn.Module,
    cls: type,
    options: Options,
    wanted: Callable[[Any], bool],
    replacement: Callable[[Any, str], tuple[str, Any]],
) -> Iterator[Match | Refusal]:
    """A match or a refusal for each object that methods of ``cls`` refer to by a global name.

    Args:
        wanted: whether an object is to be replaced; equal functions must be one object.
        replacement: from the object and ``options.rng``, the kernel's name and what takes its place; raises
            Unknown with the reason where nothing can.
    """
    users = _users(cls, wanted)
    found: dict[Any, tuple[str, str, Any]] = {}
    for value, methods in users.items():
        was = f"{cls.__name__}.{', '.join(methods)}: {value.__name__}"
        overridden = sorted(set(methods) & set(module.__dict__))
        if overridden:
            yield Refusal(was, f"{', '.join(overridden)} is set on the module itself")
            continue
        try:
            kernel, new = replacement(value, options.rng)
            for method in methods.values():
                syntax_tree(inspect.unwrap(method))
        except (Unknown, CannotRewrite) as error:
            yield Refusal(was, str(error))
            continue
        found[value] = (was, kernel, new)
    pairs = [(value, new) for value, (_, _, new) in found.items()]
    taken: set[str] = set()
    for value, (was, kernel, _) in found.items():
        own = {name: method for name, method in users[value].items() if name not in taken}
        taken |= set(own)
        key = ("rebound", value, tuple(found), options.rng)
        yield Match(was, kernel, key, {name: rebind_all(method, pairs) for name, method in own.items()})


@functools.cache
def _users(cls: type, wanted: Callable[[Any], bool]) -> dict[Any, dict[str, FunctionType]]:
    """What methods of ``cls`` refer to, with those methods by name."""
    found: dict[Any, dict[str, FunctionType]] = {}
    for name, method in methods_of(cls).items():
        for value in referenced(method).values():
            if wanted(value):
                found.setdefault(value, {})[name] = method
    return found
