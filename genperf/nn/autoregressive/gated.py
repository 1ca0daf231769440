"""Gated PixelCNN: a vertical and a horizontal stack, so that no pixel above is missed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genperf.nn.autoregressive._check import indices, labels, positive


def _gate(x: Tensor) -> Tensor:
    """tanh of the first half of the channels times sigmoid of the second."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class _GatedMaskedConv2d(nn.Module):
    """One layer: (x_v, x_h) [B, dim, H, W] each -> the same."""

    def __init__(self, dim: int, kernel_size: int, mask_type: str, residual: bool, n_classes: int) -> None:
        super().__init__()
        half = kernel_size // 2
        self.mask_type = mask_type
        self.residual = residual
        if n_classes:
            self.class_cond_embedding = nn.Embedding(n_classes, 2 * dim)
        self.vert_stack = nn.Conv2d(dim, 2 * dim, (half + 1, kernel_size), padding=(half, half))
        self.vert_to_horiz = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.horiz_stack = nn.Conv2d(dim, 2 * dim, (1, half + 1), padding=(0, half))
        self.horiz_resid = nn.Conv2d(dim, dim, 1)

    def _stack(self, conv: nn.Conv2d, x: Tensor, dim: int) -> Tensor:
        # Padded on both sides, so that output i of the first x.shape[dim] ends at input i. Mask A drops
        # that last tap, and whatever a checkpoint holds there.
        size = conv.weight.shape[dim] - (self.mask_type == "A")
        y = conv._conv_forward(x, conv.weight.narrow(dim, 0, size), conv.bias)
        return y.narrow(dim, 0, x.shape[dim])

    def forward(self, x_v: Tensor, x_h: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        vertical = self._stack(self.vert_stack, x_v, 2)
        horizontal = self._stack(self.horiz_stack, x_h, 3) + self.vert_to_horiz(vertical)
        if label is not None:
            cond = self.class_cond_embedding(label)[:, :, None, None]
            vertical, horizontal = vertical + cond, horizontal + cond
        out = self.horiz_resid(_gate(horizontal))
        return _gate(vertical), out + x_h if self.residual else out


class GatedPixelCNN(nn.Module):
    """Gated PixelCNN over a map of indices (van den Oord et al. 2016, arXiv:1606.05328).

    Key names, arguments and mathematics of ritheshkumar95/pytorch-vqvae, the usual prior over VQ-VAE
    codes, whose checkpoints load: embedding, layers.{l}.{class_cond_embedding, vert_stack, vert_to_horiz,
    horiz_stack, horiz_resid}, output_conv.{0, 2}. The first layer has a 7x7 kernel and mask "A", the
    others 3x3 and mask "B". Unlike there, H != W is right and the masked taps are never written.

    Args:
        input_dim: values that a pixel can take.
        dim: channels of each stack.
        n_layers: gated layers.
        n_classes: label classes, or 0 for a model without labels.
        hidden_dim: channels between the two 1x1 convolutions of the head.

    Shapes:
        x [B, H, W] integers below input_dim, label [B] integers below n_classes
        -> logits [B, input_dim, H, W].

    Raises:
        TypeError, ValueError: an argument or input of another type or shape than stated.
    """

    def __init__(
        self,
        input_dim: int = 256,
        dim: int = 64,
        n_layers: int = 15,
        n_classes: int = 10,
        *,
        hidden_dim: int = 512,
    ) -> None:
        positive(input_dim=input_dim, dim=dim, n_layers=n_layers, hidden_dim=hidden_dim)
        if n_classes < 0:
            raise ValueError(f"n_classes: {n_classes}; expected 0 or more")
        super().__init__()
        self.classes = input_dim
        self.n_classes = n_classes
        self.embedding = nn.Embedding(input_dim, dim)
        self.layers = nn.ModuleList(
            _GatedMaskedConv2d(dim, 3 if layer else 7, "B" if layer else "A", layer > 0, n_classes)
            for layer in range(n_layers)
        )
        self.output_conv = nn.Sequential(
            nn.Conv2d(dim, hidden_dim, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden_dim, input_dim, 1)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits [B, input_dim, H, W] of every pixel from those before it."""
        indices("x", x, "[B, H, W]")
        labels(label, self.n_classes, x.shape[0])
        x_v = x_h = self.embedding(x).permute(0, 3, 1, 2)
        for layer in self.layers:
            x_v, x_h = layer(x_v, x_h, label)
        return self.output_conv(x_h)
