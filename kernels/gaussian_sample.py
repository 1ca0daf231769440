"""The reparameterized Gaussian sample with its divergence and log-probability.

The math is ``csrc/gaussian_sample/math.h``; the op is ``genperf/ops/gaussian_sample.py``. Forward and
backward are one launch each (plus one for the sums of a sample longer than a tile): every input is read
once, every output is written once, and the noise is made in registers, so both run at the speed of
memory. The backward pass makes the noise again from the key.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import LOG_2PI, exp, exp_m1, exp_m1_mx, log, rounded, saturate, sigmoid, softplus, tanh
from ._philox import normals_at, normals_of_groups
from ._tile import (
    LAUNCH,
    Example,
    Plan,
    numbering,
    offset_of,
    on_device_of,
    plan,
    store_sums,
    sum_chunks,
    tile,
)

LOG_VARIANCE = tl.constexpr(0)
LOG_SIGMA = tl.constexpr(1)
STANDARD_DEVIATION = tl.constexpr(2)
SOFTPLUS = tl.constexpr(3)
SOFT_CLAMP = tl.constexpr(4)


@triton.jit
def _gaussian(b_mean, b_scale, low, high, shift, TRANSFORM: tl.constexpr):
    """mu, sigma and log sigma, and the derivatives of mu by mean and of the other two by scale."""
    b_mu = b_mean
    b_dmu = tl.full(b_mean.shape, 1.0, tl.float32)
    if TRANSFORM == LOG_VARIANCE or TRANSFORM == LOG_SIGMA:  # noqa: SIM109
        factor: tl.constexpr = 0.5 if TRANSFORM == LOG_VARIANCE else 1.0
        b_clamped = tl.where(b_scale < low, low, b_scale)
        b_clamped = tl.where(b_clamped > high, high, b_clamped)
        b_log_sigma = b_clamped * factor
        b_sigma = exp(b_log_sigma)
        b_dlog_sigma = tl.where(b_clamped == b_scale, factor, 0.0)
        b_dsigma = b_sigma * b_dlog_sigma
    elif TRANSFORM == STANDARD_DEVIATION:
        b_sigma = b_scale
        b_log_sigma = log(b_scale)
        b_dsigma = tl.full(b_scale.shape, 1.0, tl.float32)
        b_dlog_sigma = tl.div_rn(b_dsigma, b_scale)
    elif TRANSFORM == SOFTPLUS:
        b_sigma = softplus(b_scale) + shift
        b_log_sigma = log(b_sigma)
        b_dsigma = sigmoid(b_scale)
        # the limit, where both underflow
        b_dlog_sigma = tl.where(b_sigma == 0.0, 1.0, tl.div_rn(b_dsigma, b_sigma))
    else:
        tl.static_assert(TRANSFORM == SOFT_CLAMP)
        b_m, b_dmu = tanh(b_mean * 0.2)
        b_mu = 5.0 * b_m
        b_t, b_dt = tanh(b_scale * 0.2)
        b_e = exp(5.0 * b_t)
        b_sigma = b_e + shift
        b_log_sigma = log(b_sigma)
        b_dsigma = b_e * b_dt
        b_dlog_sigma = tl.div_rn(b_dsigma, b_sigma)
    return b_mu, b_sigma, b_log_sigma, b_dmu, b_dsigma, b_dlog_sigma


@triton.jit
def _shift(b_difference, b_prior_log_sigma):
    """(mu - mu') / sigma', which is 0 for two equal means even where 1 / sigma' is infinite."""
    return tl.where(b_difference == 0.0, b_difference, b_difference * exp(-b_prior_log_sigma))


@triton.jit
def _load(p, i_b, i_n, m, sizes, strides):
    return tl.load(p + offset_of(i_b, i_n, sizes, strides), mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p, b, i_b, i_n, m, sizes, strides):
    tl.store(p + offset_of(i_b, i_n, sizes, strides), rounded(b, p.dtype.element_ty), mask=m)


@triton.jit
def _load_gradient(p, n_samples, i_b, i_n, m, sizes, strides, REDUCE: tl.constexpr):
    """The gradient of a sum [BLOCK_B, 1], or that of each element [BLOCK_B, BLOCK_N]."""
    if REDUCE:
        i_b = tl.reshape(i_b, [i_b.shape[0]])
        return tl.load(p + i_b * strides[0], mask=i_b < n_samples, other=0.0)[:, None]
    else:
        return _load(p, i_b, i_n, m, sizes, strides)


@triton.jit
def _noise(p_noise, p_key, s_key, n_samples, i_chunk, i_b, i_n, m, sizes, s_noise, GROUPED: tl.constexpr):
    """The tile's noise: the caller's own, or that of the key, whose element numbers s_noise gives."""
    if p_noise is not None:
        b_eps = _load(p_noise, i_b, i_n, m, sizes, s_noise)
    else:
        seed = tl.load(p_key + i_b * s_key, mask=i_b < n_samples, other=0)  # [BLOCK_B, 1]
        offset = tl.load(p_key + i_b * s_key + 1, mask=i_b < n_samples, other=0)
        if GROUPED:
            GROUPS: tl.constexpr = i_n.shape[1] // 4
            i_group = i_chunk.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[None, :]
            b_eps = normals_of_groups(seed, offset, i_b * (s_noise[0] // 4) + i_group)
        else:
            b_eps = normals_at(seed, offset, offset_of(i_b, i_n, sizes, s_noise))
    return b_eps


@triton.jit
def _store_result(p, b, n_samples, n_chunks, i_chunk, i_b, i_n, m, sizes, strides, REDUCE: tl.constexpr):
    """The values as they are, or their sums over the tile."""
    if REDUCE:
        store_sums(p, b, n_samples, n_chunks, i_chunk, i_b, m)
    else:
        _store(p, b, i_b, i_n, m, sizes, strides)


@triton.jit
def _forward_kernel(
    p_mean,
    p_scale,
    p_prior_mean,
    p_prior_scale,
    p_noise,
    p_key,
    p_z,
    p_kl,
    p_log_prob,
    strides,
    sizes,
    s_key,
    n_samples,
    n_elements,
    n_chunks,
    low,
    high,
    shift,
    temperature,
    TRANSFORM: tl.constexpr,
    REDUCE: tl.constexpr,
    GROUPED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_mean, s_scale, s_prior_mean, s_prior_scale, s_noise, s_z, s_kl, s_log_prob = strides
    i_chunk, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    b_mean = _load(p_mean, i_b, i_n, m, sizes, s_mean)  # [BLOCK_B, BLOCK_N], as all that follow
    b_scale = _load(p_scale, i_b, i_n, m, sizes, s_scale)
    b_mu, b_sigma, b_log_sigma, _, _, _ = _gaussian(b_mean, b_scale, low, high, shift, TRANSFORM)
    b_sigma, b_log_sigma = b_sigma * temperature, b_log_sigma + log(temperature)
    if p_z is not None or p_log_prob is not None:
        b_eps = _noise(p_noise, p_key, s_key, n_samples, i_chunk, i_b, i_n, m, sizes, s_noise, GROUPED)
    if p_z is not None:
        _store(p_z, b_mu + b_sigma * b_eps, i_b, i_n, m, sizes, s_z)
    if p_kl is not None:
        b_shift, b_log_ratio, b_ratio = b_mu, 2.0 * b_log_sigma, b_sigma * b_sigma
        if p_prior_mean is not None:
            b_prior_mean = _load(p_prior_mean, i_b, i_n, m, sizes, s_prior_mean)
            b_prior_scale = _load(p_prior_scale, i_b, i_n, m, sizes, s_prior_scale)
            b_prior_mu, _, b_prior_log_sigma, _, _, _ = _gaussian(
                b_prior_mean, b_prior_scale, low, high, shift, TRANSFORM
            )
            b_shift = _shift(b_mu - b_prior_mu, b_prior_log_sigma)
            b_log_ratio = 2.0 * (b_log_sigma - b_prior_log_sigma)
            b_ratio = exp(b_log_ratio)
        b_kl = saturate(0.5 * b_shift * b_shift + 0.5 * exp_m1_mx(b_log_ratio, b_ratio))
        _store_result(p_kl, b_kl, n_samples, n_chunks, i_chunk, i_b, i_n, m, sizes, s_kl, REDUCE)
    if p_log_prob is not None:
        b_log_prob = -0.5 * (b_eps * b_eps) - b_log_sigma - 0.5 * LOG_2PI
        _store_result(
            p_log_prob, b_log_prob, n_samples, n_chunks, i_chunk, i_b, i_n, m, sizes, s_log_prob, REDUCE
        )


@triton.jit
def _backward_kernel(
    p_grad_z,
    p_grad_kl,
    p_grad_log_prob,
    p_mean,
    p_scale,
    p_prior_mean,
    p_prior_scale,
    p_noise,
    p_key,
    p_grad_mean,
    p_grad_scale,
    p_grad_prior_mean,
    p_grad_prior_scale,
    strides,
    sizes,
    s_key,
    n_samples,
    n_elements,
    n_chunks,
    low,
    high,
    shift,
    temperature,
    TRANSFORM: tl.constexpr,
    REDUCE: tl.constexpr,
    GROUPED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_mean, s_scale, s_prior_mean, s_prior_scale, s_noise, s_grad_z = strides[:6]
    s_grad_mean, s_grad_scale, s_grad_prior_mean, s_grad_prior_scale, s_grad_kl, s_grad_log_prob = strides[6:]
    i_chunk, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    b_mean = _load(p_mean, i_b, i_n, m, sizes, s_mean)  # [BLOCK_B, BLOCK_N], as all that follow
    b_scale = _load(p_scale, i_b, i_n, m, sizes, s_scale)
    b_mu, b_sigma, b_log_sigma, b_dmu, b_dsigma, b_dlog_sigma = _gaussian(
        b_mean, b_scale, low, high, shift, TRANSFORM
    )
    b_sigma, b_log_sigma = b_sigma * temperature, b_log_sigma + log(temperature)
    b_by_mu = tl.zeros(b_mean.shape, tl.float32)
    b_by_scale = tl.zeros(b_mean.shape, tl.float32)
    if p_grad_z is not None:
        b_eps = _noise(p_noise, p_key, s_key, n_samples, i_chunk, i_b, i_n, m, sizes, s_noise, GROUPED)
        b_by_mu = _load(p_grad_z, i_b, i_n, m, sizes, s_grad_z)
        b_by_scale = b_by_mu * b_eps * (b_dsigma * temperature)
    if p_grad_log_prob is not None:
        b_grad = _load_gradient(p_grad_log_prob, n_samples, i_b, i_n, m, sizes, s_grad_log_prob, REDUCE)
        b_by_scale = b_by_scale - b_grad * b_dlog_sigma
    if p_grad_kl is not None:
        b_grad = _load_gradient(p_grad_kl, n_samples, i_b, i_n, m, sizes, s_grad_kl, REDUCE)
        b_kl_by_mu, b_log_ratio, b_ratio = b_mu, 2.0 * b_log_sigma, b_sigma * b_sigma
        if p_prior_mean is not None:
            b_prior_mean = _load(p_prior_mean, i_b, i_n, m, sizes, s_prior_mean)
            b_prior_scale = _load(p_prior_scale, i_b, i_n, m, sizes, s_prior_scale)
            b_prior_mu, _, b_prior_log_sigma, b_prior_dmu, _, b_prior_dlog_sigma = _gaussian(
                b_prior_mean, b_prior_scale, low, high, shift, TRANSFORM
            )
            b_shift = _shift(b_mu - b_prior_mu, b_prior_log_sigma)
            b_kl_by_mu = _shift(b_shift, b_prior_log_sigma)
            b_log_ratio = 2.0 * (b_log_sigma - b_prior_log_sigma)
            b_ratio = exp(b_log_ratio)
        b_kl_by_log_sigma = exp_m1(b_log_ratio, b_ratio)
        b_by_mu = b_by_mu + b_grad * b_kl_by_mu
        b_by_scale = b_by_scale + b_grad * b_kl_by_log_sigma * b_dlog_sigma
        if p_prior_mean is not None:
            b_by_prior_mean = b_grad * -b_kl_by_mu * b_prior_dmu
            b_by_prior_scale = b_grad * (-(b_shift * b_shift) - b_kl_by_log_sigma) * b_prior_dlog_sigma
            _store(p_grad_prior_mean, b_by_prior_mean, i_b, i_n, m, sizes, s_grad_prior_mean)
            _store(p_grad_prior_scale, b_by_prior_scale, i_b, i_n, m, sizes, s_grad_prior_scale)
    _store(p_grad_mean, b_by_mu * b_dmu, i_b, i_n, m, sizes, s_grad_mean)
    _store(p_grad_scale, b_by_scale, i_b, i_n, m, sizes, s_grad_scale)


def _noise_strides(shape: torch.Size, noise: Tensor | None, key: Tensor | None) -> tuple[int, ...] | None:
    """The strides of the noise, or of the numbers that the key gives the elements."""
    if noise is not None:
        return noise.stride()
    return None if key is None else numbering(shape, key)


def _grouped(p: Plan, key: Tensor | None) -> bool:
    """Whether the key's noise for each sample is whole groups of four, in the order tiles are walked."""
    s_noise = p.strides[4]
    return key is not None and not p.sizes and s_noise[1] == 1 and s_noise[0] % 4 == 0


def _strides(*tensors: Tensor | None) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if t is None else t.stride() for t in tensors)


def _counts(p: Plan, key: Tensor | None) -> tuple[object, ...]:
    """The kernels' arguments from `sizes` to `n_chunks`."""
    return p.sizes, 2 if key is not None and key.dim() == 2 else 0, *p.counts


def gaussian_sample_forward(
    mean: Tensor,
    scale: Tensor,
    prior_mean: Tensor | None,
    prior_scale: Tensor | None,
    noise: Tensor | None,
    key: Tensor | None,
    transform: int,
    low: float,
    high: float,
    offset: float,
    temperature: float,
    reduce: bool,
    want_z: bool,
    want_kl: bool,
    want_log_prob: bool,
) -> tuple[Tensor | None, ...]:
    """The torch op ``genperf::gaussian_sample``; None for what is not wanted."""
    if not want_kl:
        prior_mean = prior_scale = None
    if not want_z and not want_log_prob:
        noise = key = None
    z = torch.empty_like(mean) if want_z else None
    kl, log_prob = (
        torch.empty_like(mean, dtype=torch.float32) if wanted and not reduce else None
        for wanted in (want_kl, want_log_prob)
    )
    s_noise = _noise_strides(mean.shape, noise, key)
    p = plan(mean.shape, *_strides(mean, scale, prior_mean, prior_scale), s_noise, *_strides(z, kl, log_prob))
    if reduce:
        kl, log_prob = (
            mean.new_empty(p.n_samples, p.n_chunks, dtype=torch.float32) if wanted else None
            for wanted in (want_kl, want_log_prob)
        )
    with on_device_of(mean):
        _forward_kernel[p.grid](
            mean,
            scale,
            prior_mean,
            prior_scale,
            noise,
            None if key is None else key.contiguous(),
            z,
            kl,
            log_prob,
            p.strides,
            *_counts(p, key),
            low,
            high,
            offset,
            temperature,
            TRANSFORM=transform,
            REDUCE=reduce,
            GROUPED=_grouped(p, key),
            **p.constants,
            **LAUNCH,
        )
        if reduce:
            kl, log_prob = (None if x is None else sum_chunks(x) for x in (kl, log_prob))
    return z, kl, log_prob


def gaussian_sample_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_log_prob: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    prior_mean: Tensor | None,
    prior_scale: Tensor | None,
    noise: Tensor | None,
    key: Tensor | None,
    transform: int,
    low: float,
    high: float,
    offset: float,
    temperature: float,
    reduce: bool,
) -> tuple[Tensor | None, ...]:
    """The torch op ``genperf::gaussian_sample_backward``; None for a prior that plays no part."""
    if grad_kl is None:
        prior_mean = prior_scale = None
    if grad_z is None:
        noise = key = None
    inputs = (mean, scale, prior_mean, prior_scale)
    grads = [None if x is None else torch.empty_like(x) for x in inputs]
    s_sums = _strides(grad_kl, grad_log_prob)
    s_noise = _noise_strides(mean.shape, noise, key)
    s_elements = (*_strides(*inputs), s_noise, *_strides(grad_z, *grads))
    p = plan(mean.shape, *s_elements, *((None, None) if reduce else s_sums))
    strides = (*p.strides[:-2], *s_sums) if reduce else p.strides
    # Two Gaussians and their derivatives need twice the registers, hence half the elements a thread.
    launch = LAUNCH if prior_mean is None else {**LAUNCH, "num_warps": 8}
    with on_device_of(mean):
        _backward_kernel[p.grid](
            grad_z,
            grad_kl,
            grad_log_prob,
            *inputs,
            noise,
            None if key is None else key.contiguous(),
            *grads,
            strides,
            *_counts(p, key),
            low,
            high,
            offset,
            temperature,
            TRANSFORM=transform,
            REDUCE=reduce,
            GROUPED=_grouped(p, key),
            **p.constants,
            **launch,
        )
    return tuple(grads)


def _example(
    backward: bool,
    shape: tuple[int, ...] = (64, 4, 64, 64),
    transform: tl.constexpr = LOG_VARIANCE,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    prior: bool = False,
    noise: bool = False,
    keys: bool = False,
    reduce: bool = True,
    log_prob: bool = False,
) -> None:
    """Launch on meta tensors: parameters that are the halves of one tensor, as an encoder gives them."""

    def halves() -> tuple[Tensor, ...]:
        both = torch.empty((shape[0], 2 * shape[1], *shape[2:]), dtype=dtype, device="meta")
        return both.to(memory_format=memory_format).chunk(2, dim=1)

    mean, scale = halves()
    eps = torch.empty_like(mean) if noise else None
    key = None if noise else torch.empty((shape[0], 2) if keys else (2,), dtype=torch.int64, device="meta")
    inputs = (mean, scale, *(halves() if prior else (None, None)), eps, key)
    settings = (transform.value, -30.0, 20.0, 1e-2, 0.5, reduce)
    if backward:
        grad_sum = torch.empty(shape[:1] if reduce else shape, device="meta")
        grads = (torch.empty_like(mean), grad_sum, grad_sum if log_prob else None)
        gaussian_sample_backward(*grads, *inputs, *settings)
    else:
        gaussian_sample_forward(*inputs, *settings, True, True, log_prob)


_EXAMPLES: dict[str, dict] = {
    "": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "vectors": {"shape": (256, 128)},
    "log sigma, prior": {"transform": LOG_SIGMA, "prior": True, "reduce": False},
    "std, noise": {"transform": STANDARD_DEVIATION, "noise": True},
    "softplus, keys": {"transform": SOFTPLUS, "keys": True, "log_prob": True},
    "soft clamp, prior": {"transform": SOFT_CLAMP, "prior": True, "reduce": False, "log_prob": True},
    "channels last": {"memory_format": torch.channels_last},
    "odd": {"shape": (3, 5, 7, 9)},
    "long": {"shape": (1, 4, 1 << 15, 1 << 15)},
}
AOT = {
    f"{'backward' if backward else 'forward'} {name}".strip(): Example(
        partial(_example, backward, **options),
        wide=name not in ("channels last", "odd", "long"),
        quick=not name,
    )
    for name, options in _EXAMPLES.items()
    for backward in (False, True)
}
