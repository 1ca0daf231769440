"""chaiyujin's and y0ast's Glow, and the models grown out of them: ``forward(input, logdet, reverse)``.

The log-determinant is added to the one given, if one is. Actnorm's ``inited`` is no part of the state_dict: a
model that was loaded is initialised again by its first batch in training, with this package or without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from genperf.accelerate._flow import Affine, Matrix, coupled, for_network, hooked, map_of, taken, transformed
from genperf.accelerate._flow_probe import Candidate, any_layout, decided
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.ops.invertible_conv1x1 import PLU

_FACTORS = [("p", "l", "u", "sign_s", "log_s"), ("p", "lower", "upper", "sign_s", "log_s")]
_NETS = ("f", "block")
_COUPLINGS: dict[str, dict[str, Any]] = {
    "affine": {"scale": "sigmoid", "layout": "interleaved", "shift_first": True, "form": "shift_scale"},
    "additive": {"scale": "additive"},
}


def find(module: nn.Module, cls: Any, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a layer of such a model."""
    if _factors(module) is not None:
        yield from decided(module, cls, [_convolution(module, cls)], options)
    elif _is_step(module):
        was = f"{cls.__name__}.normal_flow, reverse_flow"
        if "invconv" not in module._modules:
            yield Refusal(was, "its channels are permuted, not convolved")
        elif module.flow_coupling not in _COUPLINGS or _net_of(module) is None:
            yield Refusal(was, f"its coupling {module.flow_coupling!r} is not known")
        else:
            yield from decided(module, cls, [_step(module, cls)], options)


def _factors(module: Any) -> tuple[str, ...] | None:
    """The names of its matrix, or of its factors; None where it has none."""
    if not hasattr(module, "w_shape"):
        return None
    if set(module._parameters) == {"weight"} and module.weight.dim() == 2:
        return ("weight",)
    names = set(module._parameters) | set(module._buffers)
    return next((known for known in _FACTORS if set(known) <= names), None)


def _is_step(module: Any) -> bool:
    actnorm = module._modules.get("actnorm")
    return (
        actnorm is not None
        and {"bias", "logs"} <= set(actnorm._parameters)
        and hasattr(module, "flow_coupling")
        and all(callable(getattr(type(module), name, None)) for name in ("normal_flow", "reverse_flow"))
    )


def _net_of(module: Any) -> str | None:
    return next((name for name in _NETS if name in module._modules), None)


def _weight(self: Any, names: tuple[str, ...]) -> Tensor | PLU:
    tensors = [getattr(self, name) for name in names]
    return tensors[0] if len(tensors) == 1 else PLU(*tensors)


def _added(logdet: Any, own: Tensor) -> Any:
    return None if logdet is None else logdet + own[0]


def _convolution(module: Any, cls: Any) -> Candidate:
    names = _factors(module)
    assert names is not None
    main = names[min(1, len(names) - 1)]
    channels = len(getattr(module, main))

    def forward(self: Any, input: Tensor, logdet: Any = None, reverse: bool = False) -> Any:
        parameter = getattr(self, main)
        x = taken(input, parameter, channels=len(parameter))
        if x is None:
            return cls.forward(self, input, logdet, reverse)
        y, own = transformed(x, Matrix(_weight(self, names)), inverse=bool(reverse))
        return y, _added(logdet, own)

    return Candidate(
        f"{cls.__name__}.forward",
        "invertible_conv1x1",
        ("chaiyujin.conv", cls, names),
        {"forward": forward, "_genperf_map": lambda self, _: Matrix(_weight(self, names))},
        {
            "forward": lambda m, x: m(x, x[:, 0, 0, 0]),
            "reverse": lambda m, x: m(x, x[:, 0, 0, 0], reverse=True),
            "forward without a log-determinant": lambda m, x: m(x),
        },
        (2, channels, 3, 2),
    )


def _step(module: Any, cls: Any) -> Candidate:
    kind, net = module.flow_coupling, _net_of(module)
    settings = _COUPLINGS[kind]
    of_actnorm = type(module.actnorm)
    free = any_layout(module._modules[net])

    def maps(self: Any, x: Any, inverse: bool) -> tuple[Tensor, Matrix, Affine] | None:
        """``x`` as it is taken, and the maps of its first two layers; None where the original must run."""
        actnorm, matrix = self.actnorm, map_of(self.invconv, inverse)
        if not isinstance(actnorm, of_actnorm) or not actnorm.inited or hooked(actnorm) or matrix is None:
            return None
        x = taken(x, actnorm.logs, channels=actnorm.logs.shape[1])
        if x is None or x.shape[1] % 2 or self.flow_coupling != kind:
            return None
        return x, matrix, Affine(actnorm.bias, log_scale=actnorm.logs)

    def normal_flow(self: Any, input: Tensor, logdet: Any) -> Any:
        found = maps(self, input, False)
        if found is None or logdet is None:
            return cls.normal_flow(self, input, logdet)
        y, own = transformed(*found)
        y, of_coupling = coupled(y, getattr(self, net)(for_network(y.chunk(2, 1)[0], free)), **settings)  # type: ignore[arg-type]
        return y, _added(logdet, own) if kind == "additive" else logdet + own + of_coupling

    def reverse_flow(self: Any, input: Tensor, logdet: Any) -> Any:
        found = maps(self, input, True)
        if found is None or logdet is None:
            return cls.reverse_flow(self, input, logdet)
        y, matrix, affine = found
        h = getattr(self, net)(for_network(y.chunk(2, 1)[0], free))  # type: ignore[arg-type]
        y, of_coupling = coupled(y, h, inverse=True, **settings)
        y, own = transformed(y, matrix, affine, inverse=True)
        return y, _added(logdet, own) if kind == "additive" else logdet + own + of_coupling

    channels = module.actnorm.logs.shape[1]
    return Candidate(
        f"{cls.__name__}.normal_flow, reverse_flow",
        "invertible_conv1x1, actnorm folded; affine_coupling",
        ("chaiyujin.step", cls, of_actnorm, kind, net, free),
        {"normal_flow": normal_flow, "reverse_flow": reverse_flow},
        {
            "forward": lambda m, x: m(x, x[:, 0, 0, 0]),
            "reverse": lambda m, x: m(x, x[:, 0, 0, 0], reverse=True),
        },
        (2, channels, 3, 2),
        nets={net: channels if kind == "affine" else channels // 2},  # type: ignore[dict-item]
        ready=lambda m: setattr(m.actnorm, "inited", True),
        layers=find,
        folded=("invconv",),
    )
