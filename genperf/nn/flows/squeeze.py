"""What a multi-scale flow does between its levels: squeeze, and split off half of the channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf.nn.flows.nets import ZeroConv2d
from genperf.ops.affine_coupling import affine_coupling


class Squeeze(nn.Module):
    """[B, C, H, W] to [B, 4 C, H / 2, W / 2], with channel ``4 c + 2 (row % 2) + column % 2``.

    The order of openai/glow and of nearly all others. Volume-preserving.

    Raises:
        ValueError: for an x that is not [B, C, H, W], or with odd H or W.
    """

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """x to z and a log-determinant of 0, [B]."""
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"Squeeze: x has shape {tuple(x.shape)}, expected [B, C, H, W] with even H and W"
            )
        return F.pixel_unshuffle(x, 2), _zeros(x)

    def inverse(self, z: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """z back to x, and a log-determinant of 0, [B]."""
        if z.dim() != 4 or z.shape[1] % 4:
            raise ValueError(f"Squeeze: z has shape {tuple(z.shape)}, expected [B, 4 C, H, W]")
        return F.pixel_shuffle(z, 2), _zeros(z)


class Unsqueeze(nn.Module):
    """The inverse of :class:`Squeeze`: [B, 4 C, H, W] to [B, C, 2 H, 2 W].

    Raises:
        ValueError: as that one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._squeeze = Squeeze()

    def forward(self, x: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        """x to z and a log-determinant of 0, [B]."""
        return self._squeeze.inverse(x)

    def inverse(self, z: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        """z back to x, and a log-determinant of 0, [B]."""
        return self._squeeze(z)


class Split(nn.Module):
    """Half of the channels goes on, half leaves as noise under a Gaussian learned from the first.

    ``noise = (x2 - mean) / std`` with ``(mean, log_std) = prior(x1)``: standard normal where the prior fits
    (D. Kingma, P. Dhariwal, arXiv:1807.03039; L. Dinh et al., arXiv:1605.08803, section 3.6).

    Args:
        channels: C, even.
        prior: a module that takes x1 [B, C / 2, *] and returns [B, C, *]; a :class:`ZeroConv2d` if None.

    Raises:
        ValueError: for an odd C, or an x without C channels in dimension 1.
    """

    def __init__(self, channels: int, prior: nn.Module | None = None) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 2 or channels % 2:
            raise ValueError(f"channels is {channels!r}, expected an even integer of at least 2")
        self.channels = channels
        self.prior = ZeroConv2d(channels // 2, channels) if prior is None else prior

    def forward(self, x: Tensor, **_: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """x [B, C, *] to (x1, noise), [B, C / 2, *] each, and the log-determinant [B]."""
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"Split: x has shape {tuple(x.shape)}, expected {self.channels} channels in dimension 1"
            )
        z, logdet = self._apply_prior(x, inverse=True)
        first, noise = z.chunk(2, dim=1)
        return (first, noise), logdet

    def inverse(self, first: Tensor, noise: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """x1 and the noise back to x [B, C, *], and the log-determinant [B] of this direction."""
        if first.shape != noise.shape or first.shape[1] != self.channels // 2:
            raise ValueError(
                f"Split: parts have shapes {tuple(first.shape)} and {tuple(noise.shape)}, expected "
                f"{self.channels // 2} channels in dimension 1 of both"
            )
        return self._apply_prior(torch.cat((first, noise), dim=1), inverse=False)

    def _apply_prior(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        moments = self.prior(x[:, : self.channels // 2])
        moments = moments.to(x.dtype) if x.dtype == torch.float64 else moments
        return affine_coupling(x, moments, scale="exp", form="scale_shift", inverse=inverse)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
