"""The loss of PixelCNN++, VDVAE and NVAE: a discretized mixture of logistics over RGB images, summed.

Shapes are ``[B, K, H, W]``: parameters [B, 10 K, H, W] and images [B, 3, H, W] of 256 levels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.mixture_logistic_nll import mixture_logistic_nll


def parameters(shape: tuple[int, ...]) -> Tensor:
    batch, mixtures, height, width = shape
    params = torch.randn(batch, 10 * mixtures, height, width) * 0.5
    params[:, mixtures:].unflatten(1, (3, 3, mixtures))[:, :, 1] -= 3.0
    return params


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    batch, _, height, width = shape
    x = torch.randint(256, (batch, 3, height, width)) / 127.5 - 1.0
    return {"params": parameters(shape).to(device, dtype).requires_grad_(), "x": x.to(device)}


def eager(params: Tensor, x: Tensor) -> tuple[Tensor]:
    """In the operations of public code: OpenAI's definition."""
    k = params.shape[1] // 10
    logits, blocks = params[:, :k], params[:, k:].unflatten(1, (3, 3, k))
    means, log_scales, shares = blocks[:, :, 0], blocks[:, :, 1].clamp(min=-7.0), torch.tanh(blocks[:, :, 2])
    value = x[:, :, None]
    green = means[:, 1] + shares[:, 0] * value[:, 0]
    blue = means[:, 2] + shares[:, 1] * value[:, 0] + shares[:, 2] * value[:, 1]
    centered = value - torch.stack([means[:, 0], green, blue], 1)
    inverse = torch.exp(-log_scales)
    plus, minus, middle = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255), inverse * centered
    delta = torch.sigmoid(plus) - torch.sigmoid(minus)
    density = middle - log_scales - 2.0 * F.softplus(middle) - math.log(127.5)
    inside = torch.where(delta > 1e-5, torch.log(delta.clamp(min=1e-12)), density)
    first, last = plus - F.softplus(plus), -F.softplus(minus)
    log_probs = torch.where(value < -0.999, first, torch.where(value > 0.999, last, inside)).sum(1)
    return (-torch.logsumexp(log_probs + F.log_softmax(logits, 1), 1).sum(),)


def genperf(params: Tensor, x: Tensor) -> tuple[Tensor]:
    return (mixture_logistic_nll(params, x, convention="openai", reduction="sum"),)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    batch, mixtures, height, width = shape
    params = 10 * batch * mixtures * height * width * dtype.itemsize
    return {"fwd": 1, "bwd": 2, "fwd+bwd": 2}[mode] * params


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Not what bounds it: some hundred operations a mixture and channel, none of them in products."""
    return 0


mixture_logistic = Benchmark(
    op="mixture_logistic_nll",
    cases=(
        Case((64, 10, 32, 32), modes=("fwd", "fwd+bwd")),
        Case((16, 5, 28, 28), modes=("fwd", "fwd+bwd")),
        Case((1, 10, 1, 1), modes=("fwd",)),
    ),
    inputs=inputs,
    reference=eager,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager},
    backends=("cpu", "triton"),
)
