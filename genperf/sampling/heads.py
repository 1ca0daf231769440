"""Heads: how a value is drawn from what an autoregressive model gives for a pixel.

A *description* (:class:`Categorical`, :class:`Bernoulli`, :class:`Gaussian`, :class:`LogisticMixture`,
:class:`Callback`) tells :func:`genperf.sampling.compile` what the channels of the model's output mean.
:func:`draw` and :func:`make_noise` are what executors do with it; :func:`log_prob` is the likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genperf.sampling import _likelihood
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
    "log_prob",
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

    def reads(self, draw: int, parameters: int) -> list[int]:
        """The channels, of so many parameters, that draw ``draw`` of a pixel may read."""
        classes, stride_class, stride_draw = self._layout()
        if self.draws == 1:
            return list(range(parameters))
        if self.kind == HeadKind.CALLBACK:  # not known; what is there at the last draw is there
            return list(range(parameters)) if draw == self.draws - 1 else []
        count = {HeadKind.CATEGORICAL: classes, HeadKind.GAUSSIAN: 2}.get(self.kind, 1)
        return [k * stride_class + draw * stride_draw for k in range(count)]

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

    Args:
        mixtures: K, at most 65,536.
        image_channels: 1 (grey) or 3 (RGB).
        levels: of the data, evenly spaced over [-1, 1]; only :func:`log_prob` needs it.
    """

    mixtures: int = 10
    image_channels: int = 3
    levels: int = 256

    kind = HeadKind.LOGISTIC_MIXTURE

    def __post_init__(self) -> None:
        _check("LogisticMixture", "mixtures", self.mixtures, 1, MAX_CLASSES)
        _check("LogisticMixture", "levels", self.levels, 2, 1 << 16)
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

    ``span`` tells between which two numbers the values lie, for a model that cannot be run on others;
    :func:`genperf.sampling.compile` runs it on random values.
    """

    function: Callable[[Tensor, Tensor, int], Tensor]
    channels: int = 1
    draw_noises: int = 1
    span: tuple[float, float] | None = None

    kind = HeadKind.CALLBACK

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"Callback: function is {type(self.function).__name__}, expected a callable")
        _check("Callback", "channels", self.channels, 1)
        _check("Callback", "draw_noises", self.draw_noises, 0)
        if self.span is not None and not (len(self.span) == 2 and self.span[0] < self.span[1]):
            raise ValueError(f"Callback: span is {self.span!r}, expected two numbers, the lower one first")

    @property
    def parameters(self) -> None:
        return None

    @property
    def draws(self) -> int:
        return self.channels

    @property
    def noises(self) -> int:
        return self.channels * self.draw_noises


def log_prob(head: Description, params: Tensor, values: Tensor) -> Tensor:
    """Log-likelihood of images, given the network's output for those very images (teacher forcing).

    Args:
        head: any but a callback.
        params: [B, P, ...] with P = ``head.parameters``, or with these channels in two dimensions, as
            [B, classes, channels, ...]. float64 is computed in float64, anything else in float32.
        values: [B, values, ...] as :func:`draw` gives them, or [B, ...] where that is one value a pixel:
            class indices, 0 or 1, floats, or floats in [-1, 1] for a mixture.

    Returns:
        Nats [B], in the precision of the computation; of a density for a Gaussian head.

    Raises:
        TypeError: for a callback head.
        ValueError: if shapes do not fit, or values are outside the head's range.
    """
    if head.parameters is None:
        raise TypeError("log_prob: a callback head has no likelihood")
    batch, positions = len(values), math.prod(values.shape[1:]) // head.values
    wanted = (batch, head.parameters, positions)
    if values.numel() != batch * head.values * positions or params.numel() != math.prod(wanted):
        raise ValueError(
            f"log_prob: params has shape {tuple(params.shape)} and values {tuple(values.shape)}, expected "
            f"[B, {head.parameters}, ...] and [B, {head.values}, ...]"
        )
    params = (params if params.dtype == torch.float64 else params.float()).reshape(wanted)
    values = values.reshape(batch, head.values, positions).to(params.device)
    _check_values(head, values)
    if isinstance(head, Categorical):
        first = head.class_dim == 1
        logits = params.unflatten(1, (head.classes, -1) if first else (-1, head.classes))
        nats = _likelihood.categorical(logits if first else logits.transpose(1, 2), values)
    elif isinstance(head, Bernoulli):
        nats = _likelihood.bernoulli(params, values)
    elif isinstance(head, Gaussian):
        nats = _likelihood.gaussian(params.unflatten(1, (2, -1)), values.to(params.dtype))
    else:
        assert isinstance(head, LogisticMixture)
        x = values.to(params.dtype)
        nats = _likelihood.logistic_mixture(params, x, head.mixtures, head.levels)
    return nats.flatten(1).sum(1, dtype=torch.float64).to(params.dtype)


def _check_values(head: Description, values: Tensor) -> None:
    if isinstance(head, Gaussian):
        return
    if isinstance(head, LogisticMixture):
        expected, low, high = "numbers in -1 to 1", -1, 1
        right = torch.ones_like(values, dtype=torch.bool)
    else:
        low, high = 0, head.classes - 1 if isinstance(head, Categorical) else 1
        expected, right = f"integers in {low} to {high}", values == values.long()
    wrong = ~((values >= low) & (values <= high) & right)
    if wrong.any():
        raise ValueError(f"log_prob: values has {values[wrong][0].item()}, expected {expected}")


def _check(head: str, name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{head}: {name} is {value!r}, expected an integer")
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{head}: {name} is {value}, expected {expected}")
