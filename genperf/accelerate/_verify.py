"""The accelerated model against the original, both measured by the original in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from genperf.accelerate._noise import NoiseMismatch, NoiseTape
from genperf.accelerate._swap import restore_class

#: Errors below this many units of roundoff are never held against the accelerated model.
FLOOR_ULPS = 4.0
#: A gradient that is zero but for rounding is measured by this share of the largest gradient.
SMALLEST_GRADIENT = 1e-3

Call = Callable[..., Any]


@dataclass(frozen=True)
class Comparison:
    """Errors of one tensor against the float64 run, relative to its largest magnitude there.

    A gradient far smaller than the largest one is measured by ``SMALLEST_GRADIENT`` of that.
    """

    name: str
    original: float
    accelerated: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.accelerated <= self.allowed


@dataclass
class Verification:
    """What :meth:`Report.verify` measured. True when every comparison passed; prints as a table.

    Attributes:
        comparisons: one for each output, input gradient and parameter gradient.
        failure: why the runs cannot be compared at all, or None.
        original_s, accelerated_s: median seconds of a call (on the CPU: CPU time, with one thread).
        timed: what was timed, "forward" or "forward + backward".
    """

    comparisons: list[Comparison] = field(default_factory=list)
    failure: str | None = None
    original_s: float = math.nan
    accelerated_s: float = math.nan
    timed: str = "forward"
    clock: str = "CPU time"

    @property
    def passed(self) -> bool:
        return self.failure is None and bool(self.comparisons) and all(c.passed for c in self.comparisons)

    @property
    def speedup(self) -> float:
        """Seconds of the original over seconds of the accelerated model."""
        return self.original_s / self.accelerated_s

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        if self.failure is not None:
            return f"verification failed: {self.failure}"
        rows = [
            (
                c.name,
                f"{c.original:.2e}",
                f"{c.accelerated:.2e}",
                f"{c.allowed:.2e}",
                "ok" if c.passed else "FAILED",
            )
            for c in _condensed(self.comparisons)
        ]
        headers = ("against the original in float64", "original", "accelerated", "allowed", "")
        table = tabulate(rows, headers=headers, disable_numparse=True)
        if math.isnan(self.original_s):
            return table
        return (
            f"{table}\n\n{self.timed}: {1e3 * self.original_s:.3g} ms originally, "
            f"{1e3 * self.accelerated_s:.3g} ms accelerated: {self.speedup:.2f}x ({self.clock}, medians)"
        )

    __repr__ = __str__


def verify(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    call: Call | None = None,
    gradients: bool = True,
    training: bool = False,
    seconds: float = 2.0,
) -> Verification:
    """Compare ``model``, an accelerated one, with its original; see :meth:`Report.verify`."""
    call = call or _forward
    accelerated = copy.deepcopy(model)
    original = _restored(copy.deepcopy(model))
    exact = _in_float64(copy.deepcopy(original))
    gradients = gradients and any(p.requires_grad for p in model.parameters())
    tape = NoiseTape()
    with _random_state_preserved():
        with tape.record():
            of_original = _observe(original, inputs, kwargs, call, gradients, False)
        expected, reason = _replayed(tape, True, exact, inputs, kwargs, call, gradients)
        of_accelerated: dict[str, Tensor] = {}
        if not reason:
            of_accelerated, reason = _replayed(tape, False, accelerated, inputs, kwargs, call, gradients)
        different = set(expected) ^ set(of_accelerated) | set(expected) ^ set(of_original)
        if not reason and different:
            reason = f"the runs do not give the same tensors: {', '.join(sorted(different))}"
        if reason:
            return Verification(failure=reason)
        result = Verification()
        result.comparisons = _comparisons(expected, of_original, of_accelerated)
        if seconds > 0:
            _time(result, original, accelerated, inputs, kwargs, call, gradients and training, seconds)
    return result


def _replayed(
    tape: NoiseTape,
    exact: bool,
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    call: Call,
    gradients: bool,
) -> tuple[dict[str, Tensor], str]:
    """What a run with the recorded noise gives, or why it cannot be compared."""
    which = "the original in float64" if exact else "the accelerated model"
    try:
        with tape.replay(in_float64=exact):
            return _observe(model, inputs, kwargs, call, gradients, exact), ""
    except NoiseMismatch as error:
        return {}, f"{which} does not draw the same noise ({error})"
    except Exception as error:
        return {}, f"{which} does not run: {type(error).__name__}: {error}"


def _forward(model: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
    return model(*inputs, **kwargs)


def _restored(model: nn.Module) -> nn.Module:
    for module in model.modules():
        restore_class(module)
    return model


def _in_float64(model: nn.Module) -> nn.Module:
    """``model`` with its parameters, buffers and plain tensor attributes in float64."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.double()
    return model.double()


def _observe(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    call: Call,
    gradients: bool,
    exact: bool,
) -> dict[str, Tensor]:
    """The outputs of one call by name, and the gradients of a fixed linear function of them."""
    inputs, kwargs = _prepared((inputs, kwargs), exact, gradients)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(gradients):
        outputs = dict(_tensors(call(model, *inputs, **kwargs), "output"))
    seen = {name: value.detach() for name, value in outputs.items()}
    if gradients:
        pairs = [
            (value, _cotangent(i, value)) for i, value in enumerate(outputs.values()) if value.requires_grad
        ]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [weight for _, weight in pairs])
        given = (*_tensors(inputs, "gradient of input"), *_tensors(kwargs, "gradient of input"))
        for name, value in given:
            if value.grad is not None:
                seen[name] = value.grad
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[f"gradient of {name}"] = parameter.grad
    return seen


def _cotangent(i: int, value: Tensor) -> Tensor:
    """Weights that depend on nothing but the position of the output and its shape."""
    generator = torch.Generator().manual_seed(i)
    return torch.randn(value.shape, generator=generator).to(value)


def _prepared(value: Any, exact: bool, gradients: bool) -> Any:
    """A copy of the inputs, floating tensors cast to float64 if ``exact``, and of generators."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        cast = value.detach().double() if exact else value.detach()
        return cast.clone().requires_grad_(gradients)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, Mapping):
        result = copy.copy(value)
        for key in value:
            result[key] = _prepared(value[key], exact, gradients)  # type: ignore[index]
        return result
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_prepared(item, exact, gradients) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_prepared(item, exact, gradients) for item in value)
    return value


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors in nested tuples, lists, mappings and dataclasses, with their paths."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from _tensors(getattr(value, one.name), f"{name}.{one.name}")


def _comparisons(
    exact: dict[str, Tensor], original: dict[str, Tensor], accelerated: dict[str, Tensor]
) -> list[Comparison]:
    sizes = {name: _size(value) for name, value in exact.items()}
    smallest = SMALLEST_GRADIENT * max((sizes[name] for name in sizes if _is_gradient(name)), default=0.0)
    result = []
    for name, value in exact.items():
        size = max(sizes[name], smallest if _is_gradient(name) else 0.0) or 1.0
        of_original = _error(value, original[name], size)
        allowed = 2 * of_original + FLOOR_ULPS * torch.finfo(original[name].dtype).eps
        result.append(Comparison(name, of_original, _error(value, accelerated[name], size), allowed))
    return result


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient of ")


def _size(value: Tensor) -> float:
    finite = value[value.isfinite()]
    return finite.abs().amax().item() if finite.numel() else 0.0


def _error(exact: Tensor, actual: Tensor, size: float) -> float:
    if exact.shape != actual.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    actual = actual.double()
    agree = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(agree, 0.0, (actual - exact).abs())
    return difference.nan_to_num(nan=math.inf, posinf=math.inf).amax().item() / size


def _condensed(comparisons: list[Comparison]) -> list[Comparison]:
    """Outputs and input gradients one by one, parameter gradients by their worst, failures always."""
    worst: Comparison | None = None
    rows, count = [], 0
    for c in comparisons:
        if not _is_gradient(c.name) or c.name.startswith("gradient of input") or not c.passed:
            rows.append(c)
            continue
        count += 1
        if worst is None or c.accelerated / c.allowed > worst.accelerated / worst.allowed:
            worst = c
    if worst is not None:
        label = f"gradients of {count} parameters (worst: {worst.name.removeprefix('gradient of ')})"
        rows.append(dataclasses.replace(worst, name=label))
    return rows


def _time(
    result: Verification,
    original: nn.Module,
    accelerated: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    call: Call,
    backward: bool,
    seconds: float,
) -> None:
    """Interleaved calls of both models for about ``seconds``; medians of three or more, without the first."""
    cuda = any(value.is_cuda for value in (*accelerated.parameters(), *accelerated.buffers()))
    clock = time.perf_counter if cuda else time.process_time
    result.timed = "forward + backward" if backward else "forward"
    result.clock = "with the GPU" if cuda else "CPU time of one thread"
    taken: dict[nn.Module, list[float]] = {original: [], accelerated: []}

    def once(model: nn.Module) -> float:
        model.zero_grad(set_to_none=True)
        arguments, keywords = _prepared((inputs, kwargs), False, backward)
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        with torch.set_grad_enabled(backward):
            outputs = [
                v for _, v in _tensors(call(model, *arguments, **keywords), "output") if v.requires_grad
            ]
        if backward and outputs:
            torch.autograd.backward(outputs, [torch.ones_like(v) for v in outputs])
        if cuda:
            torch.cuda.synchronize()
        return clock() - start

    threads = torch.get_num_threads()
    try:
        if not cuda:
            torch.set_num_threads(1)
        order = [original, accelerated]
        start = time.perf_counter()
        for i in range(102):
            for model in order:
                taken[model].append(once(model))
            order.reverse()
            if i >= 3 and time.perf_counter() - start > seconds:
                break
    finally:
        torch.set_num_threads(threads)
    result.original_s = statistics.median(taken[original][1:])
    result.accelerated_s = statistics.median(taken[accelerated][1:])


def _random_state_preserved() -> AbstractContextManager[None]:
    """A context that leaves the default generators as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=list(devices))
