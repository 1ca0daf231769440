"""A class drawn from logits by the inverse of their cumulative distribution, in torch: the specification.

``csrc/common/inverse_cdf.h`` is the same arithmetic in C++ and float32: with ``exp=exp_float32`` to the same
bits, with torch's own exponential to the same decisions but for its rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LEAF = 16  # classes that are summed together, and sums that are summed together in turn

Exponential = Callable[[Tensor], Tensor]


class Weights(NamedTuple):
    """Of logits [B, K].

    Attributes:
        scaled: ``(logit - max) / temperature``, [B, K].
        values: their exponentials, 0 for classes that are left out, [B, K].
        excluded: classes that top-k or top-p leaves out, bool [B, K], or None where neither does.
        levels: the tree of their sums, leaves first.
        total: the root of it, [B, 1].
    """

    scaled: Tensor
    values: Tensor
    excluded: Tensor | None
    levels: list[Tensor]
    total: Tensor

    @property
    def valid(self) -> Tensor:
        """Which rows have something to choose from: the largest weight is 1, and the sum of NaN is NaN."""
        return self.total[:, 0] >= 1.0


def weigh(
    logits: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    exp: Exponential = torch.exp,
) -> Weights:
    """Weights ``exp((logit - max) / temperature)``, of all classes or of those that are kept.

    They are the leaves of a tree: 16 neighbours are summed, j + 8 to j, then j + 4 to j, j + 2 and j + 1;
    then 16 neighbouring sums, and so on. Classes are kept in order of their logits, of equal ones the first:
    at most ``top_k`` (0: all), and of these the fewest whose sum reaches ``top_p`` times that of all these.
    """
    largest = logits.detach().amax(1, keepdim=True)
    # A tensor: by a number, CUDA multiplies with its reciprocal.
    scaled = (logits - largest) / torch.full_like(largest, temperature)
    values, left_out = exp(scaled), None
    if 0 < top_k < logits.shape[1]:
        left_out = excluded(logits, top_k)
        values = values.masked_fill(left_out, 0.0)
    if top_p < 1.0:
        beyond = _beyond(logits, values.detach(), top_p)
        left_out = beyond if left_out is None else left_out | beyond
        values = values.masked_fill(beyond, 0.0)
    levels, total = _tree(values)
    return Weights(scaled, values, left_out, levels, total)


def choose(
    logits: Tensor,
    u: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    exp: Exponential = torch.exp,
) -> tuple[Tensor, Tensor]:
    """The class of logits [B, K] at which the running sum of weights reaches ``u`` times their sum.

    From the root of the tree of :func:`weigh` down, the running sum goes in float64 over the 16 children one
    by one, starting from that of all before the parent, to the first positive one at which it reaches
    ``u * sum``; where rounding lets it reach that at none, to the last positive one.

    Returns the class, and whether there was anything to choose from (else the class is 0).
    """
    return descend(weigh(logits, temperature, top_k, top_p, exp), u)


def descend(weights: Weights, u: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`choose`, given the weights."""
    target = u.double()[:, None] * weights.total.double()
    chosen, before = torch.zeros_like(target, dtype=torch.int64), torch.zeros_like(target)
    position = torch.arange(LEAF, device=u.device)
    for level in reversed(weights.levels):
        children = level.gather(1, chosen * LEAF + position)
        running = torch.cat([before, children], 1).cumsum(1)
        positive = children > 0
        reached = torch.where(positive & (running[:, 1:] >= target), position, LEAF).amin(1, keepdim=True)
        last = (positive * position).amax(1, keepdim=True)
        child = torch.where(reached < LEAF, reached, last)
        before = running.gather(1, child)
        chosen = chosen * LEAF + child
    return torch.where(weights.valid, chosen[:, 0], 0), weights.valid


def excluded(logits: Tensor, top_k: int) -> Tensor:
    """Which of logits [B, K] are not among the ``top_k`` largest, of equal ones the first. NaN is kept."""
    least = logits.topk(top_k, 1).values[:, -1:]
    ties = logits == least
    room = top_k - (logits > least).sum(1, keepdim=True)
    return (logits < least) | (ties & (ties.cumsum(1) > room))


def exp_float32(x: Tensor) -> Tensor:
    """e^x of float32 to the bits of ``exp`` in ``csrc/common/math.h``; of float64 torch's."""
    if x.dtype == torch.float64:
        return x.exp()
    c = x.clamp(-104.0, 89.0)
    shifted = c * 1.44269504088896341 + 12582912.0  # adding 3 * 2^22 rounds to an integer
    n = shifted - 12582912.0
    r = c - n * 0.693359375
    r = r - n * -2.12194440e-4
    r2 = r * r
    y = (5.0000001201e-1 + 1.6666665459e-1 * r) + (4.1665795894e-2 + 8.3334519073e-3 * r) * r2
    y = y + (1.3981999507e-3 + 1.9875691500e-4 * r) * (r2 * r2)
    y = y * r2 + r + 1.0
    # 2^n in two factors, since n reaches 128 and -150.
    k = shifted.view(torch.int32) - 0x4B400000
    half = k >> 1
    return y * (half + 127 << 23).view(torch.float32) * (k - half + 127 << 23).view(torch.float32)


def _beyond(logits: Tensor, values: Tensor, top_p: float) -> Tensor:
    """Which classes are not among the fewest, by logit and index, whose sum reaches top_p of all.

    Sums never fall as classes are added, also when rounded, so that their number is found by bisection.
    """
    n = logits.shape[1]
    order = logits.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=order.device).expand_as(order))
    total = _tree(values)[1]
    wanted = torch.full_like(total, top_p).double() * total.double()
    low, high = torch.ones_like(order[:, :1]), torch.full_like(order[:, :1], n)
    for _ in range(n.bit_length()):
        middle = (low + high) // 2
        enough = _tree(values.masked_fill(rank >= middle, 0.0))[1].double() >= wanted
        low = torch.where(enough, low, (middle + 1).minimum(high))
        high = torch.where(enough, middle, high)
    return rank >= high


def _tree(values: Tensor) -> tuple[list[Tensor], Tensor]:
    levels = [_padded(values)]
    while levels[-1].shape[1] > LEAF:
        levels.append(_padded(_sum_neighbours(levels[-1])))
    return levels, _sum_neighbours(levels[-1])


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % LEAF))


def _sum_neighbours(x: Tensor) -> Tensor:
    x = x.view(len(x), x.shape[1] // LEAF, LEAF)
    while (half := x.shape[2] // 2) > 0:
        x = x[:, :, :half] + x[:, :, half:]
    return x[:, :, 0]
