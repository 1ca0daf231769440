"""BigGAN's truncated noise and first values of weights, against rejection in torch and SciPy's quantiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case, CheckError
from genperf.ops.philox_random import draw_key, philox_random
from genperf.ops.truncated_normal import truncated_normal

_LOW, _HIGH = -2.0, 2.0


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {"template": torch.empty(shape, dtype=dtype, device=device), "key": draw_key(device)}


def eager(template: Tensor, key: Tensor) -> tuple[Tensor]:
    return (torch.nn.init.trunc_normal_(torch.empty_like(template), a=_LOW, b=_HIGH),)


def rejection(template: Tensor, key: Tensor) -> tuple[Tensor]:
    """Draws anew what lies outside, until nothing does."""
    x = torch.randn_like(template)
    flat = x.view(-1)
    while len(outside := (flat.abs() > _HIGH).nonzero().flatten()):
        flat[outside] = flat.new_empty(len(outside)).normal_()
    return (x,)


def scipy(template: Tensor, key: Tensor) -> tuple[Tensor]:
    """As public BigGAN code draws."""
    from scipy.stats import truncnorm

    if template.device.type != "cpu" or template.dtype != torch.float32:
        raise NotImplementedError("draws on the CPU")
    drawn = truncnorm.rvs(_LOW, _HIGH, size=tuple(template.shape))
    return (torch.from_numpy(drawn).float(),)


def genperf(template: Tensor, key: Tensor) -> tuple[Tensor]:
    return (truncated_normal(template.shape, key=key, dtype=template.dtype),)


def draws(provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The exact numbers of the key; of others, what they drew, if that has the law's mean and variance."""
    x = outputs[0].double()
    if provider.startswith("genperf/"):
        u = (philox_random(x.shape, inputs["key"], "bits").double() + 0.5) * 2.0**-32
        low = torch.special.ndtr(torch.tensor(_LOW, dtype=torch.float64, device=x.device))
        return {"noise": torch.special.ndtri(low + u * (1.0 - 2.0 * low))}
    n, variance = x.numel(), 0.7737413
    if x.abs().max() > _HIGH or x.mean().abs() > 6.0 * math.sqrt(variance / n):
        raise CheckError("not within the bounds, or not of mean 0")
    if (x.var() - variance).abs() > 6.0 / math.sqrt(n):
        raise CheckError(f"variance {x.var().item():.4f}, expected {variance}")
    return {"noise": x}


def reference(template: Tensor, key: Tensor, noise: Tensor) -> tuple[Tensor]:
    return (noise,)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return math.prod(shape) * dtype.itemsize


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """A logarithm, a root, a quotient of polynomials; Philox is integer work."""
    return 30 * math.prod(shape)


truncated = Benchmark(
    op="truncated_normal",
    cases=(
        Case((64, 128), modes=("fwd",)),
        Case((1024, 1024), modes=("fwd",)),
        Case((1, 128), modes=("fwd",)),
    ),
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager, "peer/scipy": scipy, "peer/torch rejection": rejection},
    draws=draws,
    backends=("cpu", "triton"),
    compile=False,  # its draws are not torch's
)
