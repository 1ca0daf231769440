"""A one-hot draw from logits with the gradient of its relaxation, and the relaxation itself.

Shapes are ``[*, K]``, rows of classes, or ``[B, K, H, W]``, classes in dimension 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops._gumbel_quantize_reference import reference_gumbels
from genperf.ops.gumbel_softmax import gumbel_softmax
from genperf.ops.philox_random import draw_key


def _dim(logits: Tensor) -> int:
    return 1 if logits.dim() == 4 else -1


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {"logits": torch.randn(shape).to(device, dtype).requires_grad_()}


def _functions(hard: bool) -> dict[str, Any]:
    def eager(logits: Tensor) -> tuple[Tensor]:
        return (F.gumbel_softmax(logits, hard=hard, dim=_dim(logits)),)

    def reference(logits: Tensor, noise: Tensor) -> tuple[Tensor]:
        soft = (logits + noise).softmax(_dim(logits))
        if not hard:
            return (soft,)
        index = (logits + noise).argmax(_dim(logits), keepdim=True)
        return (torch.zeros_like(soft).scatter_(_dim(logits), index, 1.0) - soft.detach() + soft,)

    def genperf(logits: Tensor) -> tuple[Tensor]:
        return (gumbel_softmax(logits, hard=hard, dim=_dim(logits)),)

    return {"reference": reference, "genperf": genperf, "baselines": {"eager": eager}}


def _torch_rng(logits: Tensor) -> tuple[Tensor]:
    return (gumbel_softmax(logits, hard=True, dim=_dim(logits), rng="torch"),)


def draws(provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    logits = inputs["logits"]
    if provider.startswith("genperf/"):
        return {"noise": reference_gumbels(logits.shape, draw_key(logits.device))}
    return draws_torch_rng(provider, inputs, outputs)


def draws_torch_rng(
    provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    return {"noise": -torch.empty_like(inputs["logits"].detach()).exponential_().log()}


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads the logits and writes the result; reads logits and gradient, and writes the gradient."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return {"fwd": 2, "bwd": 3, "fwd+bwd": 5}[mode] * size


MODES = ("fwd", "fwd+bwd")
CASES = (
    Case((256, 8192), modes=MODES),
    Case((2, 512, 64, 32), modes=MODES),
    Case((4096, 32), modes=MODES),
    Case((64, 512, 1, 1), modes=MODES),
)

gumbel_softmax_hard = Benchmark(
    op="gumbel_softmax",
    cases=CASES,
    inputs=inputs,
    bytes=traffic,
    flops=lambda *_: 0,
    draws=draws,
    backends=("cpu", "triton"),
    **_functions(True),
)

gumbel_softmax_soft = dataclasses.replace(gumbel_softmax_hard, op="gumbel_softmax_soft", **_functions(False))

gumbel_softmax_torch_rng = dataclasses.replace(
    gumbel_softmax_hard, op="gumbel_softmax_torch_rng", genperf=_torch_rng, draws=draws_torch_rng
)
