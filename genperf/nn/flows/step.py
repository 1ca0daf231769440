"""One step of Glow: activation normalization, invertible 1x1 convolution, affine coupling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from genperf.nn.flows._reversible import Reversed
from genperf.nn.flows.actnorm import ActNorm
from genperf.nn.flows.conv1x1 import InvertibleConv1x1
from genperf.nn.flows.coupling import AffineCoupling
from genperf.nn.flows.nets import CouplingNet
from genperf.ops.invertible_conv1x1 import PLU, invertible_conv1x1, invertible_conv1x1_reverse

if TYPE_CHECKING:
    from genperf.nn.flows._recompute import Recompute

ORDERS = ("actnorm-conv-coupling", "coupling-actnorm-conv")


class GlowStep(nn.Module):
    """A step of flow of Glow (D. Kingma, P. Dhariwal, arXiv:1807.03039, figure 2a), with the backward pass
    from its output that :class:`ReversibleSequence` needs.

    Activation normalization and 1x1 convolution are one pass over the tensor, coupling is another.

    Args:
        channels: C.
        net: of :class:`AffineCoupling`; a :class:`CouplingNet` if None, for images.
        hidden: channels of that one.
        permutation: of :class:`InvertibleConv1x1`: "dense" or "plu".
        order: "actnorm-conv-coupling", or "coupling-actnorm-conv".
        coupling: further options of :class:`AffineCoupling`, such as ``scale="additive"``.

    Raises:
        ValueError: for arguments that do not fit, here and in the call.
        RuntimeError: in evaluation before the activation normalization is initialised.
    """

    def __init__(
        self, channels: int, net: nn.Module | None = None, *, hidden: int = 512, permutation: str = "dense",
        order: str = ORDERS[0], **coupling: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}, expected one of {', '.join(ORDERS)}")
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 2:
            raise ValueError(f"channels is {channels!r}, expected an integer of at least 2")
        self.order = order
        if net is None:
            taken = channels // 2 if coupling.get("transformed") == "first" else channels - channels // 2
            given = taken if coupling.get("scale") == "additive" else 2 * taken
            net = CouplingNet(channels - taken, given, hidden)
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels, permutation)
        self.coupling = AffineCoupling(channels, net, **coupling)

    @property
    def recomputed(self) -> nn.Module:
        return self.coupling.net

    def forward(self, x: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        """x [B, C, *] to z and the log-determinant [B]."""
        if self.order == ORDERS[0]:
            x, linear = self._linear(x)
            z, logdet = self.coupling.run(x, conditions, owned=True)
        else:
            x, logdet = self.coupling(x, **conditions)
            z, linear = self._linear(x)
        return z, logdet + linear

    def inverse(self, z: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        """z [B, C, *] back to x, and the log-determinant [B] of this direction."""
        if self.order == ORDERS[0]:
            z, logdet = self.coupling.inverse(z, **conditions)
            x, linear = self._linear_inverse(z)
        else:
            z, linear = self._linear_inverse(z)
            x, logdet = self.coupling.run(z, conditions, inverse=True, owned=True)
        return x, logdet + linear

    def _linear(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norm, conv = self.actnorm, self.conv
        norm.check(x)
        norm.initialize(x)
        return invertible_conv1x1(
            x, conv.matrix, shift=norm.shift, log_scale=norm.log_scale, slogdet=conv.slogdet()
        )

    def _linear_inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        norm, conv = self.actnorm, self.conv
        norm.check(z)
        norm.require()
        return invertible_conv1x1(
            z, conv.matrix, shift=norm.shift, log_scale=norm.log_scale, slogdet=conv.slogdet_of_inverse(),
            inverse=True,
        )  # fmt: skip

    def backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, recompute: Recompute, *, wants_x: bool = True,
        **conditions: Any,
    ) -> Reversed:  # fmt: skip
        """The backward pass of :meth:`forward` from its output, with one evaluation of the network."""
        if self.order == ORDERS[0]:
            after = self.coupling.backward_from_output(z, grad_z, grad_logdet, recompute, **conditions)
            assert after.grad_x is not None
            x, grad_x, parameters = self._linear_from_output(after.x, after.grad_x, grad_logdet)
            return Reversed(x, grad_x, {**after.parameters, **parameters}, after.conditions)
        x, grad_x, parameters = self._linear_from_output(z, grad_z, grad_logdet)
        before = self.coupling.backward_from_output(x, grad_x, grad_logdet, recompute, **conditions)
        return before._replace(parameters={**before.parameters, **parameters})

    def _linear_from_output(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor
    ) -> tuple[Tensor, Tensor, dict[nn.Parameter, Tensor]]:
        norm, conv = self.actnorm, self.conv
        found = invertible_conv1x1_reverse(
            z, grad_z, conv.matrix, shift=norm.shift, log_scale=norm.log_scale, slogdet=conv.slogdet(),
            grad_logdet=grad_logdet,
        )  # fmt: skip
        grads = {norm.shift: found.grad_shift, norm.log_scale: found.grad_scale}
        if isinstance(conv.matrix, PLU):
            of = found.grad_weight
            grads.update({conv.l: of.l, conv.u: of.u, conv.log_s: of.log_s})
        else:
            grads[conv.weight] = found.grad_weight
        return found.x, found.grad_x, {p: g for p, g in grads.items() if g is not None}
