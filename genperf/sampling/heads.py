"""Heads: how a value is drawn from what an autoregressive model gives for a pixel.

A *description* (:class:`Categorical`, :class:`Bernoulli`, :class:`Gaussian`, :class:`LogisticMixture`,
:class:`Callback`) tells :func:`genperf.sampling.compile` what the channels of the model's output mean.
:func:`draw` and :func:`make_noise` are what executors do with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from genperf.sampling._draw import draw, make_noise, margin
from genperf.sampling._program import FeedbackKind, Head, HeadKind

__all__ = [
    "Bernoulli",
    "Callback",
    "Categorical",
    "Description",
    "Gaussian",
    "LogisticMixture",
    "draw",
    "make_noise",
    "margin",
]

MAX_CLASSES = 1 << 16


class Description:
    """What every head states about a pixel."""

    kind: ClassVar[HeadKind]

    @property
    def parameters(self) -> int | None:
        """Channels of the model's output that are read; None: any number."""
        raise NotImplementedError

    @property
    def draws(self) -> int:
        """Slots: one draw after another, each of which sees the values of those before."""
        return 1

    @property
    def values(self) -> int:
        """Values that are drawn, in all slots together."""
        return self.draws

    @property
    def noises(self) -> int:
        """Random numbers that are used up, in all slots together."""
        return self.draws

    def _layout(self) -> tuple[int, int, int]:
        """classes, stride_class and stride_draw of :class:`genperf.sampling._program.Head`."""
        return 0, 0, 1

    def program(
        self,
        params: int,
        rows: int,
        cols: int,
        feedback: FeedbackKind = FeedbackKind.NONE,
        input: int = -1,
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> Head:
        """What executors read; ``params`` is an operand, ``input`` the buffer that values are fed to."""
        return Head(
            self.kind, params, rows, cols, self.draws, self.values, self.noises, *self._layout(),
            feedback, input, scale, offset,
        )  # fmt: skip


@dataclass(frozen=True)
class Categorical(Description):
    """One of ``classes`` classes for each of ``channels`` image channels; the model gives logits.

    Args:
        classes: 2 to 65,536.
        channels: image channels, drawn one after another in order: a later one may depend on those before.
        class_dim: which dimension numbers the classes where ``channels > 1``: 1 for an output
            [B, classes, channels, H, W], 2 for [B, channels, classes, H, W]; an output
            [B, classes * channels, H, W] is viewed as one of these.

    A class whose weight ``exp((logit - max) / temperature)`` is 0 in float32 is never drawn. Where a
    logit is NaN or +inf, or all are -inf, class 0 is drawn.
    """

    classes: int
    channels: int = 1
    class_dim: int = 1

    kind = HeadKind.CATEGORICAL

    def __post_init__(self) -> None:
        _check("Categorical", "classes", self.classes, 2, MAX_CLASSES)
        _check("Categorical", "channels", self.channels, 1)
        _check("Categorical", "class_dim", self.class_dim, 1, 2)

    @property
    def parameters(self) -> int:
        return self.classes * self.channels

    @property
    def draws(self) -> int:
        return self.channels

    def _layout(self) -> tuple[int, int, int]:
        return (self.classes, self.channels, 1) if self.class_dim == 1 else (self.classes, 1, self.classes)


@dataclass(frozen=True)
class Bernoulli(Description):
    """0 or 1 for each of ``channels`` image channels; the model gives the logit of 1 in channel ``c``.

    Where the logit is NaN, 0 is drawn.
    """

    channels: int = 1

    kind = HeadKind.BERNOULLI

    def __post_init__(self) -> None:
        _check("Bernoulli", "channels", self.channels, 1)

    @property
    def parameters(self) -> int:
        return self.channels

    @property
    def draws(self) -> int:
        return self.channels

    def _layout(self) -> tuple[int, int, int]:
        return 2, 0, 1


@dataclass(frozen=True)
class Gaussian(Description):
    """A normal number for each of ``channels`` image channels: its mean in channel ``c``, the logarithm
    of its standard deviation in channel ``channels + c``. NaN gives NaN.
    """

    channels: int = 1

    kind = HeadKind.GAUSSIAN

    def __post_init__(self) -> None:
        _check("Gaussian", "channels", self.channels, 1)

    @property
    def parameters(self) -> int:
        return 2 * self.channels

    @property
    def draws(self) -> int:
        return self.channels

    def _layout(self) -> tuple[int, int, int]:
        return 0, self.channels, 1


@dataclass(frozen=True)
class LogisticMixture(Description):
    """Discretized mixture of logistics for grey or RGB images in [-1, 1] (T. Salimans et al.,
    "PixelCNN++", ICLR 2017). All image channels are drawn at once.

    Channels of the model's output, with K mixtures: K logits; then for each image channel K means, K
    log-scales (at least -7) and, for RGB, K coefficients, whose tanh is the share in the mean of green of
    red (from the block of red), of blue of red (green's block) and of blue of green (blue's block).
    A sample is a float in [-1, 1], not rounded to a level. NaN, in logits or in what is chosen, gives NaN.
    """

    mixtures: int = 10
    image_channels: int = 3

    kind = HeadKind.LOGISTIC_MIXTURE

    def __post_init__(self) -> None:
        _check("LogisticMixture", "mixtures", self.mixtures, 1, MAX_CLASSES)
        if self.image_channels not in (1, 3):
            raise ValueError(
                f"LogisticMixture: image_channels is {self.image_channels}, expected 1 (grey) or 3 (RGB)"
            )

    @property
    def parameters(self) -> int:
        return self.mixtures + self.image_channels * self._layout()[2]

    @property
    def values(self) -> int:
        return self.image_channels

    @property
    def noises(self) -> int:
        return 1 + self.image_channels

    def _layout(self) -> tuple[int, int, int]:
        return self.mixtures, 1, self.mixtures * (2 if self.image_channels == 1 else 3)


@dataclass(frozen=True)
class Callback(Description):
    """Values that ``function(params [B, P], noise [B, draw_noises], draw) -> values [B]`` gives, where
    ``params`` is the model's output at the pixel, ``noise`` holds uniforms in (0, 1] and ``draw`` numbers
    the image channel.
    """

    function: Callable[[Tensor, Tensor, int], Tensor]
    channels: int = 1
    draw_noises: int = 1

    kind = HeadKind.CALLBACK

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"Callback: function is {type(self.function).__name__}, expected a callable")
        _check("Callback", "channels", self.channels, 1)
        _check("Callback", "draw_noises", self.draw_noises, 0)

    @property
    def parameters(self) -> None:
        return None

    @property
    def draws(self) -> int:
        return self.channels

    @property
    def noises(self) -> int:
        return self.channels * self.draw_noises


def _check(head: str, name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{head}: {name} is {value!r}, expected an integer")
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{head}: {name} is {value}, expected {expected}")
