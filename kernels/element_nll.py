"""The likelihoods of the Bernoulli and Gaussian heads; the math is ``csrc/element_nll/kernel.inl``.

Forward and backward are one launch each (plus those of the sums of more than a tile): every input is read
once and every output written once, at the speed of memory.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import FLOAT_MAX, LOG_2PI, exp, log_normal, rounded
from ._tile import LAUNCH, Example, offset_of, on_device_of, plan, store_sums, sum_chunks, tile

BERNOULLI = tl.constexpr(0)
GAUSSIAN = tl.constexpr(1)
FAR = tl.constexpr(2.0**60)
LEAST_LOG_SCALE = tl.constexpr(-41.58883083359672)  # -log(FAR)


@triton.jit
def _load(p, i_b, i_n, m, sizes, strides):
    return tl.load(p + offset_of(i_b, i_n, sizes, strides), mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p, b, i_b, i_n, m, sizes, strides):
    tl.store(p + offset_of(i_b, i_n, sizes, strides), rounded(b, p.dtype.element_ty), mask=m)


@triton.jit
def _clamped(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _distance(b_mean, b_scale, b_x, factor, low, high):
    """(x - mean) / sigma, 1 / sigma and log sigma."""
    b_log_sigma = _clamped(b_scale, low, high) * factor
    b_inverse = exp(-tl.where(b_log_sigma < LEAST_LOG_SCALE, LEAST_LOG_SCALE, b_log_sigma))
    b_away = _clamped(b_x - b_mean, -FLOAT_MAX, FLOAT_MAX)
    return _clamped(b_away * b_inverse, -FAR, FAR), b_inverse, b_log_sigma


@triton.jit
def _forward_kernel(
    p_first,
    p_second,
    p_x,
    p_nll,
    strides,
    sizes,
    n_samples,
    n_elements,
    n_chunks,
    factor,
    low,
    high,
    HEAD: tl.constexpr,
    REDUCE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_first, s_second, s_x, s_nll = strides
    i_chunk, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    b_first = _load(p_first, i_b, i_n, m, sizes, s_first)  # [BLOCK_B, BLOCK_N], as all that follow
    b_x = _load(p_x, i_b, i_n, m, sizes, s_x)
    if HEAD == BERNOULLI:
        b_size = tl.abs(b_first)
        b_e = exp(-b_size)
        b_u = 1.0 + b_e
        b_share = tl.where(b_first > 0.0, 1.0 - b_x, b_x)
        b_wrong = tl.where(b_share == 0.0, b_share, b_size * b_share)
        b_nll = b_wrong + (log_normal(b_u) + tl.div_rn(b_e - (b_u - 1.0), b_u))
    else:
        b_second = _load(p_second, i_b, i_n, m, sizes, s_second)
        b_distance, _, b_log_sigma = _distance(b_first, b_second, b_x, factor, low, high)
        b_nll = b_distance * 0.5 * b_distance + b_log_sigma + 0.5 * LOG_2PI
    if REDUCE:
        store_sums(p_nll, b_nll, n_samples, n_chunks, i_chunk, i_b, m)
    else:
        _store(p_nll, b_nll, i_b, i_n, m, sizes, s_nll)


@triton.jit
def _backward_kernel(
    p_grad,
    p_first,
    p_second,
    p_x,
    p_grad_first,
    p_grad_second,
    p_grad_x,
    s_grad,
    strides,
    sizes,
    n_samples,
    n_elements,
    n_chunks,
    factor,
    low,
    high,
    HEAD: tl.constexpr,
    REDUCE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_first, s_second, s_x, s_grad_first, s_grad_second, s_grad_x, s_each = strides
    _, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    b_first = _load(p_first, i_b, i_n, m, sizes, s_first)  # [BLOCK_B, BLOCK_N], as all that follow
    b_x = _load(p_x, i_b, i_n, m, sizes, s_x)
    if REDUCE:
        b_grad = tl.load(p_grad + i_b * s_grad, mask=i_b < n_samples, other=0.0)  # [BLOCK_B, 1]
    else:
        b_grad = _load(p_grad, i_b, i_n, m, sizes, s_each)
    if HEAD == BERNOULLI:
        b_e = exp(-tl.abs(b_first))
        b_by_first = tl.div_rn(tl.where(b_first >= 0.0, 1.0, b_e), 1.0 + b_e) - b_x
        b_by_x = -b_first
    else:
        b_second = _load(p_second, i_b, i_n, m, sizes, s_second)
        b_distance, b_inverse, _ = _distance(b_first, b_second, b_x, factor, low, high)
        b_by_x = b_distance * b_inverse
        b_by_first = -b_by_x
        m_bound = (b_second < low) | (b_second > high)
        b_by_second = tl.where(m_bound, 0.0, (1.0 - b_distance * b_distance) * factor)
        if p_grad_second is not None:
            _store(p_grad_second, b_by_second * b_grad, i_b, i_n, m, sizes, s_grad_second)
    if p_grad_first is not None:
        _store(p_grad_first, b_by_first * b_grad, i_b, i_n, m, sizes, s_grad_first)
    if p_grad_x is not None:
        _store(p_grad_x, b_by_x * b_grad, i_b, i_n, m, sizes, s_grad_x)


def _strides(*tensors: Tensor | None) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if t is None else t.stride() for t in tensors)


def element_nll_forward(
    head: int,
    first: Tensor,
    second: Tensor | None,
    x: Tensor,
    factor: float,
    low: float,
    high: float,
    reduction: int,
) -> Tensor:
    """The torch ops ``genperf::bernoulli_nll`` and ``genperf::gaussian_nll``: all tensors are [B, *]."""
    if x.numel() == 0:
        shape = (x.shape, x.shape[:1], ())[reduction]
        return x.new_zeros(shape, dtype=torch.float32)
    nll = torch.empty(x.shape, dtype=torch.float32, device=x.device) if reduction == 0 else None
    p = plan(tuple(x.shape), *_strides(first, second, x, nll))
    if nll is None:
        nll = x.new_empty(p.n_samples, p.n_chunks, dtype=torch.float32)
    with on_device_of(x):
        _forward_kernel[p.grid](
            first, second, x, nll, p.strides, p.sizes, *p.counts, factor, low, high,
            HEAD=head, REDUCE=reduction > 0, **p.constants, **LAUNCH,
        )  # fmt: skip
        if reduction:
            nll = sum_chunks(nll)
        if reduction == 2:
            nll = sum_chunks(nll[None])[0]
    return nll


def element_nll_backward(
    head: int,
    grad: Tensor,
    grads: tuple[Tensor | None, ...],
    first: Tensor,
    second: Tensor | None,
    x: Tensor,
    factor: float,
    low: float,
    high: float,
    reduction: int,
) -> None:
    """The backward passes: to ``grads``, those of first, second and x, or None for those not wanted."""
    if x.numel() == 0:
        return
    each = grad.stride() if reduction == 0 else None
    p = plan(tuple(x.shape), *_strides(first, second, x, *grads), each)
    with on_device_of(x):
        _backward_kernel[p.grid](
            grad, first, second, x, *grads, grad.stride(0) if reduction == 1 else 0, p.strides, p.sizes,
            *p.counts, factor, low, high, HEAD=head, REDUCE=reduction > 0, **p.constants, **LAUNCH,
        )  # fmt: skip


def _example(
    head: tl.constexpr,
    backward: bool,
    reduction: int = 1,
    shape: tuple[int, ...] = (64, 4, 64, 64),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Launch on meta tensors."""
    params = torch.empty(shape[0], 2 if head.value else 1, *shape[1:], dtype=dtype, device="meta")
    x = torch.empty(shape, device="meta")
    first, second = params[:, 0], params[:, 1] if head.value else None
    settings = (0.5, -30.0, 20.0, reduction)
    if not backward:
        element_nll_forward(head.value, first, second, x, *settings)
        return
    grad = torch.empty(shape[:reduction] if reduction else shape, device="meta")
    grads = torch.empty_like(params)
    of_second = grads[:, 1] if head.value else None
    element_nll_backward(head.value, grad, (grads[:, 0], of_second, None), first, second, x, *settings)


_EXAMPLES: dict[str, dict] = {
    "": {},
    "each, bfloat16": {"reduction": 0, "dtype": torch.bfloat16},
    "odd": {"shape": (3, 10, 7, 9)},
}
AOT = {
    f"{name} {'backward' if backward else 'forward'} {kind}".strip(): Example(
        partial(_example, head, backward, **options),
        wide=kind != "odd",
        quick=not kind and name == "gaussian",
    )
    for kind, options in _EXAMPLES.items()
    for backward in (False, True)
    for name, head in (("bernoulli", BERNOULLI), ("gaussian", GAUSSIAN))
}
