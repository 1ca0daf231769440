"""rosinality's Glow, and what is written like it: ``forward`` returns a log-determinant, ``reverse`` none.

Actnorm reads its flag on the host in every call, and the last convolution of a coupling network copies its
input to pad it with ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf.accelerate._flow import (
    Affine,
    Matrix,
    coupled,
    for_network,
    hooked,
    initialised,
    pair_of,
    taken,
    transformed,
)
from genperf.accelerate._flow_probe import Candidate, any_layout, decided
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.ops.invertible_conv1x1 import PLU

_FACTORS = {"w_p", "w_l", "w_s", "w_u", "s_sign"}
_BOTH = {"forward": lambda m, x: m.forward(x), "reverse": lambda m, x: m.reverse(x)}
_COUPLINGS: list[tuple[bool, dict[str, Any]]] = [
    (True, {"scale": "sigmoid", "layout": "halves", "shift_first": False, "form": "shift_scale"}),
    (True, {"scale": "exp", "layout": "halves", "shift_first": False, "form": "shift_scale"}),
    (False, {"scale": "additive"}),
]


def find(module: nn.Module, cls: Any, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a layer of such a model."""
    if _is_padded(module):
        yield from decided(module, cls, [_padded(module, cls)], options)
    if not callable(getattr(cls, "reverse", None)):
        return
    if _is_actnorm(module):
        yield from decided(module, cls, [_actnorm(module, cls)], options)
    elif _is_matrix(module):
        yield from decided(module, cls, [_convolution(module, cls)], options)
    elif _is_coupling(module):
        yield from decided(module, cls, _couplings(module, cls), options)
    elif _is_step(module):
        yield from decided(module, cls, [_step(module, cls)], options)


def _is_actnorm(module: Any) -> bool:
    p = module._parameters
    return {"loc", "scale"} <= set(p) and "initialized" in module._buffers and p["loc"].dim() == 4


def _is_matrix(module: Any) -> bool:
    if set(module._parameters) | set(module._buffers) >= _FACTORS:
        return _is_strict(module)
    weight = module._parameters.get("weight")
    return set(module._parameters) == {"weight"} and weight.dim() == 4 and weight.shape[2:].numel() == 1


def _is_strict(module: Any) -> bool:
    """Whether its masks, where they are buffers, are those of strictly triangular factors."""
    lower = module._buffers.get("l_mask")
    if lower is None or lower.is_meta:
        return lower is None
    ones = torch.ones_like(lower)
    return torch.equal(lower, ones.tril(-1)) and torch.equal(module.u_mask, ones.triu(1))


def _is_coupling(module: Any) -> bool:
    return set(module._modules) == {"net"} and isinstance(getattr(module, "affine", None), bool)


def _is_step(module: Any) -> bool:
    parts = module._modules
    return (
        set(parts) == {"actnorm", "invconv", "coupling"}
        and _is_actnorm(parts["actnorm"])
        and _is_matrix(parts["invconv"])
        and _is_coupling(parts["coupling"])
    )


def _is_padded(module: Any) -> bool:
    conv, scale = module._modules.get("conv"), module._parameters.get("scale")
    return (
        isinstance(conv, nn.Conv2d)
        and scale is not None
        and set(module._modules) == {"conv"}
        and scale.shape == (1, conv.out_channels, 1, 1)
        and conv.kernel_size == (3, 3)
        and conv.padding == (0, 0)
        and conv.bias is not None
    )


def _channels(module: Any) -> int:
    return len(module.weight if "weight" in module._parameters else module.w_l)


def _actnorm(module: Any, cls: Any) -> Candidate:
    at_first = not module.loc.is_meta and bool(module.initialized)

    def forward(self: Any, input: Tensor) -> Any:
        x = taken(input, self.loc) if initialised(self, self.initialized, at_first) else None
        if x is None:
            return cls.forward(self, input)
        y = self.scale * (x + self.loc)
        if not self.logdet:
            return y
        return y, x.shape[2] * x.shape[3] * self.scale.abs().log().sum()

    def of_channels(self: Any, inverse: bool) -> Affine | None:
        known = self.logdet and initialised(self, self.initialized, at_first)
        return Affine(self.loc, scale=self.scale) if known else None

    return Candidate(
        f"{cls.__name__}.forward",
        "none: torch, its flag read once",
        ("rosinality.actnorm", cls, at_first),
        {"forward": forward, "_genperf_map": of_channels},
        _BOTH,
        (2, module.loc.shape[1], 3, 2),
        ready=lambda m: m.initialized.fill_(1),
    )


def _weight(self: Any) -> Tensor | PLU:
    if "weight" in self._parameters:
        return self.weight
    return PLU(self.w_p, self.w_l, self.w_u, self.s_sign, self.w_s)


def _convolution(module: Any, cls: Any) -> Candidate:
    def of(self: Any, x: Tensor) -> Tensor | None:
        parameter = self.weight if "weight" in self._parameters else self.w_l
        return taken(x, parameter, channels=len(parameter))

    def forward(self: Any, input: Tensor) -> Any:
        x = of(self, input)
        if x is None:
            return cls.forward(self, input)
        y, logdet = transformed(x, Matrix(_weight(self)))
        return y, logdet[0]

    def reverse(self: Any, output: Tensor) -> Any:
        y = of(self, output)
        if y is None:
            return cls.reverse(self, output)
        return transformed(y, Matrix(_weight(self)), inverse=True)[0]

    return Candidate(
        f"{cls.__name__}.forward, reverse",
        "invertible_conv1x1",
        ("rosinality.conv", cls),
        {"forward": forward, "reverse": reverse, "_genperf_map": lambda self, _: Matrix(_weight(self))},
        _BOTH,
        (2, _channels(module), 3, 2),
    )


def _couplings(module: Any, cls: Any) -> Iterator[Candidate]:
    for affine, settings in _COUPLINGS:
        if affine == module.affine:
            yield _coupling(cls, affine, settings, any_layout(module.net))


def _coupling(cls: Any, affine: bool, settings: dict[str, Any], free: bool) -> Candidate:
    def of(self: Any, x: Any) -> Tensor | None:
        x = taken(x, next(self.net.parameters(), x)) if self.affine == affine else None
        return None if x is None or x.shape[1] % 2 else x

    def forward(self: Any, input: Tensor) -> Any:
        x = of(self, input)
        if x is None:
            return cls.forward(self, input)
        y, logdet = coupled(x, self.net(for_network(x.chunk(2, 1)[0], free)), **settings)
        return y, logdet if affine else None

    def reverse(self: Any, output: Tensor) -> Any:
        y = of(self, output)
        if y is None:
            return cls.reverse(self, output)
        return coupled(y, self.net(for_network(y.chunk(2, 1)[0], free)), inverse=True, **settings)[0]

    return Candidate(
        f"{cls.__name__}.forward, reverse",
        "affine_coupling",
        ("rosinality.coupling", cls, tuple(sorted(settings.items())), free),
        {"forward": forward, "reverse": reverse},
        _BOTH,
        (2, 6, 3, 2),
        nets={"net": 6 if affine else 3},
    )


def _step(module: Any, cls: Any) -> Candidate:
    def forward(self: Any, input: Tensor) -> Any:
        pair = pair_of(self.actnorm, self.invconv, False)
        x = taken(input, self.actnorm.loc, channels=self.actnorm.loc.shape[1])
        if pair is None or x is None:
            return cls.forward(self, input)
        y, logdet = transformed(x, *pair)
        y, of_coupling = self.coupling(y)
        return (y, logdet[0]) if of_coupling is None else (y, logdet + of_coupling)

    def reverse(self: Any, output: Tensor) -> Any:
        pair = pair_of(self.actnorm, self.invconv, True)
        if pair is None or taken(output, self.actnorm.loc, channels=self.actnorm.loc.shape[1]) is None:
            return cls.reverse(self, output)
        y = taken(self.coupling.reverse(output), self.actnorm.loc)
        return transformed(y, *pair, inverse=True)[0]  # type: ignore[arg-type]

    channels = _channels(module.invconv)
    return Candidate(
        f"{cls.__name__}.forward, reverse",
        "invertible_conv1x1, actnorm folded",
        ("rosinality.step", cls),
        {"forward": forward, "reverse": reverse},
        _BOTH,
        (2, channels, 3, 2),
        nets={"coupling.net": channels if module.coupling.affine else channels // 2},
        ready=lambda m: m.actnorm.initialized.fill_(1),
        layers=find,
        folded=("actnorm", "invconv"),
    )


def _padded(module: Any, cls: Any) -> Candidate:
    def forward(self: Any, input: Tensor) -> Any:
        conv = self.conv
        x = None if hooked(conv) or torch.is_autocast_enabled(input.device.type) else taken(input, self.scale)
        if x is None:
            return cls.forward(self, input)
        factor = torch.exp(self.scale * 3)
        weight = conv.weight * factor.view(-1, 1, 1, 1)
        # Ones around the image add the sum of the taps that lie there: a map that is the same for all images.
        frame = F.pad(x.new_zeros(1, 1, *x.shape[2:]), [1, 1, 1, 1], value=1.0)
        around = F.conv2d(frame, weight.sum(1, keepdim=True), conv.bias * factor.flatten())
        return F.conv2d(x, weight, padding=1) + around

    return Candidate(
        f"{cls.__name__}.forward",
        "none: torch, no padded copy",
        ("rosinality.padded", cls),
        {"forward": forward},
        {"forward": lambda m, x: m.forward(x)},
        (2, module.conv.in_channels, 3, 4),
    )
