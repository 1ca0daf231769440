"""Runs of a quantizer's method in float64, on a copy of its module with random tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from genperf.accelerate._quantizer import Structure, taken_apart, tensor_of
from genperf.accelerate._quantizer_source import Source, Unknown
from genperf.accelerate._swap import original_class

_SIZES = (2, 3, 5, 4, 7, 6)
TOLERANCE = 1e-9
#: What codebook_statistics sums may be in float32.
STATISTICS = 1e-5
SEED = 17


@dataclass
class Probe:
    """A copy of a module in float64 with random tensors, and an input.

    Attributes:
        rows: the vectors [N, D] of ``x``.
        before: the module's tensors by name.
    """

    module: nn.Module
    x: Tensor
    rows: Tensor
    before: dict[str, Tensor]


@dataclass
class Seen:
    """What one run of the method gave: the structure and leaves of its output, and its tensors afterwards."""

    structure: Structure
    leaves: list[Any]
    after: dict[str, Tensor]

    def same(self, other: Seen) -> bool:
        mine, others = ([*seen.leaves, *seen.after.values()] for seen in (self, other))
        return self.structure == other.structure and all(map(_identical, mine, others))

    def changed(self, probe: Probe) -> set[str]:
        return {name for name, tensor in self.after.items() if not torch.equal(tensor, probe.before[name])}


@dataclass(frozen=True)
class Target:
    """A method to be described, in one mode, for one layout of its input; ``book`` names the codebook."""

    module: nn.Module
    function: Callable[..., Any]
    training: bool
    book: str
    transposed: bool
    rank: int
    dim: int

    def probe(self, seed: int, overrides: dict[str, Any] | None = None, other_layout: bool = False) -> Probe:
        """``overrides``: attributes of the module; ``other_layout``: the input is not contiguous."""
        generator = torch.Generator().manual_seed(seed)
        module = random_copy(self.module, generator, self.training)
        for name, value in (overrides or {}).items():
            setattr(module, name, value)
        book = self.oriented(tensor_of(module, self.book).detach())
        n_codewords, size = book.shape
        sizes = [n for n in _SIZES if n not in (n_codewords, size)]
        grid = [sizes[(i + seed) % len(sizes)] for i in range(self.rank - 1)]
        count = int(torch.tensor(grid).prod())
        # Near a codeword in direction, of another length, so that no two kinds of search agree on all.
        nearby = book[torch.randint(n_codewords, (count,), generator=generator)]
        lengths = torch.rand(count, 1, generator=generator, dtype=torch.float64) * 2 + 0.2
        noise = torch.randn(count, size, generator=generator, dtype=torch.float64)
        rows = nearby * lengths + 0.4 * noise
        x = rows.view(*grid, size).movedim(-1, self.dim).contiguous()
        if other_layout:
            at, to = (self.dim, -1) if self.dim < self.rank - 1 else (-1, 1)
            x = x.movedim(at, to).contiguous().movedim(to, at)
        x = x.detach().requires_grad_()
        before = {name: tensor.detach().clone() for name, tensor in tensors(module)}
        before.setdefault(self.book, book.clone())
        return Probe(module, x, rows.detach(), before)

    def oriented(self, book: Tensor) -> Tensor:
        return book.t() if self.transposed else book

    def run(self, probe: Probe) -> Seen:
        torch.manual_seed(SEED)
        with torch.enable_grad(), probing():
            output = self.function(probe.module, probe.x)
        structure, leaves = taken_apart(output)
        after = {name: tensor.detach() for name, tensor in tensors(probe.module)}
        if after.keys() | {self.book} != probe.before.keys():
            raise Unknown("it makes new parameters or buffers")
        return Seen(structure, leaves, after)


def random_copy(module: nn.Module, generator: torch.Generator, training: bool) -> nn.Module:
    """A copy on the CPU, as its original class, with random tensors in float64 instead of its own."""
    copies: dict[int, Any] = {}

    def of_tensor(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = made = _random_like(tensor.detach(), generator)
            if isinstance(tensor, nn.Parameter):
                copies[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad)
        return copies[id(tensor)]

    def of_module(part: nn.Module) -> nn.Module:
        if id(part) not in copies:
            cls: Any = original_class(type(part))
            copies[id(part)] = made = cls.__new__(cls)
            vars(made).update(vars(part))
            for name, value in vars(part).items():
                if isinstance(value, Tensor):  # such as what it has computed from its buffers
                    vars(made)[name] = None
            for kind, function in (
                ("_parameters", of_tensor),
                ("_buffers", of_tensor),
                ("_modules", of_module),
            ):
                own = {n: None if v is None else function(v) for n, v in vars(part)[kind].items()}
                vars(made)[kind] = own
            made.training = training
        return copies[id(part)]

    return of_module(module)


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.cpu().clone()
    if tensor.numel() == 1:  # a flag, or a temperature
        return tensor.cpu().double().clone()
    if tensor.dim() < 2:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 4 + 1
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


class _AllFloat64(TorchFunctionMode):
    """Makes float64 of what a method makes in float32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        args, kwargs = ([_wide(a) for a in args], {k: _wide(v) for k, v in (kwargs or {}).items()})
        return function(*args, **kwargs)


def _wide(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    is_type = value is torch.FloatTensor or (isinstance(value, str) and value == "torch.FloatTensor")
    return "torch.DoubleTensor" if is_type else value


@contextmanager
def probing() -> Iterator[None]:
    """A context in which torch makes float64 where it would make float32, and there is only one process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _AllFloat64(), _alone():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _alone() -> Iterator[None]:
    """Hides the process group, so that a probe exchanges nothing with other processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    answers = {"is_initialized": False, "get_world_size": 1, "get_rank": 0}
    names = (*answers, "all_reduce", "broadcast", "all_gather", "barrier")
    kept = {name: getattr(distributed, name) for name in names}
    try:
        for name in names:
            answer = answers.get(name)
            setattr(distributed, name, lambda *args, answer=answer, **kwargs: answer)
        yield
    finally:
        for name, function in kept.items():
            setattr(distributed, name, function)


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def codebooks(module: nn.Module, source: Source | None = None) -> Iterator[tuple[str, bool]]:
    """Names of what may be the codebook, and whether it may be [D, K]; of what ``source`` mentions."""
    own = {**module._parameters, **module._buffers}
    properties = {n for base in type(module).__mro__ if base is not nn.Module for n in vars(base)}
    used = {*own, *module._modules, *properties} if source is None else source.names()
    for child, part in module.named_children():
        weight = getattr(part, "weight", None)
        if child in used and isinstance(weight, Tensor) and weight.dim() == 2 and not part._modules:
            if isinstance(part, nn.Linear):
                continue
            if isinstance(part, nn.Embedding):
                unusual = (
                    part.padding_idx,
                    part.max_norm,
                    part.scale_grad_by_freq or None,
                    part.sparse or None,
                )
                if any(option is not None for option in unusual):
                    continue
            yield f"{child}.weight", False
    for name, tensor in own.items():
        if name in used and tensor is not None and tensor.dim() == 2 and tensor.is_floating_point():
            yield name, False
            yield name, True
    probe = random_copy(module, torch.Generator(), False)
    for name in sorted(used - own.keys()):
        if isinstance(inspect.getattr_static(type(probe), name, None), property):
            try:
                value = getattr(probe, name)
            except Exception:  # one that needs more than a random module has
                continue
            if isinstance(value, Tensor) and value.dim() == 2:
                yield name, False


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    a, b = a.detach().double(), b.detach().double()
    size = b.abs().max().item() if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * size)


def rounded(value: float) -> float:
    """Without what rounding left of a number that a person has written."""
    return float(f"{value:.8g}") if abs(value) > 1e-9 else 0.0
