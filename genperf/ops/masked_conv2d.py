"""Convolution with a masked weight, which skips what the mask zeroes.

Definition: A. van den Oord et al., "Pixel recurrent neural networks", ICML 2016 (arXiv:1601.06759), figure 2:
a convolution whose weight is multiplied by a mask, so that no output sees the pixels that come after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops.philox_random import FLOATS

__all__ = ["masked_conv2d"]

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_Geometry = list[int]  # stride, padding and dilation, each by rows and by columns


def _reference(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    return F.conv2d(x, weight * mask.to(weight.dtype), bias, geometry[:2], geometry[2:4], geometry[4:])


def _reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, geometry: _Geometry,
    want_x: bool, want_weight: bool, want_bias: bool, dense: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    mask = mask.to(weight.dtype)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight * mask, [len(weight)], geometry[:2], geometry[2:4], geometry[4:], False, [0, 0], 1,
        [want_x, want_weight, want_bias],
    )  # fmt: skip
    return grad_x, grad_weight * mask if want_weight and not dense else grad_weight, grad_bias


def _out_shape(x: Tensor, weight: Tensor, geometry: _Geometry) -> list[int]:
    return [len(x), len(weight)] + [
        (x.shape[2 + d] + 2 * geometry[2 + d] - geometry[4 + d] * (weight.shape[2 + d] - 1) - 1)
        // geometry[d]
        + 1
        for d in (0, 1)
    ]


def _layout(x: Tensor) -> torch.memory_format:
    """That of the results: channels last where x is so alone."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    return x.new_empty(_out_shape(x, weight, geometry)).contiguous(memory_format=_layout(x))


def _laid_out(run: Any) -> Any:
    """The reference with the strides of ``_fake``, which torch's convolution chooses by device and size."""

    def laid_out(x: Tensor, *args: Any) -> Tensor:
        return run(x, *args).contiguous(memory_format=_layout(x))

    return laid_out


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, geometry: _Geometry,
    want_x: bool, want_weight: bool, want_bias: bool, dense: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    return (
        x.new_empty(x.shape).contiguous(memory_format=_layout(x)) if want_x else None,
        weight.new_empty(weight.shape) if want_weight else None,
        weight.new_empty(len(weight)) if want_bias else None,
    )


def _laid_out_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = _reference_backward(grad, x, *args)
    return (
        grad_x if grad_x is None else grad_x.contiguous(memory_format=_layout(x)),
        grad_weight if grad_weight is None else grad_weight.contiguous(),
        grad_bias,
    )


def _plain_mask(mask: Tensor, weight_shape: torch.Size) -> Tensor:
    """[O or 1, I or 1, kH, kW]"""
    return _plain(mask.expand(*mask.shape[:2], *weight_shape[2:]))


def _plain(x: Tensor) -> Tensor:
    """As the kernels read it: contiguous float32."""
    return x.detach().to(torch.float32).contiguous()


def _cpu(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    y = x.new_empty(_out_shape(x, weight, geometry), dtype=torch.float32)
    _backend.native.cpu.masked_conv2d_forward(  # type: ignore[union-attr]
        _plain(x),
        _plain(weight),
        _plain_mask(mask, weight.shape),
        None if bias is None else _plain(bias),
        y,
        *geometry,
    )
    return y.to(x.dtype).contiguous(memory_format=_layout(x))


def _cpu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, geometry: _Geometry,
    want_x: bool, want_weight: bool, want_bias: bool, dense: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    native = _backend.native.cpu  # type: ignore[union-attr]
    grad_x = grad_weight = grad_bias = None
    grad, mask = _plain(grad), _plain_mask(mask, weight.shape)
    if want_x:
        grad_x = x.new_empty(x.shape, dtype=torch.float32)
        native.masked_conv2d_grad_input(grad, _plain(weight), mask, grad_x, *geometry)
        grad_x = grad_x.to(x.dtype).contiguous(memory_format=_layout(x))
    if want_weight or want_bias:
        kept = torch.ones(1, 1, *weight.shape[2:]) if dense else mask
        kept = kept if want_weight else torch.zeros_like(kept)
        grad_weight = weight.new_empty(weight.shape, dtype=torch.float32)
        grad_bias = weight.new_empty(len(weight), dtype=torch.float32) if want_bias else None
        native.masked_conv2d_grad_weight(grad, _plain(x), kept, grad_weight, grad_bias, *geometry)
        grad_weight = grad_weight.to(weight.dtype) if want_weight else None
        grad_bias = grad_bias.to(weight.dtype) if grad_bias is not None else None
    return grad_x, grad_weight, grad_bias


def _refuses(x: Tensor, weight: Tensor, *_: Any) -> str | None:
    return None if x.dtype in _NATIVE_DTYPES else f"{x.dtype} is left to the reference"


def _refuses_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, geometry: _Geometry, want_x: bool, *_: Any
) -> str | None:
    if want_x and max(geometry[:2]) > 1:
        return "the gradient of x for a stride above 1 is left to the reference"
    return _refuses(x, weight)


_forward_op = Operator(
    "masked_conv2d",
    "(Tensor x, Tensor weight, Tensor mask, Tensor? bias, int[] geometry) -> Tensor",
    _laid_out(_reference),
    _fake,
)
_forward_op.implement("cpu", _cpu, _refuses)

_backward_op = Operator(
    "masked_conv2d_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor mask, int[] geometry, bool want_x, bool want_weight,"
    " bool want_bias, bool dense) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _laid_out_backward,
    _fake_backward,
)
_backward_op.implement("cpu", _cpu_backward, _refuses_backward)


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, mask, bias, geometry, dense):
        ctx.save_for_backward(x, weight, mask)
        ctx.geometry, ctx.dense = geometry, dense
        return _forward_op(x, weight, mask, bias, geometry)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mask = ctx.saved_tensors
        want_x, want_weight, _, want_bias = wanted = ctx.needs_input_grad[:4]
        # With create_graph=True the formulas themselves are differentiated.
        run = _reference_backward if torch.is_grad_enabled() else _backward_op
        grads = run(grad, x, weight, mask, ctx.geometry, want_x, want_weight, want_bias, ctx.dense)
        of_x, of_weight, of_bias = (g if wanted[i] else None for g, i in zip(grads, (0, 1, 3), strict=True))
        return of_x, of_weight, None, of_bias, None, None


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    dense_gradient: bool = False,
) -> Tensor:
    """``conv2d(x, weight * mask, bias, stride, padding, dilation)``, without the work of what is masked.

    Differentiable in x, weight and bias; the mask is a constant, whose zeros are found at each call. Forward
    and both products of the backward pass skip the taps that the mask zeroes, 24 of the 49 of a 7x7 mask
    "B". Masks by channel (the order of red, green and blue at the centre tap) save work as well, in whatever
    order the channels stand. Each output is summed in an order of its own: the same bits for any number of
    threads and any batch around a sample.

    The definition holds for finite numbers: what is masked is not read, so that a NaN or an infinity there
    does not reach the result, as it would by way of 0 * NaN in a convolution.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), and ``reference`` (torch) for the rest: other devices,
    float64, and the gradient of x for a stride above 1. There is no GPU kernel. By counted operations it
    would not pay in float32: torch's convolution runs in TF32 on the tensor cores by default, at several
    times the rate of IEEE float32, while a causal mask saves half the work at most; and in IEEE float32
    Winograd's algorithm saves 2.25 times the multiplications of 3x3, a mask "B" 1.8 times. In half precision
    it could gain those 1.8 to 2 times, less what it falls short of the vendor's convolution, which has not
    been measured.

    Args:
        x: [B, I, H, W], float32, float16, bfloat16 (arithmetic in float32) or float64. Contiguous or channels
            last, as is then the result; others are copied.
        weight: [O, I, kH, kW], dtype of ``x``.
        mask: broadcastable to ``weight``, with as many dimensions; bool, integer or float.
        bias: [O], or None.
        stride, dilation: integer, or (rows, columns).
        padding: the same; or "valid", or "same" (stride 1, with an odd extent of the kernel).
        dense_gradient: the gradient of ``weight`` is that of ``conv2d(x, weight)`` at ``weight * mask``, as
            if the masked elements had been zeroed beforehand: of all taps, and computed for all.

    Returns:
        [B, O, H', W'], dtype of ``x``.

    Raises:
        TypeError: for a non-tensor or a dtype that is not as above.
        ValueError: for shapes, devices or numbers that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    geometry = _check(x, weight, mask, bias, stride, padding, dilation)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _MaskedConv2d.apply(x, weight, mask, bias, geometry, dense_gradient)
    return _forward_op(x, weight, mask, bias, geometry)


def _check(x: Any, weight: Any, mask: Any, bias: Any, stride: Any, padding: Any, dilation: Any) -> _Geometry:
    for name, tensor in (("x", x), ("weight", weight), ("mask", mask), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"masked_conv2d: {name} is {type(tensor).__name__}, expected a tensor")
        if name == "x" and tensor.dtype not in FLOATS:
            raise TypeError(f"masked_conv2d: x is {tensor.dtype}, expected one of {FLOATS}")
        if name == "mask":
            if tensor.is_complex() or tensor.requires_grad:
                got = "complex" if tensor.is_complex() else "a tensor that requires a gradient"
                raise TypeError(f"masked_conv2d: mask is {got}, expected a real constant")
        elif tensor.dtype != x.dtype:
            raise TypeError(f"masked_conv2d: {name} is {tensor.dtype}, expected {x.dtype}, as x")
        if tensor.device != x.device:
            raise ValueError(f"masked_conv2d: {name} is on {tensor.device}, expected {x.device}, as x")
        if tensor.dim() != (1 if name == "bias" else 4):
            shape = {"x": "[B, I, H, W]", "bias": "[O]"}.get(name, "[O, I, kH, kW]")
            raise ValueError(f"masked_conv2d: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"masked_conv2d: weight has shape {tuple(weight.shape)}, expected {x.shape[1]} input channels, "
            f"as x, {tuple(x.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(
            f"masked_conv2d: weight has shape {tuple(weight.shape)}, expected no empty dimension"
        )
    if any(m not in (1, w) for m, w in zip(mask.shape, weight.shape, strict=True)):
        raise ValueError(
            f"masked_conv2d: mask has shape {tuple(mask.shape)}, expected one that broadcasts to weight, "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and len(bias) != len(weight):
        raise ValueError(f"masked_conv2d: bias has shape {tuple(bias.shape)}, expected ({len(weight)},)")
    strides, dilations = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    extent = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    if padding == "valid":
        paddings = [0, 0]
    elif padding == "same":
        if max(strides) > 1 or any(e % 2 for e in extent):
            raise ValueError(
                f'masked_conv2d: padding is "same" for stride {tuple(strides)} and kernel '
                f"{tuple(weight.shape[2:])}, expected stride 1 and an odd extent of the kernel"
            )
        paddings = [e // 2 for e in extent]
    else:
        paddings = _pair(padding, "padding", 0)
    if any(n + 2 * p < e + 1 for n, p, e in zip(x.shape[2:], paddings, extent, strict=True)):
        raise ValueError(
            f"masked_conv2d: x has shape {tuple(x.shape)}, expected images not smaller, with padding "
            f"{tuple(paddings)}, than the kernel, {tuple(e + 1 for e in extent)}"
        )
    return strides + paddings + dilations


def _pair(value: Any, name: str, least: int) -> list[int]:
    numbers = [value, value] if isinstance(value, int) else value
    if (
        not isinstance(numbers, (list, tuple))
        or len(numbers) != 2
        or not all(isinstance(n, int) and n >= least for n in numbers)
    ):
        raise ValueError(
            f"masked_conv2d: {name} is {value!r}, expected an integer of at least {least}, or two of them"
        )
    return list(numbers)
