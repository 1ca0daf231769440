"""Runs one provider on one case: what is timed, and whether its result is right."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .case import GRADIENT_MODES, Benchmark, Case, CheckError, Function, Inputs

SEED = 20240607
_DEVICE_OF_BACKEND = {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}

# A result passes at 2 * err(eager) + floor, and never above the cap; see `check`.
_FLOOR_IN_EPS = 8
_CAP = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Provider:
    """A named way to compute a benchmark's op; ``unusable`` says why it cannot run on this device."""

    name: str
    function: Function
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    unusable: str | None = None


def providers(benchmark: Benchmark, device: torch.device) -> list[Provider]:
    """The providers of a benchmark for a device, eager first."""
    found = [Provider(name, function) for name, function in benchmark.baselines.items()]
    found.sort(key=lambda provider: provider.name != "eager")
    if benchmark.compile and "eager" in benchmark.baselines:
        found.append(Provider("compile", torch.compile(benchmark.baselines["eager"], dynamic=False)))
    if benchmark.genperf is not None:
        for backend in benchmark.backends:
            if device.type in _DEVICE_OF_BACKEND[backend]:
                reason = _backend.unusable(backend, device.type)
                context = functools.partial(_backend.backend, backend)
                found.append(Provider(f"genperf/{backend}", benchmark.genperf, context, reason))
    return found


@dataclass
class Problem:
    """A case's inputs on a device, with the leaves and cotangents of its backward."""

    benchmark: Benchmark
    case: Case
    device: torch.device
    inputs: Inputs = field(init=False)
    leaves: dict[str, Tensor] = field(init=False)
    _cotangents: dict[tuple[int, ...], Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(SEED)
        self.inputs = self.benchmark.inputs(self.case.shape, self.case.dtype, self.device)
        self.leaves = {
            name: value
            for name, value in self.inputs.items()
            if isinstance(value, Tensor) and value.requires_grad
        }

    @functools.cached_property
    def floor(self) -> float:
        """Seconds that this machine needs at least, by the benchmark's own measure."""
        assert self.benchmark.floor is not None
        return self.benchmark.floor(self.inputs)

    def cotangents(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One for each output, the same values for every provider and the reference."""
        found = []
        for i, output in enumerate(outputs):
            key = (i, *output.shape)
            if key not in self._cotangents:
                generator = torch.Generator().manual_seed(SEED + i)
                values = torch.randn(output.shape, generator=generator).to(self.case.dtype)
                self._cotangents[key] = values.to(self.device)
            found.append(self._cotangents[key].to(output.dtype))
        return tuple(found)

    def steps(self, function: Function, mode: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        """``(prepare, run)``: only ``run(prepare())`` less ``prepare()`` is timed. It returns new tensors."""
        inputs, leaves = self.inputs, tuple(self.leaves.values())

        def forward(_: object = None) -> tuple[Tensor, ...]:
            return function(**inputs)

        def pair() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            outputs = differentiable(function(**inputs))
            return outputs, self.cotangents(outputs)

        def backward(state: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(state[0], leaves, state[1])

        if mode not in GRADIENT_MODES:
            return (lambda: None), forward
        if not leaves:
            raise ValueError(f"{self.benchmark.op}: mode {mode!r} needs an input that requires a gradient")
        if mode == "bwd":
            return pair, backward
        cotangents = self.cotangents(differentiable(function(**inputs)))

        def both(_: object) -> tuple[Tensor, ...]:
            outputs = differentiable(function(**inputs))
            return outputs + torch.autograd.grad(outputs, leaves, cotangents)

        return (lambda: None), both

    def result(self, function: Function, mode: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Outputs, and gradients by leaf for the modes that have them, from a known random state."""
        torch.manual_seed(SEED)
        with gradients(mode):
            outputs = function(**self.inputs)
            if mode not in GRADIENT_MODES:
                return outputs, {}
            roots = differentiable(outputs)
            grads = torch.autograd.grad(roots, tuple(self.leaves.values()), self.cotangents(roots))
        return tuple(output.detach() for output in outputs), dict(zip(self.leaves, grads, strict=True))

    def truth(
        self, provider: str, mode: str, outputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Outputs and gradients of the reference in float64, for what this provider drew."""
        inputs = {
            name: value.detach().double().requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.inputs.items()
        }
        torch.manual_seed(SEED)
        if self.benchmark.draws is not None:
            inputs.update(self.benchmark.draws(provider, self.inputs, outputs))
        expected = self.benchmark.reference(**inputs)
        if mode not in GRADIENT_MODES:
            return tuple(output.detach() for output in expected), {}
        roots = differentiable(expected)
        grads = torch.autograd.grad(roots, [inputs[name] for name in self.leaves], self.cotangents(roots))
        return tuple(output.detach() for output in expected), dict(zip(self.leaves, grads, strict=True))


def differentiable(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(output for output in outputs if output.requires_grad)


@contextlib.contextmanager
def gradients(mode: str) -> Iterator[None]:
    """Gradient recording as the mode wants it: off for ``fwd`` and ``sample``."""
    with torch.set_grad_enabled(mode in GRADIENT_MODES or mode == "train_step"):
        yield


def errors(problem: Problem, provider: Provider, mode: str) -> dict[str, float]:
    """The error of each result the mode produces, against the reference in float64.

    Floating point: ``max |x - truth| / max |truth|``. Integers: the share of elements that differ.
    Raises CheckError where a result has the wrong shape, or a NaN or infinity that the truth has not.
    """
    outputs, grads = problem.result(provider.function, mode)
    true_outputs, true_grads = problem.truth(provider.name, mode, outputs)
    if len(outputs) != len(true_outputs):
        raise CheckError(f"{len(outputs)} outputs, expected {len(true_outputs)}")
    pairs = {f"gradient of {name}": (grads[name], true_grads[name]) for name in grads}
    if mode != "bwd":
        pairs |= {f"output {i}": pair for i, pair in enumerate(zip(outputs, true_outputs, strict=True))}
    return {name: _error(name, actual, true) for name, (actual, true) in pairs.items()}


def _error(name: str, actual: Tensor, true: Tensor) -> float:
    if actual.shape != true.shape:
        raise CheckError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(true.shape)}")
    if actual.numel() == 0:
        return 0.0
    if not actual.is_floating_point():
        return (actual != true).double().mean().item()
    actual = actual.double()
    if not torch.equal(actual.isfinite(), true.isfinite()):
        raise CheckError(f"{name}: not finite where the truth is")
    scale = true.abs().nan_to_num(0, 0, 0).max().item() or 1.0
    return (actual - true).nan_to_num(0, 0, 0).abs().max().item() / scale


def check(problem: Problem, found: dict[str, float], eager: dict[str, float] | None) -> str:
    """``"ok"``, or ``"fail: ..."``: each error at most ``2 * eager's + 8 eps``, and below a cap.

    The cap (1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16) holds for eager too.
    """
    dtype = problem.case.dtype
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    cap = _CAP.get(dtype, 0.0)
    for name, error in found.items():
        limit = cap if eager is None else min(cap, 2 * eager.get(name, 0.0) + _FLOOR_IN_EPS * eps)
        if not error <= limit:
            return f"fail: {name}: error {error:.1e} above {limit:.1e}"
    return "ok"
