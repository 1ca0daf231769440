"""A VAE's step between encoder and decoder: ``z = mean + exp(logvar / 2) * noise``, and its KL per sample.

``params`` [B, 2C, *] holds the halves mean and logvar, as encoders write them; shapes name z [B, C, *].
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.bench.noise import philox_normal, plausible_normal, torch_normal
from genperf.ops import draw_key, gaussian_sample

_BOUNDS = (-30.0, 20.0)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    batch, channels, *space = shape
    params = torch.randn(batch, 2 * channels, *space).to(device, dtype)
    return {"params": params.requires_grad_()}


def _moments(params: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, logvar = params.chunk(2, dim=1)
    logvar = torch.clamp(logvar, *_BOUNDS)
    std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
    z = mean + std * (torch.randn_like(mean) if noise is None else noise)
    kl = 0.5 * torch.sum(torch.pow(mean, 2) + var - 1.0 - logvar, dim=list(range(1, mean.dim())))
    return z, kl


def eager(params: Tensor) -> tuple[Tensor, Tensor]:
    return _moments(params, None)


def reference(params: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return _moments(params, noise)


def diffusers(params: Tensor) -> tuple[Tensor, Tensor]:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    if params.dim() != 4:
        raise NotImplementedError("DiagonalGaussianDistribution.kl takes images only")
    posterior = DiagonalGaussianDistribution(params)
    return posterior.sample(), posterior.kl()


def genperf(params: Tensor) -> tuple[Tensor, Tensor]:
    out = gaussian_sample(params, clamp=_BOUNDS)
    return out.z, out.kl


def genperf_torch_rng(params: Tensor) -> tuple[Tensor, Tensor]:
    out = gaussian_sample(params, clamp=_BOUNDS, rng="torch")
    return out.z, out.kl


def draws(provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    mean, _ = inputs["params"].chunk(2, dim=1)
    if provider.startswith("genperf/"):
        return {"noise": philox_normal(mean.shape, draw_key(mean.device))}
    return draws_torch_rng(provider, inputs, outputs)


def draws_torch_rng(
    provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    mean, logvar = inputs["params"].detach().chunk(2, dim=1)
    if provider == "compile":
        std = torch.exp(0.5 * logvar.double().clamp(*_BOUNDS))
        return {"noise": plausible_normal((outputs[0].double() - mean.double()) / std)}
    return {"noise": torch_normal(mean.shape, mean.dtype, mean.device)}


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """fwd reads mean and logvar and writes z; bwd reads those and z's cotangent and writes two gradients."""
    tensors = {"fwd": 3, "bwd": 5, "fwd+bwd": 8}[mode]
    return tensors * math.prod(shape) * dtype.itemsize


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """One for each elementary function, product and sum: 5 a normal number, 10 for the rest, both ways."""
    return {"fwd": 15, "bwd": 15, "fwd+bwd": 30}[mode] * math.prod(shape)


philox = Benchmark(
    op="gaussian_sample",
    cases=(
        Case((64, 4, 64, 64)),
        Case((64, 4, 64, 64), torch.bfloat16),
        Case((256, 128)),
        Case((64, 384, 16, 16)),
        Case((32, 20, 16, 16)),
        Case((16, 4, 128, 128)),
    ),
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager, "peer/diffusers": diffusers},
    draws=draws,
)

torch_rng = dataclasses.replace(
    philox, op="gaussian_sample_torch_rng", genperf=genperf_torch_rng, draws=draws_torch_rng
)
