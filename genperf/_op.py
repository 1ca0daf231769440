"""Operators: one torch op each, with a reference and any number of faster backends below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genperf import _backend

_library = torch.library.Library("genperf", "FRAGMENT")


@dataclass(frozen=True)
class Implementation:
    """One backend's way to run an operator.

    ``refuses(*args)`` says why it cannot take these arguments; None if it can. ``direct``, if there is one,
    does for a plain call of the public function all that stands between it and the kernel, or returns
    NotImplemented; its arguments are its own affair.
    """

    backend: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]
    direct: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Choice:
    """What an operator call was given to, and why not to the backends before it."""

    operator: str
    backend: str
    refusals: tuple[tuple[str, str], ...]


_recorder: list[Choice] | None = None

_compiling = torch.compiler.is_dynamo_compiling

# A true result of one of them: something is listening to torch's dispatcher.
_LISTENERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
    torch.autograd._profiler_enabled,
)
_TENSORS = (Tensor, torch.nn.Parameter)
_OTHERS = (type(None), bool, int, float, list, torch.device, torch.Generator)


def _direct_device(*args: Any) -> str | None:
    """The device type of a call with these arguments, if it may go past torch's dispatcher; else None."""
    if any(listener() for listener in _LISTENERS):
        return None
    for arg in args:
        kind = type(arg)
        if kind in _TENSORS:
            if arg.is_neg():
                return None
        elif kind not in _OTHERS:
            return None
    return _device_of(args)


direct_device: Callable[..., str | None] = _direct_device
if _backend.native is not None:
    _backend.native.meet_torch(torch, list(_LISTENERS), list(_TENSORS), list(_OTHERS))
    direct_device = _backend.native.direct_device


class Operator:
    """The torch op ``genperf::<name>``.

    Args:
        name: name of the torch op.
        schema: its arguments and results, e.g. ``"(Tensor x, float a) -> Tensor"``.
        reference: plain torch; the specification, and the fallback for any device and dtype.
        fake: shapes, dtypes and strides of the results, for torch.compile. Here and in every backend, a
            result that the arguments do not ask for may be None.
        tags: torch.Tag values of the op.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        tags: Sequence[torch.Tag] = (),
    ) -> None:
        self.name = name
        self.reference = reference
        self._implementations = {"reference": Implementation("reference", reference, lambda *_: None)}
        self._usable: dict[str, tuple[Implementation, ...]] = {}
        _backend.choices.append(self._usable)
        _library.define(name + schema, tags=tuple(tags))
        run = lambda *a: _present(self.run(_device_of(a), a), a)  # noqa: E731
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"genperf::{name}", lambda *a: _present(fake(*a), a), lib=_library)
        self.overload = getattr(torch.ops.genperf, name).default

    def implement(
        self,
        backend: str,
        run: Callable[..., Any],
        refuses: Callable[..., str | None] = lambda *_: None,
        direct: Callable[..., Any] | None = None,
    ) -> None:
        """Add a backend. ``run`` takes the op's arguments and returns its results."""
        self._implementations[backend] = Implementation(backend, run, refuses, direct)

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(name for name in _backend.BACKENDS if name in self._implementations)

    def __call__(self, *args: Any) -> Any:
        """Run the op; results that were not asked for are None or empty.

        Plain eager calls go straight to the backend; torch's dispatcher, which would take most of the
        time of a small call, is used only where something is listening there.
        """
        if not _compiling() and (device := direct_device(*args)) is not None:
            return self.run(device, args)
        return self.overload(*args)

    def direct(self, device: str) -> Callable[..., Any] | None:
        """The short way to the backend that is first for this device; None where it has none, or a call
        is to be recorded."""
        if _recorder is not None:
            return None
        usable = self._usable.get(device) or self._find_usable(device)
        return usable[0].direct if usable else None

    def run(self, device: str, args: tuple[Any, ...]) -> Any:
        """Run the op below torch's dispatcher; ``device`` is the type that ``direct_device`` gave."""
        if _recorder is None:
            for implementation in self._usable.get(device) or self._find_usable(device):
                if implementation.refuses(*args) is None:
                    return implementation.run(*args)
        choice = self.choose(*args)  # raises where no backend can run
        if _recorder is not None:
            _recorder.append(choice)
        return self._implementations[choice.backend].run(*args)

    def _find_usable(self, device: str) -> tuple[Implementation, ...]:
        self._usable[device] = tuple(
            self._implementations[name]
            for name in self._allowed()
            if name in self._implementations and _backend.unusable(name, device) is None
        )
        return self._usable[device]

    def _allowed(self) -> tuple[str, ...]:
        """The backends to try: all, or the forced one, which binds every op that has a choice."""
        forced = _backend.forced()
        return self.backends if forced is None or len(self._implementations) == 1 else (forced,)

    def choose(self, *args: Any) -> Choice:
        """The backend for these arguments of the torch op.

        Raises:
            RuntimeError: if a backend was forced that cannot take them.
        """
        device = _device_of(args)
        refusals: list[tuple[str, str]] = []
        for name in self._allowed():
            if name not in self._implementations:
                reason: str | None = "this op has no such backend"
            else:
                reason = _backend.unusable(name, device) or self._implementations[name].refuses(*args)
            if reason is None:
                return Choice(self.name, name, tuple(refusals))
            refusals.append((name, reason))
        name, why = refusals[0]
        raise RuntimeError(f"genperf::{self.name}: backend {name!r} cannot run: {why}")


def _present(results: Any, args: tuple[Any, ...]) -> Any:
    """The results as a torch op must return them: an empty tensor for each that was not asked for."""
    if not isinstance(results, tuple):
        return results
    like = next(arg for arg in args if isinstance(arg, Tensor))
    return tuple(like.new_empty(0) if result is None else result for result in results)


def cuda_stream(tensor: Tensor) -> int:
    """The current CUDA stream of the tensor's device as a pointer; 0 where CUDA is emulated."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _device_of(args: tuple[Any, ...]) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
        if isinstance(arg, torch.device):
            return arg.type
    return "cpu"


@dataclass
class Explanation:
    """Which backend each operator call was given to; prints as a table."""

    choices: list[Choice] = field(default_factory=list)

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            (c.operator, c.backend, "; ".join(f"{name}: {reason}" for name, reason in c.refusals) or "-")
            for c in self.choices
        ]
        return tabulate(rows, headers=("op", "backend", "why not another"), tablefmt="simple")

    __repr__ = __str__


@contextmanager
def _recording() -> Iterator[list[Choice]]:
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


def note(name: str, refusal: str | None) -> None:
    """Record a choice that is no operator's: the CPU kernel, or torch for the reason given."""
    if _recorder is not None:
        refusals = () if refusal is None else (("cpu", refusal),)
        _recorder.append(Choice(name, "cpu" if refusal is None else "reference", refusals))


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``function(*args, **kwargs)`` once, and tell which backend every genperf op in it used.

    Args:
        function: an op of ``genperf.ops``, a module, or anything that calls them.

    Returns:
        An :class:`Explanation`: for each op the backend, and why the ones preferred to it were refused.

    Raises:
        TypeError: if ``function`` is not callable.
    """
    if not callable(function):
        raise TypeError(f"genperf.explain: function is {type(function).__name__}, expected a callable")
    with _recording() as choices:
        function(*args, **kwargs)
    return Explanation(choices)
