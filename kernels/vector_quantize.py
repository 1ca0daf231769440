"""Codewords, losses and gradients of vector quantization; the op is ``genperf/ops/vector_quantize.py``.

The search is ``vq_nearest``. One kernel gathers the codewords and sums the squares of what is lost by vector;
one gives the gradient of the vectors; that of the codebook is summed by ``_segments``.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import rounded
from ._segments import segmented_sums
from ._tile import LAUNCH, Example, collapsed, offset_of, on_device_of

MEAN, SAMPLE, NONE = range(3)  # reductions


@triton.jit
def _gather_kernel(
    p_x, p_codebook, p_indices, p_quantized, p_squares, sizes, strides, s_d, out_sizes, out_strides, s_out,
    s_head, s_k, s_cd, rows, N, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = i_row < rows
    i_head, i_n = i_row // N, i_row % N
    code = tl.load(p_indices + i_row, mask=m_row, other=-1)
    kept = code >= 0
    p_x += offset_of(i_head, i_n, sizes, strides)
    p_out = p_quantized + offset_of(i_head, i_n, out_sizes, out_strides)
    p_word = p_codebook + i_head * s_head + code * s_k
    square = tl.zeros([BLOCK_R], tl.float32)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = (i_d < D)[None, :]
        m = kept[:, None] & m_d
        b_x = tl.load(p_x[:, None] + i_d[None, :] * s_d, mask=m, other=0.0)  # [BLOCK_R, BLOCK_D]
        b_c = tl.load(p_word[:, None] + i_d[None, :] * s_cd, mask=m, other=0.0)
        difference = b_x.to(tl.float32) - b_c.to(tl.float32)
        square += tl.sum(difference * difference, axis=1)
        finite = tl.abs(b_x.to(tl.float32)) < float("inf")
        b_q = rounded(tl.where(finite, b_c.to(tl.float32), float("nan")), p_quantized.dtype.element_ty)
        tl.store(p_out[:, None] + i_d[None, :] * s_out, b_q, mask=m_row[:, None] & m_d)
    tl.store(p_squares + i_row, square, mask=m_row)


@triton.jit
def divisor_of(length):
    """A length that divides: at least 1e-6, as in vector-quantize-pytorch; NaN stays."""
    return tl.where(length < 1e-6, 1e-6, length)


@triton.jit
def _of_vectors_kernel(
    p_grad, p_coefficient, p_x, p_codebook, p_indices, p_out, grad_sizes, grad_strides, s_g, sizes, strides,
    s_d, out_sizes, out_strides, s_out, s_head, s_k, s_cd, rows, N, D, of_group,
    ROTATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """g, or with u and v the units of x and c, and s = u + v, (g - 2 s (s.g) / |s|^2 + 2 u (v.g)) |c| / |x|;
    plus the coefficient times x - c."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = i_row < rows
    i_head, i_n = i_row // N, i_row % N
    code = tl.load(p_indices + i_row, mask=m_row, other=-1)
    kept = code >= 0
    p_x += offset_of(i_head, i_n, sizes, strides)
    p_to = p_out + offset_of(i_head, i_n, out_sizes, out_strides)
    p_word = p_codebook + i_head * s_head + code * s_k
    if p_grad is not None:
        p_grad += offset_of(i_head, i_n, grad_sizes, grad_strides)
    pull = tl.zeros([BLOCK_R], tl.float32)
    if p_coefficient is not None:
        pull = tl.load(p_coefficient + i_row // of_group, mask=m_row, other=0.0)
    if ROTATION:
        xx = tl.zeros([BLOCK_R], tl.float64)  # squares beyond float32 do not matter
        cc = xx
        for d in range(0, D, BLOCK_D):
            i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
            m = kept[:, None] & (i_d < D)[None, :]
            b_x = tl.load(p_x[:, None] + i_d[None, :] * s_d, mask=m, other=0.0).to(tl.float64)
            b_c = tl.load(p_word[:, None] + i_d[None, :] * s_cd, mask=m, other=0.0).to(tl.float64)
            xx += tl.sum(b_x * b_x, axis=1)
            cc += tl.sum(b_c * b_c, axis=1)
        length_x, length_c = tl.sqrt(xx).to(tl.float32), tl.sqrt(cc).to(tl.float32)
        divisor_x = divisor_of(length_x)
        divisor_c = divisor_of(length_c)
        ss = tl.zeros([BLOCK_R], tl.float32)
        sg, vg = ss, ss
        for d in range(0, D, BLOCK_D):
            i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
            m = kept[:, None] & (i_d < D)[None, :]
            b_x = tl.load(p_x[:, None] + i_d[None, :] * s_d, mask=m, other=0.0).to(tl.float32)
            b_c = tl.load(p_word[:, None] + i_d[None, :] * s_cd, mask=m, other=0.0).to(tl.float32)
            b_g = tl.load(p_grad[:, None] + i_d[None, :] * s_g, mask=m, other=0.0).to(tl.float32)
            b_v = tl.div_rn(b_c, divisor_c[:, None])
            b_s = tl.div_rn(b_x, divisor_x[:, None]) + b_v
            ss += tl.sum(b_s * b_s, axis=1)
            sg += tl.sum(b_s * b_g, axis=1)
            vg += tl.sum(b_v * b_g, axis=1)
        divisor_s = divisor_of(tl.sqrt_rn(ss))
        of_s = tl.div_rn(tl.div_rn(2.0 * sg, divisor_s), divisor_s)
        of_u, scale = 2.0 * vg, tl.div_rn(length_c, divisor_x)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = (i_d < D)[None, :]
        m = kept[:, None] & m_d
        b_x = tl.load(p_x[:, None] + i_d[None, :] * s_d, mask=m, other=0.0).to(tl.float32)
        b_c = tl.load(p_word[:, None] + i_d[None, :] * s_cd, mask=m, other=0.0).to(tl.float32)
        b_to = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        if p_grad is not None:
            b_to = tl.load(p_grad[:, None] + i_d[None, :] * s_g, mask=m, other=0.0).to(tl.float32)
        if ROTATION:
            b_u = tl.div_rn(b_x, divisor_x[:, None])
            b_s = b_u + tl.div_rn(b_c, divisor_c[:, None])
            b_to = (b_to - b_s * of_s[:, None] + b_u * of_u[:, None]) * scale[:, None]
        if p_coefficient is not None:
            b_to += (b_x - b_c) * pull[:, None]
        b_to = tl.where(kept[:, None], b_to, 0.0)
        tl.store(
            p_to[:, None] + i_d[None, :] * s_out,
            rounded(b_to, p_out.dtype.element_ty),
            mask=m_row[:, None] & m_d,
        )


def _blocks(rows: int, dim: int) -> tuple[tuple[int], dict]:
    block_d = min(128, max(4, triton.next_power_of_2(dim)))
    block_r = max(1, 512 // block_d)
    return (triton.cdiv(rows, block_r),), {"BLOCK_R": block_r, "BLOCK_D": block_d, **LAUNCH}


def _groups(x: Tensor, reduction: int) -> tuple[int, ...]:
    """The shape of the losses, and then how many vectors each is of."""
    *rows, _ = x.shape
    if reduction == NONE:
        return (*rows, 1)
    return (math.prod(rows),) if reduction == MEAN else (*rows[:2], math.prod(rows[2:]))


def _numbers(indices: Tensor, groups: tuple[int, ...], all_kept: bool) -> Tensor | int:
    """How many vectors that are not left out a loss is of, at least 1."""
    if groups[-1] == 1 or all_kept:
        return max(1, groups[-1])
    return (indices >= 0).view(groups).sum(-1).clamp(min=1)


def vector_quantize(
    x: Tensor, codebook: Tensor, indices: Tensor, reduction: int, all_kept: bool
) -> tuple[Tensor, Tensor]:
    """Codewords of the indices [heads, *], which are contiguous, in the layout of x, and mean squares."""
    dim, rows = x.shape[-1], indices.numel()
    quantized, squares = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    if rows:
        grid, blocks = _blocks(rows, dim)
        with on_device_of(x):
            _gather_kernel[grid](
                x, codebook, indices, quantized, squares, *collapsed(x), x.stride(-1), *collapsed(quantized),
                quantized.stride(-1), *codebook.stride(), rows, rows // len(x), dim, **blocks,
            )  # fmt: skip
    groups = _groups(x, reduction)
    squares = squares.view(groups[:-1]) if groups[-1] == 1 else squares.view(groups).sum(-1)
    return quantized, squares / (_numbers(indices, groups, all_kept) * dim)


def vector_quantize_backward(
    grad: Tensor | None, of_commitment: Tensor | None, of_codebook: Tensor | None, x: Tensor,
    codebook: Tensor, indices: Tensor, reduction: int, rotation: bool, want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The torch op ``genperf::vector_quantize_backward``."""
    dim, rows = x.shape[-1], indices.numel()
    if rows == 0:
        return (
            torch.empty_like(x) if want_x else None,
            codebook.new_zeros(codebook.shape) if want_codebook else None,
        )
    groups = _groups(x, reduction)
    divisor = _numbers(indices, groups, False) * dim

    def coefficients(of_mean: Tensor) -> Tensor:
        return (2 * of_mean / divisor).flatten().contiguous()

    grad_x = grad_codebook = None
    if want_x:
        grad_x = torch.empty_like(x)
        grid, blocks = _blocks(rows, dim)
        like = x if grad is None else grad
        with on_device_of(x):
            _of_vectors_kernel[grid](
                grad, None if of_commitment is None else coefficients(of_commitment), x, codebook, indices,
                grad_x, *collapsed(like), like.stride(-1), *collapsed(x), x.stride(-1), *collapsed(grad_x),
                grad_x.stride(-1), *codebook.stride(), rows, rows // len(x), dim, groups[-1],
                ROTATION=rotation and grad is not None, **blocks,
            )  # fmt: skip
    if want_codebook and of_codebook is not None:
        _, sums = segmented_sums(
            x, indices, codebook.shape[1], codebook, coefficients(of_codebook), groups[-1]
        )
        grad_codebook = sums.to(codebook.dtype)
    return grad_x, grad_codebook


def _example(n: int, dim: int, backward: bool, dtype: torch.dtype = torch.float32) -> None:
    """Launch on meta tensors."""
    x = torch.empty(1, n, dim, dtype=dtype, device="meta")
    codebook = torch.empty(1, 512, dim, dtype=dtype, device="meta")
    indices = torch.empty(1, n, dtype=torch.int64, device="meta")
    if backward:
        loss = torch.empty((), device="meta")
        vector_quantize_backward(x, loss, loss, x, codebook, indices, MEAN, True, True, True)
        vector_quantize_backward(x, loss, loss, x, codebook, indices, MEAN, False, True, True)
    else:
        vector_quantize(x, codebook, indices, MEAN, True)


AOT = {
    "forward": Example(partial(_example, 16384, 64, False), wide=False, quick=True),
    "backward": Example(partial(_example, 16384, 64, True), wide=False, quick=True),
    "forward, bfloat16": Example(partial(_example, 16384, 256, False, torch.bfloat16), wide=False),
    "backward, bfloat16": Example(partial(_example, 16384, 256, True, torch.bfloat16), wide=False),
    "backward, 8": Example(partial(_example, 1 << 20, 8, True), wide=False),
}
