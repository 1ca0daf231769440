"""Log-probabilities of classes and their gradient; the op is ``genperf/ops/categorical_log_prob.py``."""

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
    offsets,
    parts_of,
    sums_of_parts,
    tile_of,
    where,
)
from ._inverse_cdf import kept, nats, root, scaled, weigh
from ._math import exp, rounded
from ._tile import LAUNCH, Example, on_device_of


@triton.jit
def _rows_kernel(
    p_x, p_index, p_grad, p_log_prob, p_of_x, place, place_of_x, n_rows, K, temperature, top_k, top_p,
    DIVIDED: tl.constexpr, LIMITED_K: tl.constexpr, LIMITED_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_k = tl.arange(0, BLOCK_K)[None, :]
    b_x = load_rows(p_x, i_r, n_rows, i_k, K, place)
    largest, least, end, b_w = weigh(b_x, temperature, top_k, top_p, DIVIDED, LIMITED_K, LIMITED_P)
    total = root(b_w)
    index = tl.load(p_index + i_r, mask=i_r < n_rows, other=0)
    defined = (total >= 1.0) & (index >= 0) & (index < K)
    if p_log_prob is not None:
        x = load_classes(p_x, i_r, n_rows, tl.where(defined, index, 0), K, place)
        log_prob = nats(scaled(x, largest, temperature, DIVIDED), total)
        log_prob = tl.where(kept(x, index, least, end), log_prob, float("-inf"))
        log_prob = tl.where(defined, log_prob, float("nan"))
        tl.store(p_log_prob + i_r, log_prob, mask=i_r < n_rows)
    if p_of_x is not None:
        grad = tl.load(p_grad + i_r, mask=i_r < n_rows, other=0.0)
        b_of_x = gradient(b_w, i_k, index, total, grad, temperature)
        m_kept = kept(b_x, i_k, least[:, None], end[:, None])
        b_of_x = tl.where(defined[:, None], tl.where(m_kept, b_of_x, 0.0), float("nan"))
        store_rows(p_of_x, b_of_x, i_r, n_rows, i_k, K, place_of_x)


@triton.jit
def gradient(b_w, i_k, index, total, grad, temperature):
    b_share = tl.div_rn(b_w, tl.broadcast_to(total[:, None], b_w.shape))
    scale = tl.div_rn(grad, temperature + tl.zeros_like(grad))
    return (tl.where(i_k == index[:, None], 1.0, 0.0) - b_share) * scale[:, None]


@triton.jit
def store_rows(p, b_x, i_r, n_rows, i_k, K, place):
    m = (i_r < n_rows)[:, None] & (i_k < K)
    tl.store(p + offsets(i_r, i_k, place), rounded(b_x, p.dtype.element_ty), mask=m)


@triton.jit
def _parts_kernel(
    p_x, p_largest, p_sums, p_index, p_log_prob, place, n_parts, K, temperature, DIVIDED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    largest = largest_of(p_largest, i_r, n_parts, PARTS)
    total = root(parts_of(p_sums, i_r, n_parts, 0.0, PARTS))
    index = tl.load(p_index + i_r)
    there = (index >= 0) & (index < K)
    x = load_classes(p_x, i_r, i_r + 1, tl.where(there, index, 0), K, place)
    log_prob = nats(scaled(x, largest, temperature, DIVIDED), total)
    tl.store(p_log_prob + i_r, tl.where(there, log_prob, float("nan")))


@triton.jit
def _gradient_kernel(
    p_x, p_largest, p_sums, p_index, p_grad, p_of_x, place, place_of_x, K, temperature,
    DIVIDED: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(1).to(tl.int64) + tl.zeros([1], tl.int64)
    largest = largest_of(p_largest, i_r, tl.num_programs(0), PARTS)
    total = root(parts_of(p_sums, i_r, tl.num_programs(0), 0.0, PARTS))
    i_k = tl.program_id(0).to(tl.int64) * PART + tl.arange(0, PART)[None, :]
    b_x = load_rows(p_x, i_r, i_r + 1, i_k, K, place)
    b_w = exp(scaled(b_x, largest[:, None], temperature, DIVIDED))
    index = tl.load(p_index + i_r)
    defined = (total >= 1.0) & (index >= 0) & (index < K)
    b_of_x = gradient(b_w, i_k, index, total, tl.load(p_grad + i_r), temperature)
    store_rows(p_of_x, tl.where(defined[:, None], b_of_x, float("nan")), i_r, i_r + 1, i_k, K, place_of_x)


def _launch(
    logits: Tensor,
    index: Tensor,
    grad: Tensor | None,
    log_prob: Tensor | None,
    of_logits: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    rows, n = index.numel(), logits.shape[-1]
    if rows == 0:
        return
    index = index.contiguous()
    place, place_of_x = where(logits), where(logits if of_logits is None else of_logits)
    with on_device_of(logits):
        if n <= LONGEST:
            block_r, block_k, warps = tile_of(n)
            _rows_kernel[(triton.cdiv(rows, block_r),)](
                logits, index, grad, log_prob, of_logits, place, place_of_x, rows, n, temperature, top_k,
                top_p, BLOCK_R=block_r, BLOCK_K=block_k, **limits(n, temperature, top_k, top_p),
                **LAUNCH | {"num_warps": warps},
            )  # fmt: skip
            return
        largest, sums, constants = sums_of_parts(logits, place, temperature)
        if log_prob is not None:
            _parts_kernel[(rows,)](
                logits, largest, sums, index, log_prob, place, sums.shape[1], n, temperature, **constants,
                **LAUNCH,
            )  # fmt: skip
        else:
            _gradient_kernel[(sums.shape[1], rows)](
                logits, largest, sums, index, grad, of_logits, place, place_of_x, n, temperature, PART=PART,
                **constants, **LAUNCH,
            )  # fmt: skip


def categorical_log_prob(logits: Tensor, index: Tensor, *settings) -> Tensor:
    """The torch op ``genperf::categorical_log_prob``."""
    log_prob = logits.new_empty(index.shape, dtype=torch.float32)
    _launch(logits, index, None, log_prob, None, *settings)
    return log_prob


def categorical_log_prob_backward(grad: Tensor, logits: Tensor, index: Tensor, *settings) -> Tensor:
    """The torch op ``genperf::categorical_log_prob_backward``."""
    of_logits = torch.empty_like(logits)
    _launch(logits, index, grad.contiguous(), None, of_logits, *settings)
    return of_logits


def _example(
    shape: tuple[int, ...], dtype: torch.dtype, backward: bool, temperature=1.0, top_k=0, top_p=1.0
) -> None:
    """Launch on meta tensors."""
    logits = torch.empty(shape, dtype=dtype, device="meta")
    index = torch.empty(shape[:-1], dtype=torch.int64, device="meta")
    settings = temperature, top_k, top_p
    if backward:
        grad = torch.empty(shape[:-1], device="meta")
        categorical_log_prob_backward(grad, logits, index, *settings)
    else:
        categorical_log_prob(logits, index, *settings)


AOT = {
    "8192 classes": Example(partial(_example, (256, 8192), torch.float32, False)),
    "1024 classes, backward": Example(partial(_example, (256, 1024), torch.float32, True), quick=True),
    "limited, backward": Example(partial(_example, (256, 8192), torch.bfloat16, True, 0.7, 100, 0.9)),
    "a long row": Example(partial(_example, (4, 1 << 18), torch.float16, False, 0.9)),
    "a long row, backward": Example(partial(_example, (4, 1 << 18), torch.float16, True, 0.9)),
}
