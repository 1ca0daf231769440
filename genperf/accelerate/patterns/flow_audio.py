"""The 1x1 convolutions over channels of WaveGlow and, in groups of channels with a mask, of Glow-TTS.

Both take the logarithm of the determinant, which is NaN where that is negative; here it is log|det|. Both
keep the inverse in an attribute that is no part of the state_dict and grows stale; here it is that of the
weight as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._flow import Matrix, hooked, taken, transformed
from genperf.accelerate._flow_probe import Candidate, decided
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.ops.slogdet_inverse import slogdet_inverse


def find(module: nn.Module, cls: Any, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a layer of such a model."""
    conv, parameters = module._modules.get("conv"), module._parameters
    if (
        isinstance(conv, nn.Conv1d)
        and not parameters
        and set(module._modules) == {"conv"}
        and conv.bias is None
        and conv.kernel_size == (1,)
        and conv.in_channels == conv.out_channels
        and "weight" in conv._parameters
        and "reverse" in _arguments(cls)
    ):
        yield from decided(module, cls, [_sequence(module, cls)], options)
    elif set(parameters) == {"weight"} and hasattr(module, "n_split") and hasattr(module, "no_jacobian"):
        yield from decided(module, cls, [_groups(module, cls)], options)


def _arguments(cls: Any) -> tuple[str, ...]:
    code = getattr(cls.forward, "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount]


def _as_at_first(module: Any, weight: Tensor) -> None:
    """A positive determinant, and no inverse that was kept."""
    with torch.no_grad():
        weight.copy_(torch.eye(len(weight)).view(weight.shape))
    for name in ("W_inverse", "weight_inv"):
        vars(module).pop(name, None)


def _sequence(module: Any, cls: Any) -> Candidate:
    def forward(self: Any, z: Tensor, reverse: bool = False) -> Any:
        weight = self.conv.weight
        x = None if hooked(self.conv) else taken(z, weight, (3,), len(weight))
        if x is None:
            return cls.forward(self, z, reverse)
        if reverse:
            return transformed(x, Matrix(weight.detach()), inverse=True)[0]
        y, logdet = transformed(x, Matrix(weight))
        return y, logdet.sum()

    def runs(m: Any, x: Tensor, reverse: bool) -> Any:
        vars(m).pop("W_inverse", None)
        return m(x, reverse=reverse)

    return Candidate(
        f"{cls.__name__}.forward",
        "invertible_conv1x1",
        ("waveglow.conv", cls),
        {"forward": forward},
        {"forward": lambda m, x: runs(m, x, False), "reverse": lambda m, x: runs(m, x, True)},
        (2, module.conv.in_channels, 5),
        ready=lambda m: _as_at_first(m, m.conv.weight),
    )


def _groups(module: Any, cls: Any) -> Candidate:
    def forward(self: Any, x: Tensor, x_mask: Any = None, reverse: bool = False, **others: Any) -> Any:
        given = taken(x, self.weight, (3,))
        if given is None or given.shape[1] % self.n_split:
            return cls.forward(self, x, x_mask, reverse=reverse, **others)
        (batch, channels, length), half = given.shape, self.n_split // 2
        groups = channels // self.n_split
        mixed = given.view(batch, 2, groups, half, length).transpose(2, 3)
        found = slogdet_inverse(self.weight)
        matrix = Matrix(self.weight, slogdet=found)
        y, _ = transformed(mixed.reshape(batch, 2 * half, groups, length), matrix, inverse=bool(reverse))
        y = y.view(batch, 2, half, groups, length).transpose(2, 3).reshape(given.shape)
        logdet: Any = None
        if not reverse and self.no_jacobian:
            logdet = 0
        elif not reverse:
            positions = y.new_full((batch,), length) if x_mask is None else x_mask.sum([1, 2])
            logdet = found.logabsdet * groups * positions
        return y if x_mask is None else y * x_mask, logdet

    return Candidate(
        f"{cls.__name__}.forward",
        "invertible_conv1x1",
        ("glow-tts.conv", cls),
        {"forward": forward},
        {
            "forward": lambda m, x: m(x),
            "forward with a mask": lambda m, x: m(x, _mask_for(x)),
            "reverse": lambda m, x: m(x, reverse=True),
            "reverse with a mask": lambda m, x: m(x, _mask_for(x), reverse=True),
        },
        (2, 3 * module.n_split, 5),
        ready=lambda m: _as_at_first(m, m.weight),
    )


def _mask_for(x: Tensor) -> Tensor:
    """[B, 1, T] of two sequences, the second of which is shorter."""
    lengths = torch.tensor([x.shape[2], 2])
    return (torch.arange(x.shape[2]) < lengths[:, None])[:, None].to(x.dtype)
