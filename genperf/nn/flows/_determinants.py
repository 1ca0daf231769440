"""Determinants and inverses of all mixing matrices of a model by one call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genperf.ops.slogdet_inverse import SlogdetInverse, slogdet_inverse

if TYPE_CHECKING:
    from genperf.nn.flows.conv1x1 import InvertibleConv1x1


class Found(NamedTuple):
    """Results for one matrix, and which matrix that was: its memory, the number of writes to it and, on the
    CPU, what was in it."""

    result: SlogdetInverse
    matrix: Tensor  # kept, so that its memory is not another's
    writes: int
    copy: Tensor | None

    def is_of(self, weight: Tensor) -> bool:
        """On a GPU, writes that are not counted (``weight.data``) are not seen."""
        if weight.is_inference() or weight._version != self.writes:
            return False
        if weight.data_ptr() != self.matrix.data_ptr():
            return False
        return self.copy is None or bool((self.copy.numpy() == weight.detach().numpy()).all())


_local = threading.local()


@contextlib.contextmanager
def prepared(convs: Sequence[InvertibleConv1x1]) -> Iterator[None]:
    """While determinants and inverses for the weights of these layers are known, from one call for all.

    A call for layers that an outer one has prepared computes nothing. On the CPU nor does one for weights
    that are what they were; on a GPU, where the host cannot compare them, and where replays of a CUDA graph
    write weights without being counted, they are computed in each pass. Without effect under torch.compile.
    """
    outer: frozenset[InvertibleConv1x1] = getattr(_local, "convs", frozenset())
    _compute([conv for conv in convs if conv not in outer])
    _local.convs = outer.union(convs)
    try:
        yield
    finally:
        _local.convs = outer


def _unchanged(conv: InvertibleConv1x1) -> bool:
    """Whether what is known is of the weight's numbers, however they were written; on a GPU always False."""
    return conv.current() is not None and conv.found.copy is not None  # type: ignore[union-attr]


def _compute(convs: Sequence[InvertibleConv1x1]) -> None:
    if torch.compiler.is_compiling():
        return
    groups: dict[tuple[torch.device, torch.dtype], list[InvertibleConv1x1]] = {}
    for conv in convs:
        groups.setdefault((conv.weight.device, conv.weight.dtype), []).append(conv)
    for (device, _), members in groups.items():
        if all(_unchanged(conv) for conv in members):
            continue
        with torch.inference_mode(False), torch.no_grad():  # training may use what sampling has computed
            found = slogdet_inverse([conv.weight for conv in members])
            sign, logabsdet, status = (t.unbind() for t in (found.sign, found.logabsdet, found.status))
            each = zip(sign, logabsdet, found.inverse, found.inverse_transpose, status, strict=True)
            for conv, result in zip(members, each, strict=True):
                weight = conv.weight.detach()
                copy = weight.clone() if device.type == "cpu" else None
                conv.found = (
                    None
                    if weight.is_inference()
                    else Found(SlogdetInverse(*result), weight, weight._version, copy)
                )


class _Through(torch.autograd.Function):
    """log|det W| that is known already, with its gradient W^-T."""

    @staticmethod
    def forward(ctx, weight, logabsdet, inverse_transpose):
        ctx.save_for_backward(inverse_transpose)
        return logabsdet.clone()

    @staticmethod
    def backward(ctx, grad):
        (inverse_transpose,) = ctx.saved_tensors
        return grad * inverse_transpose, None, None


def through(weight: Tensor, known: SlogdetInverse) -> SlogdetInverse:
    """The results with ``logabsdet`` differentiable by ``weight``, once."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return known
    return known._replace(logabsdet=_Through.apply(weight, known.logabsdet, known.inverse_transpose))
