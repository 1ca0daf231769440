"""A class of each position drawn from its logits by a uniform: ``genperf/ops/_inverse_cdf.py``, and the bits
of ``csrc/pixel_sampler/head.h``.

Weights are the leaves of a tree whose nodes have 16 children. A thread walks over the tree of a position, and
computes the weights again wherever it needs them.
"""

# ruff: noqa: RUF005 - Triton does not take (*a, b)

import triton
import triton.language as tl

from ._math import exp


@triton.jit
def _weight(p_logits, s_class, i_k, classes, m, b_largest, b_temperature):
    """Of classes i_k; 0 beyond the last."""
    m_k = i_k < classes
    b_l = tl.load(p_logits + i_k * s_class, mask=m & m_k, other=0.0).to(tl.float32)
    return tl.where(m_k, exp(tl.div_rn(b_l - b_largest, b_temperature)), 0.0)


@triton.jit
def _sum_of_16(p_logits, s_class, i_k, classes, m, b_largest, b_temperature, LEAVES: tl.constexpr):
    """The weights of the first LEAVES of the 16 classes from i_k on: j + 8 to j, then j + 4, j + 2, j + 1."""
    b_sums = ()
    for j in tl.static_range(8):
        b_sum = tl.zeros(m.shape, tl.float32)
        if j < LEAVES:
            b_sum = _weight(p_logits, s_class, i_k + j, classes, m, b_largest, b_temperature)
        if j + 8 < LEAVES:
            b_sum = b_sum + _weight(p_logits, s_class, i_k + j + 8, classes, m, b_largest, b_temperature)
        b_sums = b_sums + (b_sum,)
    b_even = (b_sums[0] + b_sums[4]) + (b_sums[2] + b_sums[6])
    return b_even + ((b_sums[1] + b_sums[5]) + (b_sums[3] + b_sums[7]))


@triton.jit
def _sum_of_tree(
    p_logits, s_class, i_k, classes, m, b_largest, b_temperature,
    LEVELS: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """The weights of the 16^LEVELS classes from i_k on.

    Nodes of 16 leaves are visited in an order in which the next one always belongs to the sum that waits
    last: each digit of their number to the base 16 has its bits reversed.
    """
    if LEVELS == 0:
        return _weight(p_logits, s_class, i_k, classes, m, b_largest, b_temperature)
    elif LEVELS == 1:
        return _sum_of_16(p_logits, s_class, i_k, classes, m, b_largest, b_temperature, LEAVES)
    else:
        DEPTH: tl.constexpr = 4 * (LEVELS - 1)
        b_total = tl.zeros(m.shape, tl.float32)
        waiting = ()
        for _ in tl.static_range(DEPTH):
            waiting = waiting + (b_total,)
        for i in range(1 << DEPTH):
            node = ((i & 0x111) << 3) | ((i & 0x222) << 1) | ((i & 0x444) >> 1) | ((i & 0x888) >> 3)
            b_total = tl.zeros(m.shape, tl.float32)
            if 16 * node < classes:
                i_node = i_k + 16 * node
                b_total = _sum_of_16(p_logits, s_class, i_node, classes, m, b_largest, b_temperature, LEAVES)
            updated = ()
            for b in tl.static_range(DEPTH):
                ends = i & ((2 << b) - 1)  # as many ones at the end of i as its sum completes others
                updated = updated + (tl.where(ends == (1 << b) - 1, b_total, waiting[b]),)
                b_total = tl.where(ends == (2 << b) - 1, waiting[b] + b_total, b_total)
            waiting = updated
        return b_total


@triton.jit
def _descend(
    p_logits, s_class, i_k, classes, m, b_largest, b_temperature, b_before, b_target, n_children,
    BELOW: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """From the node whose first class is i_k to its child, of BELOW levels, at which the running sum, from
    b_before on, reaches the target; or else to its last positive one. The child's first class, and the sum
    before it."""
    b_running = b_before
    b_after_short = b_before
    b_before_last = b_before
    i_short = tl.zeros(m.shape, tl.int64)  # children that fall short of the target
    i_last = tl.zeros(m.shape, tl.int64)
    for c in range(n_children):
        i_child = i_k + c * (1 << (4 * BELOW))
        b_sum = _sum_of_tree(p_logits, s_class, i_child, classes, m, b_largest, b_temperature, BELOW, LEAVES)
        b_next = b_running + b_sum.to(tl.float64)
        m_short = b_next < b_target
        m_some = b_sum > 0.0
        i_short = tl.where(m_short, c + 1, i_short)
        i_last = tl.where(m_some, c, i_last)
        b_after_short = tl.where(m_short, b_next, b_after_short)
        b_before_last = tl.where(m_some, b_running, b_before_last)
        b_running = b_next
    m_short = i_short < i_last
    i_k += tl.where(m_short, i_short, i_last) * (1 << (4 * BELOW))
    return i_k, tl.where(m_short, b_after_short, b_before_last)


@triton.jit
def choose(p_logits, s_class, classes, m, b_uniform, temperature, LEVELS: tl.constexpr, LEAVES: tl.constexpr):
    """The class of logits at ``p_logits + k * s_class``, int64, and whether there was anything to choose.

    LEVELS: of the tree, the least such that it has at least ``classes`` leaves; LEAVES: the smaller of
    ``classes`` and 16.
    """
    b_temperature = tl.full(m.shape, temperature, tl.float32)
    b_largest = tl.full(m.shape, float("-inf"), tl.float32)
    p = p_logits
    for _ in range(classes):
        b_l = tl.load(p, mask=m, other=0.0).to(tl.float32)
        b_largest = tl.where(b_l > b_largest, b_l, b_largest)
        p += s_class
    i_k = tl.zeros(m.shape, tl.int64)
    b_total = _sum_of_tree(p_logits, s_class, i_k, classes, m, b_largest, b_temperature, LEVELS, LEAVES)
    b_target = b_uniform.to(tl.float64) * b_total.to(tl.float64)
    b_before = tl.zeros(m.shape, tl.float64)
    for level in tl.static_range(LEVELS):
        i_k, b_before = _descend(
            p_logits, s_class, i_k, classes, m, b_largest, b_temperature, b_before, b_target,
            tl.cdiv(classes, 1 << (4 * (LEVELS - 1))) if level == 0 else 16, LEVELS - 1 - level, LEAVES,
        )  # fmt: skip
    return i_k, b_total >= 1.0  # the largest logit's weight is 1; the sum of NaN is NaN
