"""Invertible steps one after another, trained without their activations."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from genperf.nn.flows._determinants import prepared
from genperf.nn.flows._reconstruction import Monitor, Probes
from genperf.nn.flows._reversible import Pass, output_of
from genperf.nn.flows.conv1x1 import InvertibleConv1x1

_FALLBACKS = ("store", "warn", "error")


class ReversibleSequence(nn.Module):
    """Invertible steps whose training needs the memory of one, however many there are.

    The backward pass rebuilds each step's input from its output (A. Gomez et al., "The reversible residual
    network", arXiv:1707.04585), runs the step once more with gradients recorded, and forgets it. Parameters
    get their gradients step by step, with ``backward()`` and ``torch.autograd.grad`` alike, in
    DistributedDataParallel too. The step runs again with its random numbers, its buffers, and the autocast
    of the first time; what passes from step to step is float32 (or float64) whatever autocast says.

    A step is a module with ``step(x, **conditions) -> (z, logdet)`` and ``step.inverse(z, **conditions) ->
    (x, logdet)``, logdet [B] or [] in its own direction. Such a step evaluates its network in ``inverse`` and
    once more. One with ``backward_from_output(z, grad_z, grad_logdet, recompute, *, wants_x, **conditions)
    -> Reversed``, as the modules of this package have it, evaluates it once.

    A few elements of every input are kept to tell how well it was rebuilt. The host does not wait for that:
    the next forward pass looks whether the result of the last backward pass is there. Second derivatives
    are not provided. Under ``torch.compile`` the sequence is a graph break.

    Args:
        steps: the modules.
        reversible: False to keep all activations, as autograd does; may be set later.
        segment: the input of every such-many-th step is kept, which bounds the growth of rounding errors at
            the cost of one tensor of x's size each; None for none.
        stored: indices of further steps whose input is kept, such as ill-conditioned ones; these need not be
            invertible. May be added to later.
        check_reconstruction: the relative error of a rebuilt input from which something is done; None for
            never.
        fallback: what is done: "store" warns, and keeps the input of that step from the next forward pass on;
            "warn"; or "error", which raises RuntimeError in the next forward pass.

    Raises:
        TypeError: for a step that is no module, or has no ``inverse`` and is not in ``stored``; in the call
            for an x that is not floating, or a step that does not return (z, logdet).
        ValueError: for other arguments that do not fit.
        RuntimeError: in the backward pass, where a parameter was modified since the forward pass.
    """

    _errors: Tensor

    def __init__(
        self,
        steps: Iterable[nn.Module],
        *,
        reversible: bool = True,
        segment: int | None = None,
        stored: Collection[int] = (),
        check_reconstruction: float | None = 1e-2,
        fallback: str = "store",
    ) -> None:
        super().__init__()
        steps = list(steps)
        if segment is not None and (isinstance(segment, bool) or not isinstance(segment, int) or segment < 1):
            raise ValueError(f"segment is {segment!r}, expected an integer of at least 1, or None")
        if fallback not in _FALLBACKS:
            raise ValueError(f"fallback is {fallback!r}, expected one of {', '.join(_FALLBACKS)}")
        if check_reconstruction is not None and not check_reconstruction > 0:
            raise ValueError(
                f"check_reconstruction is {check_reconstruction!r}, expected a number > 0, or None"
            )
        for index in stored:
            if not 0 <= index < len(steps):
                raise ValueError(f"stored has {index}, expected 0 to {len(steps) - 1}")
        self.stored = set(stored)
        if segment is not None:
            self.stored.update(range(0, len(steps), segment))
        for index, step in enumerate(steps):
            if not isinstance(step, nn.Module):
                raise TypeError(f"steps[{index}] is {type(step).__name__}, expected a module")
            if not callable(getattr(step, "inverse", None)) and index not in stored:
                raise TypeError(
                    f"steps[{index}], {type(step).__name__}, has no method inverse, expected an invertible "
                    f"step; stored=({index},) keeps its input instead"
                )
        self.steps = nn.ModuleList(steps)
        self._dense = tuple(
            m for m in self.modules() if isinstance(m, InvertibleConv1x1) and m.permutation == "dense"
        )
        self.reversible = reversible
        self.check_reconstruction = check_reconstruction
        tolerance = math.inf if check_reconstruction is None else float(check_reconstruction)
        self._monitor = Monitor(tolerance, fallback)
        self.register_buffer("_errors", torch.zeros(len(steps)), persistent=False)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.steps)

    def __getitem__(self, index: int) -> nn.Module:
        return self.steps[index]

    @property
    def reconstruction_errors(self) -> Tensor:
        """Of each step's input in the last backward pass: largest difference by root mean square, [steps].

        Of 256 elements each; 0 where the input was stored, or there was no backward pass.
        """
        return self._errors.clone()

    def forward(self, x: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        """Through all steps.

        Args:
            x: [B, *], a floating dtype.
            conditions: passed to every step.

        Returns:
            z, and the sum of the log-determinants [B].
        """
        x = _state(x)
        with prepared(self._dense):
            if self.reversible and self._needs_gradients(x, conditions):
                return self._reversible(x, conditions)
            logdet = torch.zeros(x.shape[0], device=x.device, dtype=x.dtype)
            for index, step in enumerate(self.steps):
                x, change = output_of(step, index, step(x, **conditions))
                x, logdet = _state(x), logdet + change
            return x, logdet

    def inverse(self, z: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        """Back through all steps: x, and the log-determinant [B] of this direction.

        Autograd keeps activations.
        """
        z = _state(z)
        with prepared(self._dense):
            logdet = torch.zeros(z.shape[0], device=z.device, dtype=z.dtype)
            for index, step in reversed(list(enumerate(self.steps))):
                if not callable(getattr(step, "inverse", None)):
                    raise TypeError(f"steps[{index}], {type(step).__name__}, has no method inverse")
                z, change = output_of(step, index, step.inverse(z, **conditions))  # type: ignore[operator]
                z, logdet = _state(z), logdet + change
            return z, logdet

    def _needs_gradients(self, x: Tensor, conditions: dict[str, Any]) -> bool:
        if getattr(self, "_is_replica", False):  # of DataParallel, whose parameters are no parameters
            return False
        given = (x, *conditions.values(), *self.parameters())
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)

    @torch.compiler.disable
    def _reversible(self, x: Tensor, conditions: dict[str, Any]) -> tuple[Tensor, Tensor]:
        probes = None
        if self.check_reconstruction is not None:
            capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
            index = None if capturing else self._monitor.poll()
            if index is not None:
                self.stored.add(index)
            probes = Probes(self._errors, self._monitor)
        return Pass(list(self.steps), frozenset(self.stored), conditions, probes)(x)

    def extra_repr(self) -> str:
        return f"reversible={self.reversible}, stored={sorted(self.stored)}"


def _state(x: Tensor) -> Tensor:
    """What passes from step to step: float32, or float64 if it came so."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"ReversibleSequence: x is {got}, expected a tensor of a floating dtype")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
