"""Unfolded windows become convolutions, with masks of each location where a model has them."""

import pytest
import torch
from genperf_testing import layers
from torch import Tensor
from torch.nn import functional as F

from genperf.sampling._errors import CaptureError, CausalityError
from genperf.sampling._ir import ConcatNode, ConvNode, PointwiseNode
from genperf.sampling._verify import check_causal, when_known

_TAPS = torch.tensor([1.0] * 4 + [0.0] * 5)  # of 3x3, those before the pixel
_WEIGHT = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _locally_masked(y: Tensor, mask: Tensor, dilation: int = 1) -> Tensor:
    """Windows times a mask [taps, cells] of each location, times the weight."""
    windows = F.unfold(y, 3, dilation=dilation, padding=dilation)
    windows = (windows.view(16, 9, 30) * mask.to(y)).view(2, 72, 30)
    return (_WEIGHT.flatten(1) @ windows).view(2, 6, 5, 6)


def _some_locations() -> Tensor:
    """In rows 1 and 2 without the tap above, elsewhere with a factor of 0.5 on the one to the left."""
    mask = _TAPS[:, None, None].expand(9, 5, 6).clone()
    mask[1, 1:3] = 0
    mask[3, ::2, 1:4] = 0.5
    return mask.flatten(1)


_WINDOWS: dict[str, layers.Body] = {
    "locally masked": lambda y: _locally_masked(y, _TAPS[:, None].expand(9, 30)),
    "dilated": lambda y: _locally_masked(y, _TAPS[:, None], 2),
    "mask by location": lambda y: _locally_masked(y, _some_locations()),
    "nothing but masked": lambda y: _locally_masked(y, torch.zeros(9, 30)) + y[:, :6],
    "unfolded tensors": lambda y: torch.einsum(
        "bchwij,ocij->bohw", F.pad(y, (2, 0, 2, 0)).unfold(2, 3, 1).unfold(3, 3, 1), _WEIGHT
    ),
    "other arithmetic": lambda y: F.unfold(F.pad(y, (1, 0, 1, 0)), 2).tanh().view(2, 8, 4, 5, 6).mean(2),
    "weights by channel": lambda y: (
        F.unfold(F.pad(y, (1, 0, 1, 0)), 2).view(2, 8, 4, 5, 6) * torch.linspace(-1, 1, 32).view(8, 4, 1, 1)
    ).sum(2),
}


@pytest.mark.parametrize("name", _WINDOWS)
def test_unfolded_windows(name: str) -> None:
    layers.check(_WINDOWS[name])


def test_locally_masked_convolutions_in_raster_order_are_plain_ones() -> None:
    """Outside of the image a mask is 0 as well: that makes no difference to a window of zeros."""
    inside = F.unfold(torch.ones(1, 1, 5, 6), 3, padding=1)[0]
    graph = layers.captured(layers.Around(lambda y: _locally_masked(y, _TAPS[:, None] * inside)))
    assert not any(isinstance(n, ConcatNode | PointwiseNode) for n in graph.nodes)
    (_, unfolded) = (n for n in graph.nodes if isinstance(n, ConvNode))
    assert unfolded.taps == [(-1, -1), (-1, 0), (-1, 1), (0, -1)]


def test_locally_masked_convolutions_in_another_order_are_refused() -> None:
    """Every second row from right to left: its pixels see what a raster order draws later."""
    mask = _TAPS[:, None, None].expand(9, 5, 6).clone()
    mask[3, 1::2], mask[5, 1::2] = 0, 1
    graph = layers.captured(layers.Around(lambda y: _locally_masked(y, mask.flatten(1))))
    with pytest.raises(CausalityError, match="looks at the future"):
        check_causal(graph, when_known(graph))


def test_a_stride_is_named() -> None:
    with pytest.raises(CaptureError, match="stride"):
        layers.captured(layers.Around(lambda y: F.unfold(y, 2, stride=2)))
