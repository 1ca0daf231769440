"""What accelerate did, as a table, with the ways to check it and to undo it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import nn

from genperf.accelerate._pattern import Options
from genperf.accelerate._swap import modules_of, restore_class
from genperf.accelerate._verify import Verification, verify


@dataclass(frozen=True)
class Entry:
    """One recognised thing.

    Attributes:
        name: the module's name within the model; "" is the model itself.
        was: what it was.
        kernel: the genperf op that runs it now, or "" where it was left alone.
        backend: the backend that the op chooses for the module's device and dtype.
        reason: why it was left alone, or "".
    """

    name: str
    was: str
    kernel: str = ""
    backend: str = ""
    reason: str = ""


class Report:
    """The result of :func:`genperf.accelerate`; prints as a table.

    Attributes:
        model: the model that was accelerated, in place.
        options: the mode and rng it was accelerated with.
        entries: one for each thing that was recognised.
    """

    def __init__(self, model: nn.Module, options: Options, strict: bool, entries: list[Entry]) -> None:
        self.model = model
        self.options = options
        self.strict = strict
        self.entries = entries

    @property
    def accelerated(self) -> list[Entry]:
        """The entries that a kernel runs now."""
        return [entry for entry in self.entries if entry.kernel]

    @property
    def left_alone(self) -> list[Entry]:
        """The entries that were recognised and still run the original."""
        return [entry for entry in self.entries if not entry.kernel]

    def restore(self) -> None:
        """Give every module of the model its original class back.

        Raises:
            RuntimeError: something else changed a module's class after accelerate.
        """
        for module in modules_of(self.model).values():
            restore_class(module)

    def verify(
        self,
        *inputs: Any,
        call: Callable[..., Any] | None = None,
        seconds: float = 2.0,
        **kwargs: Any,
    ) -> Verification:
        """Compare the accelerated model with the original on ``inputs``, and time both.

        Works on copies. The original runs in its own precision and in float64, the accelerated model in
        its own; all three are given the same random draws. Compared are all floating tensors of the
        output (in nested tuples, lists, mappings and dataclasses) and, where a parameter requires a
        gradient, the gradients of a fixed linear function of them with respect to every floating input
        and every parameter. A comparison passes when
        ``error(accelerated) <= 2 * error(original) + 4 units of roundoff``, errors being the largest
        difference from the float64 run relative to its largest magnitude.

        Args:
            *inputs, **kwargs: passed to the model.
            call: what to run instead of ``model(*inputs, **kwargs)``: called as
                ``call(model, *inputs, **kwargs)``, for instance to include the loss.
            seconds: about how long to time both models, forward in mode "inference", forward and backward in
                mode "training"; 0 for not at all.

        Returns:
            Verification: true when everything passed; prints as a table.

        Raises:
            TypeError: what was accelerated is no module.
            RuntimeError: a comparison failed and the model was accelerated with ``strict=True``.
        """
        model = self.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"verify: model is {type(model).__name__}, expected a torch.nn.Module")
        while type(model).__name__ in _WRAPPERS:
            model = getattr(model, _WRAPPERS[type(model).__name__])
        result = verify(
            model, inputs, kwargs, call=call, training=self.options.mode == "training", seconds=seconds
        )
        if self.strict and not result:
            raise RuntimeError(f"verify: the accelerated model does not agree with the original\n{result}")
        return result

    def __str__(self) -> str:
        if not self.entries:
            return f"{type(self.model).__name__}: nothing in it is known to genperf"
        return as_table(self.entries, "module")

    __repr__ = __str__


def as_table(entries: list[Entry], named: str) -> str:
    """The entries, with ``named`` above their names."""
    rows = [
        (
            entry.name or "(model)",
            entry.was,
            entry.kernel or "-",
            entry.backend if entry.kernel else f"left alone: {entry.reason}",
        )
        for entry in entries
    ]
    table = tabulate(rows, headers=(named, "what it was", "kernel", "backend"), tablefmt="simple")
    n_accelerated = sum(bool(entry.kernel) for entry in entries)
    return f"{table}\n{n_accelerated} accelerated, {len(entries) - n_accelerated} left alone"


_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
