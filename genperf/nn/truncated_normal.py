"""Normal numbers between bounds: the noise of BigGAN and the first values of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genperf.ops.truncated_normal import truncated_normal


class TruncatedNormal:
    """``scale`` times N(mean, std^2) on the condition that it lies between ``low`` and ``high``.

    ``TruncatedNormal(scale=t).sample((n, z))`` is the noise of BigGAN for truncation t; the numbers are those
    of :func:`genperf.ops.truncated_normal`.
    """

    def __init__(
        self,
        low: float = -2.0,
        high: float = 2.0,
        mean: float = 0.0,
        std: float = 1.0,
        scale: float = 1.0,
        *,
        rng: str = "philox",
    ) -> None:
        self.low, self.high, self.mean, self.std, self.scale, self.rng = low, high, mean, std, scale, rng

    def sample(
        self,
        size: int | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Numbers of that shape."""
        return truncated_normal(
            size, low=self.low, high=self.high, mean=self.mean, std=self.std, scale=self.scale,
            dtype=dtype, device=device, rng=self.rng, generator=generator,
        )  # fmt: skip


@torch.no_grad()
def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a tensor as ``torch.nn.init.trunc_normal_`` does, without its loop that waits for the device.

    The law is the same, the numbers are not. Returns the tensor.
    """
    drawn = truncated_normal(
        tuple(tensor.shape), low=a, high=b, mean=mean, std=std, dtype=tensor.dtype, device=tensor.device,
        generator=generator,
    )  # fmt: skip
    return tensor.copy_(drawn)
