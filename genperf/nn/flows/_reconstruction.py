"""How well steps' inputs were rebuilt: a few elements of each, compared without the host waiting for the
device."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

N_ELEMENTS = 256  # of each step's input; the odd stride between them meets all rows, columns and channels


def _elements(x: Tensor) -> Tensor:
    """A copy, since a view would keep all of x."""
    stride = max(1, x.numel() // N_ELEMENTS)
    stride -= 1 - stride % 2
    return x.detach().reshape(-1)[: stride * N_ELEMENTS : stride].clone()


class Probes:
    """Elements of the inputs of one forward pass and of what its backward pass rebuilt.

    Args:
        errors: [steps], gets the largest difference of each step's input, relative to its root mean square.
        monitor: told when a backward pass has filled ``errors``.
    """

    def __init__(self, errors: Tensor, monitor: Monitor) -> None:
        self._errors, self._monitor = errors, monitor
        self._before: dict[int, Tensor] = {}
        self._after: dict[int, Tensor] = {}

    def observe(self, index: int, x: Tensor) -> None:
        self._before[index] = _elements(x)

    def compare(self, index: int, x: Tensor, last: bool) -> None:
        self._after[index] = _elements(x)
        if not last:
            return
        indices = sorted(self._after)
        after = pad_sequence([self._after[i] for i in indices], batch_first=True)
        before = pad_sequence([self._before[i] for i in indices], batch_first=True)
        size = before.square().mean(1).sqrt().clamp(min=torch.finfo(before.dtype).tiny)
        self._errors[indices[0] : indices[-1] + 1].copy_((after - before).abs().amax(1) / size)
        self._after.clear()
        self._monitor.measured(self._errors)


class Monitor:
    """Reads the errors on the host once they are there, and decides what is to be done.

    Args:
        tolerance: the largest relative error that is in order.
        fallback: "store", "warn" or "error".
    """

    def __init__(self, tolerance: float, fallback: str) -> None:
        self.tolerance, self.fallback = tolerance, fallback
        self._copy: Tensor | None = None
        self._event: Any = None
        self._known: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"tolerance": self.tolerance, "fallback": self.fallback, "_known": set(self._known),
                "_copy": None, "_event": None}  # fmt: skip

    def measured(self, errors: Tensor) -> None:
        if errors.device.type == "cpu":
            self._copy = errors
        elif errors.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._copy = torch.empty(errors.shape, dtype=errors.dtype, pin_memory=True)
            self._copy.copy_(errors, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def poll(self) -> int | None:
        """The step whose input is to be stored from now on, if a backward pass has shown one.

        Raises:
            RuntimeError: with ``fallback="error"``, for such a step.
        """
        if self._copy is None or (self._event is not None and not self._event.query()):
            return None
        errors, self._copy, self._event = self._copy.numpy(), None, None
        for index in reversed(range(len(errors))):
            if errors[index] <= self.tolerance or index in self._known:
                continue
            self._known.add(index)
            told = (
                f"ReversibleSequence: the input of steps[{index}] was rebuilt with a relative error of "
                f"{errors[index]:.2g}, more than check_reconstruction={self.tolerance:.2g}"
            )
            if self.fallback == "error":
                raise RuntimeError(told)
            storing = self.fallback == "store"
            warnings.warn(
                f"{told}; {'it is stored from now on' if storing else 'gradients are off'}",
                RuntimeWarning,
                stacklevel=4,
            )
            return index if storing else None
        return None
