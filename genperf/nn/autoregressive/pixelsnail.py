"""PixelSNAIL: gated causal convolutions with attention over all pixels before."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genperf.nn.autoregressive._check import dropout_rate, indices, odd, positive
from genperf.nn.autoregressive.weight_norm import WeightNormConv2d, WeightNormLinear

_HEADS = 8


class _MaskedWeightNormConv2d(WeightNormConv2d):
    """Sees the rows above and the columns before; the masked taps count for nothing in the norm either."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(self.weight_v[0, 0])
        mask[-1, self.kernel_size[1] // 2 :] = 0
        return self._conv_forward(x, torch._weight_norm(self.weight_v * mask, self.weight_g, 0), self.bias)


class _WNConv2d(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        *,
        padding: int = 0,
        bias: bool = True,
        masked: bool = False,
    ) -> None:
        super().__init__()
        layer = _MaskedWeightNormConv2d if masked else WeightNormConv2d
        self.conv = layer(in_channels, out_channels, kernel_size, padding=padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _CausalConv2d(nn.Module):
    """Convolution that ends at the current row; "downright" ends at the current column as well.

    "down" is centred on the column; "causal" too, without the current pixel and what follows it in its row.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], padding: str
    ) -> None:
        super().__init__()
        rows, columns = kernel_size
        side = columns // 2
        self.pad = (columns - 1, 0, rows - 1, 0) if padding == "downright" else (side, side, rows - 1, 0)
        self.conv = _WNConv2d(in_channels, out_channels, kernel_size, masked=padding == "causal")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class _GatedResBlock(nn.Module):
    """x + GLU of two convolutions, with an auxiliary input after the first, a condition after the second."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        dropout: float,
        causal: bool = False,
        auxiliary: int = 0,
        condition: int = 0,
    ) -> None:
        super().__init__()

        def conv(width_in: int, width_out: int) -> nn.Module:
            if causal:
                return _CausalConv2d(width_in, width_out, (kernel_size, kernel_size), "causal")
            return _WNConv2d(width_in, width_out, kernel_size, padding=kernel_size // 2)

        self.conv1 = conv(in_channels, channels)
        if auxiliary:
            self.aux_conv = _WNConv2d(auxiliary, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(channels, 2 * in_channels)
        if condition:
            self.condition = _WNConv2d(condition, 2 * in_channels, bias=False)

    def forward(self, x: Tensor, auxiliary: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        y = self.conv1(F.elu(x))
        if auxiliary is not None:
            y = y + self.aux_conv(F.elu(auxiliary))
        y = self.conv2(self.dropout(F.elu(y)))
        if condition is not None:
            y = y + self.condition(condition)
        return F.glu(y, dim=1) + x


class _CausalAttention(nn.Module):
    """Each pixel attends to those strictly before it in raster order; the first one gets 0."""

    def __init__(self, query_channels: int, key_channels: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.query = WeightNormLinear(query_channels, channels)
        self.key = WeightNormLinear(key_channels, channels)
        self.value = WeightNormLinear(key_channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """query and key [B, C, H, W] -> [B, channels, H, W]."""

        def heads(linear: nn.Module, x: Tensor) -> Tensor:  # [B, heads, H W, channels / heads]
            return linear(x.flatten(2).transpose(1, 2)).unflatten(2, (_HEADS, -1)).transpose(1, 2)

        q, k, v = heads(self.query, query), heads(self.key, key), heads(self.value, key)
        score = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        before = torch.ones(score.shape[2:], dtype=torch.bool, device=score.device).tril(-1)
        # A finite fill keeps the softmax of the first pixel, which has none before it, from being NaN.
        weight = torch.softmax(score.masked_fill(~before, -1e4), dim=3)
        weight = self.dropout(weight * before.any(dim=1, keepdim=True))
        return (weight @ v).transpose(2, 3).reshape(query.shape[0], -1, *query.shape[2:])


class _PixelBlock(nn.Module):
    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        n_res_block: int,
        attention: bool,
        dropout: float,
        condition: int,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.resblocks = nn.ModuleList(
            _GatedResBlock(in_channels, channels, kernel_size, dropout, causal=True, condition=condition)
            for _ in range(n_res_block)
        )
        n = in_channels
        if attention:
            self.key_resblock = _GatedResBlock(2 * n + 2, n, 1, dropout)
            self.query_resblock = _GatedResBlock(n + 2, n, 1, dropout)
            self.causal_attention = _CausalAttention(n + 2, 2 * n + 2, n // 2, dropout)
            self.out_resblock = _GatedResBlock(n, n, 1, dropout, auxiliary=n // 2)
        else:
            self.out = _WNConv2d(n + 2, n)

    def forward(self, x: Tensor, background: Tensor, condition: Tensor | None) -> Tensor:
        y = x
        for block in self.resblocks:
            y = block(y, condition=condition)
        if not self.attention:
            return self.out(torch.cat([y, background], dim=1))
        key = self.key_resblock(torch.cat([x, y, background], dim=1))
        query = self.query_resblock(torch.cat([y, background], dim=1))
        return self.out_resblock(y, self.causal_attention(query, key))


class _CondResNet(nn.Module):
    def __init__(self, in_channels: int, channels: int, kernel_size: int, n_res_block: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_WNConv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)]
        blocks += [_GatedResBlock(channels, channels, kernel_size, 0.1) for _ in range(n_res_block)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class PixelSNAIL(nn.Module):
    """PixelSNAIL over a map of indices (Chen et al. 2017, arXiv:1712.09763).

    Key names, arguments and mathematics of rosinality/vq-vae-2-pytorch, the usual prior over VQ-VAE-2
    codes, whose checkpoints load: horizontal, vertical, blocks.{b}.{resblocks, key_resblock,
    query_resblock, causal_attention, out_resblock, out}, cond_resnet, out, background. The defaults are
    its top prior; :meth:`bottom` has the other. Here forward returns the logits alone, and the masked
    taps are never written.

    Args:
        shape: (H, W) of the map.
        n_class: values that a pixel can take.
        channel: channels between the blocks. A multiple of 16 with attention.
        kernel_size: odd size of the causal kernels.
        n_block: blocks.
        n_res_block: gated residual blocks in each.
        res_channel: channels inside a residual block.
        attention: whether each block attends to all pixels before.
        dropout: dropout rate, in training only.
        n_cond_res_block: residual blocks over the conditioning map; 0 for a model without condition.
        cond_res_channel: channels of the conditioning map's network.
        cond_res_kernel: odd kernel size of that network.
        n_out_res_block: 1x1 residual blocks before the head.

    Shapes:
        x [B, h, W] integers below n_class, of h <= H rows; condition [B, H / 2, W / 2] integers below
        n_class -> logits [B, n_class, h, W].

    Raises:
        TypeError, ValueError: an argument or input of another type or shape than stated.
    """

    background: Tensor

    def __init__(
        self,
        shape: Sequence[int] = (32, 32),
        n_class: int = 512,
        channel: int = 256,
        kernel_size: int = 5,
        n_block: int = 4,
        n_res_block: int = 4,
        res_channel: int = 256,
        attention: bool = True,
        dropout: float = 0.1,
        n_cond_res_block: int = 0,
        cond_res_channel: int = 0,
        cond_res_kernel: int = 3,
        n_out_res_block: int = 0,
    ) -> None:
        if len(shape) != 2:
            raise ValueError(f"shape: {tuple(shape)}; expected (H, W)")
        height, width = shape
        positive(height=height, width=width, n_class=n_class, channel=channel, n_block=n_block)
        positive(n_res_block=n_res_block, res_channel=res_channel)
        odd(kernel_size=kernel_size, cond_res_kernel=cond_res_kernel)
        dropout_rate(dropout)
        if attention and channel % (2 * _HEADS):
            raise ValueError(f"channel: {channel}; expected a multiple of {2 * _HEADS} with attention")
        if kernel_size < 3:
            raise ValueError(f"kernel_size: {kernel_size}; expected 3 or more")
        if n_out_res_block < 0 or n_cond_res_block < 0 or (n_cond_res_block > 0) != (cond_res_channel > 0):
            given = f"n_cond_res_block: {n_cond_res_block}, cond_res_channel: {cond_res_channel}"
            raise ValueError(
                f"{given}, n_out_res_block: {n_out_res_block}; expected none negative, and "
                "the first two either both 0 or both positive"
            )
        super().__init__()
        self.classes = n_class
        self.conditional = n_cond_res_block > 0
        half = kernel_size // 2
        self.horizontal = _CausalConv2d(n_class, channel, (half, kernel_size), "down")
        self.vertical = _CausalConv2d(n_class, channel, (half + 1, half), "downright")
        rows = (torch.arange(height) - height / 2) / height
        columns = (torch.arange(width) - width / 2) / width
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        self.register_buffer("background", grid[None])
        self.blocks = nn.ModuleList(
            _PixelBlock(channel, res_channel, kernel_size, n_res_block, attention, dropout, cond_res_channel)
            for _ in range(n_block)
        )
        if self.conditional:
            self.cond_resnet = _CondResNet(n_class, cond_res_channel, cond_res_kernel, n_cond_res_block)
        out: list[nn.Module] = [_GatedResBlock(channel, res_channel, 1, 0.1) for _ in range(n_out_res_block)]
        self.out = nn.Sequential(*out, nn.ELU(), _WNConv2d(channel, n_class))

    @classmethod
    def bottom(cls, shape: Sequence[int] = (64, 64), n_class: int = 512) -> PixelSNAIL:
        """The VQ-VAE-2 bottom prior, given the top codes: no attention, three conditioning blocks."""
        return cls(shape, n_class, attention=False, n_cond_res_block=3, cond_res_channel=256)

    def _one_hot(self, x: Tensor) -> Tensor:
        return F.one_hot(x.long(), self.classes).permute(0, 3, 1, 2).type_as(self.background)

    def _upsampled_condition(self, condition: Tensor | None, batch: int) -> Tensor | None:
        if (condition is None) == self.conditional:
            wanted = "a map [B, H / 2, W / 2]" if self.conditional else "None: the model has no condition"
            raise ValueError(f"condition: {'None' if condition is None else 'given'}; expected {wanted}")
        if condition is None:
            return None
        indices("condition", condition, "[B, H / 2, W / 2]")
        wanted_shape = (batch, *(size // 2 for size in self.background.shape[2:]))
        if condition.shape != wanted_shape:
            raise ValueError(f"condition: shape {tuple(condition.shape)}; expected {wanted_shape}")
        return F.interpolate(self.cond_resnet(self._one_hot(condition)), scale_factor=2)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits [B, n_class, h, W] of every pixel from those before it."""
        indices("x", x, "[B, H, W]")
        batch, rows, columns = x.shape
        height, width = self.background.shape[2:]
        if rows > height or columns != width:
            raise ValueError(f"x: shape {tuple(x.shape)}; expected [B, at most {height}, {width}]")
        cond = self._upsampled_condition(condition, batch)
        if cond is not None:
            cond = cond[:, :, :rows]
        one_hot = self._one_hot(x)
        above = F.pad(self.horizontal(one_hot), (0, 0, 1, 0))[:, :, :rows]
        left = F.pad(self.vertical(one_hot), (1, 0, 0, 0))[:, :, :, :columns]
        y = above + left
        background = self.background[:, :, :rows].expand(batch, -1, -1, -1)
        for block in self.blocks:
            y = block(y, background, cond)
        return self.out(y)
