"""Gated PixelCNN over images whose channels are sampled one after the other."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genperf.nn.autoregressive._check import image, labels, odd, positive
from genperf.nn.autoregressive.masked_conv import MaskedConv2d


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class _Block(nn.Module):
    """Vertical and horizontal stack of one layer; the first has mask "A", no residual and no skip."""

    def __init__(
        self, width_in: int, width: int, kernel_size: int, data_channels: int, n_classes: int, first: bool
    ) -> None:
        super().__init__()
        masked = partial(MaskedConv2d, mask_type="A" if first else "B", data_channels=data_channels)
        self.first = first
        self.rows = kernel_size // 2 + 1
        self.v_conv = nn.Conv2d(width_in, 2 * width, (self.rows, kernel_size), padding=(0, kernel_size // 2))
        self.v_fc = nn.Conv2d(width_in, 2 * width, 1)
        self.v_to_h = nn.Conv2d(2 * width, 2 * width, 1) if first else masked(2 * width, 2 * width, 1)
        self.h_conv = masked(width_in, 2 * width, (1, kernel_size))
        self.h_fc = masked(width, width, 1)
        if not first:
            self.h_skip = masked(width, width, 1)
            if n_classes:
                self.label_embedding = nn.Embedding(n_classes, 2 * width)

    def forward(self, v: Tensor, h: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """v and h [B, width_in, H, W] -> v, h and the skip connection [B, width, H, W]."""
        rows = self.v_conv(F.pad(v, (0, 0, self.rows, 0)))  # H + 1 of them: the first ends above the image
        cond = None if label is None else self.label_embedding(label)[:, :, None, None]
        vertical = rows[:, :, 1:] + self.v_fc(v)
        if cond is not None:
            vertical = vertical + cond
        # The horizontal stack may see the row above: in row 0 that is the bare convolution, elsewhere what
        # the vertical stack has there, v_fc and label included. (The public code adds these in place, to a
        # view that overlaps the one which it hands on.)
        above = torch.cat([rows[:, :, :1], vertical[:, :, :-1]], dim=2)
        horizontal = self.h_conv(h) + self.v_to_h(above)
        if cond is not None:
            horizontal = horizontal + cond
        gated = _gate(horizontal)
        if self.first:
            return _gate(vertical), self.h_fc(gated), torch.zeros_like(gated)
        return _gate(vertical) + v, self.h_fc(gated) + h, self.h_skip(gated)


class GatedPixelCNNRGB(nn.Module):
    """Gated PixelCNN over images, 1 to C channels in order (van den Oord et al. 2016, arXiv:1606.05328).

    Key names and mathematics of anordertoreclaim/PixelCNN (its defaults too), whose checkpoints load:
    causal_conv.{v_conv, v_fc, v_to_h, h_conv, h_fc}, hidden_conv.{l}.{v_conv, v_fc, v_to_h, h_conv, h_fc,
    h_skip, label_embedding}, label_embedding, out_hidden_conv, out_conv. The vertical stack includes the
    current row, and reaches the horizontal one shifted down by a row. The first layer masks the channels of
    the current pixel twice, as there, so that of three channels the last sees the first one, and none the
    second. Feature map o belongs to data channel
    ``o % data_channels``, hence the multiple asked of ``hidden_fmaps``: without it the two halves of the
    gate would belong to different channels, and the model would see the channel that it predicts.

    Args:
        color_levels: values that each channel of a pixel can take.
        hidden_fmaps: feature maps. A multiple of ``data_channels``.
        hidden_layers: gated layers after the first.
        out_hidden_fmaps: feature maps between the two 1x1 convolutions of the head.
        causal_ksize: odd kernel size of the first layer.
        hidden_ksize: odd kernel size of the others.
        n_classes: label classes, or 0 for a model without labels.
        data_channels: channels of the image.

    Shapes:
        image [B, C, H, W] float, level / (color_levels - 1); label [B] integers below n_classes
        -> logits [B, color_levels, C, H, W].

    Raises:
        TypeError, ValueError: an argument or input of another type or shape than stated.
    """

    def __init__(
        self,
        color_levels: int = 2,
        hidden_fmaps: int = 30,
        hidden_layers: int = 6,
        out_hidden_fmaps: int = 10,
        *,
        causal_ksize: int = 7,
        hidden_ksize: int = 7,
        n_classes: int = 10,
        data_channels: int = 3,
    ) -> None:
        positive(color_levels=color_levels, hidden_fmaps=hidden_fmaps, hidden_layers=hidden_layers)
        positive(out_hidden_fmaps=out_hidden_fmaps, data_channels=data_channels)
        odd(causal_ksize=causal_ksize, hidden_ksize=hidden_ksize)
        if n_classes < 0:
            raise ValueError(f"n_classes: {n_classes}; expected 0 or more")
        if hidden_fmaps % data_channels:
            raise ValueError(
                f"hidden_fmaps: {hidden_fmaps}; expected a multiple of data_channels, {data_channels}"
            )
        super().__init__()
        self.classes = color_levels
        self.n_classes = n_classes
        self.data_channels = data_channels
        self.causal_conv = _Block(data_channels, hidden_fmaps, causal_ksize, data_channels, 0, first=True)
        self.hidden_conv = nn.ModuleList(
            _Block(hidden_fmaps, hidden_fmaps, hidden_ksize, data_channels, n_classes, first=False)
            for _ in range(hidden_layers)
        )
        if n_classes:
            self.label_embedding = nn.Embedding(n_classes, hidden_fmaps)
        masked = partial(MaskedConv2d, kernel_size=1, mask_type="B", data_channels=data_channels)
        self.out_hidden_conv = masked(hidden_fmaps, out_hidden_fmaps)
        self.out_conv = masked(out_hidden_fmaps, data_channels * color_levels)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits [B, color_levels, C, H, W] of every channel from those before it."""
        image(x, self.data_channels)
        labels(label, self.n_classes, x.shape[0])
        v, h, skip = self.causal_conv(x, x)
        for block in self.hidden_conv:
            v, h, block_skip = block(v, h, label)
            skip = skip + block_skip
        if label is not None:
            skip = skip + self.label_embedding(label)[:, :, None, None]
        out = F.relu(self.out_hidden_conv(F.relu(skip)))
        return self.out_conv(out).unflatten(1, (self.classes, self.data_channels))
