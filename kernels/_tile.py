"""How a batch of samples is cut into tiles, addressed and summed, for every element-wise op.

A program works on one tile: BLOCK_B samples by BLOCK_N elements of each. Reductions go by tile and
then over the tiles of a sample, both in a fixed order.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import saturate

# A tile's elements, and the warps that share it: eight elements a thread are one 16-byte access in
# half precision and two in single, enough loads in flight to fill the memory system at half the
# occupancy, and few enough registers (see tests/test_aot.py) to reach that occupancy.
TILE = 1024
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def tile_shape(n_elements: int, size: int = TILE) -> tuple[int, int]:
    """BLOCK_B, BLOCK_N. Never from the batch size: a sample's sum does not depend on its batch."""
    block_n = min(size, max(4, triton.next_power_of_2(n_elements)))
    return size // block_n, block_n


class Plan(NamedTuple):
    """What a launch needs to know of its tensors' shape and strides."""

    grid: tuple[int]
    n_chunks: int
    n_samples: int
    n_elements: int
    sizes: tuple[int, ...]  # of all collapsed dimensions of a sample but the outermost, innermost first
    strides: tuple[tuple[int, ...] | None, ...]  # of each tensor: of the samples, then innermost first
    constants: dict[str, object]  # block sizes and index type

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.n_samples, self.n_elements, self.n_chunks


@lru_cache(maxsize=1024)
def plan(shape: tuple[int, ...], *strides: tuple[int, ...] | None, size: int = TILE) -> Plan:
    """The tiling of tensors of one non-empty shape [B, *], given their strides (None: absent).

    The dimensions of a sample are walked in the memory order of the first tensor, and those
    neighbours are merged that lie in one run in every tensor.
    """
    present = [s for s in strides if s is not None]
    dims = sorted((d for d in range(1, len(shape)) if shape[d] > 1), key=lambda d: -present[0][d])
    merged: list[tuple[int, tuple[int, ...]]] = []  # innermost first: size, stride in each present tensor
    for d in reversed(dims):
        step = tuple(s[d] for s in present)
        if merged and step == tuple(merged[-1][0] * inner for inner in merged[-1][1]):
            merged[-1] = (merged[-1][0] * shape[d], merged[-1][1])
        else:
            merged.append((shape[d], step))
    merged = merged or [(1, (1,) * len(present))]
    n_elements = math.prod(shape[1:])
    block_b, block_n = tile_shape(n_elements, size)
    n_chunks = max(1, triton.cdiv(n_elements, block_n))
    steps = iter(zip(*(step for _, step in merged), strict=True))
    return Plan(
        (triton.cdiv(shape[0], block_b) * n_chunks,),
        n_chunks,
        shape[0],
        n_elements,
        tuple(size for size, _ in merged[:-1]),
        tuple(None if s is None else (s[0], *next(steps)) for s in strides),
        {
            "INDEX": tl.int32 if n_elements + block_n <= 2**31 else tl.int64,
            "BLOCK_B": block_b,
            "BLOCK_N": block_n,
        },
    )


def numbering(shape: Sequence[int], key: Tensor) -> tuple[int, ...]:
    """The strides of the numbers that a key gives the elements of a shape: each sample's own with keys."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return (0 if key.dim() == 2 else strides[0], *strides[1:])


class Example(NamedTuple):
    """A representative launch, to be compiled ahead of time."""

    launch: Callable[[], object]  # calls the op on meta tensors
    wide: bool = True  # whether memory is accessed 16 bytes at a time
    quick: bool = False  # whether it is compiled in every test run
    products: bool = False  # whether it has matrix products in single precision, of fused multiply-adds


def on_device_of(tensor: Tensor):
    """Context in which Triton launches on the tensor's device and its current stream."""
    return torch.cuda.device_of(tensor)


@triton.jit
def tile(n_samples, n_elements, n_chunks, INDEX: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's chunk number, samples [BLOCK_B, 1], elements [1, BLOCK_N] and mask of both."""
    i_chunk = tl.program_id(0) % n_chunks
    i_b = (tl.program_id(0) // n_chunks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    i_n = i_chunk.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return i_chunk, i_b, i_n, (i_b < n_samples) & (i_n < n_elements)


@triton.jit
def offset_of(i_b, i_n, sizes, strides):
    """Where elements i_n of samples i_b lie, in elements: int64 [BLOCK_B, BLOCK_N]."""
    offset = i_b * strides[0]
    for d in tl.static_range(len(sizes)):
        i_outer = i_n // sizes[d]
        offset += (i_n - i_outer * sizes[d]).to(tl.int64) * strides[d + 1]
        i_n = i_outer
    return offset + i_n.to(tl.int64) * strides[len(sizes) + 1]


def collapsed(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For offset_of: sizes of the dimensions between the first and the last, less the outermost; strides."""
    merged: list[tuple[int, int]] = []  # innermost first
    for size, stride in reversed([*zip(x.shape[1:-1], x.stride()[1:-1], strict=True)]):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    merged = merged or [(1, 1)]
    return tuple(size for size, _ in merged[:-1]), (x.stride(0), *(stride for _, stride in merged))


@triton.jit
def store_sums(p, b, n_samples, n_chunks, i_chunk, i_b, m):
    """Each sample's sum over this tile, to [n_samples, n_chunks], saturated."""
    b_sum = saturate(tl.sum(tl.where(m, b, 0.0), axis=1, keep_dims=True))  # [BLOCK_B, 1]
    tl.store(p + i_b * n_chunks + i_chunk, b_sum, mask=i_b < n_samples)


@triton.jit
def _sum_kernel(
    p_x,
    p_sums,
    n_samples,
    n_elements,
    n_chunks,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_chunk, i_b, i_n, m = tile(n_samples, n_elements, n_chunks, INDEX, BLOCK_B, BLOCK_N)
    b_x = tl.load(p_x + i_b * n_elements + i_n, mask=m, other=0.0)  # [BLOCK_B, BLOCK_N]
    store_sums(p_sums, b_x, n_samples, n_chunks, i_chunk, i_b, m)


def sum_chunks(partials: Tensor) -> Tensor:
    """Float32 [B, N], contiguous, to its row sums [B], by tiles of a row until one number is left."""
    while partials.shape[1] > 1:
        p = plan(partials.shape, partials.stride())
        sums = partials.new_empty(p.n_samples, p.n_chunks)
        _sum_kernel[p.grid](partials, sums, *p.counts, **p.constants, **LAUNCH)
        partials = sums
    return partials.view(-1)
