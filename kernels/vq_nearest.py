"""The nearest codeword of each vector, exactly; the op is ``genperf/ops/vq_nearest.py``.

Scores come from a product in float16, of vectors scaled by row and centred, with float32 sums: the best and
the second best of each vector, never the matrix. Where the second is within twice the error bound of the
first, the vector goes on a list, whose scores are computed again to name the candidates, and these are ranked
in float64 and exact integers. No number is read on the host.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import LAUNCH, Example, collapsed, offset_of, on_device_of
from ._vq_exact import COSINE, DOT, L2, measure, rank_kernel
from ._vq_search import NUMBERS, scores, search_kernel, tiny_search_kernel
from ._vq_several import bounds_kernel, order_kernel
from ._vq_words import FAR, FOLDED, LARGE, Words, prepare

CANDIDATES = 16  # of a vector that are ranked by name; beyond that, the whole codebook is
SCALES = tl.constexpr(2.0**40)  # of a vector, at most, and its inverse at least
# What a vector is: searched; beyond float16, so that the whole codebook is ranked; alike to all; not finite.
SEARCHED, ALL, ALIKE, NOT_FINITE = (tl.constexpr(i) for i in range(4))


@triton.jit
def _vectors_kernel(
    p_x, p_mean, p_facts, p_half, p_scale, p_slack, p_kind, sizes, strides, s_d, N, D, PADDED,
    METRIC: tl.constexpr, FOLDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Vectors as float16 [heads, N, PADDED], and twice the error bound of their scores."""
    i_head = tl.program_id(1).to(tl.int64)
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = offset_of(i_head, i_r, sizes, strides)
    p_facts += i_head * 6
    step, longest, error = tl.load(p_facts), tl.load(p_facts + 1), tl.load(p_facts + 2)
    longest_half, most_square = tl.load(p_facts + 3), tl.load(p_facts + 4)
    largest = tl.zeros([BLOCK_R], tl.float32)
    bad = tl.zeros([BLOCK_R], tl.int32)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        m = (i_r < N)[:, None] & (i_d < D)[None, :]
        b_x = tl.load(p_x + at[:, None] + i_d[None, :] * s_d, mask=m, other=0.0).to(tl.float32)
        bad = tl.maximum(bad, tl.max((tl.abs(b_x) < float("inf")).to(tl.int32) ^ 1, axis=1))
        if METRIC == L2:
            b_x = (b_x - tl.load(p_mean + i_head * D + i_d, mask=i_d < D, other=0.0)[None, :]) * step
        largest = tl.maximum(largest, tl.max(tl.where(m, tl.abs(b_x), 0.0), axis=1))
    # A power of two that brings the largest element to [1, 2).
    scale = ((254 - (largest.to(tl.int32, bitcast=True) >> 23)) << 23).to(tl.float32, bitcast=True)
    if METRIC == L2:
        scale = tl.minimum(tl.maximum(scale, 1.0 / SCALES), SCALES)
        if FOLDS:  # the scale is a factor in float16
            scale = tl.minimum(tl.maximum(scale, 2.0**-24), 2.0**15)
    factor = tl.full([BLOCK_R], 1.0, tl.float32)  # of the first terms, all 0 or FAR for products
    if METRIC == L2:
        factor = scale
    square = tl.zeros([BLOCK_R], tl.float32)
    lost = tl.zeros([BLOCK_R], tl.float32)
    for d in range(0, PADDED, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        m = (i_r < N)[:, None] & (i_d < D)[None, :]
        b_x = tl.load(p_x + at[:, None] + i_d[None, :] * s_d, mask=m, other=0.0).to(tl.float32)
        if METRIC == L2:
            b_x = (b_x - tl.load(p_mean + i_head * D + i_d, mask=i_d < D, other=0.0)[None, :]) * step
        b_x = tl.where(m, b_x * scale[:, None], 0.0)
        b_half = b_x.to(tl.float16)
        i_out = (i_head * N + i_r)[:, None] * PADDED + i_d[None, :]
        b_out = b_half
        if FOLDS:
            b_out = tl.where(
                (i_d == D)[None, :] | (i_d == D + 1)[None, :], factor[:, None].to(tl.float16), b_out
            )
            b_out = tl.where((i_d == D + 2)[None, :], tl.full([], LARGE, tl.float16), b_out)
        tl.store(p_half + i_out, b_out, mask=(i_r < N)[:, None] & (i_d < PADDED)[None, :])
        b_half = b_half.to(tl.float32)
        square += tl.sum(b_half * b_half, axis=1)
        lost += tl.sum((b_x - b_half) * (b_x - b_half), axis=1)
    # Sums of squares in float32 are off by less than 1 % for any D that fits in memory.
    norm = 1.01 * tl.sqrt_rn(square) + 1e-16
    lost = 1.01 * tl.sqrt_rn(lost) + 2.4e-7 * norm + 1e-16
    most = norm * longest_half + factor * most_square  # of the magnitudes of scores
    of_sums = (tl.zeros([BLOCK_R], tl.float32) + D + 12) * 2.4e-7
    of_number = NUMBERS * 1.2e-7  # which replaces the last bits of a score
    bound = lost * longest + norm * error + (of_sums + of_number) * most
    far = factor * FAR
    if FOLDS:
        bound += factor * (2.4e-7 * most_square + 6e-8)
        far = tl.full([BLOCK_R], LARGE * LARGE, tl.float32)
    if METRIC == COSINE:  # the error of c / |c| in float64
        bound += (tl.zeros([BLOCK_R], tl.float32) + D + 8) * 2.3e-16 * norm * step
    slack = 2.02 * bound + 1e-30
    kind = tl.where(4.0 * (most + slack) < far, SEARCHED, ALL)
    if METRIC != L2:
        kind = tl.where(largest == 0.0, ALIKE, kind)
    kind = tl.where(tl.load(p_facts + 5) == 0.0, ALIKE, kind)
    kind = tl.where(bad != 0, NOT_FINITE, kind)
    i_row = i_head * N + i_r
    tl.store(p_scale + i_row, factor, mask=i_r < N)
    tl.store(p_slack + i_row, slack, mask=i_r < N)
    tl.store(p_kind + i_row, kind, mask=i_r < N)


@triton.jit
def _settle_kernel(
    p_best, p_index, p_second, p_slack, p_kind, p_usable_first, p_out, p_threshold, p_list, p_count, p_found,
    rows, N, parts, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Joins the parts, writes what is settled, and lists the rest."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i_row < rows
    best = tl.full([BLOCK], -3.0e38, tl.float32)
    second = best
    index = tl.zeros([BLOCK], tl.int32)
    at = i_row
    for _ in range(parts):
        here = tl.load(p_best + at, mask=m, other=-3.0e38)
        second = tl.maximum(second, tl.load(p_second + at, mask=m, other=-3.0e38))
        second = tl.maximum(second, tl.minimum(best, here))
        index = tl.where(here > best, tl.load(p_index + at, mask=m, other=0), index)
        best = tl.maximum(best, here)
        at += rows
    threshold = best - tl.load(p_slack + i_row, mask=m, other=0.0)
    kind = tl.load(p_kind + i_row, mask=m, other=NOT_FINITE)
    first = tl.load(p_usable_first + i_row // N, mask=m, other=0)
    out = tl.where(kind == SEARCHED, index.to(tl.int64), tl.where(kind == ALIKE, first, 0))
    tl.store(p_out + i_row, out, mask=m)
    tl.store(p_threshold + i_row, tl.where(kind == SEARCHED, threshold, float("inf")), mask=m)
    open_row = m & ((kind == ALL) | ((kind == SEARCHED) & (second >= threshold)))
    slot = tl.atomic_add(p_count + tl.zeros([BLOCK], tl.int32), 1, mask=open_row)
    tl.store(p_list + slot, i_row, mask=open_row)
    tl.store(p_found + slot, tl.where(kind == ALL, CANDIDATES + 1, 0), mask=open_row)


@triton.jit
def _collect_kernel(
    p_half, p_words, p_first, p_scale, p_threshold, p_list, p_count, p_found, p_candidates, i_head, N,
    K_PADDED, PADDED, CANDIDATES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For the listed vectors of one head, the codewords whose scores reach their thresholds."""
    count = tl.load(p_count)
    if tl.program_id(0) * BLOCK_N >= count:
        return
    i_slot = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_row = tl.load(p_list + i_slot, mask=i_slot < count, other=-1)
    m_r = (i_row >= i_head * N) & (i_row < (i_head + 1) * N)
    if tl.max(m_r.to(tl.int32), axis=0) == 0:
        return
    scale = tl.load(p_scale + i_row, mask=m_r, other=1.0)
    threshold = tl.load(p_threshold + i_row, mask=m_r, other=float("inf"))
    found = tl.load(p_found + i_slot, mask=m_r, other=0)
    p_rows = p_half + i_row * PADDED
    i_column = tl.arange(0, BLOCK_K)
    for k in range(0, K_PADDED, BLOCK_K):
        p_block = p_words + (i_head * K_PADDED + k) * PADDED
        b_first = tl.load(p_first + i_head * K_PADDED + k + i_column)[None, :] * scale[:, None]
        b_s = scores(p_rows, p_block, b_first, m_r, PADDED, BLOCK_N, BLOCK_K, BLOCK_D)
        reached = tl.sum((b_s >= threshold[:, None]).to(tl.int32), axis=1)
        for _ in range(tl.max(reached, axis=0)):
            # Of each vector the first that is left.
            column = tl.min(tl.where(b_s >= threshold[:, None], i_column[None, :], BLOCK_K), axis=1)
            b_s = tl.where(i_column[None, :] == column[:, None], float("-inf"), b_s)
            m = column < BLOCK_K
            tl.store(p_candidates + i_slot * CANDIDATES + found, k + column, mask=m & (found < CANDIDATES))
            found += m.to(tl.int32)
    tl.store(p_found + i_slot, found, mask=m_r)


@triton.jit
def _distances_kernel(
    p_x, p_codebook, p_usable, p_kind, p_out, p_distances, sizes, strides, s_d, s_head, s_k, s_cd, N, K, D,
    NEAREST: tl.constexpr, METRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64) // NEAREST
    i_head = i_row // N
    k = tl.load(p_out + tl.program_id(0))
    p_vector = p_x + offset_of(i_head, i_row - i_head * N, sizes, strides)
    p_word = p_codebook + i_head * s_head + k * s_k
    value, _ = measure(p_vector, s_d, p_word, s_cd, D, METRIC, BLOCK_D)
    if METRIC == COSINE:
        square, _ = measure(p_vector, s_d, p_vector, s_d, D, DOT, BLOCK_D)
        value = tl.maximum(1.0 + value / tl.where(square == 0.0, 1.0, tl.sqrt(-square)), 0.0)
    usable = (tl.load(p_usable + i_head * K + k) != 0) & (tl.load(p_kind + i_row) != NOT_FINITE)
    tl.store(p_distances + tl.program_id(0), tl.where(usable, value + 0.0, float("nan")).to(tl.float32))


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def _widths(dim: int) -> tuple[bool, int, int]:
    """Whether first terms are folded into products; dimensions and codewords that are padded to."""
    tiny = dim + FOLDED <= 32
    padded = -(-dim // 128) * 128
    if dim <= 256:
        padded = max(16, triton.next_power_of_2(dim + FOLDED * tiny))
    return tiny, padded, 128


def prepare_codebooks(codebooks: Tensor, metric: int) -> Words:
    """Codebooks [n, K, D] made ready for vq_nearest, all in the launches of one."""
    tiny, padded, block_k = _widths(codebooks.shape[-1])
    return prepare(codebooks, metric, padded, block_k, tiny)


def vq_nearest(
    x: Tensor, codebook: Tensor, metric: int, k: int, want_distances: bool, words: Words | None = None
) -> tuple[Tensor, Tensor | None]:
    """The torch op ``genperf::vq_nearest``; with ``words``, of a codebook that is ready for one codeword."""
    heads, n_words, dim = codebook.shape
    shape, n = [*x.shape[:-1], k], x[0].numel() // dim if heads else 0
    rows = heads * n
    out = x.new_empty(shape, dtype=torch.int64)
    distances = x.new_empty(shape, dtype=torch.float32) if want_distances else None
    if rows == 0:
        return out, distances
    if k > 1:
        _several(x, codebook, metric, out, distances)
        return out, distances

    tiny, padded, block_k = _widths(dim)
    block_d = padded if padded <= 256 else 128
    block_n = 128 if n > 64 else max(16, triton.next_power_of_2(n))
    words = prepare_codebooks(codebook, metric) if words is None else words
    sizes, strides = collapsed(x)
    half = x.new_empty(heads, n, padded, dtype=torch.float16)
    scale, slack, threshold = (x.new_empty(rows, dtype=torch.float32) for _ in range(3))
    kind = x.new_empty(rows, dtype=torch.int32)
    searched_k = 64 if tiny else block_k
    blocks_k, blocks_n = words.first.shape[1] // searched_k, triton.cdiv(n, block_n)
    parts = max(1, min(blocks_k, 2 * _processors(x) // (blocks_n * heads)))
    n_blocks = triton.cdiv(blocks_k, parts)
    if tiny:
        n_blocks = min(n_blocks, NUMBERS.value)
    parts = triton.cdiv(blocks_k, n_blocks)
    best, second = (x.new_empty(parts, rows, dtype=torch.float32) for _ in range(2))
    index = x.new_empty(parts, rows, dtype=torch.int32)
    listed, found = x.new_empty(rows, dtype=torch.int64), x.new_empty(rows, dtype=torch.int32)
    candidates = x.new_empty(rows, CANDIDATES, dtype=torch.int32)
    count = x.new_zeros(1, dtype=torch.int32)
    launch = {**LAUNCH, "num_warps": 8 if block_n == 128 else 4}
    blocks = {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_D": block_d}
    # One warp for a vector: its sums stay in it.
    by_row = {"METRIC": metric, "BLOCK_D": min(128, triton.next_power_of_2(dim)), **LAUNCH, "num_warps": 1}
    exact = (sizes, strides, x.stride(-1), *codebook.stride(), n, n_words, dim)
    with on_device_of(x):
        _vectors_kernel[(triton.cdiv(n, 16), heads)](
            x, words.mean, words.facts, half, scale, slack, kind, sizes, strides, x.stride(-1), n, dim,
            padded, METRIC=metric, FOLDS=tiny, BLOCK_R=16, BLOCK_D=min(128, padded), **LAUNCH,
        )  # fmt: skip
        if tiny:
            tiny_search_kernel[(blocks_n, parts, heads)](
                half, words.half, best, index, second, n, words.first.shape[1], n_blocks, PADDED=padded,
                BLOCK_N=block_n, BLOCK_K=searched_k, num_stages=2, **launch,
            )  # fmt: skip
        else:
            search_kernel[(blocks_n, parts, heads)](
                half, words.half, words.first, scale, best, index, second, n, words.first.shape[1], padded,
                n_blocks, WHOLE=padded <= 256, num_stages=2, **blocks, **launch,
            )  # fmt: skip
        _settle_kernel[(triton.cdiv(rows, 256),)](
            best, index, second, slack, kind, words.usable_first, out, threshold, listed, count, found,
            rows, n, parts, CANDIDATES=CANDIDATES, BLOCK=256, **LAUNCH,
        )  # fmt: skip
        # Small blocks: few vectors are listed, and the scores are looked at several times.
        again = {
            "BLOCK_N": min(block_n, 32),
            "BLOCK_K": block_k,
            "BLOCK_D": min(64, padded),
            **LAUNCH,
            "num_warps": 8,
        }
        for head in range(heads):
            _collect_kernel[(triton.cdiv(rows, again["BLOCK_N"]),)](
                half, words.half, words.first, scale, threshold, listed, count, found, candidates, head, n,
                words.first.shape[1], padded, CANDIDATES=CANDIDATES, **again,
            )  # fmt: skip
        rank_kernel[(min(rows, 16 * _processors(x)),)](
            x, codebook, words.usable, listed, count, found, candidates, out, *exact,
            CANDIDATES=CANDIDATES, **by_row,
        )  # fmt: skip
        if distances is not None:
            _distances_kernel[(rows,)](
                x, codebook, words.usable, kind, out, distances, *exact, NEAREST=1, **by_row
            )
    return out, distances


def _several(x: Tensor, codebook: Tensor, metric: int, out: Tensor, distances: Tensor | None) -> None:
    """The nearest of each vector, to ``out`` [heads, *, k]: a score that they reach, which do, the order."""
    heads, n_words, dim = codebook.shape
    nearest, n = out.shape[-1], x[0].numel() // dim
    rows, named = heads * n, max(CANDIDATES, 2 * triton.next_power_of_2(nearest))
    padded = max(16, triton.next_power_of_2(dim)) if dim <= 256 else -(-dim // 128) * 128
    words = prepare(codebook, metric, padded, 128, repeated=True)
    sizes, strides = collapsed(x)
    half = x.new_empty(heads, n, padded, dtype=torch.float16)
    scale, slack, threshold = (x.new_empty(rows, dtype=torch.float32) for _ in range(3))
    kind, found = (x.new_empty(rows, dtype=torch.int32) for _ in range(2))
    listed, count = x.new_empty(rows, dtype=torch.int64), x.new_full((1,), rows, dtype=torch.int32)
    candidates = x.new_empty(rows, named, dtype=torch.int32)
    blocks = {"BLOCK_N": 32, "BLOCK_K": 128, "BLOCK_D": min(64, padded), "CANDIDATES": named}
    by_row = {"METRIC": metric, "BLOCK_D": min(128, triton.next_power_of_2(dim)), **LAUNCH, "num_warps": 1}
    by_row |= {"NEAREST": nearest}
    exact = (sizes, strides, x.stride(-1), *codebook.stride(), n, n_words, dim)
    launch, k_padded = {**LAUNCH, "num_warps": 8}, words.first.shape[1]
    with on_device_of(x):
        _vectors_kernel[(triton.cdiv(n, 16), heads)](
            x, words.mean, words.facts, half, scale, slack, kind, sizes, strides, x.stride(-1), n, dim,
            padded, METRIC=metric, FOLDS=False, BLOCK_R=16, BLOCK_D=min(128, padded), **LAUNCH,
        )  # fmt: skip
        bounds_kernel[(triton.cdiv(n, 32), heads)](
            half, words.half, words.first, scale, slack, kind, threshold, listed, found, n, k_padded, padded,
            NEAREST=nearest, SEARCHED=SEARCHED.value, ALL=ALL.value, **blocks, **launch,
        )  # fmt: skip
        for head in range(heads):
            _collect_kernel[(triton.cdiv(rows, 32),)](
                half, words.half, words.first, scale, threshold, listed, count, found, candidates, head, n,
                k_padded, padded, **blocks, **launch,
            )  # fmt: skip
        order_kernel[(min(rows, 16 * _processors(x)),)](
            x, codebook, words.usable, kind, found, candidates, out, *exact, rows,
            ALIKE=ALIKE.value, NOT_FINITE=NOT_FINITE.value, CANDIDATES=named, maxnreg=255, **by_row,
        )  # fmt: skip
        if distances is not None:
            _distances_kernel[(rows * nearest,)](
                x, codebook, words.usable, kind, out, distances, *exact, **by_row
            )


def _example(
    n: int, n_words: int, dim: int, metric: int = 0, dtype: torch.dtype = torch.float32, k: int = 1
) -> None:
    """Launch on meta tensors."""
    x = torch.empty(1, n, dim, dtype=dtype, device="meta")
    vq_nearest(x, torch.empty(1, n_words, dim, dtype=dtype, device="meta"), metric, k, True)


AOT = {
    "64": Example(partial(_example, 16384, 512, 64), wide=False, quick=True),
    "256": Example(partial(_example, 262144, 8192, 256), wide=False),
    "8": Example(partial(_example, 1 << 20, 16384, 8), wide=False, quick=True),
    "24, cosine": Example(partial(_example, 4096, 1024, 24, COSINE.value), wide=False),
    "128, cosine": Example(partial(_example, 4096, 1024, 128, COSINE.value), wide=False),
    "1024, product": Example(partial(_example, 4096, 1024, 1024, DOT.value), wide=False),
    "64, five": Example(partial(_example, 16384, 512, 64, k=5), wide=False),
    "8, cosine, five": Example(partial(_example, 16384, 8192, 8, COSINE.value, k=5), wide=False),
    "1024, product, 64": Example(partial(_example, 4096, 1024, 1024, DOT.value, k=64), wide=False),
    "one vector, bfloat16": Example(partial(_example, 1, 8192, 256, 0, torch.bfloat16), wide=False),
}
