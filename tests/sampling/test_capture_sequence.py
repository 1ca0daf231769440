"""Images flattened to a sequence, cut and shifted in raster order, as transformers over pixels do."""

import itertools

import numpy as np
import pytest
import torch
from genperf_testing import graphs, layers
from genperf_testing.models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from genperf.sampling._aten.sequence import raster_windows
from genperf.sampling._errors import CaptureError, CausalityError
from genperf.sampling._graph import capture
from genperf.sampling._verify import check_causal, when_known, windowed


@pytest.mark.parametrize(("rows", "cols"), [(3, 4), (4, 1), (1, 5), (2, 2)])
def test_windows_read_each_cell_once(rows: int, cols: int) -> None:
    cells = np.arange(rows * cols).reshape(rows, cols)
    for start, end in itertools.combinations(range(rows * cols + 1), 2):
        for at in range(rows * cols - (end - start) + 1):
            expected = np.full(rows * cols, -1)
            expected[at : at + end - start] = np.arange(start, end)
            windows = list(raster_windows(rows, cols, start - at, start, end - start))
            read = np.stack([windowed(cells, w, rows, cols).ravel() for w in windows])
            assert ((read >= 0).sum(0) <= 1).all()
            assert (read.max(0) == expected).all()
            if start == 0 and end == rows * cols - at:  # the usual shift
                assert len(windows) <= 2


def test_a_shift_by_one_is_two_windows() -> None:
    assert len(list(raster_windows(8, 8, -1, 0, 63))) == 2


def _start_token(y: Tensor) -> Tensor:
    flat = y.flatten(2).transpose(1, 2)
    start = torch.linspace(-1, 1, 8, dtype=y.dtype).expand(2, 1, 8)
    return torch.cat([start, flat[:, :-1]], 1).transpose(1, 2).unflatten(2, (5, 6))


def _two_cuts(y: Tensor) -> Tensor:
    flat = y.flatten(2)
    shifted = torch.cat([torch.zeros_like(flat[..., :9]), flat, flat], 2)[..., :40][..., :30]
    return shifted.view_as(y)


def _two_tensors(y: Tensor) -> Tensor:
    flat, other = y.flatten(2), y.tanh().flatten(2)
    return torch.cat([other[..., :13], flat[..., 12:20], other[..., 5:14]], 2).view_as(y)


def _written(y: Tensor) -> Tensor:
    flat = y.flatten(2)
    out = torch.full_like(flat, 0.5)
    out[..., 2:] = flat[..., :-2]
    out[..., 17:20] = 1.0
    return out.view_as(y)


_CAUSAL: dict[str, layers.Body] = {
    "start token": _start_token,
    "padded": lambda y: F.pad(y.flatten(2), (1, -1)).view_as(y),
    "padded with ones": lambda y: F.pad(y.flatten(2), (8, -8), value=1.0).view_as(y),
    "cropped, then padded": lambda y: F.pad(F.pad(y.flatten(2), (-3, -4)), (7, 0)).view_as(y),
    "two cuts": _two_cuts,
    "two tensors": _two_tensors,
    "written": _written,
    "one cell": lambda y: torch.cat([y.flatten(2)[..., :1], y.flatten(2)[..., :-1]], 2).view_as(y),
}


@pytest.mark.parametrize("name", _CAUSAL)
def test_runs_of_cells(name: str) -> None:
    layers.check(_CAUSAL[name])


def test_a_roll_brings_the_last_pixel() -> None:
    graph = layers.captured(layers.Around(lambda y: y.flatten(2).roll(1, 2).view_as(y)))
    with pytest.raises(CausalityError, match="looks at the future"):
        check_causal(graph, when_known(graph))


def test_a_shift_to_the_left_is_refused() -> None:
    graph = layers.captured(layers.Around(lambda y: F.pad(y.flatten(2), (-1, 1)).view_as(y)))
    with pytest.raises(CausalityError, match="looks at the future"):
        check_causal(graph, when_known(graph))


@pytest.mark.parametrize(
    "body",
    [
        lambda y: y.flatten(2)[..., :-1].tanh(),
        lambda y: y.flatten(2)[..., 1:].transpose(1, 2),
        lambda y: y.flatten(2)[..., 3],
        lambda y: y.flatten(2)[..., 1:],
    ],
)
def test_what_is_left_as_a_run_is_named(body: layers.Body) -> None:
    with pytest.raises(CaptureError, match="of the image's 30 cells in a row"):
        layers.captured(layers.Around(body))


class _Transformer(nn.Module):
    """Pixels as a sequence [cells, images, channels], shifted by a start token."""

    classes, width = 5, 8

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(self.classes, self.width)
        self.position = nn.Embedding(20, self.width)
        self.start = nn.Parameter(torch.zeros(self.width))
        layer = nn.TransformerEncoderLayer(self.width, 2, 12, activation="gelu", norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, self.classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x.flatten(1).t())
        h = torch.cat([self.start.expand(1, len(x), -1), h[:-1]])
        h = h + self.position(torch.arange(len(h)))[:, None]
        mask = torch.full((len(h), len(h)), -torch.inf, dtype=h.dtype).triu(1)
        h = self.norm(self.layers(h, mask=mask, is_causal=True))
        return self.head(h).permute(1, 2, 0).unflatten(2, x.shape[1:])


def test_a_transformer_over_pixels() -> None:
    model = randomise(_Transformer()).double()
    rng = torch.Generator().manual_seed(0)
    x, other, third = (torch.randint(5, (2, 4, 5), generator=rng) for _ in range(3))
    graph = capture(model, x, other, 5)
    check_causal(graph, when_known(graph))
    with torch.no_grad():
        out = model(third)
    got = graphs.evaluate(graph, third[..., None]).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, out, rtol=1e-11, atol=1e-11)
