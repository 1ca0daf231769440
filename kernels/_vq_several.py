"""The k nearest codewords of each vector: which may be among them, and their exact order."""

import triton
import triton.language as tl

from ._tile import offset_of
from ._vq_exact import compare, measure
from ._vq_search import scores
from ._vq_words import FAR


@triton.jit
def bounds_kernel(
    p_half, p_words, p_first, p_scale, p_slack, p_kind, p_threshold, p_list, p_found, N, K_PADDED, PADDED,
    NEAREST: tl.constexpr, SEARCHED: tl.constexpr, NOT_FINITE: tl.constexpr, CANDIDATES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each vector the score that the NEAREST best of the codebook reach; no candidates yet.

    The codewords of a column, each of another block, are a group. The NEAREST best groups have as many
    codewords of at least the score of the last of them, so that the NEAREST best codeword is no worse.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = i_r < N
    i_row = i_head * N + i_r
    scale = tl.load(p_scale + i_row, mask=m_r, other=1.0)
    i_column = tl.arange(0, BLOCK_K)
    b_best = tl.full([BLOCK_N, BLOCK_K], float("-inf"), tl.float32)
    for k in range(0, K_PADDED, BLOCK_K):
        p_block = p_words + (i_head * K_PADDED + k) * PADDED
        b_first = tl.load(p_first + i_head * K_PADDED + k + i_column)[None, :] * scale[:, None]
        b_s = scores(p_half + i_row * PADDED, p_block, b_first, m_r, PADDED, BLOCK_N, BLOCK_K, BLOCK_D)
        b_best = tl.maximum(b_best, b_s)
    for _ in range(NEAREST - 1):
        best = tl.max(b_best, axis=1)
        column = tl.min(tl.where(b_best == best[:, None], i_column[None, :], BLOCK_K), axis=1)
        b_best = tl.where(i_column[None, :] == column[:, None], float("-inf"), b_best)
    least = tl.max(b_best, axis=1)
    kind = tl.load(p_kind + i_row, mask=m_r, other=NOT_FINITE)
    searched = (kind == SEARCHED) & (least > -0.5 * FAR * scale)  # not of codewords that must not be found
    threshold = least - tl.load(p_slack + i_row, mask=m_r, other=0.0)
    tl.store(p_threshold + i_row, tl.where(searched, threshold, float("inf")), mask=m_r)
    tl.store(p_list + i_row, i_row, mask=m_r)
    found = tl.where(searched | (kind == NOT_FINITE), 0, CANDIDATES + 1)
    tl.store(p_found + i_row, found, mask=m_r)


@triton.jit
def _before(
    value, error, k, other_value, other_error, other,
    p_x, s_x, p_book, s_k, s_c, D, METRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Whether codeword k comes before another in the order of distances and then of indices."""
    result = value + error < other_value - other_error
    if (result == 0) & ((other_value + other_error < value - error) == 0) & (k != other):
        order = compare(p_x, s_x, p_book + k * s_k, p_book + other * s_k, s_c, D, METRIC, BLOCK_D)
        result = (order < 0) | ((order == 0) & (k < other))
    return result


@triton.jit
def order_kernel(
    p_x, p_codebook, p_usable, p_kind, p_found, p_candidates, p_out, sizes, strides, s_d, s_head, s_k, s_c,
    N, K, D, rows, NEAREST: tl.constexpr, NOT_FINITE: tl.constexpr, METRIC: tl.constexpr,
    CANDIDATES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The NEAREST first among the candidates of each vector, [rows, NEAREST]; unusable codewords come last."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        i_row = tl.zeros([], tl.int64) + row
        i_head = i_row // N
        p_vector = p_x + offset_of(i_head, i_row - i_head * N, sizes, strides)
        p_book = p_codebook + i_head * s_head
        finite = tl.load(p_kind + i_row) != NOT_FINITE
        found = tl.load(p_found + i_row)
        every = found > CANDIDATES
        number = tl.where(finite, tl.where(every, K, found), 0)
        last = tl.full([], -1, tl.int64)
        last_value = tl.full([], float("-inf"), tl.float64)
        last_error = tl.zeros([], tl.float64)
        unusable = tl.full([], -1, tl.int64)  # the last one given out
        for i in range(NEAREST):
            nearest = tl.full([], -1, tl.int64)
            least = tl.full([], float("inf"), tl.float64)
            error = tl.zeros([], tl.float64)
            for j in range(number):
                named = tl.load(p_candidates + i_row * CANDIDATES + j, mask=~every, other=0)
                k = tl.where(every, j, named).to(tl.int64)
                if tl.load(p_usable + i_head * K + k) != 0:
                    value, bound = measure(p_vector, s_d, p_book + k * s_k, s_c, D, METRIC, BLOCK_D)
                    after = (last < 0) | (k != last)
                    if (last >= 0) & after:
                        after = _before(
                            last_value, last_error, last, value, bound, k, p_vector, s_d, p_book, s_k, s_c,
                            D, METRIC, BLOCK_D,
                        )  # fmt: skip
                    if after:
                        nearer = nearest < 0
                        if nearest >= 0:
                            nearer = _before(
                                value, bound, k, least, error, nearest, p_vector, s_d, p_book, s_k, s_c, D,
                                METRIC, BLOCK_D,
                            )  # fmt: skip
                        nearest = tl.where(nearer, k, nearest)
                        least = tl.where(nearer, value, least)
                        error = tl.where(nearer, bound, error)
            if nearest >= 0:
                last, last_value, last_error = nearest, least, error
            elif finite:
                following = tl.full([], -1, tl.int64)
                for j in range(K):
                    at = tl.zeros([], tl.int64) + j
                    is_next = (following < 0) & (at > unusable) & (tl.load(p_usable + i_head * K + at) == 0)
                    following = tl.where(is_next, at, following)
                nearest, unusable = following, following
            else:
                nearest = tl.zeros([], tl.int64) + i
            tl.store(p_out + i_row * NEAREST + i, nearest)
