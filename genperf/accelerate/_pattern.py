"""What a pattern is, and where patterns are found.

A pattern is a module of ``genperf/accelerate/patterns`` with one function::

    def find(module: nn.Module, cls: type, options: Options) -> Iterable[Match | Refusal]

``cls`` is the class of ``module`` before anything was swapped. A pattern recognises by structure, and
accepts only after a numerical probe has shown that the replacement gives what the original gives. It
yields a :class:`Refusal` for what it recognises and cannot cover, and nothing for the rest. A pattern with
``OBJECTS = True`` is also asked about an object that is no module but has modules.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType

from torch import nn

from genperf.accelerate import patterns


@dataclass(frozen=True)
class Options:
    """How replacements behave: ``mode`` "inference" or "training", ``rng`` "torch" or "philox"."""

    mode: str = "inference"
    rng: str = "torch"


@dataclass(frozen=True)
class Match:
    """One thing in a module that a kernel replaces.

    ``methods`` maps a method's name to the function that takes its place; ``key`` tells replacements
    of one class apart (equal keys, equal methods). ``backend`` is None for that of gaussian_sample.
    """

    was: str
    kernel: str
    key: Hashable
    methods: dict[str, FunctionType]
    backend: str | None = None


@dataclass(frozen=True)
class Refusal:
    """One thing that was recognised and is left alone, with the reason."""

    was: str
    reason: str


Finder = Callable[[nn.Module, type, Options], Iterable["Match | Refusal"]]


def finders(module: object) -> Iterator[Finder]:
    """The ``find`` function of each module in ``genperf/accelerate/patterns`` that can take ``module``."""
    for info in sorted(pkgutil.iter_modules(patterns.__path__), key=lambda info: info.name):
        if not info.name.startswith("_"):
            pattern = importlib.import_module(f"{patterns.__name__}.{info.name}")
            if isinstance(module, nn.Module) or getattr(pattern, "OBJECTS", False):
                yield pattern.find
