"""A training step of Glow's steps: activation normalization, 1x1 convolution, affine coupling, and again.

Shapes are ``steps x batch x channels x height x width x hidden``. ``eager`` is a step as the public
implementations write it, one torch operation after another. ``glow_reversible`` rebuilds activations,
``glow_stored`` keeps them. Peak memory is beyond the parameters and their gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.nn.flows import GlowStep, ReversibleSequence

NAMES = (
    "actnorm.shift", "actnorm.log_scale", "conv.weight", "coupling.net.conv1.weight",
    "coupling.net.conv1.bias", "coupling.net.conv2.weight", "coupling.net.conv2.bias",
    "coupling.net.out.weight", "coupling.net.out.bias", "coupling.net.out.scale",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def model(steps: int, channels: int, hidden: int) -> ReversibleSequence:
    """Numbers as training leaves them: nothing is 0, mixing matrices are no rotations.

    Biases are large enough that rounding turns no ReLU on or off: gradients jump there, and their errors
    would be a matter of luck.
    """
    torch.manual_seed(0)
    made = ReversibleSequence([GlowStep(channels, hidden=hidden) for _ in range(steps)])
    deviations = {"weight": 0.05, "conv1.weight": 0.02, "conv2.weight": 0.02, "out.weight": 0.003}
    with torch.no_grad():
        for step in made:
            step.get_buffer("actnorm.initialized").fill_(1)
            for name in NAMES:
                parameter = step.get_parameter(name)
                noise = torch.randn_like(parameter)
                if name == "conv.weight":
                    parameter.add_(0.05 * noise)
                elif name.endswith(("conv1.bias", "conv2.bias")):
                    parameter.copy_(noise.sign() * (1 if "1" in name else 2))
                else:
                    parameter.copy_(noise * deviations.get(name.removeprefix("coupling.net."), 0.05))
    return made


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    steps, batch, channels, height, width, hidden = shape
    flow = model(steps, channels, hidden).to(device)
    return {
        "shape": shape,
        "initialized": torch.ones((), dtype=torch.uint8, device=device),
        "x": torch.randn(batch, channels, height, width).to(device, dtype),
        **{f"{i}.{name}": step.get_parameter(name) for i, step in enumerate(flow) for name in NAMES},
    }


def parameters(inputs: dict[str, Any]) -> list[Tensor]:
    """Of all steps."""
    return [inputs[f"{i}.{name}"] for i in range(inputs["shape"][0]) for name in NAMES]


def eager(shape: tuple[int, ...], initialized: Tensor, x: Tensor, **parameters: Tensor) -> tuple[Tensor, ...]:
    positions = x.shape[2] * x.shape[3]
    logdet = x.new_zeros(len(x))
    for i in range(shape[0]):
        shift, log_scale, weight, w1, b1, w2, b2, w3, b3, scale = (parameters[f"{i}.{n}"] for n in NAMES)
        assert initialized.item() == 1  # as each activation normalization asks
        x = log_scale.exp()[:, None, None] * (x + shift[:, None, None])
        x = F.conv2d(x, weight[:, :, None, None])
        logdet = logdet + positions * (log_scale.sum() + torch.slogdet(weight.double())[1].to(x.dtype))
        a, b = x.chunk(2, 1)
        h = F.relu(F.conv2d(a, w1, b1, padding=1), inplace=True)
        h = F.relu(F.conv2d(h, w2, b2), inplace=True)
        h = F.conv2d(F.pad(h, [1, 1, 1, 1], value=1.0), w3, b3) * (3 * scale).exp()[:, None, None]
        log_s, t = h.chunk(2, 1)
        s = torch.sigmoid(log_s + 2)
        x = torch.cat([a, (b + t) * s], 1)
        logdet = logdet + s.log().flatten(1).sum(1)
    return x, logdet


def _run(reversible: bool, shape: tuple[int, ...], x: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
    flow = model(shape[0], shape[2], shape[5])  # whose parameters the leaves are
    flow.reversible = reversible
    return flow(x)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Each step's tensor read and written; backward, tensor and gradient."""
    steps, batch, channels, height, width, _ = shape
    return (6 if mode == "fwd+bwd" else 2) * steps * batch * channels * height * width * dtype.itemsize


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """The products of the networks and of the mixing matrices, once forward and twice backward."""
    steps, batch, channels, height, width, hidden = shape
    products = 9 * channels // 2 * hidden + hidden**2 + 9 * hidden * channels + channels**2
    return (3 if mode == "fwd+bwd" else 1) * 2 * steps * batch * height * width * products


CASES = (
    Case((32, 16, 12, 16, 16, 512), modes=("fwd+bwd",)),
    Case((8, 16, 12, 16, 16, 512), modes=("fwd", "fwd+bwd")),
    Case((8, 16, 24, 8, 8, 512), modes=("fwd", "fwd+bwd")),
)

reversible = Benchmark(
    op="glow_reversible",
    cases=CASES,
    inputs=inputs,
    reference=eager,
    bytes=traffic,
    flops=arithmetic,
    genperf=functools.partial(_run, True),
    baselines={"eager": eager},
    backends=("cpu", "cuda"),
    compile=False,
    group="glow",
)

stored = dataclasses.replace(reversible, op="glow_stored", genperf=functools.partial(_run, False))
