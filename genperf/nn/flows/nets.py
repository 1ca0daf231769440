"""The networks of Glow: what a coupling layer and a prior are computed by."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ZeroConv2d(nn.Conv2d):
    """A 3x3 convolution that is 0 at first, with learned scales: ``conv(x) * exp(3 scale)``.

    Images are padded by ``pad_value``; 1 tells the border from what is inside, as the convolutions with edge
    padding of openai/glow do. The padded image is not made: the border's share is the same for all samples,
    and is added.

    Args:
        in_channels, out_channels: of the convolution.
        pad_value: what stands around the image.
    """

    def __init__(self, in_channels: int, out_channels: int, *, pad_value: float = 1.0) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.scale = nn.Parameter(torch.zeros(out_channels))
        self.pad_value = pad_value

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] to [B, out_channels, H, W]."""
        y, factor = self.apart(x)
        return y * factor[:, None, None]

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution and the factors [out_channels] that remain to be multiplied with."""
        y = super().forward(x)
        if self.pad_value != 0:
            frame = _frame(x.shape[2], x.shape[3], x.device, self.weight.dtype)
            sums = self.weight.sum(1, keepdim=True)
            y = y + F.conv2d(frame, sums if self.pad_value == 1 else sums * self.pad_value)
        return y, (self.scale * 3).exp()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pad_value={self.pad_value}"


def _frame(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Ones around zeros, [1, 1, height + 2, width + 2]."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    make = _make_frame if capturing or torch.compiler.is_compiling() else _kept_frame
    return make(height, width, device, dtype)


def _make_frame(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return F.pad(torch.zeros(1, 1, height, width, device=device, dtype=dtype), (1, 1, 1, 1), value=1.0)


@functools.lru_cache(maxsize=64)
def _kept_frame(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _make_frame(height, width, device, dtype)


class _ReLU(torch.autograd.Function):
    """In place both ways: the tensors of the hidden channels are most of a network's traffic.

    The gradient that comes in is the layer's after it alone, made for this.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        y = x.relu_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return grad * (y > 0)
        return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)


def _relu(x: Tensor) -> Tensor:
    return F.relu(x) if torch.compiler.is_compiling() else _ReLU.apply(x)


class CouplingNet(nn.Module):
    """3x3 convolution, ReLU, 1x1 convolution, ReLU, :class:`ZeroConv2d` (arXiv:1807.03039, section 4).

    Args:
        in_channels: of what passes through the coupling layer.
        out_channels: shifts and scales of what it transforms.
        hidden: channels in between.
        pad_value: of the last convolution.
        channels_last: whether to convert the input so; None: on the CPU, and in half precision on a GPU.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int = 512, *, pad_value: float = 1.0,
        channels_last: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels_last = channels_last
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, hidden, 1)
        self.out = ZeroConv2d(hidden, out_channels, pad_value=pad_value)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, 0, 0.05)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """x [B, in_channels, H, W] to [B, out_channels, H, W], and factors [out_channels] for its
        channels."""
        if self._last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        return self.out.apart(self._mixed(_relu(self.conv1(x))))

    def _mixed(self, x: Tensor) -> Tensor:
        """The 1x1 convolution and ReLU; on the CPU by a matrix product, whose backward pass is the faster."""
        if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
            return _relu(self.conv2(x))
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        rows = _relu(F.linear(rows, self.conv2.weight.flatten(1), self.conv2.bias))
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _last(self, x: Tensor) -> bool:
        if self.channels_last is not None:
            return self.channels_last
        if x.device.type == "cpu":
            return True
        half = torch.is_autocast_enabled(x.device.type) or x.dtype in (torch.float16, torch.bfloat16)
        return x.is_cuda and half
