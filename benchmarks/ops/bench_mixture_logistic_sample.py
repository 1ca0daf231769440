"""Drawing RGB images from a mixture of logistics, as PixelCNN++, VDVAE and NVAE do.

Shapes are ``[B, K, H, W]``: parameters [B, 10 K, H, W], images [B, 3, H, W]. One pixel is what a loop over
pixels draws at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.benchmarks.ops.bench_mixture_logistic_nll import parameters
from genperf.ops.mixture_logistic_sample import mixture_logistic_sample
from genperf.ops.philox_random import draw_key, philox_random


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {"params": parameters(shape).to(device, dtype)}


def _draw(params: Tensor, chosen: Tensor, u: Tensor) -> Tensor:
    """From the mixture of each pixel [B, 1, H, W] and uniforms [B, 3, H, W]."""
    k = params.shape[1] // 10
    one_hot = torch.zeros_like(params[:, :k]).scatter_(1, chosen, 1.0)[:, None]
    blocks = params[:, k:].unflatten(1, (3, 3, k))
    means = (blocks[:, :, 0] * one_hot).sum(2)
    log_scales = (blocks[:, :, 1] * one_hot).sum(2).clamp(min=-7.0)
    shares = (torch.tanh(blocks[:, :, 2]) * one_hot).sum(2)
    x = means + torch.exp(log_scales) * (torch.log(u) - torch.log(1.0 - u))
    red = x[:, 0].clamp(-1.0, 1.0)
    green = (x[:, 1] + shares[:, 0] * red).clamp(-1.0, 1.0)
    blue = (x[:, 2] + shares[:, 1] * red + shares[:, 2] * green).clamp(-1.0, 1.0)
    return torch.stack([red, green, blue], 1)


def _uniforms(params: Tensor, channels: int) -> Tensor:
    return params.new_empty(len(params), channels, *params.shape[2:]).uniform_(1e-5, 1.0 - 1e-5)


def eager(params: Tensor) -> tuple[Tensor]:
    """In the operations of public code, with one-hot selection."""
    k = params.shape[1] // 10
    scores = params[:, :k] - torch.log(-torch.log(_uniforms(params, k)))
    return (_draw(params, scores.argmax(1, keepdim=True), _uniforms(params, 3)),)


def reference(params: Tensor, chosen: Tensor, u: Tensor) -> tuple[Tensor]:
    return (_draw(params, chosen, u.to(params.dtype)),)


def genperf(params: Tensor) -> tuple[Tensor]:
    return (mixture_logistic_sample(params),)


def draws(provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    params = inputs["params"]
    k = params.shape[1] // 10
    if not provider.startswith("genperf/"):
        chosen = (params[:, :k] - torch.log(-torch.log(_uniforms(params, k)))).argmax(1, keepdim=True)
        return {"chosen": chosen, "u": _uniforms(params, 3)}
    noise = philox_random((len(params), *params.shape[2:], 4), draw_key(params.device), "uniform").movedim(
        -1, 1
    )
    sums = params[:, :k].double().softmax(1).cumsum(1)
    chosen = (sums < noise[:, :1].double()).sum(1, keepdim=True).clamp(max=k - 1)
    return {"chosen": chosen, "u": noise[:, 1:].clamp(1e-5, 1.0 - 1e-5)}


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads the logits, nine parameters of the mixture that was drawn, and writes a pixel."""
    batch, mixtures, height, width = shape
    return (mixtures + 9 + 3) * batch * height * width * dtype.itemsize


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return 0


mixture_logistic_samples = Benchmark(
    op="mixture_logistic_sample",
    cases=(Case((64, 10, 32, 32), modes=("fwd",)), Case((1, 10, 1, 1), modes=("fwd",))),
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
