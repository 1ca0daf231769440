"""Normal numbers between bounds; the op is ``genperf/ops/truncated_normal.py``, which has the formulas.

One launch that writes the result and reads nothing but the key, or the noise.
"""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import log, log_1p, rounded
from ._philox import uniform_ends_of_groups
from ._tile import LAUNCH, Example, offset_of, on_device_of, plan, tile

BODY = tl.constexpr(0)
UPPER_TAIL = tl.constexpr(1)
LOWER_TAIL = tl.constexpr(2)


@triton.jit
def _body(w, m_below, q_low, q_high, width, p_low, p_high, mean, step):
    rest = 1.0 - w
    q = tl.where(m_below, q_low + w * width, q_high - w * width)
    m_negative = q < 0.0
    low = p_low + tl.where(m_below, w, rest) * width
    high = p_high + tl.where(m_below, rest, w) * width
    t = tl.sqrt_rn(-log(tl.where(m_negative, low, high)))
    tail = 0.6401156187057495 * t + 5.35111665725708
    tail = ((tail * t + 5.392025947570801) * t + -5.0748419761657715) * t + -2.906881332397461
    of_tail = ((0.4525196850299835 * t + 3.793017625808716) * t + 4.832771301269531) * t + 1.0
    r = 0.180625 - q * q
    centre = (59.10843276977539 * r + 159.28977966308594) * r + 50.434104919433594
    centre = q * (centre * r + 3.3871326446533203)
    of_centre = ((67.18669891357422 * r + 78.75720977783203) * r + 17.89512062072754) * r + 1.0
    m_central = tl.abs(q) <= 0.425
    numerator = tl.where(m_central, centre, tl.where(m_negative, -tail, tail))
    return mean + step * tl.div_rn(numerator, tl.where(m_central, of_centre, of_tail))


@triton.jit
def _far_tail(w, m_below, share, beyond, v0, step, bound):
    rest = 1.0 - w
    y = tl.where(m_below, w, rest) * share
    m_near = y <= 0.5
    near = log_1p(-tl.where(m_near, y, 0.0))
    far = log(beyond + tl.where(m_below, rest, w) * share)
    d = -2.0 * tl.where(m_near, near, far)
    g = d * v0
    v = tl.div_rn(v0 + 0.0 * g, 1.0 + g)
    mills = g * v * ((1.0 - 2.5 * (v + v0)) + 12.333333015441895 * (v * v + v * v0 + v0 * v0))
    slope = 1.0 + v * (1.0 - v * (2.0 - 10.0 * v))
    d = d - tl.div_rn(log_1p(g) - 2.0 * mills, slope)
    return bound + step * tl.div_rn(d, tl.sqrt_rn(1.0 + d * v0) + 1.0)


@triton.jit
def _truncated_normal_kernel(
    p_noise,
    p_key,
    p_out,
    s_noise,
    sizes,
    s_key,
    n_samples,
    n_elements,
    n_chunks,
    c0,
    c1,
    c2,
    c3,
    c4,
    c5,
    c6,
    least,
    most,
    KIND: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_chunk, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    if p_noise is not None:
        u = tl.load(p_noise + offset_of(i_b, i_n, sizes, s_noise), mask=m, other=0.5)
        u = tl.where(u < 2.98023223876953125e-8, 2.98023223876953125e-8, u)
        u = tl.where(u > 0.999999940395355224609375, 0.999999940395355224609375, u)
        m_below = u <= 0.5
        w = tl.where(m_below, u, 1.0 - u)
    else:
        seed = tl.load(p_key + i_b * s_key, mask=i_b < n_samples, other=0)  # [BLOCK_B, 1]
        offset = tl.load(p_key + i_b * s_key + 1, mask=i_b < n_samples, other=0)
        GROUPS: tl.constexpr = BLOCK_N // 4
        i_group = i_chunk.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[None, :]  # [1, BLOCK_N / 4]
        w, m_below = uniform_ends_of_groups(seed, offset, i_group)  # [BLOCK_B, BLOCK_N]
    if KIND == LOWER_TAIL:
        m_below = m_below == 0
    if KIND == BODY:
        y = _body(w, m_below, c0, c1, c2, c3, c4, c5, c6)
    else:
        y = _far_tail(w, m_below, c0, c1, c2, c3, c4)
    y = tl.where(y < least, least, tl.where(y > most, most, y))
    tl.store(p_out + i_b * n_elements + i_n, rounded(y, p_out.dtype.element_ty), mask=m)


def truncated_normal(
    shape: Sequence[int],
    noise: Tensor | None,
    key: Tensor | None,
    dtype: torch.dtype,
    kind: int,
    constants: Sequence[float],
) -> Tensor:
    """The torch op ``genperf::truncated_normal``."""
    given = noise if noise is not None else key
    assert given is not None
    out = torch.empty(shape, dtype=dtype, device=given.device)
    if out.numel() == 0:
        return out
    # Numbers of one key run through the whole result, as one sample.
    rows = shape[0] if key is not None and key.dim() == 2 else 1
    flat = out.view(rows, -1)
    spread = None if noise is None else noise.reshape(1, -1)
    p = plan(tuple(flat.shape), flat.stride(), None if spread is None else spread.stride())
    with on_device_of(given):
        _truncated_normal_kernel[p.grid](
            spread,
            None if key is None else key.contiguous(),
            out,
            p.strides[1],
            p.sizes,
            0 if key is None else 2 * (key.dim() - 1),
            *p.counts,
            *constants,
            KIND=kind,
            **p.constants,
            **LAUNCH,
        )
    return out


def _example(
    kind: tl.constexpr, shape: tuple[int, ...] = (256, 128), dtype=torch.float32, noise=False
) -> None:
    """Launch on meta tensors."""
    key = None if noise else torch.empty(2, dtype=torch.int64, device="meta")
    u = torch.empty(shape, device="meta") if noise else None
    truncated_normal(shape, u, key, dtype, kind.value, [0.25] * 9)


AOT = {
    "body": Example(partial(_example, BODY), quick=True),
    "tail": Example(partial(_example, UPPER_TAIL)),
    "lower tail, bfloat16": Example(partial(_example, LOWER_TAIL, dtype=torch.bfloat16)),
    "noise": Example(partial(_example, BODY, noise=True)),
    "odd": Example(partial(_example, BODY, (7, 4095)), wide=False),
}
