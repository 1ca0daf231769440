"""Residual vector quantization as modules, with the options, state and results of vector-quantize-pytorch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genperf.nn.vector_quantize import _checks
from genperf.nn.vector_quantize._stages import Observed, covers, quantize_at_once
from genperf.nn.vector_quantize.codebook import update
from genperf.nn.vector_quantize.vector_quantize import VectorQuantize


class _Residual(nn.Module):
    """The call of a quantizer whose ``quantize`` leaves the update of its codewords to be done."""

    draw_cutoff: Callable[..., Tensor | None]
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor, Observed]]
    get_codes_from_indices: Callable[[Tensor], Tensor]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        return_all_codes: bool = False,
        freeze_codebook: bool | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize; in training, update the codewords too.

        Args:
            x: [B, *, dim], or [B, dim, H, W] with ``accept_image_fmap``.
            mask, freeze_codebook: as of :class:`VectorQuantize`.
            return_all_codes: whether to return the codewords of each stage too.
            rand_quantize_dropout_fixed_seed: of the number of stages kept by dropout.

        Returns:
            ``quantized``, shape and dtype of x; ``indices``, int64 [B, *, Q], -1 for stages left out;
            ``losses`` [Q], 0 for these; and, if asked for, the codewords [Q, B, *, D]. Of groups, which leave
            out the same stages: [G, B, *, Q], [G, Q] and [G, Q, B, *, D].
        """
        cutoff = self.draw_cutoff(x.device, rand_quantize_dropout_fixed_seed)
        *result, observed = self.quantize(x, mask, freeze_codebook, cutoff)
        update(observed)
        if return_all_codes:
            result.append(self.get_codes_from_indices(result[1]))
        return tuple(result)


class ResidualVQ(_Residual):
    """Stages of vector quantization, each of what the ones before left (arXiv:2107.03312, algorithm 1).

    Call-compatible with ``ResidualVQ`` of vector-quantize-pytorch 1.32 for the options below, and with its
    ``state_dict``; see :class:`VectorQuantize` for what differs. All stages update their codewords after the
    last one, with one all-reduce. A stage sees residuals in float32 at least, where the other rounds them to
    half precision. Dropout is drawn on the device: no host synchronisation, and one compiled graph.

    Args:
        dim: channels of the input.
        num_quantizers: the number of stages Q; None for the length of ``codebook_size``.
        codebook_size: the number of codewords, or a tuple with that of each stage.
        codebook_dim: D; with another than ``dim``, ``project_in`` and ``project_out`` lead there and back.
        shared_codebook: whether all stages have one codebook.
        quantize_dropout: whether training leaves out the stages after a random one, drawn in each call.
        quantize_dropout_cutoff_index: the first stage that may be the last.
        quantize_dropout_multiple_of: of which the number of stages then is a multiple.
        accept_image_fmap: take [B, dim, H, W].
        quant_grad_frac: the share of the gradient that reaches the codewords of earlier stages by their
            residuals.
        return_zeros_for_masked_padding: what masked positions of the output hold: 0, or the input.
        vq_kwargs: further arguments of :class:`VectorQuantize`, for all stages.

    Raises:
        TypeError, ValueError: for arguments that do not fit, here and in the call; the message says which.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise ValueError("num_quantizers is None, expected a number or codebook_size as a tuple")
        sizes = (
            codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * (num_quantizers or 0)
        )
        num_quantizers = len(sizes) if num_quantizers is None else num_quantizers
        _checks.check_sizes(
            {"dim": dim, "codebook_dim": codebook_dim, "num_quantizers": num_quantizers}
            | {"quantize_dropout_multiple_of": quantize_dropout_multiple_of}
        )
        _checks.check_stages(sizes, num_quantizers, shared_codebook, quantize_dropout_cutoff_index, vq_kwargs)
        self.has_projections = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self.dim, self.codebook_dim, self.num_quantizers = dim, codebook_dim, num_quantizers
        self.codebook_sizes = tuple(sizes)
        self.shared_codebook = shared_codebook
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.accept_image_fmap = accept_image_fmap
        self.quant_grad_frac = quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.layers = nn.ModuleList(
            VectorQuantize(codebook_dim, size, accept_image_fmap=accept_image_fmap, **vq_kwargs)
            for size in sizes
        )
        if shared_codebook:
            for layer in self._stages[1:]:
                layer._codebook = self._stages[0]._codebook

    @property
    def _stages(self) -> list[VectorQuantize]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def codebook_size(self) -> int:
        """The number of codewords of the first stage."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codewords [Q, K, D]; a tuple with [K, D] of each stage where sizes differ."""
        codebooks = tuple(layer.codebook for layer in self._stages)
        return torch.stack(codebooks) if len(set(self.codebook_sizes)) == 1 else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codewords [Q, *, D] of indices [*, Q] (or of the first stages alone); 0 for an index of -1."""
        if not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"ResidualVQ: indices has shape {tuple(indices.shape)}, expected at most "
                f"{self.num_quantizers} stages in the last dimension"
            )
        codes = []
        for layer, index in zip(self._stages, indices.unbind(-1), strict=False):
            found = layer.codebook[index.clamp(min=0)]
            codes.append(torch.where((index >= 0)[..., None], found, 0.0))
        codes += [torch.zeros_like(codes[0])] * (self.num_quantizers - len(codes))
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output [*, dim] of indices [*, Q] that a call returned, with the channels last."""
        return self.project_out(self.get_codes_from_indices(indices).sum(0))

    def draw_cutoff(self, device: torch.device, seed: int | None = None) -> Tensor | None:
        """The last stage of a call, int64 [], or None without dropout.

        Args:
            seed: for the stage that vector-quantize-pytorch draws from it; None for torch's generator.
        """
        if not (self.training and self.quantize_dropout):
            return None
        low, high, multiple = (
            self.quantize_dropout_cutoff_index, self.num_quantizers, self.quantize_dropout_multiple_of
        )  # fmt: skip
        if seed is None:
            last = torch.randint(low, high, (), device=device)
        else:
            last = torch.full((), random.Random(seed).randrange(low, high), device=device)
        return (last + multiple) // multiple * multiple - 1

    def quantize(
        self, x: Tensor, mask: Tensor | None, frozen: bool | None, cutoff: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Observed]:
        """What a call returns, and what is left to :func:`update`. ``cutoff``: of :meth:`draw_cutoff`."""
        channel = 1 if self.accept_image_fmap else x.dim() - 1
        _checks.check_input(x, self.dim, channel, "ResidualVQ")
        mask = _checks.checked_mask(x, mask, None, channel, "ResidualVQ")
        residual, inner = x, channel
        if self.has_projections:
            dtype: torch.dtype = self.project_out.weight.dtype  # type: ignore[assignment]
            residual, inner = self.project_in(x.movedim(channel, -1).to(dtype)), x.dim() - 1
        frozen = self._stages[0].freeze_codebook if frozen is None else frozen
        quantized, indices, losses, observed = self._quantize(residual, mask, frozen, inner, cutoff)
        if self.has_projections:
            quantized = self.project_out(quantized.to(dtype)).movedim(-1, channel)
        quantized = quantized.to(x.dtype)
        if mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask.unsqueeze(channel), quantized, padding)
            indices = torch.where(mask[..., None], indices, -1)
        return quantized, indices, losses, observed

    def _quantize(
        self, x: Tensor, mask: Tensor | None, frozen: bool, channel: int, cutoff: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Observed]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if all(covers(layer) for layer in self._stages):
            *result, observed = quantize_at_once(
                [self._stages], x[None], mask, frozen, channel + 1, cutoff, self.quant_grad_frac
            )
            quantized, indices, losses = (one[0] for one in result)
            return quantized, indices, losses, observed
        return self._quantize_by_stages(x, mask, frozen, channel, cutoff)

    def _quantize_by_stages(
        self, residual: Tensor, mask: Tensor | None, frozen: bool, channel: int, cutoff: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Observed]:
        total = torch.zeros_like(residual)
        indices: list[Tensor] = []
        losses: list[Tensor] = []
        observed: Observed = []
        for i, layer in enumerate(self._stages):
            active = None if cutoff is None else cutoff >= i
            part = (i, self.num_quantizers) if self.shared_codebook else (0, 1)
            stage = layer.quantize(residual, mask, frozen, channel, active, part)
            passed = stage.quantized.detach()
            if self.quant_grad_frac > 0:
                passed = passed + self.quant_grad_frac * (stage.quantized - passed)
            residual = residual - passed
            if active is None:
                total = total + stage.quantized
                indices.append(stage.indices)
                losses.append(stage.loss)
            else:
                total = torch.where(active, total + stage.quantized, total)
                indices.append(torch.where(active, stage.indices, -1))
                losses.append(torch.where(active, stage.loss, 0.0))
            observed += stage.observed
        return total, torch.stack(indices, dim=-1), torch.stack(losses), observed


class GroupedResidualVQ(_Residual):
    """Residual quantization of each group of channels (D. Yang et al., "HiFi-Codec", arXiv:2305.02765).

    Call-compatible with ``GroupedResidualVQ`` of vector-quantize-pytorch 1.32 for the options of
    :class:`ResidualVQ`, and with its ``state_dict``.

    Args:
        dim: channels of the input, a multiple of ``groups``.
        groups: G.
        accept_image_fmap: take [B, dim, H, W].
        kwargs: further arguments of the :class:`ResidualVQ` of each group.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        _checks.check_sizes({"dim": dim, "groups": groups})
        if dim % groups:
            raise ValueError(f"dim is {dim}, expected a multiple of groups, which is {groups}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs)
            for _ in range(groups)
        )

    @property
    def _groups(self) -> list[ResidualVQ]:
        return list(self.rvqs)  # type: ignore[arg-type]

    @property
    def split_dim(self) -> int:
        """The dimension of channels."""
        return 1 if self.accept_image_fmap else -1

    @property
    def codebooks(self) -> Tensor:
        """The codewords [G, Q, K, D]."""
        return torch.stack([rvq.codebooks for rvq in self._groups])  # type: ignore[misc]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codewords [G, Q, *, D] of indices [G, *, Q]."""
        return torch.stack(
            [rvq.get_codes_from_indices(one) for rvq, one in zip(self._groups, indices, strict=True)]
        )

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output [*, dim] of indices [G, *, Q] that a call returned, with the channels last."""
        outputs = [rvq.get_output_from_indices(one) for rvq, one in zip(self._groups, indices, strict=True)]
        return torch.cat(outputs, dim=-1)

    def draw_cutoff(self, device: torch.device, seed: int | None = None) -> Tensor | None:
        """As of :class:`ResidualVQ`; the same for all groups."""
        return self._groups[0].draw_cutoff(device, seed)

    def quantize(
        self, x: Tensor, mask: Tensor | None, frozen: bool | None, cutoff: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Observed]:
        """As of :class:`ResidualVQ`."""
        _checks.check_input(x, self.dim, self.split_dim % x.dim(), "GroupedResidualVQ")
        first = self._groups[0]
        if not first.has_projections and all(covers(layer) for rvq in self._groups for layer in rvq._stages):
            channel = self.split_dim % x.dim()
            mask = _checks.checked_mask(x, mask, None, channel, "GroupedResidualVQ")
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            quantized, indices, losses, observed = quantize_at_once(
                [rvq._stages for rvq in self._groups],
                wide.unflatten(channel, (self.groups, -1)).movedim(channel, 0),
                mask,
                first._stages[0].freeze_codebook if frozen is None else frozen,
                channel + 1,
                cutoff,
                first.quant_grad_frac,
            )
            quantized = quantized.movedim(0, channel).flatten(channel, channel + 1).to(x.dtype)
            if mask is not None and not first.return_zeros_for_masked_padding:
                quantized = torch.where(mask.unsqueeze(channel), quantized, x)
            return quantized, indices, losses, observed
        parts: list[list[Tensor]] = []
        observed = []
        for rvq, chunk in zip(self._groups, x.chunk(self.groups, dim=self.split_dim), strict=True):
            *part, seen = rvq.quantize(chunk, mask, frozen, cutoff)
            parts.append(part)
            observed += seen
        outputs, chosen, terms = map(list, zip(*parts, strict=True))
        return torch.cat(outputs, dim=self.split_dim), torch.stack(chosen), torch.stack(terms), observed
