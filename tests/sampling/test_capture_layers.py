"""Layers that models are made of: each computes in the graph what it does in torch."""

from collections.abc import Callable

import pytest
import torch
from genperf_testing import layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from genperf.sampling._errors import CaptureError, CausalityError
from genperf.sampling._verify import check_causal, when_known

_CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: nn.Conv2d(8, 12, (2, 3), padding=(2, 1), groups=4),
    "depthwise": lambda: nn.Conv2d(8, 16, (3, 2), padding=(2, 1), groups=8),
    "dilated": lambda: nn.Conv2d(8, 4, (2, 2), padding=(4, 2), dilation=(4, 2)),
    "strided and transposed": lambda: nn.Sequential(
        nn.Conv2d(8, 6, (2, 1), padding=(1, 0), stride=2), nn.ConvTranspose2d(6, 6, 2, stride=2)
    ),
    "grouped transposed": lambda: nn.ConvTranspose2d(8, 12, (3, 1), groups=2, dilation=(2, 1)),
    "depthwise transposed": lambda: nn.ConvTranspose2d(8, 8, (2, 2), groups=8),
    "weight norm by hooks": lambda: weight_norm(nn.Conv2d(8, 5, 1)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 5, 1)),
    "weight norm of a transposed one": lambda: parametrizations.weight_norm(nn.ConvTranspose2d(8, 5, 1)),
    "spectral norm by hooks": lambda: spectral_norm(nn.Conv2d(8, 5, 1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 5, 1)),
    "batch norm": lambda: nn.BatchNorm2d(8),
    "batch norm without scale": lambda: nn.BatchNorm2d(8, affine=False),
    "instance norm with running statistics": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "zero padding": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(8, 4, (3, 2))),
    "padding with a constant": lambda: nn.Sequential(
        nn.ConstantPad2d((1, 0, 2, 0), 0.7), nn.Conv2d(8, 4, (3, 2))
    ),
    "crop by padding": lambda: nn.Sequential(nn.Conv2d(8, 4, 3, padding=3), nn.ZeroPad2d((-1, -3, -1, -3))),
    "same padding": lambda: nn.Conv2d(8, 4, 1, padding="same"),
}


class _Cropped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, y: Tensor) -> Tensor:
        return self.layer(y)[:, :, :5, :6]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", _CONVOLUTIONS)
def test_convolutions_and_their_weights(name: str) -> None:
    layers.check(_Cropped(_CONVOLUTIONS[name]()))


def test_channels_of_a_product() -> None:
    """Linear layers on the last dimension, einsum, 1-D convolutions over rows."""
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layers.check(lambda y: (y.permute(0, 2, 3, 1) @ weight).permute(0, 3, 1, 2))
    layers.check(lambda y: torch.einsum("bchw,co->bohw", y, weight))
    layers.check(lambda y: torch.matmul(weight.t(), y.flatten(2)).unflatten(2, (5, 6)))
    layers.check(
        lambda y: (
            F.linear(y.permute(0, 2, 3, 1).reshape(-1, 8), weight.t()).view(2, 5, 6, 4).permute(0, 3, 1, 2)
        )
    )


# normalisation over channels


class _ChannelsLast(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, y: Tensor) -> Tensor:
        return self.layer(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_NORMS: dict[str, Callable[[], layers.Body]] = {
    "layer norm": lambda: _ChannelsLast(nn.LayerNorm(8)),
    "layer norm without scale": lambda: _ChannelsLast(nn.LayerNorm(8, elementwise_affine=False)),
    "rms norm": lambda: _ChannelsLast(nn.RMSNorm(8, eps=1e-5)),
    "mean": lambda: lambda y: y - y.mean(1, keepdim=True),
    "mean without the dimension": lambda: lambda y: y - y.mean(1)[:, None],
    "sum": lambda: lambda y: y.sum(dim=1, keepdim=True) * y,
    "variance": lambda: lambda y: y / (y.var(dim=1, keepdim=True) + 1e-5).sqrt(),
    "biased variance": lambda: lambda y: y / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    "standard deviation": lambda: lambda y: y / y.std(dim=1, keepdim=True),
    "variance and mean": lambda: lambda y: torch.stack(torch.var_mean(y, dim=1), 1),
    "unit vectors": lambda: lambda y: F.normalize(y, dim=1),
    "norm 1": lambda: lambda y: y / y.norm(p=1, dim=1, keepdim=True),
    "groups of channels": lambda: lambda y: _grouped(y),
    "size of one": lambda: lambda y: y * y[:, :1].mean(1, keepdim=True),
}


def _grouped(y: Tensor) -> Tensor:
    y = y.unflatten(1, (2, 4))
    return ((y - y.mean(2, keepdim=True)) * y.std(2, keepdim=True)).flatten(1, 2)


@pytest.mark.parametrize("name", _NORMS)
def test_normalisation_over_channels_is_causal(name: str) -> None:
    layers.check(_NORMS[name]())


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 8),
        nn.LayerNorm([8, 5, 6]),
        nn.LayerNorm(6),
        lambda y: y.cumsum(3),
        lambda y: y.flip(3),
        lambda y: y.roll(-1, 2),
    ],
)
def test_what_looks_at_the_whole_map_is_not(layer: layers.Body) -> None:
    graph = layers.captured(layers.Around(layer))
    with pytest.raises(CausalityError, match="looks at the future"):
        check_causal(graph, when_known(graph))


# shapes, positions, resolution

_COLUMNS = torch.linspace(-1, 1, 6, dtype=torch.float64)

_SHAPES: dict[str, layers.Body] = {
    "shift down": lambda y: F.pad(y, (0, 0, 1, 0))[:, :, :-1],
    "shift by cat": lambda y: torch.cat([torch.zeros_like(y[..., :2]), y[..., :-2]], -1),
    "shift by cat of something": lambda y: torch.cat([torch.ones_like(y[..., :2]), y[..., :-2]], -1),
    "rows from two tensors": lambda y: torch.cat([y.tanh()[:, :, :2], y[:, :, 2:3], y.exp()[:, :, 3:]], 2),
    "roll, then zero": lambda y: y.roll(1, 3).masked_fill(_COLUMNS < -0.9, 0),
    "padding of channels": lambda y: F.pad(y, (0, 0, 0, 0, 1, 2), value=0.5),
    "crop of channels": lambda y: F.pad(y, (0, 0, 0, 0, -1, -2)),
    "padding with ones": lambda y: F.pad(y, (2, 0, 1, 0), value=1.0)[:, :, :-1, :-2],
    "pad by the largest number": lambda y: F.pad(y, (2, 0), value=-1e30)[..., :6].clamp(min=-1),
    "added positions": lambda y: y + torch.linspace(-1, 1, 240, dtype=y.dtype).view(1, 8, 5, 6),
    "coordinate channels": lambda y: torch.cat(
        [y, _COLUMNS.expand(2, 1, 5, 6), _COLUMNS.expand(2, 1, 5, 6)], 1
    ),
    "upsampling": lambda y: F.conv2d(
        F.interpolate(y[:, :, ::1], scale_factor=2), torch.ones(1, 8, 2, 2).to(y), stride=2
    ),
    "two channel dimensions": lambda y: y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "cat of inner channels": lambda y: torch.cat(
        [y.unflatten(1, (4, 2)), y.tanh().unflatten(1, (4, 2))], 2
    ).flatten(1, 2),
    "stack of inner channels": lambda y: torch.stack([y, y.exp(), y.neg()], 2).flatten(1, 2),
    "expanded channel": lambda y: y[:, :1].expand(-1, 5, -1, -1) + y[:, 3:],
    "pixel unshuffle and shuffle": lambda y: F.pixel_shuffle(
        _downward(F.pixel_unshuffle(F.pad(y, (0, 0, 1, 0)), 2)), 2
    )[:, :, :5],
    "channels by number": lambda y: y[:, [2, 3, 0, 0, -1]],
    "channels by a mask": lambda y: y[:, torch.arange(8) % 3 == 0],
    "reversed channels": lambda y: y.flip(1),
    "repeated channels": lambda y: y.repeat(1, 2, 1, 1) * y[:, :2].repeat(1, 8, 1, 1),
    "channel shuffle": lambda y: y.view(2, 2, 4, 5, 6).transpose(1, 2).reshape(2, 8, 5, 6),
    "flattened to a sequence": lambda y: (
        torch.relu(y.flatten(2).transpose(1, 2)).transpose(1, 2).view(2, 8, 5, 6)
    ),
}


def _downward(y: Tensor) -> Tensor:
    return F.pad(y, (0, 0, 1, 0))[:, :, :-1]


@pytest.mark.parametrize("name", _SHAPES)
def test_shapes_and_positions(name: str) -> None:
    layers.check(_SHAPES[name])


def test_upsampling_repeats_cells() -> None:
    """Of a coarser map, as in the upward half of a U-shaped network."""

    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(8, 6, 2, padding=(2, 2), stride=2)
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, y: Tensor) -> Tensor:
            coarse = self.down(y)[:, :, :-1, :-1]
            return self.up(coarse)[:, :, :5, :6]

    model = layers.Around(Coarse())
    layers.assert_same(layers.captured(model), model)


class _Noise(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y + torch.randn_like(y)


_WEIGHTS = torch.linspace(-1, 1, 16, dtype=torch.float64).view(2, 8)

_REFUSED: dict[str, tuple[layers.Body, str]] = {
    "weights of each image": (
        lambda y: F.conv2d(y.reshape(1, 16, 5, 6), torch.ones(16, 1, 1, 1).to(y), groups=16).view(2, 8, 5, 6),
        "expects images",
    ),
    "matrices of each image": (lambda y: torch.bmm(_WEIGHTS[:, None], y.flatten(2)), "differs by image"),
    "weights from pixels": (lambda y: F.conv2d(y, y), "weight depends on the sampled pixels"),
    "instance norm": (nn.InstanceNorm2d(8), "call model.eval"),
    "pooling of the map": (lambda y: y * F.adaptive_avg_pool2d(y, 1), "reduction over rows, columns"),
    "largest channel": (lambda y: y - y.amax(1, keepdim=True), "aten.amax"),
    "softmax over classes": (lambda y: F.softmax(y, 1), "return logits"),
    "log-softmax over classes": (lambda y: F.log_softmax(y, 1), "return logits"),
    "random numbers": (_Noise(), "draws random numbers"),
    "rows by number": (lambda y: y[:, :, [0, 0, 1, 2, 3]], "use slices"),
    "places by number": (lambda y: y[:, [0, 1], :, [2, 3]], "more than one list"),
    "repeated rows": (lambda y: y[:, :, :1].repeat(1, 1, 5, 1), "over images, rows or columns"),
    "rounding": (lambda y: y.round(), "aten.round"),
    "integers": (lambda y: y.long().to(y), "rounds an input-dependent tensor"),
    "odd powers": (lambda y: y.abs() ** 1.7, "power 1.7"),
    "upsampling by a fraction": (lambda y: F.interpolate(y, size=(7, 9)), "one whole factor"),
    "variance of one channel": (lambda y: y[:, :1].var(1), "single channel"),
}


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("name", _REFUSED)
def test_what_has_no_incremental_form_is_named(name: str) -> None:
    body, why = _REFUSED[name]
    with pytest.raises(CaptureError, match=why):
        layers.captured(layers.Around(body))
