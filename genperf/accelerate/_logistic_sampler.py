"""Samplers of the mixture of logistics, written as functions: those of PixelCNN++'s many ports.

Where channels stand, for grey or RGB, and in which layout and on which device the uniforms are drawn is
found by running the function on small tensors, from one seed with the kernel.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from genperf.accelerate._logistic_probe import Unknown, on_this_device, other_arguments, values_of
from genperf.ops.mixture_logistic_sample import mixture_logistic_sample

_SEED = 11


@dataclass(frozen=True)
class Form:
    """What a sampler draws from parameters of rank 4.

    Attributes:
        params_dim, image_dim: 1 or -1, where channels stand in the parameters and in the result.
        noise_dim: 1 or -1, where the mixtures stand in the uniforms and how the result lies in memory.
        channels: 1 or 3.
        on_cpu: whether uniforms are drawn on the CPU and moved.
        counted: whether the second parameter is the number of mixtures.
    """

    params_dim: int
    image_dim: int
    noise_dim: int
    channels: int
    on_cpu: bool
    counted: bool

    def __call__(self, params: Tensor, rng: str) -> Tensor:
        drawn = mixture_logistic_sample(
            params.movedim(self.params_dim, self.noise_dim),
            image_channels=self.channels,
            channel_dim=self.noise_dim,
            rng=rng,
            generator=torch.default_generator if self.on_cpu and rng == "torch" else None,
        )
        return drawn.contiguous().movedim(self.noise_dim, self.image_dim)

    def fits(self, params: Any, mixtures: Any) -> bool:
        """Whether the kernel can draw from these arguments."""
        if not isinstance(params, Tensor) or params.dim() != 4 or params.numel() == 0:
            return False
        if torch.is_grad_enabled() and params.requires_grad:
            return False
        each = 3 if self.channels == 1 else 10
        count, rest = divmod(params.shape[self.params_dim], each)
        return rest == 0 and (not self.counted or (type(mixtures) is int and mixtures == count))


@dataclass(frozen=True)
class Sampler:
    """A recognised function.

    Attributes:
        form: what it draws.
        others: the values of its parameters after the parameters of the mixture and their number.
        dtypes: the dtypes of its argument for which its result has the same.
    """

    form: Form
    others: tuple[Any, ...]
    dtypes: tuple[torch.dtype, ...]


@functools.cache
def recognised(function: FunctionType) -> Sampler:
    """What ``function`` draws.

    Raises:
        Unknown: it is not such a sampler, with the reason.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if not parameters or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise Unknown(f"it takes {signature}, not parameters and the number of mixtures")
    counted = len(parameters) > 1 and parameters[1].default is parameters[1].empty
    others = next(other_arguments(parameters[1 + counted :]), None)
    if others is None:
        raise Unknown(f"it takes {signature}, not parameters and the number of mixtures")

    def run(params: Tensor, mixtures: int) -> tuple[Any, bool, Tensor]:
        with torch.no_grad(), on_this_device() as moves:
            torch.manual_seed(_SEED)
            result = function(params, *((mixtures,) if counted else ()), *others)
            return result, moves.moved_noise, torch.get_rng_state()

    form = _form(run, counted)
    probe = _probe(form, 2, 3, 5, 2, 0)
    dtypes = []
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        try:
            if run(probe.to(dtype), 2)[0].dtype == dtype:
                dtypes.append(dtype)
        except Exception:  # what it cannot do, its replacement leaves to it
            continue
    return Sampler(form, others, tuple(dtypes))


def replacement(function: FunctionType, sampler: Sampler, rng: str) -> Callable[..., Tensor]:
    """``function`` with the kernel; what it does not cover runs ``function``."""
    form, others, dtypes = sampler.form, sampler.others, sampler.dtypes
    values = values_of(inspect.signature(function))

    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        try:
            params, *more = values(args, kwargs)
        except TypeError:  # the function itself will say what is wrong
            return function(*args, **kwargs)
        mixtures = more.pop(0) if form.counted else None
        if tuple(more) != others or not form.fits(params, mixtures) or params.dtype not in dtypes:
            return function(*args, **kwargs)
        return function(*args, **kwargs) if torch.jit.is_tracing() else form(params, rng)

    return replaced


def _form(run: Callable[[Tensor, int], tuple[Any, bool, Tensor]], counted: bool) -> Form:
    reason = "no layout of the parameters gives an image"
    for params_dim, channels in itertools.product((1, -1), (3, 1)):
        start = Form(params_dim, params_dim, params_dim, channels, False, counted)
        probes = [(_probe(start, *sizes), sizes[3]) for sizes in ((2, 3, 5, 2, 0), (3, 4, 2, 3, 1))]
        try:
            theirs = [run(params, mixtures) for params, mixtures in probes]
        except Exception as error:
            if "CUDA" in str(error) or "NVIDIA" in str(error):
                reason = f"the probe failed with {type(error).__name__}: {error}"
            continue
        for noise_dim, image_dim in itertools.product((1, -1), (1, -1)):
            form = Form(params_dim, image_dim, noise_dim, channels, theirs[0][1], counted)
            if all(_same(form, params, *their) for (params, _), their in zip(probes, theirs, strict=True)):
                return form
        reason = "from one seed it draws something else than a mixture of logistics"
    raise Unknown(reason)


def _probe(form: Form, batch: int, height: int, width: int, mixtures: int, seed: int) -> Tensor:
    """Parameters in float32; log-scales on both sides of their bound."""
    generator = torch.Generator().manual_seed(seed)
    n_params = mixtures * (3 if form.channels == 1 else 10)
    params = torch.randn(batch, height, width, n_params, generator=generator)
    block = params[..., mixtures:].view(batch, height, width, form.channels, -1)
    block[..., mixtures : 2 * mixtures].mul_(3).sub_(4)
    return params.movedim(-1, 1).contiguous() if form.params_dim == 1 else params


def _same(form: Form, params: Tensor, theirs: Any, _: bool, state: Tensor) -> bool:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        ours = form(params, "torch")
        if not torch.equal(torch.get_rng_state(), state):
            return False
    return (
        isinstance(theirs, Tensor)
        and ours.shape == theirs.shape
        and _layout(ours) == _layout(theirs)
        and torch.allclose(ours, theirs.to(ours.dtype), atol=2e-6)
    )


def _layout(x: Tensor) -> list[int]:
    """The strides of what has more than one entry."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
