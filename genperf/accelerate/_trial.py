"""Short runs of a loop over pixels, with its network as it is and pixel by pixel."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from genperf.accelerate import _whole
from genperf.accelerate._network import hooks_of
from genperf.accelerate._stepwise import Abandoned, Session, Stepping
from genperf.sampling import CaptureError
from genperf.sampling._model import check_mode, preserved

_ROLES = {
    "shape": ("shape", "size", "image_shape", "img_shape", "image_size", "img_size"),
    "side": ("height", "width", "h", "w", "rows", "cols"),
    "batch": (
        "batch_size",
        "batch",
        "count",
        "n",
        "num",
        "num_samples",
        "n_samples",
        "num_images",
        "n_images",
    ),
    "label": ("label", "labels", "y", "cond", "class_label", "class_labels", "classes"),
    "device": ("device",),
    "choice": ("temperature", "temp", "tau", "top_k", "topk", "top_p"),
}
_SIDE, _BATCH = 5, 2
_CALLS = 100  # of a trial


class Unknown(Exception):  # noqa: N818
    """The loop is not, or not certainly, one that draws a pixel after each call."""


@dataclass(frozen=True)
class Facts:
    """What the trial showed; ``needs_eval``: in training mode the network is another one."""

    whole_pixels: bool
    span: tuple[float, float]
    needs_eval: bool = False
    whole: _whole.Meaning | None = None


def role_of(name: str) -> str:
    return next((role for role, names in _ROLES.items() if name in names), "")


class Trial:
    """Short runs of a method.

    Args:
        owner: the method's first argument.
        network: what it calls for each pixel, a module of ``owner``.
        function: the method as it is.
        method: the method whose calls of the network go through the session.
        ends: whether nothing follows the loop but the return of a name.
    """

    def __init__(
        self, owner: Any, network: nn.Module, function: FunctionType, method: FunctionType, ends: bool
    ) -> None:
        self._owner, self._network, self._method, self._ends = owner, network, method, ends
        self._parameters = list(inspect.signature(function).parameters.values())[1:]

    def facts(self, whole: bool) -> Facts:
        """What the runs showed; ``whole``: look whether one call of a sampler can replace the loop.

        Raises:
            Unknown: unless each gives the same numbers and leaves the generator in the same state.
        """
        if hooked := hooks_of(self._network):
            raise Unknown(f"{hooked} has hooks, which run at each call")
        needs_eval = False
        try:
            check_mode(self._network)
        except CaptureError:
            needs_eval = True
        root = self._owner if isinstance(self._owner, nn.Module) else self._network
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for module in {id(m): m for m in (root, self._network)}.values():
                stack.enter_context(preserved(module))
                module.eval()
            stack.enter_context(torch.enable_grad())  # a result with a gradient is not given pixel by pixel
            variant, first = self._first_that_runs()
            return self._compared(variant, first, needs_eval, whole)

    def _first_that_runs(self) -> tuple[list[dict[str, Any]], _Outcome]:
        failure = ""
        for variant in self._variants():
            try:
                return variant, self._run(Session(_CALLS), variant[0])
            except Exception as error:
                failure = failure or f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unknown(f"it cannot be tried: {failure}")

    def _compared(
        self, variant: list[dict[str, Any]], first: _Outcome, needs_eval: bool, whole: bool
    ) -> Facts:
        if first.session.calls < 2:
            raise Unknown("it does not call its network for each pixel")
        channels = first.session.images[0].dim() == 4 and first.session.images[0].shape[1] > 1
        outcomes = [first, *(self._run(Session(_CALLS), arguments) for arguments in variant[1:])]
        values = torch.stack(first.session.images[1:]).double()
        low, high = values.min().item(), values.max().item()
        span = low, max(high, low + 1e-3)
        reason = ""
        for whole_pixels in (False, True)[: 1 + channels]:
            kept: dict[Any, Any] = {}
            differences = (
                self._difference(
                    Stepping(kept, whole_pixels, span, expected.session.calls), arguments, expected
                )
                for arguments, expected in zip(variant, outcomes, strict=True)
            )
            found = next(filter(None, differences), "")
            if not found:
                meaning = None
                if whole and self._ends and not whole_pixels:
                    session = Stepping(kept, whole_pixels, span, _CALLS)
                    meaning = _whole.find(session, lambda s: self._run(s, variant[0]).result)
                return Facts(whole_pixels, span, needs_eval, meaning)
            reason = reason or found
        raise Unknown(reason)

    def _difference(self, session: Stepping, arguments: dict[str, Any], expected: _Outcome) -> str:
        """How a run pixel by pixel differs from the expected one, or ""."""
        try:
            found = self._run(session, arguments)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
            return f"pixel by pixel it fails; perhaps it reads the output at later pixels ({failure})"
        if session.stopped:
            return session.stopped
        images = zip(session.images, expected.session.images, strict=False)
        if session.calls != expected.session.calls or not all(torch.equal(a, b) for a, b in images):
            return "it gives other numbers pixel by pixel"
        if any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(expected.result)):
            return "its result requires a gradient; it should draw under torch.no_grad()"
        if not _same(found.result, expected.result):
            return "it returns something else pixel by pixel"
        return "" if torch.equal(found.state, expected.state) else "it draws more or less pixel by pixel"

    def _run(self, session: Session, arguments: dict[str, Any]) -> _Outcome:
        torch.manual_seed(13)
        result = None
        try:
            with session:
                result = self._method(self._owner, **copy.copy(arguments))
        except Abandoned:
            pass
        return _Outcome(session, result, torch.get_rng_state())

    def _variants(self) -> Iterator[list[dict[str, Any]]]:
        """Arguments of two runs each, which differ by the labels."""
        choices: list[list[tuple[str, Any]]] = []
        for p in self._parameters:
            role = role_of(p.name)
            if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                continue
            if role == "" or role == "choice":
                if p.default is p.empty:
                    raise Unknown(f"it takes {p.name}, whose meaning is not known")
                continue
            choices.append([(p.name, value) for value in self._values(role, p.default)])
        for chosen in itertools.product(*choices):
            for labels in ((0, 1), (0, 0)):
                yield [
                    {name: value(label) if callable(value) else value for name, value in chosen}
                    for label in labels
                ]

    def _values(self, role: str, default: Any) -> list[Any]:
        device = next((p.device for p in self._network.parameters()), torch.device("cpu"))
        if role == "shape":
            sizes = [(_SIDE, _SIDE), (3, _SIDE, _SIDE), (1, _SIDE, _SIDE)]
            if isinstance(default, int):
                return [_SIDE]
            known = isinstance(default, (tuple, list))
            return [s for s in sizes if not known or len(s) == len(default)] + [default] * known
        if role == "label":
            tensor = lambda label: (torch.arange(_BATCH, device=device) + 1) % 2 * label  # noqa: E731
            return [tensor, lambda label: label] + [default] * (default is None)
        others: dict[str, list[Any]] = {"side": [_SIDE], "batch": [_BATCH], "device": [device]}
        return others[role]


@dataclass
class _Outcome:
    """Of one run: ``result`` is None where the run was cut short."""

    session: Any
    result: Any
    state: Tensor


def _same(a: Any, b: Any) -> bool:
    """Whether two results have the same tensors; what else is in them is of the same types."""
    first, second = (tree_leaves(r) for r in (a, b))
    if [type(x) for x in first] != [type(y) for y in second]:
        return False
    tensors = [(x, y) for x, y in zip(first, second, strict=True) if isinstance(x, Tensor)]
    return all(
        (x.shape, x.dtype, x.requires_grad) == (y.shape, y.dtype, y.requires_grad) and torch.equal(x, y)
        for x, y in tensors
    )
