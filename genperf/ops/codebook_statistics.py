"""How many vectors each codeword of a quantizer was given, and their sums.

Definition: the statistics of the exponential moving average in appendix A.1 of A. van den Oord et al.,
"Neural discrete representation learning", NeurIPS 2017 (arXiv:1711.00937), and of the update step of k-means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops.philox_random import FLOATS
from genperf.ops.vq_nearest import NATIVE_DTYPES

__all__ = ["CodebookStatistics", "codebook_statistics"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class CodebookStatistics(NamedTuple):
    """Results of :func:`codebook_statistics`."""

    counts: Tensor
    sums: Tensor


def _outputs(x: Tensor, indices: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], n_codewords)
    return x.new_empty(shape, dtype=dtype), x.new_empty((*shape, x.shape[-1]), dtype=dtype)


def _reference(x: Tensor, indices: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    heads, dim = x.shape[0], x.shape[-1]
    counted = (indices >= 0) & (indices < n_codewords)
    if not x.is_cuda and not (counted | (indices == -1)).all():  # no look at the device
        bad = indices[~counted & (indices != -1)][0].item()
        raise ValueError(f"indices contains {bad}, expected -1 to {n_codewords - 1}")
    head = torch.arange(heads, device=x.device).view(-1, *[1] * (indices.dim() - 1))
    rows = torch.where(counted, indices + head * n_codewords, heads * n_codewords).flatten()
    counts = torch.zeros(heads * n_codewords + 1, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(0, rows, torch.ones_like(rows))[:-1].view(heads, n_codewords)
    wide = (x if x.dtype == torch.float64 else x.float()).reshape(-1, dim)
    sums = wide.new_zeros(heads * n_codewords + 1, dim)
    # On a GPU index_put sorts, where index_add adds in any order.
    add = sums.index_put((rows,), wide, accumulate=True) if x.is_cuda else sums.index_add(0, rows, wide)
    return counts.to(wide.dtype), add[:-1].view(heads, n_codewords, dim).contiguous()


def _cpu(x: Tensor, indices: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    counts, sums = _outputs(x, indices, n_codewords)
    _backend.native.cpu.codebook_statistics(x, indices, counts, sums)  # type: ignore[union-attr]
    return counts, sums


def _triton(x: Tensor, indices: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    from genperf.kernels.codebook_statistics import codebook_statistics

    return codebook_statistics(x, indices, n_codewords)


def _refuses(x: Tensor, indices: Tensor, n_codewords: int) -> str | None:
    if x.dtype not in NATIVE_DTYPES:
        return f"{x.dtype} is left to the reference"
    if x.dim() > 8:
        return f"{x.dim()} dimensions, at most 8"
    return None if n_codewords < 2**31 else f"{n_codewords} codewords, below 2^31"


_op = Operator(
    "codebook_statistics",
    "(Tensor x, Tensor indices, SymInt n_codewords) -> (Tensor counts, Tensor sums)",
    _reference,
    _outputs,
)
_op.implement("cpu", _cpu, _refuses)
_op.implement("triton", _triton, _refuses)


def codebook_statistics(
    x: Tensor,
    indices: Tensor,
    n_codewords: int,
    *,
    dim: int = -1,
    mask: Tensor | None = None,
    heads: bool = False,
) -> CodebookStatistics:
    """For each codeword, how many vectors have its index, and the sum of these vectors.

        counts[k] = #{n : indices[n] = k},    sums[k] = sum of x[n] over these n

    The sums are computed in float32 in an order that follows from the shapes alone: the same bits from run to
    run and for any number of threads. There is no one-hot matrix [N, K], no sort on the CPU, and no atomic
    addition of floats. No gradient.

    A vector that is not finite makes the sum of its codeword NaN or infinite, and no other; ``mask`` leaves
    it out.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), ``triton`` (which sorts the indices), ``reference``. There is
    no CUDA C++ kernel: nothing here is beyond Triton.

    Args:
        x: [*, D], or with its vectors along ``dim``, such as 1 for images [B, D, H, W]; with ``heads``
            [heads, *, D]. Any strides, none are copied. float32, float16, bfloat16, or float64 (by the
            reference alone).
        indices: integers, [*], the shape of ``x`` without ``dim``: from 0 to ``n_codewords`` - 1, or -1 for a
            vector that is not counted.
        n_codewords: K, at least 1.
        dim: the dimension of ``x`` that holds D.
        mask: bool, the shape of ``indices``; where it is False the vector is not counted.
        heads: whether dimension 0 of ``x`` is that of heads, each with a codebook of its own.

    Returns:
        :class:`CodebookStatistics`: ``counts`` [K] or [heads, K] and ``sums`` [K, D] or [heads, K, D],
        float32 (float64 for float64).

    Raises:
        TypeError: for a non-tensor or a dtype that is not as above.
        ValueError: for shapes or devices that do not fit, and on the CPU for an index that is none; on a GPU,
            which is not looked at, the vectors of such indices are not counted.
        RuntimeError: if a backend was forced that cannot run.
    """
    _check(x, indices, n_codewords, dim, mask, heads)
    x = x.detach().movedim(dim, -1)
    indices = indices.long()
    if mask is not None:
        indices = torch.where(mask, indices, -1)
    if not heads:
        x, indices = x[None], indices[None]
    try:
        counts, sums = _op(x, indices, n_codewords)
    except ValueError as error:
        raise ValueError(f"codebook_statistics: {error}") from None
    return CodebookStatistics(counts, sums) if heads else CodebookStatistics(counts[0], sums[0])


def _check(x: Any, indices: Any, n_codewords: Any, dim: Any, mask: Any, heads: Any) -> None:
    for name, tensor in (("x", x), ("indices", indices), ("mask", mask)):
        if not isinstance(tensor, Tensor) and not (name == "mask" and tensor is None):
            raise TypeError(f"codebook_statistics: {name} is {type(tensor).__name__}, expected a tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"codebook_statistics: x is {x.dtype}, expected one of {FLOATS}")
    if indices.dtype not in _INTEGERS:
        raise TypeError(f"codebook_statistics: indices is {indices.dtype}, expected one of {_INTEGERS}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"codebook_statistics: mask is {mask.dtype}, expected torch.bool")
    for name, tensor in (("indices", indices), ("mask", mask)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"codebook_statistics: {name} is on {tensor.device}, expected {x.device}, as x")
    if type(n_codewords) is bool or not isinstance(n_codewords, (int, torch.SymInt)):
        raise TypeError(
            f"codebook_statistics: n_codewords is {type(n_codewords).__name__}, expected an integer"
        )
    if n_codewords < 1:
        raise ValueError(f"codebook_statistics: n_codewords is {n_codewords}, expected at least 1")
    if type(heads) is not bool:
        raise TypeError(f"codebook_statistics: heads is {type(heads).__name__}, expected a bool")
    if type(dim) is not int:
        raise TypeError(f"codebook_statistics: dim is {type(dim).__name__}, expected an integer")
    if not -x.dim() <= dim < x.dim() or (heads and dim % x.dim() == 0):
        raise ValueError(
            f"codebook_statistics: dim is {dim} for x of shape {tuple(x.shape)}, expected a dimension of it"
            + " after that of the heads" * heads
        )
    if x.shape[dim] == 0:
        raise ValueError(f"codebook_statistics: x has shape {tuple(x.shape)}, expected D of at least 1")
    dim %= x.dim()
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    for name, tensor in (("indices", indices), ("mask", mask)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"codebook_statistics: {name} has shape {tuple(tensor.shape)}, expected {shape}, that of x, "
                f"{tuple(x.shape)}, without dimension {dim}"
            )
