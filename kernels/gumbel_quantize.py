"""Codewords drawn from logits, or their mix; the op is ``genperf/ops/gumbel_quantize.py``.

Forward reads the logits once: parts of the codebook side by side, then their largest sums, indices and
divergences are joined and the codewords gathered. The mix reads them once more. Backward makes the noise
again, once for the sums of the softmax and once for the gradient. Neither softmax nor noise nor one-hot
vectors are ever stored.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gumbel_tiles import add_logits, by_codewords, largest_noisy, load_logits, noisy, store_logit_sums
from ._math import FLOAT_MAX, exp, log, rounded
from ._segments import segmented_sums
from ._soft_scores import bounded, join_parts
from ._tile import LAUNCH, Example, on_device_of

PART = 1024  # codewords of a program
POSITIONS = 32  # of a program, at most
PROGRAMS = 264  # for which positions are cut into chunks


@triton.jit
def _draw_kernel(
    p_logits, p_noise, p_key, p_best, p_index, p_sums, s_logits, s_noise, s_key, K, P, PART: tl.constexpr,
    GROUPED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of a part of the codewords, the largest noisy logit and whose it is, and sums for the divergence."""
    i_b = tl.program_id(2).to(tl.int64)
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    start = tl.program_id(1) * PART
    b_best = tl.full([BLOCK_K, BLOCK_P], float("-inf"), tl.float32)
    b_index = start + tl.arange(0, BLOCK_K)[:, None] + tl.zeros([BLOCK_K, BLOCK_P], tl.int32)
    b_flaw = tl.zeros([BLOCK_K, BLOCK_P], tl.int32)
    b_largest = tl.full([BLOCK_K, BLOCK_P], -FLOAT_MAX, tl.float32)
    b_sum = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    b_moment = b_sum
    for k in range(start, tl.minimum(start + PART, K), BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        b_l = load_logits(p_logits, s_logits, i_b, i_k, i_p, K, P)
        b_z = noisy(b_l, p_noise, s_noise, p_key, s_key, i_b, i_k, i_p, K, P, GROUPED)
        better = b_z > b_best
        b_best = tl.where(better, b_z, b_best)
        b_index = tl.where(better, i_k[:, None].to(tl.int32), b_index)
        b_flaw = tl.where(b_l == b_l, b_flaw, 1)
        if p_sums is not None:
            b_largest, b_sum, b_moment = add_logits(b_largest, b_sum, b_moment, b_l)
    best = tl.max(b_best, axis=0)
    index = tl.min(tl.where(b_best == best[None, :], b_index, 2147483647), axis=0)
    rows = tl.num_programs(2).to(tl.int64) * P
    i_at, m = i_b * P + i_p, i_p < P
    part = tl.program_id(1).to(tl.int64) * rows
    tl.store(p_best + part + i_at, best, mask=m)
    tl.store(p_index + part + i_at, tl.where(tl.max(b_flaw, axis=0) != 0, -1, index), mask=m)
    if p_sums is not None:
        store_logit_sums(p_sums + 3 * part, i_at, m, rows, b_largest, b_sum, b_moment)


@triton.jit
def _join_kernel(
    p_best, p_index, p_sums, p_codebook, p_indices, p_largest, p_kl, p_quantized, s_codebook, P, D, parts,
    log_k, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Indices, -1 with a NaN, the largest noisy logit or the codewords, and divergences."""
    i_b = tl.program_id(1).to(tl.int64)
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = tl.num_programs(1).to(tl.int64) * P
    i_at, m = i_b * P + i_p, i_p < P
    best = tl.full([BLOCK_P], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_P], tl.int32)
    flaw = index
    for part in range(parts):
        here = tl.load(p_best + part * rows + i_at, mask=m, other=0.0)
        index_here = tl.load(p_index + part * rows + i_at, mask=m, other=0)
        flaw = tl.where(index_here < 0, 1, flaw)
        index = tl.where(here > best, index_here, index)
        best = tl.maximum(best, here)
    index = tl.where(flaw != 0, -1, index).to(tl.int64)
    tl.store(p_indices + i_at, index, mask=m)
    if p_kl is not None:
        _, total, moment, _, _ = join_parts(p_sums, i_at, m, rows, parts, 3, BLOCK_P)
        tl.store(p_kl + i_at, (log_k - log(total)) + tl.div_rn(moment, total), mask=m)
    if p_largest is not None:
        tl.store(p_largest + i_at, best, mask=m)
    if p_quantized is not None:
        kept = m & (index >= 0)
        p_word = p_codebook + index * s_codebook[0]
        for d in range(0, D, BLOCK_D):
            i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
            m_d = (i_d < D)[:, None]
            b_c = tl.load(p_word[None, :] + i_d[:, None] * s_codebook[1], mask=kept[None, :] & m_d, other=0.0)
            b_c = tl.where(kept[None, :], b_c.to(tl.float32), float("nan"))
            p_to = p_quantized + (i_b * D + i_d[:, None]) * P + i_p[None, :]
            tl.store(p_to, rounded(b_c, p_quantized.dtype.element_ty), mask=m[None, :] & m_d)


@triton.jit
def _mix_kernel(
    p_logits, p_noise, p_key, p_largest, p_codebook, p_quantized, s_logits, s_noise, s_key, s_codebook, K, P,
    D, inverse, GROUPED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mix of codewords, [B, D, P]."""
    i_b = tl.program_id(2).to(tl.int64)
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    largest = tl.load(p_largest + i_b * P + i_p, mask=i_p < P, other=0.0)[None, :]
    b_mix = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    for k in range(0, K, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        b_l = load_logits(p_logits, s_logits, i_b, i_k, i_p, K, P)
        b_z = noisy(b_l, p_noise, s_noise, p_key, s_key, i_b, i_k, i_p, K, P, GROUPED)
        b_y = exp((b_z - largest) * inverse)
        b_sum += b_y
        p_words = p_codebook + i_k[:, None] * s_codebook[0] + i_d[None, :] * s_codebook[1]
        b_c = tl.load(p_words, mask=(i_k < K)[:, None] & (i_d < D)[None, :], other=0.0).to(tl.float32)
        b_mix = tl.dot(tl.trans(b_y), b_c, b_mix, input_precision="ieee")
    b_mix = tl.div_rn(b_mix, tl.broadcast_to(tl.sum(b_sum, axis=0)[:, None], b_mix.shape))
    p_to = p_quantized + (i_b * D + i_d[None, :]) * P + i_p[:, None]
    m = (i_p < P)[:, None] & (i_d < D)[None, :]
    tl.store(p_to, rounded(b_mix, p_quantized.dtype.element_ty), mask=m)


@triton.jit
def _sums_kernel(
    p_logits, p_noise, p_key, p_indices, p_codebook, p_grad, p_of_mix, p_sums, s_logits, s_noise, s_key,
    s_codebook, s_grad, K, P, D, inverse, WITH_PRODUCTS: tl.constexpr, PART: tl.constexpr,
    GROUPED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a part: sums of y, unscaled, and of y times its gradient, [parts, 2, B P]; and the divergence's."""
    i_b = tl.program_id(2).to(tl.int64)
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    start = tl.program_id(1) * PART
    if p_of_mix is not None:
        most = largest_noisy(p_logits, s_logits, p_noise, s_noise, p_key, s_key, p_indices, i_b, i_p, K, P)[
            None, :
        ]
    b_y_sum = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    b_by_y_sum, b_sum, b_moment = b_y_sum, b_y_sum, b_y_sum
    b_largest = tl.full([BLOCK_K, BLOCK_P], -FLOAT_MAX, tl.float32)
    for k in range(start, tl.minimum(start + PART, K), BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        b_l = load_logits(p_logits, s_logits, i_b, i_k, i_p, K, P)
        if p_of_mix is not None:
            b_z = noisy(b_l, p_noise, s_noise, p_key, s_key, i_b, i_k, i_p, K, P, GROUPED)
            b_y = exp((b_z - most) * inverse)
            b_y_sum += b_y
            if WITH_PRODUCTS:
                b_by_y_sum += b_y * by_codewords(
                    p_codebook, s_codebook, p_grad, s_grad, i_b, i_k, i_p, K, P, D, BLOCK_K, BLOCK_P, BLOCK_D
                )
        if p_sums is not None:
            b_largest, b_sum, b_moment = add_logits(b_largest, b_sum, b_moment, b_l)
    rows = tl.num_programs(2).to(tl.int64) * P
    i_at, m = i_b * P + i_p, i_p < P
    part = tl.program_id(1).to(tl.int64) * rows
    if p_of_mix is not None:
        tl.store(p_of_mix + 2 * part + i_at, tl.sum(b_y_sum, axis=0), mask=m)
        tl.store(p_of_mix + 2 * part + rows + i_at, tl.sum(b_by_y_sum, axis=0), mask=m)
    if p_sums is not None:
        store_logit_sums(p_sums + 3 * part, i_at, m, rows, b_largest, b_sum, b_moment)


@triton.jit
def _joined_sums(p_of_mix, i_at, m, rows, parts, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    by_total = total
    for part in range(parts):
        total += tl.load(p_of_mix + 2 * part * rows + i_at, mask=m, other=1.0)
        by_total += tl.load(p_of_mix + (2 * part + 1) * rows + i_at, mask=m, other=0.0)
    return total, by_total


@triton.jit
def _logits_kernel(
    p_logits, p_noise, p_key, p_indices, p_codebook, p_grad, p_grad_kl, p_of_mix, p_sums, p_out, s_logits,
    s_noise, s_key, s_codebook, s_grad, K, P, D, parts, inverse, PART: tl.constexpr,
    GROUPED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, [B, K, P]."""
    i_b = tl.program_id(2).to(tl.int64)
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    start = tl.program_id(1) * PART
    rows = tl.num_programs(2).to(tl.int64) * P
    i_at, m = i_b * P + i_p, i_p < P
    one = tl.full([BLOCK_P], 1.0, tl.float32)
    if p_of_mix is not None:
        most = largest_noisy(p_logits, s_logits, p_noise, s_noise, p_key, s_key, p_indices, i_b, i_p, K, P)[
            None, :
        ]
        total, by_total = _joined_sums(p_of_mix, i_at, m, rows, parts, BLOCK_P)
        of_y, mean = tl.div_rn(one, total)[None, :], tl.div_rn(by_total, total)[None, :]
    if p_sums is not None:
        largest, total, moment, _, _ = join_parts(p_sums, i_at, m, rows, parts, 3, BLOCK_P)
        of_q, mean_log = tl.div_rn(one, total)[None, :], tl.div_rn(moment, total)[None, :]
        of_q = of_q * tl.load(p_grad_kl + i_at, mask=m, other=0.0)[None, :]
    for k in range(start, tl.minimum(start + PART, K), BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        b_l = load_logits(p_logits, s_logits, i_b, i_k, i_p, K, P)
        b_out = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
        if p_of_mix is not None:
            b_z = noisy(b_l, p_noise, s_noise, p_key, s_key, i_b, i_k, i_p, K, P, GROUPED)
            b_y = exp((b_z - most) * inverse) * of_y
            b_by_y = by_codewords(
                p_codebook, s_codebook, p_grad, s_grad, i_b, i_k, i_p, K, P, D, BLOCK_K, BLOCK_P, BLOCK_D
            )
            b_out = b_y * (b_by_y - mean) * inverse
        if p_sums is not None:
            b_x = b_l - largest[None, :]
            b_out += exp(b_x) * of_q * (bounded(b_x) - mean_log)
        p_to = p_out + (i_b * K + i_k[:, None]) * P + i_p[None, :]
        tl.store(p_to, rounded(b_out, p_out.dtype.element_ty), mask=(i_k < K)[:, None] & m[None, :])


@triton.jit
def _words_kernel(
    p_logits, p_noise, p_key, p_indices, p_grad, p_of_mix, p_out, s_logits, s_noise, s_key, s_grad, B, K, P,
    D, parts, chunk, inverse,
    GROUPED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the codebook by the mix, of a chunk of blocks of positions: [chunks, K, D]."""
    i_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    i_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    blocks = tl.cdiv(P, BLOCK_P)
    start = tl.program_id(2) * chunk
    b_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for block in range(start, tl.minimum(start + chunk, B * blocks)):
        i_b = (tl.zeros([], tl.int64) + block) // blocks
        i_p = (block - i_b * blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
        m = i_p < P
        most = largest_noisy(p_logits, s_logits, p_noise, s_noise, p_key, s_key, p_indices, i_b, i_p, K, P)[
            None, :
        ]
        total, _ = _joined_sums(p_of_mix, i_b * P + i_p, m, (tl.zeros([], tl.int64) + B) * P, parts, BLOCK_P)
        b_l = load_logits(p_logits, s_logits, i_b, i_k, i_p, K, P)
        b_z = noisy(b_l, p_noise, s_noise, p_key, s_key, i_b, i_k, i_p, K, P, GROUPED)
        one = tl.where(m, 1.0, 0.0)
        b_y = exp((b_z - most) * inverse) * tl.div_rn(one, total)[None, :]
        b_y = tl.where(m[None, :], b_y, 0.0)
        p_here = p_grad + i_b * s_grad[0] + i_d[None, :] * s_grad[1] + i_p[:, None] * s_grad[2]
        b_g = tl.load(p_here, mask=m[:, None] & (i_d < D)[None, :], other=0.0).to(tl.float32)
        b_sum = tl.dot(b_y, b_g, b_sum, input_precision="ieee")
    at = (tl.program_id(2).to(tl.int64) * K + i_k[:, None]) * D + i_d[None, :]
    tl.store(p_out + at, b_sum, mask=(i_k < K)[:, None] & (i_d < D)[None, :])


class _Source(NamedTuple):
    """Logits and noise as the kernels take them."""

    tensors: tuple[Tensor | None, ...]  # logits, noise, key
    strides: tuple[object, ...]  # of them; that of the key between samples
    grouped: bool

    @classmethod
    def of(cls, logits: Tensor, noise: Tensor | None, key: Tensor | None) -> "_Source":
        by_sample = 2 if key is not None and key.dim() == 2 else 0
        return cls(
            (logits, noise, None if key is None else key.contiguous()),
            (logits.stride(), logits.stride() if noise is None else noise.stride(), by_sample),
            noise is None and logits.shape[2] % 4 == 0,
        )


# Room for the products' factors in registers.
_PRODUCTS = {**LAUNCH, "num_stages": 1, "maxnreg": 255}


def _positions(n: int, least: int) -> int:
    return min(POSITIONS, max(least, triton.next_power_of_2(n)))


def gumbel_quantize(
    logits: Tensor, codebook: Tensor, noise: Tensor | None, key: Tensor | None,
    temperature: float, hard: bool, want_kl: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The torch op ``genperf::gumbel_quantize``."""
    batch, n_words, n = logits.shape
    dim = codebook.shape[1]
    quantized = codebook.new_empty(batch, dim, n)
    indices = logits.new_empty(batch, n, dtype=torch.int64)
    kl = logits.new_empty(batch, n, dtype=torch.float32) if want_kl else None
    if indices.numel() == 0:
        return quantized, indices, kl
    source, parts = _Source.of(logits, noise, key), triton.cdiv(n_words, PART)
    best = logits.new_empty(parts, batch * n, dtype=torch.float32)
    index = torch.empty_like(best, dtype=torch.int32)
    sums = logits.new_empty(parts, 3, batch * n, dtype=torch.float32) if want_kl else None
    largest = None if hard else best.new_empty(batch * n)
    block_p = _positions(n, 4)
    with on_device_of(logits):
        _draw_kernel[(triton.cdiv(n, block_p), parts, batch)](
            *source.tensors, best, index, sums, *source.strides, n_words, n, PART=PART,
            GROUPED=source.grouped, BLOCK_K=1024 // block_p, BLOCK_P=block_p, **LAUNCH,
        )  # fmt: skip
        _join_kernel[(triton.cdiv(n, block_p), batch)](
            best, index, sums, codebook, indices, largest, kl, quantized if hard else None,
            codebook.stride(), n, dim, parts, math.log(n_words),
            BLOCK_P=block_p, BLOCK_D=1024 // block_p, **LAUNCH,
        )  # fmt: skip
        if not hard:
            block_p, block_d = _positions(n, 16), min(64, max(16, triton.next_power_of_2(dim)))
            _mix_kernel[(triton.cdiv(n, block_p), triton.cdiv(dim, block_d), batch)](
                *source.tensors, largest, codebook, quantized, *source.strides, codebook.stride(), n_words, n,
                dim, 1 / temperature, GROUPED=source.grouped, BLOCK_K=32, BLOCK_P=block_p, BLOCK_D=block_d,
                **_PRODUCTS,
            )  # fmt: skip
    return quantized, indices, kl


def gumbel_quantize_backward(
    grad: Tensor | None, grad_kl: Tensor | None, logits: Tensor, codebook: Tensor,
    noise: Tensor | None, key: Tensor | None, indices: Tensor,
    temperature: float, hard: bool, want_logits: bool, want_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The torch op ``genperf::gumbel_quantize_backward``."""
    batch, n_words, n = logits.shape
    dim = codebook.shape[1]
    of_logits = logits.new_empty(logits.shape) if want_logits else None
    of_codebook = None
    if logits.numel() == 0:
        return of_logits, codebook.new_zeros(codebook.shape) if want_codebook else None
    if want_codebook and (grad is None or hard):
        of_codebook = codebook.new_zeros(codebook.shape)
        if grad is not None:
            _, by_word = segmented_sums(grad.transpose(1, 2)[None], indices[None], n_words)
            of_codebook = by_word[0].to(codebook.dtype)
    mixing = want_codebook and of_codebook is None
    if of_logits is None and not mixing:
        return None, of_codebook
    source, parts = _Source.of(logits, noise, key), triton.cdiv(n_words, PART)
    of_mix = None if grad is None else logits.new_empty(parts, 2, batch * n, dtype=torch.float32)
    given = None if grad_kl is None or of_logits is None else grad_kl.contiguous()
    sums = None if given is None else logits.new_empty(parts, 3, batch * n, dtype=torch.float32)
    block_p = _positions(n, 16)
    grid = triton.cdiv(n, block_p), parts, batch
    strides = (*source.strides, codebook.stride(), (logits if grad is None else grad).stride())
    tiles = {"GROUPED": source.grouped, "BLOCK_P": block_p, **_PRODUCTS}
    with on_device_of(logits):
        _sums_kernel[grid](
            *source.tensors, indices, codebook, grad, of_mix, sums, *strides, n_words, n, dim,
            1 / temperature, WITH_PRODUCTS=of_logits is not None, PART=PART, BLOCK_K=1024 // block_p,
            BLOCK_D=16, **tiles,
        )  # fmt: skip
        if of_logits is not None:
            _logits_kernel[grid](
                *source.tensors, indices, codebook, grad, given, of_mix, sums, of_logits, *strides, n_words,
                n, dim, parts, 1 / temperature, PART=PART, BLOCK_K=1024 // block_p, BLOCK_D=16, **tiles,
            )  # fmt: skip
        if mixing:
            block_d, blocks = min(64, max(16, triton.next_power_of_2(dim))), batch * grid[0]
            blocks_k, blocks_d = triton.cdiv(n_words, 32), triton.cdiv(dim, block_d)
            chunks = min(blocks, max(1, PROGRAMS // (blocks_k * blocks_d)))
            chunk = triton.cdiv(blocks, chunks)
            partial_sums = logits.new_empty(triton.cdiv(blocks, chunk), n_words, dim, dtype=torch.float32)
            _words_kernel[(blocks_k, blocks_d, len(partial_sums))](
                *source.tensors, indices, grad, of_mix, partial_sums, *source.strides, strides[-1], batch,
                n_words, n, dim, parts, chunk, 1 / temperature, BLOCK_K=32, BLOCK_D=block_d, **tiles,
            )  # fmt: skip
            of_codebook = partial_sums.sum(0).to(codebook.dtype)
    return of_logits, of_codebook


def _example(
    shape: tuple[int, int, int], dim: int, hard: bool, dtype: torch.dtype = torch.float32, last: bool = False,
    keys: bool = False, with_noise: bool = False,
) -> None:  # fmt: skip
    """Forward and backward on meta tensors."""
    logits = torch.empty(shape, dtype=dtype, device="meta")
    if last:
        logits = torch.empty(shape[0], shape[2], shape[1], dtype=dtype, device="meta").transpose(1, 2)
    codebook = torch.empty(shape[1], dim, dtype=dtype, device="meta")
    noise = torch.empty_like(logits) if with_noise else None
    key = torch.empty((shape[0], 2) if keys else (2,), dtype=torch.int64, device="meta")
    source = (logits, codebook, noise, None if with_noise else key)
    quantized, indices, kl = gumbel_quantize(*source, 0.5, hard, True)
    gumbel_quantize_backward(quantized, kl, *source, indices, 0.5, hard, True, True)


AOT = {
    "hard": Example(partial(_example, (16, 8192, 1024), 256, True), wide=False),
    "mixed": Example(partial(_example, (16, 8192, 1024), 256, False), wide=False, quick=True),
    "hard, channels last, bfloat16": Example(
        partial(_example, (16, 8192, 1024), 256, True, torch.bfloat16, last=True), wide=False
    ),
    "mixed, odd, keys": Example(partial(_example, (3, 1000, 77), 13, False, keys=True), wide=False),
    "mixed, noise": Example(partial(_example, (16, 512, 256), 64, False, with_noise=True), wide=False),
}
