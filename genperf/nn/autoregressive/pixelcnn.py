"""PixelCNN: a stack of masked convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from genperf.nn.autoregressive._check import image, indices, odd, positive
from genperf.nn.autoregressive.masked_conv import MaskedConv2d


class _PixelEmbedding(nn.Embedding):
    """Indices [B, H, W] -> vectors [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).permute(0, 3, 1, 2)


class PixelCNN(nn.Sequential):
    """PixelCNN with masked convolutions and BatchNorm (van den Oord et al. 2016, arXiv:1601.06759).

    Layer for layer the ``nn.Sequential`` of jzbontar/pixelcnn-pytorch, whose checkpoints load: masked
    convolutions at {0, 3, 6, ...} without bias, BatchNorm at {1, 4, ...}, ReLU, and a 1x1 convolution
    last. As there, the kernel's blind spot is kept. That model has 64 channels, 8 layers and 256 classes,
    and gets grey images scaled to [0, 1].

    Args:
        classes: values that a pixel (each of its channels) can take.
        channels: feature maps. A multiple of ``in_channels``.
        layers: masked convolutions, the first of mask "A".
        kernel_size: odd size of every masked kernel.
        in_channels: channels of the image. With more than one, a channel's distribution sees the earlier
            channels of the same pixel.
        embedding: 0 for float input, or the width of a learned embedding of integer input, which is then
            layer 0 and moves the other keys up by one.
        batch_norm: BatchNorm after each masked convolution; a bias in it otherwise.

    Shapes:
        x [B, in_channels, H, W] float, scaled as in training, or [B, H, W] integers with an embedding
        -> logits [B, classes, H, W], or [B, classes, in_channels, H, W] with several channels.

    Raises:
        TypeError, ValueError: an argument or input of another type or shape than stated.
    """

    def __init__(
        self,
        classes: int = 256,
        channels: int = 64,
        layers: int = 8,
        kernel_size: int = 7,
        *,
        in_channels: int = 1,
        embedding: int = 0,
        batch_norm: bool = True,
    ) -> None:
        positive(classes=classes, channels=channels, layers=layers, in_channels=in_channels)
        odd(kernel_size=kernel_size)
        if channels % in_channels:
            raise ValueError(f"channels: {channels}; expected a multiple of in_channels, {in_channels}")
        if embedding < 0 or (embedding and in_channels > 1):
            raise ValueError(f"embedding: {embedding}; expected 0, or a width with in_channels=1")
        modules: list[nn.Module] = [_PixelEmbedding(classes, embedding)] if embedding else []
        width = embedding or in_channels
        for layer in range(layers):
            modules.append(
                MaskedConv2d(
                    width,
                    channels,
                    kernel_size,
                    mask_type="B" if layer else "A",
                    data_channels=in_channels,
                    bias=not batch_norm,
                )
            )
            modules += [nn.BatchNorm2d(channels)] if batch_norm else []
            modules.append(nn.ReLU(inplace=True))
            width = channels
        if in_channels == 1:
            modules.append(nn.Conv2d(channels, classes, 1))
        else:
            head = MaskedConv2d(channels, classes * in_channels, 1, mask_type="B", data_channels=in_channels)
            modules.append(head)
        super().__init__(*modules)
        self.classes = classes
        self.in_channels = in_channels
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel from those before it."""
        if self.embedding:
            indices("x", x, "[B, H, W]")
        else:
            image(x, self.in_channels)
        logits = super().forward(x)
        return logits if self.in_channels == 1 else logits.unflatten(1, (self.classes, self.in_channels))
