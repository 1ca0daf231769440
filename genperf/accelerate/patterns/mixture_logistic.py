"""Modules whose methods call a loss or a sampler of the discretized mixture of logistics.

They are VDVAE's ``DmolNet``, and other classes whose methods name a function of PixelCNN++'s ports.

The methods are rewritten: the function's name stands for one that calls the kernel, and for what that does
not cover, the function itself. Functions that no method of a module names, such as the loss of a training
script, are for :func:`genperf.accelerate.namespace`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from genperf.accelerate._logistic_functions import looks_like_one, replacement
from genperf.accelerate._methods_rebound import rebound
from genperf.accelerate._pattern import Match, Options, Refusal


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for each such function that methods of ``cls`` call."""
    yield from rebound(module, cls, options, looks_like_one, replacement)
