"""The k nearest codewords of each vector: which may be among them, and their exact order."""

import triton
import triton.language as tl

from ._tile import offset_of
from ._vq_exact import compare, load_doubles, measure
from ._vq_search import scores
from ._vq_words import FAR


@triton.jit
def bounds_kernel(
    p_half, p_words, p_first, p_scale, p_slack, p_kind, p_threshold, p_list, p_found, N, K_PADDED, PADDED,
    NEAREST: tl.constexpr, SEARCHED: tl.constexpr, ALL: tl.constexpr, CANDIDATES: tl.constexpr,
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
    kind = tl.load(p_kind + i_row, mask=m_r, other=ALL)
    every = (kind == ALL) | (least < scale * (-0.5 * FAR))  # of codewords that must not be found
    searched = (kind == SEARCHED) & (every == 0)
    threshold = least - tl.load(p_slack + i_row, mask=m_r, other=0.0)
    tl.store(p_threshold + i_row, tl.where(searched, threshold, float("inf")), mask=m_r)
    tl.store(p_list + i_row, i_row, mask=m_r)
    every = every & ((kind == SEARCHED) | (kind == ALL))
    tl.store(p_found + i_row, tl.where(every, CANDIDATES + 1, 0), mask=m_r)


@triton.jit
def _differ(p_a, p_b, stride, D, BLOCK_D: tl.constexpr):
    """Whether two vectors differ, where 0 and -0 are one number: 1 or 0."""
    b_differ = tl.zeros([BLOCK_D], tl.int32)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        b_differ |= (load_doubles(p_a, stride, i_d, D) != load_doubles(p_b, stride, i_d, D)).to(tl.int32)
    return tl.max(b_differ, axis=0)


@triton.jit
def _following(p_usable, after, K, USABLE: tl.constexpr):
    """The first codeword after another that is usable, or is not; -1 where there is none."""
    following = tl.full([], -1, tl.int64)
    for j in range(K):
        k = tl.zeros([], tl.int64) + j
        usable = tl.load(p_usable + k) != 0
        following = tl.where((following < 0) & (k > after) & (usable == USABLE), k, following)
    return following


@triton.jit
def _before(
    value, error, k, other_value, other_error, other,
    p_x, s_x, p_book, s_k, s_c, D, METRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Whether codeword k comes before another in the order of distances and then of indices."""
    result = value + error < other_value - other_error
    if (result == 0) & ((other_value + other_error < value - error) == 0) & (k != other):
        result = k < other
        if _differ(p_book + k * s_k, p_book + other * s_k, s_c, D, BLOCK_D) != 0:
            order = compare(p_x, s_x, p_book + k * s_k, p_book + other * s_k, s_c, D, METRIC, BLOCK_D)
            result = (order < 0) | ((order == 0) & (k < other))
    return result


@triton.jit
def order_kernel(
    p_x, p_codebook, p_usable, p_kind, p_found, p_candidates, p_out, sizes, strides, s_d, s_head, s_k, s_c,
    N, K, D, rows, NEAREST: tl.constexpr, ALIKE: tl.constexpr, NOT_FINITE: tl.constexpr, METRIC: tl.constexpr,
    CANDIDATES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The NEAREST first of the candidates of each vector, [rows, NEAREST]; unusable codewords come last."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        i_row = tl.zeros([], tl.int64) + row
        i_head = i_row // N
        p_vector = p_x + offset_of(i_head, i_row - i_head * N, sizes, strides)
        p_book = p_codebook + i_head * s_head
        kind = tl.load(p_kind + i_row)
        found = tl.load(p_found + i_row)
        every = found > CANDIDATES
        number = tl.where(every, K, found)
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
            last_value, last_error = least, error
            if kind == ALIKE:
                nearest = _following(p_usable + i_head * K, last, K, True)
            if kind == NOT_FINITE:
                nearest = tl.zeros([], tl.int64) + i
            elif nearest >= 0:
                last = nearest
            else:
                last = tl.zeros([], tl.int64) + K  # no other is usable
                number = 0
                nearest = _following(p_usable + i_head * K, unusable, K, False)
                unusable = nearest
            tl.store(p_out + i_row * NEAREST + i, nearest)
