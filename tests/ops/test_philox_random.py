"""genperf.ops.philox_random and draw_key: known answers, the same bits everywhere, and statistics."""

from __future__ import annotations

import torch
from genperf_testing.cases import Case

from genperf.ops import philox_random

DISTRIBUTIONS = ("normal", "uniform", "bits")
KEY = torch.tensor([0x1234_5678_9ABC, -7])


def _keys(shape):
    return torch.stack([KEY + i for i in range(shape[0])]) if shape[0] else KEY.new_empty(0, 2)


def _case(distribution, keys):
    return Case(
        f"{distribution}, keys" if keys else distribution,
        lambda like, key: [philox_random(like.shape, key, distribution)],
        constants=lambda shape: [torch.zeros(shape), _keys(shape) if keys else KEY],
        per_sample=keys,
    )


CASES = tuple(_case(distribution, keys) for distribution in DISTRIBUTIONS for keys in (False, True))
