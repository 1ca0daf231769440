"""Determinants and inverses of the mixing matrices of a flow, all of a model at once.

Definition: the log-determinant of the invertible 1x1 convolution in D. P. Kingma and P. Dhariwal, "Glow:
generative flow with invertible 1x1 convolutions", NeurIPS 2018 (arXiv:1807.03039), equation 9, with its
gradient W^-T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator

__all__ = ["SlogdetInverse", "slogdet_inverse"]

_DTYPES = (torch.float32, torch.float64)


class SlogdetInverse(NamedTuple):
    """Results of :func:`slogdet_inverse`."""

    sign: Tensor
    logabsdet: Tensor
    inverse: Any
    inverse_transpose: Any
    status: Tensor


def _runs(sizes: Sequence[int]) -> Iterator[tuple[slice, slice, int]]:
    """Of neighbours of one size: which matrices, which elements, and the size."""
    first = element = 0
    while first < len(sizes):
        last = first
        while last < len(sizes) and sizes[last] == sizes[first]:
            last += 1
        end = element + (last - first) * sizes[first] ** 2
        yield slice(first, last), slice(element, end), sizes[first]
        first, element = last, end


def _reference(packed: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not sizes:
        return _outputs(packed, sizes)
    parts: list[tuple[Tensor, ...]] = []
    for _, elements, size in _runs(sizes):
        matrices = packed[elements].view(-1, size, size).double()
        finite = matrices.isfinite().all(-1).all(-1)
        safe = torch.where(finite[:, None, None], matrices, torch.eye(size).to(matrices))
        sign, logabsdet = torch.linalg.slogdet(safe)
        inverse, info = torch.linalg.inv_ex(safe)
        inverse = torch.where((finite & (info == 0))[:, None, None], inverse, torch.nan)
        sign, logabsdet = (torch.where(finite, t, torch.nan) for t in (sign, logabsdet))
        status = torch.where(finite, info.long(), -1)
        both = inverse.to(packed.dtype), inverse.mT.to(packed.dtype)
        parts.append((sign, logabsdet, *(t.reshape(-1) for t in both), status))
    sign, logabsdet, inverse, transpose, status = (torch.cat(p) for p in zip(*parts, strict=True))
    return sign.to(packed.dtype), logabsdet.to(packed.dtype), inverse, transpose, status


def _outputs(packed: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sign, logabsdet = packed.new_empty(len(sizes)), packed.new_empty(len(sizes))
    status = packed.new_empty(len(sizes), dtype=torch.int64)
    return sign, logabsdet, torch.empty_like(packed), torch.empty_like(packed), status


def _cpu(packed: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _outputs(packed, sizes)
    native = _backend.native.cpu  # type: ignore[union-attr]
    native.slogdet_inverse(packed, torch.tensor(sizes), *outputs)
    return outputs


_op = Operator(
    "slogdet_inverse",
    "(Tensor packed, int[] sizes)"
    " -> (Tensor sign, Tensor logabsdet, Tensor inverse, Tensor inverse_transpose, Tensor status)",
    _reference,
    _outputs,
)
_op.implement("cpu", _cpu)


class _SlogdetInverse(torch.autograd.Function):
    """Saves the transposed inverses alone: d logabsdet = W^-T, d W^-1 = -W^-1 dW W^-1."""

    @staticmethod
    def forward(ctx, packed, sizes):
        ctx.set_materialize_grads(False)
        sign, logabsdet, inverse, transpose, status = _op(packed, sizes)
        ctx.save_for_backward(transpose)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(sign, status)
        return sign, logabsdet, inverse, transpose, status

    @staticmethod
    def backward(ctx, _sign, of_logabsdet, of_inverse, of_transpose, _status):
        (transpose,) = ctx.saved_tensors
        grads = []
        for matrices, elements, size in _runs(ctx.sizes):
            x = transpose[elements].view(-1, size, size)
            grad = torch.zeros_like(x) if of_logabsdet is None else x * of_logabsdet[matrices, None, None]
            if of_inverse is not None:
                grad = grad - x @ of_inverse[elements].view(x.shape) @ x
            if of_transpose is not None:
                grad = grad - x @ of_transpose[elements].view(x.shape).mT @ x
            grads.append(grad.reshape(-1))
        if not grads:
            return torch.zeros_like(transpose), None
        return grads[0] if len(grads) == 1 else torch.cat(grads), None


def slogdet_inverse(matrices: Tensor | Sequence[Tensor]) -> SlogdetInverse:
    """Sign and logarithm of the absolute determinant, and the inverse, of square matrices of any sizes.

    One call for all layers of a model: one native call on the CPU, which shares the matrices out among
    threads. Gauss-Jordan elimination with partial pivoting in float64, whatever the dtype; the results are
    rounded once. The same bits for any number of threads, and for a matrix alone or among others. The host
    never reads a result, and a singular matrix raises nothing: ``status`` tells.

    Differentiable, twice, in ``logabsdet`` and the inverses; backward is one product with the transposed
    inverse that is there already. Where ``status`` is not 0 the gradient is NaN.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), ``reference``.

    Args:
        matrices: [*, C, C], or matrices [C, C] each of its own size, on one device; float32 or float64.

    Returns:
        :class:`SlogdetInverse`: ``sign`` (-1, 0 or 1) and ``logabsdet``, [*] or, of several matrices, [n],
        in their dtype; ``inverse`` and ``inverse_transpose``, [*, C, C] or a tuple of [C, C], contiguous;
        and ``status``, int64 like ``sign``: 0; or, of a singular matrix, one more than the step of the
        elimination that found no pivot (then sign is 0, logabsdet -inf and the inverse NaN); or -1 where an
        element is not finite (then all is NaN).

    Raises:
        TypeError: for anything but tensors of one of these dtypes, or of two dtypes.
        ValueError: for a matrix that is not square or empty, or matrices on two devices.
        RuntimeError: if a backend was forced that cannot run.
    """
    given = [matrices] if isinstance(matrices, Tensor) else list(matrices)
    _check(given, isinstance(matrices, Tensor))
    if isinstance(matrices, Tensor):
        shape = matrices.shape
        sizes = [shape[-1]] * math.prod(shape[:-2])
        found = _SlogdetInverse.apply(matrices.reshape(-1), sizes)
        sign, logabsdet, inverse, transpose, status = found
        batch = shape[:-2]
        return SlogdetInverse(
            sign.view(batch),
            logabsdet.view(batch),
            inverse.view(shape),
            transpose.view(shape),
            status.view(batch),
        )
    sizes = [m.shape[0] for m in given]
    packed = torch.cat([m.reshape(-1) for m in given])
    sign, logabsdet, inverse, transpose, status = _SlogdetInverse.apply(packed, sizes)

    def apart(packed: Tensor) -> tuple[Tensor, ...]:
        parts = packed.split([size * size for size in sizes])
        return tuple(part.view(size, size) for part, size in zip(parts, sizes, strict=True))

    return SlogdetInverse(sign, logabsdet, apart(inverse), apart(transpose), status)


def _check(matrices: list[Any], one: bool) -> None:
    if not matrices:
        raise ValueError("slogdet_inverse: matrices is empty, expected a tensor or at least one matrix")
    for i, matrix in enumerate(matrices):
        name = "matrices" if one else f"matrices[{i}]"
        if not isinstance(matrix, Tensor):
            raise TypeError(f"slogdet_inverse: {name} is {type(matrix).__name__}, expected a tensor")
        if matrix.dtype not in _DTYPES:
            raise TypeError(f"slogdet_inverse: {name} is {matrix.dtype}, expected one of {_DTYPES}")
        shape = tuple(matrix.shape)
        if len(shape) < 2 or (len(shape) > 2 and not one) or shape[-1] != shape[-2] or shape[-1] == 0:
            expected = "[*, C, C]" if one else "[C, C]"
            raise ValueError(f"slogdet_inverse: {name} has shape {shape}, expected {expected}, C at least 1")
        first = matrices[0]
        if matrix.dtype != first.dtype:
            raise TypeError(
                f"slogdet_inverse: {name} is {matrix.dtype}, expected {first.dtype}, as matrices[0]"
            )
        if matrix.device != first.device:
            raise ValueError(
                f"slogdet_inverse: {name} is on {matrix.device}, expected {first.device}, as matrices[0]"
            )
