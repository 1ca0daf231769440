"""Objects that are constructed late: at the first look at an attribute that a kernel does not need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_PENDING, _KEPT = "_genperf_pending", "_genperf_kept"


def kept_by(instance: Any) -> Any:
    """What a kernel needs of an object, or None where the original has to run."""
    return getattr(instance, "__dict__", {}).get(_KEPT)


class Lazy:
    """A constructor that keeps its arguments, and what a kernel needs of them.

    Args:
        cls: the class, to which objects are pickled and copied.
        constructor: its ``__init__``.
    """

    def __init__(self, cls: type, constructor: Callable[..., None]) -> None:
        self._cls, self._constructor = cls, constructor

    def methods(
        self, prepare: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    ) -> dict[str, Callable[..., Any]]:
        """``__init__``, ``__getattr__`` and ``__reduce__`` of the class.

        Args:
            prepare: from the arguments to what is kept; None where the kernel does not cover them.
        """
        cls, constructor = self._cls, self._constructor
        inherited = getattr(cls, "__getattr__", None)

        @functools.wraps(constructor)
        def init(instance: Any, *args: Any, **kwargs: Any) -> None:
            kept = None
            if not torch.compiler.is_compiling():  # which could not follow what is late
                try:
                    kept = prepare(args, kwargs)
                except TypeError:  # the constructor itself will say what is wrong
                    kept = None
            if kept is None:
                constructor(instance, *args, **kwargs)
                return
            vars(instance)[_KEPT] = kept
            vars(instance)[_PENDING] = (torch.is_grad_enabled(), args, kwargs)

        def getattribute(instance: Any, name: str) -> Any:
            if not name.startswith("_") and construct(instance):
                return getattr(instance, name)
            if inherited is not None:
                return inherited(instance, name)
            raise AttributeError(f"{type(instance).__name__!r} object has no attribute {name!r}")

        def construct(instance: Any) -> bool:
            pending = vars(instance).pop(_PENDING, None)
            if pending is None:
                return False
            own = dict(vars(instance))
            with torch.set_grad_enabled(pending[0]):
                constructor(instance, *pending[1], **pending[2])
            vars(instance).update(own)
            return True

        def state(instance: Any) -> dict[str, Any]:
            construct(instance)
            return {k: v for k, v in vars(instance).items() if k != _KEPT}

        def reduce_ex(instance: Any, protocol: Any) -> tuple[Any, ...]:
            return object.__new__, (cls,), state(instance)

        return {"__init__": init, "__getattr__": getattribute, "__reduce_ex__": reduce_ex}
