"""Classes of discretized logistics and their mixtures: ``DiscMixLogistic`` and ``DiscLogistic`` of NVAE.

They are constructed from a network's output, of which they keep means, log-scales and coefficients. Here the
parameters are kept as they are, and those attributes are computed where they are read.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from genperf.accelerate._lazy import Lazy, kept_by
from genperf.accelerate._logistic_probe import Unknown, on_this_device, values_of
from genperf.nn import DiscretizedLogistic, MixtureLogistic

_NAMES = re.compile(r".*logistic.*", re.IGNORECASE)
_MIXTURES = re.compile(r"(num|nr|n)_?mix\w*", re.IGNORECASE)
_BITS = re.compile(r"((num|nr|n)_?)?bits", re.IGNORECASE)
_SEED = 11
_RANGES = {"nvae": (0.0, 1.0), "openai": (-1.0, 1.0), "default": (-1.0, 1.0)}


@dataclass(frozen=True)
class Form:
    """What a class computes from parameters [B, P, H, W].

    Attributes:
        mixture: a mixture of K for RGB, not one logistic for each value.
        convention: as of :func:`genperf.ops.mixture_logistic_nll`.
        mixtures, bits: positions of these among the constructor's parameters, or None.
        on_cpu: whether uniforms are drawn on the CPU and moved.
        samples: whether ``sample`` is covered.
    """

    mixture: bool
    convention: str
    mixtures: int | None
    bits: int | None
    on_cpu: bool = False
    samples: bool = False

    def fits(self, values: list[Any]) -> bool:
        """Whether the constructor's arguments are such that the kernel covers them."""
        params = values[0]
        if not isinstance(params, Tensor) or params.dim() != 4 or not params.is_floating_point():
            return False
        if self.bits is not None and (type(values[self.bits]) is not int or not 1 <= values[self.bits] <= 16):
            return False
        if not self.mixture:
            return params.shape[1] % 2 == 0 and params.shape[1] > 0
        count = params.shape[1] // 10
        asked = count if self.mixtures is None else values[self.mixtures]
        return count > 0 and params.shape[1] == 10 * count and type(asked) is int and asked == count

    def build(self, values: list[Any], rng: str) -> MixtureLogistic | DiscretizedLogistic:
        levels = 256 if self.bits is None else 1 << values[self.bits]
        cls: Any = MixtureLogistic if self.mixture else DiscretizedLogistic
        return cls(values[0], levels=levels, convention=self.convention, rng=rng)

    def sample(self, found: Any, temperature: float) -> Tensor:
        drawn = found.rng == "torch" and self.on_cpu
        return found.sample(temperature, torch.default_generator if drawn else None)


def looks_like_one(value: Any) -> bool:
    if not isinstance(value, type) or issubclass(value, (torch.nn.Module, torch.distributions.Distribution)):
        return False
    own = vars(value)
    is_named = bool(_NAMES.fullmatch(value.__name__)) and not value.__module__.startswith("genperf")
    return is_named and all(isinstance(own.get(n), FunctionType) for n in ("__init__", "log_prob"))


@functools.cache
def recognised(cls: type) -> Form:
    """What ``cls`` computes.

    Raises:
        Unknown: it is no such class, with the reason.
    """
    signature = inspect.signature(cls)
    names = list(signature.parameters)
    if not names or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in signature.parameters.values()):
        raise Unknown(f"it is constructed from {signature}, not a tensor of parameters")
    mixtures, bits = (
        next((i for i, name in enumerate(names) if pattern.fullmatch(name)), None)
        for pattern in (_MIXTURES, _BITS)
    )
    others = [n for i, n in enumerate(names) if i and i not in (mixtures, bits)]
    if any(signature.parameters[name].default is inspect.Parameter.empty for name in others):
        raise Unknown(f"it is constructed from {signature}, not a tensor of parameters")
    reason = "its log_prob is not that of a discretized logistic or a mixture of them"
    for mixture, convention in itertools.product((True, False), _RANGES):
        form = Form(mixture, convention, mixtures, bits)
        try:
            if not all(_same_log_prob(cls, form, seed) for seed in range(2)):
                continue
        except Exception as error:
            if not isinstance(error, (RuntimeError, ValueError, AssertionError, IndexError)):
                reason = f"the probe failed with {type(error).__name__}: {error}"
            continue
        return _with_sampler(cls, form)
    raise Unknown(reason)


def methods(cls: type, rng: str) -> dict[str, Callable[..., Any]]:
    """The methods that take the place of those of ``cls``.

    Raises:
        Unknown: see :func:`recognised`.
    """
    form = recognised(cls)
    values = values_of(inspect.signature(cls))
    low, high = _RANGES[form.convention]
    mixture = form.mixture  # torch.compile takes functions that hold numbers, not ones that hold objects
    original = {name: vars(cls)[name] for name in ("__init__", "log_prob")}
    lazy = Lazy(cls, original["__init__"])

    def log_prob(self: Any, samples: Tensor) -> Tensor:
        found = kept_by(self)
        if found is None or not isinstance(samples, Tensor) or samples.device != found.params.device:
            return original["log_prob"](self, samples)
        channels = 3 if mixture else found.params.shape[1] // 2
        if samples.shape != (len(found.params), channels, *found.params.shape[2:]) or samples.numel() == 0:
            return original["log_prob"](self, samples)
        least, most = torch.aminmax(samples.detach())
        if not (least >= low and most <= high):
            return original["log_prob"](self, samples)  # which says so
        return found.log_prob(samples).to(torch.result_type(found.params, samples))

    def prepared(values: list[Any]) -> Any:
        return form.build(values, rng) if form.fits(values) else None

    made: dict[str, Callable[..., Any]] = {
        **lazy.methods(lambda args, kwargs: prepared(values(args, kwargs))),
        "log_prob": functools.wraps(original["log_prob"])(log_prob),
    }
    if form.samples:
        theirs = vars(cls)["sample"]

        def drawn(found: Any, temperature: float) -> Tensor:
            return form.sample(found, temperature)

        @functools.wraps(theirs)
        def sample(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            found = kept_by(self)
            given = [*args, *kwargs.values()]
            plain = len(given) <= 1 and all(type(t) in (int, float) and 1e-6 <= t <= 1e6 for t in given)
            if (kwargs and not mixture) or found is None or not plain:
                return theirs(self, *args, **kwargs)
            if torch.is_grad_enabled() and found.params.requires_grad:
                return theirs(self, *args, **kwargs)
            return drawn(found, float(given[0]) if given else 1.0)

        made["sample"] = sample
    return made


def _probe(form: Form, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Parameters and values: all kinds of levels, log-scales on both sides of their bound."""
    generator = torch.Generator().manual_seed(seed)
    params = torch.randn(2, 20 if form.mixture else 6, 3, 5, generator=generator, dtype=dtype)
    if form.mixture:
        params[:, 2:].unflatten(1, (3, 3, 2))[:, :, 1].mul_(3).sub_(4)
    else:
        params[:, 3:].mul_(3).sub_(5)
    levels = torch.randint(256, (2, 3, 3, 5), generator=generator)
    levels.view(-1)[:4] = torch.tensor([0, 255, 254, 1])
    low, high = _RANGES[form.convention]
    return params, low + (high - low) * levels.to(dtype) / 255


def _arguments(form: Form, params: Tensor, bits: int | None) -> dict[int, Any]:
    given: dict[int, Any] = {0: params}
    if form.mixtures is not None:
        given[form.mixtures] = 2
    if form.bits is not None and bits is not None:
        given[form.bits] = bits
    return given


def _constructed(cls: type, form: Form, params: Tensor, bits: int | None = None) -> tuple[Any, list[Any]]:
    signature = inspect.signature(cls)
    names = list(signature.parameters)
    keywords = {names[i]: value for i, value in _arguments(form, params, bits).items()}
    return cls(**keywords), values_of(signature)((), keywords)


def _same_log_prob(cls: type, form: Form, seed: int) -> bool:
    params, samples = _probe(form, seed, torch.float64)
    for bits in (8,) if form.bits is None else (8, 5):
        results = []
        for ours in (False, True):
            p, x = params.clone().requires_grad_(), samples.clone().requires_grad_()
            with torch.enable_grad(), on_this_device():
                theirs, values = _constructed(cls, form, p, bits)
                if ours and not form.fits(values):
                    return False
                value = (form.build(values, "torch") if ours else theirs).log_prob(x)
                weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view(value.shape)
                results.append((value, *torch.autograd.grad((value * weights).sum(), (p, x))))
        for a, b in zip(*results, strict=True):
            size = a.detach().abs().max().item()
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-6, atol=1e-7 * size):
                return False
    return True


def _with_sampler(cls: type, form: Form) -> Form:
    """``form`` with its sampler, where that is the kernel's."""
    theirs = vars(cls).get("sample")
    if not isinstance(theirs, FunctionType) or len(inspect.signature(theirs).parameters) > 2:
        return form
    tempered = len(inspect.signature(theirs).parameters) == 2
    for seed, temperature in itertools.product(range(2), (1.0, 0.7) if tempered else (1.0,)):
        params, _ = _probe(form, seed, torch.float32)
        params = params + 1  # away from ties
        given = (temperature,) if tempered else ()
        try:
            with torch.no_grad(), on_this_device() as moves:
                found, values = _constructed(cls, form, params)
                torch.manual_seed(_SEED)
                expected, state = found.sample(*given), torch.get_rng_state()
                torch.manual_seed(_SEED)
                actual = form.build(values, "torch").sample(*given)
                same_state = torch.equal(state, torch.get_rng_state())
        except Exception:  # what cannot be run is left alone
            return form
        if not same_state or expected.shape != actual.shape:
            return form
        if not torch.allclose(expected, actual, atol=2e-6):
            return form
        form = dataclasses.replace(form, on_cpu=moves.moved_noise)
    return dataclasses.replace(form, samples=True)
