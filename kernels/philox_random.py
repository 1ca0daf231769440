"""The random numbers of a key; the op is ``genperf/ops/philox_random.py``."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import rounded
from ._philox import interleave4, normals_of_groups, philox_words, uniform_from_bits
from ._tile import LAUNCH, Example, on_device_of, plan, tile

NORMAL = tl.constexpr(0)
UNIFORM = tl.constexpr(1)
BITS = tl.constexpr(2)


@triton.jit
def _random_kernel(
    p_key,
    p_out,
    s_key,
    n_samples,
    n_elements,
    n_chunks,
    DISTRIBUTION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_chunk, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    seed = tl.load(p_key + i_b * s_key, mask=i_b < n_samples, other=0)  # [BLOCK_B, 1]
    offset = tl.load(p_key + i_b * s_key + 1, mask=i_b < n_samples, other=0)
    GROUPS: tl.constexpr = BLOCK_N // 4
    i_group = i_chunk.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[None, :]  # [1, BLOCK_N / 4]
    if DISTRIBUTION == NORMAL:
        b_out = normals_of_groups(seed, offset, i_group)  # [BLOCK_B, BLOCK_N]
    else:
        w0, w1, w2, w3 = philox_words(seed, offset, i_group)
        b_out = interleave4(w0, w1, w2, w3)
        if DISTRIBUTION == UNIFORM:
            b_out = uniform_from_bits(b_out)
    tl.store(p_out + i_b * n_elements + i_n, rounded(b_out, p_out.dtype.element_ty), mask=m)


def philox_random(shape: Sequence[int], key: Tensor, distribution: int, dtype: torch.dtype) -> Tensor:
    """The torch op ``genperf::philox_random``, in a dtype that the result is rounded to."""
    out = torch.empty(shape, dtype=dtype, device=key.device)
    rows = shape[0] if key.dim() == 2 else 1
    flat = (rows, math.prod(shape[key.dim() - 1 :]))
    p = plan(flat, (flat[1], 1))
    with on_device_of(key):
        _random_kernel[p.grid](
            key.contiguous(),
            out,
            2 * (key.dim() - 1),
            *p.counts,
            DISTRIBUTION=distribution,
            **p.constants,
            **LAUNCH,
        )
    return out


def _example(distribution: tl.constexpr, shape: tuple[int, ...] = (1 << 20,), keys: bool = False) -> None:
    """Launch on meta tensors."""
    key = torch.empty((shape[0], 2) if keys else (2,), dtype=torch.int64, device="meta")
    dtype = torch.int64 if distribution.value == BITS.value else torch.float32
    philox_random(shape, key, distribution.value, dtype)


AOT = {
    "normal": Example(partial(_example, NORMAL), quick=True),
    "uniform": Example(partial(_example, UNIFORM)),
    "bits": Example(partial(_example, BITS)),
    "normal, keys": Example(partial(_example, NORMAL, (256, 128), keys=True)),
    "normal, odd": Example(partial(_example, NORMAL, (7, 4095), keys=True), wide=False),
}
