"""What a call costs besides the kernel, on a problem too small to take any time itself."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from genperf import _backend
from genperf.bench import Benchmark, Case
from genperf.bench.noise import philox_normal, torch_normal
from genperf.ops import draw_key, gaussian_sample

_LOGVAR = 0


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    values = {name: torch.randn(shape, dtype=dtype, device=device) for name in ("mean", "logvar")}
    return values | {
        "key": draw_key(device),
        "z": torch.empty(shape, dtype=dtype, device=device),
        "kl": torch.empty(shape[0], dtype=torch.float32, device=device),
    }


def eager(mean: Tensor, logvar: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    return z, _kl(mean, logvar)


def reference(mean: Tensor, logvar: Tensor, noise: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    return mean + torch.exp(0.5 * logvar) * noise, _kl(mean, logvar)


def _kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * torch.sum(mean.square() + logvar.exp() - 1.0 - logvar, dim=1)


def native(mean: Tensor, logvar: Tensor, key: Tensor, z: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
    if _backend.unusable("cpu", mean.device.type):
        raise NotImplementedError("the bare kernel is called on the CPU only")
    forward = _backend.native.cpu.gaussian_sample_forward
    inf = float("inf")
    forward(
        mean, logvar, None, None, None, key, z, kl, None, _LOGVAR, -inf, inf, 0.0, 1.0, True, None
    )  # fmt: skip
    return z, kl


def key_given(mean: Tensor, logvar: Tensor, key: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    out = gaussian_sample(mean, logvar, key=key)
    return out.z, out.kl


def key_drawn(mean: Tensor, logvar: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    out = gaussian_sample(mean, logvar)
    return out.z, out.kl


def draws(provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    mean = inputs["mean"]
    if provider == "eager":
        return {"noise": torch_normal(mean.shape, mean.dtype, mean.device)}
    return {"noise": philox_normal(mean.shape, inputs["key"])}


def draws_key(provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    if provider.startswith("genperf/"):
        inputs = inputs | {"key": draw_key(inputs["mean"].device)}
    return draws(provider, inputs, outputs)


with_key = Benchmark(
    op="overhead",
    cases=(Case((1, 4), modes=("fwd",)),),
    inputs=inputs,
    reference=reference,
    bytes=lambda shape, dtype, mode: 3 * shape[0] * shape[1] * dtype.itemsize,
    flops=lambda shape, dtype, mode: 15 * shape[0] * shape[1],
    genperf=key_given,
    baselines={"eager": eager, "native": native},
    draws=draws,
    compile=False,
)

drawing_a_key = dataclasses.replace(with_key, op="overhead_key_drawn", genperf=key_drawn, draws=draws_key)
