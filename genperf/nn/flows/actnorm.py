"""Activation normalization: a scale and a shift of each channel, set by the first batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ActNorm(nn.Module):
    """``z = exp(log_scale) * (x + shift)`` for each channel (D. Kingma, P. Dhariwal, arXiv:1807.03039,
    section 3.1).

    The first batch in training sets both so that its outputs have mean 0 and variance 1 in each channel.
    Whether that has happened is in the ``state_dict``; the host reads it from the device only while it has
    not. Where torch.distributed runs, all processes initialise by all their batches, and so start alike.

    Args:
        channels: C.
        eps: added to the standard deviation.
        sync: whether processes initialise together; None: where there are several.

    Raises:
        RuntimeError: in evaluation, or while a CUDA graph is captured, before the parameters are initialised.
        ValueError: for a first batch that is empty or not finite, or an x without C channels in dimension 1.
    """

    initialized: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-6, sync: bool | None = None) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels is {channels!r}, expected an integer of at least 1")
        self.channels, self.eps, self.sync = channels, eps, sync
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))
        self._is_initialized = False  # what the host knows without asking the device

    def _known(self) -> bool:
        if self._is_initialized:
            return True
        if not (self.initialized.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._is_initialized = bool(self.initialized)
        return self._is_initialized

    def _uninitialized(self) -> RuntimeError:
        return RuntimeError(
            f"ActNorm({self.channels}) is not initialised, expected a batch in training mode or a state_dict "
            "before evaluation, sampling, or the capture of a CUDA graph"
        )

    def require(self) -> None:
        """RuntimeError where the parameters are not initialised, as for an inverse pass, whose input is no
        data."""
        if not self._known():
            raise self._uninitialized()

    def initialize(self, x: Tensor) -> None:
        """Make sure that the parameters are initialised, from ``x`` [B, C, *] if need be.

        Raises:
            RuntimeError, ValueError: see the class.
        """
        if self._known():
            return
        if not self.training or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            raise self._uninitialized()
        with torch.no_grad():
            mean, variance = self._moments(x)
            if not bool((mean + variance).isfinite().all()):
                raise ValueError(
                    f"ActNorm: x of shape {tuple(x.shape)}, the first batch, is empty or not finite, "
                    "expected data to initialise by"
                )
            self.shift.copy_(-mean)
            self.log_scale.copy_(-(variance.sqrt() + self.eps).log())
            self.initialized.fill_(1)
        self._is_initialized = True

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel in float64."""
        values = x.detach().double().transpose(0, 1).flatten(1)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (several if self.sync is None else self.sync and several):
            mean = values.mean(1)
            return mean, (values - mean[:, None]).square().mean(1)
        sums = torch.cat([values.new_tensor([values.shape[1]]), values.sum(1)])
        dist.all_reduce(sums)
        mean = sums[1:] / sums[0]
        squares = (values - mean[:, None]).square().sum(1)
        dist.all_reduce(squares)
        return mean, squares / sums[0]

    def check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"ActNorm: x has shape {tuple(x.shape)}, expected {self.channels} channels in dimension 1"
            )

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """x [B, C, *] to z and the log-determinant [B]."""
        self.check(x)
        self.initialize(x)
        shape = (-1, *[1] * (x.dim() - 2))
        return (x + self.shift.view(shape)) * self.log_scale.exp().view(shape), self._logdet(x)

    def inverse(self, z: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """z [B, C, *] back to x, and the log-determinant [B] of this direction."""
        self.check(z)
        self.require()
        shape = (-1, *[1] * (z.dim() - 2))
        return z * (-self.log_scale).exp().view(shape) - self.shift.view(shape), -self._logdet(z)

    def _logdet(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * x.shape[2:].numel()).expand(x.shape[0])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._is_initialized = False  # the next call looks
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return str(self.channels)
