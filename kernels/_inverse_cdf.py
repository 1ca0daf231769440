"""A class drawn by inverting the cumulative distribution: ``genperf/ops/_inverse_cdf.py``, the same bits.

Blocks are [R, N]: R rows of N leaves of a tree, a power of two and at least 16.
"""

import triton
import triton.language as tl

from ._math import exp, log_normal


@triton.jit
def sum_neighbours(b_x):
    """Sums of 16 neighbours, or of all where there are fewer: j + 8 to j, then j + 4, j + 2 and j + 1."""
    R: tl.constexpr = b_x.shape[0]
    N: tl.constexpr = b_x.shape[1]
    NODES: tl.constexpr = max(1, N // 16)
    # A sum of two is the same in either order.
    if N >= 16:
        b_x = tl.sum(tl.reshape(b_x, [R, NODES, 2, 8]), axis=2)
    if N >= 8:
        b_x = tl.sum(tl.reshape(b_x, [R, NODES, 2, 4]), axis=2)
    if N >= 4:
        b_x = tl.sum(tl.reshape(b_x, [R, NODES, 2, 2]), axis=2)
    if N >= 2:
        b_x = tl.sum(tl.reshape(b_x, [R, NODES, 2]), axis=2)
    return tl.reshape(b_x, [R, NODES])


@triton.jit
def root(b_x):
    """The sum of each row: [R]."""
    for _ in tl.static_range(4):  # 16^4 leaves
        b_x = sum_neighbours(b_x)
    return tl.reshape(b_x, [b_x.shape[0]])


@triton.constexpr_function
def nodes_of(n_leaves, levels=3):
    """Sums in that many levels above the leaves."""
    return sum(n_leaves // 16**level for level in range(1, levels + 1))


@triton.jit
def store_tree(p_nodes, b_x):
    """Stores the sums above the leaves, at p_nodes [R] and after it, and returns the root: [R].

    What is stored is seen by all threads of the program.
    """
    N: tl.constexpr = b_x.shape[1]
    b_1 = sum_neighbours(b_x)
    store_level(p_nodes, b_1)
    if N > 256:
        b_2 = sum_neighbours(b_1)
        store_level(p_nodes + nodes_of(N, 1), b_2)
        if N > 4096:
            store_level(p_nodes + nodes_of(N, 2), sum_neighbours(b_2))
    tl.debug_barrier()
    return root(b_1)


@triton.jit
def store_level(p, b_level):
    tl.store(p[:, None] + tl.arange(0, b_level.shape[1])[None, :], b_level)


@triton.jit
def first_child(target, before):
    """The state of a walk over the children of a node, given the running sum in front of them."""
    return tl.zeros_like(target).to(tl.int32), before, before, target < float("-inf")


@triton.jit
def next_child(state, j, value, target):
    """The first positive child at which the running sum reaches the target, or the last positive one.

    Of the children of one node, one after another; the running sum is in float64.
    """
    child, before, running, found = state
    here = (value > 0.0) & (found == 0)
    child = tl.where(here, j, child)
    before = tl.where(here, running, before)
    running = running + value.to(tl.float64)
    return child, before, running, found | (here & (running >= target))


@triton.jit
def descend_level(p, WIDTH: tl.constexpr, node, target, before):
    """From a node of each row to one of its children, which lie at p + 16 node."""
    state = first_child(target, before)
    for j in range(min(WIDTH, 16)):
        state = next_child(state, j, tl.load(p + node * 16 + j), target)
    return node * 16 + state[0], state[1]


@triton.jit
def descend(p_nodes, N: tl.constexpr, target, before):
    """Which 16 leaves hold the one at which the running sum reaches the target: [R], and the sum before them.

    ``before`` is the running sum in front of all N leaves.
    """
    node = tl.zeros_like(target).to(tl.int64)
    if N > 4096:
        node, before = descend_level(p_nodes + nodes_of(N, 2), N // 4096, node, target, before)
    if N > 256:
        node, before = descend_level(p_nodes + nodes_of(N, 1), N // 256, node, target, before)
    return descend_level(p_nodes, N // 16, node, target, before)


@triton.jit
def scaled(x, largest, temperature, DIVIDED: tl.constexpr):
    """(x - largest) / temperature; `DIVIDED` is false where the temperature is 1."""
    x = x - largest
    if DIVIDED:
        x = tl.div_rn(x, temperature + tl.zeros_like(x))
    return x


@triton.jit
def _float_of(order):
    """The float32 whose place among all is `order`, int64."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _order_of(x):
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def kept(x, i, least, end):
    """Which classes a limit keeps: of larger logits than the least, and of equal ones before the end."""
    return (x > least) | ((x == least) & (i < end))


@triton.jit
def _enough(b_x, b_w, least, end, wanted, SHARE: tl.constexpr):
    """Whether a limit keeps `wanted` classes, or, by their weights, that share of the sum: [R]."""
    m = kept(b_x, tl.arange(0, b_x.shape[1])[None, :], least[:, None], end[:, None])
    if SHARE:
        return root(tl.where(m, b_w, 0.0)).to(tl.float64) >= wanted
    return tl.sum(m.to(tl.int32), axis=1) >= wanted


@triton.jit
def _limit(b_x, b_w, largest, wanted, SHARE: tl.constexpr):
    """The strictest limit that keeps enough: bisection over all floats, then over indices of equal ones."""
    N: tl.constexpr = b_x.shape[1]
    low = _order_of(tl.full(largest.shape, float("-inf"), tl.float32))
    high = tl.maximum(_order_of(largest), low)
    first = tl.full(largest.shape, 1, tl.int32)
    last = tl.full(largest.shape, N, tl.int32)
    for step in range(32 + 15):
        middle = tl.where(step < 32, low + ((high - low + 1) >> 1), low)
        end = tl.where(step < 32, N, (first + last) >> 1)
        enough = _enough(b_x, b_w, _float_of(middle), end, wanted, SHARE)
        low = tl.where(enough, middle, low)
        high = tl.where(enough | (step >= 32), high, middle - 1)
        first = tl.where(enough | (step < 32), first, tl.minimum(end + 1, last))
        last = tl.where(enough, end, last)
    return _float_of(low), last


@triton.jit
def weigh(
    b_x, temperature, top_k, top_p, DIVIDED: tl.constexpr, LIMITED_K: tl.constexpr, LIMITED_P: tl.constexpr
):
    """Of logits with -inf past their end: the largest, the limit on those that are kept, and the weights.

    The sum of the weights is at least 1, or the row has nothing to choose from.
    """
    largest = tl.max(b_x, axis=1)  # [R]
    b_w = exp(scaled(b_x, largest[:, None], temperature, DIVIDED))  # [R, N]
    least = tl.full(largest.shape, float("-inf"), tl.float32)
    end = tl.full(largest.shape, b_x.shape[1], tl.int32)
    if LIMITED_K:
        least, end = _limit(b_x, b_w, largest, top_k, False)
        b_w = _limited(b_x, b_w, least, end)
    if LIMITED_P:
        share = (top_p + tl.zeros_like(largest)).to(tl.float64)
        least, end = _limit(b_x, b_w, largest, share * root(b_w).to(tl.float64), True)
        b_w = _limited(b_x, b_w, least, end)
    return largest, least, end, b_w


@triton.jit
def _limited(b_x, b_w, least, end):
    m = kept(b_x, tl.arange(0, b_x.shape[1])[None, :], least[:, None], end[:, None])
    return tl.where(m | (b_w != b_w), b_w, 0.0)


@triton.jit
def nats(scaled_logit, total):
    """The log-probability of a class; NaN where there is nothing to choose from."""
    return tl.where(total >= 1.0, scaled_logit - log_normal(total), float("nan"))
