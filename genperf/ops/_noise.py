"""The noise of an op that draws: the caller's, a key, or what eager torch would draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genperf.ops.philox_random import check_key, draw_key

#: From a shape, a generator, a dtype and a device, as ``torch.randn`` has them, to the noise.
Draw = Callable[..., Tensor]


def check_noise(
    op: str, name: str, like: Tensor, noise: Any, key: Any, rng: str, generator: Any, draw: Draw
) -> tuple[Tensor | None, Tensor | None]:
    """The noise for the argument ``name`` of an op, or the key; drawn where neither was given."""
    if (noise is not None) + (key is not None) + (generator is not None) > 1:
        raise ValueError(f"{op}: more than one of noise, key and generator is given, expected one at most")
    if rng not in ("philox", "torch"):
        raise ValueError(f"{op}: rng is {rng!r}, expected 'philox' or 'torch'")
    if noise is not None:
        if not isinstance(noise, Tensor) or noise.dtype != like.dtype:
            got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"{op}: noise is {got}, expected a {like.dtype} tensor, as {name}")
        if noise.shape != like.shape or noise.device != like.device:
            raise ValueError(
                f"{op}: noise has shape {tuple(noise.shape)} on {noise.device}, expected "
                f"{tuple(like.shape)} on {like.device}"
            )
        if noise.requires_grad:
            raise ValueError(f"{op}: noise requires a gradient, expected one that does not")
        return noise, None
    if key is not None:
        check_key(key, like.shape, op)
        if key.device != like.device:
            raise ValueError(f"{op}: key is on {key.device}, expected {like.device}, as {name}")
        return None, key
    if isinstance(generator, (list, tuple)) and len(generator) != (like.shape[0] if like.dim() else 0):
        raise ValueError(
            f"{op}: generator has {len(generator)} entries, expected one for each of the samples of {name}, "
            f"shape {tuple(like.shape)}"
        )
    if rng == "torch":
        return drawn(op, like, generator, draw), None
    return None, draw_key(like.device, generator)


def drawn(
    op: str, like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None, draw: Draw
) -> Tensor:
    """Noise with the shape, dtype and device of ``like``.

    A list of generators draws one sample each; a CPU generator draws on the CPU for any device.
    """
    if isinstance(generator, (list, tuple)):
        rows = [drawn(op, row[None], g, draw) for row, g in zip(like, generator, strict=True)]
        return torch.cat(rows) if rows else torch.empty_like(like)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{op}: generator is {type(generator).__name__}, expected a torch.Generator or a list of them"
        )
    device = like.device if generator is None else generator.device
    return draw(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def torch_gumbel(
    shape: torch.Size, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What ``torch.nn.functional.gumbel_softmax`` draws, by its operations."""
    draw = torch.empty(shape, dtype=dtype, device=device)
    return draw.exponential_(generator=generator).log_().neg_()
