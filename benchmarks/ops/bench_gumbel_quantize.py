"""A discrete VAE's quantizer: a codeword drawn for each position, and the divergence of the logits.

Shapes are ``[B, K, H, W, D]``: logits [B, K, H, W] and codebook [K, D].
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops._gumbel_quantize_reference import reference_gumbels
from genperf.ops.gumbel_quantize import gumbel_quantize
from genperf.ops.philox_random import draw_key

_TEMPERATURE = 1.0


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    batch, n_codewords, height, width, dim = shape
    logits = torch.randn(batch, n_codewords, height, width).to(device, dtype)
    codebook = torch.randn(n_codewords, dim).to(device, dtype)
    return {"logits": logits.requires_grad_(), "codebook": codebook.requires_grad_()}


def _divergence(logits: Tensor) -> Tensor:
    q = logits.softmax(1)
    return (q * (q * logits.shape[1] + 1e-10).log()).sum(1).mean()


def eager(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """As taming-transformers does."""
    y = F.gumbel_softmax(logits, tau=_TEMPERATURE, hard=True, dim=1)
    return torch.einsum("bkhw,kd->bdhw", y, codebook), _divergence(logits)


def reference(logits: Tensor, codebook: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    soft = ((logits + noise) / _TEMPERATURE).softmax(1)
    hard = torch.zeros_like(soft).scatter_(1, (logits + noise).argmax(1, keepdim=True), 1.0)
    y = hard - soft.detach() + soft
    return torch.einsum("bkhw,kd->bdhw", y, codebook), _divergence(logits)


def genperf(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    out = gumbel_quantize(logits, codebook, _TEMPERATURE)
    assert out.kl is not None
    return out.quantized, out.kl.mean()


def genperf_torch_rng(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    out = gumbel_quantize(logits, codebook, _TEMPERATURE, rng="torch")
    assert out.kl is not None
    return out.quantized, out.kl.mean()


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
    """Reads the logits in each pass, and writes their gradient."""
    batch, n_codewords, height, width, dim = shape
    logits = batch * n_codewords * height * width * dtype.itemsize
    quantized = batch * dim * height * width * dtype.itemsize
    return {"fwd": logits + quantized, "bwd": 2 * logits + quantized, "fwd+bwd": 3 * logits + 2 * quantized}[
        mode
    ]


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """The product of codebook and gradient."""
    batch, n_codewords, height, width, dim = shape
    return 0 if mode == "fwd" else 2 * batch * n_codewords * height * width * dim


MODES = ("fwd", "fwd+bwd")
CASES = (
    Case((1, 8192, 32, 32, 256), modes=MODES),
    Case((4, 1024, 16, 16, 256), modes=MODES),
    Case((2, 512, 32, 32, 64), modes=MODES),
    Case((64, 512, 1, 1, 64), modes=MODES),
)

gumbel_quantize_philox = Benchmark(
    op="gumbel_quantize",
    cases=CASES,
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager},
    draws=draws,
    backends=("cpu", "triton"),
    compile=False,  # its draws are not torch's
)

gumbel_quantize_torch_rng = dataclasses.replace(
    gumbel_quantize_philox, op="gumbel_quantize_torch_rng", genperf=genperf_torch_rng, draws=draws_torch_rng
)
