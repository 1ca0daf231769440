"""What an override replaces: a function, the places where it stands, when the original has to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributions.kl as kl_module
from torch import Tensor, nn

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Left(Exception):  # noqa: N818
    """The original has to run, with the reason."""


@dataclass(frozen=True)
class Attribute:
    """A name of a class or of a module."""

    owner: Any
    name: str

    def put(self, new: Any) -> Callable[[], None]:
        """Put ``new`` there; returns what puts the former value back, unless something else stands there."""
        own = vars(self.owner)
        had, old = self.name in own, own.get(self.name)
        setattr(self.owner, self.name, new)

        def undo() -> None:
            if vars(self.owner).get(self.name) is not new:
                return
            if had:
                setattr(self.owner, self.name, old)
            else:
                delattr(self.owner, self.name)

        return undo


@dataclass(frozen=True)
class Divergence:
    """The function for a pair of types in the registry of ``kl_divergence``, and where it is remembered."""

    pair: tuple[type, type]

    def put(self, new: Any) -> Callable[[], None]:
        """As of :class:`Attribute`."""
        registry, memory = kl_module._KL_REGISTRY, kl_module._KL_MEMOIZE
        old = registry[self.pair]

        def change(before: Any, after: Any) -> None:
            if registry.get(self.pair) is before:
                registry[self.pair] = after
            for types, function in list(memory.items()):
                if function is before:
                    memory[types] = after

        change(old, new)
        return lambda: change(new, old)


@dataclass(frozen=True)
class Target:
    """A function that an override replaces.

    Attributes:
        name: what users call.
        places: where it stands.
        original: gives the function that stands there.
        concerns: of the arguments, whether the call is about objects of exactly the class.
        run: ``run(rng, *args, **kwargs)`` gives the result, or raises Left.
        how: the kernel for each ``rng``, for the table.
    """

    name: str
    places: tuple[Any, ...]
    original: Callable[[], Callable[..., Any]]
    concerns: Callable[..., bool]
    run: Callable[..., Any]
    how: dict[str, str]


def check_tensors(*tensors: Any) -> None:
    """Raise Left unless all are plain floating tensors of one dtype and device, outside of transforms."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise Left(f"{type(tensor).__name__}, not a tensor")
        if tensor.layout is not torch.strided or tensor.dtype not in _FLOATS:
            raise Left(f"{tensor.dtype}, {tensor.layout}")
        if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device:
            raise Left("several dtypes or devices")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Left("inside of a transform of torch.func")
    if torch.jit.is_tracing():
        raise Left("traced")
    if torch.is_autocast_enabled(tensors[0].device.type):
        raise Left("autocast")


def check_size(shape: torch.Size, like: Tensor, fewest: int) -> None:
    """Raise Left where the call of a kernel on the CPU costs more than the operations of the original."""
    if shape.numel() < fewest and not like.is_cuda:
        raise Left(f"fewer than {fewest} elements")
