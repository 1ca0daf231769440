"""diffusers' VQModel, an autoencoder with a codebook, on photos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from _common import (
    Outcome,
    backward,
    crops,
    peak_bytes,
    photos,
    psnr,
    race,
    save_picture,
    train,
)
from diffusers import VQModel
from torch import Tensor, nn

import genperf

TITLE = "diffusers VQModel, photos"
CODEWORDS = 2048
STEPS = 250  # without a codebook, and again with one


def loss(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return (output.sample - x).square().mean() + output.commit_loss.mean()


def without_codebook(model: nn.Module, x: Tensor) -> Tensor:
    reconstruction = model.decode(model.encode(x).latents, force_not_quantize=True).sample
    return (reconstruction - x).square().mean()


def build() -> VQModel:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=CODEWORDS,
        norm_num_groups=1,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def choose_codewords(model: VQModel, images: Tensor) -> None:
    """Latents of ``images`` as codewords: a short training would not find them from where they start."""
    latents = model.encode(images).latents.movedim(1, -1).flatten(0, -2)
    chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:CODEWORDS]
    model.quantize.embedding.weight.copy_(latents[chosen])


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    images, unseen = photos()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        while True:
            yield crops(images, 6, 24, generator)

    original = build()
    train(original, without_codebook, batches(), STEPS, 3e-3)
    choose_codewords(original, crops(images, 16, 64, generator))
    fast = deepcopy(original)
    report = genperf.accelerate(fast, mode="training")
    print(report)
    outcome.require(report.accelerated, "nothing was accelerated")
    outcome.require(not report.left_alone, "something was left alone")
    verification = report.verify(next(batches()), call=loss, seconds=0)
    print(f"\n{verification}\n")
    outcome.require(verification, "the accelerated model does not agree with the original in float64")
    codes_of_both(outcome, original, fast, original.encode(crops(images, 16, 64, generator)).latents)
    steps = len(train(fast, loss, batches(), STEPS, 2e-3))
    original.load_state_dict(fast.state_dict())  # trajectories part where two codewords are about as near
    with torch.no_grad():
        latents = fast.encode(unseen[None]).latents
        reconstruction = fast.decode(latents).sample[0]
    codes = codes_of_both(outcome, original, fast, latents)
    quality, used = psnr(reconstruction, unseen, peak=2), codes.unique().numel()
    print(f"  trained for {steps} steps; a photo kept out of training is reconstructed at {quality:.1f} dB\n")
    outcome.picture = output / "vq_model.png"
    panels = {
        "a photo kept out of training": shown(unseen),
        f"its codes, {used} different ones": map_of(codes.view(latents.shape[-2:]), original),
        f"its reconstruction, {quality:.1f} dB": shown(reconstruction),
    }
    save_picture(outcome.picture, f"{TITLE}: {steps} training steps, accelerated", panels)

    crop = crops(images, 8, 64, generator)
    with torch.no_grad():
        latents = fast.encode(crop).latents
    models = (original, fast)
    print(f"  {'':<34}{'original':>12}{'accelerated':>20}")
    shape = list(latents.shape)
    outcome.timings += [
        race(f"codes, {shape}", *[evaluating(model.quantize, latents) for model in models], seconds=2),
        race(f"quantizer trained, {shape}", *[backward(of_quantizer(m, latents)) for m in models], seconds=2),
        race("training step, 8 photos 64x64", *[backward(lambda m=m: loss(m, crop)) for m in models]),
    ]
    before, after = (peak_bytes(backward(of_quantizer(model, latents))) / 2**20 for model in models)
    print(f"  peak memory of the trained quantizer: {before:.0f} MiB originally, {after:.1f} MiB accelerated")
    outcome.require(after < before / 4, "the quantizer takes more memory than it should")
    return outcome


@torch.no_grad()
def codes_of_both(outcome: Outcome, original: VQModel, fast: VQModel, latents: Tensor) -> Tensor:
    """The codes after acceleration, which may differ from those before only where they are nearer."""
    before, after = (model.quantize(latents)[2][2] for model in (original, fast))
    x, words = latents.movedim(1, -1).flatten(0, -2).double(), fast.quantize.embedding.weight.double()
    differ = before != after
    near, far = ((x - words[codes]).norm(dim=1)[differ] for codes in (after, before))
    farther = f", codewords {(far / near - 1).median():.0e} farther away" if differ.any() else ""
    print(f"  {len(after)} codes: {len(near)} were others before acceleration{farther}")
    outcome.require((near < far).all(), "a code is not that of the nearest codeword")
    return after


def evaluating(quantizer: nn.Module, latents: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            quantizer(latents)

    return forward


def of_quantizer(model: VQModel, latents: Tensor) -> Callable[[], Tensor]:
    x = latents.clone().requires_grad_()

    def forward() -> Tensor:
        quantized, commitment, _ = model.quantize(x)
        return quantized.sum() + commitment

    return forward


def shown(image: Tensor) -> np.ndarray:
    return ((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def map_of(codes: Tensor, model: VQModel) -> np.ndarray:
    """[h, w] as colours: the three directions in which the codewords used differ most."""
    words = model.quantize.embedding.weight.detach()[codes]
    flat = words.flatten(0, -2)
    flat = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    colours = flat @ directions[:3].T
    low, high = colours.quantile(0.02, 0), colours.quantile(0.98, 0)
    return ((colours - low) / (high - low)).clamp(0, 1).view(*codes.shape, 3).numpy()
