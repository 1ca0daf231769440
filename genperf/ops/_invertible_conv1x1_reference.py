"""The formulas of :func:`genperf.ops.invertible_conv1x1` in plain torch: the specification.

``x`` is [B, C, *]; ``matrix`` is W, or for ``inverse`` the inverse of W; ``scale`` is log s where ``log``
says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PLU(NamedTuple):
    """A square matrix ``p @ (tril(l, -1) + 1) @ (triu(u, 1) + diag(sign_s * exp(log_s)))``.

    ``p``, ``l``, ``u`` are [C, C], ``sign_s`` and ``log_s`` [C]; ``p`` is a permutation matrix and, like
    ``sign_s``, not differentiated. Of ``l`` and ``u`` only what stands strictly below and above the diagonal
    counts.
    """

    p: Tensor
    l: Tensor  # noqa: E741
    u: Tensor
    sign_s: Tensor
    log_s: Tensor


def _factors(plu: PLU) -> PLU:
    """In float64, with what is not read in them filled in; ``log_s`` is the diagonal itself."""
    diagonal = plu.sign_s.double() * plu.log_s.double().exp()
    lower = plu.l.double().tril(-1) + torch.eye(len(diagonal), dtype=torch.float64, device=plu.l.device)
    upper = plu.u.double().triu(1) + diagonal.diag_embed()
    return PLU(plu.p.double(), lower, upper, plu.sign_s, diagonal)


def reference_plu(*plu):
    """The matrix, computed in float64 and rounded."""
    f = _factors(PLU(*plu))
    return (f.p @ f.l @ f.u).to(f.sign_s.dtype)


def reference_plu_backward(grad, *plu):
    f = _factors(PLU(*plu))
    inner = f.p.mT @ grad.double()
    of_upper = f.l.mT @ inner
    grads = (inner @ f.u.mT).tril(-1), of_upper.triu(1), of_upper.diagonal() * f.log_s
    return tuple(g.to(grad.dtype) for g in grads)


def _exact_products(x: Tensor) -> Any:
    """Autocast off, which would round the factors."""
    return torch.autocast(x.device.type, enabled=False)


def _product(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """In the dtype of the factors; torch may have leave to round them to TF32, so it is given float64."""
    if a.is_cuda and a.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return torch.einsum(equation, a.double(), b.double()).to(a.dtype)
    return torch.einsum(equation, a, b)


def _live(x: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, C, N], zero beyond the lengths."""
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    x = x.to(dtype)
    if lengths is None:
        return x
    inside = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
    return torch.where(inside[:, None], x, 0)


def _positions(x: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B]: how many positions of each sample count; NaN for lengths that are none."""
    n = x.shape[2:].numel()
    if lengths is None:
        return torch.full((len(x),), float(n), dtype=dtype, device=x.device)
    return torch.where((lengths >= 0) & (lengths <= n), lengths.to(dtype), torch.nan)


def _linear(scale: Tensor | None, log: bool) -> Tensor | None:
    return scale.exp() if scale is not None and log else scale


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Values [B, C, N] with the shape, dtype and layout of ``x``."""
    return torch.empty_like(x).copy_(values.reshape(x.shape))


def _spread(parameter: Tensor) -> Tensor:
    return parameter[:, None]


def reference(x, matrix, logabsdet, shift, scale, lengths, log, inverse):
    s = _linear(scale, log)
    with _exact_products(x):
        z = _live(x, lengths, matrix.dtype)
        if not inverse:
            z = z if shift is None else z + _spread(shift)
            z = z if s is None else z * _spread(s)
        y = _product("oc,bcn->bon", matrix, z)
        if inverse:
            y = y if s is None else y / _spread(s)
            y = y if shift is None else y - _spread(shift)
        y = _live(y, lengths, matrix.dtype)
    return _like(y, x), logdets(x, matrix, logabsdet, scale, lengths, log, inverse)


def logdets(x, matrix, logabsdet, scale, lengths, log, inverse):
    total = logabsdet
    if scale is not None:
        total = total + (scale if log else scale.abs().log()).sum()
    return _positions(x, lengths, matrix.dtype) * (-total if inverse else total)


def reference_backward(
    grad_y, grad_logdet, x, matrix, shift, scale, lengths, log, inverse,
    want_x, want_matrix, want_shift, want_scale,
):  # fmt: skip
    folded = _folded(matrix, _linear(scale, log), inverse)
    grads = (None,) * 4
    if grad_y is not None:
        with _exact_products(x):
            z = _live(x, lengths, matrix.dtype)
            z = z if inverse or shift is None else z + _spread(shift)
            grads = _gradients(grad_y, z, folded, matrix, shift, scale, lengths, log, inverse, want_x)
    grad_x = grads[0]
    if want_x:
        grad_x = torch.zeros_like(x) if grad_x is None else _like(grad_x, x)
    return grad_x, *through_logdet(
        grads[1:],
        grad_logdet,
        x,
        matrix,
        shift,
        scale,
        lengths,
        log,
        inverse,
        want_matrix,
        want_shift,
        want_scale,
    )


def reference_reverse(y, grad_y, grad_logdet, matrix, inverse_matrix, shift, scale, lengths, log, inverse):
    """``inverse_matrix`` undoes ``matrix``; with ``inverse`` the outputs are those of an inverse pass."""
    s = _linear(scale, log)
    with _exact_products(y):
        v = _live(y, lengths, matrix.dtype)
        if inverse and shift is not None:
            v = v + _spread(shift)
        # What the matrix was multiplied with: x + shift, or for ``inverse`` x.
        z = _product("co,bon->bcn", _folded(inverse_matrix, s, not inverse), v)
        x = z if inverse or shift is None else z - _spread(shift)
        x = _live(x, lengths, matrix.dtype)
        folded = _folded(matrix, s, inverse)
        grads = _gradients(grad_y, z, folded, matrix, shift, scale, lengths, log, inverse, True)
    return _like(x, y), _like(grads[0], y), *through_logdet(
        grads[1:], grad_logdet, y, matrix, shift, scale, lengths, log, inverse, True, True, True
    )  # fmt: skip


def _folded(matrix: Tensor, s: Tensor | None, inverse: bool) -> Tensor:
    """W diag(s), or the inverse of it from that of W."""
    if s is None:
        return matrix
    return matrix / _spread(s) if inverse else matrix * s


def _gradients(grad_y, z, folded, matrix, shift, scale, lengths, log, inverse, want_x):
    """Of x [B, C, N], matrix, shift and scale, by the output alone."""
    grad = _live(grad_y, lengths, matrix.dtype)
    grad_x = _product("oc,bon->bcn", folded, grad) if want_x else None
    outer, sums = _product("bon,bcn->oc", grad, z), grad.sum((0, 2))
    return grad_x, *parameter_gradients(outer, sums, matrix, shift, scale, log, inverse)


def parameter_gradients(outer, sums, matrix, shift, scale, log, inverse):
    """Of matrix, shift and scale, from the sums over positions of gradient times input and of gradient."""
    s = _linear(scale, log)
    grad_shift = None
    if shift is not None:
        grad_shift = -sums if inverse else (_folded(matrix, s, inverse) * _spread(sums)).sum(0)
    if s is None:
        return outer, grad_shift, None
    if inverse:
        grad_matrix = outer / _spread(s)
        grad_s = -(matrix * grad_matrix).sum(1) / s
    else:
        grad_matrix = outer * s
        grad_s = (matrix * outer).sum(0)
    return grad_matrix, grad_shift, grad_s * s if log else grad_s


def through_logdet(
    grads, grad_logdet, x, matrix, shift, scale, lengths, log, inverse, want_matrix, want_shift, want_scale
):
    """Gradients of matrix, logabsdet, shift and scale, with what comes through the log-determinant."""
    grad_matrix, grad_shift, grad_scale = grads
    by_total = matrix.new_zeros(())
    if grad_logdet is not None:
        by_total = (grad_logdet * _positions(x, lengths, matrix.dtype)).sum()
        by_total = -by_total if inverse else by_total
    if want_matrix and grad_matrix is None:
        grad_matrix = torch.zeros_like(matrix)
    if want_shift and shift is not None and grad_shift is None:
        grad_shift = torch.zeros_like(shift)
    if want_scale and scale is not None:
        through = by_total.expand(scale.shape) if log else by_total / scale
        grad_scale = through if grad_scale is None else grad_scale + through
    return (
        grad_matrix if want_matrix else None,
        by_total,
        grad_shift if want_shift and shift is not None else None,
        grad_scale if want_scale and scale is not None else None,
    )
