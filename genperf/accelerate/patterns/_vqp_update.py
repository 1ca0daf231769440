"""What a quantizer of vector-quantize-pytorch does to its codebook: k-means, averages, expiry of codes.

Vectors are [b, n, d], [b, heads, n, d] with one codebook for all heads, or [codebooks, b, n, d].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf.accelerate._rewrite import rebind
from genperf.accelerate.patterns._vqp_source import helper
from genperf.ops.codebook_statistics import codebook_statistics
from genperf.ops.vq_nearest import vq_nearest


@dataclass(frozen=True)
class Library:
    """Functions of the file that defines a codebook's class, for what is the library's own affair.

    ``number`` stands for it in a compiled graph; ``init_embed`` is ``Codebook.init_embed_`` with the search
    and the sums of genperf.
    """

    number: int
    codebook: Any
    init_embed: FunctionType
    ema_inplace: FunctionType
    accum_grad: FunctionType
    sample: FunctionType
    sample_distributed: FunctionType


_libraries: dict[type, Library] = {}


def library_of(codebook: Any) -> Library:
    """The library of a codebook's class; its source is to be known."""
    found = _libraries.get(codebook)
    if found is None:
        forward, init = codebook.forward, codebook.init_embed_
        kmeans = _kmeans(helper(forward, "l2norm"))
        found = Library(
            len(_libraries),
            codebook,
            rebind(init, helper(init, "kmeans"), kmeans),
            *(helper(forward, name) for name in ("ema_inplace", "accum_grad_")),
            *(helper(forward, name) for name in ("batched_sample_vectors", "sample_vectors_distributed")),
        )
        _libraries[codebook] = found
    return found


def flat(codebook: Any, vectors: Tensor) -> Tensor:
    """The vectors in the library's order, [codebooks, N, d]."""
    return vectors.reshape(codebook.num_codebooks, -1, vectors.shape[-1])


def mask_of(codebook: Any, mask: Tensor | None, vectors: Tensor) -> Tensor | None:
    """A mask [b, n] as one of ``vectors``, without their last dimension."""
    if mask is None or vectors.dim() == 3:
        return mask
    return (mask if codebook.num_codebooks > 1 else mask[:, None]).expand(vectors.shape[:-1])


def flat_mask(codebook: Any, mask: Tensor | None, vectors: Tensor) -> Tensor | None:
    """A mask [b, n] in the order of :func:`flat`, [codebooks, N]."""
    expanded = mask_of(codebook, mask, vectors)
    return None if expanded is None else expanded.reshape(codebook.num_codebooks, -1)


def codes_of(embed: Tensor, indices: Tensor) -> Tensor:
    """The codewords of ``embed`` [codebooks, K, d] at ``indices``, with a gradient to it."""
    if embed.shape[0] == 1:
        return F.embedding(indices, embed[0])
    first = torch.arange(embed.shape[0], device=indices.device) * embed.shape[1]
    return F.embedding(indices + first.view(-1, *[1] * (indices.dim() - 1)), embed.flatten(0, 1))


def snapshot(embed: Tensor) -> Tensor:
    """A copy of the codewords, with a gradient to them."""
    return torch.ops.genperf.vqp_snapshot(embed) if torch.compiler.is_compiling() else embed.clone()


def initialise(library: Library, codebook: Any, vectors: Tensor, mask: Tensor | None) -> None:
    """Find the codebook by k-means where that is still to be done."""
    if torch.compiler.is_compiling():
        torch.ops.genperf.vqp_initialise(
            codebook.initted, codebook.embed.data, codebook.embed_avg, codebook.cluster_size, vectors,
            flat_mask(codebook, mask, vectors), library.number, codebook.kmeans_iters, codebook.eps,
            codebook.use_cosine_sim, codebook.sample_fn is library.sample_distributed,
        )  # fmt: skip
    elif not codebook.initted:
        library.init_embed(codebook, flat(codebook, vectors), mask=flat_mask(codebook, mask, vectors))


def _kmeans(l2norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def kmeans(
        samples: Tensor, num_clusters: int, num_iters: int = 10, use_cosine_sim: bool = False,
        sample_fn: Any = None, all_reduce_fn: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The library's k-means; samples [codebooks, N, d] give means [codebooks, K, d] and sizes."""
        means = sample_fn(samples, num_clusters)
        for _ in range(num_iters):
            nearest = vq_nearest(samples, means, "dot" if use_cosine_sim else "l2").indices
            counts, sums = codebook_statistics(samples, nearest, num_clusters, heads=True)
            sizes = counts.long()
            all_reduce_fn(sizes)
            empty = sizes == 0
            found = sums.to(samples) / sizes.masked_fill(empty, 1)[..., None]
            all_reduce_fn(found)
            if use_cosine_sim:
                found = l2norm(found)
            means = torch.where(empty[..., None], means, found)
        return means, sizes

    return kmeans


def update_statistics(
    library: Library, codebook: Any, vectors: Tensor, indices: Tensor, mask: Tensor | None,
    weight: Any = None, accumulate: bool = False, ema_update: bool | None = None,
) -> None:  # fmt: skip
    """``Codebook.update_codebook``, by indices instead of one-hot vectors; vectors carry no gradient."""
    if not changes(codebook, ema_update):
        return
    heads = codebook.num_codebooks > 1
    counts, sums = codebook_statistics(
        vectors, indices, codebook.codebook_size, heads=heads, mask=mask_of(codebook, mask, vectors)
    )
    if not heads:
        counts, sums = counts[None], sums[None]
    if codebook.affine_param:
        std = codebook.codebook_variance.clamp(min=1e-5).sqrt()
        scale = std / codebook.batch_variance.clamp(min=1e-5).sqrt()
        sizes = counts[..., None]
        sums = (sums - sizes * codebook.batch_mean) * scale + sizes * codebook.codebook_mean
    update_codebook(library, codebook, counts, sums, vectors, mask, weight, accumulate, ema_update)


def changes(codebook: Any, ema_update: bool | None = None) -> bool:
    """Whether a training step writes to the codebook."""
    return (codebook.ema_update if ema_update is None else ema_update) or codebook.has_dead_code_replacement


def update_codebook(
    library: Library, codebook: Any, counts: Tensor, sums: Tensor, vectors: Tensor, mask: Tensor | None,
    weight: Any = None, accumulate: bool = False, ema_update: bool | None = None,
) -> None:  # fmt: skip
    """The same, given how many vectors each codeword has [codebooks, K] and their sums [codebooks, K, d]."""
    codebook.all_reduce_fn(counts)
    codebook.all_reduce_fn(sums)
    if callable(weight):
        weight = weight(sums, counts)
    if accumulate:
        library.accum_grad(codebook.cluster_size, counts)
        library.accum_grad(codebook.embed_avg, sums)
        return
    library.ema_inplace(codebook.cluster_size, counts, codebook.decay, weight)
    library.ema_inplace(codebook.embed_avg, sums, codebook.decay, weight)
    ema_update = codebook.ema_update if ema_update is None else ema_update
    if ema_update and not codebook.manual_ema_update:
        codebook.update_ema()
    _expire(library, codebook, vectors, mask)


def _expire(library: Library, codebook: Any, vectors: Tensor, mask: Tensor | None) -> None:
    """Replace the codewords that are hardly used by vectors drawn at random."""
    if not codebook.has_dead_code_replacement or not codebook.training:
        return
    if torch.compiler.is_compiling():
        torch.ops.genperf.vqp_expire(
            codebook.embed.data, codebook.embed_avg, codebook.cluster_size, vectors,
            flat_mask(codebook, mask, vectors), library.number, float(codebook.threshold_ema_dead_code),
            float(codebook.reset_cluster_size), codebook.use_cosine_sim,
            codebook.replace_sample_fn is library.sample_distributed,
        )  # fmt: skip
    elif torch.any(codebook.cluster_size < codebook.threshold_ema_dead_code):
        codebook.expire_codes_(flat(codebook, vectors), seq_mask=flat_mask(codebook, mask, vectors))


# In a compiled graph these stand for code that looks at values, which a graph cannot, and for a copy, in
# whose place the compiler would keep the buffer itself although that is written to.


@torch.library.custom_op("genperf::vqp_snapshot", mutates_args=())
def _snapshot_op(embed: Tensor) -> Tensor:
    return embed.clone()


_snapshot_op.register_fake(torch.empty_like)
_snapshot_op.register_autograd(lambda ctx, grad: grad)


def _stand_in(library: Library, distributed: bool, **attributes: Any) -> Any:
    """A codebook with the given attributes for the library's own methods to work on."""
    codebook = library.codebook.__new__(library.codebook)
    nn.Module.__init__(codebook)
    sample = library.sample_distributed if distributed else library.sample
    reduce = torch.distributed.all_reduce if distributed else _nothing
    codebook.__dict__.update(
        attributes, sample_fn=sample, replace_sample_fn=sample, kmeans_all_reduce_fn=reduce,
        has_dead_code_replacement=True, codebook_size=attributes["embed"].shape[1],
    )  # fmt: skip
    return codebook


def _nothing(*_: Any) -> None:
    pass


@torch.library.custom_op(
    "genperf::vqp_initialise", mutates_args=("initted", "embed", "embed_avg", "cluster_size")
)
def _initialise_op(
    initted: Tensor, embed: Tensor, embed_avg: Tensor, cluster_size: Tensor, vectors: Tensor,
    mask: Tensor | None, library: int, kmeans_iters: int, eps: float, use_cosine_sim: bool, distributed: bool,
) -> None:  # fmt: skip
    if initted:
        return
    of = list(_libraries.values())[library]
    codebook = _stand_in(
        of, distributed, initted=initted, embed=embed, embed_avg=embed_avg, cluster_size=cluster_size,
        kmeans_iters=kmeans_iters, eps=eps, use_cosine_sim=use_cosine_sim,
    )  # fmt: skip
    of.init_embed(codebook, vectors.reshape(len(embed), -1, vectors.shape[-1]), mask=mask)


@torch.library.custom_op("genperf::vqp_expire", mutates_args=("embed", "embed_avg", "cluster_size"))
def _expire_op(
    embed: Tensor, embed_avg: Tensor, cluster_size: Tensor, vectors: Tensor, mask: Tensor | None,
    library: int, threshold: float, reset_cluster_size: float, use_cosine_sim: bool, distributed: bool,
) -> None:  # fmt: skip
    codebook = _stand_in(
        list(_libraries.values())[library], distributed, embed=embed, embed_avg=embed_avg,
        cluster_size=cluster_size, threshold_ema_dead_code=threshold, reset_cluster_size=reset_cluster_size,
        use_cosine_sim=use_cosine_sim,
    )  # fmt: skip
    codebook.expire_codes_(vectors.reshape(len(embed), -1, vectors.shape[-1]), seq_mask=mask)
