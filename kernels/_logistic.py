"""Discretized logistics on blocks of positions: ``csrc/mixture_logistic_nll/math.h``, the same formulas.

Of any block of positions, a tuple has one block for each image channel.
"""

import triton
import triton.language as tl

from ._math import INTERPRETED, exp, exp_bounded, log_normal
from ._tile import LAUNCH

# Positions of a program: one a thread, since mixtures take its registers. Interpreted, a program takes as
# long whatever its size.
POSITIONS = 1024 if INTERPRETED else 128
# For kernels of which ptxas by itself gives a thread too few registers, and spills. Three programs of them
# fit on a multiprocessor.
LONG = {**LAUNCH, "maxnreg": 168}

FAR = tl.constexpr(2.0**60)
NARROW = tl.constexpr(0.35)  # widths below take series
LEAST = tl.constexpr(1e-5)


@triton.jit
def exp_down(x):
    """e^x for x <= 30, never less than e^-87; NaN stays NaN."""
    return exp_bounded(tl.where(x < -87.0, -87.0, x))


@triton.jit
def reciprocal(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def share_of(x):
    """tanh(x) to within a rounding of 1, which is what a share of a value is worth; its derivative."""
    u = exp_down(-2.0 * tl.abs(x))
    over = reciprocal(1.0 + u)
    t = (1.0 - u) * over
    return tl.where(x < 0.0, -t, t), 4.0 * u * (over * over)


@triton.jit
def _narrow_mass(w):
    """(1 - e^-w) / w for 0 <= w < NARROW."""
    w2 = w * w
    high = (4.1666667e-2 - 8.3333333e-3 * w) + (1.3888889e-3 - 1.9841270e-4 * w) * w2
    return (1.0 - 0.5 * w) + (0.16666667 - w * high) * w2


@triton.jit
def level_mass(x, mean, log_scale, definition, EXACT: tl.constexpr, GRADIENT: tl.constexpr):
    """log p = exponent + log(ratio), ratio in [2e-2, 1]; and the derivatives of log p by x - mean and by
    the log-scale, if GRADIENT.

    ``definition``: half the distance of levels, the logarithm of the distance, the values at which the
    tails begin, and the lower bound of the log-scales. EXACT: whether a mass below LEAST is one too.
    """
    half, log_width, low, high, min_log_scale = definition
    s = tl.where(log_scale < min_log_scale, min_log_scale, log_scale)
    s = tl.where(s > FAR, FAR, s)
    inverse = exp_down(-s)
    signed_m = inverse * (x - mean)
    v = inverse * half
    below = signed_m < 0.0
    m = tl.abs(signed_m)
    m = tl.where(m > FAR, FAR, m)
    near = m - v
    far = m + v
    width = v + v
    outside = near >= 0.0  # the mean is not in the level
    e_near = exp_down(-tl.abs(near))
    e_width = exp_down(-width)
    narrow = width < NARROW
    mass = tl.where(narrow, _narrow_mass(width), 1.0 - e_width)

    # e^-far is e_near e_width outside and e_width / e_near inside: with n = 1 and e_near, e^-far = b / n and
    # c = n (1 + e^-far). Inside a wide level it counts for nothing.
    n = tl.where(outside, 1.0, e_near)
    b = tl.where(outside, e_near * e_width, tl.where(width > 40.0, 0.0, e_width))
    c = n + b
    one_near = 1.0 + e_near
    product = one_near * c
    of_all = reciprocal(product * mass)
    over = of_all * mass  # 1 / product
    exponent = tl.where(outside, -near, 0.0) + tl.where(narrow, log_width - s, 0.0)
    ratio = mass * (n * over)
    by_distance = m
    by_log_scale = m
    if GRADIENT:
        slope_far = b * one_near * over  # sigmoid of -far and of near
        slope_near = n * c * over
        by = inverse * (slope_far - slope_near)
        by_distance = tl.where(below, -by, by)
        by_width = e_width * tl.where(narrow, 1.0, width) * (of_all * product)
        by_log_scale = near * slope_near - far * slope_far - by_width
    if not EXACT:
        p = tl.where(outside, e_near, 1.0) * tl.where(narrow, width, 1.0) * ratio
        unlikely = p <= LEAST
        e = exp_down(-m)
        over_one = reciprocal(1.0 + e)
        exponent = tl.where(unlikely, log_width - s - m, exponent)
        ratio = tl.where(unlikely, over_one * over_one, ratio)
        if GRADIENT:
            bend = (1.0 - e) * over_one
            by = inverse * bend
            by_distance = tl.where(unlikely, tl.where(below, by, -by), by_distance)
            by_log_scale = tl.where(unlikely, m * bend - 1.0, by_log_scale)

    # The tails: sigmoid(side m + v), and 1 / (1 + e^-|outer|), |outer| being far or near.
    first = x <= low
    tail = first | (x >= high)
    side = tl.where(first == below, -m, m)
    outer = side + v
    beyond = side >= 0.0
    over_tail = tl.where(beyond, n * one_near, c) * over
    exponent = tl.where(tail, tl.where(outer < 0.0, outer, 0.0), exponent)
    ratio = tl.where(tail, over_tail, ratio)
    if GRADIENT:
        e_outer = tl.where(outer >= 0.0, e_near, 1.0) * over_tail
        slope = tl.where(beyond, b * one_near * over, e_outer)
        by = inverse * slope
        by_distance = tl.where(tail, tl.where(first, by, -by), by_distance)
        by_log_scale = tl.where(tail, -outer * slope, by_log_scale)
        by_log_scale = tl.where(log_scale < min_log_scale, 0.0, by_log_scale)
    exponent = exponent + m * 0.0  # NaN, which the logarithm of the ratio does not tell
    return exponent, ratio, by_distance, by_log_scale


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def inner_uniform(u):
    """Within [1e-5, 1 - 1e-5], which public code draws from."""
    return clamp(u, 1e-5, 1.0 - 1e-5)


@triton.jit
def logistic_value(mean, log_scale, uniform, min_log_scale, heat):
    """A logistic number within [-1, 1]; ``heat`` multiplies the scale. ``csrc/common/logistic.h``'s bits."""
    u = inner_uniform(uniform)
    s = tl.where(log_scale < min_log_scale, min_log_scale, log_scale)
    return clamp(mean + exp(s) * heat * (log_normal(u) - log_normal(1.0 - u)), -1.0, 1.0)
