"""The negative log-likelihood of discretized logistics, one for each value.

Definitions: D. P. Kingma et al., "Improving variational inference with inverse autoregressive flow", NIPS
2016 (arXiv:1606.04934); ``DiscLogistic`` of NVlabs/NVAE. It is :func:`genperf.ops.mixture_logistic_nll` of a
single logistic for each value, and takes its kernels.
"""

from __future__ import annotations

from torch import Tensor

from genperf.ops._mixture_logistic_checks import (
    channels_first,
    check_channel_dim,
    check_tensor,
    check_values,
    checked_settings,
    scaled,
)
from genperf.ops.mixture_logistic_nll import apply

__all__ = ["discretized_logistic_nll"]

OP = "discretized_logistic_nll"


def default_min_log_scale(convention: str) -> float:
    return -8.0 if convention == "nvae" else -7.0


def halves(op: str, params: Tensor, channel_dim: int) -> Tensor:
    """Means and log-scales of params [B, 2 C, *] or [B, *, 2 C] as [B, 2, C, *] or [B, 2, *, C], a view."""
    check_channel_dim(op, channel_dim)
    check_tensor(op, "params", params)
    if params.dim() < 2 or params.shape[channel_dim] % 2:
        raise ValueError(
            f"{op}: params has shape {tuple(params.shape)}, expected an even size in dimension {channel_dim}"
            ": means and log-scales"
        )
    channels = params.shape[channel_dim] // 2
    if channel_dim == 1:
        return params.unflatten(1, (2, channels))
    return params.unflatten(-1, (2, channels)).movedim(-2, 1)


def discretized_logistic_nll(
    params: Tensor,
    x: Tensor,
    *,
    levels: int = 256,
    channel_dim: int = 1,
    convention: str = "default",
    edge: float | tuple[float, float] | None = None,
    min_log_scale: float | None = None,
    reduction: str = "none",
    check: bool = False,
) -> Tensor:
    """Negative log-likelihood of images under a discretized logistic for each value, in nats.

    Args:
        params: [B, 2 C, *] or [B, *, 2 C]: C means, then C log-scales. float32, float16, bfloat16 or float64,
            any strides.
        x: [B, C, *] or [B, *, C], any number of channels.
        levels, channel_dim, convention, edge, check: as of :func:`genperf.ops.mixture_logistic_nll`.
        min_log_scale: lower bound of the log-scales; by default -7, and -8 for "nvae".
        reduction: "none" (the shape of x), "sample" [B], "sum" [], or "sample_mean" [B].

    Returns:
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError, RuntimeError: as of :func:`genperf.ops.mixture_logistic_nll`.
    """
    params = halves(OP, params, channel_dim)
    x = channels_first(OP, "x", x, 1)[:, None]
    if min_log_scale is None:
        min_log_scale = default_min_log_scale(convention)
    settings = checked_settings(OP, 1, False, levels, convention, edge, min_log_scale, reduction)
    check_values(OP, x, params, check, convention == "nvae")
    return scaled(apply(params, x, settings), reduction, x)
