"""A module's call run once more, with the random numbers, buffers and autocast that it had the first time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

_Result = TypeVar("_Result")
RandomStates = tuple[Tensor, Tensor | None] | None


class Slot(NamedTuple):
    """Where a module holds a parameter: in one of its parts' dictionaries, under a name."""

    owner: dict[str, nn.Parameter | None]
    name: str
    parameter: nn.Parameter


def slots_of(module: nn.Module) -> list[Slot]:
    return [
        Slot(part._parameters, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]


def random_states(device: torch.device) -> RandomStates:
    """Of the CPU's and the device's default generator; None while a CUDA graph is captured."""
    if device.type != "cuda":
        return torch.get_rng_state(), None
    if torch.cuda.is_current_stream_capturing():
        return None  # a graph's random state is no number until it is replayed
    return torch.get_rng_state(), torch.cuda.get_rng_state(device)


class Surroundings:
    """What a call of a module depends on besides its arguments and parameters.

    Made before the call; :meth:`ran` is told after it. Buffers are those of the module, or of its attribute
    ``recomputed`` where it says that no other part changes its own. Autocast's cache of cast parameters is
    not used in either run: what it holds from a run without gradients would cut the parameters from the
    graph.

    Args:
        slots: the parameters.
        random: the random states as they are.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, slots: list[Slot], random: RandomStates
    ) -> None:
        kind = device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), kind
        self._device = device
        self._random, self._slots = random, slots
        buffers = getattr(module, "recomputed", module).buffers() if module.training else ()
        self._buffers = {id(buffer): buffer.clone() for buffer in buffers}
        if self._random is None:
            self._check_capture(module)
        self._versions: list[int | None] = []

    def _check_capture(self, module: nn.Module) -> None:
        """RuntimeError for random draws in a CUDA graph, which cannot be drawn again."""
        drawn = [m for m in module.modules() if isinstance(m, _DropoutNd) and m.training and m.p > 0]
        if drawn:
            raise RuntimeError(
                f"ReversibleSequence: {drawn[0]} draws random numbers while a CUDA graph is captured, "
                "expected reversible=False, or no dropout"
            )

    def ran(self) -> RandomStates:
        """Keep the random states only where the call drew from them; note the parameters' versions.

        Returns:
            The random states as they are now.
        """
        before, after = self._random, random_states(self._device)
        known = before is not None and after is not None
        if known and all(_same(a, b) for a, b in zip(before, after, strict=True)):  # type: ignore[arg-type]
            self._random = None
        parameters = (slot.parameter for slot in self._slots)
        self._versions = [None if p.is_inference() else p._version for p in parameters]
        return after

    def check_unchanged(self, name: str) -> None:
        """RuntimeError where a parameter was written in place since the call, as autograd has it."""
        for (_, _, parameter), version in zip(self._slots, self._versions, strict=True):
            if version is not None and parameter._version != version:
                raise RuntimeError(
                    f"{name}: a parameter of shape {tuple(parameter.shape)} was modified in place between "
                    "the forward and the backward pass, expected the values that the forward pass used"
                )

    def with_parameters(self, module: nn.Module, function: Callable[[], _Result]) -> _Result:
        """``function()`` with the parameters of the call, which may be those of a ``functional_call``."""
        if all(slot.owner.get(slot.name) is slot.parameter for slot in self._slots):
            return function()
        prefixes = {id(part._parameters): f"module.{name}." for name, part in module.named_modules()}
        prefixes[id(module._parameters)] = "module."
        named: dict[str, Tensor] = {prefixes[id(s.owner)] + s.name: s.parameter for s in self._slots}
        return torch.func.functional_call(_Meanwhile(module, function), named, ())

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        enabled, dtype, kind = self._autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Autocast and, to be given back at the end, the random state of the call."""
        with self.autocast():
            if self._random is None:
                yield
                return
            now = random_states(self._device)
            try:
                self._set_random(self._random)
                yield
            finally:
                if now is not None:
                    self._set_random(now)

    def _set_random(self, states: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], self._device)

    def buffers_of(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's buffers as they were, in tensors of their own: running averages move once only."""
        if not self._buffers:
            return {}
        named = module.named_buffers(remove_duplicate=False)
        return {name: self._buffers[id(b)].clone() for name, b in named if id(b) in self._buffers}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.numpy().tobytes() == b.numpy().tobytes())


class _Meanwhile(nn.Module):
    """Runs a function while :func:`torch.func.functional_call` has changed a module's parameters."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self) -> Any:
        return self.function()


class _Method(nn.Module):
    """A method of a module as a module, which :func:`torch.func.functional_call` takes."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.module if self.method == "forward" else getattr(self.module, self.method)
        return run(*args, **kwargs)


class Recorded:
    """Outputs of a module, recorded for gradients apart from any graph around it.

    Parameters are stood in for by leaves that share their memory, so that hooks on a parameter run once, on
    the gradient that it gets in the end.

    Attributes:
        output: what the module returned.
    """

    def __init__(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], buffers: Mapping[str, Tensor]
    ) -> None:
        self._parameters: dict[nn.Parameter, Tensor] = {}
        named = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter not in self._parameters:
                leaf = parameter.detach().requires_grad_(parameter.requires_grad)
                self._parameters[parameter] = leaf
            named["module." + name] = self._parameters[parameter]
        named.update({"module." + name: buffer for name, buffer in buffers.items()})
        self._args = [_leaf(arg) for arg in args]
        self._kwargs = {name: _leaf(arg) for name, arg in kwargs.items()}
        with torch.enable_grad():
            self.output = torch.func.functional_call(
                _Method(module, "forward"), named, tuple(self._args), self._kwargs
            )

    def gradients(
        self, pairs: Sequence[tuple[Tensor, Tensor | None]]
    ) -> tuple[list[Tensor | None], dict[str, Tensor], dict[nn.Parameter, Tensor]]:
        """Gradients of outputs, each paired with its own: by arguments, keyword arguments and parameters."""
        recorded = [(output, grad) for output, grad in pairs if grad is not None and output.requires_grad]
        leaves = [*self._args, *self._kwargs.values(), *self._parameters.values()]
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        found: dict[int, Tensor | None] = {}
        if recorded and wanted:
            outputs, grads = zip(*recorded, strict=True)
            grads_of = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
            found = {id(leaf): grad for leaf, grad in zip(wanted, grads_of, strict=True)}
        by_name = {name: found.get(id(leaf)) for name, leaf in self._kwargs.items()}
        by_parameter = {p: found.get(id(leaf)) for p, leaf in self._parameters.items()}
        return (
            [found.get(id(leaf)) for leaf in self._args],
            {name: grad for name, grad in by_name.items() if grad is not None},
            {p: grad for p, grad in by_parameter.items() if grad is not None},
        )


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_(value.requires_grad)


class Recompute:
    """Runs a module, or one of its parts, as it ran in the forward pass; given to
    ``backward_from_output``."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Recorded:
        """The module's forward pass with gradients recorded."""
        return Recorded(module, args, kwargs, self._surroundings.buffers_of(module))

    def inverse(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's ``inverse`` without gradients."""
        buffers = self._surroundings.buffers_of(module)
        with torch.no_grad():
            if not buffers:
                return module.inverse(*args, **kwargs)  # type: ignore[operator]
            named = {"module." + name: buffer for name, buffer in buffers.items()}
            return torch.func.functional_call(_Method(module, "inverse"), named, args, kwargs)
