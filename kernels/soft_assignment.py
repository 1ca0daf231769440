"""The softmax over a codebook, by its sums; the op is ``genperf/ops/soft_assignment.py``.

Blocks of scores are computed where they are needed, and never written: once for the sums of each vector, once
more for the mean probabilities, and backward once for the sums and once for each gradient. Codebooks are cut
into parts and vectors into chunks by the shapes alone, and their sums are added in order.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import FLOAT_MAX, exp, log, rounded
from ._soft_operands import WORDS, Operands, operands
from ._soft_scores import COSINE, DOT, EUCLIDEAN, L2, add_scores, gradient_of_scores, join_parts, products
from ._soft_scores import scores as scores_of
from ._tile import LAUNCH, Example, on_device_of

PART = 4096  # codewords, or vectors, whose sums are made in one go
PROGRAMS = 264  # for which vectors are cut into chunks


@triton.jit
def _statistics_kernel(
    p_rows, p_words, p_bias, p_squares, p_of_mean, p_targets, p_parts, N, K_PADDED, PADDED, n_blocks, scale,
    METRIC: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the codebook, to [parts, FIELDS, heads N]."""
    i_head = tl.program_id(2).to(tl.int64)
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_row = i_head * N + tl.minimum(i_r, N - 1)
    p_left = p_rows + i_row * PADDED
    square = tl.load(p_squares + i_row).to(tl.float32)[:, None]
    target = tl.full([BLOCK_N], -1, tl.int64)
    if p_targets is not None:
        target = tl.load(p_targets + i_row)
    largest = tl.full([BLOCK_N], -FLOAT_MAX, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    moment, weighted, of_target = total, total, total
    start = tl.program_id(1) * n_blocks * BLOCK_K
    for k in range(start, tl.minimum(start + n_blocks * BLOCK_K, K_PADDED), BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K)
        i_word = i_head * K_PADDED + i_k
        b_product = products(p_left, p_words + i_word * PADDED, PADDED, BLOCK_N, BLOCK_K, BLOCK_D)
        b_s, _ = scores_of(b_product, tl.load(p_bias + i_word)[None, :], square, scale, METRIC)
        b_weight = None
        if p_of_mean is not None:
            b_weight = tl.load(p_of_mean + i_word)[None, :]
        largest, total, moment, weighted = add_scores(largest, total, moment, weighted, b_s, b_weight)
        if p_targets is not None:
            of_target += tl.sum(tl.where(i_k[None, :] == target[:, None], b_s, 0.0), axis=1)
    rows = tl.num_programs(2).to(tl.int64) * N
    p_part = p_parts + tl.program_id(1) * FIELDS * rows + i_row
    m = i_r < N
    tl.store(p_part, largest, mask=m)
    tl.store(p_part + rows, total, mask=m)
    tl.store(p_part + 2 * rows, moment, mask=m)
    if FIELDS > 3:
        tl.store(p_part + 3 * rows, weighted, mask=m)
    if FIELDS > 4:
        tl.store(p_part + 4 * rows, of_target, mask=m)


@triton.jit
def _forward_join_kernel(
    p_parts, p_squares, p_targets, p_lse, p_entropy, p_nll, p_largest, p_inverse, rows, parts, K, scale,
    METRIC: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The results of each vector, and what its probabilities are made with."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i_row < rows
    largest, total, moment, _, of_target = join_parts(p_parts, i_row, m, rows, parts, FIELDS, BLOCK)
    square = tl.load(p_squares + i_row, mask=m, other=0.0)
    log_total = log(total) + (square * 0.0).to(tl.float32)  # NaN where x is not finite
    lse = largest.to(tl.float64)
    if METRIC == L2:
        lse -= 0.5 * scale * square
    tl.store(p_lse + i_row, (lse + log_total.to(tl.float64)).to(tl.float32), mask=m)
    tl.store(p_entropy + i_row, log_total - tl.div_rn(moment, total), mask=m)
    if p_nll is not None:
        target = tl.load(p_targets + i_row, mask=m, other=-1)
        nll = tl.where((target >= 0) & (target < K), log_total - (of_target - largest), float("nan"))
        tl.store(p_nll + i_row, tl.where(target == -1, 0.0, nll), mask=m)
    tl.store(p_largest + i_row, largest, mask=m)
    tl.store(p_inverse + i_row, tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), total), mask=m)


@triton.jit
def _mean_kernel(
    p_rows, p_words, p_bias, p_squares, p_largest, p_inverse, p_means, N, K_PADDED, PADDED, chunk, scale,
    METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of the probabilities over a chunk of vectors, to [chunks, heads, K_PADDED]."""
    i_head = tl.program_id(2).to(tl.int64)
    i_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    i_word = i_head * K_PADDED + i_k
    p_right = p_words + i_word * PADDED
    b_bias = tl.load(p_bias + i_word)[None, :]
    b_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    start = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(start + chunk, N)
    for n in range(start, end, BLOCK_N):
        i_r = n + tl.arange(0, BLOCK_N)
        i_row = i_head * N + tl.minimum(i_r, N - 1)
        square = tl.load(p_squares + i_row).to(tl.float32)[:, None]
        largest = tl.load(p_largest + i_row)[:, None]
        inverse = tl.where(i_r < end, tl.load(p_inverse + i_row), 0.0)[:, None]
        b_product = products(p_rows + i_row * PADDED, p_right, PADDED, BLOCK_N, BLOCK_K, BLOCK_D)
        b_s, _ = scores_of(b_product, b_bias, square, scale, METRIC)
        b_sum += exp(b_s - largest) * inverse
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(2) * K_PADDED + i_word
    tl.store(p_means + at, tl.sum(b_sum, axis=0))


@triton.jit
def _backward_join_kernel(
    p_parts, p_squares, p_targets, p_grad_lse, p_grad_entropy, p_grad_nll, p_facts, rows, parts, K,
    FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each vector, to [5, rows]: largest, 1 / sum; and of the gradient by its scores, which is p times
    (constant + slope (s - largest)), less the last at the target."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i_row < rows
    largest, total, moment, weighted, _ = join_parts(p_parts, i_row, m, rows, parts, FIELDS, BLOCK)
    constant = -tl.div_rn(weighted, total)
    constant += (tl.load(p_squares + i_row, mask=m, other=0.0) * 0.0).to(tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    less = slope
    if p_grad_lse is not None:
        constant += tl.load(p_grad_lse + i_row, mask=m, other=0.0)
    if p_grad_entropy is not None:
        slope = -tl.load(p_grad_entropy + i_row, mask=m, other=0.0)
        constant -= slope * tl.div_rn(moment, total)
    if p_grad_nll is not None:
        target = tl.load(p_targets + i_row, mask=m, other=-1)
        less = tl.load(p_grad_nll + i_row, mask=m, other=0.0)
        less = tl.where((target >= 0) & (target < K), less, 0.0)
        constant += less
    tl.store(p_facts + i_row, largest, mask=m)
    inverse = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), total)
    tl.store(p_facts + rows + i_row, inverse, mask=m)
    tl.store(p_facts + 2 * rows + i_row, constant, mask=m)
    tl.store(p_facts + 3 * rows + i_row, slope, mask=m)
    tl.store(p_facts + 4 * rows + i_row, less, mask=m)


@triton.jit
def _across(b, OF_WORDS: tl.constexpr):
    """A fact of each vector, along the dimension of the vectors."""
    if OF_WORDS:
        return b[None, :]
    else:
        return b[:, None]


@triton.jit
def _gradient_kernel(
    p_rows, p_words, p_bias, p_squares, p_facts, p_of_mean, p_targets, p_sums, p_along, N, K_PADDED, PADDED,
    chunk, scale, METRIC: tl.constexpr, OF_WORDS: tl.constexpr, WIDE: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Sums of g c by vector, or of g x by codeword, over a chunk of the others: [chunks, heads, *, PADDED].

    And p_along [chunks, heads, *], of g for distances and of g times the product for the cosine: how much of
    the row itself is to be taken away. Sums of more than BLOCK_O dimensions, WIDE, are kept in memory.
    """
    i_head = tl.program_id(2).to(tl.int64)
    n_a, n_b = N, K_PADDED
    p_own, p_other = p_rows, p_words
    if OF_WORDS:
        n_a, n_b = K_PADDED, N
        p_own, p_other = p_words, p_rows
    i_o = tl.arange(0, BLOCK_O)
    i_a = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    m_a = i_a < n_a
    i_a = i_head * n_a + tl.minimum(i_a, n_a - 1)
    p_own += i_a * PADDED
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(2) * n_a + i_a
    p_sums += at[:, None] * PADDED + i_o[None, :]
    rows = tl.num_programs(2).to(tl.int64) * N
    start = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(start + chunk, n_b)
    b_total = tl.zeros([BLOCK_A, BLOCK_O], tl.float32)
    along = tl.zeros([BLOCK_A], tl.float32)
    for segment in range(start, end, SEGMENT):
        b_sum = tl.zeros([BLOCK_A, BLOCK_O], tl.float32)
        along_here = tl.zeros([BLOCK_A], tl.float32)
        for b in range(segment, tl.minimum(segment + SEGMENT, end), BLOCK_B):
            i_b = b + tl.arange(0, BLOCK_B)
            m_b = i_b < end
            i_b = i_head * n_b + tl.minimum(i_b, n_b - 1)
            b_product = products(p_own, p_other + i_b * PADDED, PADDED, BLOCK_A, BLOCK_B, BLOCK_D)
            i_row, i_word, m_row = i_a, i_b, m_a
            if OF_WORDS:
                i_row, i_word, m_row = i_b, i_a, m_b
            b_bias = _across(tl.load(p_bias + i_word), not OF_WORDS)
            square = _across(tl.load(p_squares + i_row).to(tl.float32), OF_WORDS)
            b_s, b_of = scores_of(b_product, b_bias, square, scale, METRIC)
            p_fact = p_facts + i_row
            largest = _across(tl.load(p_fact), OF_WORDS)
            inverse = _across(tl.where(m_row, tl.load(p_fact + rows), 0.0), OF_WORDS)
            constant = _across(tl.load(p_fact + 2 * rows), OF_WORDS)
            slope = _across(tl.load(p_fact + 3 * rows), OF_WORDS)
            b_of_mean, hit, less = None, None, None
            if p_of_mean is not None:
                b_of_mean = _across(tl.load(p_of_mean + i_word), not OF_WORDS)
            if p_targets is not None:
                target = tl.where(m_row, tl.load(p_targets + i_row), -1)
                hit = _across(target, OF_WORDS) == _across(i_word - i_head * K_PADDED, not OF_WORDS)
                less = _across(tl.load(p_fact + 4 * rows), OF_WORDS)
            b_g = gradient_of_scores(
                b_s, b_of, largest, inverse, constant, slope, b_of_mean, hit, less, METRIC
            )
            if METRIC == COSINE:
                along_here += tl.sum(b_g * b_product, axis=1)
            elif METRIC != DOT:
                along_here += tl.sum(b_g, axis=1)
            p_values = p_other + i_b[:, None] * PADDED + i_o[None, :]
            if WIDE:
                m_before = (m_a & (tl.zeros([BLOCK_A], tl.int64) + b > start))[:, None]
                for o in range(0, PADDED, BLOCK_O):
                    m_o = (i_o < PADDED - o)[None, :]
                    b_values = tl.load(p_values + o, mask=m_o, other=0.0)  # [BLOCK_B, BLOCK_O]
                    b_before = tl.load(p_sums + o, mask=m_before & m_o, other=0.0)
                    b_after = tl.dot(b_g, b_values, b_before, input_precision="ieee")
                    tl.store(p_sums + o, b_after, mask=m_a[:, None] & m_o)
                tl.debug_barrier()
            else:
                b_values = tl.load(p_values, mask=(i_o < PADDED)[None, :], other=0.0)
                b_sum = tl.dot(b_g, b_values, b_sum, input_precision="ieee")
        b_total += b_sum
        along += along_here
    if not WIDE:
        tl.store(p_sums, b_total, mask=m_a[:, None] & (i_o < PADDED)[None, :])
    if METRIC != DOT:
        tl.store(p_along + at, along, mask=m_a)


@triton.jit
def _finish_kernel(
    p_sums, p_along, p_own, p_inverse, p_out, n, n_padded, D, PADDED, chunks, scale,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients [heads, n, D], of the sums of all chunks."""
    i_head = tl.program_id(1).to(tl.int64)
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = i_r < n
    i_row = i_head * n_padded + i_r
    step = tl.num_programs(1).to(tl.int64) * n_padded
    along = tl.zeros([BLOCK_R], tl.float32)
    if p_along is not None:
        for c in range(chunks):
            along += tl.load(p_along + c * step + i_row, mask=m_r, other=0.0)
    factor = tl.zeros([BLOCK_R], tl.float32) + scale
    if p_inverse is not None:
        factor = factor * tl.load(p_inverse + i_row, mask=m_r, other=0.0)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        m = m_r[:, None] & (i_d < D)[None, :]
        i_at = i_row[:, None] * PADDED + i_d[None, :]
        b_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for c in range(chunks):
            b_sum += tl.load(p_sums + c * step * PADDED + i_at, mask=m, other=0.0)
        if p_along is not None:
            b_sum -= along[:, None] * tl.load(p_own + i_at, mask=m, other=0.0)
        p_to = p_out + (i_head * n + i_r)[:, None] * D + i_d[None, :]
        tl.store(p_to, rounded(b_sum * factor[:, None], p_out.dtype.element_ty), mask=m)


def _statistics(o: Operands, targets: Tensor | None, of_mean: Tensor | None, fields: int) -> Tensor:
    """Of each vector, by parts of the codebook: [parts, fields, heads N]."""
    heads, (n, k_padded, padded) = len(o.rows), o.sizes()
    parts = triton.cdiv(k_padded, PART)
    sums = o.rows.new_empty(parts, fields, heads * n)
    _statistics_kernel[(triton.cdiv(n, 64), parts, heads)](
        o.rows, o.words, o.bias, o.squares, of_mean, targets, sums, n, k_padded, padded, PART // WORDS,
        o.scale, FIELDS=fields, BLOCK_N=64, BLOCK_K=WORDS, **o.constants,
    )  # fmt: skip
    return sums


def _chunk(blocks: int, n: int, step: int, elements: int) -> int:
    """Vectors of a chunk, a multiple of step, given the programs for each and the numbers that it writes."""
    chunks = min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(n, 4 * step), max(1, (1 << 23) // elements))
    return triton.cdiv(triton.cdiv(n, chunks), step) * step


def soft_assignment(
    x: Tensor, codebook: Tensor, targets: Tensor | None, metric: int, temperature: float, want_mean: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The torch op ``genperf::soft_assignment``."""
    heads, n_words, _ = codebook.shape
    lse, entropy = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    nll = None if targets is None else torch.empty_like(lse)
    if lse.numel() == 0:
        mean = x.new_zeros(heads, n_words, dtype=torch.float32) if want_mean else None
        return lse, entropy, mean, nll
    o = operands(x, codebook, metric, temperature)
    n, k_padded, padded = o.sizes()
    fields = 3 if targets is None else 5
    largest, inverse = (x.new_empty(lse.numel(), dtype=torch.float32) for _ in range(2))
    with on_device_of(x):
        sums = _statistics(o, targets, None, fields)
        _forward_join_kernel[(triton.cdiv(lse.numel(), 128),)](
            sums, o.squares, targets, lse, entropy, nll, largest, inverse, lse.numel(), len(sums), n_words,
            o.scale, METRIC=metric, FIELDS=fields, BLOCK=128, **LAUNCH,
        )  # fmt: skip
        if not want_mean:
            return lse, entropy, None, nll
        blocks = k_padded // WORDS
        chunk = _chunk(blocks * heads, n, 64, heads * k_padded)
        means = x.new_empty(triton.cdiv(n, chunk), heads, k_padded, dtype=torch.float32)
        _mean_kernel[(blocks, len(means), heads)](
            o.rows, o.words, o.bias, o.squares, largest, inverse, means, n, k_padded, padded, chunk, o.scale,
            BLOCK_N=64, BLOCK_K=WORDS, **o.constants,
        )  # fmt: skip
    return lse, entropy, (means[:, :, :n_words].sum(0, dtype=torch.float64) / n).float(), nll


def soft_assignment_backward(
    grad_lse: Tensor | None, grad_entropy: Tensor | None, grad_mean: Tensor | None, grad_nll: Tensor | None,
    x: Tensor, codebook: Tensor, targets: Tensor | None, metric: int, temperature: float,
    want_x: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The torch op ``genperf::soft_assignment_backward``."""
    grad_x = x.new_empty(x.shape) if want_x else None
    grad_codebook = codebook.new_empty(codebook.shape) if want_codebook else None
    if x.numel() == 0:
        return grad_x, None if grad_codebook is None else grad_codebook.zero_()
    o = operands(x, codebook, metric, temperature)
    n_words, (n, k_padded, _) = codebook.shape[1], o.sizes()
    of_mean = None
    if grad_mean is not None:
        of_mean = torch.nn.functional.pad((grad_mean.double() / n).float(), (0, k_padded - n_words))
    if grad_nll is None:
        targets = None
    facts = x.new_empty(5, o.squares.numel(), dtype=torch.float32)
    grads = [None if g is None else g.contiguous() for g in (grad_lse, grad_entropy, grad_nll)]
    with on_device_of(x):
        fields = 3 if of_mean is None else 4
        sums = _statistics(o, None, of_mean, fields)
        _backward_join_kernel[(triton.cdiv(facts.shape[1], 128),)](
            sums, o.squares, targets, *grads, facts, facts.shape[1], len(sums), n_words,
            FIELDS=fields, BLOCK=128, **LAUNCH,
        )  # fmt: skip
        for out, of_words in ((grad_x, False), (grad_codebook, True)):
            if out is not None:
                _gradient(o, facts, of_mean, targets, out, of_words)
    return grad_x, grad_codebook


def _gradient(
    o: Operands, facts: Tensor, of_mean: Tensor | None, targets: Tensor | None, out: Tensor, of_words: bool
) -> None:
    """By the vectors or by the codewords, to ``out`` [heads, *, D]."""
    heads, (n, k_padded, padded) = len(o.rows), o.sizes()
    own, inverse = (o.words, o.inverse_words) if of_words else (o.rows, o.inverse_rows)
    block_o = min(64, triton.next_power_of_2(padded))
    blocks = triton.cdiv(own.shape[1], 64)
    chunk = _chunk(blocks * heads, n, 64, own.numel()) if of_words else k_padded
    chunks = triton.cdiv(n if of_words else k_padded, chunk)
    sums = own.new_empty(chunks, *own.shape)
    along = None if o.metric == DOT.value else own.new_empty(chunks, *own.shape[:2])
    constants = {**o.constants, "num_warps": 8, "num_stages": 1}
    _gradient_kernel[(blocks, chunks, heads)](
        o.rows, o.words, o.bias, o.squares, facts, of_mean, targets, sums, along, n, k_padded, padded, chunk,
        o.scale, OF_WORDS=of_words, WIDE=padded > block_o, SEGMENT=1024,
        BLOCK_A=64, BLOCK_B=32, BLOCK_O=block_o, **constants,
    )  # fmt: skip
    number, dim = out[0].numel() // out.shape[-1], out.shape[-1]
    block_r = 1024 // block_o
    factor = (1 if o.metric in (COSINE.value, DOT.value) else 2) / o.temperature
    _finish_kernel[(triton.cdiv(number, block_r), heads)](
        sums, along, own, inverse, out, number, own.shape[1], dim, padded, chunks, factor,
        BLOCK_R=block_r, BLOCK_D=block_o, **LAUNCH,
    )  # fmt: skip


def _example(
    n: int, n_words: int, dim: int, metric: tl.constexpr = L2, dtype: torch.dtype = torch.float32
) -> None:
    """Forward and backward on meta tensors."""
    x, codebook = (torch.empty(1, k, dim, dtype=dtype, device="meta") for k in (n, n_words))
    targets = torch.empty(1, n, dtype=torch.int64, device="meta")
    out = soft_assignment(x, codebook, targets, metric.value, 0.5, True)
    soft_assignment_backward(*out, x, codebook, targets, metric.value, 0.5, True, True)


AOT = {
    "64": Example(partial(_example, 16384, 512, 64), wide=False, quick=True),
    "8, Euclidean": Example(partial(_example, 65536, 8192, 8, EUCLIDEAN), wide=False),
    "32, cosine": Example(partial(_example, 65536, 8192, 32, COSINE), wide=False),
    "256, bfloat16": Example(partial(_example, 16384, 16384, 256, L2, torch.bfloat16), wide=False),
    "18, product": Example(partial(_example, 8192, 1 << 18, 18, DOT), wide=False),
}
