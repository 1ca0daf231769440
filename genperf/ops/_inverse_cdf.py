"""A class drawn from logits by the inverse of their cumulative distribution, in torch: the specification.

``csrc/pixel_sampler/head.h`` is the same arithmetic in C++ and float32, with the same decisions but for the
rounding of the exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 16  # classes that are summed together, and sums that are summed together in turn


def choose(logits: Tensor, u: Tensor, temperature: float, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """The class of logits [B, K] at which the running sum of weights reaches ``u`` times their sum.

    Weights are ``exp((logit - max) / temperature)``. They are the leaves of a tree: 16 neighbours are
    summed, j + 8 to j, then j + 4 to j, j + 2 and j + 1; then 16 neighbouring sums, and so on. From the
    root down, the running sum goes in float64 over the 16 children one by one, starting from that of all
    before the parent, to the first at which it reaches ``u * sum``; where rounding lets it reach that at
    none, to the last positive one.

    Returns the class, and whether there was anything to choose from (else the class is 0).
    """
    weights = ((logits - logits.amax(1, keepdim=True)) / temperature).exp()
    if 0 < top_k < logits.shape[1]:
        weights = weights.masked_fill(excluded(logits, top_k), 0.0)
    levels = [_padded(weights)]
    while levels[-1].shape[1] > LEAF:
        levels.append(_padded(_sum_neighbours(levels[-1])))
    total = _sum_neighbours(levels[-1])
    valid = total[:, 0] >= 1.0  # the largest logit's weight is 1; the sum of NaN is NaN
    target = u.double()[:, None] * total.double()
    chosen, before = torch.zeros_like(target, dtype=torch.int64), torch.zeros_like(target)
    position = torch.arange(LEAF, device=u.device)
    for level in reversed(levels):
        children = level.gather(1, chosen * LEAF + position)
        running = torch.cat([before, children], 1).cumsum(1)
        short = (running[:, 1:] < target).sum(1, keepdim=True)
        child = short.minimum(((children > 0) * position).amax(1, keepdim=True))
        before = running.gather(1, child)
        chosen = chosen * LEAF + child
    return torch.where(valid, chosen[:, 0], 0), valid


def excluded(logits: Tensor, top_k: int) -> Tensor:
    """Which of logits [B, K] are not among the ``top_k`` largest, of equal ones the first. NaN is kept."""
    least = logits.topk(top_k, 1).values[:, -1:]
    ties = logits == least
    room = top_k - (logits > least).sum(1, keepdim=True)
    return (logits < least) | (ties & (ties.cumsum(1) > room))


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % LEAF))


def _sum_neighbours(x: Tensor) -> Tensor:
    x = x.view(len(x), x.shape[1] // LEAF, LEAF)
    while (half := x.shape[2] // 2) > 0:
        x = x[:, :, :half] + x[:, :, half:]
    return x[:, :, 0]
