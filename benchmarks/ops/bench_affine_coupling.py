"""The affine coupling between a network and the next layer of a flow; shapes are those of x, ``B x C x *``.

Baselines are the formulas of public libraries, as they stand there; all compute y and log|det| by sample.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.affine_coupling import affine_coupling

_MODES = ("fwd", "fwd+bwd")
_IMAGES = (
    Case((16, 12, 32, 32), modes=_MODES),
    Case((16, 48, 16, 16), modes=_MODES),
    Case((64, 12, 16, 16), modes=_MODES),
)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    x, h = (torch.randn(shape).to(device, dtype) for _ in range(2))
    return {"x": x.requires_grad_(), "h": h.requires_grad_()}


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def rosinality(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    x1, x2 = x.chunk(2, 1)
    log_s, t = h.chunk(2, 1)
    s = torch.sigmoid(log_s + 2)
    return torch.cat([x1, (x2 + t) * s], 1), _sum(torch.log(s))


def chaiyujin(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    x1, x2 = x.chunk(2, 1)
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2.0)
    return torch.cat((x1, (x2 + shift) * scale), 1), _sum(torch.log(scale))


def waveglow(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    x1, x2 = x.chunk(2, 1)
    b, log_s = h.chunk(2, 1)
    return torch.cat([x1, torch.exp(log_s) * x2 + b], 1), _sum(log_s)


def freia(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    x1, x2 = x.chunk(2, 1)
    a = h * 0.1
    log_s = 2.0 * torch.tanh(a[:, : x2.shape[1]])
    return torch.cat((x1, x2 * torch.exp(log_s) + a[:, x2.shape[1] :]), 1), _sum(log_s)


def nflows(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    x1, x2 = x.chunk(2, 1)
    shift, raw = h.chunk(2, 1)
    scale = (F.softplus(raw) + 1e-3).clamp(0, 3)
    return torch.cat([x1, x2 * scale + shift], 1), _sum(torch.log(scale))


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """fwd reads x and h and writes y; bwd reads gy, half of y and h, and writes gx and gh."""
    halves = {"fwd": 6, "bwd": 9, "fwd+bwd": 15}[mode]
    return halves * math.prod(shape) * dtype.itemsize // 2


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return {"fwd": 6, "bwd": 8, "fwd+bwd": 14}[mode] * math.prod(shape) // 2


affine_coupling_rosinality = Benchmark(
    op="affine_coupling_rosinality",
    cases=(*_IMAGES, Case((16, 12, 32, 32), torch.bfloat16, modes=_MODES)),
    inputs=inputs,
    reference=rosinality,
    bytes=traffic,
    flops=arithmetic,
    genperf=lambda x, h: tuple(affine_coupling(x, h, shift_first=False)),
    baselines={"eager": rosinality},
    backends=("cpu", "triton"),
)
affine_coupling_chaiyujin = dataclasses.replace(
    affine_coupling_rosinality,
    op="affine_coupling_chaiyujin",
    cases=_IMAGES,
    reference=chaiyujin,
    genperf=lambda x, h: tuple(affine_coupling(x, h, layout="interleaved")),
    baselines={"eager": chaiyujin},
)
affine_coupling_waveglow = dataclasses.replace(
    affine_coupling_rosinality,
    op="affine_coupling_waveglow",
    cases=(Case((12, 8, 2000), modes=_MODES),),
    reference=waveglow,
    genperf=lambda x, h: tuple(affine_coupling(x, h, scale="exp", form="scale_shift")),
    baselines={"eager": waveglow},
)
affine_coupling_freia = dataclasses.replace(
    affine_coupling_rosinality,
    op="affine_coupling_freia",
    cases=(*_IMAGES[:2], Case((512, 64), modes=_MODES)),
    reference=freia,
    genperf=lambda x, h: tuple(
        affine_coupling(
            x, h, scale="tanh", form="scale_shift", shift_first=False, clamp=2.0, slope=1.0, prefactor=0.1
        )
    ),
    baselines={"eager": freia},
)
affine_coupling_nflows = dataclasses.replace(
    affine_coupling_rosinality,
    op="affine_coupling_nflows",
    cases=_IMAGES[:2],
    reference=nflows,
    genperf=lambda x, h: tuple(affine_coupling(x, h, scale="softplus", form="scale_shift")),
    baselines={"eager": nflows},
)
