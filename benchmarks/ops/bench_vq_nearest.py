"""The nearest codewords of standard normal vectors: shapes are ``vectors x codewords x dimensions``.

Every provider is checked against float64: an index that differs is wrong only where its distance is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from genperf.bench import Benchmark, Case
from genperf.ops.vq_nearest import vq_nearest


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    n, n_codewords, dim = shape
    return {
        "x": torch.randn(n, dim).to(device, dtype),
        "codebook": torch.randn(n_codewords, dim).to(device, dtype),
    }


def eager(x: Tensor, codebook: Tensor) -> tuple[Tensor]:
    """The fewest operations that give it: one product with the bias, and the argmin."""
    return (torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1),)


def cdist(x: Tensor, codebook: Tensor) -> tuple[Tensor]:
    return (torch.cdist(x.float(), codebook.float()).argmin(1),)


def faiss(x: Tensor, codebook: Tensor) -> tuple[Tensor]:
    if x.dtype != torch.float32 or x.is_cuda:
        raise NotImplementedError("faiss-cpu takes float32")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(codebook.numpy())
    return (torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0]),)


@functools.lru_cache(maxsize=1)
def _module(n_codewords: int, dim: int) -> Any:
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(dim=dim, codebook_size=n_codewords).eval()


def vector_quantize_pytorch(x: Tensor, codebook: Tensor) -> tuple[Tensor]:
    """The module's forward pass in evaluation, which gathers the codewords as well."""
    module = _module(*codebook.shape).to(x)
    with torch.no_grad():
        module._codebook.embed.copy_(codebook[None])
        return (module(x[None])[1][0],)


def genperf(x: Tensor, codebook: Tensor) -> tuple[Tensor]:
    return (vq_nearest(x, codebook).indices,)


def reference(x: Tensor, codebook: Tensor) -> tuple[Tensor]:
    parts = x.split(max(1, 2**24 // len(codebook)))
    return (torch.cat([torch.cdist(part, codebook).argmin(1) for part in parts]),)


def traffic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    """Reads both operands and writes an index."""
    n, n_codewords, dim = shape
    return (n + n_codewords) * dim * dtype.itemsize + n * 8


def arithmetic(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> int:
    n, n_codewords, dim = shape
    return 2 * n * n_codewords * dim


FORWARD = ("fwd",)

vq_nearest_l2 = Benchmark(
    op="vq_nearest",
    cases=(
        Case((16384, 512, 64), modes=FORWARD),
        Case((16384, 1024, 256), modes=FORWARD),
        Case((8192, 8192, 32), modes=FORWARD),
        Case((16384, 512, 8), modes=FORWARD),
        Case((16384, 1024, 128), torch.bfloat16, modes=FORWARD),
        Case((64, 1024, 256), modes=FORWARD),
        Case((16, 1024, 64), modes=FORWARD),
        Case((1, 1024, 128), modes=FORWARD),
    ),
    inputs=inputs,
    reference=reference,
    bytes=traffic,
    flops=arithmetic,
    genperf=genperf,
    baselines={
        "eager": eager,
        "peer/cdist": cdist,
        "peer/faiss": faiss,
        "peer/vector-quantize-pytorch": vector_quantize_pytorch,
    },
    backends=("cpu", "triton"),
)
