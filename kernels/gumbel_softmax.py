"""One-hot draws from logits, their relaxation and its gradient; the op is ``genperf/ops/gumbel_softmax.py``.

A program takes all classes of some positions, in blocks [BLOCK_K, BLOCK_R]. It reads the logits once for
their largest, once for the draw or the sums, whose exponentials are taken relative to the largest so far, and
once for the result. Noise of a key is made in registers each time, and nothing is stored between.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import FLOAT_MAX, exp, rounded
from ._philox import gumbels_at, gumbels_of_groups
from ._tile import LAUNCH, Example, on_device_of

TILE = 1024  # elements of a block
POSITIONS = 32  # of a block at most, where they lie side by side


@triton.jit
def _load(p, s, i_b, i_k, i_p, m):
    at = i_b[None, :] * s[0] + i_k[:, None] * s[1] + i_p[None, :] * s[2]
    return tl.load(p + at, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _logits(p_logits, s_logits, i_b, i_k, i_p, m, top):
    """-inf beyond the classes; of those that go to infinity together 0, beside which the others are -inf."""
    b_l = _load(p_logits, s_logits, i_b, i_k, i_p, m)
    b_among = tl.where(b_l == top[None, :], 0.0, tl.where(b_l == b_l, float("-inf"), b_l))
    b_l = tl.where(tl.abs(top)[None, :] == float("inf"), b_among, b_l)
    return tl.where(m, b_l, float("-inf"))


@triton.jit
def _top(p_logits, s_logits, i_b, i_p, m_r, K, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """Of each position the largest logit, and whether there is a NaN."""
    b_top = tl.full([BLOCK_K, BLOCK_R], float("-inf"), tl.float32)
    b_flaw = tl.zeros([BLOCK_K, BLOCK_R], tl.int32)
    for k in range(0, K, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m = (i_k < K)[:, None] & m_r[None, :]
        b_l = _load(p_logits, s_logits, i_b, i_k, i_p, m)
        b_top = tl.where(m & (b_l > b_top), b_l, b_top)
        b_flaw = tl.where(b_l == b_l, b_flaw, 1)
    return tl.max(b_top, axis=0), tl.max(b_flaw, axis=0)


@triton.jit
def _keys(p_key, s_key, i_key, i):
    """Seeds and offsets, in the shape of i."""
    zero = i - i
    return tl.load(p_key + i_key * s_key) + zero, tl.load(p_key + i_key * s_key + 1) + zero


@triton.jit
def _noise(
    p_noise, s_noise, p_key, s_key, per_key, i_b, k, i_k, i_p, i_r, m, R, K, P,
    GROUPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Given, or of the key. GROUPS of four elements: of classes, of positions, or "none"."""
    if p_noise is not None:
        b_g = _load(p_noise, s_noise, i_b, i_k, i_p, m)
    elif GROUPS == "positions":
        first = tl.minimum(tl.min(i_r, axis=0) + 4 * tl.arange(0, BLOCK_R // 4), R - 4)
        i_outer = first // P
        i_key = i_outer // per_key
        i = ((i_outer - i_key * per_key) * K * P + first - i_outer * P)[None, :] + i_k[:, None] * P
        seed, offset = _keys(p_key, s_key, i_key[None, :], i)
        b_g = gumbels_of_groups(seed, offset, i // 4)
    else:
        i_key = i_b // per_key
        i_first = (i_b - i_key * per_key) * K * P + i_p
        if GROUPS == "classes":
            i_group = (i_first[:, None] + k) // 4 + tl.arange(0, BLOCK_K // 4)[None, :]
            seed, offset = _keys(p_key, s_key, i_key[:, None], i_group)
            b_g = tl.trans(gumbels_of_groups(seed, offset, i_group))
        else:
            i = i_first[None, :] + i_k[:, None] * P
            seed, offset = _keys(p_key, s_key, i_key[None, :], i)
            b_g = gumbels_at(seed, offset, i)
    return b_g


@triton.jit
def _add(a, b):
    """a + b as a sum and the rest that its rounding leaves, exactly; at most the largest finite number."""
    total = a + b
    total = tl.where(total > FLOAT_MAX, FLOAT_MAX, total)
    of_b = total - a
    rest = (a - (total - of_b)) + (b - of_b)
    return total, tl.where(tl.abs(rest) <= FLOAT_MAX, rest, 0.0)


@triton.jit
def _above(total, rest, most, of_most):
    return (total > most) | ((total == most) & (rest > of_most))


@triton.jit
def _largest(b_total, b_rest):
    """Of each position the largest of pairs."""
    most = tl.max(b_total, axis=0)
    return most, tl.max(tl.where(b_total == most[None, :], b_rest, float("-inf")), axis=0)


@triton.jit
def _exp_of_negative(x):
    """0 below e^-86; NaN stays NaN."""
    return tl.where(x < -86.0, 0.0, exp(x))


@triton.jit
def _positions(R, P, BLOCK_R: tl.constexpr):
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_b = i_r // P
    return i_r, i_b, i_r - i_b * P, i_r < R


@triton.jit
def _draw_kernel(
    p_logits, p_noise, p_key, p_out, s_logits, s_noise, s_key, per_key, R, K, P,
    GROUPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One-hot vectors of the largest noisy logit, the lowest class where several are; NaN where one is."""
    i_r, i_b, i_p, m_r = _positions(R, P, BLOCK_R)
    i_load = tl.where(m_r, i_b, 0)
    top, flaw = _top(p_logits, s_logits, i_load, i_p, m_r, K, BLOCK_K, BLOCK_R)
    b_most = tl.full([BLOCK_K, BLOCK_R], float("-inf"), tl.float32)
    b_rest = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    b_index = tl.zeros([BLOCK_K, BLOCK_R], tl.int32) + tl.arange(0, BLOCK_K)[:, None]
    b_flaw = tl.zeros([BLOCK_K, BLOCK_R], tl.int32) + flaw[None, :]
    for k in range(0, K, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m = (i_k < K)[:, None] & m_r[None, :]
        b_l = _logits(p_logits, s_logits, i_load, i_k, i_p, m, top)
        b_g = _noise(
            p_noise, s_noise, p_key, s_key, per_key, i_load, k, i_k, i_p, i_r, m, R, K, P, GROUPS, BLOCK_K,
            BLOCK_R,
        )  # fmt: skip
        b_z, b_r = _add(b_l, b_g)
        better = _above(b_z, b_r, b_most, b_rest)
        b_most, b_rest = tl.where(better, b_z, b_most), tl.where(better, b_r, b_rest)
        b_index = tl.where(better, i_k[:, None].to(tl.int32), b_index)
        b_flaw = tl.where(b_z == b_z, b_flaw, 1)
    most, of_most = _largest(b_most, b_rest)
    is_most = (b_most == most[None, :]) & (b_rest == of_most[None, :])
    index = tl.min(tl.where(is_most, b_index, 2147483647), axis=0)
    flaw = tl.max(b_flaw, axis=0)
    for k in range(0, K, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        b_y = tl.where(i_k[:, None] == index[None, :], 1.0, 0.0)
        b_y = tl.where(flaw[None, :] != 0, float("nan"), b_y)
        p_to = p_out + (i_b[None, :] * K + i_k[:, None]) * P + i_p[None, :]
        tl.store(p_to, rounded(b_y, p_out.dtype.element_ty), mask=(i_k < K)[:, None] & m_r[None, :])


@triton.jit
def _soft_kernel(
    p_logits, p_noise, p_key, p_grad, p_out, s_logits, s_noise, s_key, s_grad, per_key, R, K, P, inverse,
    GROUPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """softmax((logits + noise) / tau), or the gradient by the logits, given that by it."""
    i_r, i_b, i_p, m_r = _positions(R, P, BLOCK_R)
    i_load = tl.where(m_r, i_b, 0)
    top, _ = _top(p_logits, s_logits, i_load, i_p, m_r, K, BLOCK_K, BLOCK_R)
    # Finite, so that the difference of -inf is not NaN.
    b_most = tl.full([BLOCK_K, BLOCK_R], -FLOAT_MAX, tl.float32)
    b_rest = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    b_sum, b_by_grad = b_rest, b_rest
    for k in range(0, K, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m = (i_k < K)[:, None] & m_r[None, :]
        b_l = _logits(p_logits, s_logits, i_load, i_k, i_p, m, top)
        b_g = _noise(
            p_noise, s_noise, p_key, s_key, per_key, i_load, k, i_k, i_p, i_r, m, R, K, P, GROUPS, BLOCK_K,
            BLOCK_R,
        )  # fmt: skip
        b_z, b_r = _add(b_l, b_g)
        above = _above(b_z, b_r, b_most, b_rest)
        b_less = (b_z - b_most) + (b_r - b_rest)
        b_e = _exp_of_negative(tl.where(above, -b_less, b_less) * inverse)
        b_sum = tl.where(above, b_sum * b_e + 1.0, b_sum + b_e)
        if p_grad is not None:
            b_d = _load(p_grad, s_grad, i_load, i_k, i_p, m)
            b_by_grad = tl.where(above, b_by_grad * b_e + b_d, b_by_grad + b_e * b_d)
        b_most, b_rest = tl.where(above, b_z, b_most), tl.where(above, b_r, b_rest)
    most, of_most = _largest(b_most, b_rest)
    b_e = _exp_of_negative(((b_most - most[None, :]) + (b_rest - of_most[None, :])) * inverse)
    one = tl.full([BLOCK_R], 1.0, tl.float32)
    factor = tl.div_rn(one, tl.sum(b_sum * b_e, axis=0))
    mean = tl.sum(b_by_grad * b_e, axis=0) * factor
    for k in range(0, K, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m = (i_k < K)[:, None] & m_r[None, :]
        b_l = _logits(p_logits, s_logits, i_load, i_k, i_p, m, top)
        b_g = _noise(
            p_noise, s_noise, p_key, s_key, per_key, i_load, k, i_k, i_p, i_r, m, R, K, P, GROUPS, BLOCK_K,
            BLOCK_R,
        )  # fmt: skip
        b_z, b_r = _add(b_l, b_g)
        b_y = _exp_of_negative(((b_z - most[None, :]) + (b_r - of_most[None, :])) * inverse) * factor[None, :]
        if p_grad is not None:
            b_d = _load(p_grad, s_grad, i_load, i_k, i_p, m)
            b_y = b_y * (b_d - mean[None, :]) * inverse
        p_to = p_out + (i_b[None, :] * K + i_k[:, None]) * P + i_p[None, :]
        tl.store(p_to, rounded(b_y, p_out.dtype.element_ty), mask=m)


@triton.jit
def _known_kernel(
    p_y, p_grad, p_out, s_y, s_grad, R, K, P, inverse, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The gradient by the logits of a soft y that is given."""
    _, i_b, i_p, m_r = _positions(R, P, BLOCK_R)
    b_sum = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m = (i_k < K)[:, None] & m_r[None, :]
        b_sum += _load(p_y, s_y, i_b, i_k, i_p, m) * _load(p_grad, s_grad, i_b, i_k, i_p, m)
    mean = tl.sum(b_sum, axis=0)
    for k in range(0, K, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m = (i_k < K)[:, None] & m_r[None, :]
        b_d = _load(p_grad, s_grad, i_b, i_k, i_p, m) - mean[None, :]
        b_out = _load(p_y, s_y, i_b, i_k, i_p, m) * b_d * inverse
        p_to = p_out + (i_b[None, :] * K + i_k[:, None]) * P + i_p[None, :]
        tl.store(p_to, rounded(b_out, p_out.dtype.element_ty), mask=m)


class _Plan(NamedTuple):
    """A launch over tensors [B, K, P]."""

    grid: tuple[int]
    counts: tuple[int, int, int]  # of positions in all, classes, positions side by side
    blocks: dict[str, int]

    @classmethod
    def of(cls, x: Tensor, tile: int = TILE) -> "_Plan":
        outer, classes, inner = x.shape
        block_r = min(POSITIONS, max(4, triton.next_power_of_2(inner)))
        if inner == 1:
            block_r = tile // min(tile, max(4, triton.next_power_of_2(classes)))
        grid = (triton.cdiv(outer * inner, block_r),)
        return cls(grid, (outer * inner, classes, inner), {"BLOCK_K": tile // block_r, "BLOCK_R": block_r})


def _flat(x: Tensor, dim: int) -> Tensor:
    """[B, K, P]."""
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))


class _Source(NamedTuple):
    """Logits and noise as kernels take them."""

    plan: _Plan
    tensors: tuple[Tensor | None, ...]  # logits, noise, key
    strides: tuple[object, ...]  # of them; that of the key between samples
    per_key: int  # entries of dimension 0 that share a key
    groups: str

    @classmethod
    def of(cls, logits: Tensor, noise: Tensor | None, key: Tensor | None, dim: int) -> "_Source":
        x = _flat(logits, dim)
        flat_noise = None if noise is None else _flat(noise, dim)
        outer, classes, inner = x.shape
        by_sample = key is not None and key.dim() == 2
        groups = "classes" if inner == 1 and classes % 4 == 0 else "positions" if inner % 4 == 0 else "none"
        return cls(
            # Keys of their own for all positions fill the registers.
            _Plan.of(x, TILE if groups == "classes" else TILE // 2),
            (x, flat_noise, None if key is None else key.contiguous()),
            (x.stride(), x.stride() if flat_noise is None else flat_noise.stride(), 2 if by_sample else 0),
            outer // logits.shape[0] if by_sample else outer,
            groups,
        )


def gumbel_softmax(
    logits: Tensor, noise: Tensor | None, key: Tensor | None, tau: float, hard: bool, dim: int
) -> Tensor:
    """The torch op ``genperf::gumbel_softmax``."""
    y = logits.new_empty(logits.shape)
    if y.numel() == 0:
        return y
    source = _Source.of(logits, noise, key, dim)
    options = {"GROUPS": source.groups, **source.plan.blocks, **LAUNCH}
    with on_device_of(logits):
        if hard:
            _draw_kernel[source.plan.grid](
                *source.tensors, y, *source.strides, source.per_key, *source.plan.counts, **options
            )
        else:
            _soft_kernel[source.plan.grid](
                *source.tensors, None, y, *source.strides, source.strides[0], source.per_key,
                *source.plan.counts, 1 / tau, **options,
            )  # fmt: skip
    return y


def gumbel_softmax_backward(
    grad: Tensor, y: Tensor | None, logits: Tensor | None, noise: Tensor | None, key: Tensor | None,
    tau: float, dim: int,
) -> Tensor:  # fmt: skip
    """The torch op ``genperf::gumbel_softmax_backward``."""
    of_logits = grad.new_empty(grad.shape)
    if grad.numel() == 0:
        return of_logits
    flat = _flat(grad, dim)
    with on_device_of(grad):
        if logits is None:
            assert y is not None
            known, plan = _flat(y, dim), _Plan.of(flat)
            _known_kernel[plan.grid](
                known, flat, of_logits, known.stride(), flat.stride(), *plan.counts, 1 / tau, **plan.blocks,
                **LAUNCH,
            )  # fmt: skip
        else:
            source = _Source.of(logits, noise, key, dim)
            _soft_kernel[source.plan.grid](
                *source.tensors, flat, of_logits, *source.strides, flat.stride(), source.per_key,
                *source.plan.counts, 1 / tau, GROUPS=source.groups, **source.plan.blocks, **LAUNCH,
            )  # fmt: skip
    return of_logits


def _example(
    shape: tuple[int, ...], dim: int, hard: bool, dtype: torch.dtype = torch.float32, keys: bool = False,
    with_noise: bool = False,
) -> None:  # fmt: skip
    """Forward and backward on meta tensors."""
    logits = torch.empty(shape, dtype=dtype, device="meta")
    noise = torch.empty_like(logits) if with_noise else None
    key = torch.empty((shape[0], 2) if keys else (2,), dtype=torch.int64, device="meta")
    given = None if with_noise else key
    y = gumbel_softmax(logits, noise, given, 0.5, hard, dim)
    if hard:
        gumbel_softmax_backward(y, None, logits, noise, given, 0.5, dim)
    else:
        gumbel_softmax_backward(y, y, None, None, None, 0.5, dim)


AOT = {
    "hard": Example(partial(_example, (256, 8192), 1, True), wide=False, quick=True),
    "soft": Example(partial(_example, (256, 8192), 1, False, torch.bfloat16), wide=False),
    "hard, dim=1": Example(partial(_example, (16, 512, 32, 32), 1, True), wide=False),
    "soft, odd, keys": Example(partial(_example, (3, 1000, 77), 1, False, keys=True), wide=False),
    "hard, noise": Example(partial(_example, (16, 512, 256), 1, True, with_noise=True), wide=False),
}
