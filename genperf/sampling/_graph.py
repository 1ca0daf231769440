"""Capture of a model as a graph: recorded, lowered, and checked to be the same program for other inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genperf.sampling._capture import record
from genperf.sampling._errors import CaptureError
from genperf.sampling._ir import Graph, Input
from genperf.sampling._layout import Atom, Dim
from genperf.sampling._lower import lower, output_value


def capture(
    model: nn.Module,
    example: Tensor,
    other: Tensor | None,
    classes: int | None = None,
    arguments: Sequence[Any] = (),
    keywords: Mapping[str, Any] | None = None,
) -> Graph:
    """The graph of ``model(example, *arguments, **keywords)``.

    Args:
        example: an input of at least two images: class indices int64 [B, H, W] or [B, T], or floats
            [B, C, H, W] or [B, C, T].
        other: another input of that shape, for which the model must run the same program; None where that
            is known.
        classes: number of classes of an integer input.

    Raises:
        CaptureError: if something that depends on the input has no incremental form, or if the program
            depends on the values of the input; the message names the module and the operation.
    """
    first = record(model, model, example, arguments, keywords)
    if other is not None:
        record(model, model, other, arguments, keywords, expected=first)
    first.on_cpu()
    index = not example.is_floating_point()
    spatial = example.shape[1 if index else 2 :]
    kinds = ("X",) if len(spatial) == 1 else ("Y", "X")
    channels = 1 if index else example.shape[1]
    cells: list[Dim] = [(Atom(k, n),) if n > 1 else () for k, n in zip(kinds, spatial, strict=True)]
    dims: list[Dim] = [(Atom("B", example.shape[0]),)]
    if not index:
        dims.append((Atom("C", channels, 1),) if channels > 1 else ())
    rows, cols = (1, *spatial) if len(spatial) == 1 else spatial
    source = Input("the model's input", rows, cols, channels, "index" if index else "float")
    with torch.no_grad():
        state = lower(first, source, (*dims, *cells), classes)
        output = state.settled(state.syms[output_value(first)])
        if isinstance(output, Tensor):
            raise CaptureError("the model's output does not depend on its input")
        if (output.size("Y"), output.size("X")) != (rows, cols):
            raise CaptureError(
                f"the model's output of shape {output.shape} has {output.size('Y')} rows and "
                f"{output.size('X')} columns of pixels; expected {rows} and {cols}, as the input has"
            )
        graph = Graph(source, state.nodes, state.ref(output))
    graph.prune()
    return graph
