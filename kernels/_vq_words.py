"""A codebook made ready for products in float16, without a look at the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ._vq_exact import COSINE, L2

FAR = tl.constexpr(2.0**60)  # first term of a codeword that must not be found
FOLDED = 3  # dimensions added where the first terms are folded into the products
LARGE = tl.constexpr(60000.0)  # the third of these, of every vector and, negative, of what must not be found


class Words(NamedTuple):
    """The codebook [heads, K, D] made ready; everything is on its device."""

    half: Tensor  # [heads, K_PADDED, PADDED] float16: (c - mean) step, of c / |c| for the cosine; see fold
    first: Tensor  # [heads, K_PADDED] float32: half the squared norm, FAR where it must not be found
    mean: Tensor  # [heads, D] float32
    facts: (
        Tensor  # [heads, 6] float32: step, longest, largest error, longest in float16, largest first, usable
    )
    usable: Tensor  # [heads, K] bool: finite
    usable_first: Tensor  # [heads] int64


def joined(codebooks: Sequence[Tensor]) -> Tensor:
    """The codebooks as one tensor [n, K, D], in place where they are the parts of one."""
    first, n = codebooks[0], len(codebooks)
    starts = [c.storage_offset() for c in codebooks]
    step = starts[1] - starts[0] if n > 1 else 0
    one = first.untyped_storage()._cdata
    if all(
        c.untyped_storage()._cdata == one and c.stride() == first.stride() and s == starts[0] + i * step
        for i, (c, s) in enumerate(zip(codebooks, starts, strict=True))
    ):
        return first.as_strided((n, *first.shape), (step, *first.stride()))
    return torch.stack(list(codebooks))


def _repeated(bits: Tensor) -> Tensor:
    """Which rows of [heads, K, D] integers equal an earlier one; some may be missed."""
    weights = torch.arange(1, bits.shape[2] + 1, device=bits.device) * 0x1E3779B97F4A7C15 | 1
    key, order = (bits * weights).sum(2).sort(dim=1, stable=True)
    rows = bits.gather(1, order[:, :, None].expand_as(bits))
    same = (key[:, 1:] == key[:, :-1]) & (rows[:, 1:] == rows[:, :-1]).all(2)
    return torch.zeros_like(key, dtype=torch.bool).scatter(1, order[:, 1:], same)


def prepare(
    codebook: Tensor, metric: int, padded: int, block_k: int, folded: bool = False, repeated: bool = False
) -> Words:
    """The codewords, and those that repeat an earlier one only if ``repeated``."""
    heads, n_words, dim = codebook.shape
    usable = codebook.isfinite().all(2)
    zero = torch.where(usable[:, :, None], codebook, 0.0)
    plain = zero.float() + 0.0  # 0 and -0 are one number
    sought = usable
    if not repeated:
        bits = torch.where(usable[:, :, None], plain, torch.inf).view(torch.int32)
        sought = usable & ~_repeated(bits.long())
    words, number = zero.double(), usable.sum(1).clamp(min=1)
    if metric == COSINE.value:
        length = words.norm(dim=2, keepdim=True)
        words = words / torch.where(length == 0, 1.0, length)
    mean = (words.sum(1) / number[:, None]).float()
    words = torch.where(sought[:, :, None], words - mean[:, None].double(), 0.0)
    exponent = words.abs().amax((1, 2)).frexp().exponent.clamp(-126, 126)
    step = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), -exponent)
    words = words * step[:, None, None]
    half = words.new_zeros(heads, -(-n_words // block_k) * block_k, padded, dtype=torch.float16)
    half[:, :n_words, :dim] = words
    rounded = half[:, :n_words, :dim].double()
    first = torch.full(half.shape[:2], FAR.value, device=half.device)
    squares = (
        words.square().sum(2) / 2 if metric == L2.value else torch.zeros_like(usable, dtype=torch.float64)
    )
    first[:, :n_words] = torch.where(sought, squares, FAR.value).float()
    facts = torch.stack(
        [
            step,
            *(1.001 * y.norm(dim=2).amax(1) for y in (words, words - rounded, rounded)),
            1.001 * squares.amax(1),
            usable.any(1).double(),
        ],
        1,
    )
    if folded:
        _fold(half, first, dim)
    return Words(half, first, mean, facts.float(), usable, usable.int().argmax(1))


def _fold(half: Tensor, first: Tensor, dim: int) -> None:
    """First terms as products of dimensions beyond the last: two float16 numbers, and LARGE for FAR."""
    far = first == FAR.value
    term = torch.where(far, 0.0, -first)
    high = term.half()
    half[:, :, dim] = high
    half[:, :, dim + 1] = term - high.float()
    half[:, :, dim + 2] = torch.where(far, -LARGE.value, 0.0)
    first.zero_()
