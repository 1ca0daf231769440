"""The state of a vector quantizer: codewords, their moving averages, and how a batch changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf.nn.vector_quantize import _ranks
from genperf.nn.vector_quantize._initialise import initialise
from genperf.nn.vector_quantize._sampling import draw_positions, take_valid
from genperf.ops.codebook_statistics import codebook_statistics
from genperf.ops.philox_random import draw_key


class Statistics(NamedTuple):
    """What a batch says about the codewords of one codebook. Sums over processes are taken of each.

    Attributes:
        counts: [heads, K], the number of vectors nearest to each.
        sums: [heads, K, D], their sum.
        rows: [heads, K, D], vectors to replace unused codewords by; 0 where there is none.
        found: [heads, K], 1 where there is one, else 0.
    """

    counts: Tensor
    sums: Tensor
    rows: Tensor | None
    found: Tensor | None

    def replaced(self, tensors: Iterator[Tensor]) -> Statistics:
        """Others in place of those that there are."""
        counts, sums = next(tensors), next(tensors)
        return Statistics(counts, sums, *(None if t is None else next(tensors) for t in self[2:]))


class Codebook(nn.Module):
    """Codebooks with exponential moving averages, for one quantizer or its heads.

    The buffers have the names and the meaning of vector-quantize-pytorch 1.32: ``initted`` [],
    ``cluster_size`` [heads, K], ``embed_avg`` [heads, K, D] and ``embed`` [heads, K, D], a parameter where it
    is learned. The options are those of :class:`genperf.nn.VectorQuantize`.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor
    step: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0,
        reset_cluster_size: float | None = None,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        learnable_codebook: bool = False,
        ema_update: bool = True,
        zero_debias: bool = False,
        sync_codebook: bool | None = None,
        process_group: Any = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.decay, self.eps = decay, eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.reset_cluster_size = (
            threshold_ema_dead_code if reset_cluster_size is None else reset_cluster_size
        )
        self.kmeans_init, self.kmeans_iters = kmeans_init, kmeans_iters
        self.use_cosine_sim = use_cosine_sim
        self.learnable_codebook, self.ema_update = learnable_codebook, ema_update
        self.zero_debias = zero_debias
        self.sync_codebook = sync_codebook
        self.group: str | None = None if process_group is None else process_group.group_name
        self.seed = seed
        self.token = _ranks.Token()
        shape = num_codebooks, codebook_size, dim
        embed = torch.zeros(shape) if kmeans_init else nn.init.kaiming_uniform_(torch.empty(shape))
        if use_cosine_sim:
            embed = F.normalize(embed, dim=-1, eps=1e-6)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        begin = torch.zeros if zero_debias else torch.ones
        self.register_buffer("cluster_size", begin(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", torch.zeros_like(embed) if zero_debias else embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=zero_debias)

    @property
    def metric(self) -> str:
        """That of :func:`genperf.ops.vq_nearest`, for vectors and codewords of length 1 with cosines."""
        return "dot" if self.use_cosine_sim else "l2"

    @property
    def replaces(self) -> bool:
        """Whether unused codewords are replaced."""
        return self.threshold_ema_dead_code > 0

    @property
    def synchronised(self) -> bool:
        """Whether the batch is that of all processes."""
        return self.sync_codebook is not False and _ranks.world_size(self.group) > 1

    def extra_repr(self) -> str:
        heads, size, dim = self.embed.shape
        return f"{size}, dim={dim}, num_codebooks={heads}, metric={self.metric}, decay={self.decay}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.token.initialised = False  # as far as is known

    def valid(self, x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
        """Which vectors count: those of the mask that have neither a NaN nor an infinity.

        Args:
            x: [heads, *], with the vectors along ``dim``.
            mask: bool, of the shape of x without ``dim``, or None.
        """
        finite = x.detach().sum(dim).isfinite()
        return finite if mask is None else finite & mask

    def awaits_kmeans(self) -> bool:
        """Whether k-means is due; in a compiled function, whether it may be."""
        if not self.kmeans_init or self.token.initialised:
            return False
        if not torch.compiler.is_compiling():
            self.token.initialised = bool(self.initted)
        return not self.token.initialised

    @torch.no_grad()
    def initialise(self, x: Tensor, valid: Tensor, dim: int) -> None:
        """K-means on the first batch with ``kmeans_init``, else nothing. Arguments as of :meth:`observe`."""
        if self.awaits_kmeans():
            initialise(self, x.detach(), valid, dim)

    @torch.no_grad()
    def observe(
        self,
        x: Tensor,
        indices: Tensor,
        valid: Tensor,
        dim: int,
        part: tuple[int, int] = (0, 1),
        offered: Tensor | None = None,
    ) -> Statistics:
        """The statistics of this process.

        Args:
            x: [heads, *], with the vectors along dimension ``dim`` > 0.
            indices: int64 [heads, *], the shape of x without ``dim``.
            valid: bool, likewise, of :meth:`valid`.
            part: (number, of how many) of the stages that share the codebook.
            offered: the vectors that may replace codewords, where not ``valid``.
        """
        x = x.detach()
        counts, sums = codebook_statistics(x, indices, self.codebook_size, dim=dim, mask=valid, heads=True)
        there = valid if offered is None else offered
        return self.with_rows(counts, sums, there, part, lambda position: take_valid(x, there, position, dim))

    def with_rows(
        self,
        counts: Tensor,
        sums: Tensor,
        valid: Tensor,
        part: tuple[int, int],
        take: Callable[[Tensor], Tensor],
    ) -> Statistics:
        """Statistics with the vectors that this process offers to replace unused codewords by.

        Args:
            take: from positions [heads, K] among the valid vectors to these, [heads, K, D].
        """
        if not self.replaces:
            return Statistics(counts, sums, None, None)
        if valid.numel() == 0:
            return Statistics(counts, sums, torch.zeros_like(sums), torch.zeros_like(counts))
        # What can fall below the threshold is known before the batches are counted, and to all processes,
        # which take turns at supplying it.
        size = self.cluster_size / self._debias() if self.zero_debias else self.cluster_size
        wanted = self.decay * size < self.threshold_ema_dead_code
        order = wanted.cumsum(1) - 1
        n_wanted = order[:, -1:] + 1
        number, parts = part
        if self.synchronised:
            number += parts * _ranks.rank(self.group)
            parts *= _ranks.world_size(self.group)
        wanted = wanted & ((order + self.step) % parts == number)
        n_valid = valid.flatten(1).sum(1, keepdim=True)
        position, alone = draw_positions(n_valid, order // parts, (n_wanted - 1) // parts + 1, self._key())
        found = wanted & alone
        rows = torch.where(found[..., None], take(position).to(sums), 0.0)
        return Statistics(counts, sums, rows, found.to(counts))

    def _key(self) -> Tensor:
        if self.seed is None:
            return draw_key(self.step.device)
        return torch.stack([torch.full_like(self.step, self.seed), self.step])

    def _debias(self) -> Tensor:
        """The share of a zero-started average that has been filled; 1 before the first step."""
        filled = 1 - self.decay ** self.step.double()
        return torch.where(self.step > 0, filled, 1.0).to(self.cluster_size.dtype)

    @torch.no_grad()
    def absorb(self, statistics: Sequence[Statistics], counted: Tensor | None = None) -> None:
        """Change averages and codewords by the statistics of all processes.

        Several at once are those of the stages that share the codebook, which the averages take one after
        another. Where no vector was counted, nothing changes. An unused codeword gets a vector of the batch,
        and its averages what they would be if it had been chosen ``reset_cluster_size`` times.

        Args:
            counted: bool [], whether there were vectors, where the counts do not tell.
        """
        wide = torch.promote_types(self.embed.dtype, torch.float32)
        size, average, embed = self.cluster_size.to(wide), self.embed_avg.to(wide), self.embed.to(wide)
        seen = torch.zeros_like(self.initted)
        for one in statistics:
            there = one.counts.sum() > 0 if counted is None else counted
            weight = torch.where(there, 1 - self.decay, 0.0).to(wide)
            size = size.lerp(one.counts.to(wide), weight)
            average = average.lerp(one.sums.to(wide), weight)
            self.step.add_(there)
            seen = seen | there
        filled = self._debias().to(wide) if self.zero_debias else 1.0
        true_size = size / filled
        if self.ema_update:
            embed = torch.where(seen, self._means(true_size, average / filled, embed), embed)
        if self.replaces:
            expired = (true_size < self.threshold_ema_dead_code) & seen
            for one in statistics:
                assert one.rows is not None
                assert one.found is not None
                replaced = expired & (one.found > 0)
                expired = expired & ~replaced
                row = one.rows.to(wide)
                embed = torch.where(replaced[..., None], row, embed)
                size = torch.where(replaced, self.reset_cluster_size * filled, size)
                average = torch.where(replaced[..., None], row * (self.reset_cluster_size * filled), average)
        self.cluster_size.copy_(size)
        self.embed_avg.copy_(average)
        if self.ema_update or self.replaces:
            self.embed.copy_(embed)

    def _means(self, size: Tensor, average: Tensor, embed: Tensor) -> Tensor:
        """Averages over their sizes with Laplace smoothing; where neither was ever filled, what there was."""
        total = size.sum(-1, keepdim=True)
        smoothed = (size + self.eps) / (total + self.codebook_size * self.eps) * total
        means = average / smoothed[..., None]
        if self.use_cosine_sim:
            means = F.normalize(means, dim=-1, eps=1e-6)
        return torch.where(size[..., None] > 0, means, embed) if self.zero_debias else means


def update(observed: Sequence[tuple[Codebook, Statistics]]) -> None:
    """Change codebooks by what one forward pass observed: one all-reduce for all of them.

    A codebook may occur several times, as stages share it. All have the same group.
    """
    if not observed:
        return
    lead = observed[0][0]
    if lead.synchronised:
        properties = {"the number of codebooks": len(observed)}
        for i, (codebook, _) in enumerate(observed):
            heads, n_codewords, dim = codebook.embed.shape
            properties |= {
                f"the number of codewords of codebook {i}": n_codewords,
                f"D of codebook {i}": dim,
                f"the number of heads of codebook {i}": heads,
                f"whether codebook {i} replaces unused codewords": int(codebook.replaces),
            }
        tensors = [tensor for _, one in observed for tensor in one if tensor is not None]
        sums = iter(_ranks.sum_over_ranks(tensors, lead.token, lead.group, properties))
        observed = [(codebook, one.replaced(sums)) for codebook, one in observed]
    shared: list[tuple[Codebook, list[Statistics]]] = []
    for codebook, one in observed:
        earlier = [every for other, every in shared if other is codebook]
        if earlier:
            earlier[0].append(one)
        else:
            shared.append((codebook, [one]))
    for codebook, every in shared:
        codebook.absorb(every)
