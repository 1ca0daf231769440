"""An autoencoder of photos with the output of PixelCNN++ and VDVAE: a mixture of logistics for each pixel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
    race,
    race_header,
    save_picture,
    tiles,
    train,
)
from torch import Tensor, nn

import genperf
from genperf.ops import mixture_logistic_sample

TITLE = "Mixture of logistics (PixelCNN++, VDVAE), photos"
SIZE = 32
BATCH = 16
MIXTURES = 10
STEPS = 300


def parts(params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, H, W, 10 K] as logits [B, H, W, K], and [B, H, W, 3, K] each of means, log-scales and shares."""
    mixtures = params.shape[-1] // 10
    rest = params[..., mixtures:].unflatten(-1, (3, 3, mixtures))
    means, log_scales, shares = rest.unbind(-2)
    return params[..., :mixtures], means, log_scales.clamp(min=-7.0), shares.tanh()


def discretized_mix_logistic_loss(x: Tensor, params: Tensor) -> Tensor:
    """Nats [B] of images [B, H, W, 3] in [-1, 1]."""
    logits, means, log_scales, shares = parts(params)
    red, green, _ = x.unsqueeze(-1).unbind(-2)
    of_green, of_blue = shares[..., 0, :] * red, shares[..., 1, :] * red + shares[..., 2, :] * green
    means = means + torch.stack([torch.zeros_like(of_green), of_green, of_blue], -2)
    centered, inverse = x.unsqueeze(-1) - means, torch.exp(-log_scales)
    above, below = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255)
    mass = torch.sigmoid(above) - torch.sigmoid(below)
    middle = inverse * centered
    density = middle - log_scales - 2 * F.softplus(middle) - math.log(127.5)
    inside = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), density)
    ends = x.unsqueeze(-1)
    log_probs = torch.where(ends > 0.999, -F.softplus(below), inside)
    log_probs = torch.where(ends < -0.999, above - F.softplus(above), log_probs)
    return -torch.logsumexp(log_probs.sum(-2) + logits.log_softmax(-1), -1).sum((1, 2))


def sample_from_discretized_mix_logistic(params: Tensor, mixtures: int) -> Tensor:
    """Images [B, H, W, 3] in [-1, 1]."""
    logits, means, log_scales, shares = parts(params)
    gumbel = -torch.log(-torch.log(torch.empty(logits.shape).uniform_(1e-5, 1 - 1e-5)))
    chosen = F.one_hot((logits + gumbel).argmax(-1), mixtures).to(params.dtype).unsqueeze(-2)
    mean, scale, share = ((v * chosen).sum(-1) for v in (means, log_scales.exp(), shares))
    u = torch.empty(mean.shape).uniform_(1e-5, 1 - 1e-5)
    red, green, blue = (mean + scale * (torch.log(u) - torch.log(1 - u))).unbind(-1)
    a, b, c = share.unbind(-1)
    red = red.clamp(-1, 1)
    green = (green + a * red).clamp(-1, 1)
    return torch.stack([red, green, (blue + b * red + c * green).clamp(-1, 1)], -1)


class Output(nn.Module):
    """Features [B, C, H, W] to the parameters of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, 10 * MIXTURES, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.out_conv(features).permute(0, 2, 3, 1)

    def nll(self, features: Tensor, x: Tensor) -> Tensor:
        return discretized_mix_logistic_loss(x.permute(0, 2, 3, 1), self.forward(features))

    def sample(self, features: Tensor) -> Tensor:
        drawn = sample_from_discretized_mix_logistic(self.forward(features), MIXTURES)
        return drawn.permute(0, 3, 1, 2)


class PhotoVAE(nn.Module):
    """Photos [B, 3, 32, 32] to 12 x 8 x 8 latent variables and back."""

    def __init__(self, hidden: int = 32, latent: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, hidden, 4, 2, 1), nn.GELU(), nn.Conv2d(hidden, 2 * latent, 4, 2, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, 4 * hidden, 3, padding=1), nn.PixelShuffle(2), nn.GELU(),
            nn.Conv2d(hidden, 4 * hidden, 3, padding=1), nn.PixelShuffle(2), nn.GELU(),
        )  # fmt: skip
        self.output = Output(hidden)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return self.decoder(self.reparameterize(mu, logvar)), mu, logvar


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Nats for each value of a photo."""
    features, mu, logvar = model(x)
    divergence = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (model.output.nll(features, x).sum() + divergence) / x.numel()


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    images, unseen = photos()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        while True:
            yield crops(images, BATCH, SIZE, generator)

    stream = batches()
    original = PhotoVAE()
    fast, own_noise = accelerated(outcome, original, loss, next(stream))
    compare_training(outcome, original, fast, loss, [next(stream) for _ in range(15)])

    losses = train(fast, loss, stream, STEPS, 5e-3, seconds=40)
    whole = patches(unseen)
    with torch.no_grad():
        features, *_ = fast(whole)
        nats = loss(fast, whole).item()
        reconstruction = fast.output.sample(features)
        cold = mixture_logistic_sample(fast.output.out_conv(features), temperature=0.2, convention="vdvae")
    bits = nats / math.log(2)
    print(f"  trained for {len(losses)} steps; a photo kept out of training takes {bits:.2f} bits a value\n")
    outcome.picture = output / "mixture_of_logistics.png"
    panels = {
        "a photo kept out of training": tiles((whole + 1) / 2, 9, gap=0),
        f"drawn from its latent variables, {bits:.2f} bits": tiles((reconstruction + 1) / 2, 9, gap=0),
        "the same at temperature 0.2": tiles((cold + 1) / 2, 9, gap=0),
    }
    save_picture(outcome.picture, f"{TITLE}: {len(losses)} training steps, accelerated", panels)

    batch = next(stream)
    models = (original, fast, own_noise)
    with torch.no_grad():
        features = original(batch)[0]
    params = original.output(features).detach().requires_grad_()

    plain = discretized_mix_logistic_loss
    with genperf.accelerate.namespace(globals()) as report:  # as a training script has it
        print(f"{report}\n")
        quick = discretized_mix_logistic_loss
    outcome.require(quick is not plain, "the loss was not replaced")

    def alone(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        return backward(lambda: function(batch.permute(0, 2, 3, 1), params).sum())

    race_header()
    outcome.timings.append(race(f"mixture loss, [{BATCH}, 3, 32, 32]", alone(plain), alone(quick)))

    def sampling(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model.output.sample(features)

        return run

    outcome.timings.append(race("mixture sampling, with its conv", *map(sampling, models)))
    steps = [backward(lambda model=model: loss(model, batch)) for model in models[:2]]
    outcome.timings.append(race(f"training step, {BATCH} photos", *steps))
    return outcome


def patches(image: Tensor) -> Tensor:
    """[3, H, W] cut into [N, 3, 32, 32], row by row."""
    cut = image.unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE)
    return cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIZE, SIZE)
