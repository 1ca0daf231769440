"""Blocks of noisy logits [BLOCK_K, BLOCK_P], codewords by positions of one sample, and what goes with them.

Logits, noise and gradients are read where they lie, whatever their strides; noise of a key is made in
registers.
"""

import triton
import triton.language as tl

from ._math import FLOAT_MAX, exp
from ._philox import gumbels_at, gumbels_of_groups
from ._soft_scores import bounded


@triton.jit
def load_logits(p_logits, s_logits, i_b, i_k, i_p, K, P):
    """In float32; -inf beyond the codewords."""
    at = i_b * s_logits[0] + i_k[:, None] * s_logits[1] + i_p[None, :] * s_logits[2]
    m = (i_k < K)[:, None] & (i_p < P)[None, :]
    b_l = tl.load(p_logits + at, mask=m, other=0.0).to(tl.float32)
    return tl.where((i_k < K)[:, None], b_l, float("-inf"))


@triton.jit
def noisy(b_l, p_noise, s_noise, p_key, s_key, i_b, i_k, i_p, K, P, GROUPED: tl.constexpr):
    """With their noise; the largest finite number where that is infinite.

    GROUPED: P is a multiple of four, and so is the first of the positions, which follow each other.
    """
    if p_noise is not None:
        at = i_b * s_noise[0] + i_k[:, None] * s_noise[1] + i_p[None, :] * s_noise[2]
        m = (i_k < K)[:, None] & (i_p < P)[None, :]
        b_g = tl.load(p_noise + at, mask=m, other=0.0).to(tl.float32)
    else:
        seed, offset = tl.load(p_key + i_b * s_key), tl.load(p_key + i_b * s_key + 1)
        first = tl.where(s_key == 0, i_b * K * P, 0)  # of the sample's elements
        if GROUPED:
            GROUPS: tl.constexpr = i_p.shape[0] // 4
            i_group = (tl.min(i_p, axis=0) // 4 + tl.arange(0, GROUPS))[None, :]
            b_g = gumbels_of_groups(seed, offset, (first + i_k[:, None] * P) // 4 + i_group)
        else:
            b_g = gumbels_at(seed, offset, first + i_k[:, None] * P + i_p[None, :])
    b_z = b_l + b_g
    return tl.where(b_z > FLOAT_MAX, FLOAT_MAX, b_z)


@triton.jit
def largest_noisy(p_logits, s_logits, p_noise, s_noise, p_key, s_key, p_indices, i_b, i_p, K, P):
    """The noisy logit of the codeword that was drawn: the largest of each position, [BLOCK_P]."""
    m = i_p < P
    k = tl.maximum(tl.load(p_indices + i_b * P + i_p, mask=m, other=0), 0)
    b_l = tl.load(p_logits + i_b * s_logits[0] + k * s_logits[1] + i_p * s_logits[2], mask=m, other=0.0)
    if p_noise is not None:
        b_g = tl.load(p_noise + i_b * s_noise[0] + k * s_noise[1] + i_p * s_noise[2], mask=m, other=0.0)
        b_g = b_g.to(tl.float32)
    else:
        seed, offset = tl.load(p_key + i_b * s_key), tl.load(p_key + i_b * s_key + 1)
        b_g = gumbels_at(seed, offset, tl.where(s_key == 0, i_b * K * P, 0) + k * P + i_p)
    b_z = b_l.to(tl.float32) + b_g
    return tl.where(b_z > FLOAT_MAX, FLOAT_MAX, b_z)


@triton.jit
def add_logits(b_largest, b_sum, b_moment, b_l):
    """Each element's own sums of exp(l - largest), and of it times l - largest, with one exponential."""
    above = b_l > b_largest
    b_less = bounded(tl.where(above, b_largest - b_l, b_l - b_largest))
    b_e = exp(b_less)
    b_moment = tl.where(above, (b_moment + b_less * b_sum) * b_e, b_moment + b_e * b_less)
    b_sum = tl.where(above, b_sum * b_e + 1.0, b_sum + b_e)
    return tl.where(above, b_l, b_largest), b_sum, b_moment


@triton.jit
def store_logit_sums(p_parts, i_at, m, rows, b_largest, b_sum, b_moment):
    """The sums of all codewords of a part, to p_parts [3, rows], as join_parts takes them."""
    largest = tl.max(b_largest, axis=0)
    b_less = bounded(b_largest - largest[None, :])
    b_e = exp(b_less)
    tl.store(p_parts + i_at, largest, mask=m)
    tl.store(p_parts + rows + i_at, tl.sum(b_sum * b_e, axis=0), mask=m)
    tl.store(p_parts + 2 * rows + i_at, tl.sum((b_moment + b_less * b_sum) * b_e, axis=0), mask=m)


@triton.jit
def by_codewords(
    p_codebook, s_codebook, p_grad, s_grad, i_b, i_k, i_p, K, P, D,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of codewords and gradients of the mix, [BLOCK_K, BLOCK_P], each one chain of additions."""
    acc = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        p_words = p_codebook + i_k[:, None] * s_codebook[0] + i_d[None, :] * s_codebook[1]
        m_d = i_d < D
        b_c = tl.load(p_words, mask=(i_k < K)[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        p_here = p_grad + i_b * s_grad[0] + i_d[:, None] * s_grad[1] + i_p[None, :] * s_grad[2]
        b_g = tl.load(p_here, mask=m_d[:, None] & (i_p < P)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(b_c, b_g, acc, input_precision="ieee")
    return acc
