"""How the rows of logits [*, K] are cut into tiles, for the ops of categorical distributions.

A program takes several short rows, or one of up to LONGEST classes, and reads them once. Of longer rows it
takes a part: one launch finds the largest logits of the parts, a second one their sums, given the largest of
the row, and a third one the result from these.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._inverse_cdf import root, scaled
from ._math import exp
from ._tile import LAUNCH, collapsed, offset_of, on_device_of

LONGEST = 16384  # classes of a row that a program holds at once
PART = 4096  # of a longer one; a node of the tree
MOST_PARTS = 4096  # whose sums a program holds
TILE = 2048  # elements of several short rows


class Where(NamedTuple):
    """Where the rows of a tensor [*, K] lie."""

    per_sample: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    step: int  # from class to class


def where(x: Tensor) -> Where:
    x = x[None] if x.dim() == 1 else x
    sizes, strides = collapsed(x)
    return Where(x.shape[1:-1].numel(), sizes, strides, x.stride(-1))


@triton.jit
def samples_of(i_r, place):
    """Of rows their samples, and their numbers within them."""
    i_b = i_r // place[0]
    return i_b, i_r - i_b * place[0]


@triton.jit
def offsets(i_r, i_k, place):
    """Where classes i_k [1, N] of rows i_r [R] lie."""
    i_b, i_n = samples_of(i_r, place)
    return offset_of(i_b, i_n, place[1], place[2])[:, None] + i_k.to(tl.int64) * place[3]


@triton.jit
def load_rows(p, i_r, n_rows, i_k, K, place):
    """Float32 [R, N], -inf past the end of a row, 0 in rows that there are not."""
    m_r = (i_r < n_rows)[:, None]
    b_x = tl.load(p + offsets(i_r, i_k, place), mask=m_r & (i_k < K), other=0.0).to(tl.float32)
    return tl.where((i_k < K) | (i_r >= n_rows)[:, None], b_x, float("-inf"))


@triton.jit
def load_classes(p, i_r, n_rows, i_k, K, place):
    """The same of one class of each row: i_k [R], float32 [R]."""
    i_b, i_n = samples_of(i_r, place)
    offset = offset_of(i_b, i_n, place[1], place[2]) + i_k.to(tl.int64) * place[3]
    x = tl.load(p + offset, mask=(i_r < n_rows) & (i_k < K), other=0.0).to(tl.float32)
    return tl.where((i_k < K) | (i_r >= n_rows), x, float("-inf"))


@triton.jit
def _largest_kernel(p_x, p_largest, place, K, PART: tl.constexpr):
    i_r = tl.program_id(1).to(tl.int64) + tl.zeros([1], tl.int64)
    i_k = tl.program_id(0).to(tl.int64) * PART + tl.arange(0, PART)[None, :]
    b_x = load_rows(p_x, i_r, i_r + 1, i_k, K, place)
    tl.store(p_largest + i_r * tl.num_programs(0) + tl.program_id(0), tl.max(b_x, axis=1))


@triton.jit
def _sums_kernel(
    p_x, p_largest, p_sums, place, K, temperature, PART: tl.constexpr, PARTS: tl.constexpr,
    DIVIDED: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(1).to(tl.int64) + tl.zeros([1], tl.int64)
    largest = largest_of(p_largest, i_r, tl.num_programs(0), PARTS)
    i_k = tl.program_id(0).to(tl.int64) * PART + tl.arange(0, PART)[None, :]
    b_x = load_rows(p_x, i_r, i_r + 1, i_k, K, place)
    sums = root(exp(scaled(b_x, largest[:, None], temperature, DIVIDED)))
    tl.store(p_sums + i_r * tl.num_programs(0) + tl.program_id(0), sums)


@triton.jit
def parts_of(p, i_r, n_parts, other, PARTS: tl.constexpr):
    """What is known of the parts of a row: [1, PARTS]."""
    i = tl.arange(0, PARTS)[None, :]
    return tl.load(p + i_r[:, None] * n_parts + i, mask=i < n_parts, other=other)


@triton.jit
def largest_of(p_largest, i_r, n_parts, PARTS: tl.constexpr):
    return tl.max(parts_of(p_largest, i_r, n_parts, float("-inf"), PARTS), axis=1)


def refuses(logits: Tensor, top_k: int, top_p: float) -> str | None:
    """Why a launch cannot take these arguments; None if it can."""
    n = logits.shape[-1]
    if n > PART * MOST_PARTS:
        return f"{n} classes, at most {PART * MOST_PARTS}"
    if n > LONGEST and (0 < top_k < n or top_p < 1.0):
        return f"top_k or top_p with {n} classes, at most {LONGEST}"
    rows = logits.shape[:-1].numel()
    return f"{rows} rows of {n} classes, at most 65535" if n > LONGEST and rows > 65535 else None


def tile_of(n_classes: int) -> tuple[int, int, int]:
    """BLOCK_R, BLOCK_K and warps for rows that are read at once."""
    block_k = max(16, triton.next_power_of_2(n_classes))
    block_r = max(1, TILE // block_k)
    return block_r, block_k, min(16, max(4, block_r * block_k // 1024))


def memory_of(n_leaves: int) -> int:
    """Floats for a walk over the tree of a row."""
    return n_leaves // 16 + n_leaves // 256 + n_leaves // 4096 + 16


def limits(n_classes: int, temperature: float, top_k: int, top_p: float) -> dict[str, bool]:
    return {
        "DIVIDED": temperature != 1.0,
        "LIMITED_K": 0 < top_k < n_classes,
        "LIMITED_P": top_p < 1.0,
    }


def sums_of_parts(logits: Tensor, place: Where, temperature: float) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Of long rows the parts' largest logits and sums, [rows, parts], and constants of launches."""
    n = logits.shape[-1]
    rows, parts = logits.shape[:-1].numel(), triton.cdiv(n, PART)
    largest, sums = (logits.new_empty(rows, parts, dtype=torch.float32) for _ in range(2))
    constants = {"PARTS": max(16, triton.next_power_of_2(parts)), "DIVIDED": temperature != 1.0}
    with on_device_of(logits):
        _largest_kernel[(parts, rows)](logits, largest, place, n, PART=PART, **LAUNCH)
        _sums_kernel[(parts, rows)](
            logits, largest, sums, place, n, temperature, PART=PART, **constants, **LAUNCH
        )
    return largest, sums, constants
