"""A codebook in parts, one on each process, for more codewords than one device holds."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf.nn.vector_quantize import _checks, _ranks
from genperf.nn.vector_quantize.codebook import Codebook
from genperf.ops.philox_random import draw_key, philox_random
from genperf.ops.vector_quantize import vector_quantize
from genperf.ops.vq_nearest import vq_nearest

_ROWS = 1 << 20  # elements of vectors that are in float64 at a time


class ShardedCodebook(nn.Module):
    """Vector quantization whose K codewords are spread over the processes of a group, in the order of ranks.

    Each process quantizes vectors of its own, and every one is compared with all K codewords: all vectors are
    sent to all processes, each searches its part, and the (distance, index) of its winners are reduced. The
    index is that of :func:`genperf.ops.vq_nearest` with the whole codebook, *exact*: where the distances of
    two winners in float64 cannot be told apart with certainty, the winners themselves are sent and compared
    without rounding. So neither the number of processes nor the parts change an index.

    Averages need no further message, as each process has all vectors: those of :class:`VectorQuantize`, but
    that Laplace smoothing is by the codewords and counts of the part. ``state_dict`` is that of the part.

    Sizes, and how many winners have to be compared, are read on the host; every process takes part in each
    call, with no vectors if need be. Without torch.distributed, the one part is the whole.

    Args:
        dim: D.
        codebook_size: K, of all parts together, at least as many as there are processes. The first K modulo
            processes of these have one more than the others.
        decay, eps, threshold_ema_dead_code, reset_cluster_size, use_cosine_sim, commitment_weight,
            rotation_trick, seed, process_group: as of :class:`VectorQuantize`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, here and in the calls, where ValueError is
            raised on all processes that differ in D, K, dtype or metric.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0,
        reset_cluster_size: float | None = None,
        use_cosine_sim: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool = True,
        process_group: Any = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _checks.check_sizes({"dim": dim, "codebook_size": codebook_size})
        _checks.check_numbers(
            decay=decay, eps=eps, threshold_ema_dead_code=threshold_ema_dead_code,
            reset_cluster_size=reset_cluster_size, commitment_weight=commitment_weight,
        )  # fmt: skip
        self.dim, self.codebook_size = dim, codebook_size
        self.commitment_weight, self.rotation_trick = float(commitment_weight), rotation_trick
        self.group: str | None = None if process_group is None else process_group.group_name
        self.world = _ranks.world_size(self.group)
        rank = _ranks.rank(self.group) if self.world > 1 else 0
        if codebook_size < self.world:
            raise ValueError(
                f"codebook_size is {codebook_size}, expected at least {self.world}, the processes"
            )
        each, more = divmod(codebook_size, self.world)
        self.start = rank * each + min(rank, more)
        size = each + (rank < more)
        self._codebook = Codebook(
            dim,
            size,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            reset_cluster_size=reset_cluster_size,
            use_cosine_sim=use_cosine_sim,
            sync_codebook=False,
            seed=None if seed is None else seed + rank,
        )
        # As the whole would be initialised; parts differ where the processes' generators do not.
        key = draw_key("cpu") if seed is None else torch.tensor([seed, 0])
        uniform = philox_random((size, dim), key + torch.tensor([0, rank]), "uniform")
        self.load_part((2 * uniform - 1) * math.sqrt(6 / (codebook_size * dim)))

    @property
    def codebook(self) -> Tensor:
        """The codewords of this process, [K_r, D]; the first has the index ``start``."""
        return self._codebook.embed[0]

    @torch.no_grad()
    def load_part(self, codewords: Tensor) -> None:
        """Set the codewords of this process, [K_r, D], and their averages as if each was chosen once."""
        book = self._codebook
        codewords = codewords.to(book.embed)
        if book.use_cosine_sim:
            codewords = F.normalize(codewords, dim=-1, eps=1e-6)
        book.embed.copy_(codewords)
        book.embed_avg.copy_(codewords)
        book.cluster_size.fill_(1.0)

    def extra_repr(self) -> str:
        last = self.start + len(self.codebook) - 1
        return f"{self.codebook_size}, dim={self.dim}, codewords {self.start} to {last} of {self.world} parts"

    def nearest(self, x: Tensor) -> Tensor:
        """The index int64 [*], in the whole codebook, of the codeword nearest to each vector of x [*, D]."""
        rows, sizes = self._gathered(self._checked(x).detach().reshape(-1, self.dim))
        return self._search(rows)[self._own(sizes)].view(x.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """The codewords [*, D] of indices [*], from 0 to K - 1, of each process."""
        rows, sizes = self._gathered(indices.reshape(-1, 1))
        return self._codewords(rows[:, 0])[self._own(sizes)].view(*indices.shape, self.dim)

    def forward(self, x: Tensor, freeze_codebook: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize; in training, update the codewords too.

        Args:
            x: [*, D], of this process. float32, float16, bfloat16 or float64.
            freeze_codebook: whether the codewords stay as they are.

        Returns:
            As :meth:`VectorQuantize.forward`.
        """
        flat = self._checked(x).reshape(-1, self.dim)
        rows, sizes = self._gathered(flat.detach())
        everyone = self._search(rows)
        own = self._own(sizes)
        codewords = self._codewords(everyone)[own].to(flat.dtype)
        if self.training and not freeze_codebook:
            self._update(rows, everyone)
        positions = torch.arange(len(flat), device=x.device)
        quantized, _, loss, *_ = vector_quantize(
            flat if self.training else flat.detach(),
            codewords if len(codewords) else flat.new_zeros(1, self.dim),
            indices=positions,
            estimator="rotation" if self.rotation_trick else "straight_through",
            commitment_weight=self.commitment_weight if self.training else 0.0,
        )
        return quantized.view(x.shape).to(x.dtype), everyone[own].view(x.shape[:-1]), loss

    def _checked(self, x: Tensor) -> Tensor:
        _checks.check_input(x, self.dim, x.dim() - 1, "ShardedCodebook")
        x = x.to(torch.promote_types(torch.promote_types(x.dtype, self.codebook.dtype), torch.float32))
        return F.normalize(x, dim=-1, eps=1e-6) if self._codebook.use_cosine_sim else x

    def _gathered(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """The rows of all processes, one after another, and how many each has."""
        if self.world == 1:
            return rows, [len(rows)]
        properties = {
            "D": self.dim,
            "the number of codewords": self.codebook_size,
            "the number of bytes of a number": rows.element_size(),
            "whether the metric is cosine": int(self._codebook.use_cosine_sim),
        }
        everyone = _ranks.gather([*properties.values(), len(rows)], rows.device, self.group)
        _ranks.compare(properties, [one[:-1] for one in everyone], "ShardedCodebook")
        sizes = [one[-1] for one in everyone]
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        parts = _ranks.all_gather(padded, self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sizes

    def _own(self, sizes: list[int]) -> slice:
        rank = _ranks.rank(self.group) if self.world > 1 else 0
        return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    @torch.no_grad()
    def _search(self, x: Tensor) -> Tensor:
        """Indices [N] in the whole codebook of the vectors [N, D] of all processes."""
        part, metric = self.codebook.detach().to(x.dtype), self._codebook.metric
        winner = vq_nearest(x, part, metric).indices
        if self.world == 1:
            return winner
        distance, error = _measured(x, part, winner, metric)
        own = torch.stack([distance, error, (winner + self.start).double()])
        distance, error, index = torch.stack(_ranks.all_gather(own, self.group)).unbind(1)  # [world, N] each
        least = (distance + error).amin(0)
        candidate = distance - error <= least
        rank = candidate.int().argmax(0)
        doubtful = (candidate.sum(0) > 1).nonzero().flatten()
        if len(doubtful):
            rows = part[winner[doubtful]]
            among = torch.stack(_ranks.all_gather(rows, self.group), dim=1)  # [doubtful, world, D]
            # The lowest of equals is that of the lowest rank, whose indices are the lowest.
            rank[doubtful] = vq_nearest(x[doubtful][:, None], among, metric).indices[:, 0]
        found = index.gather(0, rank[None])[0].long()
        return torch.where(x.isfinite().all(1), found, 0)

    @torch.no_grad()
    def _codewords(self, indices: Tensor) -> Tensor:
        """The codewords [N, D] of indices [N] that are the same on all processes."""
        here = indices - self.start
        own = (here >= 0) & (here < len(self.codebook))
        rows = torch.where(own[:, None], self.codebook[here.clamp(0, len(self.codebook) - 1)], 0.0)
        return rows if self.world == 1 else _ranks.all_reduce([rows], self.group)[0]

    @torch.no_grad()
    def _update(self, x: Tensor, indices: Tensor) -> None:
        book = self._codebook
        here = indices - self.start
        valid = x.isfinite().all(1)
        own = valid & (here >= 0) & (here < len(self.codebook))
        statistics = book.observe(x[None], torch.where(own, here, 0)[None], own[None], 2, offered=valid[None])
        book.absorb([statistics], counted=valid.any())


def _measured(x: Tensor, codebook: Tensor, index: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """In float64 the distances [N] of vectors [N, D] from their codewords, and bounds of the errors.

    Infinite where there is none, as the codeword is not finite. The bound is that of
    docs/vector_quantization.md for distances in float64, more than twice what is needed.
    """
    distances, sizes = [], []
    step = max(1, _ROWS // x.shape[1])
    for rows, chosen in zip(x.split(step), index.split(step), strict=True):
        a, b = rows.double(), codebook[chosen].double()
        terms = (a - b).square() if metric == "l2" else -a * b
        distances.append(terms.sum(1))
        sizes.append(terms.abs().sum(1))
    if not distances:
        return x.new_zeros(0, dtype=torch.float64), x.new_zeros(0, dtype=torch.float64)
    distance = torch.cat(distances)
    error = torch.cat(sizes) * (x.shape[1] + 16) * 2.0**-52 + torch.finfo(torch.float64).tiny
    known = distance.isfinite() & error.isfinite()
    return torch.where(known, distance, torch.inf), torch.where(known, error, 0.0)
