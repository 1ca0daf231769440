"""Likelihoods whose terms are an element's own: the torch ops and the gradient of such a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._mixture_logistic_checks import check_one_of, check_tensor
from genperf.ops.mixture_logistic_nll import _scaled_by

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("none", "sample", "sum")
_INPUTS = "Tensor params, Tensor? scale, Tensor x"
_SETTINGS = "float factor, float low, float high, int reduction"


def check_reduction(op: str, reduction: str) -> int:
    check_one_of(op, "reduction", reduction, REDUCTIONS)
    return REDUCTIONS.index(reduction)


def check_values(op: str, x: Any, like: Tensor, name: str) -> None:
    """Values x of the shape of ``like``, the parameter ``name`` of each of them."""
    check_tensor(op, "x", x)
    if x.device != like.device:
        raise ValueError(f"{op}: x is on {x.device}, expected {like.device}, as {name}")
    if x.shape != like.shape:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected {tuple(like.shape)}, as {name}")


def _output(params: Tensor, scale: Tensor | None, x: Tensor, *settings: Any) -> Tensor:
    shape = (x.shape, x.shape[:1], torch.Size(()))[settings[-1]]
    dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
    return params.new_empty(shape, dtype=dtype)


def _gradients(grad: Tensor, params: Tensor, scale: Tensor | None, x: Tensor, *settings: Any):
    want_params, want_scale, want_x = settings[-3:]
    return (
        torch.empty_like(params) if want_params else None,
        torch.empty_like(scale) if want_scale and scale is not None else None,
        torch.empty_like(x) if want_x else None,
    )


def _both_outputs(params: Tensor, scale: None, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _output(params, scale, x, *settings), torch.empty_like(params)


def refuses(*tensors: Any) -> str | None:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            if tensor.dtype not in _NATIVE_DTYPES:
                return f"{tensor.dtype} is left to the reference"
            if tensor.dim() > 8:
                return f"{tensor.dim()} dimensions, at most 8"
    return None


def _refuses(params: Tensor, scale: Tensor | None, x: Tensor, *_: Any) -> str | None:
    return refuses(params[:, 0], scale, x)


def _planes(params: Tensor | None, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Logits or means, and scales, [B, *] each."""
    if params is None:
        return None, scale
    return params[:, 0], params[:, 1] if params.shape[1] == 2 else scale


class ElementNll:
    """The torch ops ``genperf::<name>``, ``<name>_backward`` and ``<name>_with_gradient``.

    Args:
        name: of the head.
        number: of the head in the kernels.
        reference, backward: the formulas.
    """

    def __init__(
        self, name: str, number: int, reference: Callable[..., Tensor], backward: Callable[..., Any]
    ) -> None:
        def with_gradient(params: Tensor, scale: None, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
            nll = reference(params, scale, x, *settings)
            gradient = backward(torch.ones_like(nll), params, scale, x, *settings, True, False, False)[0]
            return nll, gradient

        self.reference_backward = backward
        self.forward = Operator(name, f"({_INPUTS}, {_SETTINGS}) -> Tensor", reference, _output)
        self.backward = Operator(
            f"{name}_backward",
            f"(Tensor grad, {_INPUTS}, {_SETTINGS}, bool want_params, bool want_scale, bool want_x)"
            " -> (Tensor grad_params, Tensor grad_scale, Tensor grad_x)",
            backward,
            _gradients,
        )
        self.both = Operator(
            f"{name}_with_gradient",
            f"({_INPUTS}, {_SETTINGS}) -> (Tensor nll, Tensor grad_params)",
            with_gradient,
            _both_outputs,
        )
        self._number = number
        self.forward.implement("cpu", self._cpu, _refuses)
        self.backward.implement("cpu", self._cpu_backward, lambda grad, *args: _refuses(*args))
        self.both.implement("cpu", self._cpu_with_gradient, _refuses)
        self.forward.implement("triton", self._triton, _refuses)
        self.backward.implement("triton", self._triton_backward, lambda grad, *args: _refuses(*args))

    def _cpu(self, params: Tensor, scale: Tensor | None, x: Tensor, *settings: Any) -> Tensor:
        nll = _output(params, scale, x, *settings)
        self._run(nll, (None, None, None), None, params, scale, x, settings)
        return nll

    def _cpu_backward(self, grad: Tensor, params: Tensor, scale: Tensor | None, x: Tensor, *settings: Any):
        grads = _gradients(grad, params, scale, x, *settings)
        self._run(None, grads, grad.contiguous(), params, scale, x, settings[:-3])
        return grads

    def _cpu_with_gradient(self, params: Tensor, scale: None, x: Tensor, *settings: Any):
        nll, gradient = _both_outputs(params, scale, x, *settings)
        self._run(nll, (gradient, None, None), None, params, scale, x, settings)
        return nll, gradient

    def _run(self, nll, grads, grad, params, scale, x, settings) -> None:
        first, second = _planes(params, scale)
        grad_first, grad_second = _planes(*grads[:2])
        _backend.native.cpu.element_nll(  # type: ignore[union-attr]
            self._number, nll, grad_first, grad_second, grads[2], grad, first, second, x, *settings
        )

    def _triton(self, params: Tensor, scale: Tensor | None, x: Tensor, *settings: Any) -> Tensor:
        from genperf.kernels.element_nll import element_nll_forward

        first, second = _planes(params, scale)
        assert first is not None
        return element_nll_forward(self._number, first, second, x, *settings)

    def _triton_backward(self, grad: Tensor, params: Tensor, scale: Tensor | None, x: Tensor, *settings: Any):
        from genperf.kernels.element_nll import element_nll_backward

        grads = _gradients(grad, params, scale, x, *settings)
        grad_planes = *_planes(*grads[:2]), grads[2]
        first, second = _planes(params, scale)
        assert first is not None
        element_nll_backward(self._number, grad, grad_planes, first, second, x, *settings[:-3])
        return grads

    def __call__(self, params: Tensor, scale: Tensor | None, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        """Of params [B, 1 or 2, *], a scale [B, *] where there is one, and x [B, *]."""
        if params.dtype == torch.float64 or x.dtype == torch.float64:
            x = x.to(torch.float64 if params.dtype == torch.float64 else torch.float32)
        tensors = [t for t in (params, scale, x) if t is not None]
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return self.forward(params, scale, x, *settings)
        return _ElementNll.apply(params, scale, x, self, _at_once(params, scale, x), *settings)


def _at_once(params: Tensor, scale: Tensor | None, x: Tensor) -> bool:
    """Whether the gradient is best made in forward, as of ``mixture_logistic_nll``."""
    return (
        params.device.type == "cpu"
        and params.dtype == torch.float32
        and params.requires_grad
        and scale is None
        and not x.requires_grad
        and not torch.compiler.is_dynamo_compiling()
        and _backend.forced() in (None, "cpu")
    )


class _ElementNll(torch.autograd.Function):
    """Saves the inputs alone; where ``at_once`` the gradient is made in forward, and used up by backward."""

    @staticmethod
    def forward(ctx, params, scale, x, head, at_once, *settings):
        ctx.save_for_backward(params, scale, x)
        ctx.head, ctx.settings, ctx.gradient = head, settings, None
        if not at_once:
            return head.forward(params, scale, x, *settings)
        nll, ctx.gradient = head.both(params, scale, x, *settings)
        return nll

    @staticmethod
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[:3]
        grads: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():
            # With create_graph=True the formulas themselves are differentiated.
            grads = ctx.head.reference_backward(grad, *ctx.saved_tensors, *ctx.settings, *wanted)
        elif ctx.gradient is not None:
            gradient, ctx.gradient = ctx.gradient, None
            grads = _scaled_by(gradient, grad), None, None
        else:
            grads = ctx.head.backward(grad, *ctx.saved_tensors, *ctx.settings, *wanted)
        return *(g if asked else None for g, asked in zip(grads, wanted, strict=True)), *(
            None for _ in range(2 + len(ctx.settings))
        )
