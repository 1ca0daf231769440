"""Sums of vectors by their codeword: sorted by it, cut into chunks of rows, summed in a fixed order.

A chunk's segments, the runs of rows of one codeword, are summed row by row. A segment within a chunk is a
codeword's sum; one that goes on is a partial sum of its chunk, of which a second kernel adds those of a
codeword. Nothing is read on the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import rounded
from ._tile import LAUNCH, collapsed, offset_of, on_device_of

ROWS = 32  # of a chunk


@triton.jit
def _chunks_kernel(
    p_x, p_keys, p_order, p_starts, p_codebook, p_coefficient, p_indices, p_sums, p_partials, sizes, strides,
    s_d, s_head, s_k, s_cd, rows, N, K, D, stages, n_keys, of_group, PULL: tl.constexpr,
    STAGED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_C chunks side by side, row after row."""
    i_chunk = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = i_chunk * ROWS
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for r in range(ROWS):
        i = begin + r
        key = tl.load(p_keys + i, mask=i < rows, other=n_keys)
        m_row = key < n_keys
        m = m_row[:, None] & (i_d < D)[None, :]
        i_row = tl.load(p_order + i, mask=m_row, other=0)
        if STAGED:
            i_stage = i_row % stages
            i_row = i_row // stages
        at = offset_of(i_row // N, i_row % N, sizes, strides)
        b_x = tl.load(p_x + at[:, None] + i_d[None, :] * s_d, mask=m, other=0.0).to(tl.float32)
        if STAGED:  # less the codewords of the stages before; the keys are sorted by their stage
            for t in range(tl.max(tl.where(m_row, i_stage, 0), axis=0)):
                k = tl.load(p_indices + i_row * stages + t, mask=m_row & (t < i_stage), other=-1)
                word = (i_row // N * stages + t) * s_head + k * s_k
                m_word = m & (k >= 0)[:, None]
                p_word = p_codebook + word[:, None] + i_d[None, :] * s_cd
                b_c = tl.load(p_word, mask=m_word, other=0.0).to(tl.float32)
                b_x = rounded(tl.where(m_word, b_x - b_c, b_x), p_x.dtype.element_ty).to(tl.float32)
        if PULL:
            word = key // K * s_head + key % K * s_k
            b_c = tl.load(p_codebook + word[:, None] + i_d[None, :] * s_cd, mask=m, other=0.0).to(tl.float32)
            b_x = (b_c - b_x) * tl.load(p_coefficient + i_row // of_group, mask=m_row, other=0.0)[:, None]
        start = tl.load(p_starts + key, mask=m_row, other=0)
        end = tl.load(p_starts + key + 1, mask=m_row, other=0)
        acc = tl.where((i == start)[:, None], b_x, acc + b_x)  # [BLOCK_C, BLOCK_D]
        # The last row of a segment, or of what there is of it in the chunk, has its sum.
        whole = (start >= begin) & (end <= begin + ROWS)
        p_partial = p_partials + (2 * i_chunk + (start >= begin).to(tl.int64)) * D
        p_out = tl.where(whole, p_sums + key * D, p_partial)
        last = (i + 1 == end) | (r == ROWS - 1)
        tl.store(p_out[:, None] + i_d[None, :], acc, mask=m & last[:, None])


@triton.jit
def _join_kernel(
    p_starts, p_partials, p_sums, D, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The sums of codewords that have no vectors, or vectors in several chunks."""
    key = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end = tl.load(p_starts + key), tl.load(p_starts + key + 1)
    first, last = start // ROWS, (end - 1) // ROWS
    if (end > start) & (first == last):
        return
    acc = tl.zeros([BLOCK_D], tl.float32)
    if end > start:
        acc = tl.load(p_partials + (2 * first + 1) * D + i_d, mask=i_d < D, other=0.0)
        for c in range(first + 1, last + 1, BLOCK_C):
            i_c = c + tl.arange(0, BLOCK_C)
            m = (i_c <= last)[:, None] & (i_d < D)[None, :]
            acc += tl.sum(
                tl.load(p_partials + 2 * i_c[:, None] * D + i_d[None, :], mask=m, other=0.0), axis=0
            )
    tl.store(p_sums + key * D + i_d, acc, mask=i_d < D)


def segmented_sums(
    x: Tensor,
    indices: Tensor,
    n_codewords: int,
    codebook: Tensor | None = None,
    coefficient: Tensor | None = None,
    of_group: int = 1,
    stages: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Counts int64 [heads, K] and sums float32 [heads, K, D] of x [heads, *, D], by indices [heads, *].

    With a coefficient, sums of ``coefficient[row // of_group] * (c - x)``. An index out of range is none.
    With stages, of x [groups, *, D] by indices [groups, *, stages], heads are the stages of the first group,
    then of the next, and each sums what those before it leave of x: less their codewords, stage by stage.
    """
    groups, dim, rows = len(x), x.shape[-1], indices.numel()
    heads = groups * (stages or 1)
    n_keys, n = heads * n_codewords, max(1, x.numel() // max(1, groups * dim))
    head = torch.arange(heads, device=x.device)
    if stages is None:
        head = head.view(-1, *[1] * (indices.dim() - 1))
    else:
        head = head.view(groups, *[1] * (indices.dim() - 2), stages)
    known = (indices >= 0) & (indices < n_codewords)
    keys = torch.where(known, indices + head * n_codewords, n_keys).flatten()
    keys, order = keys.sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(n_keys + 1, device=x.device))
    counts = (starts[1:] - starts[:-1]).view(heads, n_codewords)
    sums = x.new_empty((heads, n_codewords, dim), dtype=torch.float32)
    chunks = max(1, triton.cdiv(rows, ROWS))
    partials = x.new_empty((chunks, 2, dim), dtype=torch.float32)
    block_d = min(128, max(4, triton.next_power_of_2(dim)))
    block_c = (1024 if stages is None else 512) // block_d  # elements in registers
    sizes, strides = collapsed(x)
    pull = coefficient is not None
    words, word_strides = (codebook, codebook.stride()) if codebook is not None else (x, (0, 0, 0))
    with on_device_of(x):
        _chunks_kernel[(triton.cdiv(chunks, block_c), triton.cdiv(dim, block_d))](
            x, keys, order, starts, words, coefficient if pull else partials, indices, sums, partials,
            sizes, strides, x.stride(-1), *word_strides, rows, n, n_codewords, dim, stages or 1, n_keys,
            of_group, PULL=pull, STAGED=stages is not None, ROWS=ROWS, BLOCK_C=block_c, BLOCK_D=block_d,
            **LAUNCH,
        )  # fmt: skip
        if n_keys:
            _join_kernel[(n_keys, triton.cdiv(dim, block_d))](
                starts, partials, sums, dim, ROWS=ROWS, BLOCK_C=16, BLOCK_D=block_d,
                **{**LAUNCH, "num_warps": 1},
            )  # fmt: skip
    return counts, sums
