"""Functions and classes of a module of Python: ``genperf.accelerate.namespace(utils)``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from genperf.accelerate import _distribution_class, _logistic_functions
from genperf.accelerate._logistic_probe import Unknown
from genperf.accelerate._report import Entry, as_table

_lock = threading.RLock()
_ABSENT = object()


class Namespace:
    """What :func:`namespace` did; prints as a table, and restores at the end of a ``with`` statement.

    Attributes:
        entries: one for each function and class that was recognised.
    """

    def __init__(self, entries: list[Entry], undo: list[Callable[[], None]]) -> None:
        self.entries = entries
        self._undo = undo

    @property
    def accelerated(self) -> list[Entry]:
        """The entries that a kernel runs now."""
        return [entry for entry in self.entries if entry.kernel]

    @property
    def left_alone(self) -> list[Entry]:
        """The entries that were recognised and still run the original."""
        return [entry for entry in self.entries if not entry.kernel]

    def restore(self) -> None:
        """Put the originals back, except where something else stands by now; a second call does nothing."""
        with _lock:
            while self._undo:
                self._undo.pop()()

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()

    def __str__(self) -> str:
        return as_table(self.entries, "name") if self.entries else "nothing in it is known to genperf"

    __repr__ = __str__


def namespace(
    *namespaces: ModuleType | dict[str, Any], strict: bool = False, rng: str = "torch"
) -> Namespace:
    """Make the losses, samplers and distribution classes that a module of Python defines faster.

    For what no method of a model names, and :func:`genperf.accelerate` therefore does not find: the loss of
    a training script, the sampler of its loop. Recognised, by name and by a numerical probe against their
    own code, are functions such as ``discretized_mix_logistic_loss`` and
    ``sample_from_discretized_mix_logistic`` (grey and RGB, of PixelCNN++'s ports and VDVAE), and classes
    such as NVAE's ``Normal``, ``DiscMixLogistic`` and ``DiscLogistic``.

    A function is replaced wherever a loaded module holds it under a name, also after
    ``from utils import *``; not where it was kept in another way (as a default argument, in a closure). A
    class gets other methods, and stays the same object. What is not covered runs the original::

        import utils
        report = genperf.accelerate.namespace(utils)
        print(report)
        ...
        report.restore()  # or: with genperf.accelerate.namespace(utils): ...

    Args:
        *namespaces: modules, or dictionaries such as ``globals()``.
        strict: raise if anything that is recognised cannot be covered.
        rng: "torch" draws the noise that the originals draw; "philox" genperf's own.

    Returns:
        Namespace: prints as a table; ``restore()`` undoes.

    Raises:
        TypeError: something else than a module or a dictionary is given.
        ValueError: an unknown ``rng``.
        RuntimeError: ``strict`` and something recognised cannot be covered. Nothing is changed then.
    """
    if rng not in ("torch", "philox"):
        raise ValueError(f'rng: {rng!r}; expected "torch" or "philox"')
    found: dict[int, tuple[str, Any]] = {}
    for one in namespaces:
        if not isinstance(one, (ModuleType, dict)):
            raise TypeError(f"namespace: {type(one).__name__}; expected a module or a dictionary")
        values = vars(one) if isinstance(one, ModuleType) else one
        for name, value in list(values.items()):
            if _logistic_functions.looks_like_one(value) or _distribution_class.looks_like_one(value):
                found.setdefault(id(value), (name, value))
    entries: list[Entry] = []
    planned: list[tuple[Any, Any]] = []
    for name, value in found.values():
        was = f"{value.__module__}.{value.__qualname__}"
        try:
            replaced = _logistic_functions.replacement if isinstance(value, FunctionType) else _methods
            kernel, new = replaced(value, rng)
        except Unknown as reason:
            entries.append(Entry(name, was, reason=str(reason)))
            continue
        planned.append((value, new))
        entries.append(Entry(name, was, kernel, "that of the arguments"))
    refused = [entry for entry in entries if not entry.kernel]
    if strict and refused:
        reasons = "\n".join(f"  {entry.name}: {entry.reason}" for entry in refused)
        raise RuntimeError(f"namespace: strict, and left alone would be:\n{reasons}")
    undo: list[Callable[[], None]] = []
    with _lock:
        for old, new in planned:
            if isinstance(old, type):
                undo += [_set_on_class(old, name, value) for name, value in new.items()]
            else:
                undo += [_set_in(values, name, old, new) for values, name in _places(old, namespaces)]
    return Namespace(entries, undo)


def _methods(cls: type, rng: str) -> tuple[str, dict[str, Any]]:
    return _distribution_class.methods(cls, rng)


def _places(function: Any, namespaces: tuple[Any, ...]) -> Iterator[tuple[dict[str, Any], str]]:
    """The dictionaries and names under which ``function`` stands."""
    modules = [*sys.modules.values(), *namespaces]
    dictionaries = [
        m if isinstance(m, dict) else vars(m) for m in modules if isinstance(m, (dict, ModuleType))
    ]
    seen: set[int] = set()
    for values in dictionaries:
        if id(values) in seen:
            continue
        seen.add(id(values))
        for name, value in list(values.items()):
            if value is function:
                yield values, name


def _set_in(values: dict[str, Any], name: str, old: Any, new: Any) -> Callable[[], None]:
    values[name] = new

    def undo() -> None:
        if values.get(name) is new:
            values[name] = old

    return undo


def _set_on_class(cls: type, name: str, new: Any) -> Callable[[], None]:
    old = vars(cls).get(name, _ABSENT)
    setattr(cls, name, new)

    def undo() -> None:
        if vars(cls).get(name) is new:
            if old is _ABSENT:
                delattr(cls, name)
            else:
                setattr(cls, name, old)

    return undo
