"""Residual vector quantization of standard normal vectors.

Shapes are ``vectors x codewords x dimensions x stages``. Codewords are shorter from stage to stage, as
residuals are. The peer does not update its codebooks, which would change them from call to call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops import residual_vector_quantize

Outputs = tuple[Tensor, Tensor, Tensor]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    n, n_codewords, dim, stages = shape
    decay = 0.9 ** torch.arange(stages).view(-1, 1, 1)
    codebooks = torch.randn(stages, n_codewords, dim) * 0.5 * decay
    return {
        "x": torch.randn(n, dim).to(device, dtype).requires_grad_(),
        "codebooks": codebooks.to(device, dtype),
    }


def stage_by_stage(x: Tensor, codebooks: Tensor, search: Any) -> Outputs:
    residual, total, indices, losses = x, torch.zeros_like(x), [], []
    for codebook in codebooks:
        index = search(residual.detach(), codebook)
        q = codebook[index]
        losses.append((q - residual).square().mean())
        total = total + residual + (q - residual).detach()
        residual = residual - q
        indices.append(index)
    return total, torch.stack(indices, -1), torch.stack(losses)


def by_product(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def by_distance(x: Tensor, codebook: Tensor) -> Tensor:
    parts = x.split(max(1, 2**24 // len(codebook)))
    return torch.cat([torch.cdist(part, codebook).argmin(1) for part in parts])


def eager(x: Tensor, codebooks: Tensor) -> Outputs:
    """One product with the bias and one argmin for each stage."""
    return stage_by_stage(x, codebooks, by_product)


def reference(x: Tensor, codebooks: Tensor) -> Outputs:
    return stage_by_stage(x, codebooks, by_distance)


@functools.lru_cache(maxsize=1)
def _module(stages: int, n_codewords: int, dim: int) -> Any:
    from vector_quantize_pytorch import ResidualVQ

    return ResidualVQ(dim=dim, num_quantizers=stages, codebook_size=n_codewords, rotation_trick=False)


def vector_quantize_pytorch(x: Tensor, codebooks: Tensor) -> Outputs:
    """In training, with the straight-through estimator."""
    module = _module(*codebooks.shape).to(x).train()
    with torch.no_grad():
        for layer, codebook in zip(module.layers, codebooks, strict=True):
            layer._codebook.embed.copy_(codebook[None])
    quantized, indices, losses = module(x[None], freeze_codebook=True)
    return quantized[0], indices[0], losses


def genperf(x: Tensor, codebooks: Tensor) -> Outputs:
    out = residual_vector_quantize(x, codebooks)
    return out.quantized, out.indices, out.losses


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads the vectors and the codebooks, and writes the sums and an index for each stage."""
    n, n_codewords, dim, stages = shape
    forward = (2 * n * dim + stages * n_codewords * dim) * dtype.itemsize + n * stages * 8
    backward = (3 * n * dim + stages * n_codewords * dim) * dtype.itemsize + n * stages * 8
    return forward * ("fwd" in mode) + backward * ("bwd" in mode)


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    n, n_codewords, dim, stages = shape
    forward, backward = stages * n * dim * (2 * n_codewords + 4), stages * n * dim * 4
    return forward * ("fwd" in mode) + backward * ("bwd" in mode)


MODES = ("fwd", "fwd+bwd")

residual_vq = Benchmark(
    op="residual_vector_quantize",
    cases=(
        Case((16384, 1024, 128, 8), modes=MODES),
        Case((2048, 2048, 256, 16), modes=("fwd",)),
        Case((75, 1024, 128, 8), modes=MODES),
        Case((1, 1024, 128, 8), modes=("fwd",)),
        Case((1, 2048, 256, 32), modes=("fwd",)),
    ),
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager, "peer/vector-quantize-pytorch": vector_quantize_pytorch},
    backends=("cpu", "triton"),
)
