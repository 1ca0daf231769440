"""The torch operators of :func:`genperf.ops.invertible_conv1x1`, and their backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._invertible_conv1x1_reference import (
    PLU,
    reference,
    reference_backward,
    reference_plu,
    reference_plu_backward,
    reference_reverse,
)

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _outputs(x, matrix, logabsdet, shift, scale, lengths, log, inverse):
    return torch.empty_like(x), matrix.new_empty(len(x))


def _parameter_gradients(matrix, shift, scale, want_matrix=True, want_shift=True, want_scale=True):
    """Room for those of matrix, logabsdet, shift and scale; None for what is not wanted or not there."""
    return (
        matrix.new_empty(matrix.shape) if want_matrix else None,
        matrix.new_empty(()),
        shift.new_empty(shift.shape) if want_shift and shift is not None else None,
        scale.new_empty(scale.shape) if want_scale and scale is not None else None,
    )


def _gradients(
    grad_y, grad_logdet, x, matrix, shift, scale, lengths, log, inverse,
    want_x, want_matrix, want_shift, want_scale,
):  # fmt: skip
    return (
        torch.empty_like(x) if want_x else None,
        *_parameter_gradients(matrix, shift, scale, want_matrix, want_shift, want_scale),
    )


def _reversed(y, grad_y, grad_logdet, matrix, inverse_matrix, shift, scale, lengths, log, inverse):
    return torch.empty_like(y), torch.empty_like(y), *_parameter_gradients(matrix, shift, scale)


def _contiguous(*tensors):
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _cpu(x, matrix, logabsdet, shift, scale, lengths, log, inverse):
    out = _outputs(x, matrix, logabsdet, shift, scale, lengths, log, inverse)
    parameters = _contiguous(matrix, logabsdet, shift, scale, lengths)
    _backend.native.cpu.invertible_conv1x1_forward(x, *parameters, log, inverse, *out)  # type: ignore[union-attr]
    return out


def _cpu_backward(grad_y, grad_logdet, x, matrix, shift, scale, lengths, log, inverse, *wanted):
    out = _gradients(grad_y, grad_logdet, x, matrix, shift, scale, lengths, log, inverse, *wanted)
    if grad_y is None and out[0] is not None:
        out[0].zero_()
    grad_logdet, matrix, shift, scale, lengths = _contiguous(grad_logdet, matrix, shift, scale, lengths)
    _backend.native.cpu.invertible_conv1x1_backward(  # type: ignore[union-attr]
        grad_y, grad_logdet, x, matrix, None, shift, scale, lengths, log, inverse, None, *out
    )
    return out


def _cpu_reverse(y, grad_y, grad_logdet, matrix, inverse_matrix, shift, scale, lengths, log, inverse):
    out = _reversed(y, grad_y, grad_logdet, matrix, inverse_matrix, shift, scale, lengths, log, inverse)
    grad_logdet, *parameters = _contiguous(grad_logdet, matrix, inverse_matrix, shift, scale, lengths)
    _backend.native.cpu.invertible_conv1x1_backward(  # type: ignore[union-attr]
        grad_y, grad_logdet, y, *parameters, log, inverse, *out
    )
    return out


def _triton(*args):
    from genperf.kernels.invertible_conv1x1 import invertible_conv1x1_forward

    return invertible_conv1x1_forward(*args)


def _triton_backward(*args):
    from genperf.kernels.invertible_conv1x1 import invertible_conv1x1_backward

    return invertible_conv1x1_backward(*args)


def _triton_reverse(*args):
    from genperf.kernels.invertible_conv1x1 import invertible_conv1x1_reverse

    return invertible_conv1x1_reverse(*args)


def _refuses(x: Tensor, *_: Any) -> str | None:
    if x.dtype not in _NATIVE_DTYPES:
        return f"{x.dtype} is left to the reference"
    return f"{x.dim()} dimensions, at most 8" if x.dim() > 8 else None


def _refuses_backward(grad_y: Any, grad_logdet: Any, x: Tensor, *_: Any) -> str | None:
    return _refuses(x)


_PARAMETERS = "Tensor? shift, Tensor? scale, Tensor? lengths, bool log, bool inverse"
_GRADIENTS = "Tensor grad_matrix, Tensor grad_logabsdet, Tensor grad_shift, Tensor grad_scale"
forward_op = Operator(
    "invertible_conv1x1",
    f"(Tensor x, Tensor matrix, Tensor logabsdet, {_PARAMETERS}) -> (Tensor y, Tensor logdet)",
    reference,
    _outputs,
)
forward_op.implement(
    "cpu", _cpu, _refuses, direct=_backend.native.cpu.invertible_conv1x1_direct if _backend.native else None
)
forward_op.implement("triton", _triton, _refuses)
backward_op = Operator(
    "invertible_conv1x1_backward",
    f"(Tensor? grad_y, Tensor? grad_logdet, Tensor x, Tensor matrix, {_PARAMETERS},"
    f" bool want_x, bool want_matrix, bool want_shift, bool want_scale) -> (Tensor grad_x, {_GRADIENTS})",
    reference_backward,
    _gradients,
)
backward_op.implement("cpu", _cpu_backward, _refuses_backward)
backward_op.implement("triton", _triton_backward, _refuses_backward)
reverse_op = Operator(
    "invertible_conv1x1_reverse",
    f"(Tensor y, Tensor grad_y, Tensor? grad_logdet, Tensor matrix, Tensor inverse_matrix, {_PARAMETERS})"
    f" -> (Tensor x, Tensor grad_x, {_GRADIENTS})",
    reference_reverse,
    _reversed,
)
reverse_op.implement("cpu", _cpu_reverse, _refuses)
reverse_op.implement("triton", _triton_reverse, _refuses)


def _plu_outputs(p, lower, upper, sign, log_s):
    return lower.new_empty(lower.shape)


def _plu_gradients(grad, p, lower, upper, sign, log_s):
    return tuple(t.new_empty(t.shape) for t in (lower, upper, log_s))


def _plu_cpu(*plu):
    matrix = _plu_outputs(*plu)
    _backend.native.cpu.plu_matrix(*_contiguous(*plu), matrix)  # type: ignore[union-attr]
    return matrix


def _plu_cpu_backward(grad, *plu):
    grads = _plu_gradients(grad, *plu)
    _backend.native.cpu.plu_matrix_backward(*_contiguous(grad, *plu), *grads)  # type: ignore[union-attr]
    return grads


def _refuses_plu(matrix: Tensor, *_: Any) -> str | None:
    if matrix.dtype != torch.float32:
        return f"{matrix.dtype} is left to the reference"
    return f"{len(matrix)} channels, at most 512 are faster" if len(matrix) > 512 else None


def on_any_backend(op: Operator, *args: Any) -> Any:
    """Run an op of matrices alone; by the reference where a backend was asked for that it does not have."""
    forced = _backend.forced()
    return op(*args) if forced is None or forced in op.backends else op.reference(*args)


_FACTORS = "Tensor p, Tensor lower, Tensor upper, Tensor sign, Tensor log_s"
_plu_op = Operator("plu_matrix", f"({_FACTORS}) -> Tensor", reference_plu, _plu_outputs)
_plu_op.implement("cpu", _plu_cpu, _refuses_plu)
_plu_backward_op = Operator(
    "plu_matrix_backward",
    f"(Tensor grad, {_FACTORS}) -> (Tensor grad_lower, Tensor grad_upper, Tensor grad_log_s)",
    reference_plu_backward,
    _plu_gradients,
)
_plu_backward_op.implement("cpu", _plu_cpu_backward, _refuses_plu)


class _Assemble(torch.autograd.Function):
    """Saves the factors as they are given."""

    @staticmethod
    def forward(ctx, *plu):
        ctx.save_for_backward(*plu)
        return on_any_backend(_plu_op, *plu)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            grads = reference_plu_backward(grad, *ctx.saved_tensors)
        else:
            grads = on_any_backend(_plu_backward_op, grad, *ctx.saved_tensors)
        of_lower, of_upper, of_log_s = grads
        return None, of_lower, of_upper, None, of_log_s


def assemble(plu: PLU) -> Tensor:
    """The matrix, computed in float64 and rounded."""
    return _Assemble.apply(*plu)
