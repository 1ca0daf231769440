"""FrEIA: AllInOneBlock (coupling, actnorm and mixing of channels), and the fixed 1x1 convolution.

``forward(x, c, rev, jac)`` takes and returns a sequence of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._flow import ROWS, Affine, Matrix, coupled, for_network, taken, transformed
from genperf.accelerate._flow_probe import Candidate, any_layout, decided
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.ops.slogdet_inverse import SlogdetInverse

_BOTH = {"forward": lambda m, x: m([x]), "reverse": lambda m, x: m([x], rev=True)}
_COUPLING: dict[str, Any] = {
    "scale": "tanh",
    "slope": 1.0,
    "prefactor": 0.1,
    "form": "scale_shift",
    "layout": "halves",
    "shift_first": False,
}


def find(module: nn.Module, cls: Any, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a module of the library, or what is written like one."""
    parameters = module._parameters
    if {"global_scale", "global_offset"} <= set(parameters) and "subnet" in module._modules:
        if parameters["global_scale"].dim() == 2:  # type: ignore[union-attr]
            yield Refusal(f"{cls.__name__}.forward", ROWS)
        else:
            yield from decided(module, cls, [_block(module, cls)], options)
    elif {"M", "M_inv", "logDetM"} <= set(parameters) and parameters["M"].dim() == 4:  # type: ignore[union-attr]
        yield from decided(module, cls, [_convolution(module, cls)], options)


def _orthogonal(self: Any, reverse: bool) -> Matrix:
    """The mixing of channels; its inverse is its transpose, and its determinant 1 or -1."""
    if self.householder:
        self.w_perm = self._construct_householder_permutation()
        if reverse or self.reverse_pre_permute:
            self.w_perm_inv = self.w_perm.transpose(0, 1).contiguous()
    channels = self.in_channels
    weight = self.w_perm.view(channels, channels)
    undo = self.w_perm_inv.view(channels, channels) if reverse else weight
    zero = weight.new_zeros(())
    return Matrix(weight, slogdet=SlogdetInverse(zero, zero, undo, undo, zero))


def _block(module: Any, cls: Any) -> Candidate:
    rank = module.global_scale.dim() - 2
    free = any_layout(module.subnet)

    def forward(
        self: Any, x: Any, c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        y = taken(x[0], self.global_scale, (rank + 2,), self.in_channels)
        if y is None:
            return cls.forward(self, x, c, rev, jac)
        matrix = _orthogonal(self, rev)
        affine = Affine(self.global_offset)
        if not self.GIN:
            scale = self.global_scale_activation(self.global_scale)
            affine = Affine(self.global_offset / scale, scale=scale)
        first = second = 0.0
        if rev:
            y, first = transformed(y, matrix, affine, inverse=True)  # type: ignore[assignment]
        elif self.reverse_pre_permute:
            y = self._pre_permute(y)
        passed = y[:, : self.splits[0]]
        h = self.subnet(for_network(torch.cat([passed, *c], 1) if self.conditional else passed, free))
        y, logdet = coupled(
            y, h, rev, split=self.splits[0], clamp=self.clamp, volume_preserving=self.GIN, **_COUPLING
        )
        if not rev:
            y, second = transformed(y, matrix, affine)  # type: ignore[assignment]
        elif self.reverse_pre_permute:
            y = self._pre_permute(y, rev=True)
        return (y,), logdet + first + second

    return Candidate(
        f"{cls.__name__}.forward",
        "affine_coupling, invertible_conv1x1",
        ("freia.block", cls, rank, free),
        {"forward": forward},
        {name: _conditioned(module, run) for name, run in _BOTH.items()},
        (2, module.in_channels, 3, 2, 2)[: rank + 2],
        nets={"subnet": 2 * module.splits[1]},
    )


def _conditioned(module: Any, run: Any) -> Any:
    """A call with a condition, if the block takes one."""
    if not module.conditional:
        return run
    channels, reverse = module.condition_channels, run is _BOTH["reverse"]
    return lambda m, x: m([x], [x[:, :1].expand(-1, channels, *(-1,) * (x.dim() - 2))], rev=reverse)


def _convolution(module: Any, cls: Any) -> Candidate:
    def forward(self: Any, x: Any, rev: bool = False, jac: bool = True) -> tuple[tuple[Tensor], Tensor]:
        y = taken(x[0], self.M, channels=len(self.M))
        if y is None:
            return cls.forward(self, x, rev, jac)
        undo, logdet = self.M_inv.flatten(1), self.logDetM
        known = SlogdetInverse(logdet, logdet, undo, undo, logdet)
        y, _ = transformed(y, Matrix(self.M, slogdet=known), inverse=bool(rev))
        logdet = logdet * y.shape[2:].numel()
        return (y,), -logdet if rev else logdet

    return Candidate(
        f"{cls.__name__}.forward",
        "invertible_conv1x1",
        ("freia.conv", cls),
        {"forward": forward},
        _BOTH,
        (2, len(module.M), 3, 2),
    )
