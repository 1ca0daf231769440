"""Distributions of values at the output of a decoder: Bernoulli variables and Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from genperf.ops.bernoulli_nll import bernoulli_nll
from genperf.ops.bernoulli_sample import bernoulli_sample
from genperf.ops.gaussian_nll import gaussian_nll
from genperf.ops.gaussian_sample import gaussian_sample


class Bernoulli:
    """A Bernoulli variable for each value; used as ``torch.distributions.Bernoulli(logits=...)`` is.

    Args:
        logits: [B, *].
        rng: "torch" draws the noise that ``torch.bernoulli`` draws on the CPU, "philox" the library's own.
    """

    def __init__(self, logits: Tensor, *, rng: str = "torch") -> None:
        self.logits, self.rng = logits, rng

    @property
    def mean(self) -> Tensor:
        """The probability of 1, [B, *]."""
        return self.logits.sigmoid()

    @property
    def probs(self) -> Tensor:
        """The same."""
        return self.mean

    def log_prob(self, x: Tensor) -> Tensor:
        """Of values [B, *] from 0 to 1: nats, of that shape."""
        return -self.nll(x)

    def nll(self, x: Tensor, reduction: str = "none") -> Tensor:
        """The negative of it, summed as :func:`genperf.ops.bernoulli_nll` tells."""
        return bernoulli_nll(self.logits, x, reduction=reduction)

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """0 or 1 for each value, of the dtype of the logits."""
        return bernoulli_sample(self.logits, temperature=temperature, rng=self.rng, generator=generator)


class Gaussian:
    """A Gaussian for each value: the decoder's counterpart of :class:`DiagonalGaussian`.

    Args:
        params: [B, 2 C, *]: means, then log-variances; or with these channels last. With ``scale`` the means.
        scale: of a shape that broadcasts to the means', such as [] for one learned for all values.
        parametrization: "logvar" or "logsigma".
        clamp: (low, high) bounds on the scales.
        channel_dim: 1 or -1, where ``params`` are halved.
        rng: "torch" draws the noise of ``torch.randn``, "philox" the library's own, in the kernel.
    """

    def __init__(
        self,
        params: Tensor,
        scale: Tensor | None = None,
        *,
        parametrization: str = "logvar",
        clamp: tuple[float, float] | None = None,
        channel_dim: int = 1,
        rng: str = "torch",
    ) -> None:
        self.params, self.scale, self.rng = params, scale, rng
        self.parametrization, self.clamp, self.channel_dim = parametrization, clamp, channel_dim

    @property
    def mean(self) -> Tensor:
        """[B, C, *] or [B, *, C]."""
        return self.params if self.scale is not None else self.params.chunk(2, self.channel_dim)[0]

    def log_prob(self, x: Tensor) -> Tensor:
        """Of values [B, C, *] or [B, *, C]: nats, of that shape."""
        return -self.nll(x)

    def nll(self, x: Tensor, reduction: str = "none") -> Tensor:
        """The negative of it, summed as :func:`genperf.ops.gaussian_nll` tells."""
        return gaussian_nll(
            self.params, x, scale=self.scale, parametrization=self.parametrization, clamp=self.clamp,
            channel_dim=self.channel_dim, reduction=reduction,
        )  # fmt: skip

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Values of the shape that ``log_prob`` takes, differentiable in the parameters.

        See :func:`genperf.ops.gaussian_sample`; the temperature multiplies the standard deviation.
        """
        z = gaussian_sample(
            self.params, self.scale, dim=self.channel_dim, parametrization=self.parametrization,
            clamp=self.clamp, temperature=temperature, kl=False, rng=self.rng, generator=generator,
        ).z  # fmt: skip
        assert z is not None
        return z
