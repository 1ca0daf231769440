"""The negative log-likelihood of a Gaussian for each value, given its mean and log-variance or log-scale.

Definitions: D. P. Kingma and M. Welling, "Auto-Encoding Variational Bayes", ICLR 2014; ``nll`` of the
``DiagonalGaussianDistribution`` of diffusers and latent-diffusion; O. Rybkin, K. Daniilidis and S. Levine,
"Simple and effective VAE training with calibrated decoders", ICML 2021 (arXiv:2006.13202), whose one scale
for all values is ``scale``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from genperf.ops._element_nll import ElementNll, check_reduction, check_values
from genperf.ops._element_nll_reference import gaussian, gaussian_backward
from genperf.ops._mixture_logistic_checks import check_one_of, check_tensor
from genperf.ops.discretized_logistic_nll import halves

__all__ = ["gaussian_nll"]

OP = "gaussian_nll"
_FACTORS = {"logvar": 0.5, "logsigma": 1.0}
_head = ElementNll(OP, 1, gaussian, gaussian_backward)


def check_clamp(op: str, clamp: Any) -> tuple[float, float]:
    if clamp is None:
        return -math.inf, math.inf
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2 or not clamp[0] <= clamp[1]:
        raise ValueError(f"{op}: clamp is {clamp}, expected (low, high) with low <= high")
    return float(clamp[0]), float(clamp[1])


def _own_scale(mean: Any, scale: Any) -> Tensor:
    """[B, *], as the mean; where it is repeated, by its strides alone."""
    check_tensor(OP, "params", mean)
    check_tensor(OP, "scale", scale)
    if mean.dim() == 0:
        raise ValueError(f"{OP}: params has shape (), expected [B, *]")
    if scale.device != mean.device:
        raise ValueError(f"{OP}: scale is on {scale.device}, expected {mean.device}, as params")
    try:
        return scale.expand(mean.shape)
    except RuntimeError:
        raise ValueError(
            f"{OP}: scale has shape {tuple(scale.shape)}, expected one that broadcasts to params, "
            f"{tuple(mean.shape)}"
        ) from None


def gaussian_nll(
    params: Tensor,
    x: Tensor,
    *,
    scale: Tensor | None = None,
    parametrization: str = "logvar",
    clamp: tuple[float, float] | None = None,
    channel_dim: int = 1,
    reduction: str = "none",
) -> Tensor:
    """Negative log-likelihood of values under a Gaussian for each, in nats, with its constant.

    ``((x - mean)^2 / sigma^2 + log 2 pi) / 2 + log sigma``. Differentiable in all tensors. Arithmetic is in
    float32 for half precision. Everything is finite for finite parameters: the inverse of sigma, and
    distances from a mean in sigmas, count as at most 2**60. Backward computes all again, but for float32
    ``params`` on the CPU that hold both halves, whose gradient is made in forward in one piece and scaled in
    backward. Samples are :func:`genperf.ops.gaussian_sample`'s.

    Args:
        params: [B, 2 C, *] or [B, *, 2 C]: C means, then C scales; with ``scale`` means alone, of the shape
            of x. float32, float16, bfloat16 or float64, any strides.
        x: [B, C, *] or [B, *, C], any float dtype and number of channels.
        scale: of a shape that broadcasts to the means', such as [] for one scale learned for all values.
        parametrization: of the scale: "logvar": sigma = exp(scale / 2); "logsigma": sigma = exp(scale).
        clamp: (low, high) bounds on the scale, (-30, 20) in diffusers; no gradient passes beyond them.
        channel_dim: 1 or -1, where ``params`` are halved.
        reduction: "none" (the shape of x), "sample" [B]: the sum over all other dimensions, or "sum" [].

    Returns:
        float32 (float64 for float64).

    Raises:
        TypeError: for a non-tensor, or a dtype that is not as above.
        ValueError: for shapes, devices, bounds or names that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    check_one_of(OP, "parametrization", parametrization, tuple(_FACTORS))
    low, high = check_clamp(OP, clamp)
    settings = (_FACTORS[parametrization], low, high, check_reduction(OP, reduction))
    if scale is None:
        params = halves(OP, params, channel_dim)
    else:
        scale = _own_scale(params, scale)
        params = params[:, None]
    check_values(OP, x, params[:, 0], "the means")
    return _head(params, scale, x, settings)
