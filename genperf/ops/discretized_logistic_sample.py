"""Samples of a logistic for each value of an image.

Definitions: see :mod:`genperf.ops.discretized_logistic_nll`. It is
:func:`genperf.ops.mixture_logistic_sample` of a single logistic for each value, and takes its kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genperf.ops._mixture_logistic_checks import CONVENTIONS, check_min_log_scale, check_number, check_one_of
from genperf.ops.discretized_logistic_nll import default_min_log_scale, halves
from genperf.ops.mixture_logistic_sample import _op, check_noise

__all__ = ["discretized_logistic_sample"]

OP = "discretized_logistic_sample"


def discretized_logistic_sample(
    params: Tensor,
    *,
    channel_dim: int = 1,
    convention: str = "default",
    temperature: float = 1.0,
    min_log_scale: float | None = None,
    noise: Tensor | None = None,
    key: Tensor | None = None,
    rng: str = "philox",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw images from a logistic for each value: floats clamped to [-1, 1], not rounded to a level.

    Args:
        params: as of :func:`genperf.ops.discretized_logistic_nll`.
        channel_dim: 1 or -1.
        convention: "nvae" returns values in [0, 1]; the others are one.
        temperature: multiplies the scales.
        min_log_scale: lower bound of the log-scales; by default -7, and -8 for "nvae".
        noise: uniforms in (0, 1] of the result's shape, float32, clamped to [1e-5, 1 - 1e-5].
        key: int64 [2], or [B, 2] with one for each sample, for uniforms of the result's shape.
        rng: "philox" draws a key; "torch" draws the uniforms that NVAE's ``DiscLogistic`` draws.
        generator: what either is drawn from. NVAE draws on the CPU: give ``torch.default_generator``.

    Returns:
        [B, C, *] or [B, *, C] of the dtype of ``params``, without a gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as of :func:`genperf.ops.mixture_logistic_sample`.
    """
    params = halves(OP, params, channel_dim).detach()
    check_one_of(OP, "convention", convention, CONVENTIONS)
    check_number(OP, "temperature", temperature, 1e-6, 1e6, "1e-6 to 1e6")
    if min_log_scale is None:
        min_log_scale = default_min_log_scale(convention)
    min_log_scale = check_min_log_scale(OP, min_log_scale)
    if isinstance(noise, Tensor):
        noise = noise[..., None]
    _, of_values, key = check_noise(OP, params, 1, 0, noise, key, rng, generator, 1)
    unit = convention == "nvae"
    return _op(params, None, of_values, key, 1, 1, False, unit, min_log_scale, 1.0, float(temperature))[:, 0]
