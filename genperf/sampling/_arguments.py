"""Checks of what is given to :func:`genperf.sampling.compile` and :meth:`Sampler.sample`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from genperf.sampling._interface import Interface
from genperf.sampling._program import Head, HeadKind


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if not 1 <= len(sizes) <= 3 or not all(isinstance(s, int) and s >= 1 for s in sizes):
        raise ValueError(f"compile: shape is {shape!r}, expected (T,), (H, W) or (C, H, W)")
    return sizes


def check_batch(batch: int) -> int:
    if isinstance(batch, bool) or not isinstance(batch, Integral):
        raise TypeError(f"sample: batch is {batch!r}, expected an integer")
    if batch < 1:
        raise ValueError(f"sample: batch is {batch}, expected at least 1")
    return int(batch)


def check_choice(head: Head, temperature: float, top_k: int) -> tuple[float, int]:
    """Temperature and ``top_k`` that this head can use."""
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"sample: temperature is {temperature!r}, expected a number")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"sample: temperature is {temperature}, expected a finite number above 0")
    if isinstance(top_k, bool) or not isinstance(top_k, Integral):
        raise TypeError(f"sample: top_k is {top_k!r}, expected an integer")
    if top_k != 0 and head.kind != HeadKind.CATEGORICAL:
        raise ValueError(
            f"sample: top_k is {top_k}, expected 0 for a {head.kind.name.lower()} head; only a categorical "
            "one has classes to keep"
        )
    if top_k < 0 or (top_k > head.classes and head.kind == HeadKind.CATEGORICAL):
        raise ValueError(
            f"sample: top_k is {top_k}, expected 1 to {head.classes}, the number of classes, or 0 for all"
        )
    if head.kind == HeadKind.CALLBACK and temperature != 1:
        raise ValueError(
            f"sample: temperature is {temperature}, expected 1 for a callback head, whose function draws"
        )
    return float(temperature), int(top_k)


def check_noise(
    head: Head, batch: int, noise: Tensor | None, seed: int | None, generator: torch.Generator | None
) -> None:
    given = [n for n, v in (("noise", noise), ("seed", seed), ("generator", generator)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"sample: {' and '.join(given)} are given, expected one of them")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
        raise TypeError(f"sample: seed is {seed!r}, expected an integer")
    if seed is not None and not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"sample: seed is {seed}, expected an integer of 64 bits")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"sample: generator is {type(generator).__name__}, expected a torch.Generator")
    if noise is None:
        return
    if not isinstance(noise, Tensor) or noise.dtype != torch.float32:
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"sample: noise is {got}, expected a float32 tensor (see heads.make_noise)")
    wanted = (batch, head.rows, head.cols, head.noises)
    if noise.shape != wanted:
        raise ValueError(f"sample: noise has shape {tuple(noise.shape)}, expected {wanted}")
    if head.kind == HeadKind.GAUSSIAN:
        wrong, expected = ~noise.isfinite(), "finite numbers"
    else:
        wrong, expected = ~((noise > 0) & (noise <= 1)), "uniform numbers above 0 and up to 1"
    if wrong.any():
        raise ValueError(f"sample: noise has {noise[wrong][0].item()}, expected {expected}")


def check_prefix(interface: Interface, batch: int, prefix: Any) -> tuple[Tensor, Tensor] | None:
    """Known values float32 and where they hold, both [B, rows, cols, V]; 0 where nothing is known."""
    if prefix is None:
        return None
    if not isinstance(prefix, (tuple, list)) or len(prefix) != 2:
        raise TypeError("sample: prefix is no pair, expected (values, known)")
    values, known = prefix
    if not isinstance(values, Tensor) or values.is_complex() or values.dtype == torch.bool:
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"sample: the values of prefix are {got}, expected a tensor of numbers")
    if not isinstance(known, Tensor) or known.dtype != torch.bool:
        got = known.dtype if isinstance(known, Tensor) else type(known).__name__
        raise TypeError(f"sample: what is known of prefix is {got}, expected a bool tensor")
    shape = (batch, *interface.shape)
    if values.shape not in (shape, (1, *interface.shape)):
        raise ValueError(
            f"sample: the values of prefix have shape {tuple(values.shape)}, expected {shape} or "
            f"{(1, *interface.shape)}"
        )
    try:
        mask = known.broadcast_to(shape)
    except RuntimeError:
        raise ValueError(
            f"sample: what is known of prefix has shape {tuple(known.shape)}, expected one that "
            f"broadcasts to {shape}"
        ) from None
    values = values.expand(shape).float()
    wrong, expected = interface.wrong_values(values)
    if (wrong & mask.to(wrong.device)).any():
        value = values[wrong & mask.to(wrong.device)][0].item()
        raise ValueError(f"sample: prefix has the known value {value:g}, expected {expected}")
    values = values.masked_fill(~mask.to(values.device), 0.0)
    return interface.values(values), interface.values(mask)


def check_cond(where: str, cond: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    found = {} if cond is None else dict(cond)
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: cond[{name!r}] is {type(tensor).__name__}, expected a tensor")
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ValueError(
                f"{where}: cond[{name!r}] has shape {tuple(tensor.shape)}, expected one row an image, or one "
                "for all of them"
            )
    rows = {len(t) for t in found.values()} - {1}
    if len(rows) > 1:
        raise ValueError(f"{where}: cond has tensors of {sorted(rows)} rows, expected as many in each")
    return found


def rows_of(cond: Mapping[str, Tensor]) -> int:
    """Images that a conditioning tells apart; 1 for none."""
    return max((len(t) for t in cond.values()), default=1)


def fitting_cond(
    where: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor] | None, batch: int
) -> dict[str, Tensor]:
    """``given``, or else the ``own`` conditioning of compile, for ``batch`` images."""
    cond = check_cond(where, own if given is None else given)
    if cond.keys() != own.keys():
        raise ValueError(
            f"{where}: cond has {sorted(cond) or 'nothing'}, expected {sorted(own) or 'nothing'} as in "
            "compile"
        )
    for name, tensor in cond.items():
        if tensor.shape[1:] != own[name].shape[1:] or len(tensor) not in (1, batch):
            first = "1" if batch == 1 else f"1 or {batch}"
            rest = "".join(f", {s}" for s in own[name].shape[1:])
            raise ValueError(
                f"{where}: cond[{name!r}] has shape {tuple(tensor.shape)}, expected ({first}{rest})"
            )
        if tensor.dtype != own[name].dtype:
            raise TypeError(f"{where}: cond[{name!r}] is {tensor.dtype}, expected {own[name].dtype}")
    return cond
