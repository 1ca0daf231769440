"""Which values of the input each distribution of an autoregressive model depends on, by perturbation."""

from __future__ import annotations

import torch
from torch import Tensor

from genperf_testing.models import TinyModel, conditioning, example

LIVE = 1e-4  # a change of the logits, of about 1 themselves, that no rounding makes
DEAD = 1e-12  # what is left of a change that cancels in float64


def rank(shape: tuple[int, ...], by_channel: bool) -> Tensor:
    """Of each value of ``shape``, ([C,] [H,] W): its place in the order of sampling, from 0 on.

    All channels of a pixel have one place, unless ``by_channel``.
    """
    if len(shape) < 3:
        return torch.arange(torch.Size(shape).numel()).view(shape)
    pixel = torch.arange(shape[1] * shape[2]).view(shape[1:])
    channel = torch.arange(shape[0]).view(-1, 1, 1)
    return pixel * shape[0] + channel if by_channel else pixel.expand(shape)


@torch.no_grad()
def response(tiny: TinyModel) -> Tensor:
    """[outputs, inputs] of one sample: change of each distribution as each value changes, in float64.

    The model itself becomes float64: those with weight norm by hooks cannot be copied.
    """
    model, kwargs = tiny.model.double(), conditioning(tiny, 1)
    x = example(tiny, 1)
    x = x if tiny.input == "index" else x.double()
    count = x.numel()
    changed = x.repeat(count, *[1] * len(tiny.shape))
    diagonal = changed.view(count, count).diagonal()
    diagonal.copy_((diagonal + 1) % model.classes if tiny.input == "index" else diagonal + 0.37)
    repeated = {name: value.repeat_interleave(count, 0) for name, value in kwargs.items()}
    before, after = model(x, **kwargs), model(changed, **repeated)
    if isinstance(before, tuple):
        before, after = before[0], after[0]
    return (after - before).abs().amax(dim=1).flatten(1).T


def past(tiny: TinyModel) -> Tensor:
    """[outputs, inputs] bool: what each distribution may depend on."""
    by_channel = tiny.head == "categorical"
    inputs = rank(tiny.shape, by_channel).flatten()
    outputs = inputs if by_channel else rank(tiny.shape[1:], False).flatten()
    return inputs < outputs[:, None]
