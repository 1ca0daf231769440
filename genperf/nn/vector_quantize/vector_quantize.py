"""Vector quantization as a module, with the options, state and results of vector-quantize-pytorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf.nn.vector_quantize import _checks
from genperf.nn.vector_quantize._codewords import cross_entropy, gathered
from genperf.nn.vector_quantize._snapshot import snapshots
from genperf.nn.vector_quantize.codebook import Codebook, Statistics, update
from genperf.ops.vector_quantize import vector_quantize


class LossBreakdown(NamedTuple):
    """The parts of the loss before their weights; all but the first are 0, as their options are not there."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class Stage(NamedTuple):
    """What :meth:`VectorQuantize.quantize` returns."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    observed: list[tuple[Codebook, Statistics]]


class VectorQuantize(nn.Module):
    """Vector quantization with learned codewords (A. van den Oord et al., arXiv:1711.00937).

    Call-compatible with ``VectorQuantize`` of vector-quantize-pytorch 1.32 for the options below, and with
    its ``state_dict``. It differs where that is wrong: indices are those of :func:`genperf.ops.vq_nearest`,
    exact under autocast too; there is no host synchronisation; codewords are the same on all ranks after
    every step; a vector with a NaN or an infinity changes no codeword; a batch without vectors changes
    nothing; the masked loss is that of the projected vectors.

    Args:
        dim: channels of the input.
        codebook_size: K, the number of codewords.
        codebook_dim: D, the dimension of the codewords of a head; ``dim`` if None. Where heads times D is not
            ``dim``, linear maps ``project_in`` and ``project_out`` lead there and back.
        heads: into how many vectors each input is split.
        separate_codebook_per_head: whether each has codewords of its own.
        decay: of the exponential moving averages; the codewords take ``1 - decay`` of a batch.
        eps: of Laplace smoothing of the numbers by which the averages are divided.
        freeze_codebook: whether training leaves the codewords alone; also an argument of the call.
        kmeans_init: whether the first batch initialises the codewords, by ``kmeans_iters`` steps of k-means.
        use_cosine_sim: quantize vectors divided by their lengths, with codewords of length 1.
        layernorm_after_project_in: whether a layer norm follows ``project_in``.
        threshold_ema_dead_code: codewords whose average count falls below are replaced by vectors of the
            batch; 0 for never.
        reset_cluster_size: the average count that these start with; the threshold if None.
        channel_last: whether channels are the last dimension, else dimension 1.
        accept_image_fmap, accept_3d_fmap: take [B, dim, H, W] or [B, dim, D, H, W].
        commitment_weight: weight of the mean squared difference of vectors and codewords in the loss.
        rotation_trick: gradients by the rotation trick (arXiv:2410.06424); False for straight-through. None:
            True unless ``dim`` is 1, as in vector-quantize-pytorch.
        route_gradients_to_input: whether the input gets a gradient from the output at all.
        learnable_codebook: codewords are a parameter, which learns from the loss, without averages.
        ema_update: whether averages move the codewords; not ``learnable_codebook`` if None.
        return_zeros_for_masked_padding: what masked positions of the output hold: 0, or the input.
        zero_debias: averages start at 0 and are divided by what has been filled of them (D. Kingma, J. Ba,
            arXiv:1412.6980, as Sonnet's VectorQuantizerEMA), instead of starting as if each codeword had
            been chosen once. The state gains ``_codebook.step``.
        sync_codebook: whether the processes of torch.distributed update their codewords by all their vectors.
            None: where there are several.
        process_group: which processes; None for all.
        seed: of the random choices for ``kmeans_init`` and unused codewords; None for torch's generator.

    Raises:
        TypeError, ValueError: for arguments that do not fit, here and in the call; the message says which.
            In the first step ValueError where processes differ in the shape of their codebooks.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        *,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        reset_cluster_size: float | None = None,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        route_gradients_to_input: bool = True,
        learnable_codebook: bool = False,
        ema_update: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        zero_debias: bool = False,
        sync_codebook: bool | None = None,
        process_group: Any = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        ema_update = not learnable_codebook if ema_update is None else ema_update
        codebook_dim = dim if codebook_dim is None else codebook_dim
        sizes = {"dim": dim, "codebook_size": codebook_size, "codebook_dim": codebook_dim, "heads": heads}
        _checks.check_sizes(sizes | {"kmeans_iters": kmeans_iters})
        _checks.check_numbers(
            decay=decay, eps=eps, threshold_ema_dead_code=threshold_ema_dead_code,
            reset_cluster_size=reset_cluster_size, commitment_weight=commitment_weight,
        )  # fmt: skip
        _checks.check_options(
            learnable_codebook, ema_update, use_cosine_sim, accept_image_fmap, accept_3d_fmap
        )
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)
        self.dim, self.codebook_size, self.codebook_dim, self.heads = dim, codebook_size, codebook_dim, heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.commitment_weight = float(commitment_weight)
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.route_gradients_to_input = route_gradients_to_input
        self.learnable_codebook = learnable_codebook
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            reset_cluster_size=reset_cluster_size,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            use_cosine_sim=use_cosine_sim,
            learnable_codebook=learnable_codebook,
            ema_update=ema_update,
            zero_debias=zero_debias,
            sync_codebook=sync_codebook,
            process_group=process_group,
            seed=seed,
        )

    @property
    def ema_update(self) -> bool:
        """Whether averages move the codewords."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codewords [K, D], or [heads, K, D] of separate codebooks; assigning copies into them."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes[None])

    def _channel(self, x: Tensor) -> int:
        """The dimension of channels in an input."""
        return 1 if self._channels_first and x.dim() > 2 else x.dim() - 1

    @property
    def _channels_first(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codewords [*, heads D] of indices [*], or [*, heads]; along dimension 1 where channels are there.

        Indices of -1, those of masked positions, give 0.
        """
        embed = self._codebook.embed
        if len(embed) == 1:
            codes = gathered(embed[0], indices, -1)
        else:
            codes = gathered(embed, indices.movedim(-1, 0), -1).movedim(0, -2)
        if self.heads > 1:
            codes = codes.flatten(-2)
        return codes.movedim(-1, self._channel(codes))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output, after ``project_out``, of indices that a call returned."""
        codes = self.get_codes_from_indices(indices)
        channel = self._channel(codes)
        return self.project_out(codes.movedim(channel, -1)).movedim(-1, channel)

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None,
        frozen: bool,
        channel: int,
        active: Tensor | None = None,
        part: tuple[int, int] = (0, 1),
        targets: Tensor | None = None,
    ) -> Stage:
        """Quantize vectors between the projections, and observe them without a change of the codewords.

        Args:
            x: [B, *] with heads D channels along dimension ``channel``.
            mask: bool, the shape of x without its channels, or None.
            frozen: whether the codewords are to stay.
            active: bool []: whether the vectors count for the averages; None for yes.
            part: of :meth:`Codebook.observe`.
            targets: integers, the shape of the indices: for their cross-entropy in place of the loss.

        Returns:
            :class:`Stage`: ``quantized``, the shape of x in at least float32; ``indices`` [B, *], or
            [B, *, heads]; ``loss`` []; and for :func:`update` what was ``observed``, if anything.
        """
        book = self._codebook
        x = x.to(torch.promote_types(torch.promote_types(x.dtype, book.embed.dtype), torch.float32))
        dim, separate, heads = channel, book.num_codebooks > 1, self.heads
        if heads > 1:
            x = x.unflatten(channel, (heads, -1))
            dim = channel + 1
            if mask is not None:
                mask = mask.unsqueeze(channel).expand(*x.shape[:dim], *x.shape[dim + 1 :])
            if separate:
                x, mask = x.movedim(channel, 0), None if mask is None else mask.movedim(channel, 0)
            targets = None if targets is None else targets.movedim(-1, 0 if separate else channel)
        if self.use_cosine_sim:
            x = F.normalize(x, dim=dim, eps=1e-6)
        # The codebooks stand along dimension 0 to observe, and to search where there are several.
        one_book = (lambda t: t) if separate else (lambda t: t[None])
        training = self.training and not frozen and (book.ema_update or book.replaces)
        valid = None
        if training or book.awaits_kmeans():
            valid = book.valid(one_book(x), None if mask is None else one_book(mask), dim + (not separate))
            book.initialise(one_book(x), valid, dim + (not separate))
        embed = book.embed if separate else book.embed[0]
        if training and torch.is_grad_enabled():
            (embed,) = snapshots([embed])  # the backward pass reads it, after the update
        if frozen:
            embed = embed.detach()
        quantized, indices, loss = self._search(x, embed.to(x.dtype), mask, dim)
        if targets is not None:
            loss = cross_entropy(x, embed.to(x.dtype), targets, mask, dim, self.use_cosine_sim)
        observed = []
        if training:
            assert valid is not None
            valid = valid if active is None else valid & active
            one = book.observe(one_book(x), one_book(indices), valid, dim + (not separate), part)
            observed = [(book, one)]
        if heads > 1:
            if separate:
                quantized = quantized.movedim(0, channel)
            quantized = quantized.flatten(channel, channel + 1)
            indices = indices.movedim(0 if separate else channel, -1)
        return Stage(quantized, indices, loss, observed)

    def _search(
        self, x: Tensor, embed: Tensor, mask: Tensor | None, dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized vectors, indices and the weighted loss."""
        learned = embed.requires_grad and torch.is_grad_enabled()
        weight = self.commitment_weight if self.training else 0.0
        quantized, indices, loss, *_ = vector_quantize(
            x if self.training else x.detach(),
            embed,
            self._codebook.metric,
            dim=dim,
            mask=mask,
            estimator="rotation" if self.rotation_trick else "straight_through",
            commitment_weight=weight,
            codebook_weight=weight if learned else 0.0,
        )
        if learned and weight:  # one term, with both gradients, where the op adds two of equal value
            loss = loss - 0.5 * loss.detach()
        if not (self.training and self.route_gradients_to_input and x.requires_grad):
            quantized = gathered(embed, indices, dim) if learned else quantized.detach()
        return quantized, indices, loss

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        *,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
    ) -> tuple[Tensor, ...]:
        """Quantize; in training, update the codewords too.

        Args:
            x: [B, dim], [B, *, dim], or [B, dim, *] by ``channel_last`` and ``accept_*_fmap``. Any floating
                dtype: distances are of the numbers as given, the loss and the averages in float32 at least.
            indices: integers of the shape of the indices that are returned, -1 for none, such as those of
                another encoder's output: for their cross-entropy (below).
            mask: bool, the shape of x without its channels: False for padding, which has index -1, and takes
                part in nothing.
            lens: integers [B], a mask by the lengths of sequences.
            freeze_codebook: in place of the module's.
            return_loss_breakdown: whether to return the parts of the loss too.

        Returns:
            ``quantized``, shape and dtype of x; ``indices``, int64, the shape of x without its channels,
            and [*, heads] of several heads; ``loss`` [], 0 in evaluation. With ``indices``: ``quantized`` and
            the cross-entropy [] of these under the softmax of negative distances, or of cosines.
        """
        channel = self._channel(x)
        _checks.check_input(x, self.dim, channel, "VectorQuantize")
        mask = _checks.checked_mask(x, mask, lens, channel, "VectorQuantize")
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        vectors, inner = x, channel
        if self.has_projections:
            dtype: torch.dtype = self.project_out.weight.dtype  # type: ignore[assignment]
            vectors, inner = self.project_in(x.movedim(channel, -1).to(dtype)), x.dim() - 1
        _checks.check_targets(indices, x, channel, self.heads)
        quantized, chosen, loss, observed = self.quantize(vectors, mask, frozen, inner, targets=indices)
        update(observed)
        if self.has_projections:
            quantized = self.project_out(quantized.to(dtype)).movedim(-1, channel)
        quantized = quantized.to(x.dtype)
        if mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask.unsqueeze(channel), quantized, padding)
        if indices is not None:
            return quantized, loss
        if not return_loss_breakdown:
            return quantized, chosen, loss
        commitment = loss / self.commitment_weight if self.commitment_weight else loss
        zero = torch.zeros_like(loss)
        parts = LossBreakdown(commitment, zero, zero, zero)
        return quantized, chosen, loss, parts  # type: ignore[return-value]
