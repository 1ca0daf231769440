"""Glow, the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf.nn.flows._determinants import prepared
from genperf.nn.flows.conv1x1 import InvertibleConv1x1
from genperf.nn.flows.sequence import ReversibleSequence
from genperf.nn.flows.squeeze import Split, Squeeze
from genperf.nn.flows.step import GlowStep
from genperf.ops.philox_random import draw_key, philox_random


class Glow(nn.Module):
    """The multi-scale flow of D. Kingma and P. Dhariwal, arXiv:1807.03039 (figure 2b), in constant memory.

    Each level squeezes, takes its steps as a :class:`ReversibleSequence` and, but for the last, splits half
    of the channels off. All of an image becomes noise that is standard normal where the model fits: half of
    each level under a Gaussian learned from the other half, and the rest of the last under one learned for
    each class.

    Determinants and inverses of all mixing matrices come from one call; on the CPU they are kept until a
    matrix changes.

    Args:
        shape: (C, H, W) of the images; H and W divisible by 2 ** levels.
        levels: L.
        steps: K, steps of each level.
        hidden: channels of the coupling networks.
        classes: how many, or None for an unconditional model.
        permutation: of the 1x1 convolutions: "dense" or "plu".
        reversible: whether training rebuilds activations; each sequence's attribute ``reversible`` may be
        set.
        check_reconstruction, fallback, segment: of :class:`ReversibleSequence`.
        options: further ones of :class:`GlowStep`, such as ``scale="additive"``.

    Raises:
        ValueError, TypeError: for arguments that do not fit, here and in the calls; the message says which.
        RuntimeError: in evaluation and sampling, before a batch in training mode or a state_dict has
            initialised the activation normalization.
    """

    def __init__(
        self, shape: Sequence[int], levels: int = 3, steps: int = 32, hidden: int = 512, *,
        classes: int | None = None, permutation: str = "dense", reversible: bool = True,
        check_reconstruction: float | None = 1e-2, fallback: str = "store", segment: int | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in {"levels": levels, "steps": steps, "hidden": hidden, "classes": classes}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        if len(shape) != 3 or any(s % 2**levels or s < 1 for s in shape[1:]) or shape[0] < 1:
            raise ValueError(
                f"shape is {tuple(shape)} with levels={levels}, expected (C, H, W) with H and W divisible by "
                f"{2**levels}"
            )
        self.shape, self.classes = tuple(shape), classes
        channels, height, width = shape
        self.latent_shapes: list[tuple[int, int, int]] = []
        sequences: list[nn.Module] = []
        splits: list[nn.Module] = []
        for level in range(levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            made = [
                GlowStep(channels, hidden=hidden, permutation=permutation, **options) for _ in range(steps)
            ]
            sequences.append(
                ReversibleSequence(
                    made, reversible=reversible, check_reconstruction=check_reconstruction, fallback=fallback,
                    segment=segment,
                )
            )  # fmt: skip
            if level < levels - 1:
                splits.append(Split(channels))
                channels //= 2
            self.latent_shapes.append((channels, height, width))
        self.squeeze = Squeeze()
        self.levels, self.splits = nn.ModuleList(sequences), nn.ModuleList(splits)
        self.prior = nn.Parameter(
            torch.zeros(classes or 1, 2 * channels)
        )  # [mean, log of the deviation] of the rest
        self._dense = tuple(
            m for m in self.modules() if isinstance(m, InvertibleConv1x1) and permutation == "dense"
        )

    @property
    def n_dims(self) -> int:
        """C H W."""
        return math.prod(self.shape)

    def _prior(self, n: int, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log of the standard deviation, [B, C, 1, 1] each, of the last level's channels."""
        if (labels is None) != (self.classes is None):
            raise ValueError(
                f"labels is {'None' if labels is None else 'given'} for a model with classes={self.classes}, "
                f"expected {'none' if labels is not None else 'a class for each sample'}"
            )
        if labels is None:
            rows = self.prior.expand(n, -1)
        else:
            if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
                got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
                raise TypeError(f"labels is {got}, expected an int64 tensor")
            if labels.shape != (n,):
                raise ValueError(f"labels has shape {tuple(labels.shape)}, expected ({n},)")
            rows = F.embedding(labels, self.prior)
        mean, log_std = rows[:, :, None, None].chunk(2, dim=1)
        return mean, log_std

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Images to noise.

        Args:
            x: [B, C, H, W], a floating dtype.
            labels: int64 [B], of a model with classes.

        Returns:
            The noise of each level, of shapes [B, *latent_shapes[i]], and the log-determinant [B].
        """
        if not isinstance(x, Tensor) or x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"Glow: x is {got}, expected shape (B, {', '.join(map(str, self.shape))})")
        mean, log_std = self._prior(x.shape[0], labels)
        latents, total = [], torch.zeros((), device=x.device)
        with prepared(self._dense):
            for level, sequence in enumerate(self.levels):
                x, _ = self.squeeze(x)
                x, logdet = sequence(x)
                total = total + logdet
                if level < len(self.splits):
                    (x, noise), logdet = self.splits[level](x)
                    latents.append(noise)
                    total = total + logdet
        latents.append((x - mean) * (-log_std).exp())
        return tuple(latents), total - log_std.sum((1, 2, 3)) * x.shape[2:].numel()

    def inverse(self, latents: Sequence[Tensor], labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise, as :meth:`forward` returns it, to images [B, C, H, W], and the log-determinant [B] of
        this."""
        shapes = [tuple(t.shape[1:]) for t in latents]
        if shapes != self.latent_shapes:
            raise ValueError(
                f"Glow: latents have shapes {shapes}, expected {self.latent_shapes}, each with a batch"
            )
        n = latents[0].shape[0]
        mean, log_std = self._prior(n, labels)
        x = latents[-1] * log_std.exp() + mean
        total = log_std.sum((1, 2, 3)) * x.shape[2:].numel()
        with prepared(self._dense):
            for level in reversed(range(len(self.levels))):
                if level < len(self.splits):
                    x, logdet = self.splits[level].inverse(x, latents[level])  # type: ignore[operator]
                    total = total + logdet
                x, logdet = self.levels[level].inverse(x)  # type: ignore[operator]
                x, _ = self.squeeze.inverse(x)
                total = total + logdet
        return x, total

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-density [B], in nats, of images [B, C, H, W]."""
        latents, logdet = self(x, labels)
        squares = sum(noise.flatten(1).square().sum(1) for noise in latents)
        return logdet - 0.5 * (squares + self.n_dims * math.log(2 * math.pi))

    def bits_per_dim(self, x: Tensor, labels: Tensor | None = None, *, bins: int = 256) -> Tensor:
        """Bits for each number, [B], of images with noise in their bins of width ``1 / bins``.

        As :func:`dequantize` makes them; the mean over samples is an upper bound of that of the discrete
        images (L. Theis et al., arXiv:1511.01844, section 3.1).
        """
        return (math.log(bins) - self.log_prob(x, labels) / self.n_dims) / math.log(2)

    def sample(
        self, n: int, temperature: float | Tensor = 1.0, labels: Tensor | None = None, *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None, key: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Images [n, C, H, W] drawn without gradients.

        Args:
            n: how many.
            temperature: the noise is multiplied by it; a tensor [] or [n] is taken too.
            labels: int64 [n], of a model with classes.
            generator: torch's, or one for each image; None for the default one of the model's device.
            key: int64 [2], or [n, 2] for a key an image, in place of a generator: see
                :func:`philox_random`. An image with a key of its own does not depend on the others.

        Raises:
            ValueError, TypeError, RuntimeError: see the class; and for both a generator and a key.
        """
        if generator is not None and key is not None:
            raise ValueError("generator and key are given, expected one of them at most")
        with torch.no_grad():
            key = draw_key(self.prior.device, generator) if key is None else key
            noise = philox_random((n, self.n_dims), key)
            if isinstance(temperature, Tensor):
                temperature = temperature.reshape(-1, 1)
            noise = noise.to(self.prior.dtype) * temperature
            parts = noise.split([math.prod(shape) for shape in self.latent_shapes], dim=1)
            latents = [part.reshape(n, *s) for part, s in zip(parts, self.latent_shapes, strict=True)]
            return self.inverse(latents, labels)[0]


def dequantize(images: Tensor, bins: int = 256, *, generator: torch.Generator | None = None) -> Tensor:
    """Integers 0 to 255 as numbers of [-0.5, 0.5) in ``bins`` bins, with uniform noise within the bin.

    Args:
        images: uint8, any shape.
        bins: a power of two up to 256; fewer keep the upper bits, as Glow's 5-bit images do.
        generator: for the noise; None for the default one of the images' device.

    Returns:
        float32, the shape of ``images``.

    Raises:
        TypeError: for another dtype.
        ValueError: for another number of bins.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"dequantize: images is {images.dtype}, expected uint8")
    if bins not in tuple(2**i for i in range(1, 9)):
        raise ValueError(f"dequantize: bins is {bins!r}, expected a power of two from 2 to 256")
    noise = philox_random(images.shape, draw_key(images.device, generator), "uniform")
    noise = (
        (noise * 2**15).ceil() - 0.5
    ) * 2**-15  # few enough bits that no sum is rounded into the next bin
    return ((images // (256 // bins)).float() + noise) / bins - 0.5
