"""Modules that construct distributions of their own definition: NVAE's ``Normal``, ``DiscMixLogistic`` and
``DiscLogistic``, and others of their structure.

The methods that construct them are rewritten: the class's name stands for a subclass. Objects that other
code constructs are for :func:`genperf.accelerate.namespace`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from genperf.accelerate._distribution_class import looks_like_one, subclass
from genperf.accelerate._methods_rebound import rebound
from genperf.accelerate._pattern import Match, Options, Refusal


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for each such class that methods of ``cls`` name."""
    yield from rebound(module, cls, options, looks_like_one, subclass)
