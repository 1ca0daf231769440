"""PixelCNN++: shifted convolutions at three resolutions, a mixture of discretized logistics as head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genperf.nn.autoregressive._check import dropout_rate, image, positive
from genperf.nn.autoregressive.weight_norm import (
    WeightNormConv2d,
    WeightNormConvTranspose2d,
    WeightNormLinear,
)

_U, _UL = (2, 3), (2, 2)  # kernels of the stream from the rows above, and of the one from above and left


def _concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], dim=1))


class _ShiftedConv2d(nn.Module):
    """Convolution whose output (i, j) ends at row i, and at column j ("right") or centred on it ("down").

    ``shift`` moves the output, bias and all, by one row or column more: the first one is then exactly 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        right: bool,
        stride: int = 1,
        shift: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        rows, columns = kernel_size
        side = columns // 2
        self.pad = (columns - 1, 0, rows - 1, 0) if right else (side, side, rows - 1, 0)
        self.shift = shift
        self.conv = WeightNormConv2d(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x, self.pad))
        down, right = self.shift
        if down or right:
            y = F.pad(y[:, :, : y.shape[2] - down, : y.shape[3] - right], (right, 0, down, 0))
        return y


class _ShiftedDeconv2d(nn.Module):
    """Doubles both sizes."""

    def __init__(self, channels: int, kernel_size: tuple[int, int], right: bool) -> None:
        super().__init__()
        self.left = 0 if right else kernel_size[1] // 2
        self.deconv = WeightNormConvTranspose2d(channels, channels, kernel_size, 2, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deconv(x)
        return y[:, :, : 2 * x.shape[2], self.left : self.left + 2 * x.shape[3]]


class _Nin(nn.Module):
    """Linear map of the channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lin_a = WeightNormLinear(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin_a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _GatedResnet(nn.Module):
    """x + a * sigmoid(b); ``skip`` counts the inputs [B, filters, H, W] that come in besides x."""

    def __init__(self, filters: int, right: bool, skip: int, dropout: float) -> None:
        super().__init__()
        kernel = _UL if right else _U
        self.conv_input = _ShiftedConv2d(2 * filters, filters, kernel, right)
        if skip:
            self.nin_skip = _Nin(2 * skip * filters, filters)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_out = _ShiftedConv2d(2 * filters, 2 * filters, kernel, right)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.conv_input(_concat_elu(x))
        if skip is not None:
            y = y + self.nin_skip(_concat_elu(skip))
        a, b = self.conv_out(self.dropout(_concat_elu(y))).chunk(2, dim=1)
        return x + a * torch.sigmoid(b)


class _Layer(nn.Module):
    """The resnets of both streams at one resolution, on the way up (fine to coarse) or down."""

    def __init__(self, count: int, filters: int, up: bool, dropout: float) -> None:
        super().__init__()
        skip_u, skip_ul = (0, 1) if up else (1, 2)
        self.u_stream = nn.ModuleList(_GatedResnet(filters, False, skip_u, dropout) for _ in range(count))
        self.ul_stream = nn.ModuleList(_GatedResnet(filters, True, skip_ul, dropout) for _ in range(count))

    def resnets(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        return zip(self.u_stream, self.ul_stream, strict=True)


class PixelCNNPP(nn.Module):
    """PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517).

    Key names, arguments and mathematics of pclucas14/pixel-cnn-pp (which follows openai/pixel-cnn), whose
    checkpoints load: u_init, ul_init.{0, 1}, up_layers, down_layers, downsize_{u, ul}_stream,
    upsize_{u, ul}_stream, nin_out, weight norm throughout as weight_g and weight_v. The paper has 160
    filters.

    ``mixture`` is the number of logistics. For RGB the output's channels are, with M of them: M logits,
    then for each of the three colours M means, M log-scales and M coefficients before their tanh. For grey:
    M logits, M means, M log-scales.

    Args:
        nr_resnet: residual blocks of each resolution on the way up; down 1 more at the two finer ones.
        nr_filters: channels of each stream.
        nr_logistic_mix: logistics in the mixture.
        input_channels: 3 (RGB) or 1 (grey).
        dropout: rate of the channel dropout in each block, in training only.

    Shapes:
        x [B, input_channels, H, W] float in [-1, 1], H and W multiples of 4
        -> parameters [B, 10 M, H, W] for RGB, [B, 3 M, H, W] for grey.

    Raises:
        TypeError, ValueError: an argument or input of another type or shape than stated.
    """

    def __init__(
        self,
        nr_resnet: int = 5,
        nr_filters: int = 80,
        nr_logistic_mix: int = 10,
        input_channels: int = 3,
        *,
        dropout: float = 0.5,
    ) -> None:
        positive(nr_resnet=nr_resnet, nr_filters=nr_filters, nr_logistic_mix=nr_logistic_mix)
        dropout_rate(dropout)
        if input_channels not in (1, 3):
            raise ValueError(f"input_channels: {input_channels!r}; expected 1 or 3")
        super().__init__()
        n = nr_filters
        self.input_channels = input_channels
        self.mixture = nr_logistic_mix
        self.down_layers = nn.ModuleList(
            _Layer(nr_resnet + (level > 0), n, False, dropout) for level in range(3)
        )
        self.up_layers = nn.ModuleList(_Layer(nr_resnet, n, True, dropout) for _ in range(3))
        self.downsize_u_stream = nn.ModuleList(_ShiftedConv2d(n, n, _U, False, 2) for _ in range(2))
        self.downsize_ul_stream = nn.ModuleList(_ShiftedConv2d(n, n, _UL, True, 2) for _ in range(2))
        self.upsize_u_stream = nn.ModuleList(_ShiftedDeconv2d(n, _U, False) for _ in range(2))
        self.upsize_ul_stream = nn.ModuleList(_ShiftedDeconv2d(n, _UL, True) for _ in range(2))
        # Each shift hides the current row from u, and the current pixel from ul.
        self.u_init = _ShiftedConv2d(input_channels + 1, n, (2, 3), False, shift=(1, 0))
        self.ul_init = nn.ModuleList(
            [
                _ShiftedConv2d(input_channels + 1, n, (1, 3), False, shift=(1, 0)),
                _ShiftedConv2d(input_channels + 1, n, (2, 1), True, shift=(0, 1)),
            ]
        )
        self.nin_out = _Nin(n, (10 if input_channels == 3 else 3) * nr_logistic_mix)

    def forward(self, x: Tensor) -> Tensor:
        """Parameters of every pixel's mixture from the pixels before it."""
        image(x, self.input_channels)
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"x: shape {tuple(x.shape)}; expected H and W that are multiples of 4")
        # A channel of ones tells the image from the zero padding.
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        u = self.u_init(x)
        ul = self.ul_init[0](x) + self.ul_init[1](x)
        skips = [(u, ul)]
        for level, layer in enumerate(self.up_layers):
            assert isinstance(layer, _Layer)
            for u_resnet, ul_resnet in layer.resnets():
                u = u_resnet(u)
                ul = ul_resnet(ul, u)
                skips.append((u, ul))
            if level < 2:
                u = self.downsize_u_stream[level](u)
                ul = self.downsize_ul_stream[level](ul)
                skips.append((u, ul))
        skips.pop()
        for level, layer in enumerate(self.down_layers):
            assert isinstance(layer, _Layer)
            for u_resnet, ul_resnet in layer.resnets():
                u_skip, ul_skip = skips.pop()
                u = u_resnet(u, u_skip)
                ul = ul_resnet(ul, torch.cat([u, ul_skip], dim=1))
            if level < 2:
                u = self.upsize_u_stream[level](u)
                ul = self.upsize_ul_stream[level](ul)
        return self.nin_out(F.elu(ul))
