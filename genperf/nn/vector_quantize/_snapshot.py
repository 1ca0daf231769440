"""Codewords as they are before an update, for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("genperf::snapshots", mutates_args=())
def _snapshots(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


_snapshots.register_fake(lambda tensors: [torch.empty_like(tensor) for tensor in tensors])
_snapshots.register_autograd(lambda ctx, grads: grads)


def snapshots(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, differentiable, which a compiler leaves alone.

    Inductor keeps a tensor in place of its ``clone()`` for the backward pass, where that reads what the
    update has written into it since.
    """
    return _snapshots(tensors) if torch.compiler.is_compiling() else [tensor.clone() for tensor in tensors]
