"""Samples of the mixture of logistics of PixelCNN++, grey or RGB.

Definitions: see :mod:`genperf.ops.mixture_logistic_nll`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._mixture_logistic_checks import (
    CONVENTIONS,
    MAX_MIXTURES,
    channels_first,
    check_channel_dim,
    check_channels,
    check_integer,
    check_min_log_scale,
    check_mixtures,
    check_number,
    check_one_of,
)
from genperf.ops._mixture_logistic_reference import reference_sample
from genperf.ops.philox_random import check_key, draw_key, passing

__all__ = ["mixture_logistic_sample"]

OP = "mixture_logistic_sample"
_compiling = torch.compiler.is_dynamo_compiling
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: What ``noise`` may be.
Noise = Tensor | tuple[Tensor, Tensor]


def _output(params: Tensor, of_mixture: Any, of_values: Any, key: Any, channels: int, *_: Any) -> Tensor:
    return params.new_empty(len(params), channels, *params.shape[2:])


_op = Operator(
    OP,
    "(Tensor params, Tensor? of_mixture, Tensor? of_values, Tensor? key, int channels, int mixtures,"
    " bool logits, bool unit, float min_log_scale, float temperature, float heat) -> Tensor",
    reference_sample,
    _output,
)


def _cpu(params: Tensor, of_mixture: Any, of_values: Any, key: Any, channels: int, *settings: Any) -> Tensor:
    out = _output(params, of_mixture, of_values, key, channels)
    _backend.native.cpu.mixture_logistic_sample(  # type: ignore[union-attr]
        out, params, of_mixture, of_values, key, *settings
    )
    return out


def _triton(*args: Any) -> Tensor:
    from genperf.kernels.mixture_logistic_sample import mixture_logistic_sample

    return mixture_logistic_sample(*args)


def _refuses(params: Tensor, *_: Any) -> str | None:
    if params.dtype not in _NATIVE_DTYPES:
        return f"{params.dtype} is left to the reference"
    return f"{params.dim()} dimensions, at most 8" if params.dim() > 8 else None


_op.implement(
    "cpu", _cpu, _refuses,
    direct=_backend.native.cpu.mixture_logistic_sample_direct if _backend.native else None,
)  # fmt: skip
_op.implement("triton", _triton, _refuses)


def _settings(
    channel_dim: int,
    channels: int,
    mixtures: int | None,
    convention: str,
    min_log_scale: float,
    temperature: float,
) -> tuple[int, int, bool, float, float, float]:
    """channels, mixtures (0: what the parameters give), unit, min_log_scale, temperature and heat."""
    check_channel_dim(OP, channel_dim)
    check_channels(OP, channels)
    if mixtures is not None:
        check_integer(OP, "mixtures", mixtures, 1, MAX_MIXTURES)
    check_one_of(OP, "convention", convention, CONVENTIONS)
    check_number(OP, "temperature", temperature, 1e-6, 1e6, "1e-6 to 1e6")
    min_log_scale = check_min_log_scale(OP, min_log_scale)
    unit, temperature = convention == "nvae", float(temperature)
    return (
        channels,
        mixtures or 0,
        unit,
        min_log_scale,
        temperature,
        1.0 / temperature if unit else temperature,
    )


_cached_settings = functools.lru_cache(maxsize=256, typed=True)(_settings)


def check_noise(
    op: str, params: Tensor, channels: int, scores: int, noise: Any, key: Any, rng: str, generator: Any,
    channel_dim: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Uniforms [B, 1 or K, *] (None without scores) and [B, C, *], or a key."""
    if (noise is not None) + (key is not None) + (generator is not None) > 1:
        raise ValueError(f"{op}: more than one of noise, key and generator is given, expected one at most")
    check_one_of(op, "rng", rng, ("philox", "torch"))
    batch, space = len(params), tuple(params.shape[2:])
    if noise is None and rng == "torch" and key is None:
        noise = _torch_noise(op, params, channels, scores, generator, channel_dim)
    if noise is not None:
        pair = isinstance(noise, (tuple, list))
        if pair and len(noise) != 2:
            raise ValueError(f"{op}: noise has {len(noise)} entries, expected a tensor or a pair of them")
        for name, tensor in (("noise[0]", noise[0]), ("noise[1]", noise[1])) if pair else (("noise", noise),):
            if tensor is None and name == "noise[0]" and not scores:
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{op}: {name} is {got}, expected a float32 tensor")
            if tensor.device != params.device:
                raise ValueError(f"{op}: {name} is on {tensor.device}, expected {params.device}, as params")
        if pair:
            first, second = (n if n is None or channel_dim == 1 else n.movedim(-1, 1) for n in noise)
            _check_shape(op, "noise[0]", first if scores else None, (batch, scores, *space))
            _check_shape(op, "noise[1]", second, (batch, channels, *space))
            return first if scores else None, second, None
        slots = channels + bool(scores)
        _check_shape(op, "noise", noise, (batch, *space, slots))
        noise = noise.movedim(-1, 1)
        return (noise[:, :1] if scores else None), noise[:, slots - channels :], None
    if key is None:
        if isinstance(generator, (list, tuple)) and len(generator) != batch:
            raise ValueError(f"{op}: generator has {len(generator)} entries, expected {batch}, one a sample")
        return None, None, draw_key(params.device, generator)
    check_key(key, params.shape, op)
    if key.device != params.device:
        raise ValueError(f"{op}: key is on {key.device}, expected {params.device}, as params")
    return None, None, key


def _check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def _torch_noise(
    op: str, params: Tensor, channels: int, scores: int, generator: Any, channel_dim: int
) -> tuple[Tensor | None, Tensor]:
    """What public code draws: uniforms of the logits' shape, then of the result's."""
    if isinstance(generator, (list, tuple)):
        raise TypeError(f"{op}: generator is a list, expected a torch.Generator for rng='torch'")
    batch, space = len(params), params.shape[2:]
    device = params.device if generator is None else generator.device

    def draw(n: int) -> Tensor:
        shape = (batch, n, *space) if channel_dim == 1 else (batch, *space, n)
        return (
            torch.empty(shape, device=device)
            .uniform_(1e-5, 1.0 - 1e-5, generator=generator)
            .to(params.device)
        )

    of_mixture = draw(scores) if scores else None
    return of_mixture, draw(channels)


def mixture_logistic_sample(
    params: Tensor,
    *,
    mixtures: int | None = None,
    image_channels: int = 3,
    channel_dim: int = 1,
    convention: str = "default",
    temperature: float = 1.0,
    min_log_scale: float = -7.0,
    noise: Noise | None = None,
    key: Tensor | None = None,
    rng: str = "philox",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw grey or RGB images from mixtures of K logistics: floats in [-1, 1], not rounded to a level.

    A mixture is chosen for each pixel; its logistic gives the first channel, and with the coefficients the
    next ones, each clamped to [-1, 1] before the next takes its share. With a key the mixture is found by the
    inverse of the cumulative distribution, from one uniform, and the result is what the pixel-by-pixel
    sampler (:class:`genperf.sampling.heads.LogisticMixture`) draws; each backend draws the same bits.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), ``triton``, ``reference``. The only CUDA C++ kernel is that
    of the pixel sampler.

    Args:
        params: as of :func:`genperf.ops.mixture_logistic_nll`.
        mixtures: K; by default what P gives.
        image_channels: 1 or 3.
        channel_dim: 1 or -1.
        convention: "nvae" returns values in [0, 1] and divides the scale by the temperature, as its code
            does; the others are one.
        temperature: divides the logits and multiplies the scales.
        min_log_scale: lower bound of the log-scales.
        noise: uniforms in (0, 1], float32 [B, *, 1 + C], the first of a pixel for the mixture; or a pair as
            public code has it: of the logits' shape, for Gumbel noise, and of the result's. Those of the
            logistics and of the pair are clamped to [1e-5, 1 - 1e-5].
        key: int64 [2], or [B, 2] with one for each sample, for uniforms [B, *, 1 + C].
        rng: "philox" draws a key; "torch" draws the pair that public code draws, in its order: NVAE with
            ``channel_dim=1``, VDVAE and the PyTorch ports of PixelCNN++ with -1. Their draw is the largest
            logit with Gumbel noise.
        generator: what either is drawn from. NVAE draws on the CPU: give ``torch.default_generator``.

    Returns:
        [B, C, *] or [B, *, C] of the dtype of ``params``, without a gradient. NaN where a logit is NaN or
        +inf, or all are -inf, or what was chosen is NaN.

    Raises:
        TypeError, ValueError, RuntimeError: as of :func:`genperf.ops.mixture_logistic_nll`, and for noise,
            keys and generators that do not fit.
    """
    compiling = _compiling()
    check = _settings if compiling else _cached_settings
    settings = check(channel_dim, image_channels, mixtures, convention, min_log_scale, temperature)
    if (
        noise is None and generator is None and rng == "philox"
        and not compiling and (direct := _op.direct("cpu")) is not None
    ):  # fmt: skip
        drawn = direct(params, channel_dim, key, passing, settings)
        if drawn is not NotImplemented:
            return drawn if channel_dim == 1 else drawn.movedim(1, -1)
    params = channels_first(OP, "params", params, channel_dim).detach()
    mixtures = check_mixtures(OP, params, image_channels, mixtures)
    arrays = check_noise(OP, params, image_channels, mixtures, noise, key, rng, generator, channel_dim)
    drawn = _op(params, *arrays, image_channels, mixtures, True, *settings[2:])
    return drawn if channel_dim == 1 else drawn.movedim(1, -1)
