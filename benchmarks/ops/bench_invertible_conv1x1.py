"""Activation normalization and the invertible 1x1 convolution of a flow, with the log-determinant.

Shapes are ``batch x channels x size``: images of a Glow at its levels. ``peer/matmul`` is the best ordinary
way: the scales folded into the matrix, one batched product. ``invertible_conv1x1_inverse`` is the way back,
as in sampling.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.invertible_conv1x1 import PLU, invertible_conv1x1


def _parameters(channels: int) -> dict[str, Tensor]:
    return {
        "shift": 0.1 * torch.randn(channels),
        "log_scale": 0.1 * torch.randn(channels),
    }


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    batch, channels, size = shape
    weight = torch.linalg.qr(torch.randn(channels, channels))[0]
    x = torch.randn(batch, channels, size, size).to(device, dtype)
    leaves = {
        "x": x,
        "weight": weight.to(device),
        **{k: t.to(device) for k, t in _parameters(channels).items()},
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def inputs_plu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    batch, channels, size = shape
    p, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
    s = upper.diag()
    leaves = {
        "x": torch.randn(batch, channels, size, size),
        **_parameters(channels),
        "lower": lower,
        "upper": upper.triu(1),
        "log_s": s.abs().log(),
    }
    made = {name: leaf.to(device).requires_grad_() for name, leaf in leaves.items()}
    return {**made, "p": p.to(device), "sign_s": s.sign().to(device)}


def _channels(parameter: Tensor) -> Tensor:
    return parameter.view(1, -1, 1, 1)


def eager(x: Tensor, weight: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    """As rosinality's and chaiyujin's modules do it."""
    y = F.conv2d(_channels(log_scale).exp() * (x + _channels(shift)), weight[:, :, None, None])
    return y, (x[0, 0].numel() * (log_scale.sum() + torch.linalg.slogdet(weight)[1])).expand(len(x))


def matmul(x: Tensor, weight: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    folded = weight * log_scale.exp()
    matrices = folded.expand(len(x), -1, -1)
    y = torch.baddbmm((folded @ shift)[:, None], matrices, x.flatten(2)).view(x.shape)
    return y, (x[0, 0].numel() * (log_scale.sum() + torch.linalg.slogdet(weight)[1])).expand(len(x))


def _modules(channels: int, shift: Tensor, log_scale: Tensor):
    """normflows' layers with these parameters, of which both forms run in the direction of the data."""
    from normflows.flows import ActNorm, Invertible1x1Conv

    norm, mixing = ActNorm((channels, 1, 1)), Invertible1x1Conv(channels)
    norm.data_dep_init_done.fill_(1.0)
    del norm.s, norm.t
    norm.s, norm.t = -_channels(log_scale), -_channels(shift)
    return norm, mixing


def normflows(x: Tensor, weight: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    norm, mixing = _modules(x.shape[1], shift, log_scale)
    del mixing.W
    mixing.W = weight
    y, of_norm = norm.inverse(x)
    y, of_mixing = mixing.inverse(y)
    return y, (of_norm + of_mixing).expand(len(x))


def genperf(x: Tensor, weight: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    return tuple(invertible_conv1x1(x, weight, shift=shift, log_scale=log_scale))


def eager_plu(
    x: Tensor,
    p: Tensor,
    lower: Tensor,
    upper: Tensor,
    sign_s: Tensor,
    log_s: Tensor,
    shift: Tensor,
    log_scale: Tensor,
) -> tuple[Tensor, ...]:
    unit = torch.eye(len(log_s)).to(lower)
    weight = p @ (lower.tril(-1) + unit) @ (upper.triu(1) + torch.diag(sign_s * log_s.exp()))
    y = F.conv2d(_channels(log_scale).exp() * (x + _channels(shift)), weight[:, :, None, None])
    return y, (x[0, 0].numel() * (log_scale.sum() + log_s.sum())).expand(len(x))


def genperf_plu(
    x: Tensor,
    p: Tensor,
    lower: Tensor,
    upper: Tensor,
    sign_s: Tensor,
    log_s: Tensor,
    shift: Tensor,
    log_scale: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(invertible_conv1x1(x, PLU(p, lower, upper, sign_s, log_s), shift=shift, log_scale=log_scale))


def eager_inverse(x: Tensor, weight: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    inverse = torch.linalg.inv(weight.double()).to(x.dtype)[:, :, None, None]
    y = F.conv2d(x, inverse) * (-_channels(log_scale)).exp() - _channels(shift)
    return y, -(x[0, 0].numel() * (log_scale.sum() + torch.linalg.slogdet(weight)[1])).expand(len(x))


def genperf_inverse(x: Tensor, weight: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    return tuple(invertible_conv1x1(x, weight, shift=shift, log_scale=log_scale, inverse=True))


def normflows_inverse(x: Tensor, weight: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    norm, mixing = _modules(x.shape[1], shift, log_scale)
    del mixing.W
    mixing.W = weight
    y, of_mixing = mixing.forward(x)
    y, of_norm = norm.forward(y)
    return y, (of_norm + of_mixing).expand(len(x))


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """fwd reads x and writes y; bwd reads x and the cotangent and writes a gradient."""
    batch, channels, size = shape
    return batch * channels * size * size * dtype.itemsize * {"fwd": 2, "bwd": 3, "fwd+bwd": 5}[mode]


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    batch, channels, size = shape
    return 2 * batch * channels**2 * size * size * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]


SHAPES = ((16, 12, 32), (16, 24, 16), (16, 48, 32), (16, 192, 16), (16, 384, 8), (4, 1024, 8))

dense = Benchmark(
    op="invertible_conv1x1",
    cases=tuple(Case(shape, modes=("fwd", "fwd+bwd")) for shape in SHAPES),
    inputs=inputs,
    reference=eager,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager, "peer/matmul": matmul, "peer/normflows": normflows},
    backends=("cpu", "triton"),
)

plu = dataclasses.replace(
    dense,
    op="invertible_conv1x1_plu",
    inputs=inputs_plu,
    reference=eager_plu,
    genperf=genperf_plu,
    baselines={"eager": eager_plu},
)

inverse = dataclasses.replace(
    dense,
    op="invertible_conv1x1_inverse",
    cases=tuple(Case(shape, modes=("fwd",)) for shape in SHAPES),
    reference=eager_inverse,
    genperf=genperf_inverse,
    baselines={"eager": eager_inverse, "peer/normflows": normflows_inverse},
)
