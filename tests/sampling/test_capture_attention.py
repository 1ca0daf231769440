"""Attention in the forms in which models write it, and what of it has no incremental form."""

import math

import pytest
import torch
from genperf_testing import layers
from torch import Tensor, nn
from torch.nn import functional as F

from genperf.sampling._errors import CaptureError, CausalityError
from genperf.sampling._verify import check_causal, when_known


def _heads(y: Tensor, size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, 2 heads, 30 cells, size], the cells side by side in memory."""
    q, k, v = torch.cat([y, y.tanh()], 1)[:, : 6 * size].chunk(3, 1)
    return tuple(t.reshape(2, 2, size, 30).transpose(2, 3) for t in (q, k * 1.5, v))  # type: ignore[return-value]


def _map(out: Tensor) -> Tensor:
    return out.transpose(2, 3).reshape(2, -1, 5, 6)


_CAUSAL = torch.ones(30, 30, dtype=torch.bool).tril()
_STRICT = _CAUSAL.tril(-1)
_ADDED = torch.zeros(30, 30).masked_fill(~_CAUSAL, -math.inf)


def _by_hand(y: Tensor, fill: float) -> Tensor:
    q, k, v = _heads(y)
    score = (q @ k.transpose(2, 3)) / math.sqrt(2)
    return _map(F.softmax(score.masked_fill(~_CAUSAL, fill), -1) @ v)


def _background(y: Tensor) -> Tensor:
    """Without the pixel itself, the first row of weights multiplied by 0."""
    q, k, v = _heads(y)
    weight = F.softmax((q @ k.transpose(2, 3)).masked_fill(~_STRICT, -1e4), -1)
    return _map((weight * (torch.arange(30) > 0).view(1, 1, -1, 1)) @ v)


_ATTENTION: dict[str, layers.Body] = {
    "side by side in channels": lambda y: _map(
        F.scaled_dot_product_attention(*(t.contiguous() for t in _heads(y)), is_causal=True)
    ),
    "mask, side by side": lambda y: _map(
        F.scaled_dot_product_attention(*(t.contiguous() for t in _heads(y)), attn_mask=_CAUSAL)
    ),
    "empty row, side by side": lambda y: _map(
        F.scaled_dot_product_attention(*(t.contiguous() for t in _heads(y)), attn_mask=_STRICT)
    ),
    "is_causal": lambda y: _map(F.scaled_dot_product_attention(*_heads(y), is_causal=True)),
    "boolean mask": lambda y: _map(F.scaled_dot_product_attention(*_heads(y), attn_mask=_CAUSAL)),
    "mask of each head": lambda y: _map(
        F.scaled_dot_product_attention(*_heads(y), _CAUSAL.expand(2, 2, 30, 30))
    ),
    "mask without a key": lambda y: _map(F.scaled_dot_product_attention(*_heads(y), attn_mask=_STRICT)),
    "added mask": lambda y: _map(F.scaled_dot_product_attention(*_heads(y), attn_mask=_ADDED.to(y))),
    "scale": lambda y: _map(F.scaled_dot_product_attention(*_heads(y), is_causal=True, scale=0.3)),
    "one head": lambda y: (
        F.scaled_dot_product_attention(
            *(t.flatten(2).transpose(1, 2) for t in (y, y * 2, y.tanh())), is_causal=True
        )
        .transpose(1, 2)
        .reshape(2, 8, 5, 6)
    ),
    "values of another size": lambda y: _map(
        F.scaled_dot_product_attention(
            *_heads(y)[:2], torch.cat([_heads(y)[2], _heads(y)[0]], -1), is_causal=True
        )
    ),
    "by hand": lambda y: _by_hand(y, -1e9),
    "by hand with infinity": lambda y: _by_hand(y, -math.inf),
    "background": _background,
}


@pytest.mark.parametrize("name", _ATTENTION)
def test_attention(name: str) -> None:
    layers.check(_ATTENTION[name])


def test_multihead_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, y: Tensor) -> Tensor:
            cells = y.flatten(2).transpose(1, 2)
            out, _ = self.attention(cells, cells, cells, attn_mask=~_CAUSAL, need_weights=False)
            return out.transpose(1, 2).reshape(2, 8, 5, 6)

    layers.check(Attention())


def test_attention_without_a_mask_sees_everything() -> None:
    graph = layers.captured(layers.Around(lambda y: _map(F.scaled_dot_product_attention(*_heads(y)))))
    with pytest.raises(CausalityError, match="bmm"):
        check_causal(graph, when_known(graph))


_REFUSED: dict[str, tuple[layers.Body, str]] = {
    "scores in between": (
        lambda y: torch.relu(y.flatten(2).transpose(1, 2) @ y.flatten(2)),
        "attention scores",
    ),
    "local attention": (
        lambda y: _map(F.scaled_dot_product_attention(*_heads(y), attn_mask=_CAUSAL.triu(-5))),
        "prefix of the cells",
    ),
    "relative positions": (
        lambda y: _map(F.scaled_dot_product_attention(*_heads(y), attn_mask=_ADDED.to(y) + 0.1)),
        "neither 0 nor",
    ),
    "dropout of attention": (
        lambda y: _map(F.scaled_dot_product_attention(*_heads(y), is_causal=True, dropout_p=0.1)),
        "random numbers",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_other_uses_of_scores_are_named(name: str) -> None:
    body, why = _REFUSED[name]
    with pytest.raises(CaptureError, match=why):
        layers.captured(layers.Around(body))
