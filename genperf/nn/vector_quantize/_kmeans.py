"""The first codewords by k-means (S. Lloyd, "Least squares quantization in PCM", 1982) on the first batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.nn.vector_quantize import _ranks
from genperf.nn.vector_quantize._sampling import draw_positions, take_valid
from genperf.ops.codebook_statistics import codebook_statistics
from genperf.ops.philox_random import draw_key
from genperf.ops.vq_nearest import vq_nearest


def kmeans(
    x: Tensor, valid: Tensor, n_codewords: int, *, dim: int = -1, iterations: int = 10, cosine: bool = False,
    seed: int | None = None, sync: bool = False, group: str | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Codewords [heads, K, D] and the number of vectors nearest to each, [heads, K].

    The codewords start as random vectors, no vector twice if there are K; one that is nearest to no vector
    stays where it was. No matrix of N x K is made. Reads sizes on the host.

    Args:
        x: [heads, *], with the vectors along dimension ``dim``, not that of the heads.
        valid: bool [heads, *]: which vectors count.
        cosine: whether codewords have length 1, and the nearest has the largest inner product.
        seed: of the random choice; None to draw one from torch's default generator.
        sync: whether to take the vectors of all processes of ``group`` together, in the order of ranks, with
            rank 0's random numbers, so that all get the same codewords.

    Returns:
        None where a head has no valid vector.

    Raises:
        ValueError: where processes differ in K, D or the number of heads.
    """
    heads = x.shape[0]
    key = draw_key(x.device) if seed is None else torch.tensor([seed, 0], device=x.device)
    n_valid = valid.flatten(1).sum(1, keepdim=True)  # [heads, 1]
    start, total = torch.zeros_like(n_valid), n_valid
    sync = sync and _ranks.world_size(group) > 1
    if sync:
        properties = {"the number of codewords": n_codewords, "D": x.shape[dim], "the number of heads": heads}
        _ranks.check_agreement(properties, x.device, group, "k-means")
        everyone = _ranks.gather([*key.tolist(), *n_valid.flatten().tolist()], x.device, group)
        key = torch.tensor(everyone[0][:2], device=x.device)
        sizes = torch.tensor(everyone, device=x.device)[:, 2:, None]  # [world, heads, 1]
        start, total = sizes[: _ranks.rank(group)].sum(0), sizes.sum(0)
    if not total.all():
        return None
    every = torch.arange(n_codewords, device=x.device).expand(heads, -1)
    position, _ = draw_positions(total, every, torch.full_like(total, n_codewords), key)
    own = (position >= start) & (position < start + n_valid)
    means = x.new_zeros(heads, n_codewords, x.shape[dim])
    if x.numel():
        means = torch.where(own[..., None], take_valid(x, valid, position - start, dim), means)
    if sync:
        (means,) = _ranks.all_reduce([means], group)
    counts = means.new_zeros(heads, n_codewords)
    for _ in range(iterations):
        indices = vq_nearest(x, means, "dot" if cosine else "l2", dim=dim).indices
        statistics = codebook_statistics(x, indices, n_codewords, dim=dim, mask=valid, heads=True)
        counts, sums = statistics.counts, statistics.sums
        if sync:
            counts, sums = _ranks.all_reduce([counts, sums], group)
        new = sums / counts.clamp(min=1)[..., None]
        if cosine:
            new = F.normalize(new, dim=-1, eps=1e-6)
        means = torch.where(counts[..., None] > 0, new.to(means), means)
    return means, counts
