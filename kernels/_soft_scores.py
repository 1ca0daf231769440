"""Scores of vectors and codewords, and their gradients, a block at a time, in float32.

The products are chains of float32 fused multiply-adds (``input_precision="ieee"``), not those of tensor
cores, which would round the factors to TF32.
"""

import triton
import triton.language as tl

from ._math import FLOAT_MAX, INTERPRETED, exp

L2 = tl.constexpr(0)
COSINE = tl.constexpr(1)
DOT = tl.constexpr(2)
EUCLIDEAN = tl.constexpr(3)


@triton.jit
def products(p_left, p_right, PADDED, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_A, BLOCK_B] of rows at p_left [BLOCK_A] and at p_right [BLOCK_B].

    An element is one chain of additions along D, so that it has the same bits in every tile, either way
    round: probabilities agree with the sums that they were divided by.
    """
    acc = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for d in range(0, PADDED, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D)
        b_left = tl.load(p_left[:, None] + i_d[None, :])
        b_right = tl.load(p_right[None, :] + i_d[:, None])
        if INTERPRETED:  # whose product has another order of additions in each shape
            acc += tl.sum(b_left[:, None, :] * tl.trans(b_right)[None, :, :], axis=2)
        else:
            acc = tl.dot(b_left, b_right, acc, input_precision="ieee")
    return acc


@triton.jit
def scores(b_product, b_bias, b_square, scale, METRIC: tl.constexpr):
    """The scores, less what all of a vector lack; and what they are made of, a distance or the product."""
    if METRIC == EUCLIDEAN:
        b_d2 = (b_bias + b_square) - 2.0 * b_product
        b_distance = tl.sqrt_rn(tl.where(b_d2 < 1e-8, 1e-8, b_d2))
        return b_distance * scale, tl.where(b_d2 < 1e-8, 0.0, b_distance)
    else:
        return b_product * scale + b_bias, b_product


@triton.jit
def bounded(b):
    """b, and -200 where it is less, of which exp is 0 either way, so that its product with 0 is 0."""
    return tl.where(b < -200.0, -200.0, b)


@triton.jit
def add_scores(largest, total, moment, weighted, b_s, b_weight):
    """Sums over the columns so far, of exp(s - largest), of it times s - largest, of it times a weight."""
    most = tl.maximum(largest, tl.max(b_s, axis=1))
    less = bounded(largest - most)
    factor = exp(less)
    b_x = b_s - most[:, None]
    b_e = exp(b_x)
    moment = (moment + less * total) * factor + tl.sum(b_e * bounded(b_x), axis=1)
    total = total * factor + tl.sum(b_e, axis=1)
    if b_weight is not None:
        weighted = weighted * factor + tl.sum(b_e * b_weight, axis=1)
    return most, total, moment, weighted


@triton.jit
def join_parts(p_parts, i_row, m, rows, parts, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """The same sums over all columns, of those of parts of them at p_parts [parts, FIELDS, rows].

    Returns largest, sum, moment, weighted sum and the score of the target, those of them that are there.
    """
    largest = tl.full([BLOCK], -FLOAT_MAX, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment, weighted, target = total, total, total
    for _ in range(parts):
        here = tl.load(p_parts + i_row, mask=m, other=0.0)
        total_here = tl.load(p_parts + rows + i_row, mask=m, other=1.0)
        moment_here = tl.load(p_parts + 2 * rows + i_row, mask=m, other=0.0)
        most = tl.maximum(largest, here)
        less, less_here = bounded(largest - most), bounded(here - most)
        factor, factor_here = exp(less), exp(less_here)
        moment = (moment + less * total) * factor + (moment_here + less_here * total_here) * factor_here
        total = total * factor + total_here * factor_here
        if FIELDS > 3:
            weighted_here = tl.load(p_parts + 3 * rows + i_row, mask=m, other=0.0)
            weighted = weighted * factor + weighted_here * factor_here
        if FIELDS > 4:
            target += tl.load(p_parts + 4 * rows + i_row, mask=m, other=0.0)
        largest = most
        p_parts += FIELDS * rows
    return largest, total, moment, weighted, target


@triton.jit
def gradient_of_scores(
    b_s, b_of, largest, inverse, constant, slope, b_of_mean, hit, less, METRIC: tl.constexpr
):
    """By the scores; for Euclidean ones by half the square of the distance, times -1 / scale."""
    b_x = b_s - largest
    b_g = bounded(b_x) * slope + constant
    if b_of_mean is not None:
        b_g += b_of_mean
    b_g = b_g * (exp(b_x) * inverse)
    if hit is not None:
        b_g -= tl.where(hit, less, 0.0)
    if METRIC == EUCLIDEAN:
        b_g = tl.where(b_of == 0.0, 0.0, tl.div_rn(b_g, 2.0 * tl.where(b_of == 0.0, 1.0, b_of)))
    return b_g
