"""The negative log-likelihood of the discretized mixture of logistics, and its gradients.

The math is ``csrc/mixture_logistic_nll/math.h``; the op is ``genperf/ops/mixture_logistic_nll.py``. A thread
has a position and walks over its mixtures, whose log-probabilities are summed as they come. So neighbouring
threads read what lies side by side in memory where channels come first, the order of a sum does not depend
on the layout, and any number of mixtures takes the same registers. Forward is one launch (and one for the
sums of more than one tile). Backward is one, which walks twice: what the first walk finds would take more
memory than the parameters, if it were kept.
"""

# ruff: noqa: RUF005 - Triton does not take (*a, b)

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._logistic import LONG, POSITIONS, exp_down, level_mass, reciprocal, share_of
from ._math import FLOAT_MAX, log, log_normal, rounded
from ._tile import LAUNCH, Example, offset_of, on_device_of, plan, tile

SUMS = 1024  # partial sums that are added at a time


@triton.jit
def _load(p, m):
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p, b, m):
    tl.store(p, rounded(b, p.dtype.element_ty), mask=m)


@triton.jit
def _weight(b_x):
    """e^x for x <= 0, and 0 where that is below e^-87."""
    return tl.where(b_x < -87.0, 0.0, exp_down(b_x))


@triton.jit
def _values(p_x, s_channel, m, CHANNELS: tl.constexpr, UNIT: tl.constexpr):
    """The image channels, in [-1, 1]."""
    b_x = ()
    for _ in tl.static_range(CHANNELS):
        b_value = _load(p_x, m)
        if UNIT:
            b_value = 2.0 * b_value - 1.0
        b_x = b_x + (b_value,)
        p_x += s_channel
    return b_x


@triton.jit
def _mixture(
    p, step, m, b_x, definition,
    CHANNELS: tl.constexpr, LOGITS: tl.constexpr, EXACT: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Log-probability of the values under a mixture, less its logit; its derivatives by each distance and
    each log-scale, the shares and their derivatives.

    ``p``: its logit, or the mean where there are none; ``step``: from there to its next parameter.
    """
    p_mean = p + step if LOGITS else p
    share = ()
    slope = ()
    if CHANNELS == 3:
        for c in tl.static_range(3):
            b_share, b_slope = share_of(_load(p_mean + (3 * c + 2) * step, m))
            share = share + (b_share,)
            slope = slope + (b_slope,)
    BLOCK: tl.constexpr = 2 if CHANNELS == 1 else 3
    by_distance = ()
    by_log_scale = ()
    b_exponent = tl.zeros(m.shape, tl.float32)
    b_ratio = tl.full(m.shape, 1.0, tl.float32)
    for c in tl.static_range(CHANNELS):
        b_mean = _load(p_mean + BLOCK * c * step, m)
        if c == 1:
            b_mean = b_mean + share[0] * b_x[0]
        if c == 2:
            b_mean = (b_mean + share[1] * b_x[0]) + share[2] * b_x[1]
        b_log_scale = _load(p_mean + (BLOCK * c + 1) * step, m)
        b_e, b_r, b_d, b_s = level_mass(b_x[c], b_mean, b_log_scale, definition, EXACT, GRADIENT)
        b_exponent = b_exponent + b_e
        b_ratio = b_ratio * b_r
        by_distance = by_distance + (b_d,)
        by_log_scale = by_log_scale + (b_s,)
    return b_exponent + log_normal(b_ratio), by_distance, by_log_scale, share, slope


@triton.jit
def _add(b_largest, b_sum, b_x):
    """x to a sum of exponentials relative to the largest. A NaN is not the largest, but in the sum."""
    b_e = _weight(-tl.abs(b_x - b_largest))
    above = b_x > b_largest
    return tl.where(above, b_x, b_largest), tl.where(above, b_sum * b_e + 1.0, b_sum + b_e)


@triton.jit
def _sums(
    p, s_channel, step, m, b_x, K, definition,
    CHANNELS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of all mixtures' joint log-probabilities the largest and the sum relative to it; of the logits."""
    b_largest = tl.full(m.shape, -FLOAT_MAX, tl.float32)
    b_sum = tl.zeros(m.shape, tl.float32)
    b_logits_largest = b_largest
    b_logits_sum = b_sum
    for _ in range(K):
        b_logit = _load(p, m)
        b_log_p, _, _, _, _ = _mixture(p, step, m, b_x, definition, CHANNELS, True, EXACT, False)
        b_largest, b_sum = _add(b_largest, b_sum, b_log_p + b_logit)
        b_logits_largest, b_logits_sum = _add(b_logits_largest, b_logits_sum, b_logit)
        p += s_channel
    return b_largest, b_sum, b_logits_largest, b_logits_sum


@triton.jit
def _forward_kernel(
    p_params,
    p_x,
    p_out,
    strides,
    channels,
    sizes,
    n_samples,
    n_elements,
    n_chunks,
    K,
    definition,
    CHANNELS: tl.constexpr,
    LOGITS: tl.constexpr,
    EXACT: tl.constexpr,
    UNIT: tl.constexpr,
    REDUCE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_params, s_x, s_out = strides
    i_chunk, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    b_x = _values(p_x + offset_of(i_b, i_n, sizes, s_x), channels[1], m, CHANNELS, UNIT)
    p_params += offset_of(i_b, i_n, sizes, s_params)  # [BLOCK_B, BLOCK_N], as all blocks
    step = (tl.zeros([], tl.int64) + K) * channels[0]
    if LOGITS:
        b_largest, b_sum, b_logits_largest, b_logits_sum = _sums(
            p_params, channels[0], step, m, b_x, K, definition, CHANNELS, EXACT
        )
        b_nll = (b_logits_largest - b_largest) + (log(b_logits_sum) - log(b_sum))
    else:
        b_log_p, _, _, _, _ = _mixture(p_params, step, m, b_x, definition, CHANNELS, False, EXACT, False)
        b_nll = 0.0 - b_log_p
    if REDUCE:
        b_total = tl.sum(tl.where(m, b_nll, 0.0).to(tl.float64), axis=1, keep_dims=True)  # [BLOCK_B, 1]
        tl.store(p_out + i_b * n_chunks + i_chunk, b_total.to(p_out.dtype.element_ty), mask=i_b < n_samples)
    else:
        tl.store(p_out + offset_of(i_b, i_n, sizes, s_out), b_nll, mask=m)


@triton.jit
def _sum_kernel(p_partials, p_out, n, BLOCK: tl.constexpr):
    """Float64 [rows, n], contiguous, to the sums of rows, a program each."""
    i_row = tl.program_id(0).to(tl.int64)
    p_partials += i_row * n
    b_sum = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_sum += tl.load(p_partials + i, mask=i < n, other=0.0)
    tl.store(p_out + i_row, tl.sum(b_sum, axis=0).to(tl.float32))


@triton.jit
def _backward_kernel(
    p_grad,
    p_params,
    p_x,
    p_grad_params,
    p_grad_x,
    strides,
    channels,
    sizes,
    n_samples,
    n_elements,
    n_chunks,
    K,
    definition,
    CHANNELS: tl.constexpr,
    LOGITS: tl.constexpr,
    EXACT: tl.constexpr,
    UNIT: tl.constexpr,
    REDUCE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_grad, s_params, s_x, s_grad_params, s_grad_x = strides
    _, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    b_x = _values(p_x + offset_of(i_b, i_n, sizes, s_x), channels[1], m, CHANNELS, UNIT)
    p_params += offset_of(i_b, i_n, sizes, s_params)  # [BLOCK_B, BLOCK_N], as all blocks
    if REDUCE:
        b_grad = tl.zeros(m.shape, tl.float32) + _load(p_grad + i_b * s_grad[0], i_b < n_samples)
    else:
        b_grad = _load(p_grad + offset_of(i_b, i_n, sizes, s_grad), m)
    K_64 = tl.zeros([], tl.int64) + K
    step = K_64 * channels[0]
    if LOGITS:
        b_largest, b_sum, b_logits_largest, b_logits_sum = _sums(
            p_params, channels[0], step, m, b_x, K, definition, CHANNELS, EXACT
        )
        b_over = 0.0 - reciprocal(b_sum)
        b_logits_over = reciprocal(b_logits_sum)
    b_of_x = ()
    for _ in tl.static_range(CHANNELS):
        b_of_x = b_of_x + (tl.zeros(m.shape, tl.float32),)
    if p_grad_params is not None:
        p_grad_params += offset_of(i_b, i_n, sizes, s_grad_params)
        to = K_64 * channels[2]
    for _ in range(K):
        b_log_p, by_distance, by_log_scale, share, slope = _mixture(
            p_params, step, m, b_x, definition, CHANNELS, LOGITS, EXACT, True
        )
        b_w = tl.full(m.shape, -1.0, tl.float32)
        if LOGITS:
            b_logit = _load(p_params, m)
            b_w = _weight((b_log_p + b_logit) - b_largest) * b_over
        b_d0 = b_w * by_distance[0]
        if CHANNELS == 3:
            b_d1 = b_w * by_distance[1]
            b_d2 = b_w * by_distance[2]
        if p_grad_params is not None:
            p_to = p_grad_params
            if LOGITS:
                b_prior = _weight(b_logit - b_logits_largest) * b_logits_over
                _store(p_to, (b_prior + b_w) * b_grad, m)
                p_to += to
            _store(p_to, -b_d0 * b_grad, m)
            _store(p_to + to, b_w * by_log_scale[0] * b_grad, m)
            if CHANNELS == 3:
                _store(p_to + 2 * to, -b_d1 * b_x[0] * slope[0] * b_grad, m)
                _store(p_to + 3 * to, -b_d1 * b_grad, m)
                _store(p_to + 4 * to, b_w * by_log_scale[1] * b_grad, m)
                _store(p_to + 5 * to, -b_d2 * b_x[0] * slope[1] * b_grad, m)
                _store(p_to + 6 * to, -b_d2 * b_grad, m)
                _store(p_to + 7 * to, b_w * by_log_scale[2] * b_grad, m)
                _store(p_to + 8 * to, -b_d2 * b_x[1] * slope[2] * b_grad, m)
            p_grad_params += channels[2]
        if p_grad_x is not None:
            if CHANNELS == 3:
                b_of_x = (
                    ((b_of_x[0] + b_d0) - b_d1 * share[0]) - b_d2 * share[1],
                    (b_of_x[1] + b_d1) - b_d2 * share[2],
                    b_of_x[2] + b_d2,
                )
            else:
                b_of_x = (b_of_x[0] + b_d0,)
        p_params += channels[0]
    if p_grad_x is not None:
        p_grad_x += offset_of(i_b, i_n, sizes, s_grad_x)
        for c in tl.static_range(CHANNELS):
            b_g = b_of_x[c] * b_grad
            _store(p_grad_x, 2.0 * b_g if UNIT else b_g, m)
            p_grad_x += channels[3]


def _positions(tensor: Tensor | None) -> tuple[int, ...] | None:
    """The strides of positions [B, *]."""
    return None if tensor is None else (tensor.stride(0), *tensor.stride()[2:])


def _channel(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.stride(1)


def _constants(x: Tensor, settings: tuple) -> tuple[int, tuple[float, ...], dict[str, object]]:
    """K, the definition as level_mass takes it, and what is compiled in."""
    mixtures, logits, levels, low, high, exact, unit, min_log_scale, reduction = settings
    half = 1.0 / (levels - 1)
    return (
        mixtures,
        (half, math.log(2.0 * half), low, high, min_log_scale),
        {
            "CHANNELS": x.shape[1], "LOGITS": logits, "EXACT": exact, "UNIT": unit, "REDUCE": reduction != 0,
        },
    )  # fmt: skip


def mixture_logistic_nll(params: Tensor, x: Tensor, *settings) -> Tensor:
    """The torch op ``genperf::mixture_logistic_nll``."""
    mixtures, definition, constants = _constants(x, settings)
    reduction, shape = settings[-1], (len(x), *x.shape[2:])
    if x.numel() == 0:
        return params.new_zeros((shape, shape[:1], ())[reduction], dtype=torch.float32)
    out = params.new_empty(shape, dtype=torch.float32) if reduction == 0 else None
    p = plan(shape, _positions(params), _positions(x), None if out is None else out.stride(), size=POSITIONS)
    if out is None:
        short = reduction == 1 and p.n_chunks == 1
        out = params.new_empty(p.n_samples, p.n_chunks, dtype=torch.float32 if short else torch.float64)
    with on_device_of(params):
        _forward_kernel[p.grid](
            params, x, out, p.strides, (_channel(params), _channel(x)), p.sizes, *p.counts, mixtures,
            definition, **constants, **p.constants, **LAUNCH,
        )  # fmt: skip
        if reduction == 0:
            return out
        if out.dtype == torch.float64:
            sums = params.new_empty(p.n_samples if reduction == 1 else 1, dtype=torch.float32)
            _sum_kernel[(len(sums),)](out, sums, out.numel() // len(sums), BLOCK=SUMS, **LAUNCH)
            out = sums
    return out.view(p.n_samples if reduction == 1 else ())


def mixture_logistic_nll_backward(
    grad: Tensor, params: Tensor, x: Tensor, *settings
) -> tuple[Tensor | None, Tensor | None]:
    """The torch op ``genperf::mixture_logistic_nll_backward``; None for what is not wanted."""
    *settings, want_params, want_x = settings
    mixtures, definition, constants = _constants(x, settings)
    grad_params = torch.empty_like(params) if want_params else None
    grad_x = torch.empty_like(x) if want_x else None
    if x.numel() == 0:
        return grad_params, grad_x
    shape, reduction = (len(x), *x.shape[2:]), settings[-1]
    p = plan(
        shape, _positions(params), _positions(x), _positions(grad_params), _positions(grad_x),
        grad.stride() if reduction == 0 else None, size=POSITIONS,
    )  # fmt: skip
    s_grad = p.strides[4] if reduction == 0 else (grad.stride(0) if reduction == 1 else 0,)
    with on_device_of(params):
        _backward_kernel[p.grid](
            grad, params, x, grad_params, grad_x, (s_grad, *p.strides[:4]),
            (_channel(params), _channel(x), _channel(grad_params), _channel(grad_x)), p.sizes, *p.counts,
            mixtures, definition, **constants, **p.constants, **LONG,
        )  # fmt: skip
    return grad_params, grad_x


def _example(
    backward: bool, mixtures: int = 10, channels: int = 3, shape: tuple[int, ...] = (64, 32, 32),
    dtype: torch.dtype = torch.float32, last: bool = False, exact: bool = True, unit: bool = False,
    logits: bool = True, reduction: int = 2,
) -> None:  # fmt: skip
    """On meta tensors."""
    n = mixtures * ((3 if channels == 1 else 10) if logits else 2)

    def tensor(n: int, dtype: torch.dtype) -> Tensor:
        if last:
            return torch.empty(*shape, n, dtype=dtype, device="meta").movedim(-1, 1)
        return torch.empty(shape[0], n, *shape[1:], dtype=dtype, device="meta")

    params, x = tensor(n, dtype), tensor(channels, torch.float32)
    settings = (mixtures, logits, 256, -0.999, 0.999, exact, unit, -7.0, reduction)
    if backward:
        grad = torch.empty((shape, shape[:1], ())[reduction], device="meta")
        mixture_logistic_nll_backward(grad, params, x, *settings, True, True)
    else:
        mixture_logistic_nll(params, x, *settings)


_EXAMPLES: dict[str, dict] = {
    "": {},
    "OpenAI, channels last, bfloat16": {"exact": False, "last": True, "dtype": torch.bfloat16},
    "NVAE, by sample": {"exact": False, "unit": True, "reduction": 1},
    "grey, each": {"channels": 1, "reduction": 0},
    "one logistic, half": {
        "mixtures": 1, "channels": 1, "logits": False, "shape": (32, 3, 64, 64), "dtype": torch.float16
    },
    "long": {"shape": (1, 1 << 15, 1 << 15)},
}  # fmt: skip
# Not wide: 32 threads of a warp read 128 bytes, whose 4 (or 2) are of a position each.
AOT = {
    f"{'backward' if backward else 'forward'} {name}".strip(): Example(
        partial(_example, backward, **options), wide=False, quick=not name
    )
    for name, options in _EXAMPLES.items()
    for backward in (False, True)
}
