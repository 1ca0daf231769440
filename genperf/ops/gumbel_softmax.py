"""The Gumbel-softmax: a one-hot draw from logits with a gradient, or its relaxation.

Definitions: E. Jang, S. Gu and B. Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017
(arXiv:1611.01144); C. Maddison, A. Mnih and Y. W. Teh, "The Concrete distribution", ICLR 2017
(arXiv:1611.00712); ``torch.nn.functional.gumbel_softmax``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._gumbel_softmax_reference import reference, reference_backward
from genperf.ops._noise import check_noise, torch_gumbel
from genperf.ops.philox_random import FLOATS

__all__ = ["gumbel_softmax"]

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _output(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _cpu(
    logits: Tensor, noise: Tensor | None, key: Tensor | None, tau: float, hard: bool, dim: int
) -> Tensor:
    y = _output(logits)
    _backend.native.cpu.gumbel_softmax_forward(logits, noise, key, y, dim, tau, hard)  # type: ignore[union-attr]
    return y


def _cpu_backward(
    grad: Tensor, y: Tensor | None, logits: Tensor | None, noise: Tensor | None, key: Tensor | None,
    tau: float, dim: int,
) -> Tensor:  # fmt: skip
    of_logits = _output(grad)
    _backend.native.cpu.gumbel_softmax_backward(  # type: ignore[union-attr]
        grad, y, logits, noise, key, of_logits, dim, tau
    )
    return of_logits


def _refuses(x: Tensor, *_: Any) -> str | None:
    if x.dtype not in _NATIVE_DTYPES:
        return f"{x.dtype} is left to the reference"
    if x.dim() > 8:
        return f"{x.dim()} dimensions, at most 8"
    return f"{max(x.shape)} classes, below 2^31" if max(x.shape) >= 2**31 else None


def _triton(*args):
    from genperf.kernels.gumbel_softmax import gumbel_softmax

    return gumbel_softmax(*args)


def _triton_backward(*args):
    from genperf.kernels.gumbel_softmax import gumbel_softmax_backward

    return gumbel_softmax_backward(*args)


def _refuses_triton(x: Tensor, *_: Any) -> str | None:
    return None if x.dtype in _NATIVE_DTYPES else f"{x.dtype} is left to the reference"


_op = Operator(
    "gumbel_softmax",
    "(Tensor logits, Tensor? noise, Tensor? key, float tau, bool hard, int dim) -> Tensor",
    reference,
    _output,
)
_op.implement("cpu", _cpu, _refuses)
_op.implement("triton", _triton, _refuses_triton)
_backward_op = Operator(
    "gumbel_softmax_backward",
    "(Tensor grad, Tensor? y, Tensor? logits, Tensor? noise, Tensor? key, float tau, int dim) -> Tensor",
    reference_backward,
    _output,
)
_backward_op.implement("cpu", _cpu_backward, _refuses)
_backward_op.implement("triton", _triton_backward, _refuses_triton)


class _GumbelSoftmax(torch.autograd.Function):
    """Saves the result where it is soft, else logits and noise, or the key that makes it again."""

    @staticmethod
    def forward(ctx, logits, noise, key, tau, hard, dim):
        y = _op(logits, noise, key, tau, hard, dim)
        ctx.save_for_backward(*((None, logits, noise, key) if hard else (y, None, None, None)))
        ctx.settings = tau, dim
        return y

    @staticmethod
    def backward(ctx, grad):
        # With create_graph=True the formulas themselves are differentiated.
        run = reference_backward if torch.is_grad_enabled() else _backward_op
        return run(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 5


def gumbel_softmax(
    logits: Tensor,
    tau: float = 1.0,
    hard: bool = False,
    dim: int = -1,
    *,
    rng: str = "philox",
    noise: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """``torch.nn.functional.gumbel_softmax``: a draw from the categorical distribution of logits, relaxed.

    With standard Gumbel noise ``g`` and ``soft = softmax((logits + g) / tau)`` along ``dim``, the result is
    ``soft``, or with ``hard`` the one-hot vector of the largest ``logits + g``, the lowest class where
    several are. That is a draw from softmax(logits), exactly 0 and 1, and its gradient is that of ``soft``
    (straight-through). With a key nothing but logits and key is kept for it: noise and ``soft`` are made
    again.

    Sums of logit and noise are compared, and their differences divided by ``tau``, without the rounding of
    the sum: a shift of all logits, however large, changes nothing but what it rounds off them, and a hard
    draw with one key has the same bits on every backend.

    No logits but NaN give a NaN. Those of inf, and all of -inf, are as the limit in which they go there
    together: the draw is among them, as if they were equal; a logit of -inf beside others is never drawn, and
    has the gradient 0. A NaN makes its row NaN.

    Backward of a backward differentiates the formulas in torch.

    Backends: ``cpu`` (baseline, AVX2, AVX-512), ``triton``, ``reference``. There is no CUDA C++ kernel:
    reading and writing rows is what bounds it, and Triton does that.

    Args:
        logits: any shape of at least one dimension, any strides. float32, float16, bfloat16, or float64 (by
            the reference alone). Half precision is computed in float32.
        tau: temperature, finite, at least 1e-6.
        hard: whether the result is one-hot.
        dim: the dimension of the classes.
        rng: "philox" draws a key; "torch" draws the noise itself, the very numbers of
            ``torch.nn.functional.gumbel_softmax`` on these logits.
        noise: Gumbel noise of shape and dtype of ``logits``, without a gradient; inf counts as the largest
            float, -inf leaves its class out.
        key: int64 [2], or [B, 2] with one for each entry of dimension 0 (which is not ``dim``), from
            :func:`draw_key`, for the noise of docs/randomness.md.
        generator: what noise or key is drawn from; a list has one for each entry of dimension 0.

    Returns:
        A contiguous tensor of shape and dtype of ``logits``.

    Raises:
        TypeError: for a non-tensor, a dtype that is not as above, or arguments of other types.
        ValueError: for shapes, devices or numbers that do not fit; the message says which.
        IndexError: if there is no dimension ``dim``.
        RuntimeError: if a backend was forced that cannot run.
    """
    dim = _check(logits, tau, hard, dim)
    noise, key = check_noise("gumbel_softmax", "logits", logits, noise, key, rng, generator, torch_gumbel)
    if key is not None and key.dim() == 2 and dim == 0:
        raise ValueError(
            f"gumbel_softmax: key has shape {tuple(key.shape)}, one for each entry of dimension 0, which are "
            "the classes (dim=0); expected (2,)"
        )
    return _GumbelSoftmax.apply(logits, noise, key, float(tau), hard, dim)


def _check(logits: Any, tau: Any, hard: Any, dim: Any) -> int:
    """The dimension, from the first."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"gumbel_softmax: logits is {type(logits).__name__}, expected a tensor")
    if logits.dtype not in FLOATS:
        raise TypeError(f"gumbel_softmax: logits is {logits.dtype}, expected one of {FLOATS}")
    if logits.dim() == 0:
        raise ValueError("gumbel_softmax: logits has shape (), expected at least one dimension")
    if isinstance(tau, bool) or not isinstance(tau, (int, float)):
        raise TypeError(f"gumbel_softmax: tau is {type(tau).__name__}, expected a number")
    if not 1e-6 <= tau < math.inf:
        raise ValueError(f"gumbel_softmax: tau is {tau}, expected a finite number >= 1e-6")
    if type(hard) is not bool:
        raise TypeError(f"gumbel_softmax: hard is {type(hard).__name__}, expected a bool")
    if type(dim) is not int:
        raise TypeError(f"gumbel_softmax: dim is {type(dim).__name__}, expected an int")
    if not -logits.dim() <= dim < logits.dim():
        raise IndexError(
            f"gumbel_softmax: dim is {dim}, expected one of {-logits.dim()} to {logits.dim() - 1} for logits "
            f"of shape {tuple(logits.shape)}"
        )
    return dim % logits.dim()
