"""Small functions of vectors and codewords."""

from __future__ import annotations

import torch
from torch import Tensor

from genperf.ops.soft_assignment import soft_assignment


def gathered(embed: Tensor, indices: Tensor, dim: int) -> Tensor:
    """Codewords of embed [K, D] or [heads, K, D], with D along dimension ``dim``; 0 for an index of -1."""
    there, indices = (indices >= 0)[..., None], indices.clamp(min=0)
    if embed.dim() == 2:
        codes = embed[indices]
    else:
        heads = torch.arange(len(embed), device=indices.device).view(-1, *[1] * (indices.dim() - 1))
        codes = embed[heads, indices]
    return torch.where(there, codes, 0.0).movedim(-1, dim)


def cross_entropy(
    x: Tensor, embed: Tensor, targets: Tensor, mask: Tensor | None, dim: int, cosine: bool
) -> Tensor:
    """That of the targets, the mean over those of at least 0, under the softmax of negative distances.

    As vector-quantize-pytorch defines it; of cosines, where the vectors are of length 1.

    Args:
        x: [*, D] or [heads, *, D], with D along ``dim``.
        embed: [K, D] or [heads, K, D].
        targets: integers, the shape of x without ``dim``.
        mask: bool, likewise, or None.
    """
    targets = targets.long() if mask is None else torch.where(mask, targets, -1)
    metric = "dot" if cosine else "euclidean"
    assignment = soft_assignment(x, embed, metric, dim=dim, targets=targets, mean_prob=False)
    assert assignment.nll is not None
    return assignment.nll.sum() / (targets >= 0).sum().clamp(min=1)
