"""The posterior of a variational autoencoder: a Gaussian with a diagonal covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genperf.nn._eager_sample import Bounds, Generator, draw_noise, eager_sample
from genperf.ops.gaussian_sample import gaussian_sample

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class DiagonalGaussian:
    """Gaussian with diagonal covariance, given by the channels of one tensor.

    Call-compatible with ``DiagonalGaussianDistribution`` of diffusers
    (``models/autoencoders/vae.py``) and of latent-diffusion, whose definitions it follows. It differs
    in three ways: ``logvar``, ``std`` and ``var`` are computed when they are read, so that ``mode()``
    pays nothing; ``kl`` and ``nll`` are computed in float32 for float16 and bfloat16 parameters (and
    returned so), and are finite where half precision overflows; ``kl`` saturates at the largest
    finite float32.

    Args:
        parameters: [B, 2 C, *] float32, float16, bfloat16 or float64: mean [B, C, *] and log-variance
            [B, C, *], stacked along dim 1. Used in place: neither half is copied.
        deterministic: the distribution is the point ``mean``: std and var are 0, and so are kl and nll.
        rng: "torch" draws the very noise that eager torch would draw, and on the CPU gives its sample
            bit for bit; "philox" draws the library's own noise, in the kernel.
        clamp: bounds (low, high) on the log-variance; None for none.

    Raises:
        TypeError: ``parameters`` is not a tensor, or not of a floating dtype above.
        ValueError: fewer than two dims, an odd dim 1, an unknown ``rng``, a clamp with low > high.
    """

    def __init__(
        self,
        parameters: Tensor,
        deterministic: bool = False,
        *,
        rng: str = "torch",
        clamp: Bounds | None = (-30.0, 20.0),
    ) -> None:
        if not isinstance(parameters, Tensor):
            raise TypeError(f"parameters: {type(parameters).__name__}; expected a tensor [B, 2 C, *]")
        if parameters.dtype not in _DTYPES:
            raise TypeError(f"parameters: {parameters.dtype}; expected float32, float16, bfloat16 or float64")
        if parameters.ndim < 2 or parameters.shape[1] % 2:
            raise ValueError(f"parameters: shape {tuple(parameters.shape)}; expected [B, 2 C, *]")
        if rng not in ("torch", "philox"):
            raise ValueError(f'rng: {rng!r}; expected "torch" or "philox"')
        if clamp is not None and not clamp[0] <= clamp[1]:
            raise ValueError(f"clamp: {clamp!r}; expected (low, high) with low <= high, or None")
        self.parameters = parameters
        self.mean, self._scale = parameters.chunk(2, dim=1)
        self.deterministic = deterministic
        self.rng = rng
        self.clamp = clamp
        self._kl: Tensor | None = None
        self._noise_device: torch.device | None = None

    @property
    def logvar(self) -> Tensor:
        """Log-variance [B, C, *], clamped."""
        return self._scale if self.clamp is None else torch.clamp(self._scale, *self.clamp)

    @property
    def std(self) -> Tensor:
        """Standard deviation [B, C, *]."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variance [B, C, *]."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The mean [B, C, *] itself."""
        return self.mean

    def sample(self, generator: Generator = None) -> Tensor:
        """One sample [B, C, *] of the parameters' dtype, differentiable in the parameters.

        While gradients are being recorded the same launch computes the divergence that ``kl()``
        returns afterwards, and backward is one launch for both.

        Args:
            generator: a generator, or a list with one for each sample; CPU generators are accepted
                for parameters on any device. None: the default generator.

        Raises:
            ValueError: a list of generators of another length than the batch.
        """
        if self.deterministic:
            if self.rng == "torch":
                draw_noise(self.mean, generator, self._noise_device)
            return self.mean.clone()
        want_kl = self._kl is None and torch.is_grad_enabled() and self.parameters.requires_grad
        noise = None
        z: Tensor | None
        if self.rng == "torch":
            noise = draw_noise(self.mean, generator, self._noise_device)
            generator = None
        if noise is not None and noise.device.type == "cpu":
            z, kl = eager_sample(self.parameters, None, noise, clamp=self.clamp, kl=want_kl)
        else:
            z, kl, _ = gaussian_sample(
                self.parameters, clamp=self.clamp, kl=want_kl, noise=noise, generator=generator
            )
        if want_kl:
            self._kl = kl
        assert z is not None
        return z

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """Divergence to ``other``, or to the standard normal: the sum over dims 1, 2 and 3.

        Returns:
            Tensor: [B] for parameters of up to four dims. For [B, 2 C, T, H, W] it is [B, W], since the
            definition followed sums three dims whatever the rank. Float32, or float64 for float64.
        """
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        if other is None and self.mean.ndim <= 4:
            return self._divergence(None, "sample") if self._kl is None else self._kl
        if self.mean.ndim <= 4:
            return self._divergence(other, "sample")
        return self._divergence(other, "none").sum(dim=(1, 2, 3))

    def _divergence(self, other: DiagonalGaussian | None, reduction: str) -> Tensor:
        if other is None:
            kl = gaussian_sample(self.parameters, clamp=self.clamp, sample=False, reduction=reduction).kl
        else:
            scale, prior, clamp = self._scale, (other.mean, other.logvar), None
            if isinstance(other, DiagonalGaussian) and other.clamp == self.clamp:
                prior, clamp = (other.mean, other._scale), self.clamp
            else:
                scale = self.logvar
            kl = gaussian_sample(
                self.mean, scale, clamp=clamp, prior=prior, sample=False, reduction=reduction
            ).kl
        return kl  # type: ignore[return-value]

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of ``sample`` [B, C, *], summed over ``dims``.

        Float32 for half precision, where ``exp(-logvar)`` would overflow; a deterministic posterior
        gives [0].
        """
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        logvar = self.logvar.to(wide)
        delta = (sample.to(wide) - self.mean.to(wide)) * torch.exp(-0.5 * logvar)
        return 0.5 * torch.sum(math.log(2 * math.pi) + logvar + delta.square(), dim=tuple(dims))

    def log_prob(self, sample: Tensor) -> Tensor:
        """Log-density [B] of ``sample`` [B, C, *]: the sum over all dims but the first."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        return -self.nll(sample, dims=range(1, self.mean.ndim))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({tuple(self.mean.shape)}, {self.mean.dtype}, "
            f"deterministic={self.deterministic}, rng={self.rng!r})"
        )
