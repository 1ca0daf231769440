"""A variational autoencoder with categorical latent variables, by Gumbel-softmax, and draws from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import (
    Outcome,
    accelerated,
    backward,
    compare_training,
    digits,
    race,
    race_header,
    save_picture,
    tiles,
    train,
)
from torch import Tensor, nn
from torch.distributions import Categorical

import genperf

TITLE = "Gumbel-softmax and categorical draws, handwritten digits"
LATENT, CLASSES = 16, 64
BATCH = 256
STEPS = 300
SHOWN = 10


class DiscreteVAE(nn.Module):
    """Digits [B, 1, 8, 8] to 16 variables of 64 classes and back."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        size = LATENT * CLASSES
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, size))
        self.decoder = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, 64))
        self.temperature = 0.7

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x.flatten(1)).view(-1, LATENT, CLASSES)

    def draw(self, logits: Tensor, hard: bool = False) -> Tensor:
        return F.gumbel_softmax(logits, tau=self.temperature, hard=hard)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z.flatten(1)).view(-1, 1, 8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.encode(x)
        return self.decode(self.draw(logits)), logits


def loss(model: nn.Module, x: Tensor) -> Tensor:
    reconstruction, logits = model(x)
    log_probs = logits.log_softmax(-1)
    divergence = torch.sum(log_probs.exp() * (log_probs + math.log(CLASSES)))  # from equal probabilities
    return (F.mse_loss(reconstruction, x, reduction="sum") / (2 * 0.15**2) + divergence) / len(x)


def chain(classes: Tensor) -> Tensor:
    """Logits [LATENT, CLASSES, CLASSES] of each variable by the one before, from counts over [N, LATENT]."""
    counts = torch.full((LATENT, CLASSES, CLASSES), 1e-3)
    before = torch.cat([torch.zeros_like(classes[:, :1]), classes[:, :-1]], 1)
    for i in range(LATENT):
        counts[i].index_put_((before[:, i], classes[:, i]), torch.ones(len(classes)), accumulate=True)
    return counts.log()


def sample(prior: Tensor, count: int) -> Tensor:
    """Classes [count, LATENT], one variable after the other."""
    drawn = torch.zeros(count, 1, dtype=torch.int64)
    for logits in prior:
        following = Categorical(logits=logits[drawn[:, -1]]).sample()
        drawn = torch.cat([drawn, following[:, None]], 1)
    return drawn[:, 1:]


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    x, _ = digits()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        while True:
            yield x[torch.randint(len(x), (BATCH,), generator=generator)]

    stream = batches()
    original = DiscreteVAE()
    fast, own_noise = accelerated(outcome, original, loss, next(stream))
    compare_training(outcome, original, fast, loss, [next(stream) for _ in range(50)])

    losses = train(fast, loss, stream, STEPS, 2e-3, seconds=30)
    with torch.no_grad():
        classes = fast.encode(x).argmax(-1)
        prior = chain(classes)
        reconstruction = fast.decode(F.one_hot(classes[: SHOWN**2], CLASSES).float())
        with genperf.accelerate.distributions(rng="philox") as report:
            drawn = sample(prior, SHOWN**2)
        samples = fast.decode(F.one_hot(drawn, CLASSES).float())
    print(f"  trained for {len(losses)} steps; digits drawn by {LATENT} calls of Categorical:\n{report}\n")
    outcome.require(report.covered["Categorical.sample"] == LATENT, "torch.distributions was not covered")
    outcome.picture = output / "discrete_latents.png"
    panels = {
        "digits of the training set": tiles(x[: SHOWN**2], SHOWN),
        f"from {LATENT} classes of {CLASSES} each": tiles(reconstruction, SHOWN),
        "from classes drawn one after the other": tiles(samples, SHOWN),
    }
    save_picture(outcome.picture, f"{TITLE}: {len(losses)} training steps, accelerated", panels)

    batch = next(stream)
    models = (original, fast, own_noise)
    logits = original.encode(batch).detach().requires_grad_()
    weight = torch.randn(logits.shape)
    race_header()
    for hard in (False, True):
        steps = [backward(lambda m=model, h=hard: (m.draw(logits, h) * weight).sum()) for model in models]
        name = f"gumbel_softmax{', hard' if hard else ''}, [{BATCH}, {LATENT}, {CLASSES}]"
        outcome.timings.append(race(name, *steps))
    steps = [backward(lambda model=model: loss(model, batch)) for model in models]
    outcome.timings.append(race(f"training step, {BATCH} digits", *steps))

    def draws() -> None:
        sample(prior, 4 * BATCH)

    def covered() -> None:
        with genperf.accelerate.distributions(rng="philox"):
            draws()

    outcome.timings.append(race(f"{LATENT} x Categorical, [{4 * BATCH}, {CLASSES}]", draws, None, covered))
    return outcome
