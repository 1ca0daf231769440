"""Residual vector quantization; the op is ``genperf/ops/residual_vector_quantize.py``.

Few vectors, such as a frame of a stream, go through all stages in one launch, a program for each, which
keeps the residual in registers: distances are computed as differences in float32, whose error is relative, so
that the best and the second best tell whether the best is proven; where it is not, the program ranks the
codebook in float64 and exact integers. Nothing is made ready of the codebooks. For many vectors every stage
is a search on tensor cores, the launches of ``vq_nearest``, and one more that takes the codewords away.
"""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import rounded
from ._tile import LAUNCH, Example, collapsed, offset_of, on_device_of
from ._vq_exact import L2, compare, measure
from ._vq_words import Words, joined
from .vector_quantize import divisor_of
from .vq_nearest import prepare_codebooks, vq_nearest

FEW = 512  # vectors for which a program each is faster than to prepare the codebooks
LONGEST = 1024  # dimensions that a program holds in registers
ELEMENTS = tl.constexpr(2048)  # of a block of codewords, or of vectors
PREPARED = 1 << 21  # numbers of the codebooks that are made ready at a time, in float64


@triton.jit
def _exactly_nearest(p_r, p_book, s_k, s_d, K, D, BLOCK_D: tl.constexpr):
    """The lowest index of the codewords nearest to the vector at p_r; 0 where there is none."""
    nearest = tl.zeros([], tl.int64)
    least = tl.full([], float("inf"), tl.float64)
    error = tl.zeros([], tl.float64)
    for j in range(K):
        k = tl.zeros([], tl.int64) + j
        value, bound = measure(p_r, 1, p_book + k * s_k, s_d, D, L2, BLOCK_D)
        usable = value < float("inf")
        nearer = usable & (value + bound < least - error)
        if usable & (nearer == 0) & ((least + error < value - bound) == 0):
            order = compare(p_r, 1, p_book + k * s_k, p_book + nearest * s_k, s_d, D, L2, BLOCK_D)
            nearer = order < 0
        nearest = tl.where(nearer, k, nearest)
        least = tl.where(nearer, value, least)
        error = tl.where(nearer, bound, error)
    return nearest


@triton.jit
def _stages_kernel(
    p_x, p_books, p_limits, p_residual, p_out, p_indices, p_squares, sizes, strides, s_d, out_sizes,
    out_strides, s_out_d, s_book, s_k, s_c, N, K, D, stages, n_stages,
    LIMITED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All stages of one vector."""
    i_row = tl.program_id(0).to(tl.int64)
    i_group = tl.program_id(1).to(tl.int64)
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < D
    p_vector = p_x + offset_of(i_group, i_row, sizes, strides)
    b_x = tl.load(p_vector + i_d.to(tl.int64) * s_d, mask=m_d, other=0.0).to(tl.float32)
    limit = n_stages
    if LIMITED:
        limit = tl.minimum(limit, tl.maximum(tl.load(p_limits + i_row), 0).to(tl.int32))
    finite = tl.min(tl.where(tl.abs(b_x) < float("inf"), 1, 0), axis=0)
    b_total = tl.where(limit > 0, b_x * 0.0, 0.0)  # NaN where x is not finite
    i_at = i_group * N + i_row
    p_r = p_residual + i_at * BLOCK_D
    g = (tl.zeros([], tl.float32) + D + 10) * 6.1e-8
    least = (tl.zeros([], tl.float32) + D) * 3e-38
    for i in range(stages):
        i_stage = i_group * stages + i
        active = i < limit
        index = tl.full([], -1, tl.int64)
        square = tl.zeros([], tl.float32)
        if active:
            p_book = p_books + i_stage * s_book
            best = tl.full([], float("inf"), tl.float32)
            second = best
            index = tl.zeros([], tl.int64)
            for k in range(0, K, BLOCK_K):
                i_k = k + tl.arange(0, BLOCK_K)
                at = i_k.to(tl.int64)[:, None] * s_k + i_d.to(tl.int64)[None, :] * s_c
                b_c = tl.load(p_book + at, mask=(i_k < K)[:, None] & m_d[None, :], other=0.0)
                b_difference = b_x[None, :] - b_c.to(tl.float32)  # [BLOCK_K, BLOCK_D]
                b_s = tl.sum(b_difference * b_difference, axis=1)
                b_s = tl.where((b_s < float("inf")) & (i_k < K), b_s, float("inf"))
                here = tl.min(b_s, axis=0)
                first = tl.min(tl.where(b_s == here, i_k, K), axis=0)
                next_here = tl.min(tl.where(i_k == first, float("inf"), b_s), axis=0)
                second = tl.minimum(tl.minimum(second, next_here), tl.maximum(best, here))
                index = tl.where(here < best, first.to(tl.int64), index)
                best = tl.minimum(best, here)
            if ((second > best * (1.0 + 2.1 * g) + least) == 0) & (finite != 0):
                tl.store(p_r + i_d, b_x)
                tl.debug_barrier()
                index = _exactly_nearest(p_r, p_book, s_k, s_c, K, D, BLOCK_D)
                tl.debug_barrier()
            b_q = tl.load(p_book + index * s_k + i_d.to(tl.int64) * s_c, mask=m_d, other=0.0).to(tl.float32)
            b_difference = b_x - b_q
            square = tl.sum(b_difference * b_difference, axis=0)
            b_total += b_q
            b_x = rounded(b_difference, p_x.dtype.element_ty).to(tl.float32)
            finite = finite * tl.min(tl.where(tl.abs(b_x) < float("inf"), 1, 0), axis=0)
        tl.store(p_indices + i_at * stages + i, index)
        tl.store(p_squares + i_stage * N + i_row, square)
    p_to = p_out + offset_of(i_group, i_row, out_sizes, out_strides)
    tl.store(p_to + i_d.to(tl.int64) * s_out_d, rounded(b_total, p_out.dtype.element_ty), mask=m_d)


@triton.jit
def _take_kernel(
    p_from, p_book, p_limits, p_chosen, p_residual, p_total, p_out, p_indices, p_squares, sizes, strides, s_d,
    out_sizes, out_strides, s_out_d, s_group, s_k, s_c, N, D, stages, i_stage,
    FIRST: tl.constexpr, LAST: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Takes the codewords of one stage from the residuals, and adds them to the sum."""
    i_group = tl.program_id(1).to(tl.int64)
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = i_r < N
    i_row = i_group * N + i_r
    k = tl.load(p_chosen + i_row, mask=m_r, other=0)
    active = m_r
    if LIMITED:
        active = m_r & (tl.load(p_limits + i_r, mask=m_r, other=0) > i_stage)
    at = offset_of(i_group, i_r, sizes, strides)
    at_out = offset_of(i_group, i_r, out_sizes, out_strides)
    square = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        m = m_r[:, None] & (i_d < D)[None, :]
        b_r = tl.load(p_from + at[:, None] + i_d[None, :] * s_d, mask=m, other=0.0).to(tl.float32)
        b_q = tl.load(p_book + i_group * s_group + k[:, None] * s_k + i_d[None, :] * s_c, mask=m, other=0.0)
        b_q = b_q.to(tl.float32)
        i_at = i_row[:, None] * D + i_d[None, :]
        b_difference = b_r - b_q
        square += tl.sum(tl.where(active[:, None], b_difference * b_difference, 0.0), axis=1)
        if FIRST:
            b_total = tl.where(active[:, None], b_q + b_r * 0.0, 0.0)  # NaN where x is not finite
        else:
            b_total = tl.load(p_total + i_at, mask=m, other=0.0)
            b_total = tl.where(active[:, None], b_total + b_q, b_total)
        if LAST:
            p_to = p_out + at_out[:, None] + i_d[None, :] * s_out_d
            tl.store(p_to, rounded(b_total, p_out.dtype.element_ty), mask=m)
        else:
            tl.store(p_total + i_at, b_total, mask=m)
            tl.store(p_residual + i_at, rounded(b_difference, p_residual.dtype.element_ty), mask=m)
    tl.store(p_indices + i_row * stages + i_stage, tl.where(active, k, -1), mask=m_r)
    tl.store(p_squares + (i_group * stages + i_stage) * N + i_r, square, mask=m_r)


@triton.jit
def _turned_back(b_h, b_r, b_q):
    """Of b_h [BLOCK_N, BLOCK_D] the gradient by r of (|q| / |r|) R r, where the rotation R turns r to q."""
    r_length = tl.sqrt_rn(tl.sum(b_r * b_r, axis=1))
    q_length = tl.sqrt_rn(tl.sum(b_q * b_q, axis=1))
    r_unit = divisor_of(r_length)
    b_u = tl.div_rn(b_r, tl.broadcast_to(r_unit[:, None], b_r.shape))
    q_unit = divisor_of(q_length)
    b_v = tl.div_rn(b_q, tl.broadcast_to(q_unit[:, None], b_q.shape))
    b_w = b_u + b_v
    w_unit = divisor_of(tl.sqrt_rn(tl.sum(b_w * b_w, axis=1)))
    along = tl.div_rn(tl.div_rn(2.0 * tl.sum(b_w * b_h, axis=1), w_unit), w_unit)
    across = 2.0 * tl.sum(b_v * b_h, axis=1)
    return (b_h - b_w * along[:, None] + b_u * across[:, None]) * tl.div_rn(q_length, r_unit)[:, None]


@triton.jit
def _backward_kernel(
    p_grad, p_coefficients, p_x, p_books, p_indices, p_out, grad_sizes, grad_strides, s_grad_d, sizes,
    strides, s_d, out_sizes, out_strides, s_out_d, s_book, s_k, s_c, N, D, stages, fraction,
    ROTATION: tl.constexpr, OF_SUM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_group = tl.program_id(1).to(tl.int64)
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = i_r < N
    i_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m = m_r[:, None] & (i_d < D)[None, :]
    p_vectors = p_x + offset_of(i_group, i_r, sizes, strides)[:, None] + i_d[None, :] * s_d
    b_r = tl.load(p_vectors, mask=m, other=0.0).to(tl.float32)
    p_from = p_grad + offset_of(i_group, i_r, grad_sizes, grad_strides)[:, None] + i_d[None, :] * s_grad_d
    b_g = tl.load(p_from, mask=m, other=0.0).to(tl.float32)
    b_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    weight = tl.full([], 1.0, tl.float32)
    any_stage = tl.zeros([BLOCK_N], tl.int1)
    for i in range(stages):
        k = tl.load(p_indices + (i_group * N + i_r) * stages + i, mask=m_r, other=-1)
        active = k >= 0
        p_words = p_books + (i_group * stages + i) * s_book + k[:, None] * s_k + i_d[None, :] * s_c
        b_q = tl.load(p_words, mask=m & active[:, None], other=0.0).to(tl.float32)
        b_difference = b_r - b_q
        b_here = b_difference * tl.load(p_coefficients + i_group * stages + i)
        if not OF_SUM:
            if ROTATION:
                b_here += _turned_back(b_g, b_r, b_q)
            else:
                b_here += b_g
        b_total += tl.where(active[:, None], b_here * weight, 0.0)
        if OF_SUM and ROTATION:
            b_sum += b_q
        weight *= 1.0 - fraction
        b_next = rounded(b_difference, p_x.dtype.element_ty).to(tl.float32)
        b_r = tl.where(active[:, None], b_next, b_r)
        any_stage = any_stage | active
    if OF_SUM:
        if ROTATION:
            b_g = _turned_back(b_g, tl.load(p_vectors, mask=m, other=0.0).to(tl.float32), b_sum)
        b_total += tl.where(any_stage[:, None], b_g, 0.0)
    p_to = p_out + offset_of(i_group, i_r, out_sizes, out_strides)[:, None] + i_d[None, :] * s_out_d
    tl.store(p_to, rounded(b_total, p_out.dtype.element_ty), mask=m)


def residual_vector_quantize(
    x: Tensor, codebooks: Sequence[Tensor], limits: Tensor | None, n_stages: int, metric: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The torch op ``genperf::residual_vector_quantize`` for codebooks of one size."""
    groups, dim = x.shape[0], x.shape[-1]
    stages, n_words, n = len(codebooks) // groups, codebooks[0].shape[0], x[0].numel() // dim
    quantized = torch.empty_like(x)
    indices = x.new_empty((*x.shape[:-1], stages), dtype=torch.int64)
    if n == 0 or n_stages == 0:
        quantized.zero_()
        return quantized, indices.fill_(-1), x.new_zeros(groups, stages, dtype=torch.float32)
    books = joined(codebooks)
    squares = x.new_empty(groups, stages, n, dtype=torch.float32)
    into = (*collapsed(quantized), quantized.stride(-1))
    given = x if limits is None else limits
    block_d = max(16, triton.next_power_of_2(dim))
    if n <= FEW and dim <= LONGEST and metric == L2.value:
        scratch = x.new_empty(groups, n, block_d, dtype=torch.float32)
        with on_device_of(x):
            _stages_kernel[(n, groups)](
                x, books, given, scratch, quantized, indices, squares, *collapsed(x), x.stride(-1), *into,
                *books.stride(), n, n_words, dim, stages, n_stages, LIMITED=limits is not None,
                BLOCK_K=ELEMENTS.value // block_d, BLOCK_D=block_d, **LAUNCH,
            )  # fmt: skip
        return quantized, indices, squares.sum(2)
    # Stage by stage, so that those of one lie together; made ready several stages at a time.
    ordered = books.view(groups, stages, n_words, dim).transpose(0, 1)[:n_stages].flatten(0, 1)
    at_once = max(1, PREPARED // (groups * n_words * dim))
    residual = x.new_empty(groups, n, dim)
    total = x.new_empty(groups, n, dim, dtype=torch.float32)
    if n_stages < stages:
        indices.fill_(-1)
        squares.zero_()
    block_d = min(128, block_d)
    block_n = ELEMENTS.value // block_d
    source = x
    for i in range(n_stages):
        if i % at_once == 0:
            words = prepare_codebooks(ordered[i * groups : (i + at_once) * groups], metric)
        book, first = ordered[i * groups : (i + 1) * groups], i % at_once * groups
        of_stage = Words(*(y[first : first + groups] for y in words))
        chosen, _ = vq_nearest(source, book, metric, 1, False, of_stage)
        with on_device_of(x):
            _take_kernel[(triton.cdiv(n, block_n), groups)](
                source, book, given, chosen, residual, total, quantized, indices, squares, *collapsed(source),
                source.stride(-1), *into, *book.stride(), n, dim, stages, i, FIRST=i == 0,
                LAST=i == n_stages - 1, LIMITED=limits is not None, BLOCK_N=block_n, BLOCK_D=block_d,
                **LAUNCH,
            )  # fmt: skip
        source = residual
    return quantized, indices, squares.sum(2)


def residual_vector_quantize_backward(
    grad: Tensor, coefficients: Tensor, x: Tensor, codebooks: Sequence[Tensor], indices: Tensor,
    rotation: bool, of_sum: bool, fraction: float,
) -> Tensor:  # fmt: skip
    """The torch op ``genperf::residual_vector_quantize_backward``, but for rotations with a fraction."""
    groups, dim = x.shape[0], x.shape[-1]
    stages, n = len(codebooks) // groups, x[0].numel() // dim
    out = torch.empty_like(x)
    if n == 0:
        return out
    books = joined(codebooks)
    block_d = max(16, triton.next_power_of_2(dim))
    block_n = max(1, ELEMENTS.value // 2 // block_d)
    launch = {**LAUNCH, "num_warps": max(4, block_d // 512)}
    with on_device_of(x):
        _backward_kernel[(triton.cdiv(n, block_n), groups)](
            grad, coefficients.contiguous(), x, books, indices, out, *collapsed(grad), grad.stride(-1),
            *collapsed(x), x.stride(-1), *collapsed(out), out.stride(-1), *books.stride(), n, dim, stages,
            fraction, ROTATION=rotation, OF_SUM=of_sum, BLOCK_N=block_n, BLOCK_D=block_d, **launch,
        )  # fmt: skip
    return out


def _example(n: int, n_words: int, dim: int, stages: int, dtype: torch.dtype = torch.float32, **how) -> None:
    """Forward and backward on meta tensors."""
    x = torch.empty(1, n, dim, dtype=dtype, device="meta")
    books = list(torch.empty(stages, n_words, dim, dtype=dtype, device="meta").unbind(0))
    limits = torch.empty(n, dtype=torch.int64, device="meta") if how.pop("limited", False) else None
    quantized, indices, squares = residual_vector_quantize(x, books, limits, stages, L2.value)
    how = {"rotation": False, "of_sum": False, "fraction": 0.0, **how}
    residual_vector_quantize_backward(quantized, squares, x, books, indices, **how)


AOT = {
    "frame": Example(partial(_example, 1, 1024, 128, 8), wide=False, quick=True),
    "many": Example(partial(_example, 16384, 1024, 128, 2, rotation=True), wide=False, quick=True),
    "bfloat16, limits": Example(
        partial(_example, 64, 2048, 256, 32, torch.bfloat16, limited=True, rotation=True, of_sum=True),
        wide=False,
    ),
    "1024": Example(partial(_example, 4096, 1024, 1024, 2, limited=True), wide=False),
}
