"""The forward of ``ResidualVQ`` and ``GroupedResidualVQ`` of vector-quantize-pytorch.

All stages are one op where they are plain: float32, Euclidean, nothing but codebooks between them. Otherwise
they are called one after another, without the library's record of all residuals, which it copies in each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from genperf.accelerate.patterns._vqp_quantize import hooked, uncovered_in_training
from genperf.accelerate.patterns._vqp_source import helper
from genperf.accelerate.patterns._vqp_update import Library, changes, codes_of, snapshot, update_codebook
from genperf.ops.residual_codebook_statistics import residual_codebook_statistics
from genperf.ops.residual_vector_quantize import residual_vector_quantize

#: What the stages of one op have in common.
_COMMON = (
    "training", "has_commitment_loss", "commitment_weight", "rotation_trick", "route_gradients_to_input",
    "learnable_codebook", "freeze_codebook",
)  # fmt: skip
_COMMON_OF_CODEBOOKS = ("ema_update", "has_dead_code_replacement")


@dataclass(frozen=True)
class Facts:
    """What was found when the model was accelerated.

    Attributes:
        library: that of the codebooks.
        samples: whether codewords are drawn in training.
        initialised: whether no codebook was still to be found by k-means; a compiled graph relies on it.
    """

    library: Library
    samples: bool
    initialised: bool


def uncovered(rvq: Any) -> str:
    """Why a ``ResidualVQ`` runs the original code; "" if it need not."""
    if rvq.implicit_neural_codebook:
        return "implicit_neural_codebook makes a codebook for each vector"
    if rvq.beam_size is not None:
        return "beam_size searches several codewords of each stage"
    if rvq.accept_image_fmap or rvq.layers[0].accept_3d_fmap or not rvq.layers[0].channel_last:
        return "it takes images or channels first, for which the library's record of residuals has no place"
    return ""


def _plain(vq: Any, samples: bool) -> bool:
    """Whether a quantizer can be a stage of one op."""
    codebook = vq._codebook
    if (
        hooked(vq)
        or hooked(codebook)
        or codebook.use_cosine_sim
        or codebook.affine_param
        or codebook.vq_bridge is not None
        or codebook.embed.dtype != torch.float32
        or codebook.training != vq.training
    ):
        return False
    return not vq.training or not (
        uncovered_in_training(vq, samples)
        or vq.directional_reparam
        or vq.has_codebook_orthogonal_loss
        or vq.sync_update_v > 0
    )


def _one_op(rvqs: Sequence[Any], x: Tensor, facts: Facts) -> bool:
    """Whether all stages of these ``ResidualVQ`` can be one op."""
    layers = [vq for rvq in rvqs for vq in rvq.layers]
    first, codebook = layers[0], layers[0]._codebook
    if x.dtype != torch.float32 or not all(_plain(vq, facts.samples) for vq in layers):
        return False
    if any(getattr(vq, name) != getattr(first, name) for vq in layers[1:] for name in _COMMON):
        return False
    if any(
        getattr(vq._codebook, name) != getattr(codebook, name)
        for vq in layers[1:]
        for name in _COMMON_OF_CODEBOOKS
    ):
        return False
    if any(not 0 <= rvq.quant_grad_frac <= 1 for rvq in rvqs):
        return False
    if any(rvq.diveq or (rvq.shared_codebook and codebook.has_dead_code_replacement) for rvq in rvqs):
        return False
    if codebook.embed.requires_grad and not (x.requires_grad and first.training):
        return False  # the gradient of the codewords themselves
    if torch.compiler.is_compiling():
        return facts.initialised and not codebook.has_dead_code_replacement
    return all(vq._codebook.initted for vq in layers)


def _all_stages(
    rvqs: Sequence[Any], x: Tensor, mask: Tensor | None, freeze: Any, n_stages: int, facts: Facts
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized vectors, indices and losses; x is [*, d], or [groups, *, d] for several ``ResidualVQ``."""
    first, grouped = rvqs[0].layers[0], len(rvqs) > 1
    training, codebook = first.training, first._codebook
    freeze = first.freeze_codebook if freeze is None else freeze
    updates = training and not freeze and changes(codebook)
    both = training and first.learnable_codebook and not freeze
    if not training:
        x = x.detach()
    # What backward reads, and what tells the residuals, is not to change with the codebooks.
    keep = x.requires_grad or (updates and codebook.has_dead_code_replacement)
    books = []
    for rvq in rvqs:
        embeds = [vq._codebook.embed if both else vq._codebook.embed.detach() for vq in rvq.layers]
        books.append([(snapshot(embed) if keep else embed)[0] for embed in embeds])
    commits = float(training and first.has_commitment_loss)
    op = residual_vector_quantize(
        x, books if grouped else books[0], mask=mask, n_stages=n_stages,
        estimator="rotation" if first.rotation_trick else "straight_through",
        residual_gradient=float(rvqs[0].quant_grad_frac), commitment_weight=commits,
        codebook_weight=commits * both,
    )  # fmt: skip
    if updates:
        with torch.no_grad():
            statistics = residual_codebook_statistics(x.detach(), books if grouped else books[0], op.indices)
            for g, rvq in enumerate(rvqs):
                counts, sums = (y[g] if grouped else y for y in statistics)
                residual = x[g] if grouped else x
                chosen = op.indices[g] if grouped else op.indices
                for i, vq in enumerate(rvq.layers[:n_stages]):
                    update_codebook(
                        facts.library, vq._codebook, counts[i][None], sums[i][None], residual, mask
                    )
                    if codebook.has_dead_code_replacement:
                        residual = residual - codes_of(books[g][i][None], chosen[..., i].clamp(min=0))
    routed = x.requires_grad and first.route_gradients_to_input
    # With both terms the op's losses are twice the library's, whose gradients are whole.
    losses = op.losses - 0.5 * op.losses.detach() if both else op.losses
    if commits:
        losses = losses * first.commitment_weight
    if training and not torch.compiler.is_compiling():  # a graph cannot change what it is given
        first.zero.requires_grad_()
    losses = losses + first.zero
    return op.quantized if routed else op.quantized.detach(), op.indices, losses


def _stage_by_stage(
    rvq: Any, x: Tensor, mask: Tensor | None, freeze: Any, temperature: Any, n_stages: int,
    frac_gradient: Callable[[Tensor, float], Tensor],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Quantized vectors, indices, losses and the residuals before each stage."""
    residual, total = x, torch.zeros_like(x)
    indices, losses, residuals = [], [], []
    for vq in rvq.layers[:n_stages]:
        residuals.append(residual)
        quantized, index, loss = vq(
            residual, mask=mask, sample_codebook_temp=temperature, freeze_codebook=freeze
        )
        residual = residual - frac_gradient(quantized, rvq.quant_grad_frac)
        total = total + quantized
        indices.append(index)
        losses.append(loss)
    left_out = len(rvq.layers) - n_stages
    indices += [torch.full_like(indices[0], -1)] * left_out
    losses += [torch.zeros_like(losses[0])] * left_out
    return total, torch.stack(indices, dim=-1), torch.stack(losses).float(), residuals


def _number_of_stages(rvq: Any, seed: Any, device: torch.device, forward: FunctionType) -> int:
    """How many stages quantizer dropout leaves; draws a seed as the library does."""
    if not (rvq.training and rvq.quantize_dropout):
        return rvq.num_quantizers
    seed = helper(forward, "get_maybe_sync_seed")(device) if seed is None else seed
    last = random.Random(seed).randrange(rvq.quantize_dropout_cutoff_index, rvq.num_quantizers)
    multiple = rvq.quantize_dropout_multiple_of
    if multiple != 1:
        last = helper(forward, "round_up_multiple")(last + 1, multiple) - 1
    return min(last + 1, rvq.num_quantizers)


def _covered(x: Any, mask: Any) -> bool:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta or x.numel() == 0:
        return False
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if mask is None:
        return x.dim() in (2, 3)
    return x.dim() == 3 and mask.dtype == torch.bool and mask.shape == x.shape[:2]


def residual_forward(forward: FunctionType, facts: Facts) -> FunctionType:
    """The method that replaces ``ResidualVQ.forward``."""
    frac_gradient, reparam = (helper(forward, name) for name in ("frac_gradient", "directional_reparam"))

    def method(
        self: Any, x: Tensor, mask: Any = None, indices: Any = None, return_all_codes: bool = False,
        sample_codebook_temp: Any = None, freeze_codebook: Any = False, beam_size: Any = None,
        rand_quantize_dropout_fixed_seed: Any = None,
    ) -> Any:  # fmt: skip
        if indices is not None or beam_size is not None or uncovered(self) or not _covered(x, mask):
            return forward(
                self, x, mask, indices, return_all_codes, sample_codebook_temp, freeze_codebook, beam_size,
                rand_quantize_dropout_fixed_seed,
            )  # fmt: skip
        vectors = self.project_in(x)
        n_stages = _number_of_stages(self, rand_quantize_dropout_fixed_seed, x.device, forward)
        residuals: list[Tensor] = []
        if _one_op([self], vectors, facts):
            quantized, chosen, losses = _all_stages([self], vectors, mask, freeze_codebook, n_stages, facts)
        else:
            quantized, chosen, losses, residuals = _stage_by_stage(
                self, vectors, mask, freeze_codebook, sample_codebook_temp, n_stages, frac_gradient
            )
        _finish_shared(self, residuals)
        if self.diveq:
            quantized = reparam(vectors, quantized)
        quantized = self.project_out(quantized)
        if mask is not None:
            padding = torch.zeros_like(quantized) if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask[..., None], quantized, padding)
        if not return_all_codes:
            return quantized, chosen, losses
        return quantized, chosen, losses, self.get_codes_from_indices(chosen)

    return method  # type: ignore[return-value]


def _finish_shared(rvq: Any, residuals: list[Tensor]) -> None:
    """What is done to a codebook that all stages share, after the last."""
    if not rvq.training or not rvq.shared_codebook:
        return
    first = rvq.layers[0]
    if rvq.vq_is_ema_updating:
        first._codebook.update_ema()
        first.update_in_place_optimizer()
    if residuals and first._codebook.has_dead_code_replacement:
        first.expire_codes_(torch.stack(residuals, dim=-2).flatten(-3, -2))


def grouped_forward(forward: FunctionType, residual: FunctionType, facts: Facts) -> FunctionType:
    """The method that replaces ``GroupedResidualVQ.forward``; ``residual`` is ``ResidualVQ.forward``."""
    get_maybe_sync_seed = helper(forward, "get_maybe_sync_seed")

    def method(
        self: Any, x: Tensor, indices: Any = None, return_all_codes: bool = False,
        sample_codebook_temp: Any = None, freeze_codebook: Any = False, mask: Any = None,
    ) -> Any:  # fmt: skip
        if indices is None and not return_all_codes and _covered(x, mask) and x.shape[-1] == self.dim:
            rvqs = list(self.rvqs)
            if _together(rvqs):
                vectors = x.unflatten(-1, (self.groups, -1)).movedim(-2, 0)
                if _one_op(rvqs, vectors, facts):
                    seed = get_maybe_sync_seed(x.device) if self.training else None
                    n_stages = _number_of_stages(rvqs[0], seed, x.device, residual)
                    quantized, chosen, losses = _all_stages(
                        rvqs, vectors, mask, freeze_codebook, n_stages, facts
                    )
                    for rvq in rvqs:
                        _finish_shared(rvq, [])
                    quantized = quantized.movedim(0, -2).flatten(-2)
                    if mask is not None and not rvqs[0].return_zeros_for_masked_padding:
                        quantized = torch.where(mask[..., None], quantized, x)
                    return quantized, chosen, losses
        return forward(self, x, indices, return_all_codes, sample_codebook_temp, freeze_codebook, mask)

    return method  # type: ignore[return-value]


_OF_GROUPS = (
    "training", "quantize_dropout", "quantize_dropout_cutoff_index", "quantize_dropout_multiple_of",
    "num_quantizers", "quant_grad_frac", "return_zeros_for_masked_padding",
)  # fmt: skip


def _together(rvqs: Sequence[Any]) -> bool:
    """Whether groups can be those of one op, but for their stages."""
    first = rvqs[0]
    return len(rvqs) > 1 and not any(
        hooked(rvq)
        or rvq.has_projections
        or uncovered(rvq)
        or any(getattr(rvq, name) != getattr(first, name) for name in _OF_GROUPS)
        for rvq in rvqs
    )
