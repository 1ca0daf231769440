"""The negative log-likelihood of the discretized mixture of logistics.

Definitions: T. Salimans et al., "PixelCNN++", ICLR 2017 (arXiv:1701.05517), and ``pixel_cnn_pp/nn.py`` of
OpenAI's pixel-cnn; R. Child, "Very deep VAEs" (arXiv:2011.10650), ``vae_helpers.py`` of vdvae; A. Vahdat and
J. Kautz, "NVAE" (arXiv:2007.03898), ``distributions.py`` of NVlabs/NVAE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._mixture_logistic_checks import (
    channels_first,
    check_channel_dim,
    check_mixtures,
    check_values,
    checked_settings,
    scaled,
)
from genperf.ops._mixture_logistic_reference import reference, reference_backward, wide

__all__ = ["mixture_logistic_nll"]

_compiling = torch.compiler.is_dynamo_compiling
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OP = "mixture_logistic_nll"


def _shape(params: Tensor, reduction: int) -> torch.Size:
    return (torch.Size((len(params), *params.shape[2:])), params.shape[:1], torch.Size(()))[reduction]


def _output(params: Tensor, x: Tensor, *settings: Any) -> Tensor:
    dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
    return params.new_empty(_shape(params, settings[-1]), dtype=dtype)


def _gradients(
    grad: Tensor, params: Tensor, x: Tensor, *settings: Any
) -> tuple[Tensor | None, Tensor | None]:
    want_params, want_x = settings[-2:]
    return (
        torch.empty_like(params) if want_params else None,
        torch.empty_like(x) if want_x else None,
    )


_INPUTS = "Tensor params, Tensor x"
_SETTINGS = (
    "int mixtures, bool logits, int levels, float low, float high, bool exact, bool unit,"
    " float min_log_scale, int reduction"
)


def _cpu(params: Tensor, x: Tensor, *settings: Any) -> Tensor:
    nll = _output(params, x, *settings)
    _backend.native.cpu.mixture_logistic_nll_forward(nll, params, x, *settings)  # type: ignore[union-attr]
    return nll


def _cpu_backward(grad: Tensor, params: Tensor, x: Tensor, *settings: Any) -> tuple[Tensor | None, ...]:
    grads = _gradients(grad, params, x, *settings)
    _backend.native.cpu.mixture_logistic_nll_backward(  # type: ignore[union-attr]
        None, *grads, grad.contiguous(), params, x, *settings[:-2]
    )
    return grads


def _with_gradient(params: Tensor, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """Both at a time, for a gradient of 1 by the result."""
    nll = reference(params, x, *settings)
    gradient, _ = reference_backward(torch.ones_like(nll), params, x, *settings, True, False)
    assert gradient is not None
    return nll, gradient


def _both_outputs(params: Tensor, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _output(params, x, *settings), torch.empty_like(params)


def _cpu_with_gradient(params: Tensor, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    nll, gradient = _both_outputs(params, x, *settings)
    _backend.native.cpu.mixture_logistic_nll_backward(  # type: ignore[union-attr]
        nll, gradient, None, None, params, x, *settings
    )
    return nll, gradient


def _triton(params: Tensor, x: Tensor, *settings: Any) -> Tensor:
    from genperf.kernels.mixture_logistic_nll import mixture_logistic_nll

    return mixture_logistic_nll(params, x, *settings)


def _triton_backward(grad: Tensor, params: Tensor, x: Tensor, *settings: Any) -> tuple[Tensor | None, ...]:
    from genperf.kernels.mixture_logistic_nll import mixture_logistic_nll_backward

    return mixture_logistic_nll_backward(grad, params, x, *settings)


def _refuses(params: Tensor, x: Tensor, *_: Any) -> str | None:
    for tensor in (params, x):
        if tensor.dtype not in _NATIVE_DTYPES:
            return f"{tensor.dtype} is left to the reference"
    return f"{params.dim()} dimensions, at most 8" if params.dim() > 8 else None


def _refuses_backward(grad: Tensor, params: Tensor, x: Tensor, *_: Any) -> str | None:
    return _refuses(params, x)


_forward_op = Operator(OP, f"({_INPUTS}, {_SETTINGS}) -> Tensor", reference, _output)
_backward_op = Operator(
    f"{OP}_backward",
    f"(Tensor grad, {_INPUTS}, {_SETTINGS}, bool want_params, bool want_x)"
    " -> (Tensor grad_params, Tensor grad_x)",
    reference_backward,
    _gradients,
)
_forward_op.implement("cpu", _cpu, _refuses)
_backward_op.implement("cpu", _cpu_backward, _refuses_backward)
_forward_op.implement("triton", _triton, _refuses)
_backward_op.implement("triton", _triton_backward, _refuses_backward)


_both_op = Operator(
    f"{OP}_with_gradient",
    f"({_INPUTS}, {_SETTINGS}) -> (Tensor nll, Tensor grad_params)",
    _with_gradient,
    _both_outputs,
)
_both_op.implement("cpu", _cpu_with_gradient, _refuses)


class _MixtureLogisticNll(torch.autograd.Function):
    """Saves the inputs alone, and computes the mixture again in backward.

    Where ``at_once`` the gradient is made in forward, which is most of the work of either, and is only
    multiplied in backward, the first time; after that it is the caller's, and is computed again.
    """

    @staticmethod
    def forward(ctx, params, x, at_once, *settings):
        ctx.save_for_backward(params, x)
        ctx.settings, ctx.gradient = settings, None
        if not at_once:
            return _forward_op(params, x, *settings)
        nll, ctx.gradient = _both_op(params, x, *settings)
        return nll

    @staticmethod
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[:2]
        grads: tuple[Tensor | None, Tensor | None]
        if torch.is_grad_enabled():
            # With create_graph=True the formulas themselves are differentiated.
            grads = reference_backward(grad, *ctx.saved_tensors, *ctx.settings, *wanted)
        elif ctx.gradient is not None:
            gradient, ctx.gradient = ctx.gradient, None
            grads = _scaled_by(gradient, grad), None
        else:
            grads = _backward_op(grad, *ctx.saved_tensors, *ctx.settings, *wanted)
        return *(g if asked else None for g, asked in zip(grads, wanted, strict=True)), *(
            None for _ in range(1 + len(ctx.settings))
        )


def _scaled_by(gradient: Tensor, factor: Tensor) -> Tensor:
    """[B, P, *], in place, by a number, [B] or [B, *]."""
    if factor.dim() == 0:
        return gradient if factor.item() == 1.0 else gradient.mul_(factor)
    if factor.dim() == 1 and gradient.dim() > 2:
        return gradient.mul_(factor.view(-1, *(1,) * (gradient.dim() - 1)))
    return gradient.mul_(factor[:, None])


def _at_once(params: Tensor, x: Tensor) -> bool:
    """Whether the gradient is best made in forward.

    On a GPU the bytes count, of which it would be more; half precision would round the gradient before its
    scale is known.
    """
    return (
        params.device.type == "cpu"
        and params.dtype == torch.float32
        and params.requires_grad
        and not x.requires_grad
        and not _compiling()
        and _backend.forced() in (None, "cpu")
    )


def apply(params: Tensor, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
    """Of params [B, P, *] and x [B, C, *]."""
    if params.dtype == torch.float64 or x.dtype == torch.float64:
        x = x.to(wide(params).dtype)
    if torch.is_grad_enabled() and (params.requires_grad or x.requires_grad):
        return _MixtureLogisticNll.apply(params, x, _at_once(params, x), *settings)
    return _forward_op(params, x, *settings)


def mixture_logistic_nll(
    params: Tensor,
    x: Tensor,
    *,
    mixtures: int | None = None,
    levels: int = 256,
    channel_dim: int = 1,
    convention: str = "default",
    edge: float | tuple[float, float] | None = None,
    min_log_scale: float = -7.0,
    reduction: str = "none",
    check: bool = False,
) -> Tensor:
    """Negative log-likelihood of grey or RGB images under a discretized mixture of K logistics, in nats.

    The probability of a level is the mass of the mixture between the midpoints to its neighbours; the first
    and the last level have the tails too. Parameters of a pixel, in order: K logits; then for each image
    channel K means, K log-scales and, for RGB, K coefficients, whose tanh is the share in the mean of green
    of red (from the block of red), of blue of red (green's block) and of blue of green (blue's block).

    ``convention`` tells what a level's probability is:

    - "default": as above. The probabilities of all levels sum to 1 whatever the parameters.
    - "openai", "vdvae": the tails where ``|x| > 0.999``; and the density at the level times its width where
      the mass is at most 1e-5, so that probabilities do not sum to 1 where scales are small. VDVAE's
      ``low_bit`` is ``levels=32``, what its loss returns is ``reduction="sample_mean"``.
    - "nvae": the same for values in [0, 1], with the upper tail from 0.99 (of [-1, 1]): the level before
      the last takes it too, and probabilities sum to more than 1.

    Differentiable in ``params`` and ``x``. Arithmetic is in float32 for half precision. The gradient is the
    only memory of its size: backward computes the mixture again, from the inputs; float32 parameters on the
    CPU get their gradient in forward, where it is half the work, and backward gives it its scale. Everything
    is finite for finite parameters: log-scales, and distances from a mean in scales, count as at most 2**60.
    A NaN makes a NaN at its own pixel, as do logits that are all -inf or one of +inf.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), ``triton``, ``reference``. There is no CUDA C++ kernel: it
    would be Triton's, instruction by instruction.

    Args:
        params: [B, P, *] with P = 3 K for grey and 10 K for RGB images, or [B, *, P]; float32, float16,
            bfloat16 or float64, any strides.
        x: [B, C, *] or [B, *, C] of values in [-1, 1] (or [0, 1], see above), C = 1 or 3, any float dtype.
            Values outside are not looked for; they get the tail from half a level before them on.
        mixtures: K, 1 to 65,536; by default what P gives.
        levels: of the data, 2 to 65,536, evenly spaced: 256 for 8 bits.
        channel_dim: 1 or -1, where P and C stand.
        edge: at or beyond which a value has a tail's mass, in [-1, 1]: a number, or (low, high); by default
            the convention's.
        min_log_scale: lower bound of the log-scales, -30 to 30; no gradient passes where it holds.
        reduction: "none" [B, *]; "sample" [B]: the sum over pixels; "sum" []; "sample_mean" [B]: the sum over
            pixels, divided by the number of values C * *.
        check: whether to raise for values out of range, which waits for the device.

    Returns:
        float32 (float64 for float64). For an empty batch it is empty, or 0 for "sum".

    Raises:
        TypeError: for a non-tensor, or a dtype that is not as above.
        ValueError: for shapes, devices, numbers or names that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    check_channel_dim(OP, channel_dim)
    params = channels_first(OP, "params", params, channel_dim)
    x = channels_first(OP, "x", x, channel_dim)
    mixtures = check_mixtures(OP, params, x.shape[1], mixtures)
    check_settings = checked_settings.__wrapped__ if _compiling() else checked_settings
    settings = check_settings(OP, mixtures, True, levels, convention, edge, min_log_scale, reduction)
    check_values(OP, x, params, check, convention == "nvae")
    return scaled(apply(params, x, settings), reduction, x)
