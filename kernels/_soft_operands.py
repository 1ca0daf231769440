"""Vectors and codewords as the products of ``soft_assignment`` take them: float32, centred or normalised."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._soft_scores import COSINE, DOT, EUCLIDEAN, L2
from ._tile import LAUNCH, collapsed, offset_of, on_device_of

WORDS = 64  # of a block; codebooks are padded to a multiple


@triton.jit
def _rows_kernel(
    p_x, p_mean, p_rows, p_squares, p_inverse, sizes, strides, s_d, N, D, PADDED,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Vectors in float32 [heads, N, PADDED], less the mean or over their lengths, and squares of lengths."""
    i_head = tl.program_id(1).to(tl.int64)
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    p_from = p_x + offset_of(i_head, i_r, sizes, strides)
    square = tl.zeros([BLOCK_R], tl.float64)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        m = (i_r < N)[:, None] & (i_d < D)[None, :]
        b_x = tl.load(p_from[:, None] + i_d[None, :] * s_d, mask=m, other=0.0).to(tl.float32)
        if p_mean is not None:
            b_x -= tl.load(p_mean + i_head * D + i_d, mask=i_d < D, other=0.0)[None, :]
            b_x = tl.where(m, b_x, 0.0)
        b_x = b_x.to(tl.float64)
        square += tl.sum(b_x * b_x, axis=1)
    i_row = i_head * N + i_r
    tl.store(p_squares + i_row, square, mask=i_r < N)
    inverse = tl.full([BLOCK_R], 1.0, tl.float32)
    if p_inverse is not None:
        zero = square == 0.0
        length = tl.sqrt(tl.where(zero, 1.0, square))
        inverse = tl.where(zero, 0.0, (tl.full([BLOCK_R], 1.0, tl.float64) / length).to(tl.float32))
        tl.store(p_inverse + i_row, inverse, mask=i_r < N)
    for d in range(0, PADDED, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        m = (i_r < N)[:, None] & (i_d < D)[None, :]
        b_x = tl.load(p_from[:, None] + i_d[None, :] * s_d, mask=m, other=0.0).to(tl.float32)
        if p_mean is not None:
            b_x -= tl.load(p_mean + i_head * D + i_d, mask=i_d < D, other=0.0)[None, :]
            b_x = tl.where(m, b_x, 0.0)
        m = (i_r < N)[:, None] & (i_d < PADDED)[None, :]
        tl.store(p_rows + i_row[:, None] * PADDED + i_d[None, :], b_x * inverse[:, None], mask=m)


class Operands(NamedTuple):
    """Vectors and codewords in float32, as the products take them."""

    rows: Tensor  # [heads, N, PADDED]
    squares: Tensor  # [heads, N] float64, of the lengths of the vectors less the mean
    inverse_rows: Tensor | None  # 1 / length, of the cosine
    words: Tensor  # [heads, K_PADDED, PADDED]
    bias: Tensor  # [heads, K_PADDED]: -|c|^2 / temperature, |c|^2, or 0; where padded, what makes p 0
    inverse_words: Tensor | None
    metric: int
    scale: float  # of the products, or of the distance
    temperature: float

    @property
    def constants(self) -> dict[str, object]:
        return {"METRIC": self.metric, "BLOCK_D": 16, "maxnreg": 255, **LAUNCH}

    def sizes(self) -> tuple[int, int, int]:
        return self.rows.shape[1], self.words.shape[1], self.words.shape[2]


def operands(x: Tensor, codebook: Tensor, metric: int, temperature: float) -> Operands:
    heads, n_words, dim = codebook.shape
    n, padded = x[0].numel() // dim, -(-dim // 16) * 16
    plain, mean, inverse, inverse_words = codebook.double(), None, None, None
    if metric == COSINE.value:
        length = plain.norm(dim=2)
        inverse_words = torch.where(length == 0, 0.0, 1 / torch.where(length == 0, 1.0, length))
        plain = plain * inverse_words[:, :, None]
        inverse_words = torch.nn.functional.pad(inverse_words.float(), (0, -n_words % WORDS))
        inverse = x.new_empty(heads, n, dtype=torch.float32)
    elif metric != DOT.value:
        # Only where the mean is longer than what would be left: a subtraction rounds.
        mean = plain.mean(1)
        far = 2 * n_words * mean.square().sum(1) > plain.square().sum((1, 2))
        mean = torch.where(far[:, None], mean, 0.0).float()
        plain = (plain.float() - mean[:, None]).double()
    words = x.new_zeros(heads, n_words + -n_words % WORDS, padded, dtype=torch.float32)
    words[:, :n_words, :dim] = plain
    lost = torch.inf if metric == EUCLIDEAN.value else -torch.inf
    bias = x.new_full(words.shape[:2], lost, dtype=torch.float32)
    if metric == L2.value:
        bias[:, :n_words] = plain.square().sum(2) / -temperature
    else:
        bias[:, :n_words] = plain.square().sum(2) if metric == EUCLIDEAN.value else 0.0
    rows = x.new_empty(heads, n, padded, dtype=torch.float32)
    squares = x.new_empty(heads, n, dtype=torch.float64)
    block_d = min(128, triton.next_power_of_2(padded))
    block_r = 1024 // block_d
    with on_device_of(x):
        _rows_kernel[(triton.cdiv(n, block_r), heads)](
            x, mean, rows, squares, inverse, *collapsed(x), x.stride(-1), n, dim, padded,
            BLOCK_R=block_r, BLOCK_D=block_d, **LAUNCH,
        )  # fmt: skip
    scale = {L2.value: 2 / temperature, EUCLIDEAN.value: -1 / temperature}.get(metric, 1 / temperature)
    return Operands(rows, squares, inverse, words, bias, inverse_words, metric, scale, temperature)
