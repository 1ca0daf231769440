"""What the replaced methods of flow layers share: their map as one op takes it, and when it may be taken."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genperf.accelerate._swap import kept_for
from genperf.ops.affine_coupling import affine_coupling
from genperf.ops.invertible_conv1x1 import PLU, invertible_conv1x1
from genperf.ops.slogdet_inverse import SlogdetInverse, slogdet_inverse

_MAP = "_genperf_map"
#: Why layers for vectors are left alone: measured, B 256 to 4096, C 8 to 64.
ROWS = "vectors are multiplied by its matrix in one product already: nothing would be gained"
#: Of an image, from which on convolutions gain by having channels last.
_POSITIONS = 64


class Affine(NamedTuple):
    """An actnorm: scale * (x + shift), by channel; or its factor as ``log_scale``."""

    shift: Tensor
    scale: Tensor | None = None
    log_scale: Tensor | None = None


class Matrix(NamedTuple):
    """A 1x1 convolution: weight [C, C] or its factors, what is added afterwards, and what is known of it."""

    weight: Tensor | PLU
    bias: Tensor | None = None
    slogdet: SlogdetInverse | None = None


def known(weight: Tensor, logabsdet: Tensor, inverse: bool, bias: Tensor | None = None) -> Matrix:
    """A matrix whose determinant its factors tell; it is inverted only for the inverse map."""
    undo = slogdet_inverse(weight).inverse if inverse else weight
    return Matrix(weight, bias, SlogdetInverse(logabsdet, logabsdet, undo, undo, logabsdet))


def transformed(
    x: Tensor, matrix: Matrix, affine: Affine | None = None, inverse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """matrix(affine(x)) or its inverse, in one pass, and the log-determinant [B] of what was computed."""
    weight, bias, slogdet = matrix
    if affine is not None:
        options.update({name: t for name, t in affine._asdict().items() if t is not None})
    if bias is not None:
        bias = bias.view(-1, *(1,) * (x.dim() - 2)) if options.get("channel_dim", 1) == 1 else bias
        x = x - bias if inverse else x
    y, logdet = invertible_conv1x1(x, weight, slogdet=slogdet, inverse=inverse, **options)
    return laid_out(y if bias is None or inverse else y + bias), logdet


def coupled(x: Tensor, h: Tensor, inverse: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """The coupling of ``x`` by what its network gave, and the log-determinant [B] of what was computed."""
    y, logdet = affine_coupling(x, h, inverse=inverse, **options)
    # A volume that never changes has no gradient.
    return laid_out(y), logdet.detach() if options["scale"] == "additive" else logdet


def for_network(x: Tensor, any_layout: bool) -> Tensor:
    """``x`` as a coupling network of 2-D convolutions is fastest with it: channels last, on the CPU."""
    if any_layout and x.device.type == "cpu" and x.dim() == 4 and x.shape[2] * x.shape[3] >= _POSITIONS:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def laid_out(y: Tensor) -> Tensor:
    """In a layout that a convolution would have given, because its callers may view it."""
    last = y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)
    return y if last or y.is_contiguous() else y.contiguous()


def taken(x: Any, parameter: Any, dims: tuple[int, ...] = (4,), channels: int | None = None) -> Tensor | None:
    """``x`` as the ops take it, or None where the original must run.

    Under autocast the state of a flow stays in the parameters' precision.
    """
    if not isinstance(x, Tensor) or x.dim() not in dims or x.numel() == 0 or x.is_meta:
        return None
    if parameter.dtype not in (torch.float32, torch.float64) or parameter.device != x.device:
        return None
    if channels is not None and x.shape[1] != channels:
        return None
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if x.dtype == parameter.dtype:
        return x
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.get_autocast_dtype(x.device.type):
        return x.to(parameter.dtype)
    return None


def hooked(*modules: Any) -> bool:
    """Whether hooks would notice that a module is not called."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def initialised(module: nn.Module, flag: Any, at_first: bool) -> bool:
    """Whether the flag of a data-dependent initialisation is set; a tensor is read until it is, then no more.

    Args:
        at_first: what it was when the module was accelerated, on which a compiled graph relies.
    """
    if not isinstance(flag, Tensor):
        return bool(flag)
    if torch.compiler.is_compiling():
        return at_first
    if flag.is_inference():
        return bool(flag)
    kept = kept_for(module)
    seen, version = kept.get("initialised", (None, -1))
    if seen is not None and seen() is flag and version == flag._version:
        return True
    if not bool(flag):
        return False
    kept["initialised"] = weakref.ref(flag), flag._version
    return True


def map_of(module: Any, inverse: bool) -> Any:
    """The :class:`Affine` or :class:`Matrix` of an accelerated layer, or None where its original must run.

    Args:
        inverse: whether it is the inverse that will be computed.
    """
    get = getattr(type(module), _MAP, None)
    return None if get is None or hooked(module) else get(module, inverse)


def pair_of(affine: Any, matrix: Any, inverse: bool) -> tuple[Matrix, Affine] | None:
    """The maps of an actnorm and a 1x1 convolution that follow each other, if one op may take both."""
    if not isinstance(first := map_of(affine, inverse), Affine):
        return None
    second = map_of(matrix, inverse)
    return (second, first) if isinstance(second, Matrix) else None
