"""nflows: linear transforms, actnorm, affine couplings, and compositions of them.

``forward(inputs, context)`` goes from data to latents and ``inverse`` back; both return a log-determinant for
each sample.
"""

from __future__ import annotations

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
    known,
    pair_of,
    taken,
    transformed,
)
from genperf.accelerate._flow_probe import Candidate, any_layout, decided
from genperf.accelerate._pattern import Match, Options, Refusal

_FACTORS = {"lower_entries", "upper_entries", "unconstrained_upper_diag"}
_BOTH = {"forward": lambda m, x: m.forward(x), "inverse": lambda m, x: m.inverse(x)}
_COUPLINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"scale": "sigmoid", "eps": 1e-3, "form": "scale_shift"},
    "softplus": {"scale": "softplus", "form": "scale_shift"},
    "additive": {"scale": "additive"},
}


def find(module: nn.Module, cls: Any, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a transform of the library, or what is written like one."""
    if not callable(getattr(cls, "inverse", None)):
        return
    if _is_actnorm(module):
        yield from decided(module, cls, [_actnorm(module, cls)], options)
    elif _is_linear(module):
        if _takes_rows(module):
            yield Refusal(f"{cls.__name__}.forward, inverse", ROWS)
        else:
            yield from decided(module, cls, [_linear(module, cls)], options)
    elif _is_coupling(module):
        if module.unconditional_transform is not None:
            yield Refusal(f"{cls.__name__}.forward, inverse", "it transforms the other part, too")
        else:
            yield from decided(module, cls, _couplings(module, cls), options)
    elif _has_pair(module):
        yield from decided(module, cls, [_composition(module, cls)], options)


def _is_actnorm(module: Any) -> bool:
    parameters = module._parameters
    return (
        set(parameters) == {"log_scale", "shift"}
        and "initialized" in module._buffers
        and parameters["shift"].dim() == 1
    )


def _is_linear(module: Any) -> bool:
    names = set(module._parameters)
    return hasattr(module, "using_cache") and "bias" in names and (names >= _FACTORS or "_weight" in names)


def _is_coupling(module: Any) -> bool:
    return (
        {"identity_features", "transform_features"} <= set(module._buffers)
        and "transform_net" in module._modules
        and callable(getattr(type(module), "_scale_and_shift", None))
    )


def _is_pair(actnorm: Any, linear: Any) -> bool:
    return _is_actnorm(actnorm) and _is_linear(linear) and not _takes_rows(linear)


def _has_pair(module: Any) -> bool:
    parts = module._modules.get("_transforms")
    if not isinstance(parts, nn.ModuleList) or set(module._modules) != {"_transforms"}:
        return False
    return any(_is_pair(a, b) for a, b in zip(parts, list(parts)[1:], strict=False))


def _actnorm(module: Any, cls: Any) -> Candidate:
    at_first = not module.shift.is_meta and bool(module.initialized)

    def forward(self: Any, inputs: Any, context: Any = None) -> Any:
        x = taken(inputs, self.shift, (2, 4), len(self.shift))
        if x is None or (self.training and not initialised(self, self.initialized, at_first)):
            return cls.forward(self, inputs, context)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = self.log_scale.exp().view(shape) * x + self.shift.view(shape)
        return y, x[0, 0].numel() * self.log_scale.sum() * y.new_ones(len(x))

    def of_channels(self: Any, inverse: bool) -> Affine | None:
        if self.training and not initialised(self, self.initialized, at_first):
            return None
        return Affine(self.shift * torch.exp(-self.log_scale), log_scale=self.log_scale)

    return Candidate(
        f"{cls.__name__}.forward",
        "none: torch, its flag read once",
        ("nflows.actnorm", cls, at_first),
        {"forward": forward, "_genperf_map": of_channels},
        _BOTH,
        (3, len(module.shift), 3, 2),
        ready=_set_initialised,
    )


def _set_initialised(module: Any) -> None:
    for part in module.modules():
        if "initialized" in part._buffers:
            part.initialized.fill_(True)


def _matrix(self: Any, inverse: bool) -> Matrix:
    """Of a transform; the factors tell the determinant without more."""
    weight = self.weight()[:, self.permutation._permutation.argsort()]
    return known(weight, self.logabsdet(), inverse, self.bias)


def _takes_rows(module: Any) -> bool:
    return "permutation" not in module._modules


def _linear(module: Any, cls: Any) -> Candidate:
    def apply(self: Any, inputs: Any, inverse: bool) -> Any:
        x = taken(inputs, self.bias, channels=len(self.bias))
        matrix = None if x is None else of_channels(self, inverse)
        return None if x is None or matrix is None else transformed(x, matrix, inverse=inverse)

    def forward(self: Any, inputs: Any, context: Any = None) -> Any:
        result = apply(self, inputs, False)
        return cls.forward(self, inputs, context) if result is None else result

    def inverse(self: Any, inputs: Any, context: Any = None) -> Any:
        result = apply(self, inputs, True)
        return cls.inverse(self, inputs, context) if result is None else result

    def of_channels(self: Any, inverse: bool) -> Matrix | None:
        cached = self.using_cache and not self.training
        return None if cached or hooked(*self.children()) else _matrix(self, inverse)

    return Candidate(
        f"{cls.__name__}.forward, inverse",
        "invertible_conv1x1",
        ("nflows.linear", cls),
        {"forward": forward, "inverse": inverse, "_genperf_map": of_channels},
        _BOTH,
        (3, len(module.bias), 3, 2),
    )


def _couplings(module: Any, cls: Any) -> Iterator[Candidate]:
    halves = len(module.transform_features)
    for name, settings in _COUPLINGS.items():
        yield _coupling(module, cls, settings, halves * (1 if name == "additive" else 2))


def _coupling(module: Any, cls: Any, settings: dict[str, Any], channels_out: int) -> Candidate:
    kept, changed = (t.tolist() for t in (module.identity_features, module.transform_features))
    order = tuple(kept + changed)
    in_order = list(order) == sorted(order)
    free = any_layout(module.transform_net)

    def apply(self: Any, inputs: Any, context: Any, inverse: bool) -> Any:
        x = taken(inputs, next(self.transform_net.parameters(), inputs), (2, 4), len(order))
        if x is None:
            return (cls.inverse if inverse else cls.forward)(self, inputs, context)
        both = None
        if not in_order:
            both = torch.cat([self.identity_features, self.transform_features])
            x = x.index_select(1, both)
        h = self.transform_net(for_network(x[:, : len(kept)], free), context)
        y, logdet = coupled(x, h, inverse, split=len(kept), **settings)
        return y if both is None else y.index_select(1, both.argsort()), logdet

    def forward(self: Any, inputs: Any, context: Any = None) -> Any:
        return apply(self, inputs, context, False)

    def inverse(self: Any, inputs: Any, context: Any = None) -> Any:
        return apply(self, inputs, context, True)

    return Candidate(
        f"{cls.__name__}.forward, inverse",
        "affine_coupling",
        ("nflows.coupling", cls, order, settings["scale"], free),
        {"forward": forward, "inverse": inverse},
        _BOTH,
        (2, len(order), 3, 2),
        nets={"transform_net": channels_out},
    )


def _folded(x: Any, two: list[Any], inverse: bool) -> tuple[Tensor, Tensor] | None:
    """Two transforms in one pass, if they are an actnorm and a linear one that can be."""
    if len(two) < 2:
        return None
    actnorm, matrix = reversed(two) if inverse else two
    pair = pair_of(actnorm, matrix, inverse)
    x = None if pair is None else taken(x, matrix.bias, channels=len(matrix.bias))
    return None if pair is None or x is None else transformed(x, *pair, inverse=inverse)


def _composition(module: Any, cls: Any) -> Candidate:
    def apply(self: Any, inputs: Any, context: Any, inverse: bool) -> Any:
        x, total = inputs, inputs.new_zeros(len(inputs))
        parts = list(self._transforms)[:: -1 if inverse else 1]
        at = 0
        while at < len(parts):
            two = parts[at : at + 2]
            found = _folded(x, two, inverse)
            at += 1 if found is None else 2
            if found is None:
                found = (two[0].inverse if inverse else two[0])(x, context)
            x, logdet = found
            total = total + logdet
        return x, total

    def forward(self: Any, inputs: Any, context: Any = None) -> Any:
        return apply(self, inputs, context, False)

    def inverse(self: Any, inputs: Any, context: Any = None) -> Any:
        return apply(self, inputs, context, True)

    parts = list(module._transforms)
    at = next(i for i, t in enumerate(parts[:-1]) if _is_pair(t, parts[i + 1]))
    return Candidate(
        f"{cls.__name__}.forward, inverse",
        "invertible_conv1x1, actnorm folded",
        ("nflows.composition", cls),
        {"forward": forward, "inverse": inverse},
        _BOTH,
        (2, len(parts[at].shift), 4, 6),
        nets={
            f"_transforms.{i}.transform_net": len(t.transform_features) * t._transform_dim_multiplier()
            for i, t in enumerate(parts)
            if _is_coupling(t)
        },
        ready=_set_initialised,
        layers=find,
        folded=(f"_transforms.{at}", f"_transforms.{at + 1}"),
    )
