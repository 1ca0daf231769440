"""Distributions of pixel values at the output of a network: logistics, and mixtures of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genperf.ops.discretized_logistic_nll import discretized_logistic_nll
from genperf.ops.discretized_logistic_sample import discretized_logistic_sample
from genperf.ops.mixture_logistic_nll import mixture_logistic_nll
from genperf.ops.mixture_logistic_sample import mixture_logistic_sample


class MixtureLogistic:
    """Discretized mixture of logistics for each pixel of a grey or RGB image.

    It is used as ``DiscMixLogistic`` of NVAE is; its definitions are those of
    :func:`genperf.ops.mixture_logistic_nll`.

    Args:
        params: [B, 3 K, *] or [B, 10 K, *] (grey, RGB), or with these channels last.
        mixtures: K; by default what the channels give.
        image_channels: 1 or 3.
        levels: of the data: 256 for 8 bits.
        channel_dim: 1 or -1.
        convention: "default", "openai", "vdvae" or "nvae" (values in [0, 1]).
        min_log_scale: lower bound of the log-scales.
        rng: "torch" draws the noise that public code draws, "philox" the library's own, in the kernel.
    """

    def __init__(
        self,
        params: Tensor,
        mixtures: int | None = None,
        image_channels: int = 3,
        levels: int = 256,
        *,
        channel_dim: int = 1,
        convention: str = "default",
        min_log_scale: float = -7.0,
        rng: str = "torch",
    ) -> None:
        self.params, self.mixtures, self.image_channels, self.levels = (
            params,
            mixtures,
            image_channels,
            levels,
        )
        self.rng = rng
        self._form: dict[str, Any] = {
            "mixtures": mixtures, "channel_dim": channel_dim, "convention": convention,
            "min_log_scale": min_log_scale,
        }  # fmt: skip

    def log_prob(self, x: Tensor) -> Tensor:
        """Of values [B, C, *] or [B, *, C]: nats [B, *]."""
        return -self.nll(x)

    def nll(self, x: Tensor, reduction: str = "none") -> Tensor:
        """The negative of it, summed as :func:`genperf.ops.mixture_logistic_nll` tells."""
        return mixture_logistic_nll(self.params, x, levels=self.levels, reduction=reduction, **self._form)

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Values of the shape that ``log_prob`` takes, not rounded to a level."""
        return mixture_logistic_sample(
            self.params, image_channels=self.image_channels, temperature=temperature, rng=self.rng,
            generator=generator, **self._form,
        )  # fmt: skip


class DiscretizedLogistic:
    """A discretized logistic for each value of an image; used as ``DiscLogistic`` of NVAE is.

    Args:
        params: [B, 2 C, *]: means, then log-scales; or with these channels last.
        levels, channel_dim, convention, rng: as of :class:`MixtureLogistic`.
        min_log_scale: by default -7, and -8 for "nvae".
    """

    def __init__(
        self,
        params: Tensor,
        levels: int = 256,
        *,
        channel_dim: int = 1,
        convention: str = "default",
        min_log_scale: float | None = None,
        rng: str = "torch",
    ) -> None:
        self.params, self.levels, self.rng = params, levels, rng
        self._form: dict[str, Any] = {
            "channel_dim": channel_dim, "convention": convention, "min_log_scale": min_log_scale,
        }  # fmt: skip

    def log_prob(self, x: Tensor) -> Tensor:
        """Of values [B, C, *] or [B, *, C]: nats, of that shape."""
        return -self.nll(x)

    def nll(self, x: Tensor, reduction: str = "none") -> Tensor:
        """The negative of it, summed as :func:`genperf.ops.discretized_logistic_nll` tells."""
        return discretized_logistic_nll(self.params, x, levels=self.levels, reduction=reduction, **self._form)

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Values of the shape that ``log_prob`` takes, not rounded to a level."""
        return discretized_logistic_sample(
            self.params, temperature=temperature, rng=self.rng, generator=generator, **self._form
        )
