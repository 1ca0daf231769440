"""A variational autoencoder written with torch.distributions, and draws from it with BigGAN's truncation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _common import Outcome, backward, digits, race, race_header, save_picture, tiles, train
from scipy.stats import truncnorm
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import genperf
from genperf.ops import truncated_normal

TITLE = "torch.distributions and BigGAN's truncation, handwritten digits"
LATENT = 256
STEPS = 200
SHOWN = 8


class VAE(nn.Module):
    """Digits [B, 1, 8, 8] to 256 latent variables and back."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, hidden), nn.GELU(), nn.Linear(hidden, 64))

    def posterior(self, x: Tensor) -> Normal:
        mean, scale = self.encoder(x.flatten(1)).chunk(2, 1)
        return Normal(mean, F.softplus(scale) + 1e-3)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).view(-1, 1, 8, 8)


def draw(q: Normal) -> Tensor:
    """A sample and the divergence from N(0, 1), as a number."""
    z = q.rsample()
    prior = Normal(torch.zeros_like(z), torch.ones_like(z))
    return z.sum() + kl_divergence(q, prior).sum()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    q = model.posterior(x)
    prior = Normal(torch.zeros_like(q.loc), torch.ones_like(q.loc))
    error = F.mse_loss(model.decode(q.rsample()), x, reduction="sum") / (2 * 0.15**2)
    return (error + kl_divergence(q, prior).sum()) / len(x)


def biggan_noise(count: int, truncation: float, seed: int) -> Tensor:
    """As published with BigGAN: by scipy, on the CPU."""
    state = np.random.RandomState(seed)
    values = truncnorm.rvs(-2, 2, size=(count, LATENT), random_state=state).astype(np.float32)
    return torch.from_numpy(truncation * values)


def same_numbers(count: int, truncation: float, seed: int) -> Tensor:
    uniforms = np.random.RandomState(seed).uniform(size=(count, LATENT)).astype(np.float32)
    return truncated_normal((count, LATENT), scale=truncation, noise=torch.from_numpy(uniforms))


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    x, _ = digits()
    model = VAE()
    seen = []
    for covered in (False, True):
        torch.manual_seed(1)
        with genperf.accelerate.distributions() if covered else torch.enable_grad():
            value = loss(model, x)
        seen.append((value, *torch.autograd.grad(value, list(model.parameters()))))
    apart = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*seen, strict=True))
    print(f"  with the override a loss and its gradients, from one seed, agree to {apart:.0e} of their size")
    outcome.require(apart < 1e-4, "the override changes the loss")

    with genperf.accelerate.distributions(rng="philox") as report:
        losses = train(model, loss, iter([x] * STEPS), STEPS, 3e-3, seconds=30)
    print(f"  trained for {len(losses)} steps on all {len(x)} digits:\n{report}\n")
    outcome.require(report.covered["Normal.rsample"] == len(losses), "torch.distributions was not covered")

    panels = {}
    for truncation in (1.0, 0.6, 0.3):
        theirs, ours = (f(SHOWN**2, truncation, seed=0) for f in (biggan_noise, same_numbers))
        outcome.require((theirs - ours).abs().max() < 1e-5, "the truncated noise differs from scipy's")
        with torch.no_grad():
            panels[f"truncation {truncation}"] = tiles(model.decode(ours), SHOWN)
    outcome.picture = output / "torch_distributions.png"
    save_picture(outcome.picture, f"{TITLE}: {len(losses)} training steps, accelerated", panels)

    with torch.no_grad():
        q = model.posterior(x)
    leaf = Normal(q.loc.requires_grad_(), q.scale.requires_grad_())
    race_header()

    def within(rng: str, run):
        def covered() -> None:
            with genperf.accelerate.distributions(rng):
                run()

        return covered

    for name, step in (
        (f"rsample and kl, [{len(x)}, {LATENT}]", backward(lambda: draw(leaf))),
        (f"training step, {len(x)} digits", backward(lambda: loss(model, x))),
    ):
        outcome.timings.append(race(name, step, within("torch", step), within("philox", step)))
    count = 256
    outcome.timings.append(
        race(
            f"truncated normal, [{count}, {LATENT}]",
            lambda: biggan_noise(count, 0.6, 0),
            lambda: same_numbers(count, 0.6, 0),
            lambda: truncated_normal((count, LATENT), scale=0.6),
        )
    )
    return outcome
