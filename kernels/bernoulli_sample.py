"""Zeros and ones drawn from logits; the op is ``genperf/ops/bernoulli_sample.py``. One launch."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import log, log_1p, rounded
from ._philox import uniform_ends_of_groups
from ._tile import LAUNCH, Example, offset_of, on_device_of, plan, tile


@triton.jit
def _bernoulli_sample_kernel(
    p_logits,
    p_noise,
    p_key,
    p_out,
    s_logits,
    s_noise,
    sizes,
    s_key,
    n_samples,
    n_elements,
    n_chunks,
    temperature,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_chunk, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    logits = tl.load(p_logits + offset_of(i_b, i_n, sizes, s_logits), mask=m, other=0.0).to(tl.float32)
    if p_noise is not None:
        u = tl.load(p_noise + offset_of(i_b, i_n, sizes, s_noise), mask=m, other=0.5)
        m_below = u <= 0.5
        w = tl.where(m_below, u, 1.0 - u)
    else:
        seed = tl.load(p_key + i_b * s_key, mask=i_b < n_samples, other=0)  # [BLOCK_B, 1]
        offset = tl.load(p_key + i_b * s_key + 1, mask=i_b < n_samples, other=0)
        GROUPS: tl.constexpr = BLOCK_N // 4
        i_group = i_chunk.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[None, :]  # [1, BLOCK_N / 4]
        w, m_below = uniform_ends_of_groups(seed, offset, i_group)  # [BLOCK_B, BLOCK_N]
    m_positive = w > 0.0
    w = tl.where(m_positive, w, 0.5)
    quantile = tl.where(m_positive, log(w) - log_1p(-w), float("-inf"))
    quantile = tl.where(m_below, quantile, -quantile) * temperature
    x = tl.where(logits == logits, tl.where(logits > quantile, 1.0, 0.0), logits)
    tl.store(p_out + i_b * n_elements + i_n, rounded(x, p_out.dtype.element_ty), mask=m)


def bernoulli_sample(logits: Tensor, noise: Tensor | None, key: Tensor | None, temperature: float) -> Tensor:
    """The torch op ``genperf::bernoulli_sample``."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if out.numel() == 0:
        return out
    # Numbers of one key run through the whole result, as one sample; the logits keep their dimensions.
    each = key is not None and key.dim() == 2
    whole = (lambda x: x) if each else (lambda x: x[None])
    views = [whole(out), whole(logits), None if noise is None else whole(noise)]
    p = plan(tuple(views[0].shape), *(None if v is None else v.stride() for v in views))
    with on_device_of(logits):
        _bernoulli_sample_kernel[p.grid](
            logits,
            noise,
            None if key is None else key.contiguous(),
            out,
            p.strides[1],
            p.strides[2],
            p.sizes,
            2 if each else 0,
            *p.counts,
            temperature,
            **p.constants,
            **LAUNCH,
        )
    return out


def _example(shape: tuple[int, ...] = (64, 1, 28, 28), dtype=torch.float32, noise=False) -> None:
    """Launch on meta tensors."""
    key = None if noise else torch.empty(2, dtype=torch.int64, device="meta")
    u = torch.empty(shape, device="meta") if noise else None
    bernoulli_sample(torch.empty(shape, dtype=dtype, device="meta"), u, key, 1.5)


AOT = {
    "key": Example(_example, quick=True),
    "bfloat16": Example(partial(_example, dtype=torch.bfloat16)),
    "noise": Example(partial(_example, noise=True)),
    "odd": Example(partial(_example, (7, 4095)), wide=False),
}
