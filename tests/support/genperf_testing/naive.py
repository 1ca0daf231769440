"""Sampling as users write it: the model called once for each draw."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from genperf import sampling
from genperf.sampling._program import Head
from genperf.sampling.heads import draw, margin
from genperf_testing.models import TinyModel, conditioning

CERTAIN = 1e-5  # a margin of the uniform number that no rounding of the logits bridges


def head_of(tiny: TinyModel) -> sampling.heads.Description:
    channels = tiny.shape[0] if len(tiny.shape) == 3 else 1
    if tiny.head == "logistic_mixture":
        return sampling.LogisticMixture(tiny.model.mixture, channels)
    return sampling.Categorical(tiny.model.classes, channels)


def feedback_of(tiny: TinyModel) -> sampling.Feedback | None:
    if tiny.input == "index":
        return None
    return sampling.Scaled(1 / (tiny.model.classes - 1) if tiny.input == "unit" else 1.0)


def compiled(tiny: TinyModel, images: int = 0, **options) -> sampling.Sampler:
    """A sampler of the model; ``images``: rows of its conditioning, if it takes any."""
    cond = conditioning(tiny, images or 1)
    return sampling.compile(
        tiny.model, tiny.shape, head_of(tiny), feedback=feedback_of(tiny), cond=cond, **options
    )


def encode(tiny: TinyModel, samples: Tensor) -> Tensor:
    if tiny.input == "index":
        return samples.long()
    return samples / (tiny.model.classes - 1) if tiny.input == "unit" else samples.float()


@torch.no_grad()
def parameters(tiny: TinyModel, samples: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """The model's output [B, P, pixels] for samples [B, *shape], in the precision of its weights."""
    dtype = next(tiny.model.parameters()).dtype
    x = encode(tiny, samples)
    x = x.to(dtype) if x.is_floating_point() else x
    cond = {n: t.expand(len(samples), *t.shape[1:]) for n, t in cond.items()}
    out = tiny.model(x, **cond)
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(len(samples), -1, tiny.shape[-1] * (tiny.shape[-2] if len(tiny.shape) > 1 else 1))


def by_pixel(samples: Tensor, head: Head) -> Tensor:
    """Samples [B, *shape] as [B, pixels, values]; a view."""
    return samples.view(len(samples), head.values, -1).transpose(1, 2)


def loop(
    tiny: TinyModel,
    head: Head,
    noise: Tensor,
    cond: Mapping[str, Tensor],
    temperature=1.0,
    top_k=0,
    known=None,
) -> Tensor:
    """Samples float [B, *shape], pixel by pixel."""
    samples = torch.zeros(len(noise), *tiny.shape)
    pixels = by_pixel(samples, head)
    for pixel in range(pixels.shape[1]):
        for d in range(head.draws):
            params = parameters(tiny, samples, cond)[:, :, pixel]
            here = None
            if known is not None:
                here = by_pixel(known[0].float(), head)[:, pixel], by_pixel(known[1], head)[:, pixel]
            u = noise.flatten(1, 2)[:, pixel]
            drawn = draw(head, params, u, temperature, top_k, d, here)
            pixels[:, pixel, d : d + drawn.shape[1]] = drawn.float()
    return samples


def check(
    tiny: TinyModel, head: Head, samples: Tensor, noise: Tensor, cond: Mapping[str, Tensor],
    temperature=1.0, top_k=0, known=None,
) -> None:  # fmt: skip
    """Every value is what the model's own parameters give, teacher forced, unless the choice is uncertain."""
    params = parameters(tiny, samples, cond)
    pixels = by_pixel(samples.float(), head)
    certain = 0
    for pixel in range(pixels.shape[1]):
        for d in range(head.draws):
            u, p = noise.flatten(1, 2)[:, pixel], params[:, :, pixel]
            here = None
            if known is not None:
                here = by_pixel(known[0].float(), head)[:, pixel], by_pixel(known[1], head)[:, pixel]
            wanted = draw(head, p, u, temperature, top_k, d, here).float()
            sure = margin(head, p, u, temperature, top_k, d) > CERTAIN
            actual = pixels[sure, pixel, d : d + wanted.shape[1]]
            torch.testing.assert_close(actual, wanted[sure], rtol=2e-4, atol=2e-4)
            certain += int(sure.sum())
    assert certain > 0.95 * len(samples) * pixels.shape[1] * head.draws


def check_first_difference(
    tiny: TinyModel, head: Head, samples: Tensor, expected: Tensor, noise: Tensor, cond: Mapping[str, Tensor],
    temperature=1.0, top_k=0,
) -> None:  # fmt: skip
    """Samples are the loop's, or first differ where the choice is uncertain."""
    a, b = by_pixel(samples.float(), head), by_pixel(expected, head)
    params = parameters(tiny, expected, cond)
    for image in range(len(a)):
        different = ((a[image] - b[image]).abs() > 1e-3).any(1).nonzero()
        if len(different):
            pixel = int(different[0])
            u, p = noise.flatten(1, 2)[image : image + 1, pixel], params[image : image + 1, :, pixel]
            margins = [margin(head, p, u, temperature, top_k, d).item() for d in range(head.draws)]
            assert min(margins) < CERTAIN, (image, pixel)
