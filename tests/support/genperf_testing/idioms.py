"""Small models that do as public code does where a plain definition would not, for captures to see through.

Each is a ``TinyModel`` from :func:`idiom`. Those of ``CAUSAL`` can be sampled from; those of ``NOT_CAUSAL``
look at the future, and those of ``NOT_RECORDABLE`` take a path that depends on the pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from genperf.nn import autoregressive as ar
from genperf_testing.models import TinyModel, randomise


class _MaskedInPlace(nn.Conv2d):
    """The mask is written into the weights at each call."""

    def __init__(self, mask_type: str, *args: int) -> None:
        super().__init__(*args)
        self.mask_type = mask_type
        self.register_buffer("mask", ar.MaskedConv2d(*args[:3], mask_type=mask_type).mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class _MaskedInPlaceNet(nn.Sequential):
    classes = 5

    def __init__(self) -> None:
        super().__init__(
            _MaskedInPlace("A", 1, 6, 5, 1, 2),
            nn.BatchNorm2d(6),
            nn.ReLU(True),
            _MaskedInPlace("B", 6, 6, 3, 1, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(True),
            nn.Conv2d(6, 5, 1),
        )


class _ZeroedTaps(nn.Module):
    """Taps zeroed through ``.data`` before the hook of ``weight_norm`` computes the weight from them.

    The input becomes one-hot by ``F.one_hot``, which reads the largest index on the host; the output is a
    tuple, as of samplers with a cache.
    """

    classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.above = weight_norm(nn.Conv2d(5, 8, (2, 3)))
        self.left = weight_norm(nn.Conv2d(5, 8, (2, 2)))
        self.conv = weight_norm(nn.Conv2d(8, 16, 3))
        self.out = weight_norm(nn.Conv2d(8, 5, 1))

    def forward(self, x: Tensor, cache: dict | None = None) -> tuple[Tensor, dict]:
        height, width = x.shape[1:]
        one_hot = F.one_hot(x, self.classes).permute(0, 3, 1, 2).type_as(self.out.bias)
        above = F.pad(self.above(F.pad(one_hot, [1, 1, 1, 0])), [0, 0, 1, 0])[:, :, :height, :]
        left = F.pad(self.left(F.pad(one_hot, [1, 0, 1, 0])), [1, 0, 0, 0])[:, :, :, :width]
        y = above + left
        self.conv.weight_v.data[:, :, -1, 1:].zero_()
        out = F.glu(self.conv(F.pad(F.elu(y), [1, 1, 2, 0])), 1)
        out += y
        return self.out(F.elu(out, inplace=True)), cache or {}


class _OverlappingViews(nn.Module):
    """Adds in place to a view that overlaps the one that is handed on, so that this sees the addition."""

    classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 6)
        self.v_conv = nn.Conv2d(6, 6, (2, 3), padding=(2, 1))
        self.v_fc = nn.Conv2d(6, 6, 1)
        self.h_conv = nn.Conv2d(6, 6, (1, 2))
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x.view(-1)).view((*x.size(), -1)).permute(0, 3, 1, 2)
        rows = self.v_conv(y)
        current, above = rows[:, :, 1:-2], rows[:, :, :-3]
        current += self.v_fc(y)
        left = self.h_conv(F.pad(y, (2, 0))[:, :, :, :-1])
        left += above
        return self.out(torch.tanh(left))


class _OnesAndShifts(nn.Module):
    """A channel of ones by padding, a shift by ``cat``, a linear layer over pixels flattened to rows."""

    classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.down = parametrizations.weight_norm(nn.Conv2d(2, 6, (2, 3)))
        self.right = parametrizations.weight_norm(nn.Conv2d(2, 6, (1, 2)))
        self.nin = parametrizations.weight_norm(nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=1)
        down = nn.ZeroPad2d((0, 0, 1, 0))(self.down(nn.ZeroPad2d((1, 1, 1, 0))(x))[:, :, :-1])
        right = self.right(nn.ZeroPad2d((1, 0, 0, 0))(x))
        right = torch.cat([torch.zeros_like(right[:, :, :, :1]), right[:, :, :, :-1]], 3)
        y = down + right
        y = F.elu(torch.cat([y, -y], dim=len(y.size()) - 3))
        b, c, h, w = (int(size) for size in y.size())
        y = self.nin(y.permute(0, 2, 3, 1).contiguous().view(b * h * w, c)).view(b, h, w, 4)
        return y.permute(0, 3, 1, 2)


class _EmptyRowOfTheMask(nn.Module):
    """Attention whose first pixel has nothing before it: a softmax over equal scores sees every pixel."""

    classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 6)
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embedding(x.flatten(1))).chunk(3, dim=2)
        score = q @ k.transpose(1, 2)
        mask = torch.tril(torch.ones_like(score[0]), diagonal=-1)
        weight = F.softmax(score.masked_fill(mask == 0, -1e10), -1)
        return self.out(weight @ v).transpose(1, 2).unflatten(2, x.shape[1:])


class _FutureTap(nn.Sequential):
    """The first mask is "B": a pixel sees itself."""

    classes = 4

    def __init__(self) -> None:
        first = ar.MaskedConv2d(1, 6, 3, mask_type="B")
        super().__init__(first, nn.ReLU(), ar.MaskedConv2d(6, 4, 3, mask_type="B"))


class _MeanOfTheMap(nn.Module):
    """Normalises by the mean of the whole map, future included."""

    classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = ar.MaskedConv2d(1, 4, 3, mask_type="A")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y - y.mean(dim=(2, 3), keepdim=True)


class _PathByValue(nn.Module):
    """Branches on the largest pixel."""

    classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = ar.MaskedConv2d(1, 4, 3, mask_type="A")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if x.max() > 2 else torch.tanh(y)


_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "masked_in_place": (_MaskedInPlaceNet, (1, 6, 7), "raw"),
    "zeroed_taps": (_ZeroedTaps, (5, 6), "index"),
    "overlapping_views": (_OverlappingViews, (6, 5), "index"),
    "ones_and_shifts": (_OnesAndShifts, (1, 5, 6), "raw"),
    "empty_row_of_the_mask": (_EmptyRowOfTheMask, (4, 5), "index"),
    "future_tap": (_FutureTap, (1, 5, 6), "raw"),
    "mean_of_the_map": (_MeanOfTheMap, (1, 5, 6), "raw"),
    "path_by_value": (_PathByValue, (1, 5, 6), "raw"),
}
CAUSAL = ("masked_in_place", "zeroed_taps", "overlapping_views", "ones_and_shifts")
NOT_CAUSAL = ("empty_row_of_the_mask", "future_tap", "mean_of_the_map")
NOT_RECORDABLE = ("path_by_value",)


def idiom(name: str, seed: int = 0) -> TinyModel:
    """The model of that name, float32, on the CPU, in eval mode, its weights drawn from ``seed``."""
    build, shape, kind = _MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # of weight_norm by hooks, which is in use all the same
        model = build()
    return TinyModel(randomise(model, seed), shape, kind, "categorical")
