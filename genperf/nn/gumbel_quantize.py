"""The Gumbel-softmax quantizer of a discrete VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genperf.ops.gumbel_quantize import gumbel_quantize


class GumbelQuantize(nn.Module):
    """Draws a codeword for each position from logits that a 1x1 convolution makes of the features.

    Call-compatible with ``GumbelQuantize`` of taming-transformers (``taming/modules/vqvae/quantize.py``),
    whose checkpoints load: parameters ``proj.weight`` [n_embed, num_hiddens, 1, 1], ``proj.bias`` [n_embed]
    and ``embed.weight`` [n_embed, embedding_dim], and the buffer ``used`` with ``remap``. Codewords are
    gathered where they are drawn hard, and the softmax is never stored. It draws in evaluation too.

    Args:
        num_hiddens: channels of the features.
        embedding_dim: D.
        n_embed: codewords, K.
        straight_through: whether training draws codewords rather than mixes; evaluation always does.
        kl_weight: of the divergence from the uniform prior, in nats, in the second result.
        temp_init: ``temperature``, an attribute that schedules may change; at least 1e-6.
        use_vqinterface: whether indices come as ``(None, None, indices)``.
        remap: file of numpy's save, or a sequence, with the codewords in use, int [K']: only these are drawn,
            and indices are positions in it.
        unknown_index: "random", "extra" or an integer, kept for its effect on ``re_embed``; no drawn index is
            unknown.
        rng: "torch" draws the numbers that ``torch.nn.functional.gumbel_softmax`` would; "philox" draws the
            library's own noise, in the kernel, several times as fast.

    Raises:
        ValueError: an unknown ``rng``; those of :func:`genperf.ops.gumbel_quantize`.
    """

    used: Tensor

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: str | Sequence[int] | None = None,
        unknown_index: str | int = "random",
        *,
        rng: str = "torch",
    ) -> None:
        super().__init__()
        if rng not in ("torch", "philox"):
            raise ValueError(f'GumbelQuantize: rng is {rng!r}, expected "torch" or "philox"')
        self.embedding_dim, self.n_embed = embedding_dim, n_embed
        self.straight_through = straight_through
        self.temperature = temp_init
        self.kl_weight = kl_weight
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)
        self.use_vqinterface = use_vqinterface
        self.remap, self.rng = remap, rng
        self.re_embed = n_embed
        if remap is not None:
            self.register_buffer("used", _used(remap))
            self.re_embed = len(self.used)
            self.unknown_index = unknown_index
            if unknown_index == "extra":
                self.unknown_index, self.re_embed = self.re_embed, self.re_embed + 1

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> tuple[Any, ...]:
        """
        Args:
            z: features [B, num_hiddens, H, W].
            temp: the temperature in place of ``temperature``.
            return_logits: whether to append the logits [B, K, H, W] to the results; with ``use_vqinterface``
                only.

        Returns:
            ``(quantized [B, D, H, W], loss, (None, None, indices))`` or ``(quantized, loss, indices)``: a
            scalar, ``kl_weight`` times the mean divergence of all positions, and int64 [B, H, W].
        """
        hard = self.straight_through if self.training else True
        logits, codebook = self.proj(z), self.embed.weight
        if self.remap is not None:
            logits, codebook = logits[:, self.used], codebook[self.used]
        out = gumbel_quantize(
            logits, codebook.to(logits.dtype), self.temperature if temp is None else temp, hard, rng=self.rng
        )
        assert out.kl is not None
        # The prior is uniform over all codewords, though some may not be in use.
        loss = self.kl_weight * (out.kl + math.log(self.n_embed / len(codebook))).mean()
        if not self.use_vqinterface:
            return out.quantized, loss, out.indices
        extra = (logits,) if return_logits else ()
        return out.quantized, loss, (None, None, out.indices), *extra

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int]) -> Tensor:
        """Codewords [B, D, H, W] of indices [B * H * W]; ``shape`` is (B, H, W, D).

        Raises:
            ValueError: for another number of indices.
        """
        batch, height, width, _ = shape
        if indices.numel() != batch * height * width:
            raise ValueError(
                f"GumbelQuantize.get_codebook_entry: indices has {indices.numel()} elements, expected "
                f"{batch * height * width} for the shape {tuple(shape)}"
            )
        if self.remap is not None:  # an extra index stands for the first one
            indices = self.used[torch.where(indices < len(self.used), indices, 0)]
        words = self.embed(indices.view(batch, height, width))
        return words.movedim(-1, 1).contiguous()


def _used(remap: str | Sequence[int]) -> Tensor:
    if isinstance(remap, str):
        import numpy

        return torch.from_numpy(numpy.load(remap))
    return torch.tensor(remap)
