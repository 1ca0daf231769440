"""A variational autoencoder written the way that many repositories write it, on patches of photos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
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
    tiles,
    train,
)
from torch import Tensor, nn

TITLE = "reparameterize(mu, logvar), patches of photos"
STEPS = 1500
SIZE = 8


class PatchVAE(nn.Module):
    """Patches [B, 3, 8, 8] to 64 latent variables and back."""

    def __init__(self, hidden: int = 256, latent: int = 64) -> None:
        super().__init__()
        pixels = 3 * SIZE * SIZE
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.GELU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.GELU(), nn.Linear(hidden, pixels))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x.flatten(1)).chunk(2, dim=1)
        return mu, logvar

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decoder(z).view_as(x), mu, logvar


def loss(model: nn.Module, x: Tensor) -> Tensor:
    reconstruction, mu, logvar = model(x)
    divergence = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (F.mse_loss(reconstruction, x, reduction="sum") / (2 * 0.05**2) + divergence) / len(x)


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    images, unseen = photos()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        while True:
            large = crops(images, 4, 8 * SIZE, generator)
            yield patches(large)

    stream = batches()
    original = PatchVAE()
    fast, own_noise = accelerated(outcome, original, loss, next(stream))
    compare_training(outcome, original, fast, loss, [next(stream) for _ in range(50)])

    steps = len(train(fast, loss, stream, STEPS, 2e-3))
    with torch.no_grad():
        whole = patches(unseen[None])
        reconstruction = fast(whole)[0]
        samples = fast.decoder(torch.randn(14 * 14, 64)).view(-1, 3, SIZE, SIZE)
    quality = psnr(reconstruction, whole, peak=2)
    print(f"  trained for {steps} steps; a photo kept out of training is reconstructed at {quality:.1f} dB\n")
    outcome.picture = output / "reparameterize.png"
    columns = unseen.shape[2] // SIZE
    panels = {
        "a photo kept out of training": tiles((whole + 1) / 2, columns, gap=0),
        f"its reconstruction, {quality:.1f} dB": tiles((reconstruction + 1) / 2, columns, gap=0),
        "samples, each 8x8": tiles((samples + 1) / 2, 14),
    }
    save_picture(outcome.picture, f"{TITLE}: {steps} training steps, accelerated", panels)

    batch = next(stream)
    models = (original, fast, own_noise)
    mu, logvar = (x.detach().clone().requires_grad_() for x in original.encode(batch))
    sampling = [lambda model=model: model.reparameterize(mu, logvar).sum() for model in models]
    race_header()
    outcome.timings.append(race("reparameterize, [256, 64]", *map(backward, sampling)))
    steps = [backward(lambda model=model: loss(model, batch)) for model in models]
    outcome.timings.append(race("training step, 256 patches", *steps))
    kept = "  ".join(f"{saved_bytes(forward) / 2**10:.0f}" for forward in sampling)
    print(f"  KiB kept for backward by reparameterize: {kept}")
    return outcome


def patches(images: Tensor) -> Tensor:
    """[B, 3, H, W] cut into [N, 3, 8, 8], row by row."""
    cut = images.unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE)
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, SIZE, SIZE)
