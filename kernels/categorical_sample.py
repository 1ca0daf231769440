"""Classes drawn from logits; the op is ``genperf/ops/categorical_sample.py``.

A row of up to 16384 classes is read once. A longer one is read twice by programs side by side, and the part
in which the drawn class lies once more.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._categorical_rows import (
    LONGEST,
    PART,
    largest_of,
    limits,
    load_classes,
    load_rows,
    memory_of,
    parts_of,
    samples_of,
    sums_of_parts,
    tile_of,
    where,
)
from ._inverse_cdf import (
    descend,
    descend_level,
    first_child,
    kept,
    nats,
    next_child,
    nodes_of,
    scaled,
    store_level,
    store_tree,
    weigh,
)
from ._math import exp
from ._philox import philox_words, uniform_from_bits
from ._tile import LAUNCH, Example, on_device_of


@triton.jit
def _uniforms(p_noise, p_key, i_r, n_rows, place, s_key):
    """Float64 [R]."""
    m = i_r < n_rows
    if p_noise is not None:
        u = tl.load(p_noise + i_r, mask=m, other=0.0)
    else:
        i_b, i_n = samples_of(i_r, place)
        seed = tl.load(p_key + i_b * s_key, mask=m, other=0)
        offset = tl.load(p_key + i_b * s_key + 1, mask=m, other=0)
        i = tl.where(s_key == 0, i_r, i_n)
        w0, w1, w2, w3 = philox_words(seed, offset, i >> 2)
        low, high = tl.where((i & 1) == 0, w0, w1), tl.where((i & 1) == 0, w2, w3)
        u = uniform_from_bits(tl.where((i & 2) == 0, low, high))
    return u.to(tl.float64)


@triton.jit
def _draw(
    p_x, p_index, p_log_prob, p_nodes, i_r, n_rows, first_class, K, place, largest, least, end, temperature,
    total, target, before, DIVIDED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Down the tree above BLOCK_K classes to one of them: the class, and its log-probability."""
    node, before = descend(p_nodes, BLOCK_K, target, before)
    i_k = (first_class + node * 16)[:, None] + tl.arange(0, 16)[None, :]
    b_x = load_rows(p_x, i_r, n_rows, i_k, K, place)
    b_w = exp(scaled(b_x, largest[:, None], temperature, DIVIDED))
    p_leaves = p_nodes + nodes_of(BLOCK_K)
    store_level(p_leaves, tl.where(kept(b_x, i_k, least[:, None], end[:, None]), b_w, 0.0))
    tl.debug_barrier()
    child, _ = descend_level(p_leaves, 16, tl.zeros_like(node), target, before)
    index = tl.where(total >= 1.0, first_class + node * 16 + child, 0)
    tl.store(p_index + i_r, index, mask=i_r < n_rows)
    if p_log_prob is not None:
        x = load_classes(p_x, i_r, n_rows, index, K, place)
        log_prob = nats(scaled(x, largest, temperature, DIVIDED), total)
        tl.store(p_log_prob + i_r, log_prob, mask=i_r < n_rows)


@triton.jit
def _rows_kernel(
    p_x, p_noise, p_key, p_index, p_log_prob, p_nodes, place, s_key, s_nodes, n_rows, K, temperature, top_k,
    top_p, DIVIDED: tl.constexpr, LIMITED_K: tl.constexpr, LIMITED_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_x = load_rows(p_x, i_r, n_rows, tl.arange(0, BLOCK_K)[None, :], K, place)
    largest, least, end, b_w = weigh(b_x, temperature, top_k, top_p, DIVIDED, LIMITED_K, LIMITED_P)
    p_nodes += i_r * s_nodes
    total = store_tree(p_nodes, b_w)
    u = _uniforms(p_noise, p_key, i_r, n_rows, place, s_key)
    target = u * total.to(tl.float64)
    _draw(
        p_x, p_index, p_log_prob, p_nodes, i_r, n_rows, tl.zeros_like(i_r), K, place, largest, least, end,
        temperature, total, target, tl.zeros_like(u), DIVIDED, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _parts_kernel(
    p_x, p_largest, p_sums, p_noise, p_key, p_index, p_log_prob, p_nodes, place, s_key, s_nodes, n_rows,
    n_parts, K, temperature, DIVIDED: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    p_nodes += i_r * s_nodes
    largest = largest_of(p_largest, i_r, n_parts, PARTS)
    total = store_tree(p_nodes, parts_of(p_sums, i_r, n_parts, 0.0, PARTS))
    u = _uniforms(p_noise, p_key, i_r, n_rows, place, s_key)
    target = u * total.to(tl.float64)
    node, before = descend(p_nodes, PARTS, target, tl.zeros_like(u))
    state = first_child(target, before)
    for j in range(16):
        i_part = node * 16 + j
        value = tl.load(p_sums + i_r * n_parts + i_part, mask=i_part < n_parts, other=0.0)
        state = next_child(state, j, value, target)
    first = (node * 16 + state[0]) * PART
    tl.debug_barrier()  # before the memory is used again
    b_x = load_rows(p_x, i_r, n_rows, first[:, None] + tl.arange(0, PART)[None, :], K, place)
    store_tree(p_nodes, exp(scaled(b_x, largest[:, None], temperature, DIVIDED)))
    least, end = tl.full([1], float("-inf"), tl.float32), K + tl.zeros([1], tl.int32)
    _draw(
        p_x, p_index, p_log_prob, p_nodes, i_r, n_rows, first, K, place, largest, least, end, temperature,
        total, target, state[1], DIVIDED, PART,
    )  # fmt: skip


def categorical_sample(
    logits: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    want_log_prob: bool,
) -> tuple[Tensor, Tensor | None]:
    """The torch op ``genperf::categorical_sample``."""
    shape, n = logits.shape[:-1], logits.shape[-1]
    index = logits.new_empty(shape, dtype=torch.int64)
    log_prob = logits.new_empty(shape, dtype=torch.float32) if want_log_prob else None
    if (rows := index.numel()) == 0:
        return index, log_prob
    noise = None if noise is None else noise.contiguous()
    key = None if key is None else key.contiguous()
    draws = noise, key, index, log_prob
    s_key = 2 if key is not None and key.dim() == 2 else 0
    place = where(logits)
    with on_device_of(logits):
        if n > LONGEST:
            largest, sums, constants = sums_of_parts(logits, place, temperature)
            s_nodes = memory_of(max(PART, constants["PARTS"]))
            nodes = largest.new_empty(rows, s_nodes)
            _parts_kernel[(rows,)](
                logits, largest, sums, *draws, nodes, place, s_key, s_nodes, rows, sums.shape[1], n,
                temperature, PART=PART, **constants, **LAUNCH,
            )  # fmt: skip
        else:
            block_r, block_k, warps = tile_of(n)
            programs = triton.cdiv(rows, block_r)
            s_nodes = memory_of(block_k)
            nodes = logits.new_empty(programs * block_r, s_nodes, dtype=torch.float32)
            _rows_kernel[(programs,)](
                logits, *draws, nodes, place, s_key, s_nodes, rows, n, temperature, top_k, top_p,
                BLOCK_R=block_r, BLOCK_K=block_k, **limits(n, temperature, top_k, top_p),
                **LAUNCH | {"num_warps": warps},
            )  # fmt: skip
    return index, log_prob


def _example(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    noise: bool = False,
    dim: int = -1,
) -> None:
    """Launch on meta tensors."""
    logits = torch.empty(shape, dtype=dtype, device="meta").movedim(dim, -1)
    key = torch.empty(2, dtype=torch.int64, device="meta")
    u = torch.empty(logits.shape[:-1], device="meta") if noise else None
    categorical_sample(logits, u, None if noise else key, temperature, top_k, top_p, True)


AOT = {
    "1024 classes": Example(partial(_example, (256, 1024)), wide=False, quick=True),
    "16384 classes": Example(partial(_example, (256, 16384)), wide=False),
    "limited": Example(partial(_example, (256, 8192), torch.bfloat16, 0.7, 100, 0.9), wide=False),
    "few classes, dimension 1": Example(partial(_example, (64, 10, 32, 32), dim=1, noise=True), wide=False),
    "a long row": Example(partial(_example, (4, 1 << 18), torch.float16, 0.9), wide=False),
}
