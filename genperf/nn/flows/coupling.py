"""Affine coupling as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genperf.nn.flows._reversible import Reversed
from genperf.ops.affine_coupling import affine_coupling, affine_coupling_reverse

if TYPE_CHECKING:
    from genperf.nn.flows._recompute import Recompute


class AffineCoupling(nn.Module):
    """Scales and shifts half of the channels by what a network makes of the others.

    ``z2 = (x2 + t) * s`` with ``(log_s, t) = net(x1)`` and s = sigmoid(log_s + 2), as Glow has it (L. Dinh et
    al., arXiv:1605.08803; arXiv:1807.03039, section 3.3), by :func:`genperf.ops.affine_coupling`, whose
    options give the forms of other models. In float32 at least, whatever autocast makes of the network.

    Args:
        channels: C, at least 2.
        net: a module that takes x1 [B, C - C_t, *] (and conditions) and returns [B, 2 C_t, *], or [B, C_t,
            *] for scale="additive"; or that and the op's ``h_scale``, factors for its channels.
        transformed: which part is: "second", C_t = C - C // 2 channels, or "first", C_t = C // 2.
        options: further ones of the op: ``scale``, ``layout``, ``shift_first``, ``form``, ``clamp``,
            ``offset``, ``eps``, ``slope``, ``prefactor``, ``volume_preserving``.

    Raises:
        ValueError: for a C below 2, an unknown option, or an x without C channels in dimension 1.
    """

    def __init__(self, channels: int, net: nn.Module, *, transformed: str = "second", **options: Any) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 2:
            raise ValueError(f"channels is {channels!r}, expected an integer of at least 2")
        if transformed not in ("first", "second"):
            raise ValueError(f"transformed is {transformed!r}, expected 'first' or 'second'")
        self.channels, self.net, self.transformed = channels, net, transformed
        given = {"scale": "sigmoid", "shift_first": False, **options}
        self.options = {**given, "transformed": transformed, "split": channels // 2}

    @property
    def recomputed(self) -> nn.Module:
        return self.net

    def _untouched(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"AffineCoupling: x has shape {tuple(x.shape)}, expected {self.channels} channels in "
                "dimension 1"
            )
        half = self.channels // 2
        return x[:, :half] if self.transformed == "second" else x[:, half:]

    def forward(self, x: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        """x [B, C, *] to z and the log-determinant [B]."""
        return self.run(x, conditions)

    def run(
        self, x: Tensor, conditions: dict[str, Any], *, inverse: bool = False, owned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Either direction; ``owned`` where x may be overwritten if nothing is recorded."""
        h, h_scale = _pair(self.net(self._untouched(x), **conditions), x)
        inplace = owned and not torch.is_grad_enabled()
        return affine_coupling(x, h, h_scale=h_scale, inverse=inverse, inplace=inplace, **self.options)

    def inverse(self, z: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        """z [B, C, *] back to x, and the log-determinant [B] of this direction."""
        return self.run(z, conditions, inverse=True)

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, recompute: Recompute, *, wants_x: bool = True,
        **conditions: Any,
    ) -> Reversed:  # fmt: skip
        """The backward pass of :meth:`forward` from its output, with one evaluation of the network."""
        x1 = self._untouched(z)
        recorded = recompute(self.net, x1.detach().requires_grad_(), **conditions)
        h, h_scale = _pair(recorded.output, z)
        x, grad_x, grad_h, grad_h_scale = affine_coupling_reverse(
            z, h, grad_z, grad_logdet, h_scale=h_scale, **self.options
        )
        pairs = [(h, grad_h)] if h_scale is None else [(h, grad_h), (h_scale, grad_h_scale)]
        (grad_x1, *_), by_condition, by_parameter = recorded.gradients(pairs)
        if grad_x1 is not None:
            self._untouched(grad_x).add_(grad_x1)
        return Reversed(x, grad_x, by_parameter, by_condition)


def _pair(output: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the network returned, for the op: float64 goes with float64 alone, factors are not in half
    precision."""
    h, h_scale = output if isinstance(output, tuple) else (output, None)
    if x.dtype == torch.float64 or h.dtype == torch.float64:
        h = h.to(x.dtype)
    return h, None if h_scale is None else h_scale.to(x.dtype)
