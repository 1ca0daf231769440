"""What the probes of losses, samplers and distribution classes of public code share."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MOST_CHOICES = 8


class Unknown(Exception):  # noqa: N818
    """A function or a class is not what its name says, with the reason."""


class Moves(TorchFunctionMode):
    """Leaves tensors where they are when code moves them to a GPU.

    Attributes:
        moved_noise: whether uniform numbers were moved after they had been drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved_noise = False
        self._drawn: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("cuda", "to") and any(args[0] is tensor for tensor in self._drawn):
            self.moved_noise = True
        if name == "cuda":
            return args[0]
        result = function(*args, **(kwargs or {}))
        if name == "uniform_":
            self._drawn.append(result)
        return result


@contextmanager
def on_this_device() -> Iterator[Moves]:
    """A context in which code that calls ``cuda()`` runs on the CPU, and the random state is kept."""
    with torch.random.fork_rng(devices=[]), Moves() as moves:
        yield moves


def other_arguments(parameters: Sequence[inspect.Parameter]) -> Iterator[tuple[Any, ...]]:
    """The values of further parameters to be tried: the defaults first, and both values of flags."""
    if any(p.default is p.empty for p in parameters):
        return
    values = [p.default for p in parameters]
    choices = [(value, not value) if isinstance(value, bool) else (value,) for value in values]
    yield from itertools.islice(itertools.product(*choices), _MOST_CHOICES)


def values_of(signature: inspect.Signature) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Any]]:
    """A function that gives the values of all parameters in their order, or raises TypeError.

    It is :meth:`inspect.Signature.bind` for parameters that may all be positional, faster, and such that
    torch.compile can follow it.
    """
    names = tuple(signature.parameters)
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}

    def values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        found = list(args)
        for name in names[len(args) :]:
            if name in kwargs:
                found.append(kwargs[name])
            elif name in defaults:
                found.append(defaults[name])
            else:
                raise TypeError(f"missing argument {name!r}")
        for name in kwargs:
            if name not in names[len(args) :]:
                raise TypeError(f"unexpected argument {name!r}")
        if len(found) != len(names):
            raise TypeError(f"{len(found)} arguments, expected {len(names)}")
        return found

    return values
