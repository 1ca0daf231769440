"""Functions of elements and masks compute in the graph what they do in torch."""

import pytest
import torch
from genperf_testing import layers
from torch import Tensor
from torch.nn import functional as F

from genperf.sampling._verify import check_causal, when_known

_POINTWISE: dict[str, layers.Body] = {
    "softplus": F.softplus,
    "softplus with beta": lambda y: F.softplus(3 * y, beta=2.0, threshold=4.0),
    "clamp": lambda y: y.clamp(-0.5, 0.7),
    "clamp min": lambda y: y.clamp(min=-0.2),
    "clamp max": lambda y: torch.clamp_max(y, 0.3),
    "clamp by channel": lambda y: y.clamp(min=torch.linspace(-1, 0, 8).view(-1, 1, 1), max=torch.tensor(0.5)),
    "relu6": lambda y: F.relu6(6 * y),
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "leaky relu": lambda y: F.leaky_relu(y, 0.1),
    "prelu": lambda y: F.prelu(y, torch.linspace(-1, 1, 8, dtype=y.dtype)),
    "selu": F.selu,
    "celu": F.celu,
    "elu": lambda y: F.elu(y, 0.7),
    "gelu": F.gelu,
    "gelu by tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "softsign": F.softsign,
    "pow 2": lambda y: y**2,
    "pow 3": lambda y: y**3,
    "pow 4": lambda y: y**4,
    "pow 0.5": lambda y: (y**2 + 0.1) ** 0.5,
    "pow -0.5": lambda y: (y**2 + 0.1) ** -0.5,
    "pow -1": lambda y: (y**2 + 0.1) ** -1,
    "pow -2": lambda y: (y**2 + 0.1) ** -2,
    "power of 2": lambda y: 2**y,
    "rsqrt": lambda y: torch.rsqrt(y.abs() + 0.1),
    "number minus": lambda y: 1 - y,
    "number over": lambda y: 3 / (y.exp() + 1),
    "over 255": lambda y: (127 * y) / 255 * 2 - 1,
    "times 2 minus 1": lambda y: y * 2 - 1,
    "add with alpha": lambda y: torch.add(y, y.tanh(), alpha=-0.5),
    "rsub": lambda y: torch.rsub(y, y.tanh(), alpha=2),
    "addcmul": lambda y: torch.addcmul(y, y.tanh(), y.sigmoid(), value=0.3),
    "maximum": lambda y: torch.maximum(y, y.flip(0) * 0 + 0.1),
    "minimum of two": lambda y: torch.minimum(y[:, :4], y[:, 4:]),
    "maximum with a number": lambda y: torch.maximum(y, torch.tensor(0.2)),
    "glu": lambda y: F.glu(y, 1),
    "chunks": lambda y: torch.mul(*y.chunk(2, 1)),
    "three chunks": lambda y: torch.cat(y.chunk(3, 1)[::-1], 1),
    "dropout": lambda y: F.dropout2d(F.dropout(y, 0.5, training=False), 0.5, training=False),
    "erf and abs": lambda y: torch.erf(y).abs(),
}


@pytest.mark.parametrize("name", _POINTWISE)
def test_functions_of_elements(name: str) -> None:
    layers.check(_POINTWISE[name])


_MASK = torch.rand(8, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
_BOX = torch.zeros(5, 6, dtype=torch.bool).index_fill_(0, torch.tensor([1, 2]), True)

_MASKED: dict[str, layers.Body] = {
    "masked fill": lambda y: y.masked_fill(_MASK, -3.0),
    "masked fill in place": lambda y: y.masked_fill_(_MASK[:, :1], 0.0),
    "where number": lambda y: torch.where(_MASK, y, 0.5),
    "where number first": lambda y: torch.where(_MASK, 0.5, y),
    "where map": lambda y: torch.where(_MASK, y, torch.linspace(0, 1, 6, dtype=y.dtype)),
    "where map first": lambda y: torch.where(_BOX, torch.linspace(0, 1, 6, dtype=y.dtype), y),
    "where of two": lambda y: torch.where(_MASK, y, y.tanh()),
    "where box": lambda y: torch.where(_BOX, y, 0.0),
    "where everything": lambda y: torch.where(_BOX | True, y, 0.0),
    "infinite elsewhere": lambda y: torch.where(_MASK, y, y / 0).masked_fill(~_MASK, 1.0),
}


@pytest.mark.parametrize("name", _MASKED)
def test_masks(name: str) -> None:
    layers.check(_MASKED[name])


def test_a_mask_of_rows_is_a_window() -> None:
    """What is masked is not read at all, so that the proof does not count it either."""

    def body(y: Tensor) -> Tensor:
        below = torch.roll(y, -1, 2)  # row r reads row r + 1
        return torch.where(torch.arange(5)[:, None] == 4, below, 0.0) + y

    graph = layers.captured(layers.Around(body))
    check_causal(graph, when_known(graph))
