"""A network as a module of the image alone and of what has a row an image; what a call of it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from genperf.accelerate._swap import original_class
from genperf.sampling import CaptureError
from genperf.sampling._model import Adapted, check_mode, dtype_of, unwrapped

_PLAIN = (bool, int, float, str, type(None))


class Unsuited(Exception):  # noqa: N818
    """The network cannot be computed pixel by pixel."""


class Arguments:
    """A call's arguments: the image, which is the first tensor, and all others."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs
        self.leaves, self.spec = tree_flatten((args, kwargs))
        tensors = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        if not tensors:
            raise Unsuited("it is called without an image")
        self.at = tensors[0]
        self.image: Tensor = self.leaves[self.at]
        self.batch, self.shape = len(self.image), tuple(self.image.shape[1:])
        self.channels = self.shape[0] if len(self.shape) == 3 else 1
        self._others = tensors[1:]

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """The other tensors as they are now, by number of the argument."""
        return {f"argument_{i}": self.leaves[i].detach().clone() for i in self._others}

    def key(self, *more: Any) -> Any:
        """Equal for calls that one plan serves."""
        facts: list[Any] = [self.shape, self.image.dtype, self.at, repr(self.spec), *more]
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                facts.append((leaf.dtype, tuple(leaf.shape[1:])))
            elif type(leaf) in _PLAIN:
                facts.append((type(leaf), leaf))
            else:
                raise Unsuited(f"it is called with a {type(leaf).__name__}")
        return tuple(facts)

    def like(self, other: Arguments) -> bool:
        """Whether nothing differs from another call but the image's values."""
        if self is not other and not self._alike(other):
            return False
        rows = other.rows.items()
        return all(_equal(self.leaves[int(n.removeprefix("argument_"))], t) for n, t in rows)

    def again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call has these very arguments, and no container whose contents may differ."""
        if len(args) != len(self._args) or kwargs.keys() != self._kwargs.keys():
            return False
        pairs = [*zip(args, self._args, strict=True), *((kwargs[k], self._kwargs[k]) for k in kwargs)]
        return all(a is b and (isinstance(a, Tensor) or type(a) in _PLAIN) for a, b in pairs)

    def _alike(self, other: Arguments) -> bool:
        if self.spec != other.spec or self.image.shape != other.image.shape:
            return False
        if self.image.dtype != other.image.dtype or len(self.leaves) != len(other.leaves):
            return False
        if self._others != other._others:
            return False
        pairs = [p for p in zip(self.leaves, other.leaves, strict=True) if not isinstance(p[0], Tensor)]
        return all(a is b or (type(a) in _PLAIN and a == b) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


class Network(Adapted):
    """The network as a module of the image and of the tensors that have a row an image."""

    def __init__(self, network: Callable[..., Any], given: Arguments) -> None:
        super().__init__(module_of(network), not_called)
        self._call: tuple[Any, ...] = (network,)  # in a tuple, so that it is no submodule
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in given.leaves]
        self._spec: TreeSpec = given.spec
        self._at = given.at
        self._grid = given.shape[-2:]
        self._form: tuple[Any, torch.Size, tuple[int, ...]] | None = None

    def attach(self, network: Callable[..., Any] | None) -> None:
        self._call = () if network is None else (network,)
        self._inner = () if network is None else (module_of(network),)  # type: ignore[assignment]

    def forward(self, x: Tensor, *_: Any, **rows: Tensor) -> Any:
        leaves = list(self._leaves)
        leaves[self._at] = x
        for name, tensor in rows.items():
            leaves[int(name.removeprefix("argument_"))] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        rebuild, output = located(self._call[0](*args, **kwargs))
        strides = output.stride()
        order = sorted(range(output.dim()), key=lambda d: -strides[d])
        self._form = rebuild, output.shape[1:], tuple(order)
        if output.dtype != torch.float32:
            raise ValueError(f"its output is {output.dtype}, expected torch.float32")
        return output

    def empty(self, batch: int) -> Tensor:
        """The output [batch, ...] with nothing known, in the memory layout of the network."""
        assert self._form is not None
        _, shape, order = self._form
        with torch.inference_mode(False):
            buffer = torch.empty_permuted(
                (batch, *shape), order if order[0] == 0 else tuple(range(len(order)))
            )
        return buffer.fill_(torch.nan)

    def cell(self, buffer: Tensor, y: int, x: int) -> Tensor:
        """A view of the output at one pixel."""
        if buffer.shape[-2:] == self._grid and buffer.dim() > 2:
            return buffer[..., y, x]
        return buffer[:, y, x]

    def rebuilt(self, buffer: Tensor) -> Any:
        assert self._form is not None
        return self._form[0](buffer)


def located(output: Any) -> tuple[Callable[[Tensor], Any], Tensor]:
    """The first float tensor of a network's output, and how to make such an output of another one."""
    if isinstance(output, Tensor):
        return _itself, output
    if isinstance(output, Mapping):
        for key, value in output.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return partial(_mapping, type(output), key), value
    if type(output) in (tuple, list):
        for i, value in enumerate(output):
            if isinstance(value, Tensor) and value.is_floating_point():
                return partial(_sequence, type(output), i, len(output)), value
    raise ValueError(f"its output is a {type(output).__name__} that is not known")


def _itself(output: Tensor) -> Tensor:
    return output


def _mapping(cls: Any, key: Any, output: Tensor) -> Any:
    made = cls()
    made[key] = output
    return made


def _sequence(cls: Any, i: int, length: int, output: Tensor) -> Any:
    return cls(output if j == i else None for j in range(length))


def not_called(*_: Any) -> Any:
    raise AssertionError("not to be called")


def module_of(network: Any) -> nn.Module:
    """The module that is called, directly or by its bound forward."""
    return unwrapped(network if isinstance(network, nn.Module) else network.__self__)


def check_suited(module: nn.Module, given: Arguments) -> None:
    if given.image.device.type != "cpu":
        raise Unsuited(f"it samples on {given.image.device.type}, not on the CPU")
    if dtype_of(module) != torch.float32 or torch.is_autocast_enabled("cpu"):
        raise Unsuited("the network is not in float32")
    if hooked := hooks_of(module):
        raise Unsuited(f"{hooked} has hooks, which run at each call")
    if len(given.shape) not in (2, 3):
        raise Unsuited(f"it is called with images {given.shape}")
    if any(t.dim() == 0 or len(t) not in (1, given.batch) for t in given.rows.values()):
        raise Unsuited("it is called with a tensor that has no row for each image")
    try:
        check_mode(module)
    except CaptureError as error:
        raise Unsuited(str(error)) from error


def hooks_of(module: nn.Module) -> str:
    """The name of a module that has hooks other than those of torch's own (weight_norm)."""
    for name, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(not type(hook).__module__.startswith("torch.nn.utils") for hook in hooks):
            return name or "the network"
    return ""


@contextmanager
def originals(module: nn.Module) -> Iterator[None]:
    """Recording sees the modules' own forward, not that of a kernel."""
    swapped = [(m, type(m)) for m in module.modules() if original_class(type(m)) is not type(m)]
    for m, cls in swapped:
        m.__class__ = original_class(cls)
    try:
        yield
    finally:
        for m, cls in swapped:
            m.__class__ = cls
