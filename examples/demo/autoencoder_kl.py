"""The autoencoder of latent diffusion models, in a small configuration, on photos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _common import (
    Outcome,
    accelerated,
    backward,
    compare_training,
    crops,
    photos,
    psnr,
    race,
    race_header,
    save_picture,
    saved_bytes,
    train,
)
from diffusers import AutoencoderKL
from torch import Tensor, nn

TITLE = "diffusers AutoencoderKL, photos"
STEPS = 900


def loss(model: nn.Module, x: Tensor) -> Tensor:
    posterior = model.encode(x).latent_dist
    reconstruction = model.decode(posterior.sample()).sample
    return (reconstruction - x).square().mean() + 1e-6 * posterior.kl().mean()


def build() -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        model.quant_conv.bias[4:] = -6  # little noise at the start, so that a short training suffices
    return model


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    images, unseen = photos()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        while True:
            yield crops(images, 6, 24, generator)

    original = build()
    fast, own_noise = accelerated(outcome, original, loss, next(batches()))
    compare_training(outcome, original, fast, loss, [crops(images, 6, 24, generator) for _ in range(10)])

    steps = len(train(fast, loss, batches(), STEPS, 3e-3))
    with torch.no_grad():
        reconstruction = fast.decode(fast.encode(unseen[None]).latent_dist.mode()).sample[0]
    quality = psnr(reconstruction, unseen, peak=2)
    print(f"  trained for {steps} steps; a photo kept out of training is reconstructed at {quality:.1f} dB\n")
    outcome.picture = output / "autoencoder_kl.png"
    panels = {"a photo kept out of training": unseen, f"its reconstruction, {quality:.1f} dB": reconstruction}
    save_picture(
        outcome.picture,
        f"{TITLE}: {steps} training steps, accelerated",
        {caption: ((x + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy() for caption, x in panels.items()},
    )

    parameters = torch.randn(16, 8, 64, 64).requires_grad_()
    crop = crops(images, 8, 64, generator)
    models = (original, fast, own_noise)
    sampling = [sample_and_divergence(type(model.encode(crop).latent_dist), parameters) for model in models]
    race_header()
    outcome.timings.append(race("sample + kl, [16, 4, 64, 64]", *map(backward, sampling)))
    steps = [backward(lambda model=model: loss(model, crop)) for model in models]
    outcome.timings.append(race("training step, 8 photos 64x64", *steps))
    kept = "  ".join(f"{saved_bytes(forward) / 2**20:.2f}" for forward in sampling)
    print(f"  MiB kept for backward by sample + kl: {kept}")
    return outcome


def sample_and_divergence(distribution: type, parameters: Tensor) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        posterior = distribution(parameters)
        return posterior.sample().sum() + posterior.kl().sum()

    return forward
