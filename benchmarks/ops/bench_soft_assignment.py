"""The entropy loss of LlamaGen over standard normal vectors: shapes are ``vectors x codewords x dimensions``.

``H(p) - H(mean p)`` of the softmax of negative squared distances; the gradients are those of both operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.soft_assignment import soft_assignment

_EPSILON = 1e-5  # under the logarithm of a mean probability
_PASSES = {"fwd": 1, "bwd": 3, "fwd+bwd": 4}  # products of N K D terms


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    n, n_codewords, dim = shape
    # Distances of the order of 1: neither uniform nor one-hot.
    x, codebook = (torch.randn(m, dim).div(dim**0.5).to(device, dtype) for m in (n, n_codewords))
    return {"x": x.requires_grad_(), "codebook": codebook.requires_grad_()}


def _entropy_of(mean: Tensor) -> Tensor:
    return -(mean * (mean + _EPSILON).log()).sum()


def eager(x: Tensor, codebook: Tensor) -> tuple[Tensor]:
    x, codebook = (y if y.dtype == torch.float64 else y.float() for y in (x, codebook))
    distance = x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * (x @ codebook.T)
    prob, log_prob = (-distance).softmax(1), (-distance).log_softmax(1)
    return (-(prob * log_prob).sum(1).mean() - _entropy_of(prob.mean(0)),)


def genperf(x: Tensor, codebook: Tensor) -> tuple[Tensor]:
    out = soft_assignment(x, codebook)
    assert out.mean_prob is not None
    return (out.entropy.mean() - _entropy_of(out.mean_prob),)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads both operands, and writes the gradients of both."""
    n, n_codewords, dim = shape
    operands = (n + n_codewords) * dim * dtype.itemsize
    return operands * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    n, n_codewords, dim = shape
    return 2 * n * n_codewords * dim * _PASSES[mode]


MODES = ("fwd", "fwd+bwd")

soft_assignment_l2 = Benchmark(
    op="soft_assignment",
    cases=(
        Case((16384, 512, 64), modes=MODES),
        Case((16384, 8192, 32), modes=MODES),
        Case((4096, 1024, 256), modes=MODES),
        Case((8192, 16384, 8), modes=MODES),
        Case((16384, 512, 64), torch.bfloat16, modes=MODES),
        Case((64, 512, 64), modes=MODES),
    ),
    inputs=inputs,
    reference=eager,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={"eager": eager},
    backends=("cpu", "triton"),
)
