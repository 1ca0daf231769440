"""The forward of ``VectorQuantize`` of vector-quantize-pytorch, without one-hot vectors and distances.

What is seldom done or cheap (expiry of codes, affine parameters, the average of a codebook) is the library's
own code, called on the same arguments in the same order, so that the same random numbers are drawn.
"""

from __future__ import annotations

import dataclasses
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.accelerate.patterns._vqp_source import helper
from genperf.accelerate.patterns._vqp_update import (
    Library,
    codes_of,
    flat,
    flat_mask,
    initialise,
    library_of,
    snapshot,
    update_statistics,
)  # fmt: skip
from genperf.ops.vector_quantize import vector_quantize
from genperf.ops.vq_nearest import vq_nearest


@dataclasses.dataclass(frozen=True)
class _Own:
    """Functions and classes of the library's file, by their names."""

    lens_to_mask: Any
    directional_reparam: Any
    orthogonal_loss_fn: Any
    LossBreakdown: Any


def uncovered_in_training(vq: Any, samples: bool) -> str:
    """Which option of a quantizer makes its training run the original code; "" if none does."""
    if samples:
        return "stochastic_sample_codes or straight_through weighs every codeword"
    if vq.in_place_codebook_optimizer is not None:
        return "in_place_codebook_optimizer steps within forward"
    if vq.has_commitment_loss and vq.commitment_use_cross_entropy_loss:
        return "commitment_use_cross_entropy_loss takes all distances"
    if vq.has_codebook_diversity_loss:
        return "codebook_diversity_loss_weight takes all distances"
    return ""


def hooked(module: Any) -> bool:
    """Whether hooks would notice that a module is not called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _covered(vq: Any, codebook: Any, x: Any, mask: Any, lens: Any, samples: bool) -> bool:
    """Whether a call is one that :func:`quantizer_forward` computes."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta or x.numel() == 0:
        return False
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if hooked(codebook):
        return False
    if vq.accept_image_fmap or vq.accept_3d_fmap:
        if mask is not None or lens is not None or x.dim() != (4 if vq.accept_image_fmap else 5):
            return False
    elif x.dim() != 3 and (x.dim() != 2 or mask is not None or lens is not None):
        return False
    if mask is not None and (lens is not None or mask.dtype != torch.bool or mask.dim() != 2):
        return False
    if not vq.training and not codebook.training:
        return True
    if uncovered_in_training(vq, samples):
        return False
    # The library compares codewords with the unprojected input here, which fits in this case alone.
    masked = mask is not None or lens is not None
    return not (masked and vq.has_commitment_loss and (vq.heads > 1 or vq.has_projections))


def _split(vq: Any, x: Tensor) -> Tensor:
    """[b, n, heads * d] as [b, heads, n, d], or [heads, b, n, d] where each head has a codebook."""
    if vq.heads == 1:
        return x
    x = x.unflatten(-1, (vq.heads, -1))
    return x.permute(2, 0, 1, 3) if vq.separate_codebook_per_head else x.transpose(1, 2)


def _joined(vq: Any, x: Tensor) -> Tensor:
    """The inverse of :func:`_split`."""
    if vq.heads == 1:
        return x
    x = x.permute(1, 2, 0, 3) if vq.separate_codebook_per_head else x.transpose(1, 2)
    return x.flatten(2)


def _channel_last(vq: Any, x: Tensor) -> Tensor:
    """The input as [b, n, d]."""
    if vq.accept_image_fmap or vq.accept_3d_fmap:
        return x.movedim(1, -1).flatten(1, -2)
    if x.dim() == 2:
        return x[:, None]
    return x if vq.channel_last else x.transpose(1, 2)


def _as_given(vq: Any, result: Tensor, x: Tensor) -> Tensor:
    """A result [b, n, d] in the layout of the input ``x``."""
    if vq.accept_image_fmap or vq.accept_3d_fmap:
        return result.unflatten(1, x.shape[2:]).movedim(-1, 1)
    if x.dim() == 2:
        return result[:, 0]
    return result if vq.channel_last else result.transpose(1, 2)


def _codewords(library: Library, codebook: Any, vectors: Tensor, mask: Tensor | None) -> Tensor:
    """The codewords [codebooks, K, D] of this call, in float32, after all that precedes the search."""
    initialise(library, codebook, vectors, mask)
    if codebook.affine_param:
        codebook.update_affine(
            flat(codebook, vectors), codebook.embed, mask=flat_mask(codebook, mask, vectors)
        )
    embed = codebook.embed if codebook.learnable_codebook else codebook.embed.detach()
    embed = embed.float()
    if codebook.vq_bridge is not None:
        embed = codebook.vq_bridge(embed)
    if codebook.affine_param:
        codebook_std = codebook.codebook_variance.clamp(min=1e-5).sqrt()
        batch_std = codebook.batch_variance.clamp(min=1e-5).sqrt()
        embed = (embed - codebook.codebook_mean) * (batch_std / codebook_std) + codebook.batch_mean
    return embed


def _orthogonality(vq: Any, indices: Tensor, loss_fn: Any) -> Tensor:
    codebook = vq._codebook.embed
    if vq.orthogonal_reg_active_codes_only:
        codebook = codebook[:, torch.unique(indices)]
    n_codes, most = codebook.shape[-2], vq.orthogonal_reg_max_codes
    if most is not None and n_codes > most:
        codebook = codebook[:, torch.randperm(n_codes, device=indices.device)[:most]]
    return loss_fn(codebook)


def _result(vq: Any, x: Tensor, vectors: Tensor, embed: Tensor, found: Tensor, op: Any, own: _Own) -> Tensor:
    """The quantized vectors of training, with their gradient; ``op`` is what vector_quantize gave."""
    routed = x.requires_grad and vq.route_gradients_to_input
    if routed and not vq.directional_reparam:
        quantized = op.quantized.to(torch.promote_types(x.dtype, vectors.dtype))
    else:
        codes = codes_of(embed, found) if embed.requires_grad else op.quantized.detach()
        quantized = codes.to(x.dtype)
        if routed:
            quantized = own.directional_reparam(
                vectors.contiguous(), quantized, vq.directional_reparam_variance
            )
    if vq.sync_update_v > 0.0:
        quantized = quantized + vq.sync_update_v * (quantized - quantized.detach())
    return quantized


def _commitment(
    both: bool, given: Tensor, vectors: Tensor, mask: Tensor | None, embed: Tensor, found: Tensor, op: Any
) -> Tensor:
    """The commitment loss; ``both``: with a gradient to the codebook too."""
    if mask is not None:
        codes = codes_of(embed if both else embed.detach(), found[mask])
        return F.mse_loss(codes.to(given.dtype), given[mask])
    # With both terms the op's loss is twice the library's, whose gradients are whole.
    loss = op.loss - 0.5 * op.loss.detach() if both else op.loss
    return loss.to(vectors.dtype)


def quantizer_forward(forward: FunctionType, codebook: type, samples: bool) -> FunctionType:
    """The method that replaces ``forward``, for that class of codebooks.

    ``samples`` tells that codewords are drawn in training.
    """
    library = library_of(codebook)
    own = _Own(*(helper(forward, field.name) for field in dataclasses.fields(_Own)))

    def method(
        self: Any, x: Tensor, indices: Any = None, mask: Any = None, lens: Any = None, topk: Any = None,
        sample_codebook_temp: Any = None, freeze_codebook: Any = None, return_loss_breakdown: bool = False,
        codebook_transform_fn: Any = None, ema_update_weight: Any = None, accum_ema_update: bool = False,
        ema_update: Any = None,
    ) -> Any:  # fmt: skip
        codebook = self._codebook
        special = indices is not None or topk is not None or codebook_transform_fn is not None
        if special or not _covered(self, codebook, x, mask, lens, samples):
            return forward(
                self, x, indices, mask, lens, topk, sample_codebook_temp, freeze_codebook,
                return_loss_breakdown, codebook_transform_fn, ema_update_weight, accum_ema_update, ema_update,
            )  # fmt: skip
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        if lens is not None:
            mask = own.lens_to_mask(lens, x.shape[1])
        given = _channel_last(self, x)
        vectors = codebook.transform_input(_split(self, self.project_in(given)))
        wide = vectors.float()
        embed = _codewords(library, codebook, wide.detach(), mask)
        updates = codebook.training and not freeze
        if self.training and (vectors.requires_grad or embed.requires_grad):
            embed = snapshot(embed)  # what backward reads is not to change with the codebook
        metric = "dot" if codebook.use_cosine_sim else "l2"
        words = embed if codebook.num_codebooks > 1 else embed[0]
        both = self.learnable_codebook and not freeze
        if self.training:
            fused = self.has_commitment_loss and mask is None
            op = vector_quantize(
                wide, words if fused and both else words.detach(), metric,
                estimator="rotation" if self.rotation_trick else "straight_through",
                commitment_weight=float(fused), codebook_weight=float(fused and both),
            )  # fmt: skip
            found = op.indices
        else:
            found = vq_nearest(wide, words, metric).indices
        if updates:
            update_statistics(
                library, codebook, wide.detach(), found, mask, ema_update_weight, accum_ema_update, ema_update
            )
        chosen = found
        if self.heads > 1:
            chosen = found.permute(1, 2, 0) if self.separate_codebook_per_head else found.transpose(1, 2)
        loss = commitment = orthogonality = self.zero
        if not self.training:
            quantized = codes_of(embed, found).to(x.dtype)
        else:
            quantized = _result(self, x, vectors, embed, found, op, own)
            if not torch.compiler.is_compiling():  # a graph cannot change what it is given
                loss.requires_grad_()
            if self.has_commitment_loss:
                commitment = _commitment(both, given, vectors, mask, embed, found, op)
                loss = loss + commitment * self.commitment_weight
            if self.has_codebook_orthogonal_loss:
                orthogonality = _orthogonality(self, chosen, own.orthogonal_loss_fn)
                loss = loss + orthogonality * self.orthogonal_reg_weight
        quantized = self.project_out(_joined(self, quantized))
        if mask is not None:
            padding = torch.zeros_like(given) if self.return_zeros_for_masked_padding else given
            quantized = torch.where(mask[..., None], quantized, padding)
            chosen = torch.where(mask if chosen.dim() == 2 else mask[..., None], chosen, -1)
        quantized = _as_given(self, quantized, x)
        if self.accept_image_fmap or self.accept_3d_fmap:
            chosen = chosen.unflatten(1, x.shape[2:])
        elif x.dim() == 2:
            chosen = chosen[:, 0]
        if not return_loss_breakdown:
            return quantized, chosen, loss
        return quantized, chosen, loss, own.LossBreakdown(commitment, self.zero, orthogonality, self.zero)

    return method  # type: ignore[return-value]
