"""Activation normalization and the invertible 1x1 convolution: ``csrc/invertible_conv1x1``.

Positions go by blocks of a sample. Up to 64 channels a program has the whole matrix, folded with the scales
as it is loaded, and backward is one pass; beyond, products go by tiles of 64 channels. All products are of
IEEE single precision. Sums over positions are made by runs of blocks, whose number follows from the shapes
alone, and then over the runs.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genperf.ops._invertible_conv1x1_reference import logdets, parameter_gradients, through_logdet

from ._math import exp, rounded
from ._tile import Example, offset_of, on_device_of, plan

RUNS = 512  # of blocks of positions, at most: some for each multiprocessor


@triton.jit
def _matrix(
    p_matrix, p_scale, i_row, i_column, s_row, s_column, C,
    HAS_SCALE: tl.constexpr, LOG: tl.constexpr, BY_ROW: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the matrix [rows, columns], rows or columns multiplied with the scale or divided by it."""
    m = (i_row < C)[:, None] & (i_column < C)[None, :]
    b_m = tl.load(
        p_matrix + i_row[:, None].to(tl.int64) * s_row + i_column[None, :] * s_column, mask=m, other=0.0
    )
    if HAS_SCALE:
        i = i_row if BY_ROW else i_column
        b_s = tl.load(p_scale + i, mask=i < C, other=1.0)
        if LOG:
            b_s = exp(tl.where(i < C, b_s, 0.0))
        b_s = b_s[:, None] if BY_ROW else b_s[None, :]
        b_m = tl.div_rn(b_m, b_s + tl.zeros_like(b_m)) if DIVIDE else b_m * b_s
    return b_m


@triton.jit
def _rows(p, at, i_c, s_c, m_live, C):
    """Channels of positions, float32 [channels, positions]."""
    m = (i_c < C)[:, None] & m_live[None, :]
    return tl.load(p + at[None, :] + i_c[:, None].to(tl.int64) * s_c, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(p, at, i_c, s_c, b, m_live, m_there, C):
    b = tl.where(m_live[None, :], b, 0.0)
    m = (i_c < C)[:, None] & m_there[None, :]
    tl.store(p + at[None, :] + i_c[:, None].to(tl.int64) * s_c, rounded(b, p.dtype.element_ty), mask=m)


@triton.jit
def _live(p_lengths, i_b, i_n, N, HAS_LENGTHS: tl.constexpr):
    m_live = i_n < N
    if HAS_LENGTHS:
        m_live = m_live & (i_n < tl.load(p_lengths + i_b))
    return m_live


@triton.jit
def _product(
    p_matrix, p_scale, p, p_shift, at, i_row, s_row, s_column, s_c, m_live, C, BEFORE: tl.constexpr,
    HAS_SCALE: tl.constexpr, LOG: tl.constexpr, BY_ROW: tl.constexpr, DIVIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some rows of the matrix times channels of positions, plus the shift for BEFORE: [BLOCK_C, BLOCK_N]."""
    acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K)
        b_m = _matrix(p_matrix, p_scale, i_row, i_k, s_row, s_column, C, HAS_SCALE, LOG, BY_ROW, DIVIDE)
        b_x = _rows(p, at, i_k, s_c, m_live, C)  # [BLOCK_K, BLOCK_N]
        if BEFORE:
            b_x += tl.load(p_shift + i_k, mask=i_k < C, other=0.0)[:, None]
        acc = tl.dot(b_m, b_x, acc, input_precision="ieee")
    return acc


@triton.jit
def _mix_kernel(
    p_in, p_out, p_matrix, p_scale, p_shift, p_lengths, sizes, s_in, s_out, s_in_c, s_out_c, s_row, s_column,
    C, N, n_blocks, BEFORE: tl.constexpr, AFTER: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_SCALE: tl.constexpr, LOG: tl.constexpr, BY_ROW: tl.constexpr, DIVIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = matrix (in + shift), or matrix in - shift, of BLOCK_C channels of a block of positions."""
    i_b = (tl.program_id(0) // n_blocks).to(tl.int64)
    i_n = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    i_row = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_live = _live(p_lengths, i_b, i_n, N, HAS_LENGTHS)
    acc = _product(
        p_matrix, p_scale, p_in, p_shift, offset_of(i_b, i_n, sizes, s_in), i_row, s_row, s_column, s_in_c,
        m_live, C, BEFORE, HAS_SCALE, LOG, BY_ROW, DIVIDE, BLOCK_C, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    if AFTER:
        acc -= tl.load(p_shift + i_row, mask=i_row < C, other=0.0)[:, None]
    _store_rows(p_out, offset_of(i_b, i_n, sizes, s_out), i_row, s_out_c, acc, m_live, i_n < N, C)


@triton.jit
def _backward_kernel(
    p_grad, p_x, p_grad_x, p_result, p_matrix, p_undo, p_scale, p_shift, p_lengths, p_outer, p_sums,
    sizes, s_grad, s_x, s_grad_x, s_result, s_grad_c, s_x_c, s_grad_x_c, s_result_c, C, N, n_blocks, n_all,
    RUN: tl.constexpr, FUSED: tl.constexpr, REVERSE: tl.constexpr, INVERSE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SCALE: tl.constexpr, LOG: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over a run of blocks: gradient times input, of a tile of channels, and the gradient alone.

    FUSED, with all channels in one tile: the gradient by the input too, and in REVERSE the input itself, of
    which x then is what the map made.
    """
    n_tiles = tl.cdiv(C, BLOCK_C)
    i_o = tl.program_id(1) // n_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    i_c = tl.program_id(1) % n_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    b_shift = tl.zeros([BLOCK_C], tl.float32)
    if HAS_SHIFT:
        b_shift = tl.load(p_shift + i_c, mask=i_c < C, other=0.0)
    outer = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    sums = tl.zeros([BLOCK_C], tl.float32)
    for r in range(RUN):
        i_block = tl.program_id(0).to(tl.int64) * RUN + r
        i_b = i_block // n_blocks
        i_n = (i_block % n_blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
        i_n = tl.where(i_block < n_all, i_n, N)  # the last run may be short of blocks
        m_there = i_n < N
        m_live = _live(p_lengths, tl.minimum(i_b, (n_all - 1) // n_blocks), i_n, N, HAS_LENGTHS)
        at_grad, at_x = offset_of(i_b, i_n, sizes, s_grad), offset_of(i_b, i_n, sizes, s_x)
        if REVERSE:
            b_z = _product(
                p_undo, p_scale, p_x, p_shift, at_x, i_c, C, 1, s_x_c, m_live, C, INVERSE and HAS_SHIFT,
                HAS_SCALE, LOG, not INVERSE, not INVERSE, BLOCK_C, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            b_x = b_z if INVERSE else b_z - b_shift[:, None]
            at_result = offset_of(i_b, i_n, sizes, s_result)
            _store_rows(p_result, at_result, i_c, s_result_c, b_x, m_live, m_there, C)
        else:
            b_z = _rows(p_x, at_x, i_c, s_x_c, m_live, C)  # [BLOCK_C, BLOCK_N]
            if not INVERSE:
                b_z += b_shift[:, None]
        if FUSED:
            b_grad_x = _product(
                p_matrix, p_scale, p_grad, p_shift, at_grad, i_c, 1, C, s_grad_c, m_live, C, False,
                HAS_SCALE, LOG, not INVERSE, INVERSE, BLOCK_C, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            at_grad_x = offset_of(i_b, i_n, sizes, s_grad_x)
            _store_rows(p_grad_x, at_grad_x, i_c, s_grad_x_c, b_grad_x, m_live, m_there, C)
        b_grad = _rows(p_grad, at_grad, i_o, s_grad_c, m_live, C)  # [BLOCK_C, BLOCK_N]
        outer = tl.dot(b_grad, tl.trans(b_z), outer, input_precision="ieee")
        sums += tl.sum(b_grad, axis=1)
    i_run = tl.program_id(0).to(tl.int64)
    m = (i_o < C)[:, None] & (i_c < C)[None, :]
    tl.store(p_outer + (i_run * C + i_o[:, None]) * C + i_c[None, :], outer, mask=m)
    if tl.program_id(1) % n_tiles == 0:
        tl.store(p_sums + i_run * C + i_o, sums, mask=i_o < C)


class _Blocks(NamedTuple):
    """Sizes of blocks and numbers of warps at which a thread's factors of a product fit its registers."""

    channels: int
    positions: int  # of products with the matrix
    summed: int  # positions of products whose sums these are
    warps: int


def _blocks(channels: int) -> _Blocks:
    if channels <= 16:
        return _Blocks(16, 128, 32, 4)
    return _Blocks(32, 64, 16, 4) if channels <= 32 else _Blocks(64, 64, 16, 8)


class _Space:
    """How the kernels walk the positions of some tensors [B, C, *] of one shape."""

    def __init__(self, summed: bool, *tensors: Tensor) -> None:
        x = tensors[0]
        walk = plan((len(x), *x.shape[2:]), *((t.stride(0), *t.stride()[2:]) for t in tensors))
        self.channels, self.positions = x.shape[1], walk.n_elements
        blocks = _blocks(self.channels)
        block_n = blocks.summed if summed else blocks.positions
        self.n_blocks = triton.cdiv(self.positions, block_n)
        self.n_all = len(x) * self.n_blocks
        self.n_tiles = triton.cdiv(self.channels, blocks.channels)
        self.strides = (walk.sizes, *walk.strides, *(t.stride(1) for t in tensors))
        self.constants = {
            "BLOCK_C": blocks.channels, "BLOCK_K": 16, "BLOCK_N": block_n, "num_warps": blocks.warps,
            "enable_fp_fusion": True,
        }  # fmt: skip


def _mix(source, out, matrix, scale, shift, lengths, log, *, before, after, transposed, by_row, divide):
    if out.numel() == 0:
        return
    s, matrix = _Space(False, source, out), matrix.contiguous()
    row, column = (1, s.channels) if transposed else (s.channels, 1)
    with on_device_of(source):
        _mix_kernel[(s.n_all, s.n_tiles)](
            source, out, matrix, _or(scale, matrix), _or(shift, matrix), _or(lengths, matrix), *s.strides,
            row, column, s.channels, s.positions, s.n_blocks, BEFORE=before and shift is not None,
            AFTER=after and shift is not None, HAS_LENGTHS=lengths is not None, HAS_SCALE=scale is not None,
            LOG=log, BY_ROW=by_row, DIVIDE=divide, **s.constants,
        )  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Some pointer in place of one that is not read."""
    return other if tensor is None else tensor.contiguous()


def _sums(
    grad, x, grad_x, result, matrix, undo, scale, shift, lengths, log, inverse
) -> tuple[Tensor, Tensor]:
    """Gradient times input, as the product took it, and gradient alone, over all positions; fills grad_x and
    result where all channels are in one tile."""
    n = matrix.shape[0]
    if x.numel() == 0:
        return matrix.new_zeros(n, n), matrix.new_zeros(n)
    s = _Space(True, grad, x, grad_x, result)
    run = max(1, triton.cdiv(s.n_all, max(1, RUNS // s.n_tiles**2)))
    runs = triton.cdiv(s.n_all, run)
    outer, sums = matrix.new_empty(runs, n, n), matrix.new_empty(runs, n)
    one = s.n_tiles == 1
    with on_device_of(x):
        _backward_kernel[(runs, s.n_tiles**2)](
            grad, x, grad_x, result, matrix, undo, _or(scale, matrix), _or(shift, matrix),
            _or(lengths, matrix), outer, sums, *s.strides, n, s.positions, s.n_blocks, s.n_all,
            RUN=run, FUSED=one and grad_x is not grad, REVERSE=one and result is not x, INVERSE=inverse,
            HAS_SHIFT=shift is not None, HAS_LENGTHS=lengths is not None, HAS_SCALE=scale is not None,
            LOG=log, **s.constants,
        )  # fmt: skip
    return outer.sum(0), sums.sum(0)


def invertible_conv1x1_forward(x, matrix, logabsdet, shift, scale, lengths, log, inverse):
    y = torch.empty_like(x)
    _mix(x, y, matrix, scale, shift, lengths, log, before=not inverse, after=inverse, transposed=False,
         by_row=inverse, divide=inverse)  # fmt: skip
    return y, logdets(x, matrix, logabsdet, scale, lengths, log, inverse)


def _gradients(source, grad_y, grad_x, result, matrix, undo, shift, scale, lengths, log, inverse):
    """Fills grad_x and result; the sums of ``_sums``."""
    matrix = matrix.contiguous()
    one = matrix.shape[0] <= 64
    if not one and grad_x is not None:
        _mix(grad_y, grad_x, matrix, scale, None, lengths, log, before=False, after=False, transposed=True,
             by_row=not inverse, divide=inverse)  # fmt: skip
    if not one and undo is not None:
        _mix(source, result, undo, scale, shift, lengths, log, before=inverse, after=not inverse,
             transposed=False, by_row=not inverse, divide=not inverse)  # fmt: skip
        source, undo = result, None
    return _sums(
        grad_y, source, grad_y if grad_x is None else grad_x, source if undo is None else result,
        matrix, matrix if undo is None else undo.contiguous(), scale, shift, lengths, log, inverse,
    )  # fmt: skip


def invertible_conv1x1_backward(
    grad_y, grad_logdet, x, matrix, shift, scale, lengths, log, inverse,
    want_x, want_matrix, want_shift, want_scale,
):  # fmt: skip
    grad_x, grads = torch.empty_like(x) if want_x else None, (None,) * 3
    if grad_y is not None:
        outer, sums = _gradients(
            x, grad_y, grad_x, None, matrix, None, shift, scale, lengths, log, inverse
        )  # fmt: skip
        grads = parameter_gradients(outer, sums, matrix, shift, scale, log, inverse)
    elif grad_x is not None:
        grad_x.zero_()
    wanted = want_matrix, want_shift, want_scale
    return grad_x, *through_logdet(
        grads, grad_logdet, x, matrix, shift, scale, lengths, log, inverse, *wanted
    )


def invertible_conv1x1_reverse(
    y, grad_y, grad_logdet, matrix, inverse_matrix, shift, scale, lengths, log, inverse
):
    x, grad_x = torch.empty_like(y), torch.empty_like(y)
    outer, sums = _gradients(
        y, grad_y, grad_x, x, matrix, inverse_matrix, shift, scale, lengths, log, inverse
    )
    grads = parameter_gradients(outer, sums, matrix, shift, scale, log, inverse)
    return (
        x,
        grad_x,
        *through_logdet(grads, grad_logdet, y, matrix, shift, scale, lengths, log, inverse, True, True, True),
    )


def _example(channels: int, size: int, dtype: torch.dtype = torch.float32, inverse: bool = False) -> None:
    x = torch.empty(64, channels, size, size, dtype=dtype, device="meta")
    matrix, vector = torch.empty(channels, channels, device="meta"), torch.empty(channels, device="meta")
    settings = vector, vector, None, True, inverse
    invertible_conv1x1_forward(x, matrix, torch.empty((), device="meta"), *settings)
    invertible_conv1x1_backward(x, None, x, matrix, *settings, True, True, True, True)
    if channels <= 64:
        invertible_conv1x1_reverse(x, x, None, matrix, matrix, *settings)


AOT = {
    "12": Example(partial(_example, 12, 32), wide=False, products=True),
    "48": Example(partial(_example, 48, 16), wide=False, quick=True, products=True),
    "24, inverse, bfloat16": Example(
        partial(_example, 24, 16, torch.bfloat16, True), wide=False, products=True
    ),
    "192": Example(partial(_example, 192, 16), wide=False, products=True),
}
