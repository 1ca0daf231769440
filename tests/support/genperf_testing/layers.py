"""A causal model around one operation, and its graph compared with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genperf.nn import autoregressive as ar
from genperf.sampling._graph import capture
from genperf.sampling._ir import Graph
from genperf.sampling._verify import check_causal, when_known
from genperf_testing import graphs
from genperf_testing.models import randomise

SHAPE = (5, 6)  # rows, columns
Body = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """``body`` between a convolution that does not see the pixel and one that sees it alone; float64.

    The body gets [B, 8, 5, 6] of about unit size.
    """

    def __init__(self, body: Body, channels: int = 1) -> None:
        super().__init__()
        self.first = ar.MaskedConv2d(channels, 8, 3, mask_type="A")
        self.body = body
        randomise(self, gain=1.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))


def example(channels: int = 1, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *SHAPE, generator=rng, dtype=torch.float64)


def captured(model: nn.Module, channels: int = 1) -> Graph:
    return capture(model, example(channels), example(channels, 1))


def assert_same(graph: Graph, model: nn.Module, channels: int = 1, tolerance: float = 1e-12) -> None:
    """The graph computes what the model does, for an input that it was not captured with."""
    x = example(channels, 2)
    with torch.no_grad():
        out = model(x)
    assert out.std() > 0.05  # nothing is shown by constants
    got = graphs.evaluate(graph, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(got.reshape(out.shape), out, rtol=tolerance, atol=tolerance)


def check(body: Body) -> None:
    """A model with this body is causal, and its graph computes the same."""
    model = Around(body)
    graph = captured(model)
    check_causal(graph, when_known(graph))
    assert_same(graph, model)
