"""Modules of vector-quantize-pytorch as they are, under ``torch.compile`` and accelerated.

Shapes are ``vectors x codewords x dimensions``, and ``x stages`` of a ResidualVQ; x is [16, vectors / 16, D].
Mode "fwd" is evaluation; "fwd+bwd" is a step of training with the averages of the codebook, from the same
codebook in each call.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    n, n_codewords, dim, *stages = shape
    x = torch.randn(16, n // 16, dim).to(device, dtype).requires_grad_()
    # Residuals shrink from stage to stage, as they do where codebooks were trained.
    scale = 0.8 ** torch.arange(stages[0] if stages else 1.0)
    books = torch.randn(len(scale), n_codewords, dim) * scale[:, None, None]
    return {"x": x, "codebooks": books.to(device, dtype)}


@functools.lru_cache(maxsize=3)
def _module(provider: str, stages: int, n_codewords: int, dim: int) -> Any:
    from vector_quantize_pytorch import ResidualVQ, VectorQuantize

    import genperf

    if stages > 1:
        module = ResidualVQ(dim=dim, codebook_size=n_codewords, num_quantizers=stages)
    else:
        module = VectorQuantize(dim=dim, codebook_size=n_codewords)
    if provider == "genperf":
        genperf.accelerate(module, mode="training", strict=True)
    return (module, torch.compile(module, dynamic=False)) if provider == "compile" else (module, module)


def _run(provider: str, x: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
    module, run = _module(provider, *codebooks.shape)
    module.to(x.device).train(torch.is_grad_enabled())
    with torch.no_grad():
        for layer, codebook in zip(getattr(module, "layers", [module]), codebooks, strict=True):
            layer._codebook.embed.copy_(codebook[None])
    quantized, indices, loss = run(x)
    return (quantized, indices, loss) if module.training else (quantized, indices)


def eager(x: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
    return _run("eager", x, codebooks)


def compiled(x: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
    return _run("compile", x, codebooks)


def genperf(x: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
    return _run("genperf", x, codebooks)


def _rotated(x: Tensor, q: Tensor) -> Tensor:
    """q, with the gradient of the rotation and scaling of x that give it."""
    x_length, q_length = (y.detach().norm(dim=-1, keepdim=True) for y in (x, q))
    u, v = x.detach() / x_length, q.detach() / q_length
    w = torch.nn.functional.normalize(u + v, dim=-1)
    turned = x - 2 * (x * w).sum(-1, keepdim=True) * w + 2 * (x * u).sum(-1, keepdim=True) * v
    return turned * (q_length / x_length)


def of_training(x: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
    residual, total, indices, losses = x, torch.zeros_like(x), [], []
    for codebook in codebooks:
        parts = residual.detach().flatten(0, -2).split(max(1, 2**24 // len(codebook)))
        index = torch.cat([torch.cdist(part, codebook).argmin(1) for part in parts]).view(x.shape[:-1])
        q = codebook[index]
        losses.append((q - residual).square().mean())
        total = total + _rotated(residual, q)
        residual = residual - q
        indices.append(index)
    if len(codebooks) == 1:
        return total, indices[0], losses[0]
    return total, torch.stack(indices, dim=-1), torch.stack(losses)


def of_evaluation(x: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
    return of_training(x, codebooks)[:2]


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads vectors and codebooks, writes quantized vectors and indices; a step also reads a gradient, writes
    one, and updates the codebook and its average."""
    n, n_codewords, dim, *stages = shape
    words, vectors = n_codewords * dim * (stages[0] if stages else 1), n * dim
    elements = words + 2 * vectors if mode == "fwd" else 4 * words + 4 * vectors
    return elements * dtype.itemsize + 8 * n * (stages[0] if stages else 1)


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    n, n_codewords, dim, *stages = shape
    return 2 * n * n_codewords * dim * (stages[0] if stages else 1)


SHAPES = ((16384, 512, 64), (16384, 8192, 32), (16384, 1024, 128, 8), (64, 512, 64))

evaluation = Benchmark(
    op="vector_quantize_modules_eval",
    cases=tuple(Case(shape, modes=("fwd",)) for shape in SHAPES),
    inputs=inputs,
    reference=of_evaluation,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager, "compile": compiled},
    backends=("cpu",),
    compile=False,
    group="vector_quantize_modules",
)

training = dataclasses.replace(
    evaluation,
    op="vector_quantize_modules_train",
    cases=tuple(Case(shape, modes=("fwd+bwd",)) for shape in SHAPES),
    reference=of_training,
)
