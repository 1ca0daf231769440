"""What each aten operation means on a grid of cells: one handler an operation, found by its name."""

from genperf.sampling._aten import (  # noqa: F401
    attention,
    channels,
    convolution,
    joining,
    layout,
    lookup,
    masks,
    pointwise,
    windows,
    writes,
)
from genperf.sampling._aten.registry import HANDLERS

__all__ = ["HANDLERS"]
