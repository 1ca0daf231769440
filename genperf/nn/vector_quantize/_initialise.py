"""K-means on the first batch, as an operator, since whether it is due is read on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genperf.nn.vector_quantize import _ranks
from genperf.nn.vector_quantize._kmeans import kmeans

if TYPE_CHECKING:
    from genperf.nn.vector_quantize.codebook import Codebook


def _run(
    initted: Tensor, cluster_size: Tensor, embed_avg: Tensor, embed: Tensor, x: Tensor, valid: Tensor,
    dim: int, iterations: int, cosine: bool, zero_debias: bool, seed: int | None, sync: bool,
    group: str | None, token: str,
) -> None:  # fmt: skip
    known = _ranks.find(token)
    if known.initialised:
        return
    if not bool(initted):
        found = kmeans(
            x, valid, embed.shape[1], dim=dim, iterations=iterations, cosine=cosine, seed=seed, sync=sync,
            group=group,
        )  # fmt: skip
        if found is None:
            return
        means, counts = found
        embed.copy_(means)
        if zero_debias:
            cluster_size.zero_()
            embed_avg.zero_()
        else:  # one that is nearest to none starts as if chosen once, instead of moving to the origin
            cluster_size.copy_(counts.clamp(min=1))
            embed_avg.copy_(means * counts.clamp(min=1)[..., None])
        initted.fill_(True)
    known.initialised = True


_op = torch.library.custom_op(
    "genperf::initialise_codebook", _run, mutates_args=("initted", "cluster_size", "embed_avg", "embed")
)
_op.register_fake(lambda *_: None)


def initialise(codebook: Codebook, x: Tensor, valid: Tensor, dim: int) -> None:
    """Set the codewords and their averages by k-means, unless that has been done.

    Where the batch is empty, it stays to be done. See :func:`kmeans` for the arguments.
    """
    run = _op if torch.compiler.is_compiling() else _run
    run(
        codebook.initted, codebook.cluster_size, codebook.embed_avg, codebook.embed, x, valid,
        dim, codebook.kmeans_iters, codebook.use_cosine_sim, codebook.zero_debias, codebook.seed,
        codebook.synchronised, codebook.group, codebook.token.name,
    )  # fmt: skip
