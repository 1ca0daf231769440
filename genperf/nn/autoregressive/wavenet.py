"""WaveNet: dilated causal convolutions over a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genperf.nn.autoregressive._check import indices, positive


class _Conv(nn.Module):
    """Causal convolution: output t ends at input t."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.left = (kernel_size - 1) * dilation
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, dilation=dilation, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (self.left, 0)) if self.left else x)


class WaveNet(nn.Module):
    """WaveNet (van den Oord et al. 2016, arXiv:1609.03499), in the variant that nv-wavenet accelerates.

    Key names, arguments and mathematics of the PyTorch model in NVIDIA/nv-wavenet: embed,
    dilate_layers.{l}.conv, res_layers.{l}.conv (none after the last layer), skip_layers.{l}.conv,
    conv_out.conv, conv_end.conv, and with conditioning upsample and cond_layers.conv. Kernels have two
    taps, dilations double from 1 to ``max_dilation`` and start again. As there the logits are moved by one
    step, so that those of step t see the steps before t, and the first are 0.

    Args:
        n_in_channels: values that a step can take.
        n_layers: dilated layers.
        max_dilation: largest dilation.
        n_residual_channels: channels of the residual stream.
        n_skip_channels: channels of the sum of skip connections.
        n_out_channels: channels of the logits; ``n_in_channels`` if it is to be sampled from.
        n_cond_channels: channels of the conditioning features; 0 for none.
        upsamp_window: kernel of the transposed convolution that brings the features to the step rate.
        upsamp_stride: its stride, steps for each frame of features.

    Shapes:
        x [B, T] integers below n_in_channels; features [B, n_cond_channels, frames] with
        (frames - 1) * upsamp_stride + upsamp_window >= T -> logits [B, n_out_channels, T].

    Raises:
        TypeError, ValueError: an argument or input of another type or shape than stated.
    """

    def __init__(
        self,
        n_in_channels: int = 256,
        n_layers: int = 16,
        max_dilation: int = 128,
        n_residual_channels: int = 64,
        n_skip_channels: int = 256,
        n_out_channels: int = 256,
        n_cond_channels: int = 0,
        upsamp_window: int = 1024,
        upsamp_stride: int = 256,
    ) -> None:
        positive(n_in_channels=n_in_channels, n_layers=n_layers, max_dilation=max_dilation)
        positive(n_residual_channels=n_residual_channels, n_skip_channels=n_skip_channels)
        positive(n_out_channels=n_out_channels, upsamp_window=upsamp_window, upsamp_stride=upsamp_stride)
        if n_cond_channels < 0:
            raise ValueError(f"n_cond_channels: {n_cond_channels}; expected 0 or more")
        super().__init__()
        self.classes = n_out_channels
        self.n_layers = n_layers
        self.n_cond_channels = n_cond_channels
        residual = n_residual_channels
        if n_cond_channels:
            self.upsample = nn.ConvTranspose1d(n_cond_channels, n_cond_channels, upsamp_window, upsamp_stride)
            self.cond_layers = _Conv(n_cond_channels, 2 * residual * n_layers)
        cycle = max_dilation.bit_length()
        self.dilate_layers = nn.ModuleList(
            _Conv(residual, 2 * residual, 2, 2 ** (layer % cycle)) for layer in range(n_layers)
        )
        self.res_layers = nn.ModuleList(_Conv(residual, residual) for _ in range(n_layers - 1))
        self.skip_layers = nn.ModuleList(_Conv(residual, n_skip_channels) for _ in range(n_layers))
        self.embed = nn.Embedding(n_in_channels, residual)
        self.conv_out = _Conv(n_skip_channels, n_out_channels, bias=False)
        self.conv_end = _Conv(n_out_channels, n_out_channels, bias=False)

    def _conditioning(self, features: Tensor | None, batch: int, steps: int) -> Tensor | None:
        """[B, layers, 2 residual, T], added before each gate."""
        if (features is None) != (self.n_cond_channels == 0):
            form = f"[B, {self.n_cond_channels}, frames]"
            wanted = form if self.n_cond_channels else "None: the model has no conditioning"
            raise ValueError(f"features: {'None' if features is None else 'given'}; expected {wanted}")
        if features is None:
            return None
        if features.ndim != 3 or features.shape[:2] != (batch, self.n_cond_channels):
            expected = f"[{batch}, {self.n_cond_channels}, frames]"
            raise ValueError(f"features: shape {tuple(features.shape)}; expected {expected}")
        cond = self.upsample(features)
        if cond.shape[2] < steps:
            raise ValueError(
                f"features: {features.shape[2]} frames, {cond.shape[2]} steps; expected at least {steps}"
            )
        return self.cond_layers(cond[:, :, :steps]).unflatten(1, (self.n_layers, -1))

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits [B, n_out_channels, T] of every step from those before it."""
        indices("x", x, "[B, T]")
        cond = self._conditioning(features, *x.shape)
        y = self.embed(x).transpose(1, 2)
        skip = None
        for layer, (dilated, to_skip) in enumerate(zip(self.dilate_layers, self.skip_layers, strict=True)):
            gates = dilated(y)
            if cond is not None:
                gates = gates + cond[:, layer]
            a, b = gates.chunk(2, dim=1)
            gated = torch.tanh(a) * torch.sigmoid(b)
            if layer < self.n_layers - 1:
                y = self.res_layers[layer](gated) + y
            skip = to_skip(gated) if skip is None else to_skip(gated) + skip
        assert skip is not None
        logits = self.conv_end(F.relu(self.conv_out(F.relu(skip))))
        return F.pad(logits[:, :, :-1], (1, 0))
