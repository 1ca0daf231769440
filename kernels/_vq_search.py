"""The best and the second best score of each vector, from products in float16 with float32 sums."""

import triton
import triton.language as tl

NUMBERS = tl.constexpr(128)  # below which the number is that replaces the last bits of a score


@triton.jit
def scores(
    p_rows, p_words, b_first, m_r, PADDED,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] of the product of rows at p_rows [BLOCK_N] and codewords from p_words."""
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for d in range(0, PADDED, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_rows[:, None] + i_d[None, :], mask=m_r[:, None], other=0.0)
        b_c = tl.load(p_words + tl.arange(0, BLOCK_K).to(tl.int64)[None, :] * PADDED + i_d[:, None])
        acc = tl.dot(b_x, b_c, acc, input_precision="ieee")
    return acc - b_first


@triton.jit
def search_kernel(
    p_half, p_words, p_first, p_scale, p_best, p_index, p_second, N, K_PADDED, PADDED, n_blocks,
    WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best and the second best score of each vector among a part of the codebook: [parts, heads N]."""
    i_head = tl.program_id(2).to(tl.int64)
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = i_r < N
    i_row = i_head * N + i_r
    scale = tl.load(p_scale + i_row, mask=m_r, other=1.0)
    p_rows = p_half + i_row * PADDED
    i_column = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_N], -3.0e38, tl.float32)
    second = best
    index = tl.zeros([BLOCK_N], tl.int32)
    if WHOLE:
        i_d = tl.arange(0, BLOCK_D)
        b_x = tl.load(p_rows[:, None] + i_d[None, :], mask=m_r[:, None], other=0.0)
    start = tl.program_id(1) * n_blocks * BLOCK_K
    for k in range(start, tl.minimum(start + n_blocks * BLOCK_K, K_PADDED), BLOCK_K):
        p_block = p_words + (i_head * K_PADDED + k) * PADDED
        b_first = tl.load(p_first + i_head * K_PADDED + k + i_column)[None, :] * scale[:, None]
        if WHOLE:
            b_c = tl.load(p_block + i_column.to(tl.int64)[None, :] * PADDED + i_d[:, None])
            b_s = tl.dot(b_x, b_c, input_precision="ieee") - b_first
        else:
            b_s = scores(p_rows, p_block, b_first, m_r, PADDED, BLOCK_N, BLOCK_K, BLOCK_D)
        # The column in the last bits makes every score of a row another, and the best one's column known.
        b_bits = (b_s.to(tl.int32, bitcast=True) & (-BLOCK_K)) | i_column[None, :]
        b_s = b_bits.to(tl.float32, bitcast=True)  # [BLOCK_N, BLOCK_K]
        here = tl.max(b_s, axis=1)
        next_here = tl.max(tl.where(b_s == here[:, None], -3.0e38, b_s), axis=1)
        second = tl.maximum(tl.maximum(second, next_here), tl.minimum(best, here))
        column = here.to(tl.int32, bitcast=True) & (BLOCK_K - 1)
        index = tl.where(here > best, k + column, index)
        best = tl.maximum(best, here)
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(2) * N + i_row
    tl.store(p_best + at, best, mask=m_r)
    tl.store(p_index + at, index, mask=m_r)
    tl.store(p_second + at, second, mask=m_r)


@triton.jit
def tiny_search_kernel(
    p_half, p_words, p_best, p_index, p_second, N, K_PADDED, n_blocks,
    PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same for few dimensions, where comparisons cost more than products: first terms are folded.

    Each column keeps its own best and second best score, in four operations a score, with the number of the
    block in the last bits; columns are compared at the end.
    """
    i_head = tl.program_id(2).to(tl.int64)
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = i_r < N
    i_row = i_head * N + i_r
    i_d = tl.arange(0, PADDED)
    i_column = tl.arange(0, BLOCK_K)
    b_x = tl.load(p_half + i_row[:, None] * PADDED + i_d[None, :], mask=m_r[:, None], other=0.0)
    start = tl.program_id(1) * n_blocks
    p_block = p_words + (i_head * K_PADDED + start * BLOCK_K) * PADDED
    p_block += i_column.to(tl.int64)[None, :] * PADDED + i_d[:, None]
    b_best = tl.full([BLOCK_N, BLOCK_K], -3.0e38, tl.float32)
    b_second = b_best
    for i in range(0, tl.minimum(n_blocks, K_PADDED // BLOCK_K - start)):
        b_s = tl.dot(b_x, tl.load(p_block), input_precision="ieee")
        b_s = ((b_s.to(tl.int32, bitcast=True) & (-NUMBERS)) | i).to(tl.float32, bitcast=True)
        b_second = tl.maximum(b_second, tl.minimum(b_best, b_s))
        b_best = tl.maximum(b_best, b_s)
        p_block += BLOCK_K * PADDED
    best = tl.max(b_best, axis=1)
    column = tl.min(tl.where(b_best == best[:, None], i_column[None, :], BLOCK_K), axis=1)
    second = tl.max(tl.where(i_column[None, :] == column[:, None], b_second, b_best), axis=1)
    block = start + (best.to(tl.int32, bitcast=True) & (NUMBERS - 1))
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(2) * N + i_row
    tl.store(p_best + at, best, mask=m_r)
    tl.store(p_index + at, block * BLOCK_K + column, mask=m_r)
    tl.store(p_second + at, second, mask=m_r)
