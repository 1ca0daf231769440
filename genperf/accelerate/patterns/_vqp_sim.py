"""The forward of ``SimVQ`` of vector-quantize-pytorch: its codebook is a network's image of a constant one.

Definition: Y. Zhu et al., "Addressing representation collapse in vector quantized models with one linear
layer", 2024 (arXiv:2411.02038).
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from genperf.ops.vector_quantize import vector_quantize


def _covered(sim: Any, x: Any) -> bool:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta or x.numel() == 0 or x.dim() < 2:
        return False
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return 0 <= sim.input_to_quantize_commit_loss_weight < float("inf")


def sim_forward(forward: FunctionType) -> FunctionType:
    """The method that replaces ``forward``."""

    def method(self: Any, x: Tensor) -> Any:
        if not _covered(self, x):
            return forward(self, x)
        codebook = self.codebook
        vectors = x.movedim(1, -1) if self.channel_first else x
        dtype = torch.promote_types(x.dtype, codebook.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        result = vector_quantize(
            vectors.to(wide), codebook.to(wide),
            estimator="rotation" if self.rotation_trick else "straight_through",
            commitment_weight=float(self.input_to_quantize_commit_loss_weight), codebook_weight=1.0,
        )  # fmt: skip
        quantized = result.quantized if x.requires_grad else result.quantized.detach()
        quantized = quantized.to(dtype)
        if self.channel_first:
            quantized = quantized.movedim(-1, 1)
        return quantized, result.indices, result.loss.to(dtype) * self.commitment_weight

    return method  # type: ignore[return-value]
