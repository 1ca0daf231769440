"""CUDA graphs of sampling and of whole training steps: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Captured:
    """A function captured in a CUDA graph, with the shapes of its example inputs.

    A flow captures whole, since nothing in it waits for the device: sampling, and a training step with
    backward pass and an optimizer with ``capturable=True``. What a graph computes, determinants and
    inverses of the mixing matrices included, it computes at each replay from the parameters as they are
    then. Activation normalization has to be initialised before. The check of reconstructions runs in the
    graph, but nobody reads it unasked: look at ``ReversibleSequence.reconstruction_errors`` from time to
    time.

    Networks that draw random numbers (dropout) cannot be trained so with ``reversible=True``.

    Args:
        function: takes the inputs, and returns a tensor or a tuple of tensors.
        inputs: examples; their shapes, dtypes and devices are those of all calls.
        warmup: runs before the capture, which change what the function changes.

    Raises:
        RuntimeError: without a CUDA device, or where the function cannot be captured.
        ValueError: in a call, for inputs of other shapes or dtypes.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, warmup: int = 3) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("Captured: torch finds no CUDA device here, expected one")
        self._inputs = [tensor.detach().clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Replays the graph with these inputs; the results are overwritten by the next call."""
        if len(inputs) != len(self._inputs):
            raise ValueError(f"Captured: {len(inputs)} inputs, expected {len(self._inputs)}")
        for i, (static, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if given.shape != static.shape or given.dtype != static.dtype:
                raise ValueError(
                    f"Captured: input {i} is {given.dtype} of shape {tuple(given.shape)}, expected "
                    f"{static.dtype} of shape {tuple(static.shape)}"
                )
            static.copy_(given)
        self._graph.replay()
        return self._outputs
