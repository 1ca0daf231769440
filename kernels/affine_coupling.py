"""The affine coupling of a flow: shift, scale and log-determinant.

The math is that of ``csrc/affine_coupling/affine_coupling.h``; the op is ``genperf/ops/affine_coupling.py``.
One launch over the transformed channels in either direction (plus one for the log-determinants of samples
longer than a tile), and one copy of the others unless the op is in place. The gradient of ``h_scale`` is
torch's sum by channel of products that the kernel leaves.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import exp, log, log_normal, rounded, softplus, tanh
from ._math import sigmoid as sigmoid_of
from ._tile import LAUNCH, Example, offset_of, on_device_of, plan, store_sums, sum_chunks, tile

SIGMOID = tl.constexpr(0)
EXP = tl.constexpr(1)
TANH = tl.constexpr(2)
SOFTPLUS = tl.constexpr(3)
ADDITIVE = tl.constexpr(4)


@triton.jit
def _factor(b_u, offset, eps, clamp, slope, SCALE: tl.constexpr, PLUS: tl.constexpr):
    """s(u), its logarithm, and the derivative of that. PLUS: whether eps is not 0."""
    if SCALE == SIGMOID:
        b_u = b_u + offset
        b_e = exp(-tl.abs(b_u))
        b_d = 1.0 + b_e
        b_large = tl.div_rn(tl.full(b_u.shape, 1.0, tl.float32), b_d)
        b_small = b_e * b_large
        b_sigmoid = tl.where(b_u >= 0.0, b_large, b_small)
        b_complement = tl.where(b_u >= 0.0, b_small, b_large)
        if PLUS:
            b_s = b_sigmoid + eps
            b_log = log(b_s)
            b_derivative = tl.div_rn(b_sigmoid * b_complement, b_s)
        else:
            b_s = b_sigmoid
            b_log = tl.where(b_u < 0.0, b_u, 0.0) - (log_normal(b_d) + (b_e - (b_d - 1.0)) * b_large)
            b_derivative = b_complement
    elif SCALE == EXP:
        b_s = exp(b_u)
        b_log = b_u
        b_derivative = tl.full(b_u.shape, 1.0, tl.float32)
    elif SCALE == TANH:
        b_t, b_dt = tanh(slope * b_u)
        b_log = clamp * b_t
        b_s = exp(b_log)
        b_derivative = clamp * slope * b_dt
    else:
        tl.static_assert(SCALE == SOFTPLUS)
        b_sum = softplus(b_u) + eps
        b_s = tl.where(b_sum > clamp, clamp, b_sum)
        b_log = log(b_s)
        b_derivative = tl.div_rn(tl.where(b_sum <= clamp, sigmoid_of(b_u), 0.0), b_s)
        if not PLUS:  # log softplus(u) = u - e^u / 2 + ...
            b_log = tl.where(b_u < -17.0, b_u, b_log)
            b_derivative = tl.where(b_u < -17.0, 1.0, b_derivative)
    return b_s, b_log, b_derivative


@triton.jit
def _times(b_x, b_s, RECIPROCAL: tl.constexpr):
    if RECIPROCAL:
        return tl.div_rn(b_x, b_s)
    else:
        return b_x * b_s


@triton.jit
def _load(p, i_b, i_n, m, sizes, strides):
    return tl.load(p + offset_of(i_b, i_n, sizes, strides), mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p, b, i_b, i_n, m, sizes, strides):
    tl.store(p + offset_of(i_b, i_n, sizes, strides), rounded(b, p.dtype.element_ty), mask=m)


@triton.jit
def _kept(p_mask, i_b, i_n, m, sizes, strides):
    """Which elements count."""
    if p_mask is not None:
        m = m & (tl.load(p_mask + offset_of(i_b, i_n, sizes, strides), mask=m, other=0) != 0)
    return m


@triton.jit
def _scaled(p_h, p_scale, i_b, i_n, m, sizes, s_h, s_scale):
    """A part of h as it is, and times h_scale."""
    b_h = _load(p_h, i_b, i_n, m, sizes, s_h)
    b_scaled = b_h
    if p_scale is not None:
        b_scaled = b_h * _load(p_scale, i_b, i_n, m, sizes, s_scale)
    return b_h, b_scaled


@triton.jit
def _forward_kernel(
    p_x,
    p_t,
    p_u,
    p_t_scale,
    p_u_scale,
    p_mask,
    p_y,
    p_logdet,
    strides,
    sizes,
    n_samples,
    n_elements,
    n_chunks,
    shift_factor,
    prefactor,
    offset,
    eps,
    clamp,
    slope,
    SCALE: tl.constexpr,
    PRE: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    PLUS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_x, s_t, s_u, s_t_scale, s_u_scale, s_mask, s_y = strides
    i_chunk, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    b_y = _load(p_x, i_b, i_n, m, sizes, s_x)  # [BLOCK_B, BLOCK_N], as all that follow
    _, b_t = _scaled(p_t, p_t_scale, i_b, i_n, m, sizes, s_t, s_t_scale)
    b_t = b_t * shift_factor
    m_kept = _kept(p_mask, i_b, i_n, m, sizes, s_mask)
    if PRE:
        b_y = b_y + b_t
    if SCALE != ADDITIVE:
        _, b_u = _scaled(p_u, p_u_scale, i_b, i_n, m, sizes, s_u, s_u_scale)
        b_s, b_log, _ = _factor(b_u * prefactor, offset, eps, clamp, slope, SCALE, PLUS)
        b_y = _times(b_y, b_s, RECIPROCAL)
        if RECIPROCAL:
            b_log = -b_log
        store_sums(p_logdet, tl.where(m_kept, b_log, 0.0), n_samples, n_chunks, i_chunk, i_b, m)
    if not PRE:
        b_y = b_y + b_t
    _store(p_y, tl.where(m_kept, b_y, 0.0), i_b, i_n, m, sizes, s_y)


@triton.jit
def _backward_kernel(
    p_grad_y,
    p_grad_logdet,
    p_v,
    p_t,
    p_u,
    p_t_scale,
    p_u_scale,
    p_mask,
    p_grad_x,
    p_grad_t,
    p_grad_u,
    p_x,
    p_by_t,
    p_by_u,
    strides,
    s_grad_logdet,
    sizes,
    n_samples,
    n_elements,
    n_chunks,
    shift_factor,
    prefactor,
    offset,
    eps,
    clamp,
    slope,
    SCALE: tl.constexpr,
    PRE: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    PLUS: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s_grad_y, s_v, s_t, s_u, s_t_scale, s_u_scale, s_mask = strides[:7]
    s_grad_x, s_grad_t, s_grad_u, s_x, s_by_t, s_by_u = strides[7:]
    _, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    b_grad = _load(p_grad_y, i_b, i_n, m, sizes, s_grad_y)  # [BLOCK_B, BLOCK_N], as all that follow
    b_v = _load(p_v, i_b, i_n, m, sizes, s_v)
    b_raw_t, b_t = _scaled(p_t, p_t_scale, i_b, i_n, m, sizes, s_t, s_t_scale)
    b_t = b_t * shift_factor
    m_kept = _kept(p_mask, i_b, i_n, m, sizes, s_mask)
    b_by_x = b_grad
    b_x = b_v
    b_product = b_v  # the output, less the shift where it comes last
    if FROM_OUTPUT and not PRE:
        b_product = b_v - b_t
        b_x = b_product
    if PRE and not FROM_OUTPUT:
        b_product = b_v + b_t
    if SCALE != ADDITIVE:
        b_raw_u, b_u = _scaled(p_u, p_u_scale, i_b, i_n, m, sizes, s_u, s_u_scale)
        b_s, _, b_derivative = _factor(b_u * prefactor, offset, eps, clamp, slope, SCALE, PLUS)
        b_by_x = _times(b_grad, b_s, RECIPROCAL)
        if FROM_OUTPUT:
            b_x = _times(b_product, b_s, not RECIPROCAL)
        else:
            b_product = _times(b_product, b_s, RECIPROCAL)
        i_sample = tl.reshape(i_b, [i_b.shape[0]])
        m_sample = i_sample < n_samples
        b_gl = tl.load(p_grad_logdet + i_sample * s_grad_logdet, mask=m_sample, other=0.0)[:, None]
        b_by_u = (b_grad * b_product + b_gl) * (b_derivative * prefactor)
        if RECIPROCAL:
            b_by_u = -b_by_u
        if p_by_u is not None:
            _store(p_by_u, tl.where(m_kept, b_by_u * b_raw_u, 0.0), i_b, i_n, m, sizes, s_by_u)
        if p_u_scale is not None:
            b_by_u = b_by_u * _load(p_u_scale, i_b, i_n, m, sizes, s_u_scale)
        _store(p_grad_u, tl.where(m_kept, b_by_u, 0.0), i_b, i_n, m, sizes, s_grad_u)
    if PRE and FROM_OUTPUT:
        b_x = b_x - b_t
    b_by_t = (b_by_x if PRE else b_grad) * shift_factor
    if p_by_t is not None:
        _store(p_by_t, tl.where(m_kept, b_by_t * b_raw_t, 0.0), i_b, i_n, m, sizes, s_by_t)
    if p_t_scale is not None:
        b_by_t = b_by_t * _load(p_t_scale, i_b, i_n, m, sizes, s_t_scale)
    _store(p_grad_t, tl.where(m_kept, b_by_t, 0.0), i_b, i_n, m, sizes, s_grad_t)
    _store(p_grad_x, tl.where(m_kept, b_by_x, 0.0), i_b, i_n, m, sizes, s_grad_x)
    if p_x is not None:
        _store(p_x, tl.where(m_kept, b_x, 0.0), i_b, i_n, m, sizes, s_x)


class _Views:
    """The transformed part of each tensor, [B, n, *]."""

    def __init__(self, x: Tensor, settings: tuple) -> None:
        (
            self.scale, self.pre, self.sign, self.reciprocal, self.prefactor, self.offset, self.eps,
            self.clamp, self.slope, _, self.interleaved, self.shift_first, self.start, self.n,
        ) = settings  # fmt: skip
        self.shape = (x.shape[0], self.n, *x.shape[2:])

    def state(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.narrow(1, self.start, self.n)

    def others(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of the channels that pass."""
        end = self.start + self.n
        return tuple(part for part in (x[:, : self.start], x[:, end:]) if part.shape[1])

    def parts(self, h: Tensor | None, dim: int = 1) -> tuple[Tensor | None, Tensor | None]:
        """Shift and raw scale."""
        if h is None or self.scale == ADDITIVE.value:
            return h, None
        h = h.movedim(dim, 0)
        first, second = (h[0::2], h[1::2]) if self.interleaved else (h[: self.n], h[self.n :])
        first, second = first.movedim(0, dim), second.movedim(0, dim)
        return (first, second) if self.shift_first else (second, first)

    def by_channel(self, values: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(
            None if v is None else v.view(1, -1, *[1] * (len(self.shape) - 2)).expand(self.shape)
            for v in self.parts(values, 0)
        )

    def mask(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.view(torch.uint8).unsqueeze(1).expand(self.shape)

    def numbers(self) -> tuple[float, ...]:
        factor = self.sign * self.prefactor
        return factor, self.prefactor, self.offset, self.eps, self.clamp, self.slope

    def constants(self) -> dict[str, object]:
        return {
            "SCALE": self.scale, "PRE": self.pre, "RECIPROCAL": self.reciprocal, "PLUS": self.eps != 0
        }  # fmt: skip


def _strides(tensors: tuple[Tensor | None, ...]) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if t is None else t.stride() for t in tensors)


def _copy_others(v: _Views, source: Tensor, target: Tensor) -> None:
    for a, b in zip(v.others(target), v.others(source), strict=True):
        a.copy_(b)


def affine_coupling_forward(
    x: Tensor, y: Tensor, h: Tensor, h_scale: Tensor | None, mask: Tensor | None, settings: tuple
) -> Tensor:
    """Writes ``y``, which may be ``x``; returns the log-determinant."""
    v = _Views(x, settings)
    tensors = (v.state(x), *v.parts(h), *v.by_channel(h_scale), v.mask(mask), v.state(y))
    logdet = x.new_zeros(len(x), dtype=torch.float32)
    if y is not x:
        _copy_others(v, x, y)
    if 0 in v.shape:
        return logdet
    p = plan(v.shape, *_strides(tensors))
    partials = x.new_empty(p.n_samples, p.n_chunks, dtype=torch.float32)
    with on_device_of(x):
        _forward_kernel[p.grid](
            *tensors,
            partials,
            p.strides,
            p.sizes,
            *p.counts,
            *v.numbers(),
            **v.constants(),
            **p.constants,
            **LAUNCH,
        )
        return logdet if v.scale == ADDITIVE.value else sum_chunks(partials)


def affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    v: Tensor,
    h: Tensor,
    h_scale: Tensor | None,
    mask: Tensor | None,
    grad_x: Tensor,
    x: Tensor | None,
    settings: tuple,
    from_output: bool,
) -> tuple[Tensor, Tensor | None]:
    """Writes ``grad_x``, which may be ``grad_y``, and ``x``, which may be ``v``; returns the others."""
    views = _Views(v, settings)
    grad_h = torch.empty_like(h)
    products = None if h_scale is None else torch.empty_like(h, dtype=torch.float32)
    if grad_x is not grad_y:
        _copy_others(views, grad_y, grad_x)
    if x is not None and x is not v:
        _copy_others(views, v, x)
    tensors = (
        views.state(grad_y), views.state(v), *views.parts(h), *views.by_channel(h_scale), views.mask(mask),
        views.state(grad_x), *views.parts(grad_h), views.state(x), *views.parts(products),
    )  # fmt: skip
    if 0 not in views.shape:
        p = plan(views.shape, *_strides(tensors))
        with on_device_of(v):
            _backward_kernel[p.grid](
                tensors[0], grad_logdet, *tensors[1:], p.strides, grad_logdet.stride(0), p.sizes, *p.counts,
                *views.numbers(), **views.constants(), FROM_OUTPUT=from_output, **p.constants, **LAUNCH,
            )  # fmt: skip
    if h_scale is None or products is None:
        return grad_h, None
    sums = products.sum([0, *range(2, h.dim())], dtype=torch.float64)
    return grad_h, sums.to(h_scale.dtype)


def _example(
    backward: bool,
    shape: tuple[int, ...] = (64, 32, 32, 32),
    scale: tl.constexpr = SIGMOID,
    pre: bool = True,
    reciprocal: bool = False,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    interleaved: bool = False,
    eps: float = 0.0,
    scaled: bool = False,
    masked: bool = False,
) -> None:
    """Launch on meta tensors; the flow's state is float32."""
    x, h = (
        torch.empty(shape, dtype=d, device="meta").to(memory_format=memory_format)
        for d in (torch.float32, dtype)
    )
    h = h[:, : shape[1] // 2] if scale == ADDITIVE else h
    h_scale = torch.empty(h.shape[1], device="meta") if scaled else None
    mask = torch.empty((shape[0], *shape[2:]), dtype=torch.bool, device="meta") if masked else None
    n = shape[1] // 2
    settings = (
        scale.value, pre, 1.0, reciprocal, 1.0, 2.0, eps, 2.0, 0.5, False, interleaved, True, n, n
    )  # fmt: skip
    y = torch.empty_like(x)
    if backward:
        gl = torch.empty(shape[0], device="meta")
        affine_coupling_backward(y, gl, x, h, h_scale, mask, torch.empty_like(x), y, settings, True)
    else:
        affine_coupling_forward(x, y, h, h_scale, mask, settings)


_EXAMPLES: dict[str, dict] = {
    "": {},
    "bfloat16": {"dtype": torch.bfloat16, "scaled": True},
    "exp, audio": {"scale": EXP, "pre": False, "shape": (12, 8, 2000), "masked": True},
    "tanh, inverse": {"scale": TANH, "pre": False, "reciprocal": True, "interleaved": True},
    "softplus": {"scale": SOFTPLUS, "pre": False, "eps": 1e-3},
    "additive": {"scale": ADDITIVE},
    "channels last": {"memory_format": torch.channels_last},
    "odd": {"shape": (3, 10, 7, 9), "eps": 1e-3},
}
AOT = {
    f"{'backward' if backward else 'forward'} {name}".strip(): Example(
        partial(_example, backward, **options),
        wide=name not in ("channels last", "odd", "exp, audio", "bfloat16"),
        quick=not name,
    )
    for name, options in _EXAMPLES.items()
    for backward in (False, True)
}
