"""Discretized logistics as the public libraries compute them, in the order of their own definitions."""

from __future__ import annotations

import math
import mmap

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf_testing.cases import normals

THRESHOLDS = {"openai": (-0.999, 0.999), "vdvae": (-0.999, 0.999), "nvae": (-0.999, 0.99)}


def level_values(levels: int, unit: bool = False) -> Tensor:
    k = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    return k if unit else 2 * k - 1


def parameters_of(batch: int, mixtures: int, channels: int, *space: int, seed: object = 0) -> Tensor:
    """[B, P, *]: means within and outside the range, log-scales on both sides of -7."""
    n = mixtures * (3 if channels == 1 else 10)
    p = normals((batch, n, *space), "mixture", seed)
    p = p.clone()
    blocks = p[:, mixtures:].unflatten(1, (channels, -1, mixtures))
    blocks[:, :, 0] *= 0.6
    blocks[:, :, 1] = blocks[:, :, 1] * 2.0 - 3.0
    return p


def far_apart(params: Tensor) -> Tensor:
    """[B, 3, N] in half precision, whose channels lie 2^30 elements apart in memory that is otherwise never
    touched."""
    stride = (1 << 30) + params.shape[0] * params.shape[2]
    room = torch.frombuffer(mmap.mmap(-1, 2 * 3 * stride), dtype=torch.float16)
    return room.as_strided(params.shape, (params.shape[2], stride, 1)).copy_(params)


def random_levels(shape: tuple[int, ...], levels: int = 256, unit: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(levels, shape, generator=generator).double() / (levels - 1)
    return k if unit else 2 * k - 1


def eager_nll(params: Tensor, x: Tensor, convention: str, levels: int = 256, low: float = -7.0) -> Tensor:
    """[B, P, *] and [B, C, *] to [B, *]: sums over mixtures of differences of distribution functions."""
    channels = x.shape[1]
    n_mix = params.shape[1] // (3 if channels == 1 else 10)
    if convention == "nvae":
        x = 2 * x - 1
    blocks = params[:, n_mix:].unflatten(1, (channels, -1, n_mix))
    means, log_scales = blocks[:, :, 0], blocks[:, :, 1].clamp(min=low)
    value = x[:, :, None]
    if channels == 3:
        c = torch.tanh(blocks[:, :, 2])
        green = means[:, 1] + c[:, 0] * value[:, 0]
        blue = means[:, 2] + c[:, 1] * value[:, 0] + c[:, 2] * value[:, 1]
        means = torch.stack([means[:, 0], green, blue], 1)
    centered, inverse, half = value - means, torch.exp(-log_scales), 1 / (levels - 1)
    plus, minus, middle = inverse * (centered + half), inverse * (centered - half), inverse * centered
    delta = torch.sigmoid(plus) - torch.sigmoid(minus)
    first, last = plus - F.softplus(plus), -F.softplus(minus)
    if convention == "default":
        # Far from the mean the difference cancels: there by an identity of the logistic function.
        identity = first + last + torch.log(-torch.expm1(minus - plus))
        edges, inside = (
            (half - 1, 1 - half),
            torch.where(delta > 1e-6, torch.log(delta.clamp(min=1e-6)), identity),
        )
    else:
        edges = THRESHOLDS[convention]
        density = middle - log_scales - 2 * F.softplus(middle) - math.log((levels - 1) / 2)
        inside = torch.where(delta > 1e-5, torch.log(delta.clamp(min=1e-12)), density)
    log_probs = torch.where(value < edges[0], first, torch.where(value > edges[1], last, inside))
    return -torch.logsumexp(log_probs.sum(1) + F.log_softmax(params[:, :n_mix], 1), 1)


def eager_sample(params: Tensor, u_mix: Tensor, u: Tensor, t: float = 1.0, nvae: bool = False) -> Tensor:
    """As public code draws, from its two arrays of uniforms [B, K, *] and [B, C, *]."""
    channels, n_mix = u.shape[1], u_mix.shape[1]
    chosen = torch.argmax(params[:, :n_mix] / t - torch.log(-torch.log(u_mix)), 1, keepdim=True)
    one_hot = torch.zeros_like(u_mix).scatter_(1, chosen, 1.0)[:, None]
    blocks = params[:, n_mix:].unflatten(1, (channels, -1, n_mix))
    means = (blocks[:, :, 0] * one_hot).sum(2)
    log_scales = (blocks[:, :, 1].clamp(min=-7.0) * one_hot).sum(2)
    scale = torch.exp(log_scales) / t if nvae else torch.exp(log_scales) * t
    x = means + scale * (torch.log(u) - torch.log(1 - u))
    values = [x[:, 0].clamp(-1, 1)]
    if channels == 3:
        c = (torch.tanh(blocks[:, :, 2]) * one_hot).sum(2)
        values.append((x[:, 1] + c[:, 0] * values[0]).clamp(-1, 1))
        values.append((x[:, 2] + c[:, 1] * values[0] + c[:, 2] * values[1]).clamp(-1, 1))
    out = torch.stack(values, 1)
    return out / 2 + 0.5 if nvae else out
