"""The invertible 1x1 convolution as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genperf.nn.flows._determinants import Found, through
from genperf.ops.invertible_conv1x1 import PLU, invertible_conv1x1
from genperf.ops.slogdet_inverse import SlogdetInverse


class InvertibleConv1x1(nn.Module):
    """``z = W x`` at each position (D. Kingma, P. Dhariwal, arXiv:1807.03039, section 3.2), W a rotation at
    first.

    By :func:`genperf.ops.invertible_conv1x1`: never in TF32 or half precision; the inverse comes from
    float64.

    Args:
        channels: C.
        permutation: "dense" for a parameter ``weight`` [C, C]; "plu" for its factors (equation 10): buffers
            ``p`` and ``sign_s``, parameters ``l``, ``u`` and ``log_s``.

    Raises:
        ValueError: for other arguments, or an x without C channels in dimension 1.
    """

    p: Tensor
    sign_s: Tensor

    def __init__(self, channels: int, permutation: str = "dense") -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels is {channels!r}, expected an integer of at least 1")
        if permutation not in ("dense", "plu"):
            raise ValueError(f"permutation is {permutation!r}, expected 'dense' or 'plu'")
        self.channels, self.permutation = channels, permutation
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        self.found: Found | None = None
        if permutation == "dense":
            self.weight = nn.Parameter(rotation)
            return
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("p", p)
        self.register_buffer("sign_s", diagonal.sign())
        self.l = nn.Parameter(lower.tril(-1))
        self.u = nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(diagonal.abs().log())

    @property
    def matrix(self) -> Tensor | PLU:
        """What the op takes: ``weight``, or its factors."""
        if self.permutation == "dense":
            return self.weight
        return PLU(self.p, self.l, self.u, self.sign_s, self.log_s)

    def current(self) -> SlogdetInverse | None:
        """Determinant and inverse of ``weight``, if they are known for what it holds now."""
        if self.found is None or torch.compiler.is_compiling() or not self.found.is_of(self.weight):
            return None
        return self.found.result

    def slogdet(self) -> SlogdetInverse | None:
        """:meth:`current`, where ``logabsdet`` has a gradient by ``weight``. None for factors."""
        known = self.current() if self.permutation == "dense" else None
        return None if known is None else through(self.weight, known)

    def slogdet_of_inverse(self) -> SlogdetInverse | None:
        """:meth:`current` for an inverse pass; None where that is recorded, for gradients through the
        inverse."""
        return None if self.permutation != "dense" or torch.is_grad_enabled() else self.current()

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """x [B, C, *] to z and the log-determinant [B]."""
        return invertible_conv1x1(x, self.matrix, slogdet=self.slogdet())

    def inverse(self, z: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """z [B, C, *] back to x, and the log-determinant [B] of this direction."""
        return invertible_conv1x1(z, self.matrix, slogdet=self.slogdet_of_inverse(), inverse=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "found": None}

    def extra_repr(self) -> str:
        return f"{self.channels}, permutation={self.permutation!r}"
