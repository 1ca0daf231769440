"""The masked convolution of PixelCNN by the kernel of :func:`genperf.ops.masked_conv2d`."""

from __future__ import annotations

import torch
from torch import Tensor

from genperf.nn.autoregressive import masked_conv
from genperf.ops.masked_conv2d import masked_conv2d

_COVERED = (torch.float32, torch.float16, torch.bfloat16)


def covered(x: object, weight: Tensor) -> bool:
    """Whether the kernel serves this call.

    Not so under autocast and function transforms, nor where a dispatch mode records the model, which is then
    to see torch's convolution.
    """
    return (
        isinstance(x, Tensor)
        and x.dim() == 4
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in _COVERED
        and not torch.is_autocast_enabled("cpu")
        and (
            torch.compiler.is_compiling()
            or (
                torch._C._len_torch_dispatch_stack() == 0
                and torch._C._functorch.peek_interpreter_stack() is None
            )
        )
    )


class MaskedConv2d(masked_conv.MaskedConv2d):
    """:class:`genperf.nn.autoregressive.MaskedConv2d` by the kernel: the same arguments, parameters and mask.

    What the kernel does not serve (float64, devices other than the CPU, autocast) runs torch's convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolves x [B, in_channels, H, W]; what the mask zeroes is neither computed nor read."""
        if not covered(x, self.weight):
            return super().forward(x)
        return masked_conv2d(x, self.weight, self.mask, self.bias, self.stride, self.padding, self.dilation)
