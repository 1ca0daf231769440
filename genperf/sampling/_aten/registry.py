"""The table of handlers: what each aten operation means on a grid of cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Handler:
    """``function(state, *args, **kwargs)`` gives the layout of the result of an operation.

    With ``takes_deferred``, its arguments may be layouts that no node stands for yet: attention scores
    and unfolded windows.
    """

    function: Callable[..., Any]
    takes_deferred: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


HANDLERS: dict[str, Handler] = {}


def handles(*names: str, deferred: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function for operations by their name, without "aten." and the underscore at the end."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            HANDLERS[name] = Handler(function, deferred)
        return function

    return register
