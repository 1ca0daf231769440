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
from genperf._op import Operator, cuda_stream

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


_Results = tuple[Tensor, Tensor, Any, Any, Tensor]


def _outputs(
    packed: Tensor, sizes: list[int], want_inverse: bool = True, want_transpose: bool = True
) -> _Results:
    # The inverse is written as the transpose of the transposed one.
    return (
        packed.new_empty(len(sizes)),
        packed.new_empty(len(sizes)),
        torch.empty_like(packed) if want_inverse else None,
        torch.empty_like(packed) if want_transpose or want_inverse else None,
        packed.new_empty(len(sizes), dtype=torch.int64),
    )


def _reference(
    packed: Tensor, sizes: list[int], want_inverse: bool = True, want_transpose: bool = True
) -> _Results:
    results = _outputs(packed, sizes, want_inverse, want_transpose)
    for matrices, elements, size in _runs(sizes):
        exact = packed[elements].view(-1, size, size).double()
        finite = exact.isfinite().all(-1).all(-1)
        safe = torch.where(finite[:, None, None], exact, torch.eye(size).to(exact))
        sign, logabsdet = torch.linalg.slogdet(safe)
        inverse, info = torch.linalg.inv_ex(safe)
        inverse = torch.where((finite & (info == 0))[:, None, None], inverse, torch.nan)
        found = (
            torch.where(finite, sign, torch.nan),
            torch.where(finite, logabsdet, torch.nan),
            inverse.reshape(-1),
            inverse.mT.reshape(-1),
            torch.where(finite, info.long(), -1),
        )
        places = (matrices, matrices, elements, elements, matrices)
        for to, place, values in zip(results, places, found, strict=True):
            if to is not None:
                to[place] = values.to(to.dtype)
    return results


def _cpu(
    packed: Tensor, sizes: list[int], want_inverse: bool = True, want_transpose: bool = True
) -> _Results:
    results = _outputs(packed, sizes, want_inverse, want_transpose)
    _backend.native.cpu.slogdet_inverse(packed, sizes, *results, None)  # type: ignore[union-attr]
    return results


def _cuda(
    packed: Tensor, sizes: list[int], want_inverse: bool = True, want_transpose: bool = True
) -> _Results:
    results = _outputs(packed, sizes, want_inverse, want_transpose)
    cuda = _backend.cuda_functions()
    room = sum(n * -(-n // 8) * 8 for n in sizes if n > cuda.slogdet_inverse_shared_size)
    workspace = packed.new_empty(room, dtype=torch.float64) if room else None
    cuda.slogdet_inverse(packed, sizes, *results, workspace, cuda_stream(packed))
    return results


def _refuses_cuda(packed: Tensor, sizes: list[int], *_: bool) -> str | None:
    largest = max(sizes, default=0)
    most = _backend.cuda_functions().slogdet_inverse_largest_size
    return f"a matrix of size {largest}, at most {most}" if largest > most else None


_op = Operator(
    "slogdet_inverse",
    "(Tensor packed, int[] sizes, bool want_inverse=True, bool want_transpose=True)"
    " -> (Tensor sign, Tensor logabsdet, Tensor inverse, Tensor inverse_transpose, Tensor status)",
    _reference,
    _outputs,
)
_op.implement("cpu", _cpu)
_op.implement("cuda", _cuda, _refuses_cuda)


class _SlogdetInverse(torch.autograd.Function):
    """Saves the transposed inverses alone: d logabsdet = W^-T, d W^-1 = -W^-1 dW W^-1."""

    @staticmethod
    def forward(ctx, packed, sizes, want_inverse):
        ctx.set_materialize_grads(False)
        sign, logabsdet, inverse, transpose, status = _op(packed, sizes, want_inverse, True)
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
            grad = torch.zeros_like(x) if of_logabsdet is None else x * of_logabsdet[matrices].view(-1, 1, 1)
            if of_inverse is not None:
                grad = grad - x @ of_inverse[elements].view(x.shape) @ x
            if of_transpose is not None:
                grad = grad - x @ of_transpose[elements].view(x.shape).mT @ x
            grads.append(grad.reshape(-1))
        if not grads:
            return torch.zeros_like(transpose), None, None
        return grads[0] if len(grads) == 1 else torch.cat(grads), None, None


def _run(packed: Tensor, sizes: list[int], inverses: bool) -> _Results:
    if packed.requires_grad and torch.is_grad_enabled():
        return _SlogdetInverse.apply(packed, sizes, inverses)
    return _op(packed, sizes, inverses, inverses)


def slogdet_inverse(matrices: Tensor | Sequence[Tensor], *, inverses: bool = True) -> SlogdetInverse:
    """Sign and logarithm of the absolute determinant, and the inverse, of square matrices of any sizes.

    One call for all layers of a model: one native call on the CPU, which shares the matrices out among
    threads, or one launch on CUDA, a block a matrix. Gauss-Jordan elimination with partial pivoting in
    float64, whatever the dtype; the results are rounded once. The same bits for any number of threads, and
    for a matrix alone or among others. The host never reads a result, and a singular matrix raises nothing:
    ``status`` tells.

    Differentiable, twice, in ``logabsdet`` and the inverses; backward is one product with the transposed
    inverse that is there already. Where ``status`` is not 0 the gradient is NaN.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), ``cuda`` (C up to 1024), ``reference``. None in Triton, which
    cannot exchange rows.

    Args:
        matrices: [*, C, C], or matrices [C, C] each of its own size, on one device; float32 or float64.
        inverses: False leaves out ``inverse`` and ``inverse_transpose``, which are None then. Where no
            gradient is wanted either, two thirds of the work fall away.

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
    if isinstance(matrices, Tensor):
        _check([matrices], True)
        shape = matrices.shape
        batch = shape[:-2]
        sizes = [shape[-1]] * math.prod(batch)
        sign, logabsdet, inverse, transpose, status = _run(matrices.reshape(-1), sizes, inverses)
        return SlogdetInverse(
            sign.view(batch),
            logabsdet.view(batch),
            inverse.view(shape) if inverses else None,
            transpose.view(shape) if inverses else None,
            status.view(batch),
        )
    given = list(matrices)
    sizes = _check(given, False)
    parts = [torch.stack(given[where]).view(-1) for where, _, _ in _runs(sizes)]
    packed = parts[0] if len(parts) == 1 else torch.cat(parts)
    sign, logabsdet, inverse, transpose, status = _run(packed, sizes, inverses)
    if not inverses:
        return SlogdetInverse(sign, logabsdet, None, None, status)
    return SlogdetInverse(sign, logabsdet, _apart(inverse, sizes), _apart(transpose, sizes), status)


def _apart(packed: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    parts: list[Tensor] = []
    for _, elements, size in _runs(sizes):
        parts += packed[elements].view(-1, size, size).unbind()
    return tuple(parts)


def _check(matrices: list[Any], one: bool) -> list[int]:
    """The sizes."""
    if not matrices:
        raise ValueError("slogdet_inverse: matrices is empty, expected a tensor or at least one matrix")
    first = matrices[0]
    sizes = []
    for i, matrix in enumerate(matrices):
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{_name(i, one)} is {type(matrix).__name__}, expected a tensor")
        shape, dtype = matrix.shape, matrix.dtype
        if dtype not in _DTYPES:
            raise TypeError(f"{_name(i, one)} is {dtype}, expected one of {_DTYPES}")
        if len(shape) < 2 or (len(shape) > 2 and not one) or shape[-1] != shape[-2] or shape[-1] == 0:
            expected = "[*, C, C]" if one else "[C, C]"
            raise ValueError(f"{_name(i, one)} has shape {tuple(shape)}, expected {expected}, C at least 1")
        if dtype != first.dtype:
            raise TypeError(f"{_name(i, one)} is {dtype}, expected {first.dtype}, as matrices[0]")
        if matrix.device != first.device:
            raise ValueError(
                f"{_name(i, one)} is on {matrix.device}, expected {first.device}, as matrices[0]"
            )
        sizes.append(shape[-1])
    return sizes


def _name(i: int, one: bool) -> str:
    return "slogdet_inverse: matrices" if one else f"slogdet_inverse: matrices[{i}]"
