"""Activation normalization and the invertible 1x1 convolution of a flow, in one pass.

Definition: D. P. Kingma and P. Dhariwal, "Glow: generative flow with invertible 1x1 convolutions", NeurIPS
    2018
(arXiv:1807.03039), table 1 and equations 9 to 11.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf.ops._invertible_conv1x1_checks import Checked, check, check_slogdet
from genperf.ops._invertible_conv1x1_ops import (
    assemble,
    backward_op,
    forward_op,
    on_any_backend,
    reverse_op,
)
from genperf.ops._invertible_conv1x1_reference import PLU, reference_backward
from genperf.ops.slogdet_inverse import _op as _slogdet_op
from genperf.ops.slogdet_inverse import slogdet_inverse

__all__ = [
    "PLU",
    "InvertibleConv1x1",
    "InvertibleConv1x1Reverse",
    "invertible_conv1x1",
    "invertible_conv1x1_reverse",
]


_compiling = torch.compiler.is_dynamo_compiling


class InvertibleConv1x1(NamedTuple):
    """Results of :func:`invertible_conv1x1`."""

    output: Tensor
    logdet: Tensor


class InvertibleConv1x1Reverse(NamedTuple):
    """Results of :func:`invertible_conv1x1_reverse`; None for parameters that were not given."""

    x: Tensor
    grad_x: Tensor
    grad_weight: Any
    grad_logabsdet: Tensor
    grad_shift: Tensor | None
    grad_scale: Tensor | None


class _InvertibleConv1x1(torch.autograd.Function):
    """Saves the inputs alone."""

    @staticmethod
    def forward(ctx, x, matrix, logabsdet, shift, scale, lengths, log, inverse):
        ctx.save_for_backward(x, matrix, shift, scale, lengths)
        ctx.settings = log, inverse
        ctx.set_materialize_grads(False)
        return forward_op(x, matrix, logabsdet, shift, scale, lengths, log, inverse)

    @staticmethod
    def backward(ctx, grad_y, grad_logdet):
        if grad_y is None and grad_logdet is None:
            return (None,) * 8
        want_x, want_matrix, want_logabsdet, want_shift, want_scale, *_ = ctx.needs_input_grad
        # With create_graph=True the formulas themselves are differentiated.
        run: Any = reference_backward if torch.is_grad_enabled() else backward_op
        of_x, of_matrix, of_logabsdet, of_shift, of_scale = run(
            grad_y,
            grad_logdet,
            *ctx.saved_tensors,
            *ctx.settings,
            want_x,
            want_matrix,
            want_shift,
            want_scale,
        )
        return (
            of_x if want_x else None,
            of_matrix if want_matrix else None,
            of_logabsdet if want_logabsdet else None,
            of_shift if want_shift else None,
            of_scale if want_scale else None,
            None,
            None,
            None,
        )


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _inverse_of(matrix: Tensor) -> Tensor:
    forced = _backend.forced()
    if forced is None or forced in _slogdet_op.backends:
        return slogdet_inverse(matrix).inverse
    with _backend.backend("reference"):
        return slogdet_inverse(matrix).inverse


def _of_dense(x, weight, shift, scale, lengths, log, inverse, want_transpose):
    """Output, log-determinant, and the transposed inverse of the weight if it is wanted."""
    _, logabsdet, undo, transpose, _ = on_any_backend(
        _slogdet_op, weight.reshape(-1), [len(weight)], inverse, inverse or want_transpose
    )
    matrix = undo.view(weight.shape) if inverse else weight
    transpose = transpose.view(weight.shape) if want_transpose else None
    return *forward_op(x, matrix, logabsdet, shift, scale, lengths, log, inverse), transpose


class _OfDense(torch.autograd.Function):
    """The same with the elimination of a dense weight, of which the inverse is kept."""

    @staticmethod
    def forward(ctx, x, weight, shift, scale, lengths, log, inverse):
        y, logdet, transpose = _of_dense(x, weight, shift, scale, lengths, log, inverse, True)
        ctx.save_for_backward(x, weight, shift, scale, lengths, transpose)
        ctx.settings = log, inverse
        ctx.set_materialize_grads(False)
        return y, logdet

    @staticmethod
    def backward(ctx, grad_y, grad_logdet):
        if grad_y is None and grad_logdet is None:
            return (None,) * 7
        x, weight, shift, scale, lengths, transpose = ctx.saved_tensors
        log, inverse = ctx.settings
        want_x, want_weight, want_shift, want_scale, *_ = ctx.needs_input_grad
        run: Any = backward_op
        if torch.is_grad_enabled():
            run, transpose = reference_backward, _inverse_of(weight).mT
        of_x, of_weight, of_logabsdet, of_shift, of_scale = run(
            grad_y, grad_logdet, x, transpose.mT if inverse else weight, shift, scale, lengths, log, inverse,
            want_x, want_weight, want_shift, want_scale,
        )  # fmt: skip
        if want_weight:
            of_weight = _through_inverse(of_weight, transpose) if inverse else of_weight
            if grad_logdet is not None:
                of_weight = torch.addcmul(of_weight, transpose, of_logabsdet)
        return (
            of_x if want_x else None,
            of_weight if want_weight else None,
            of_shift if want_shift else None,
            of_scale if want_scale else None,
            None,
            None,
            None,
        )


def _through_inverse(grad: Tensor, transpose: Tensor) -> Tensor:
    """The gradient by a matrix from that by its inverse, in float64: the inverse, here transposed, is in it
    twice."""
    factor = transpose.double()
    return -(factor @ grad.double() @ factor).to(grad.dtype)


def invertible_conv1x1(
    x: Tensor,
    weight: Tensor | PLU,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    log_scale: Tensor | None = None,
    slogdet: Any = None,
    inverse: bool = False,
    lengths: Tensor | None = None,
    channel_dim: int = 1,
) -> InvertibleConv1x1:
    """``y[o] = sum_c weight[o, c] * scale[c] * (x[c] + shift[c])`` at each position, or the inverse map.

    Activation normalization (``scale``, ``shift``) and the invertible 1x1 convolution of Glow, in one pass
    over ``x`` forward and one over ``x`` and the gradient of ``y`` backward, which saves nothing but the
    inputs. The arithmetic is that of ``W diag(scale)`` applied to ``x + shift``: an offset cancels before the
    product.

    - ``logdet`` of a sample is ``N (sum_c log|scale_c| + log|det weight|)`` for its N positions; negative
      with ``inverse``.
    - ``inverse=True`` maps y to x. The inverse of ``weight`` is computed in float64 and rounded; with it
      ``|x' - x| <= 4 eps cond(weight) |x|`` for what comes back (docs/flows.md).
    - A dense ``weight`` goes through :func:`genperf.ops.slogdet_inverse`; give its results for this matrix as
      ``slogdet`` where a model computes those of all layers in one call. A :class:`PLU` is multiplied out in
      float64 and rounded; its log|det| is ``sum(log_s)``, and only ``inverse`` needs an elimination.
    - All is differentiable, twice, in x and the parameters, ``inverse`` included.

    Products and sums are in float32 for float32 and half-precision ``x`` (never TF32, and whatever autocast
    says), with the parameters in float32; float64 for float64. The same bits for any number of threads; a
    sample's output does not depend on its batch.

    A singular ``weight`` raises nothing: forward is as defined, ``logdet`` is -inf, and the inverse and the
    gradient by ``weight`` through ``logdet`` are NaN; ``slogdet_inverse(weight).status`` tells. A scale of 0
    gives -inf, and infinities or NaN in the inverse. A NaN in ``x`` makes its own position NaN; one in
    ``weight`` makes ``logdet`` and all that it is multiplied with NaN.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), ``triton`` (IEEE products; up to 64 channels backward is one
    pass), ``reference``. There is no CUDA C++ kernel: up to 64 channels the Triton kernels wait for memory by
    count of operations, and beyond, exact products leave no use for tensor cores.

    Args:
        x: [B, C, *], sequences, images or volumes (or [B, C]); any strides. float32, float16, bfloat16 or
            float64.
        weight: [C, C] or [C, C, 1, ...], float32 (float64 for float64); or a :class:`PLU` of such.
        shift: [C] or [1, C, 1, ...], dtype of ``weight``; None for 0.
        scale: the same, of any sign; None for 1.
        log_scale: its logarithm instead.
        slogdet: ``logabsdet`` [] and, for ``inverse``, ``inverse`` [C, C] of ``weight`` from
            :func:`genperf.ops.slogdet_inverse`, differentiable; None computes them.
        inverse: whether to apply the inverse map.
        lengths: [B], int64, of sequences: positions from ``lengths[b]`` on are not read, are 0 in the output,
            and do not count in ``logdet``. On a GPU, where they are not checked, one out of range gives a NaN
            ``logdet``.
        channel_dim: the dimension of ``x`` that holds C; -1 for channels last.

    Returns:
        :class:`InvertibleConv1x1`: ``output``, shape, dtype and layout of ``x``; ``logdet`` [B], dtype of
        ``weight``.

    Raises:
        TypeError: for a non-tensor or a dtype that is not as above.
        ValueError: for shapes, devices or (on the CPU) lengths that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    if (
        lengths is None and type(channel_dim) is int and channel_dim == 1
        and not _compiling() and (direct := forward_op.direct("cpu")) is not None
    ):  # fmt: skip
        results = direct(InvertibleConv1x1, x, weight, shift, scale, log_scale, slogdet, inverse)
        if results is not NotImplemented:
            return results
    a = check("invertible_conv1x1", "x", x, weight, shift, scale, log_scale, lengths, channel_dim)
    settings = a.shift, a.scale, a.lengths, a.log, bool(inverse)
    if slogdet is None and not isinstance(a.weight, PLU):
        if _differentiable(a.x, a.weight, a.shift, a.scale):
            output, logdet = _OfDense.apply(a.x, a.weight, *settings)
        else:
            output, logdet = _of_dense(a.x, a.weight, *settings, False)[:2]
    else:
        mixing = _mixing(a, slogdet, inverse)
        run: Any = _InvertibleConv1x1.apply if _differentiable(a.x, *mixing, a.shift, a.scale) else forward_op
        output, logdet = run(a.x, *mixing, *settings)
    return InvertibleConv1x1(output if a.x is x else output.movedim(1, channel_dim), logdet)


def _mixing(a: Checked, slogdet: Any, inverse: bool) -> tuple[Tensor, Tensor]:
    """The matrix to multiply with, and log|det| of the weight."""
    if slogdet is not None:
        check_slogdet("invertible_conv1x1", slogdet, a.x, inverse)
    if isinstance(a.weight, PLU):
        logabsdet = a.weight.log_s.sum()
        if inverse and slogdet is not None:
            return slogdet.inverse, logabsdet
        matrix = assemble(a.weight)
        return _inverse_of(matrix) if inverse else matrix, logabsdet
    return slogdet.inverse if inverse else a.weight, slogdet.logabsdet


def invertible_conv1x1_reverse(
    y: Tensor,
    grad_y: Tensor,
    weight: Tensor | PLU,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    log_scale: Tensor | None = None,
    slogdet: Any = None,
    inverse: bool = False,
    lengths: Tensor | None = None,
    channel_dim: int = 1,
    grad_logdet: Tensor | None = None,
    through_slogdet: bool = True,
) -> InvertibleConv1x1Reverse:
    """The backward pass of :func:`invertible_conv1x1` from its output: x and all gradients in one pass.

    ``y`` is what that function returned for the same parameters and ``inverse``, ``grad_y`` the gradient by
    it. The input is computed again, and the gradient of ``weight`` is that of the input computed again: the
    shorter way, by ``(sum grad_y y^T - ...) A^-T``, multiplies the error of that sum by the condition number
    of A. Nothing is recorded for autograd.

    With half-precision ``y`` the input comes back as exactly as ``y`` was rounded; keep the state of a
    reversible flow in float32.

    Args:
        y: output of :func:`invertible_conv1x1`.
        grad_y: shape of ``y``.
        grad_logdet: [B], gradient by ``logdet``; None for none.
        through_slogdet: whether ``grad_weight`` has the part that comes through log|det weight| (of a dense
            weight); False where the caller differentiates :func:`genperf.ops.slogdet_inverse` by himself,
            with ``grad_logabsdet``.
        weight, shift, scale, log_scale, slogdet, inverse, lengths, channel_dim: as in the forward pass.

    Returns:
        :class:`InvertibleConv1x1Reverse`: ``x`` and ``grad_x``, shape, dtype and layout of ``y``;
        ``grad_weight``, shape of ``weight``, or a :class:`PLU` of gradients with None for ``p`` and
        ``sign_s``; ``grad_logabsdet`` [], by log|det weight|; ``grad_shift``, and ``grad_scale`` (by
        ``log_scale`` where that was given), shapes of theirs.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`invertible_conv1x1`.
    """
    op = "invertible_conv1x1_reverse"
    a = check(op, "y", y, weight, shift, scale, log_scale, lengths, channel_dim)
    if not isinstance(grad_y, Tensor) or grad_y.dtype != y.dtype:
        got = grad_y.dtype if isinstance(grad_y, Tensor) else type(grad_y).__name__
        raise TypeError(f"{op}: grad_y is {got}, expected {y.dtype}, as y")
    if grad_y.shape != y.shape or grad_y.device != y.device:
        raise ValueError(
            f"{op}: grad_y has shape {tuple(grad_y.shape)} on {grad_y.device}, expected {tuple(y.shape)} on "
            f"{y.device}"
        )
    if grad_logdet is not None and (not isinstance(grad_logdet, Tensor) or grad_logdet.shape != y.shape[:1]):
        shape = tuple(grad_logdet.shape) if isinstance(grad_logdet, Tensor) else type(grad_logdet).__name__
        raise ValueError(f"{op}: grad_logdet is {shape}, expected shape ({len(y)},)")
    with torch.no_grad():
        if slogdet is not None:
            check_slogdet(op, slogdet, a.x, True)
        dense = assemble(a.weight) if isinstance(a.weight, PLU) else a.weight
        undo = _inverse_of(dense) if slogdet is None else slogdet.inverse
        grad = grad_y if a.x is y else grad_y.movedim(channel_dim, 1)
        pair = (undo, dense) if inverse else (dense, undo)
        x, grad_x, of_matrix, of_logabsdet, of_shift, of_scale = reverse_op(
            a.x, grad, grad_logdet, *pair, a.shift, a.scale, a.lengths, a.log, bool(inverse)
        )
        if inverse:
            of_matrix = _through_inverse(of_matrix, undo.mT)
        if isinstance(a.weight, PLU):
            of_weight: Any = _through_plu(a.weight, of_matrix, of_logabsdet)
        else:
            of_weight = of_matrix + of_logabsdet * undo.mT if through_slogdet else of_matrix
            of_weight = of_weight.view(weight.shape)  # type: ignore[union-attr]
        factor = log_scale if a.log else scale
        return InvertibleConv1x1Reverse(
            x if a.x is y else x.movedim(1, channel_dim),
            grad_x if a.x is y else grad_x.movedim(1, channel_dim),
            of_weight,
            of_logabsdet,
            None if shift is None else of_shift.view(shift.shape),
            None if factor is None else of_scale.view(factor.shape),
        )


def _through_plu(plu: PLU, grad: Tensor, grad_logabsdet: Tensor) -> PLU:
    """Gradients of l, u and log_s from those of the assembled matrix and of sum(log_s)."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (plu.l, plu.u, plu.log_s)]
        matrix = assemble(PLU(plu.p, leaves[0], leaves[1], plu.sign_s, leaves[2]))
    of_l, of_u, of_log_s = torch.autograd.grad(matrix, leaves, grad)
    return PLU(None, of_l, of_u, None, of_log_s + grad_logabsdet)  # type: ignore[arg-type]
