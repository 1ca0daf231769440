"""survae's Conv1x1 (sequences, images, volumes) and actnorm: ``inverse`` returns x alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._flow import Matrix, initialised, taken, transformed
from genperf.accelerate._flow_probe import Candidate, decided
from genperf.accelerate._pattern import Match, Options, Refusal

_BOTH = {"forward": lambda m, x: m.forward(x), "inverse": lambda m, x: m.inverse(x)}


def find(module: nn.Module, cls: Any, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a bijection of the library, or what is written like one."""
    if not callable(getattr(cls, "inverse", None)):
        return
    p = module._parameters
    if set(p) == {"weight"} and hasattr(module, "slogdet_cpu") and p["weight"].dim() == 2:  # type: ignore[union-attr]
        yield from decided(module, cls, [_convolution(module, cls)], options)
    elif set(p) == {"shift", "log_scale"} and p["shift"].dim() > 1 and "initialized" in module._buffers:  # type: ignore[union-attr]
        yield from decided(module, cls, [_actnorm(module, cls)], options)


def _convolution(module: Any, cls: Any) -> Candidate:
    def forward(self: Any, x: Any) -> Any:
        given = taken(x, self.weight, (3, 4, 5), len(self.weight))
        return cls.forward(self, x) if given is None else transformed(given, Matrix(self.weight))

    def inverse(self: Any, z: Any) -> Any:
        given = taken(z, self.weight, (3, 4, 5), len(self.weight))
        return (
            cls.inverse(self, z)
            if given is None
            else transformed(given, Matrix(self.weight), inverse=True)[0]
        )

    return Candidate(
        f"{cls.__name__}.forward, inverse",
        "invertible_conv1x1",
        ("survae.conv", cls),
        {"forward": forward, "inverse": inverse},
        _BOTH,
        (2, len(module.weight), 3, 2),
    )


def _actnorm(module: Any, cls: Any) -> Candidate:
    at_first = not module.shift.is_meta and bool(module.initialized)

    def forward(self: Any, x: Any) -> Any:
        given = taken(x, self.shift, (self.shift.dim(),), self.shift.shape[1])
        if given is None or (self.training and not initialised(self, self.initialized, at_first)):
            return cls.forward(self, x)
        z: Tensor = (given - self.shift) * torch.exp(-self.log_scale)
        return z, -self.log_scale.sum() * z.shape[2:].numel() * z.new_ones(len(z))

    return Candidate(
        f"{cls.__name__}.forward",
        "none: torch, its flag read once",
        ("survae.actnorm", cls, at_first),
        {"forward": forward},
        _BOTH,
        (2, module.shift.shape[1], 3, 2, 2)[: module.shift.dim()],
        ready=lambda m: m.initialized.fill_(1),
    )
