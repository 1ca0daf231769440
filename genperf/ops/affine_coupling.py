"""The affine coupling of normalizing flows: split, shift, scale and log-determinant in one pass.

Definitions: L. Dinh et al., "Density estimation using Real NVP", ICLR 2017 (arXiv:1605.08803), section 3.2.
The scale as a sigmoid is that of D. P. Kingma and P. Dhariwal, "Glow", NeurIPS 2018 (arXiv:1807.03039); the
volume-preserving form is that of P. Sorrenson et al., "Disentanglement by nonlinear ICA with general
incompressible-flow networks (GIN)", ICLR 2020 (arXiv:2001.04872).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._affine_coupling_checks import (
    check_channels,
    check_dim,
    check_h_scale,
    check_mask,
    check_options,
    check_tensors,
    checked_options,
)
from genperf.ops._affine_coupling_reference import (
    SCHEMA,
    Settings,
    reference,
    reference_backward,
    reference_in_place,
    reference_reverse_in_place,
    wide_dtype,
)

__all__ = ["AffineCoupling", "AffineCouplingReverse", "affine_coupling", "affine_coupling_reverse"]

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CENTRED = Settings._fields.index("centred")
_compiling = torch.compiler.is_dynamo_compiling


class AffineCoupling(NamedTuple):
    """Results of :func:`affine_coupling`."""

    output: Tensor
    logdet: Tensor


class AffineCouplingReverse(NamedTuple):
    """Results of :func:`affine_coupling_reverse`; ``grad_h_scale`` is None without a ``h_scale``."""

    x: Tensor
    grad_x: Tensor
    grad_h: Tensor
    grad_h_scale: Tensor | None


def _logdet(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(x), dtype=wide_dtype(x))


def _outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _logdet(x)


def _gradients_of_h(h: Tensor, h_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(h), None if h_scale is None else torch.empty_like(h_scale)


def _gradients(grad_y, grad_logdet, v, h, h_scale, mask, *rest):
    *_, want_x = rest
    return torch.empty_like(v), *_gradients_of_h(h, h_scale), torch.empty_like(v) if want_x else None


def _refuses(x: Tensor, h: Tensor, h_scale: Any, mask: Any, *settings: Any) -> str | None:
    for name, tensor in (("x", x), ("h", h)):
        if tensor.dtype not in _NATIVE_DTYPES:
            return f"{name} of {tensor.dtype} is left to the reference"
    if settings[_CENTRED]:
        return "volume_preserving is left to the reference"
    return f"{x.dim()} dimensions, at most 8" if x.dim() > 8 else None


def _refuses_backward(grad_y: Any, grad_logdet: Any, *args: Any) -> str | None:
    return _refuses(*args)


def _numbers(settings: tuple[Any, ...]) -> tuple[Any, ...]:
    """The settings that kernels take: all but ``centred``."""
    return *settings[:_CENTRED], *settings[_CENTRED + 1 :]


def _native_forward(x, y, h, h_scale, mask, settings):
    logdet = _logdet(x)
    mask = None if mask is None else mask.float()
    _backend.native.cpu.affine_coupling_forward(  # type: ignore[union-attr]
        x, h, h_scale, mask, y, logdet, *_numbers(settings)
    )
    return logdet


def _native_backward(grad_y, grad_logdet, v, h, h_scale, mask, grad_x, x, settings, from_output):
    grads = _gradients_of_h(h, h_scale)
    mask = None if mask is None else mask.float()
    _backend.native.cpu.affine_coupling_backward(  # type: ignore[union-attr]
        grad_y, grad_logdet, v, h, h_scale, mask, grad_x, *grads, x, *_numbers(settings), from_output
    )
    return grads


def _triton_forward(x, y, h, h_scale, mask, settings):
    from genperf.kernels.affine_coupling import affine_coupling_forward

    return affine_coupling_forward(x, y, h, h_scale, mask, settings)


def _triton_backward(*args):
    from genperf.kernels.affine_coupling import affine_coupling_backward

    return affine_coupling_backward(*args)


def _backend_of(forward, backward):
    """The four ops, by a kernel for each direction that writes to the tensors it is given."""

    def run(x, h, h_scale, mask, *settings):
        y = torch.empty_like(x)
        return y, forward(x, y, h, h_scale, mask, settings)

    def run_in_place(x, h, h_scale, mask, *settings):
        logdet = forward(x, x, h, h_scale, mask, settings)
        torch.autograd.graph.increment_version(x)
        return logdet

    def run_backward(grad_y, grad_logdet, v, h, h_scale, mask, *rest):
        *settings, from_output, want_x = rest
        grad_x, x = torch.empty_like(v), torch.empty_like(v) if want_x else None
        args = (grad_y, grad_logdet, v, h, h_scale, mask, grad_x, x, settings, from_output)
        return grad_x, *backward(*args), x

    def run_reverse_in_place(grad_y, grad_logdet, y, h, h_scale, mask, *settings):
        grads = backward(grad_y, grad_logdet, y, h, h_scale, mask, grad_y, y, settings, True)
        torch.autograd.graph.increment_version((grad_y, y))
        return grads

    return run, run_in_place, run_backward, run_reverse_in_place


_forward_op = Operator(
    "affine_coupling",
    f"(Tensor x, Tensor h, Tensor? h_scale, Tensor? mask, {SCHEMA}) -> (Tensor y, Tensor logdet)",
    reference,
    _outputs,
)
_in_place_op = Operator(
    "affine_coupling_in_place",
    f"(Tensor(a!) x, Tensor h, Tensor? h_scale, Tensor? mask, {SCHEMA}) -> Tensor logdet",
    reference_in_place,
    _logdet,
)
_backward_op = Operator(
    "affine_coupling_backward",
    "(Tensor grad_y, Tensor grad_logdet, Tensor v, Tensor h, Tensor? h_scale, Tensor? mask,"
    f" {SCHEMA}, bool from_output, bool want_x)"
    " -> (Tensor grad_x, Tensor grad_h, Tensor grad_h_scale, Tensor x)",
    reference_backward,
    _gradients,
)
_reverse_in_place_op = Operator(
    "affine_coupling_reverse_in_place",
    "(Tensor(a!) grad_y, Tensor grad_logdet, Tensor(b!) y, Tensor h, Tensor? h_scale, Tensor? mask,"
    f" {SCHEMA}) -> (Tensor grad_h, Tensor grad_h_scale)",
    reference_reverse_in_place,
    lambda grad_y, grad_logdet, y, h, h_scale, *_: _gradients_of_h(h, h_scale),
)

for _name, _functions in (
    ("cpu", (_native_forward, _native_backward)),
    ("triton", (_triton_forward, _triton_backward)),
):
    _run, _run_in_place, _run_backward, _run_reverse_in_place = _backend_of(*_functions)
    _forward_op.implement(_name, _run, _refuses)
    _in_place_op.implement(_name, _run_in_place, _refuses)
    _backward_op.implement(_name, _run_backward, _refuses_backward)
    _reverse_in_place_op.implement(_name, _run_reverse_in_place, _refuses_backward)


class _AffineCoupling(torch.autograd.Function):
    """Saves the output and h, from which all gradients follow; in half precision, where the output is rounded
    to few digits, the input instead."""

    @staticmethod
    def forward(ctx, x, h, h_scale, mask, in_place, *settings):
        if in_place:
            ctx.mark_dirty(x)
            y, logdet = x, _in_place_op(x, h, h_scale, mask, *settings)
        else:
            y, logdet = _forward_op(x, h, h_scale, mask, *settings)
        ctx.from_output = in_place or x.dtype in (torch.float32, torch.float64)
        ctx.save_for_backward(y if ctx.from_output else x, h, h_scale, mask)
        ctx.settings = settings
        return y, logdet

    @staticmethod
    def backward(ctx, grad_y, grad_logdet):
        # With create_graph=True the formulas themselves are differentiated.
        run = reference_backward if torch.is_grad_enabled() else _backward_op
        saved = ctx.saved_tensors
        of_x, of_h, of_h_scale, _ = run(grad_y, grad_logdet, *saved, *ctx.settings, ctx.from_output, False)
        return of_x, of_h, None if saved[2] is None else of_h_scale, *(None,) * (2 + len(ctx.settings))


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _may_overwrite(x: Tensor, differentiable: bool) -> bool:
    """Whether torch lets an op in place on ``x``."""
    if _compiling() or (x.numel() and 0 in x.stride()):
        return False
    # A leaf may not be overwritten at all, nor one of several views.
    return not differentiable or not (x._is_view() or (x.is_leaf and x.requires_grad))


class _Arguments(NamedTuple):
    """Of either function, with channels in dimension 1."""

    h: Tensor
    h_scale: Tensor | None
    mask: Tensor | None
    settings: Settings
    dim: int


def _arguments(
    op, name, x, h, scale, form, layout, shift_first, transformed, split, offset, eps, clamp, slope,
    prefactor, volume_preserving, h_scale, mask, lengths, channel_dim, inverse,
) -> _Arguments:  # fmt: skip
    numbers = (("offset", offset), ("eps", eps), ("clamp", clamp), ("slope", slope))
    check = check_options if _compiling() else checked_options
    settings = check(
        op, scale, form, layout, shift_first, transformed, volume_preserving, inverse, prefactor, numbers
    )
    check_tensors(op, {name: x, "h": h}, name)
    dim = check_dim(op, x, h, name, channel_dim)
    moved, h = (x, h) if dim == 1 else (x.movedim(dim, 1), h.movedim(dim, 1))
    settings = check_channels(op, name, moved, h, split, settings)
    if h_scale is not None:
        h_scale = check_h_scale(op, h_scale, h)
    if mask is not None or lengths is not None:
        mask = check_mask(op, mask, lengths, moved, name)
    return _Arguments(h, h_scale, mask, settings, dim)


def affine_coupling(
    x: Tensor,
    h: Tensor,
    *,
    scale: str = "sigmoid",
    form: str = "shift_scale",
    layout: str = "halves",
    shift_first: bool = True,
    transformed: str = "second",
    split: int | None = None,
    offset: float | None = None,
    eps: float | None = None,
    clamp: float | None = None,
    slope: float | None = None,
    prefactor: float = 1.0,
    volume_preserving: bool = False,
    h_scale: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    channel_dim: int = 1,
    inverse: bool = False,
    inplace: bool = False,
) -> AffineCoupling:
    """Shift and scale one part of the channels by what a network made of the other, with log|det|.

    With x1 the part that passes and x2 the other, ``u`` the raw scale in ``h`` and ``t`` its shift, s = s(u):

    =============== =================== ====================
    form            y2                  inverse
    =============== =================== ====================
    "shift_scale"   ``(x2 + t) s``      ``y2 / s - t``
    "scale_shift"   ``x2 s + t``        ``(y2 - t) / s``
    "unshift_scale" ``(x2 - t) s``      ``y2 / s + t``
    =============== =================== ====================

    =========== ======================================= =====================================================
    scale       s(u)                                    numbers
    =========== ======================================= =====================================================
    "sigmoid"   ``sigmoid(u + offset) + eps``           offset 2, eps 0
    "exp"       ``exp(u)``
    "tanh"      ``exp(clamp tanh(slope u))``            clamp 2, slope 1 / clamp
    "softplus"  ``min(softplus(u) + eps, clamp)``       eps 1e-3, clamp 3
    "additive"  1, and ``h`` is the shift alone
    =========== ======================================= =====================================================

    The log-determinant is sum log s over the sample, negative for the inverse; without ``eps`` the logarithm
    of the sigmoid is -softplus(-(u + offset)), finite wherever u is.

    Arithmetic is in float32 (float64 for float64) whatever the dtypes. Sums are in a fixed order: the results
    of a sample are the same bits in any batch and for any number of threads. ``docs/flows.md`` has the
    arguments that give the couplings of public libraries.

    Differentiable in ``x``, ``h`` and ``h_scale``. Kept for the backward pass are the output and ``h``;
    in half precision the input, since the output is rounded. Where the shift comes last, ``x2 s`` is the
    output less the shift there, and so has an error of a rounding of the shift.

    Args:
        x: [B, C, *], float32, float16, bfloat16 or float64; 1-D, 2-D, 3-D or no positions; any strides. The
            state of a flow is best kept in float32.
        h: [B, 2 C2, *] (C2 channels where additive), C2 of the transformed channels; a float dtype that may
            differ from that of ``x``, as under autocast; any strides.
        scale, form, offset, eps, clamp, slope: see above.
        layout: "halves": the channels of ``h`` are those of one, then those of the other of shift and scale;
            "interleaved": they alternate.
        shift_first: whether the shift comes first in ``h``.
        transformed: "second" part of the channels of ``x``, or "first".
        split: channels of the first part; None for half of an even number.
        prefactor: of all of ``h``.
        volume_preserving: subtract from log s its mean over the sample; the log-determinant is 0.
        h_scale: [2 C2] or [1, 2 C2, 1, ...]; multiplies the channels of ``h``, such as exp(3 logs) of a
            zero-initialised convolution, whose own pass over ``h`` it saves.
        mask: bool, [B, *] or [B, 1, *], of the positions; elsewhere y2 is 0, nothing is added to the
            log-determinant, and x2 and ``h`` have no influence and no gradient. x1 passes as it is.
        lengths: int64 [B], for [B, C, T]: the mask of the first so many positions.
        channel_dim: that of ``x`` and ``h``.
        inverse: compute the inverse map, and its log-determinant.
        inplace: ``x`` is given up: its storage may become that of the output, where torch allows it, which
            then costs no copy of x1.

    Returns:
        AffineCoupling(output, logdet): the shape, dtype and (if dense) strides of ``x``; [B] float32 (float64
        for float64). A NaN stays in its element, and in the log-determinant of its sample. Where s underflows
        to 0 or overflows, so does the result, as it would step by step.

    Raises:
        TypeError: for a non-tensor, or a dtype that is not as above.
        ValueError: for shapes, devices, numbers or names that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    a = _arguments(
        "affine_coupling", "x", x, h, scale, form, layout, shift_first, transformed, split, offset, eps,
        clamp, slope, prefactor, volume_preserving, h_scale, mask, lengths, channel_dim, inverse,
    )  # fmt: skip
    if a.dim != 1:
        x = x.movedim(a.dim, 1)
    differentiable = _differentiable(x, a.h, a.h_scale)
    in_place = inplace and _may_overwrite(x, differentiable)
    if differentiable:
        y, logdet = _AffineCoupling.apply(x, a.h, a.h_scale, a.mask, in_place, *a.settings)
    elif in_place:
        y, logdet = x, _in_place_op(x, a.h, a.h_scale, a.mask, *a.settings)
    else:
        y, logdet = _forward_op(x, a.h, a.h_scale, a.mask, *a.settings)
    return AffineCoupling(y if a.dim == 1 else y.movedim(1, a.dim), logdet)


def affine_coupling_reverse(
    y: Tensor,
    h: Tensor,
    grad_y: Tensor,
    grad_logdet: Tensor,
    *,
    scale: str = "sigmoid",
    form: str = "shift_scale",
    layout: str = "halves",
    shift_first: bool = True,
    transformed: str = "second",
    split: int | None = None,
    offset: float | None = None,
    eps: float | None = None,
    clamp: float | None = None,
    slope: float | None = None,
    prefactor: float = 1.0,
    volume_preserving: bool = False,
    h_scale: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    channel_dim: int = 1,
    inverse: bool = False,
    inplace: bool = False,
) -> AffineCouplingReverse:
    """From the output of :func:`affine_coupling` its input, and the gradients, in one pass.

    For training that keeps no activations: with ``y, logdet = affine_coupling(x, h, ...)``, x and the
    gradients of x and h follow from y, h, and the gradients of y and logdet. Not itself differentiable.

    Args:
        y: the output, [B, C, *].
        h: as it was given there.
        grad_y: of the shape and dtype of ``y``.
        grad_logdet: [B], float32 (float64 for float64).
        inplace: ``y`` and ``grad_y`` are given up: their storage may become that of ``x`` and ``grad_x``.
        others: as they were given there.

    Returns:
        AffineCouplingReverse(x, grad_x, grad_h, grad_h_scale). At masked positions the transformed part of x
        is 0, as it was if the mask is that of all layers.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`affine_coupling`.
    """
    op = "affine_coupling_reverse"
    a = _arguments(
        op, "y", y, h, scale, form, layout, shift_first, transformed, split, offset, eps, clamp, slope,
        prefactor, volume_preserving, h_scale, mask, lengths, channel_dim, inverse,
    )  # fmt: skip
    check_tensors(op, {"y": y, "grad_y": grad_y, "grad_logdet": grad_logdet}, "y")
    if grad_y.shape != y.shape or grad_y.dtype != y.dtype:
        raise ValueError(
            f"{op}: grad_y has shape {tuple(grad_y.shape)} and dtype {grad_y.dtype}, expected "
            f"{tuple(y.shape)} and {y.dtype}, as y"
        )
    if grad_logdet.shape != y.shape[:1] or grad_logdet.dtype != wide_dtype(y):
        raise ValueError(
            f"{op}: grad_logdet has shape {tuple(grad_logdet.shape)} and dtype {grad_logdet.dtype}, expected "
            f"{tuple(y.shape[:1])} and {wide_dtype(y)}"
        )
    with torch.no_grad():
        if a.dim != 1:
            y, grad_y = y.movedim(a.dim, 1), grad_y.movedim(a.dim, 1)
        arguments = (grad_logdet, y, a.h, a.h_scale, a.mask, *a.settings)
        if inplace and all(_may_overwrite(t, t.requires_grad) for t in (y, grad_y)):
            x, of_x = y, grad_y
            of_h, of_h_scale = _reverse_in_place_op(grad_y, *arguments)
        else:
            of_x, of_h, of_h_scale, x = _backward_op(grad_y, *arguments, True, True)
        if a.dim != 1:
            x, of_x, of_h = (t.movedim(1, a.dim) for t in (x, of_x, of_h))
    return AffineCouplingReverse(x, of_x, of_h, None if h_scale is None else of_h_scale.view(h_scale.shape))
