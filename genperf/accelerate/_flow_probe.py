"""Recognising flow layers: short runs of a layer as it is and as it would be replaced, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from genperf import _op
from genperf.accelerate._noise import NoiseTape
from genperf.accelerate._pattern import Finder, Match, Options, Refusal
from genperf.accelerate._swap import original_class, restore_class, swapped_class
from genperf.ops.invertible_conv1x1 import invertible_conv1x1

Run = Callable[[Any, Tensor], Any]
_PLAIN = (bool, int, float, str, type(None))
_TOLERANCE = 1e-9
_results: dict[Hashable, str] = {}


@dataclass
class Candidate:
    """What a layer may be, and what would take the place of its methods.

    Attributes:
        runs: calls to compare, by name, each of a copy of the layer and an input of ``shape``.
        nets: names of the coupling networks, which a small one stands for, with its channels out.
        ready: sets a copy's flag of a data-dependent initialisation.
        layers: finds the layers inside; those named in ``folded`` are taken together.
    """

    was: str
    kernel: str
    key: Hashable
    methods: Mapping[str, Callable[..., Any]]
    runs: Mapping[str, Run]
    shape: tuple[int, ...]
    nets: Mapping[str, int] = field(default_factory=dict)
    ready: Callable[[Any], object] = lambda module: None
    layers: Finder | None = None
    folded: tuple[str, ...] = ()


def decided(
    module: nn.Module, cls: type, candidates: Iterable[Candidate], options: Options
) -> Iterator[Match | Refusal]:
    """A match for the first candidate that computes what the layer does; else why none of them does."""
    if cls.__module__.partition(".")[0] == "genperf":  # its own, which look alike
        return
    refusal = None
    for candidate in candidates:
        reason = disagreement(module, cls, candidate, options)
        if not reason:
            backend = "torch" if candidate.kernel.startswith("none") else _backend_for(module)
            yield Match(candidate.was, candidate.kernel, candidate.key, dict(candidate.methods), backend)  # type: ignore[arg-type]
            return
        refusal = refusal or Refusal(candidate.was, reason)
    if refusal is not None:
        yield refusal


def disagreement(module: nn.Module, cls: type, candidate: Candidate, options: Options) -> str:
    """How the candidate differs from the original; "" if in nothing, also not in gradients and state."""
    own = sorted(name for name in candidate.methods if name in module.__dict__)
    if own:
        return f"{', '.join(own)} is set on the module itself"
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return "it is on the meta device, where nothing can be probed"
    alike = _signature(module, tuple(candidate.nets))
    key = (candidate.key, candidate.shape, alike)
    if alike is None or key not in _results:
        if len(_results) > 1000:
            _results.clear()
        _results[key] = _compared(module, cls, candidate, options)
    return _results[key]


def _compared(module: nn.Module, cls: type, candidate: Candidate, options: Options) -> str:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            original, replaced = (_small_copy(module, cls, candidate) for _ in range(2))
            for part in list(replaced.modules())[1:] if candidate.layers else ():
                for found in candidate.layers(part, type(part), options):  # type: ignore[misc]
                    if isinstance(found, Match):
                        part.__class__ = swapped_class(type(part), (found.key,), found.methods)
            for name in candidate.folded:
                if getattr(type(replaced.get_submodule(name)), "_genperf_map", None) is None:
                    return f"its {name} is left alone"
            replaced.__class__ = swapped_class(cls, (candidate.key,), dict(candidate.methods))  # type: ignore[arg-type]
            for training in (True, False):
                for name, run in candidate.runs.items():
                    for one in (original, replaced):
                        one.train(training)
                    if reason := _difference(original, replaced, run, candidate.shape):
                        return f"{name}{' in training' if training else ''}: {reason}"
    except _CannotRun as error:
        return str(error)
    finally:
        torch.random.set_rng_state(state)
        torch.set_num_threads(threads)
    return ""


class _CannotRun(Exception):  # noqa: N818
    pass


def _difference(original: nn.Module, replaced: nn.Module, run: Run, shape: tuple[int, ...]) -> str:
    try:
        theirs = _observed(original, run, shape)
    except Exception as error:
        raise _CannotRun(
            f"it cannot be run alone: {type(error).__name__}: {error}".splitlines()[0]
        ) from error
    try:
        ours = _observed(replaced, run, shape)
    except Exception as error:
        return f"what would replace it fails: {type(error).__name__}: {error}".splitlines()[0]
    for name in dict.fromkeys((*theirs, *ours)):
        if name not in theirs or name not in ours:
            return f"{name} is not as expected"
        a, b = theirs[name], ours[name]
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return f"{name} is not as expected"
        if not isinstance(a, Tensor):
            if a != b:
                return f"{name} is {a}, expected {b}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} is {a.dtype} {tuple(a.shape)}, expected {b.dtype} {tuple(b.shape)}"
        elif a.is_contiguous() and not b.is_contiguous():
            return f"{name} is laid out in another way"
        elif not torch.allclose(a, b, _TOLERANCE, _TOLERANCE * max(_size(a), 1.0), equal_nan=True):
            return f"{name} is another than expected"
    return ""


def _size(x: Tensor) -> float:
    return x.abs().amax().item() if x.numel() and x.dtype != torch.bool else 0.0


def _observed(module: nn.Module, run: Run, shape: tuple[int, ...]) -> dict[str, Any]:
    """What a call returns, the gradients of a fixed linear function of it, and the state afterwards."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    module.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with NoiseTape().replay(in_float64=True):
        result = run(module, x)
    seen: dict[str, Any] = dict(_leaves(result, "its result"))
    tensors = {name: v for name, v in seen.items() if isinstance(v, Tensor)}
    seen.update({f"whether {name} has a gradient": v.requires_grad for name, v in tensors.items()})
    outputs = [v for v in tensors.values() if v.requires_grad]
    weights = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in outputs]
    torch.autograd.backward(outputs, weights)
    seen = {k: v.detach() if isinstance(v, Tensor) else v for k, v in seen.items()}
    seen["the gradient of its input"] = x.grad
    for name, parameter in module.named_parameters():
        seen[f"the gradient of {name}"] = parameter.grad
        seen[f"{name} afterwards"] = parameter.detach()
    seen.update({f"{name} afterwards": buffer for name, buffer in module.named_buffers()})
    return {
        k: v.double() if isinstance(v, Tensor) and not v.is_floating_point() else v for k, v in seen.items()
    }


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        yield f"the form of {name}", type(value)
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    else:
        yield name, value if isinstance(value, (Tensor, *_PLAIN)) else type(value)


class StandIn(nn.Module):
    """In the place of a coupling network: a pixel's parameters from the pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.zeros(channels, 2, dtype=torch.float64))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        mixed = torch.stack([x.sum(1), (x * x).mean(1)], -1) @ self.weight.t()
        return mixed.movedim(-1, 1).contiguous()


def any_layout(net: Any) -> bool:
    """Whether a network takes an image with its channels last, which one that views it would not."""
    channels = next((part.in_channels for part in net.modules() if isinstance(part, nn.Conv2d)), 0)
    if not channels or any(p.is_meta for p in net.parameters()):
        return False
    key = ("any_layout", channels, _signature(net, ()))
    if None in key or key not in _results:
        _results[key] = "" if _same_in_any_layout(net, channels) else "it depends on the layout"
    return not _results[key]


def _same_in_any_layout(net: nn.Module, channels: int) -> bool:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        net = copy.deepcopy(net).double().cpu()
        for p in net.parameters():
            p.requires_grad_(False)
        x = torch.randn(2, channels, 3, 5, dtype=torch.float64).requires_grad_()
        found = []
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(5)
            with torch.enable_grad():
                y = net(x.contiguous(memory_format=layout))
                found.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        return all(torch.allclose(a, b) for a, b in zip(*found, strict=True))
    except Exception:
        return False
    finally:
        torch.random.set_rng_state(state)
        torch.set_num_threads(threads)


def _small_copy(module: nn.Module, cls: type, candidate: Candidate) -> Any:
    memo: dict[int, Any] = {id(module.get_submodule(n)): StandIn(c) for n, c in candidate.nets.items()}
    made = copy.deepcopy(module, memo)
    pairs = list(zip(_without(module, memo), _without(made, memo), strict=True))
    for _, new in pairs:
        restore_class(new)
        for name, value in vars(new).items():
            if isinstance(value, FunctionType):  # a lambda of ``self`` still means the original
                vars(new)[name] = _closed_over(value, {id(a): b for a, b in pairs})
            elif isinstance(value, Tensor) and value.is_floating_point():
                vars(new)[name] = value.detach().double().cpu()
    made.double().cpu()
    candidate.ready(made)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad and p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.add_(noise, alpha=0.25 / math.sqrt(max(1, p[0].numel() if p.dim() else 1)))
    return made


def _without(module: nn.Module, memo: dict[int, Any]) -> list[nn.Module]:
    """The modules of ``module`` but the networks that something stands for, and these stand-ins."""
    left = [module]
    found = []
    while left:
        one = left.pop()
        if (id(one) in memo and isinstance(memo[id(one)], StandIn)) or isinstance(one, StandIn):
            continue
        found.append(one)
        left += [child for child in one._modules.values() if child is not None]
    return found


def _closed_over(function: FunctionType, new: dict[int, Any]) -> FunctionType:
    cells = tuple(CellType(new.get(id(c.cell_contents), c.cell_contents)) for c in function.__closure__ or ())
    if not cells:
        return function
    return FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )


def _signature(module: nn.Module, nets: tuple[str, ...]) -> Hashable:
    """Equal for layers that differ in nothing but the values of their parameters; None where that is open."""
    parts: list[Any] = []
    for name, part in module.named_modules():
        if any(name == net or name.startswith(f"{net}.") for net in nets):
            continue
        parts.append((name, original_class(type(part))))
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers", "_modules", "training"):
                continue
            plain = _plain(value)
            if plain is None:
                return None
            parts.append((key, plain))
        parts += [(n, p.shape, p.requires_grad) for n, p in part._parameters.items() if p is not None]
        for n, b in part._buffers.items():
            if b is not None:
                whole = b.numel() <= 4096 and not b.is_floating_point() and b.numel() != 1
                parts.append((n, b.shape, b.dtype, tuple(b.flatten().tolist()) if whole else ()))
    return tuple(parts)


def _plain(value: Any) -> Hashable:
    """What of an attribute tells layers apart; None where that is not known."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, FunctionType):
        return value.__code__, value.__defaults__ if value.__defaults__ is None else len(value.__defaults__)
    if isinstance(value, Tensor):
        return Tensor, value.shape
    if isinstance(value, (tuple, list, set, dict)):
        items = list(value.items()) if isinstance(value, dict) else list(value)
        parts = [_plain(item) for item in items]
        return None if None in parts else (type(value), *parts)
    if isinstance(value, nn.Module):
        return None
    return type(value), getattr(value, "shape", None)


def _backend_for(module: nn.Module) -> str:
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is None:
        return "-"
    x, weight = like.new_zeros(1, 2, 2), torch.eye(2, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        choices = _op.explain(invertible_conv1x1, x, weight).choices
    return choices[-1].backend if choices else "-"
