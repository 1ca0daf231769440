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
    compare_training,
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
CODEWORDS = 4096
STEPS = 300


def loss(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return (output.sample - x).square().mean() + output.commit_loss.mean()


def build(images: Tensor) -> VQModel:
    """With latents of ``images`` as the first codewords, without which a short training does not suffice."""
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=CODEWORDS,
        norm_num_groups=1,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        latents = model.encode(images).latents.movedim(1, -1).flatten(0, -2)
        chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:CODEWORDS]
        model.quantize.embedding.weight.copy_(latents[chosen])
    return model


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    images, unseen = photos()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        while True:
            yield crops(images, 8, 32, generator)

    original = build(crops(images, 16, 64, generator))
    fast = deepcopy(original)
    report = genperf.accelerate(fast, mode="training")
    print(report)
    outcome.require(report.accelerated, "nothing was accelerated")
    outcome.require(not report.left_alone, "something was left alone")
    verification = report.verify(next(batches()), call=loss, seconds=0)
    print(f"\n{verification}\n")
    outcome.require(verification, "the accelerated model does not agree with the original in float64")
    compare_training(outcome, original, fast, loss, [crops(images, 8, 32, generator) for _ in range(10)])

    steps = len(train(fast, loss, batches(), STEPS, 3e-3))
    original.load_state_dict(fast.state_dict())
    with torch.no_grad():
        latents = fast.encode(unseen[None]).latents
        reconstruction = fast.decode(latents).sample[0]
        codes, expected = (codes_of(model, latents) for model in (fast, original))
    outcome.require(torch.equal(codes, expected), "the codes differ from those of the original")
    quality, used = psnr(reconstruction, unseen, peak=2), codes.unique().numel()
    print(
        f"  trained for {steps} steps; a photo kept out of training is reconstructed at {quality:.1f} dB from "
        f"{codes.numel()} codes,\n  {used} different ones, the same before and after acceleration\n"
    )
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
    print(
        f"  peak memory of the quantizer in training: {before:.0f} MiB originally, {after:.1f} MiB accelerated"
    )
    outcome.require(after < before / 4, "the quantizer takes more memory than it should")
    return outcome


def codes_of(model: VQModel, latents: Tensor) -> Tensor:
    return model.quantize(latents)[2][2]


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
