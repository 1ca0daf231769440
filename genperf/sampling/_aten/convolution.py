"""Convolutions, products with a constant matrix, and upsampling."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genperf.sampling import _layout
from genperf.sampling._aten.registry import handles
from genperf.sampling._ir import ConvNode, Ref
from genperf.sampling._layout import Atom, Dim, Sym, wide
from genperf.sampling._lower import Lowering


@handles("convolution", "_convolution", "conv2d", "conv1d", "mkldnn_convolution")
def convolution(
    state: Lowering, x: Any, weight: Any, bias: Any = None, stride: Any = (1,), padding: Any = (0,),
    dilation: Any = (1,), transposed: Any = False, output_padding: Any = (0,), groups: int = 1, *_: Any,
) -> Sym:  # fmt: skip
    if not isinstance(x, Sym) or not isinstance(weight, Tensor) or isinstance(bias, Sym):
        raise state.fail("a convolution whose weight depends on the sampled pixels is not supported")
    assert state.call is not None
    (value,) = [v for v in state.call.results if v is not None]
    spatial = weight.dim() - 2
    stride, padding, dilation = (list(v) * (spatial // len(v)) for v in (stride, padding, dilation))
    kinds = spatial_kinds(state, x, spatial)
    steps = {s for s, size in zip(stride, weight.shape[2:], strict=True) if s != 1}
    if len(steps) > 1 or (steps and any(s == 1 and n > 1 for s, n in zip(stride, x.shape[2:], strict=True))):
        raise state.fail(f"strides {tuple(stride)} that differ by dimension are not supported")
    step = steps.pop() if steps else 1
    if groups > 1:
        weight = _ungrouped(weight, groups)
    if transposed:
        weight = weight.transpose(0, 1)
    taps: list[tuple[int, int]] = []
    kernels: list[Tensor] = []
    positions = itertools.product(*(range(n) for n in weight.shape[2:]))
    for position, tap in zip(positions, weight.flatten(2).unbind(2), strict=True):
        if bool((tap != 0).any()):
            offset = {"Y": 0, "X": 0}
            for kind, k, pad, spread in zip(kinds, position, padding, dilation, strict=True):
                offset[kind] = pad - k * spread if transposed else k * spread - pad
            taps.append((offset["Y"], offset["X"]))
            kernels.append(tap.t())
    out = Sym(x.node, _image_dims(x, weight.shape[0], kinds, value.shape[2:]))
    packed = torch.stack(kernels) if kernels else weight.new_zeros(0, x.channels, weight.shape[0])
    init = None if bias is None else _layout.constant(bias.view(-1, *[1] * spatial), out.dims)
    num, den = (1, step) if transposed else (step, 1)
    source = state.ref(x)
    if den == 1:
        source, taps = at_the_cell(source, taps)
    return state.finished(out, ConvNode, source, taps, wide(packed), init, num, den)


def at_the_cell(source: Ref, taps: list[tuple[int, int]]) -> tuple[Ref, list[tuple[int, int]]]:
    """The same taps relative to the cell itself, with the offset of the source's window in them."""
    w = source.window
    window = replace(w, dy=0, dx=0)
    return replace(source, window=window), [(dy + w.dy, dx + w.dx) for dy, dx in taps]


def _image_dims(x: Sym, channels: int, kinds: Sequence[str], sizes: Sequence[int]) -> tuple[Dim, ...]:
    dims: list[Dim] = [x.dims[0], (Atom("C", channels, 1),) if channels > 1 else ()]
    dims += [(Atom(kind, size),) if size > 1 else () for kind, size in zip(kinds, sizes, strict=True)]
    return tuple(dims)


def spatial_kinds(state: Lowering, x: Sym, spatial: int) -> list[str]:
    if any(a.kind != "B" for a in x.dims[0]) or any(a.kind != "C" for a in x.dims[1]):
        raise state.fail("expects images [B, channels, rows, columns]")
    kinds: list[str | None] = []
    for dim in x.dims[2:]:
        found = {a.kind for a in dim}
        if len(found) > 1 or not found <= {"Y", "X"}:
            raise state.fail("convolves over a dimension that is not the rows or the columns of the image")
        kinds.append(found.pop() if found else None)
    default = ["X"] if spatial == 1 else ["Y", "X"]
    free = [k for k in default if k not in kinds]
    return [k if k is not None else free.pop(0) for k in kinds]


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The block-diagonal weight of a grouped convolution, dense in its first two dimensions."""
    a, b = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(a * groups, b * groups, *weight.shape[2:])
    for g, block in enumerate(weight.chunk(groups, 0)):
        full[g * a : (g + 1) * a, g * b : (g + 1) * b] = block
    return full


# products with a constant matrix


def product(state: Lowering, x: Any, matrix: Any, bias: Any = None) -> Sym:
    """x [..., channels_in] @ matrix [channels_in, channels]."""
    if not isinstance(x, Sym) or not isinstance(matrix, Tensor) or matrix.dim() != 2:
        raise state.fail("a matrix product whose matrix depends on the sampled pixels is not supported")
    channels = matrix.shape[1]
    out = Sym(x.node, (*x.dims[:-1], (Atom("C", channels, 1),) if channels > 1 else ()))
    if x.deferred:
        done = x.times(state, matrix, out, bias)
        if done is not None:
            return done
        x = x.settled(state)
    if any(a.kind != "C" for a in x.dims[-1]) or any(a.kind == "C" for d in x.dims[:-1] for a in d):
        raise state.fail("multiplies along something else than the channels")
    return state.linear(state.ref(x), out, matrix, None if bias is None else _layout.constant(bias, out.dims))


@handles("mm", "matmul", deferred=True)
def mm(state: Lowering, a: Any, b: Any) -> Sym:
    return product(state, a, b)


@handles("addmm", deferred=True)
def addmm(state: Lowering, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Sym:
    if beta != 1 or alpha != 1 or isinstance(bias, Sym):
        raise state.fail("addmm with factors, or with a bias that depends on the pixels, is not supported")
    return product(state, a, b, bias)


@handles("linear", deferred=True)
def linear(state: Lowering, x: Any, weight: Any, bias: Any = None) -> Sym:
    if not isinstance(weight, Tensor):
        raise state.fail("a linear layer whose weight depends on the sampled pixels is not supported")
    return product(state, x, weight.t(), bias)


# resolution


@handles("upsample_nearest2d", "upsample_nearest1d")
def upsample_nearest(state: Lowering, x: Sym, size: Sequence[int], *_: Any) -> Sym:
    """Each cell repeated: a transposed convolution with an identity for each tap."""
    factors = {new // old for new, old in zip(size, x.shape[2:], strict=True)}
    if len(factors) > 1 or any(new % old for new, old in zip(size, x.shape[2:], strict=True)):
        raise state.fail(f"upsampling {tuple(x.shape[2:])} to {tuple(size)} is not by one whole factor")
    (factor,) = factors
    kinds = spatial_kinds(state, x, len(size))
    taps = [(0, -j) for j in range(factor)]
    if len(size) == 2:
        taps = [(-i, j) for i in range(factor) for _, j in taps]
    out = Sym(x.node, _image_dims(x, x.channels, kinds, size))
    weight = torch.eye(x.channels).expand(len(taps), -1, -1)
    return state.finished(out, ConvNode, state.ref(x), taps, weight, None, 1, factor)


@handles("pixel_shuffle")
def pixel_shuffle(state: Lowering, x: Sym, factor: int) -> Sym:
    """Channel c * factor^2 + i * factor + j of a cell becomes channel c of the cell (i, j) in its block."""
    channels = x.channels // factor**2
    taps = [(-i, -j) for i in range(factor) for j in range(factor)]
    weight = torch.eye(x.channels).view(x.channels, channels, factor**2).permute(2, 0, 1)
    kinds = spatial_kinds(state, x, 2)
    out = Sym(x.node, _image_dims(x, channels, kinds, [n * factor for n in x.shape[2:]]))
    return state.finished(out, ConvNode, state.ref(x), taps, weight.contiguous(), None, 1, factor)


@handles("pixel_unshuffle")
def pixel_unshuffle(state: Lowering, x: Sym, factor: int) -> Sym:
    channels = x.channels * factor**2
    taps = [(i, j) for i in range(factor) for j in range(factor)]
    weight = torch.eye(channels).view(x.channels, factor**2, channels).transpose(0, 1)
    kinds = spatial_kinds(state, x, 2)
    out = Sym(x.node, _image_dims(x, channels, kinds, [n // factor for n in x.shape[2:]]))
    return state.finished(out, ConvNode, state.ref(x), taps, weight.contiguous(), None, factor, 1)
