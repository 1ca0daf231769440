"""The masked convolutions of PixelCNN repositories: subclasses of ``nn.Conv2d`` with a mask as a buffer.

Some multiply weight and mask for the convolution; most zero the masked weights in place, in each forward. The
second kind leaves a gradient at masked taps, which counts in a clipped norm, and zeroed weights in the
state_dict: both are kept, at the price of a gradient computed for all taps. The optimizer's moments of masked
taps are then what they were, too.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf import _op
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._rewrite import CannotRewrite, syntax_tree
from genperf.nn.masked_conv import MaskedConv2d, covered
from genperf.ops.masked_conv2d import masked_conv2d

_READ = {
    "weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "in_channels",
    "out_channels", "_conv_forward",
}  # fmt: skip
#: Where a mask keeps more than this, torch's convolution is about as fast (1x1 with no mask: 1.1 times).
_WORTHWHILE = 0.85


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a convolution that has a mask."""
    forward = cls.__dict__.get("forward") or cls.forward  # type: ignore[attr-defined]
    if not isinstance(module, nn.Conv2d) or forward in (nn.Conv2d.forward, MaskedConv2d.forward):
        return
    masks = _masks(module)
    if not masks:
        return
    was = f"{cls.__name__}.forward"
    try:
        if len(masks) > 1:
            raise _Unknown(f"{', '.join(masks)} may all be its mask")
        (name,) = masks
        _check_settings(module, masks[name])
        _check_source(cls, forward, name)
        in_place, dense = _probe(module, forward, name)
        _check_gain(module, masks[name], in_place)
    except _Unknown as reason:
        yield Refusal(was, str(reason))
        return
    convention = f"(weight * {name}{', in place' if in_place else ''})"
    key = ("masked_conv2d", forward, name, in_place, dense)
    method = _replacement(forward, name, in_place, dense)
    yield Match(
        was + convention, "masked_conv2d", key, {"forward": method}, _backend_for(module, masks[name])
    )


class _Unknown(Exception):  # noqa: N818
    """The module is not, or not certainly, the masked convolution; or nothing would be gained."""


def _masks(module: nn.Conv2d) -> dict[str, Tensor]:
    """The constants beside the weight that broadcast to it."""
    constants: dict[str, Tensor] = {
        n: p for n, p in module._parameters.items() if p is not None and not p.requires_grad
    }
    constants.update({n: b for n, b in module._buffers.items() if b is not None})
    size = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return {
        name: value
        for name, value in constants.items()
        if name not in ("weight", "bias")
        and value.dim() == 4
        and all(n in (1, full) for n, full in zip(value.shape, size, strict=True))
    }


def _check_settings(module: nn.Conv2d, mask: Tensor) -> None:
    weight = module._parameters.get("weight")
    if weight is None:
        raise _Unknown("its weight is not a parameter of its own, but computed")
    if "forward" in module.__dict__:
        raise _Unknown("forward is set on the module itself")
    if module.groups != 1:
        raise _Unknown(f"it has {module.groups} groups")
    if module.padding_mode != "zeros":
        raise _Unknown(f"it pads with {module.padding_mode}")
    if weight.is_meta or mask.is_meta:
        raise _Unknown("it is on the meta device, where nothing can be probed")
    if not covered(torch.empty(0, 0, 0, 0, dtype=weight.dtype, device=weight.device), weight):
        raise _Unknown(f"there is no kernel for {weight.dtype} on {weight.device.type}")


def _check_source(cls: type, forward: Any, mask: str) -> None:
    """Raise unless ``forward`` takes an image and uses nothing of its module but convolution and mask."""
    if not isinstance(forward, FunctionType) or len(inspect.signature(forward).parameters) != 2:
        raise _Unknown("its forward does not take one argument")
    try:
        tree = syntax_tree(forward)
    except CannotRewrite as error:
        raise _Unknown(str(error)) from error
    owner = tree.args.args[0].arg
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _is_name(n.value, owner)]
    parents = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _is_name(n.func, "super")]
    uses = [n for n in ast.walk(tree) if _is_name(n, owner)]
    if len(uses) > len(attributes) + sum(_is_name(a, owner) for call in parents for a in call.args):
        raise _Unknown("it uses its module in a way that is not known")
    if unknown := sorted({n.attr for n in attributes} - _READ - {mask}):
        raise _Unknown(f"it uses {', '.join(unknown)} of its module")
    if cls._conv_forward is not nn.Conv2d._conv_forward:  # type: ignore[attr-defined]
        raise _Unknown("it has a _conv_forward of its own")
    if parents:
        (defining,) = (base for base in cls.__mro__ if base.__dict__.get("forward") is forward)
        after = cls.__mro__[cls.__mro__.index(defining) + 1 :]
        above = next(base.__dict__["forward"] for base in after if "forward" in base.__dict__)
        if above is not nn.Conv2d.forward:
            raise _Unknown("its forward calls that of another class than Conv2d")


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _probe(module: nn.Conv2d, forward: FunctionType, mask_name: str) -> tuple[bool, bool]:
    """Whether the weight is masked in place, and whether its gradient is dense; in float64, on a copy."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = _masks(module)[mask_name].detach().double().cpu()
    effects = set()
    for training in (True, False):
        for extra in (1, 4):
            probe = copy.copy(module)
            probe.training = training
            weight, bias = nn.Parameter(normal(*module.weight.shape)), None
            if module.bias is not None:
                bias = nn.Parameter(normal(*module.bias.shape))
            of_module = {"weight": weight, "bias": bias}
            is_parameter = mask_name in module._parameters
            if is_parameter:
                of_module[mask_name] = nn.Parameter(mask, requires_grad=False)
            probe.__dict__["_parameters"] = {**module._parameters, **of_module}
            probe.__dict__["_buffers"] = dict(module._buffers)
            if not is_parameter:
                probe._buffers[mask_name] = mask
            before = weight.detach().clone()
            height, width = (
                d * (k - 1) + extra + n
                for d, k, n in zip(module.dilation, module.kernel_size, (1, 2), strict=True)
            )
            x = normal(2, module.in_channels, height, width).requires_grad_()
            try:
                with torch.enable_grad():
                    y = forward(probe, x)
                    if probe._parameters["weight"] is not weight:
                        raise _Unknown("it replaces its weight")
                    gradient = normal(*y.shape)
                    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
                    theirs = [y, *torch.autograd.grad(y, leaves, gradient)]
            except _Unknown:
                raise
            except Exception as error:
                raise _Unknown(f"it cannot be run alone: {type(error).__name__}: {error}") from error
            in_place = not torch.equal(weight, before)
            if in_place and not torch.equal(weight, before * mask):
                raise _Unknown("it changes its weight otherwise than by the mask")
            effects.add((in_place, _kind(module, theirs, x, before, bias, mask, gradient)))
    if len(effects) > 1:
        raise _Unknown("it does different things in training and evaluation")
    return effects.pop()


def _kind(
    module: nn.Conv2d,
    theirs: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Any,
    mask: Tensor,
    gradient: Tensor,
) -> bool:
    """Whether the gradient of the weight is dense; raises unless all else is that of the definition."""
    kept = (weight * mask).requires_grad_()
    with torch.enable_grad():
        y = F.conv2d(x, kept, bias, module.stride, module.padding, module.dilation)
        leaves = [leaf for leaf in (x, kept, bias) if leaf is not None]
        ours = [y, *torch.autograd.grad(y, leaves, gradient)]

    def alike(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and torch.allclose(
            a, b, rtol=1e-9, atol=1e-9 * b.detach().abs().max().item()
        )

    if not all(alike(ours[i], theirs[i]) for i in range(len(ours)) if i != 2):
        raise _Unknown("it does not give the convolution with its weight times the mask")
    if alike(ours[2] * mask, theirs[2]):
        return False
    if alike(ours[2], theirs[2]):
        return True
    raise _Unknown("the gradient of its weight is not that of a masked convolution")


def _check_gain(module: nn.Conv2d, mask: Tensor, in_place: bool) -> None:
    if in_place and not ((mask == 0) | (mask == 1)).all():
        raise _Unknown("it multiplies its weight in place by a mask that is not of zeros and ones")
    kept = (mask != 0).expand_as(module.weight).double().mean().item()
    if kept > _WORTHWHILE:
        raise _Unknown(f"its mask keeps {kept:.0%} of the weights: nothing would be gained")


def _backend_for(module: nn.Conv2d, mask: Tensor) -> str:
    x = module.weight.new_zeros(
        1,
        module.in_channels,
        *(d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)),
    )
    with torch.no_grad():
        explanation = _op.explain(masked_conv2d, x, module.weight, mask.detach(), None)
    return explanation.choices[-1].backend


def _replacement(forward: FunctionType, mask_name: str, in_place: bool, dense: bool) -> FunctionType:
    """A forward by the kernel; what it does not cover runs ``forward``."""

    def method(self: Any, x: Tensor) -> Tensor:
        if not covered(x, self.weight):
            return forward(self, x)
        mask = getattr(self, mask_name)
        if in_place:
            self.weight.data.mul_(mask)
        return masked_conv2d(
            x, self.weight, mask, self.bias, self.stride, self.padding, self.dilation, dense_gradient=dense
        )

    names = {"x": list(inspect.signature(forward).parameters)[1]}
    code = method.__code__
    code = code.replace(co_varnames=tuple(names.get(name, name) for name in code.co_varnames))
    renamed = FunctionType(code, method.__globals__, forward.__name__, None, method.__closure__)
    renamed.__qualname__, renamed.__doc__ = forward.__qualname__, forward.__doc__
    renamed.__module__ = forward.__module__
    return renamed
