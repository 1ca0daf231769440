"""normflows: actnorm, 1x1 convolutions and couplings, and GlowBlock, which applies them one after another.

Here ``forward`` goes from latents to data and ``inverse`` from data to latents; the map that genperf's ops
call forward is that of ``inverse``. Log-determinants of actnorm and convolution are scalars.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._flow import (
    ROWS,
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

_FACTORS = {"P", "L", "U", "log_S", "sign_S"}
# How affine_coupling computes the map, and whether its forward is this ``inverse``.
_SCALES: dict[str, tuple[dict[str, Any], bool]] = {
    "exp": ({"scale": "exp", "form": "scale_shift"}, False),
    "sigmoid": ({"scale": "sigmoid", "form": "unshift_scale"}, True),
    "sigmoid_inv": ({"scale": "sigmoid", "form": "scale_shift"}, False),
}
_BOTH = {"forward": lambda m, x: m.forward(x), "inverse": lambda m, x: m.inverse(x)}


def find(module: nn.Module, cls: Any, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a layer of the library, or what is written like one."""
    if not callable(getattr(cls, "inverse", None)):
        return
    if _is_actnorm(module):
        yield from decided(module, cls, [_actnorm(module, cls)], options)
    elif _is_matrix(module):
        if _takes_rows(cls):
            yield Refusal(f"{cls.__name__}.forward, inverse", ROWS)
        else:
            yield from decided(module, cls, [_convolution(module, cls)], options)
    elif _is_coupling(module):
        yield from _coupling(module, cls, options)
    elif _is_block(module):
        yield from decided(module, cls, [_block(module, cls)], options)


def _is_actnorm(module: Any) -> bool:
    tensors = {**module._parameters, **module._buffers}
    return {"s", "t", "data_dep_init_done"} <= set(tensors) and tensors["s"].dim() > 1


def _is_matrix(module: Any) -> bool:
    return hasattr(module, "num_channels") and ("W" in module._parameters or _names(module) >= _FACTORS)


def _takes_rows(cls: Any) -> bool:
    """Whether it is the matrix of vectors, which alone may be given a context."""
    return "context" in inspect.signature(cls.inverse).parameters


def _is_coupling(module: Any) -> bool:
    flows = module._modules.get("flows")
    return (
        isinstance(flows, nn.ModuleList)
        and len(flows) == 3
        and "param_map" in flows[1]._modules
        and all(hasattr(flows[i], "mode") for i in (0, 2))
    )


def _is_block(module: Any) -> bool:
    flows = module._modules.get("flows")
    if not isinstance(flows, nn.ModuleList) or len(flows) != 3:
        return False
    coupling, matrix, actnorm = flows
    return _is_coupling(coupling) and _is_matrix(matrix) and _is_actnorm(actnorm)


def _names(module: Any) -> set[str]:
    return set(module._parameters) | set(module._buffers)


def _channels(module: Any) -> int:
    return len(module.W if "W" in module._parameters else module.L)


def _actnorm(module: Any, cls: Any) -> Candidate:
    at_first = not module.s.is_meta and bool(module.data_dep_init_done)

    def ready(self: Any, z: Any) -> Tensor | None:
        if not initialised(self, self.data_dep_init_done, at_first):
            return None
        z = taken(z, self.s, (self.s.dim(),))
        return None if z is None or z.shape[1:].numel() % self.s.numel() else z

    def forward(self: Any, z: Any) -> Any:
        x = ready(self, z)
        if x is None:
            return cls.forward(self, z)
        return x * torch.exp(self.s) + self.t, x[0].numel() // self.s.numel() * self.s.sum()

    def inverse(self: Any, z: Any) -> Any:
        x = ready(self, z)
        if x is None:
            return cls.inverse(self, z)
        return (x - self.t) * torch.exp(-self.s), -(x[0].numel() // self.s.numel()) * self.s.sum()

    def of_channels(self: Any, inverse: bool) -> Affine | None:
        known = self.s.numel() == self.s.shape[1] and initialised(self, self.data_dep_init_done, at_first)
        return Affine(shift=-self.t, log_scale=-self.s) if known else None

    shape = (3, *(n if n > 1 or i == 0 else 3 + i for i, n in enumerate(module.s.shape[1:])))
    return Candidate(
        f"{cls.__name__}.forward, inverse",
        "none: torch, its flag read once",
        ("normflows.actnorm", cls, at_first),
        {"forward": forward, "inverse": inverse, "_genperf_map": of_channels},
        _BOTH,
        shape,
        ready=lambda m: m.data_dep_init_done.fill_(1),
    )


def _weight(self: Any) -> Tensor | PLU:
    if "W" in self._parameters:
        return self.W
    return PLU(self.P, self.L, self.U, self.sign_S, self.log_S)


def _convolution(module: Any, cls: Any) -> Candidate:
    def parameter(self: Any) -> Tensor:
        return self.W if "W" in self._parameters else self.L

    def forward(self: Any, z: Any) -> Any:
        x = taken(z, parameter(self), channels=len(parameter(self)))
        if x is None:
            return cls.forward(self, z)
        y, logdet = transformed(x, Matrix(_weight(self)), inverse=True)
        return y, logdet[0]

    def inverse(self: Any, z: Any) -> Any:
        x = taken(z, parameter(self), channels=len(parameter(self)))
        if x is None:
            return cls.inverse(self, z)
        y, logdet = transformed(x, Matrix(_weight(self)))
        return y, logdet[0]

    return Candidate(
        f"{cls.__name__}.forward, inverse",
        "invertible_conv1x1",
        ("normflows.conv", cls),
        {"forward": forward, "inverse": inverse, "_genperf_map": lambda self, _: Matrix(_weight(self))},
        _BOTH,
        (2, _channels(module), 3, 2),
    )


def _coupling_options(block: Any) -> tuple[dict[str, Any], bool] | None:
    split, coupling, merge = block.flows
    if split.mode != merge.mode or split.mode not in ("channel", "channel_inv"):
        return None
    part = {"transformed": "second" if split.mode == "channel" else "first"}
    if not coupling.scale:
        return {"scale": "additive", **part}, False
    if coupling.scale_map not in _SCALES:
        return None
    scale, swapped = _SCALES[coupling.scale_map]
    return {**scale, "layout": "interleaved", "shift_first": True, **part}, swapped


def _coupling(module: Any, cls: Any, options: Options) -> Iterator[Match | Refusal]:
    was = f"{cls.__name__}.forward, inverse"
    found = _coupling_options(module)
    if found is None:
        split, coupling, _ = module.flows
        yield Refusal(was, f"split mode {split.mode!r} with scale map {coupling.scale_map!r} is not covered")
        return
    fixed, swapped = found
    free = any_layout(module.flows[1].param_map)

    def apply(self: Any, z: Any, inverse: bool) -> Any:
        net = self.flows[1].param_map
        x = taken(z, next(net.parameters(), z), (2, 4))
        if x is None or hooked(*self.flows):
            return (cls.inverse if inverse else cls.forward)(self, z)
        parts = x.chunk(2, 1)
        h = net(for_network(parts[0 if fixed["transformed"] == "second" else 1], free))
        return coupled(x, h, inverse != swapped, split=parts[0].shape[1], **fixed)

    def forward(self: Any, z: Any) -> Any:
        return apply(self, z, False)

    def inverse(self: Any, z: Any) -> Any:
        return apply(self, z, True)

    odd_first, second = 3, 2
    changed = second if fixed["transformed"] == "second" else odd_first
    yield from decided(
        module,
        cls,
        [
            Candidate(
                was,
                "affine_coupling",
                ("normflows.coupling", cls, tuple(sorted(fixed.items())), free),
                {"forward": forward, "inverse": inverse},
                _BOTH,
                (2, odd_first + second, 3, 2),
                nets={"flows.1.param_map": changed * (1 + bool(module.flows[1].scale))},
            )
        ],
        options,
    )


def _block(module: Any, cls: Any) -> Candidate:
    def forward(self: Any, z: Any) -> Any:
        coupling, matrix, actnorm = self.flows
        pair = pair_of(actnorm, matrix, True)
        if pair is None or taken(z, actnorm.s, channels=actnorm.s.numel()) is None:
            return cls.forward(self, z)
        x, first = coupling(z)
        x = taken(x, actnorm.s)
        y, second = transformed(x, *pair, inverse=True)  # type: ignore[arg-type]
        return y, first + second

    def inverse(self: Any, z: Any) -> Any:
        coupling, matrix, actnorm = self.flows
        x = taken(z, actnorm.s, channels=actnorm.s.numel())
        pair = pair_of(actnorm, matrix, False)
        if pair is None or x is None:
            return cls.inverse(self, z)
        y, first = transformed(x, *pair)
        y, second = coupling.inverse(y)
        return y, first + second

    channels = _channels(module.flows[1])
    coupling = module.flows[0]
    inverted = coupling.flows[0].mode == "channel_inv"
    changed = channels - channels // 2 if inverted else channels // 2
    checkered = "checkerboard" in coupling.flows[0].mode
    return Candidate(
        f"{cls.__name__}.forward, inverse",
        "invertible_conv1x1, actnorm folded",
        ("normflows.block", cls),
        {"forward": forward, "inverse": inverse},
        _BOTH,
        (2, channels, 4, 6),
        nets={
            "flows.0.flows.1.param_map": (channels if checkered else changed)
            * (1 + bool(coupling.flows[1].scale))
        },
        ready=lambda m: m.flows[2].data_dep_init_done.fill_(1),
        layers=find,
        folded=("flows.1", "flows.2"),
    )
