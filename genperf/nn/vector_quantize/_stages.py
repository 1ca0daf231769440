"""All stages of a residual quantizer, and all groups, by one operator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from genperf.nn.vector_quantize._sampling import take_valid
from genperf.nn.vector_quantize._snapshot import snapshots
from genperf.nn.vector_quantize.codebook import Codebook, Statistics
from genperf.nn.vector_quantize.vector_quantize import VectorQuantize
from genperf.ops.residual_codebook_statistics import residual_codebook_statistics
from genperf.ops.residual_vector_quantize import residual_vector_quantize

Observed = list[tuple[Codebook, Statistics]]


def covers(layer: VectorQuantize) -> bool:
    """Whether stages such as this one can be run at once: without lengths to divide by between them, and with
    codewords that neither learn from the loss nor have yet to be found by k-means."""
    book = layer._codebook
    return not (layer.use_cosine_sim or layer.learnable_codebook or book.awaits_kmeans())


def quantize_at_once(
    groups: Sequence[Sequence[VectorQuantize]],
    x: Tensor,
    mask: Tensor | None,
    frozen: bool,
    dim: int,
    cutoff: Tensor | None,
    residual_gradient: float,
) -> tuple[Tensor, Tensor, Tensor, Observed]:
    """Residual quantization by stages that :func:`covers` all.

    Args:
        groups: the stages of each group.
        x: [groups, B, *], with the vectors along dimension ``dim`` > 0.
        mask: bool [B, *], or None.
        cutoff: int64 [], the last stage that takes part, or None for all.
        residual_gradient: see :func:`residual_vector_quantize`.

    Returns:
        ``quantized``, of the shape of x; ``indices`` [groups, B, *, Q]; ``losses`` [groups, Q]; and what was
        observed.
    """
    layer = groups[0][0]
    book = layer._codebook
    training, n_stages = layer.training, len(groups[0])
    updates = training and not frozen and (book.ema_update or book.replaces)
    routed = training and layer.route_gradients_to_input
    books = [[one._codebook.embed[0].detach().to(x.dtype) for one in stages] for stages in groups]
    if updates and torch.is_grad_enabled() and x.requires_grad:
        books = [snapshots(stages) for stages in books]  # the backward pass reads them, after the update
    quantized, indices, losses = residual_vector_quantize(
        x if training else x.detach(),
        books,
        dim=dim,
        n_stages=None if cutoff is None else (cutoff + 1).expand(x.shape[1]),
        mask=mask,
        estimator="rotation" if layer.rotation_trick else "straight_through",
        residual_gradient=residual_gradient,
        commitment_weight=layer.commitment_weight if training else 0.0,
    )
    if not updates:
        return quantized if routed else quantized.detach(), indices, losses, []
    with torch.no_grad():
        valid = book.valid(x, None if mask is None else mask.expand(len(x), *mask.shape), dim)
        counted = torch.where(valid[..., None], indices, -1)
        counts, sums = residual_codebook_statistics(x, books, counted, dim=dim)
        observed = []
        for g, stages in enumerate(groups):
            for i, one in enumerate(stages):
                take = partial(
                    _residuals, x[g : g + 1], indices[g : g + 1], valid[g : g + 1], books[g][:i], dim
                )
                shared = one._codebook is stages[i - 1]._codebook
                part = (i, n_stages) if shared and n_stages > 1 else (0, 1)
                there = valid[g : g + 1] if cutoff is None else valid[g : g + 1] & (cutoff >= i)
                statistics = one._codebook.with_rows(counts[g][i][None], sums[g][i][None], there, part, take)
                observed.append((one._codebook, statistics))
    return quantized if routed else quantized.detach(), indices, losses, observed


def _residuals(
    x: Tensor, indices: Tensor, valid: Tensor, earlier: Sequence[Tensor], dim: int, position: Tensor
) -> Tensor:
    """What the earlier stages' codebooks left of the vectors at these positions among the valid ones.

    Of one group: x [1, *], indices [1, *, Q], valid [1, *], position [1, K].
    """
    rows = take_valid(x, valid, position, dim)
    chosen = take_valid(indices, valid, position, -1).clamp(min=0)
    for i, codebook in enumerate(earlier):
        rows = rows - codebook[chosen[..., i]]
    return rows
