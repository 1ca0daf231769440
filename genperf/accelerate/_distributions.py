"""torch.distributions with kernels, for a while: ``genperf.accelerate.distributions``.

The methods are replaced on the classes once for all overrides that are in force; a call asks which override
holds for its thread, and runs the original where there is none.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from genperf.accelerate._distribution_target import Left, Target
from genperf.accelerate._distribution_targets import TARGETS

_lock = threading.RLock()
#: The overrides whose ``with`` statements the current thread, or task of asyncio, is in: the last one holds.
_entered: ContextVar[tuple[Distributions, ...]] = ContextVar("genperf_distributions", default=())
#: The overrides that are installed for all threads: the last one holds.
_installed: list[Distributions] = []
_in_force = 0
_undo: list[Callable[[], None]] = []
#: Targets that were not torch's own when the override came into force.
_foreign: set[str] = set()
_TORCH = Path(torch.__file__).parent


class Distributions:
    """An override of torch.distributions; prints as a table of what it covers and what has been called.

    Attributes:
        rng: "torch" or "philox".
        covered: calls that a kernel ran, by the name of what was called.
        left: calls that the original ran, by name and reason.
    """

    def __init__(self, rng: str) -> None:
        self.rng = rng
        self.covered: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Distributions:
        _retain()
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *_: Any) -> None:
        stack = list(_entered.get())
        for i in reversed(range(len(stack))):
            if stack[i] is self:
                del stack[i]
                break
        _entered.set(tuple(stack))
        _release()

    def install(self) -> Distributions:
        """Put it in force in all threads, until :meth:`restore`; a ``with`` statement takes precedence.

        Returns:
            Distributions: this override.
        """
        _retain()
        with _lock:
            _installed.append(self)
        return self

    def restore(self) -> None:
        """Undo :meth:`install`, as often as it was called; does nothing otherwise."""
        with _lock:
            count = _installed.count(self)
            _installed[:] = [one for one in _installed if one is not self]
            for _ in range(count):
                _release()

    def __str__(self) -> str:
        rows = []
        for target in TARGETS:
            reasons = [(n, reason) for (name, reason), n in self.left.items() if name == target.name]
            left = "; ".join(f"{n}: {reason}" for n, reason in reasons)
            if target.name in _foreign:
                left = "all: other code has replaced it"
            rows.append((target.name, target.how[self.rng], self.covered[target.name], left))
        headers = (f"torch.distributions, rng={self.rng!r}", "kernel", "calls", "left to torch")
        return tabulate(rows, headers=headers)

    __repr__ = __str__


def distributions(rng: str = "torch") -> Distributions:
    """torch.distributions with kernels, within a ``with`` statement or until it is restored.

    What samples are distributed as, shapes, dtypes, gradients and errors stay as they are; covered are
    ``Normal.rsample`` and ``sample``, ``kl_divergence`` of two Normals, ``Categorical.sample`` and
    ``log_prob``, ``RelaxedOneHotCategorical.rsample`` and ``sample``, and
    ``torch.nn.functional.gumbel_softmax``; also inside of other distributions (``Independent``,
    ``TransformedDistribution``, ``MixtureSameFamily``)::

        with genperf.accelerate.distributions(rng="philox") as report:
            train(model)
        print(report)  # what was covered, and how often, and what was left to torch and why

    Only objects of exactly these classes are covered: subclasses run what they inherit. Compiled code,
    traced code and transforms of torch.func run the original. A name imported by
    ``from torch.nn.functional import gumbel_softmax`` beforehand stays the original.

    A ``with`` statement holds for its own thread (or task of asyncio), and the innermost one counts; the
    same object may be entered several times. :meth:`Distributions.install` holds for all threads.

    Args:
        rng: "torch" keeps the draws of eager torch, where there is a kernel for them (``Categorical.sample``
            is left to torch); "philox" draws genperf's own, from a key of the default generator.

    Returns:
        Distributions: the override; a ``with`` statement gives it too.

    Raises:
        ValueError: an unknown ``rng``.
    """
    if rng not in ("torch", "philox"):
        raise ValueError(f'rng: {rng!r}; expected "torch" or "philox"')
    return Distributions(rng)


def _holds() -> Distributions | None:
    """The override that holds for the current thread."""
    stack = _entered.get() or _installed
    try:
        return stack[-1]
    except IndexError:
        return None


def _retain() -> None:
    global _in_force
    with _lock:
        _in_force += 1
        if _in_force == 1:
            _undo.extend(undo for target in TARGETS for undo in _replace(target))


def _release() -> None:
    global _in_force
    with _lock:
        _in_force -= 1
        while _in_force == 0 and _undo:
            _undo.pop()()


def _replace(target: Target) -> list[Callable[[], None]]:
    """Put the dispatching function in its place; returns what puts the original back.

    What other code has put there is left alone: it may do something else.
    """
    original = target.original()
    code = getattr(original, "__code__", None)
    if code is None or not Path(code.co_filename).is_relative_to(_TORCH):
        _foreign.add(target.name)
        return []
    _foreign.discard(target.name)

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        override = _holds()
        if override is None or not target.concerns(*args, **kwargs):
            return original(*args, **kwargs)
        try:
            result = target.run(override.rng, *args, **kwargs)
        except Left as reason:
            with _lock:
                override.left[target.name, str(reason)] += 1
            return original(*args, **kwargs)
        with _lock:
            override.covered[target.name] += 1
        return result

    return [place.put(dispatch) for place in target.places]
