"""The formulas of :func:`genperf.ops.affine_coupling` in plain torch: the specification.

Every map, forward or inverse, is one of

    ``out = (in + sign t) s^e``    the shift before the scale (``pre``)
    ``out = in s^e + sign t``      the shift after it

with e = -1 for ``reciprocal`` and 1 otherwise, and has the log-determinant ``e sum log s``. The inverse of a
map has all three flags turned over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: What the scale is, by its number in the torch op.
SCALES = {"sigmoid": 0, "exp": 1, "tanh": 2, "softplus": 3, "additive": 4}


class Settings(NamedTuple):
    """The arguments of the torch ops that are no tensors, in this order."""

    kind: int
    pre: bool
    sign: float
    reciprocal: bool
    prefactor: float  # of all of h
    offset: float
    eps: float
    clamp: float
    slope: float
    centred: bool
    interleaved: bool
    shift_first: bool
    start: int  # of the transformed channels
    n: int  # how many they are

    def inverted(self) -> Settings:
        return self._replace(pre=not self.pre, sign=-self.sign, reciprocal=not self.reciprocal)


SCHEMA = (
    "int kind, bool pre, float sign, bool reciprocal, float prefactor, float offset, float eps, float clamp,"
    " float slope, bool centred, bool interleaved, bool shift_first, int start, int n"
)


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def parts(h: Tensor, s: Settings) -> tuple[Tensor, Tensor | None]:
    """The views of ``h`` (channels in dimension 1) that hold the shift and the raw scale."""
    if s.kind == SCALES["additive"]:
        return h, None
    first, second = (h[:, 0::2], h[:, 1::2]) if s.interleaved else (h[:, : s.n], h[:, s.n :])
    return (first, second) if s.shift_first else (second, first)


def by_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] for ``like`` [B, C, *]."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _scale(u: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """s, log s, and the derivative of log s by u."""
    if s.kind == SCALES["sigmoid"]:
        u = u + s.offset
        sigmoid, complement = u.sigmoid(), (-u).sigmoid()
        if s.eps == 0:
            # The logarithm of the sigmoid itself is -inf below -104.
            return sigmoid, F.logsigmoid(u), complement
        scale = sigmoid + s.eps
        return scale, scale.log(), sigmoid * complement / scale
    if s.kind == SCALES["exp"]:
        return u.exp(), u, torch.ones_like(u)
    if s.kind == SCALES["tanh"]:
        log_scale = s.clamp * torch.tanh(s.slope * u)
        return log_scale.exp(), log_scale, s.clamp * s.slope * torch.cosh(s.slope * u) ** -2
    softplus = F.softplus(u) + s.eps
    scale = softplus.clamp(max=s.clamp)
    inside = (softplus <= s.clamp).to(u.dtype)
    if s.eps == 0:
        # log softplus(u) = u - e^u / 2 + ..., where the softplus would lose its digits.
        small = u < -17
        log_scale = torch.where(small, u, scale.log())
        return scale, log_scale, torch.where(small, torch.ones_like(u), inside * u.sigmoid() / scale)
    return scale, scale.log(), inside * u.sigmoid() / scale


class _Scaled(NamedTuple):
    """sign t, s, log s, and the derivative of log s by the raw scale; s is None for 1."""

    shift: Tensor
    scale: Tensor | None
    log_scale: Tensor
    derivative: Tensor


def _times(x: Tensor, scale: Tensor | None, reciprocal: bool) -> Tensor:
    if scale is None:
        return x
    return x / scale if reciprocal else x * scale


def _expanded(mask: Tensor | None, like: Tensor) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(1).expand(like.shape)


def _centred(values: Tensor, keep: Tensor | None) -> Tensor:
    """Values less their mean over the sample; what is not kept does not count."""
    dims = list(range(1, values.dim()))
    if keep is None:
        return values - values.mean(dims, keepdim=True)
    values = torch.where(keep, values, 0.0)
    return values - values.sum(dims, keepdim=True) / keep.sum(dims, keepdim=True).clamp(min=1)


def _scaled(h: Tensor, h_scale: Tensor | None, mask: Tensor | None, dtype: torch.dtype, s: Settings):
    shift, raw = parts(_effective(h, h_scale, dtype), s)
    shift = s.prefactor * s.sign * shift
    if raw is None:
        return _Scaled(shift, None, torch.zeros_like(shift), torch.zeros_like(shift))
    scale, log_scale, derivative = _scale(s.prefactor * raw, s)
    if s.centred:
        log_scale = _centred(log_scale, _expanded(mask, log_scale))
        scale = log_scale.exp()
    return _Scaled(shift, scale, log_scale, s.prefactor * derivative)


def _effective(h: Tensor, h_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return h.to(dtype) if h_scale is None else h.to(dtype) * by_channel(h_scale.to(dtype), h)


def _transformed(x: Tensor, scaled: _Scaled, s: Settings) -> Tensor:
    if s.pre:
        return _times(x + scaled.shift, scaled.scale, s.reciprocal)
    return _times(x, scaled.scale, s.reciprocal) + scaled.shift


def _joined(like: Tensor, others: Tensor, part: Tensor, s: Settings) -> Tensor:
    """``others`` with its transformed channels replaced, laid out as ``like``."""
    out = torch.empty_like(like).copy_(others)
    out.narrow(1, s.start, s.n).copy_(part)
    return out


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    keep = _expanded(mask, values)
    return values if keep is None else torch.where(keep, values, 0.0)


def _of_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] for every element of ``like`` [B, *]."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1)).expand(like.shape)


def _forward(x, h, h_scale, mask, s: Settings) -> tuple[Tensor, Tensor]:
    """The transformed channels, and the log-determinant."""
    dtype = wide_dtype(x)
    scaled = _scaled(h, h_scale, mask, dtype, s)
    y = _kept(_transformed(x.narrow(1, s.start, s.n).to(dtype), scaled, s), mask)
    if s.centred or scaled.scale is None:
        return y, x.new_zeros(len(x), dtype=dtype)
    logdet = _kept(scaled.log_scale, mask).flatten(1).sum(1, dtype=torch.float64).to(dtype)
    return y, -logdet if s.reciprocal else logdet


def reference(x, h, h_scale, mask, *settings):
    s = Settings(*settings)
    y, logdet = _forward(x, h, h_scale, mask, s)
    return _joined(x, x, y, s), logdet


def reference_in_place(x, h, h_scale, mask, *settings):
    s = Settings(*settings)
    y, logdet = _forward(x, h, h_scale, mask, s)
    x.narrow(1, s.start, s.n).copy_(y)
    return logdet


def _gradient_of_h(by_shift, by_raw, h, h_scale, mask, dtype, s: Settings):
    """The gradients of h and of h_scale, from those of the shift and the raw scale as they enter."""
    by_h = by_shift
    if by_raw is not None:
        both = (by_shift, by_raw) if s.shift_first else (by_raw, by_shift)
        by_h = torch.stack(both, 2).flatten(1, 2) if s.interleaved else torch.cat(both, 1)
    if h_scale is None:
        return torch.empty_like(h).copy_(by_h), None
    by_h_scale = _kept(by_h * h.to(dtype), mask).sum([0, *range(2, h.dim())], dtype=torch.float64)
    by_h = by_h * by_channel(h_scale.to(dtype), h)
    return torch.empty_like(h).copy_(by_h), by_h_scale.to(h_scale.dtype)


def _backward(grad_y, grad_logdet, v, h, h_scale, mask, s: Settings, from_output: bool):
    """gx and x of the transformed channels, and the gradients of h and h_scale."""
    dtype = wide_dtype(v)
    scaled = _scaled(h, h_scale, mask, dtype, s)
    g, v = (z.narrow(1, s.start, s.n).to(dtype) for z in (grad_y, v))
    g = _kept(g, mask)
    by_x = _kept(_times(g, scaled.scale, s.reciprocal), mask)
    by_shift = s.prefactor * s.sign * (by_x if s.pre else g)
    x, y = v, v
    if from_output:
        x = _kept(_transformed(y, scaled._replace(shift=-scaled.shift), s.inverted()), mask)
    else:
        y = _transformed(x, scaled, s)
    by_raw = None
    if scaled.scale is not None:
        by_log_scale = g * (y if s.pre else y - scaled.shift)
        if s.centred:
            by_log_scale = _centred(by_log_scale, _expanded(mask, g))
        else:
            by_log_scale = by_log_scale + _of_sample(grad_logdet, g)
        by_raw = _kept(by_log_scale * scaled.derivative, mask)
        by_raw = -by_raw if s.reciprocal else by_raw
    return by_x, x, *_gradient_of_h(by_shift, by_raw, h, h_scale, mask, dtype, s)


def reference_backward(grad_y, grad_logdet, v, h, h_scale, mask, *rest):
    *settings, from_output, want_x = rest
    s = Settings(*settings)
    by_x, x, by_h, by_h_scale = _backward(grad_y, grad_logdet, v, h, h_scale, mask, s, from_output)
    return _joined(v, grad_y, by_x, s), by_h, by_h_scale, _joined(v, v, x, s) if want_x else None


def reference_reverse_in_place(grad_y, grad_logdet, y, h, h_scale, mask, *settings):
    s = Settings(*settings)
    by_x, x, by_h, by_h_scale = _backward(grad_y, grad_logdet, y, h, h_scale, mask, s, True)
    y.narrow(1, s.start, s.n).copy_(x)
    grad_y.narrow(1, s.start, s.n).copy_(by_x)
    return by_h, by_h_scale
