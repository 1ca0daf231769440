"""A class drawn from each row of logits, and log-probabilities of classes with their gradient.

Shapes are ``[N, K]``: rows and classes; ``[B, K, H, W]`` with the classes in dimension 1.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.categorical_log_prob import categorical_log_prob
from genperf.ops.categorical_sample import categorical_sample
from genperf.ops.philox_random import draw_key, philox_random


def _dim(logits: Tensor) -> int:
    return 1 if logits.dim() == 4 else -1


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {"logits": torch.randn(shape).to(device, dtype)}


def eager(logits: Tensor) -> tuple[Tensor]:
    """What most code does; torch.multinomial takes rows."""
    p = logits.softmax(_dim(logits)).movedim(_dim(logits), -1)
    return (torch.multinomial(p.reshape(-1, p.shape[-1]), 1).view(p.shape[:-1]),)


def cumulative(logits: Tensor) -> tuple[Tensor]:
    """One uniform a row, by the inverse of the cumulative distribution."""
    sums = logits.softmax(_dim(logits)).movedim(_dim(logits), -1).cumsum(-1)
    u = torch.rand_like(sums[..., :1]) * sums[..., -1:]
    return (torch.searchsorted(sums, u).squeeze(-1).clamp(max=sums.shape[-1] - 1),)


def genperf(logits: Tensor) -> tuple[Tensor]:
    index = categorical_sample(logits, dim=_dim(logits))
    assert isinstance(index, Tensor)
    return (index,)


def reference(logits: Tensor, u: Tensor | None = None, index: Tensor | None = None) -> tuple[Tensor]:
    """The class in whose part of the unit interval the uniform lies; or, without one, what was drawn."""
    if u is None:
        assert index is not None
        return (index,)
    sums = logits.softmax(_dim(logits)).movedim(_dim(logits), -1).cumsum(-1)
    return ((sums < u[..., None]).sum(-1).clamp(max=sums.shape[-1] - 1),)


def draws(provider: str, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    if not provider.startswith("genperf/"):
        return {"index": outputs[0]}  # torch's own draws are taken as they are
    index = outputs[0]
    return {"u": philox_random(index.shape, draw_key(index.device), "uniform").double()}


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads the logits and writes the classes."""
    n = torch.Size(shape).numel()
    return n * dtype.itemsize + n // shape[1] * 8


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    return 0


categorical_samples = Benchmark(
    op="categorical_sample",
    cases=(
        Case((256, 8192), modes=("fwd",)),
        Case((65536, 256), modes=("fwd",)),
        Case((64, 256, 32, 32), modes=("fwd",)),
        Case((1, 1024), modes=("fwd",)),
        Case((4, 262144), modes=("fwd",)),
    ),
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager, "cumsum": cumulative},
    draws=draws,
    backends=("cpu", "triton"),
)


def classes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    logits = torch.randn(shape).to(device, dtype).requires_grad_()
    index = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    return {"logits": logits, "index": index}


def eager_log_prob(logits: Tensor, index: Tensor) -> tuple[Tensor]:
    dim = _dim(logits)
    return (logits.log_softmax(dim).gather(dim, index.unsqueeze(dim)).squeeze(dim),)


def genperf_log_prob(logits: Tensor, index: Tensor) -> tuple[Tensor]:
    return (categorical_log_prob(logits, index, dim=_dim(logits)),)


def traffic_log_prob(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads the logits in each pass, and writes their gradient."""
    n = torch.Size(shape).numel() * dtype.itemsize
    return {"fwd": n, "bwd": 2 * n, "fwd+bwd": 3 * n}[mode]


categorical_log_probs = dataclasses.replace(
    categorical_samples,
    op="categorical_log_prob",
    cases=(
        Case((256, 8192), modes=("fwd", "fwd+bwd")),
        Case((64, 256, 32, 32), modes=("fwd", "fwd+bwd")),
    ),
    inputs=classes,
    reference=eager_log_prob,
    bytes=traffic_log_prob,
    genperf=genperf_log_prob,
    baselines={"eager": eager_log_prob},
    draws=None,
)
