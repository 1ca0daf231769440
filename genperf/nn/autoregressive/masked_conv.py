"""Convolution whose kernel sees only the pixels before the current one, in raster order."""

from __future__ import annotations

from torch import Tensor, nn, ones

from genperf.nn.autoregressive._check import odd, positive


class MaskedConv2d(nn.Conv2d):
    """Masked convolution of PixelCNN (van den Oord et al. 2016, arXiv:1601.06759, figure 2).

    Rows below the kernel's centre and columns right of it in the centre row are masked. At the centre,
    mask "A" hides the current pixel and "B" shows it. With several data channels the channels of a pixel
    are an order too: feature map o belongs to data channel ``o % data_channels``, and at the centre sees
    the maps of earlier data channels only (mask "A"), or of its own as well (mask "B").

    Zero padding keeps the size. Parameters and the buffer ``mask`` are named as in the usual public
    definitions (jzbontar/pixelcnn-pytorch, anordertoreclaim/PixelCNN). These zero the masked weights in
    place; here they keep their values, get gradient 0, and are never read.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd kernel size, or (rows, columns).
        mask_type: "A" for the first layer, "B" for those after it.
        data_channels: channels of a pixel that are sampled one after the other.
        dilation: dilation in both dims.
        bias: whether there is a bias.

    Shapes:
        x [B, in_channels, H, W] -> [B, out_channels, H, W]

    Raises:
        ValueError: an even kernel size, an unknown mask type, a number below 1.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        mask_type: str,
        data_channels: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        positive(in_channels=in_channels, out_channels=out_channels, data_channels=data_channels)
        positive(dilation=dilation)
        odd(**{"kernel_size rows": rows, "kernel_size columns": columns})
        if mask_type not in ("A", "B"):
            raise ValueError(f'mask_type: {mask_type!r}; expected "A" or "B"')
        padding = (rows // 2 * dilation, columns // 2 * dilation)
        super().__init__(
            in_channels, out_channels, (rows, columns), padding=padding, dilation=dilation, bias=bias
        )
        self.mask_type = mask_type
        self.data_channels = data_channels
        mask = ones(self.weight.shape)
        mask[:, :, rows // 2 + 1 :] = 0
        mask[:, :, rows // 2, columns // 2 + 1 :] = 0
        for o in range(data_channels):
            hidden = range(o if mask_type == "A" else o + 1, data_channels)
            for i in hidden:
                mask[o::data_channels, i::data_channels, rows // 2, columns // 2] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves x [B, in_channels, H, W] with the unmasked taps."""
        return self._conv_forward(x, self.weight * self.mask, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask_type={self.mask_type!r}, data_channels={self.data_channels}"
