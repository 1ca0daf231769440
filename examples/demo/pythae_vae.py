"""A variational autoencoder of pythae on handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from _common import (
    Outcome,
    accelerated,
    backward,
    compare_training,
    digits,
    race,
    race_header,
    save_picture,
    saved_bytes,
    tiles,
    train,
)
from pythae.models import VAE, VAEConfig
from torch import Tensor, nn

TITLE = "pythae VAE, handwritten digits"
STEPS = 1200


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model({"data": x}).loss


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    images, _ = digits()
    training, unseen = images[:-197], images[-197:]
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        while True:
            yield training[torch.randperm(len(training), generator=generator)[:128]]

    stream = batches()
    original = VAE(VAEConfig(input_dim=(1, 8, 8), latent_dim=16, reconstruction_loss="bce"))
    fast, own_noise = accelerated(outcome, original, loss, next(stream))
    compare_training(outcome, original, fast, loss, [next(stream) for _ in range(50)])

    losses = train(fast, loss, stream, STEPS, 2e-3)
    with torch.no_grad():
        shown = unseen[:40]
        reconstruction = fast({"data": shown}).recon_x.view_as(shown)
        samples = fast.decoder(torch.randn(40, 16)).reconstruction.view_as(shown)
        bound = sum(loss(fast, unseen).item() for _ in range(8)) / 8
    print(
        f"  trained for {len(losses)} steps: -ELBO {losses[0]:.1f} at first, {bound:.1f} on digits kept out\n"
    )
    outcome.picture = output / "pythae_vae.png"
    panels = {"digits kept out of training": shown, "reconstructions": reconstruction, "samples": samples}
    save_picture(
        outcome.picture,
        f"{TITLE}: {len(losses)} training steps, accelerated",
        {caption: tiles(x, columns=8) for caption, x in panels.items()},
    )

    batch = next(stream)
    models = (original, fast, own_noise)
    steps = [lambda model=model: loss(model, batch) for model in models]
    race_header()
    outcome.timings.append(race("training step, 128 digits", *map(backward, steps)))
    kept = "  ".join(f"{saved_bytes(forward) / 2**10:.0f}" for forward in steps)
    print(f"  KiB kept for backward by the whole model: {kept}")
    return outcome
