"""The logarithm of the probability of classes, under temperature, top-k and top-p.

Definitions: see :mod:`genperf.ops.categorical_sample`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._categorical_checks import Settings, check_logits, check_settings, refuses, refuses_triton
from genperf.ops._categorical_reference import reference_log_prob, reference_log_prob_backward

__all__ = ["categorical_log_prob"]

OP = "categorical_log_prob"


def wide_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _output(logits: Tensor, index: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=wide_dtype(logits))


def _gradient(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _reference_backward(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return _gradient(grad, logits).copy_(reference_log_prob_backward(grad, logits, *rest))


_SETTINGS = "float temperature, int top_k, float top_p"
_op = Operator(OP, f"(Tensor logits, Tensor index, {_SETTINGS}) -> Tensor", reference_log_prob, _output)
_backward_op = Operator(
    f"{OP}_backward",
    f"(Tensor grad, Tensor logits, Tensor index, {_SETTINGS}) -> Tensor",
    _reference_backward,
    _gradient,
)


def _cpu(logits: Tensor, index: Tensor, *settings: Any) -> Tensor:
    log_prob = _output(logits, index)
    _backend.native.cpu.categorical_log_prob(  # type: ignore[union-attr]
        logits, index.contiguous(), log_prob, *settings
    )
    return log_prob


def _cpu_backward(grad: Tensor, logits: Tensor, index: Tensor, *settings: Any) -> Tensor:
    of_logits = _gradient(grad, logits)
    _backend.native.cpu.categorical_log_prob_backward(  # type: ignore[union-attr]
        grad.contiguous(), logits, index.contiguous(), of_logits, *settings
    )
    return of_logits


def _triton(*args: Any) -> Tensor:
    from genperf.kernels.categorical_log_prob import categorical_log_prob

    return categorical_log_prob(*args)


def _triton_backward(*args: Any) -> Tensor:
    from genperf.kernels.categorical_log_prob import categorical_log_prob_backward

    return categorical_log_prob_backward(*args)


def _refuses_triton(logits: Tensor, _: Any, *settings: Any) -> str | None:
    return refuses_triton(logits, *settings[1:])


_op.implement("cpu", _cpu, refuses)
_op.implement("triton", _triton, _refuses_triton)
_backward_op.implement("cpu", _cpu_backward, lambda grad, *rest: refuses(*rest))
_backward_op.implement("triton", _triton_backward, lambda grad, *rest: _refuses_triton(*rest))


class LogProb(torch.autograd.Function):
    """Of classes; a value that is known already is given the gradient alone. Saves the inputs."""

    @staticmethod
    def forward(ctx, logits: Tensor, index: Tensor, known: Tensor | None, settings: Settings) -> Tensor:
        ctx.save_for_backward(logits, index)
        ctx.settings = settings
        return _op(logits, index, *settings) if known is None else known.view_as(known)

    @staticmethod
    def backward(ctx, grad):
        # With create_graph=True the formula itself is differentiated.
        run = reference_log_prob_backward if torch.is_grad_enabled() else _backward_op
        return run(grad, *ctx.saved_tensors, *ctx.settings), None, None, None


def categorical_log_prob(
    logits: Tensor,
    index: Tensor,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """The log-probabilities of classes, in nats, differentiable by the logits.

    Without limits it is ``log_softmax(logits / temperature)`` at the classes; with ``top_k`` and ``top_p``
    that of the distribution which :func:`genperf.ops.categorical_sample` draws from, where the gradient is of
    the classes that are kept. Nothing of the size of the logits is made but the gradient.

    Args:
        logits: as of :func:`genperf.ops.categorical_sample`.
        index: int64, of the shape of the logits without ``dim``.
        dim, temperature, top_k, top_p: as of :func:`genperf.ops.categorical_sample`.

    Returns:
        float32 (float64 for float64) of the shape of ``index``. -inf for a class that is left out. NaN for an
        index outside 0 to K - 1, and where a logit is NaN or +inf, or all are -inf.

    Raises:
        TypeError: for a non-tensor, a dtype that is not as above, or arguments of other types.
        ValueError: for shapes, devices or numbers that do not fit; the message says which.
    """
    logits = check_logits(OP, logits, dim)
    settings = check_settings(OP, temperature, top_k, top_p)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{OP}: index is {got}, expected an int64 tensor")
    if index.shape != logits.shape[:-1] or index.device != logits.device:
        raise ValueError(
            f"{OP}: index has shape {tuple(index.shape)} on {index.device}, expected "
            f"{tuple(logits.shape[:-1])} on {logits.device}"
        )
    if logits.requires_grad and torch.is_grad_enabled():
        return LogProb.apply(logits, index, None, settings)
    return _op(logits, index, *settings)
