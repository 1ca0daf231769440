"""The images of this process, and the key that all processes share."""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed

from genperf.ops.philox_random import draw_key


def process() -> tuple[int, int]:
    """Rank of this process and number of processes, of torch.distributed or as torchrun tells.

    Raises:
        RuntimeError: if neither knows.
    """
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise RuntimeError(
            "sample: distributed is True, expected torch.distributed to be initialised or the environment "
            "variables RANK and WORLD_SIZE of torchrun"
        ) from None


def share(batch: int, rank: int, world: int) -> range:
    """The images that a process draws: neighbours, and for each process as many as for the next, or one more
    or less."""
    return range(batch * rank // world, batch * (rank + 1) // world)


def common_key(seed: int | None, generator: torch.Generator | None, world: int) -> Tensor:
    """The key int64 [2] of a batch, the same in all of ``world`` processes."""
    if seed is not None:
        return torch.tensor([(seed + (1 << 63)) % (1 << 64) - (1 << 63), 0])
    if world == 1:
        return draw_key("cpu", generator)
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"sample: seed is None, expected a number that is the same in all {world} processes, or an "
            "initialised torch.distributed to share one"
        )
    words = [draw_key("cpu", generator).tolist()]
    distributed.broadcast_object_list(words, src=0)
    return torch.tensor(words[0])
