"""Losses of the discretized mixture of logistics, written as functions: those of PixelCNN++'s many ports.

Which of the two arguments is the image, where channels stand, how many levels the data have, what is summed
and with which sign is found by running the function on small tensors: a form is accepted when it gives the
values and the gradients of the function in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from genperf.accelerate._logistic_probe import Unknown, on_this_device, other_arguments, values_of
from genperf.ops.mixture_logistic_nll import mixture_logistic_nll

_LEVELS = (256, 32, 65536, 2, 4, 8, 16, 64, 128)
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """What a loss computes, from an image and parameters of rank 4.

    Attributes:
        image_first: the image is the first argument.
        image_dim, params_dim: 1 or -1, where their channels stand.
        channels: 1 or 3.
        convention, levels: as of :func:`genperf.ops.mixture_logistic_nll`.
        summed: 0 for a value for each pixel, 1 for a value for each sample, 2 for a number.
        per: what the sums are divided by: any of "batch", "pixels", "channels".
        factor: what the result is multiplied with.
    """

    image_first: bool
    image_dim: int
    params_dim: int
    channels: int
    convention: str
    levels: int
    summed: int
    per: tuple[str, ...] = ()
    factor: float = 1.0

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss, in float32 or float64."""
        image, params = (first, second) if self.image_first else (second, first)
        if self.image_dim != self.params_dim:
            image = image.movedim(self.image_dim, self.params_dim)
        nll = mixture_logistic_nll(
            params, image, levels=self.levels, channel_dim=self.params_dim, convention=self.convention,
            reduction=("none", "sample", "sum")[self.summed],
        )  # fmt: skip
        factor = self.factor / self._count(params)
        return nll if factor == 1.0 else nll * factor

    def _count(self, params: Tensor) -> int:
        spatial = params.shape[2:] if self.params_dim == 1 else params.shape[1:-1]
        sizes = {"batch": len(params), "pixels": math.prod(spatial), "channels": self.channels}
        count = 1
        for name in self.per:
            count *= sizes[name]
        return count

    def fits(self, first: Any, second: Any) -> bool:
        """Whether these are tensors of which the loss can be taken by the kernel."""
        image, params = (first, second) if self.image_first else (second, first)
        if not (isinstance(image, Tensor) and isinstance(params, Tensor)):
            return False
        if image.dim() != 4 or params.dim() != 4 or image.device != params.device:
            return False
        space = image.shape[2:] if self.image_dim == 1 else image.shape[1:3]
        other = params.shape[2:] if self.params_dim == 1 else params.shape[1:3]
        n_params = params.shape[self.params_dim]
        return (
            image.shape[self.image_dim] == self.channels
            and len(image) == len(params)
            and space == other
            and n_params > 0
            and n_params % (3 if self.channels == 1 else 10) == 0
        )


@dataclass(frozen=True)
class Loss:
    """A recognised function.

    Attributes:
        names: of its two first parameters.
        forms: for the values of its other parameters, in their order.
        dtypes: what it returns for (first, second) of these dtypes.
    """

    names: tuple[str, str]
    forms: tuple[tuple[tuple[Any, ...], Form], ...]
    dtypes: tuple[tuple[tuple[torch.dtype, torch.dtype], torch.dtype], ...]


@functools.cache
def recognised(function: FunctionType) -> Loss:
    """What ``function`` computes.

    Raises:
        Unknown: it is not such a loss, with the reason.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) < 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise Unknown(f"it takes {inspect.signature(function)}, not an image and parameters")
    forms, reason = [], ""
    for others in other_arguments(parameters[2:]):
        try:
            forms.append((others, _form(_with_others(function, others))))
        except Unknown as error:
            reason = reason or str(error)
    if not forms:
        raise Unknown(reason or f"it takes {inspect.signature(function)}, not an image and parameters")
    defaults = tuple(p.default for p in parameters[2:])
    first = next((form for others, form in forms if others == defaults), forms[0][1])
    return Loss((parameters[0].name, parameters[1].name), tuple(forms), tuple(_dtypes(function, first)))


def replacement(function: FunctionType, loss: Loss) -> Callable[..., Tensor]:
    """``function`` with the kernel; what it does not cover runs ``function``."""
    forms, dtypes = dict(loss.forms), dict(loss.dtypes)
    values = values_of(inspect.signature(function))

    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        try:
            (first, second, *others) = values(args, kwargs)
            form = forms.get(tuple(others))
        except (TypeError, ValueError):  # the function itself will say what is wrong
            return function(*args, **kwargs)
        if form is None or not form.fits(first, second) or torch.jit.is_tracing():
            return function(*args, **kwargs)
        if torch.is_autocast_enabled(first.device.type):
            return form(first, second)
        dtype = dtypes.get((first.dtype, second.dtype))
        return function(*args, **kwargs) if dtype is None else form(first, second).to(dtype)

    return replaced


def _with_others(function: FunctionType, others: tuple[Any, ...]) -> Callable[[Tensor, Tensor], Any]:
    return lambda first, second: function(first, second, *others)


def _form(loss: Callable[[Tensor, Tensor], Any]) -> Form:
    reason = "no layout of image and parameters gives a loss"
    for image_first, params_dim, image_dim, channels in itertools.product(
        (True, False), (1, -1), (1, -1), (3, 1)
    ):
        start = Form(image_first, image_dim, params_dim, channels, "openai", 256, 2)
        probes = [_probe(start, *sizes) for sizes in ((2, 3, 5, 2, 0), (3, 4, 2, 3, 1))]
        try:
            theirs = [_run(loss, *probe) for probe in probes]
        except Exception as error:
            if "CUDA" in str(error) or "NVIDIA" in str(error):
                reason = f"the probe failed with {type(error).__name__}: {error}"
            continue
        if not all(isinstance(value, Tensor) and value.requires_grad for value, *_ in theirs):
            continue
        for form in _candidates(start, probes, theirs):
            if _same(form, probes, theirs):
                return form
        reason = "it gives another value than a discretized mixture of logistics, or another gradient"
    raise Unknown(reason)


def _candidates(start: Form, probes: list[list[Tensor]], theirs: list[tuple[Tensor, ...]]) -> Iterator[Form]:
    """The forms that give the values of the first probe."""
    summed = {3: 0, 1: 1, 0: 2}.get(theirs[0][0].dim())
    if summed is None:
        return
    names = ("batch", "pixels", "channels")
    divisors = [per for count in range(4) for per in itertools.combinations(names, count)]
    factors = (1.0, -1.0, 1 / math.log(2), -1 / math.log(2))
    for levels, convention in itertools.product(_LEVELS, ("openai", "default")):
        plain = dataclasses.replace(start, levels=levels, convention=convention, summed=summed)
        with torch.no_grad():
            value = plain(*probes[0])
            ratio = (theirs[0][0].sum() / value.sum()).item()
            if not _close(value * ratio, theirs[0][0]):
                continue
        for per, factor in itertools.product(divisors, factors):
            form = dataclasses.replace(plain, per=per, factor=factor)
            if math.isclose(ratio, factor / form._count(probes[0][start.image_first]), rel_tol=1e-6):
                yield form


def _probe(form: Form, batch: int, height: int, width: int, mixtures: int, seed: int) -> list[Tensor]:
    """The two arguments, in float64: all kinds of levels, log-scales on both sides of their bound."""
    generator = torch.Generator().manual_seed(seed)
    n_params = mixtures * (3 if form.channels == 1 else 10)
    params = 2 * torch.randn(batch, height, width, n_params, generator=generator, dtype=torch.float64)
    block = params[..., mixtures:].view(batch, height, width, form.channels, -1)
    block[..., mixtures : 2 * mixtures].mul_(2).sub_(3)
    levels = torch.randint(256, (batch, height, width, form.channels), generator=generator)
    levels.view(-1)[:6] = torch.tensor([0, 255, 254, 1, 128, 0])
    image = levels.double() / 127.5 - 1
    if form.params_dim == 1:
        params = params.movedim(-1, 1).contiguous()
    if form.image_dim == 1:
        image = image.movedim(-1, 1).contiguous()
    return [image, params] if form.image_first else [params, image]


def _run(loss: Callable[[Tensor, Tensor], Any], first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """The value, and the gradients by both arguments."""
    arguments = [t.clone().requires_grad_() for t in (first, second)]
    with torch.enable_grad(), on_this_device():
        value = loss(*arguments)
        if not isinstance(value, Tensor):
            raise Unknown(f"it returns {type(value).__name__}, not a tensor")
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view(value.shape)
        grads = torch.autograd.grad((value * weights).sum(), arguments)
    return value, *grads


def _same(form: Form, probes: list[list[Tensor]], theirs: list[tuple[Tensor, ...]]) -> bool:
    pairs = zip(probes, theirs, strict=True)
    return all(all(map(_close, _run(form, *probe), expected)) for probe, expected in pairs)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    size = theirs.detach().abs().max().item()
    # The functions take the logarithm of a difference of nearly equal numbers.
    return torch.allclose(ours.double(), theirs.double(), rtol=1e-6, atol=1e-7 * size)


def _dtypes(
    function: FunctionType, form: Form
) -> Iterator[tuple[tuple[torch.dtype, torch.dtype], torch.dtype]]:
    probe = _probe(form, 2, 3, 5, 2, 0)
    wide = (torch.float32, torch.float64)
    for image in (*wide, *_HALVES):
        for params in (*wide, *_HALVES):
            pair = (image, params) if form.image_first else (params, image)
            try:
                with torch.no_grad(), on_this_device():
                    result = function(*(t.to(d) for t, d in zip(probe, pair, strict=True)))
            except Exception:  # what it cannot do, its replacement leaves to it
                continue
            yield pair, result.dtype
