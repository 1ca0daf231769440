"""A Glow of normflows on handwritten digits: likelihood, memory and samples, before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import normflows as nf
import torch
from _common import Outcome, backward, digits, race, save_picture, saved_bytes, tiles, train
from torch import Tensor, nn

import genperf

TITLE = "normflows Glow, handwritten digits"
LEVELS, BLOCKS, HIDDEN = 2, 4, 48
GREYS = 17
STEPS = 450
BATCH = 64
SHOWN = 10  # samples of each class
TEMPERATURE = 0.7

Batch = tuple[Tensor, Tensor]


def build(colours: int = 1, size: int = 8) -> nf.MultiscaleFlow:
    """Blocks, levels and classes as in the library's example of Glow."""
    base, flows, merges = [], [], []
    for level in range(LEVELS):
        channels, side = colours * 2 ** (LEVELS + 1 - level), size // 2 ** (LEVELS - level)
        blocks = [nf.flows.GlowBlock(channels, HIDDEN, split_mode="channel") for _ in range(BLOCKS)]
        flows.append([*blocks, nf.flows.Squeeze()])
        if level > 0:
            merges.append(nf.flows.Merge())
            channels //= 2  # the others go on
        base.append(nf.distributions.ClassCondDiagGaussian((channels, side, side), 10))
    return nf.MultiscaleFlow(base, flows, merges)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Bits a number of greys, each spread over its share of the range."""
    x, label = batch
    return -model.log_prob(x, label).mean() / (x[0].numel() * math.log(2)) + math.log2(GREYS)


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    images, classes = digits()
    greys = (16 * images).round()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Batch]:
        while True:
            chosen = torch.randint(len(greys), (BATCH,), generator=generator)
            spread = torch.rand((BATCH, 1, 8, 8), generator=generator)
            label = classes[chosen]
            yield (greys[chosen] + spread) / GREYS - 0.5, nn.functional.one_hot(label, 10).float()

    original, batch = build(), next(batches())
    loss(original, batch)  # initialises the activation normalization
    fast = deepcopy(original)
    report = genperf.accelerate(fast, mode="training")
    print(f"{summary(report)}\n")
    outcome.require(not report.left_alone, "something was left alone")
    losses = train(fast, loss, batches(), STEPS, 1e-2, seconds=40)
    original.load_state_dict(fast.state_dict())
    exact = loss(deepcopy(original).double(), (batch[0].double(), batch[1].double()))
    print(f"  trained for {len(losses)} steps: {exact:.4f} bits a pixel")
    verification = report.verify(batch, call=lambda m, b: m.log_prob(*b), seconds=0)
    print(f"\n{verification}\n")
    outcome.require(verification, "the accelerated model does not agree with the original in float64")

    labels = torch.arange(10).repeat_interleave(SHOWN)
    drawn = [sampled(model, labels) for model in (original, fast)]
    apart = (drawn[0] - drawn[1]).abs().max().item()
    print(f"  samples from the same noise differ by {apart:.0e} of the range")
    outcome.require(apart < 1e-3, "the samples differ")
    back = reconstructed(fast, batch)
    print(f"  digits come back from their latents with an error of at most {back:.0e}\n")
    outcome.require(back < 1e-3, "the flow is not inverted")

    models = (original, fast)
    print(f"  {'':<34}{'original':>12}{'accelerated':>20}")
    outcome.timings += [
        race("log-likelihood, 64 digits", *[evaluating(m, batch) for m in models], seconds=2),
        race("training step, 64 digits", *[backward(lambda m=m: loss(m, batch)) for m in models], seconds=3),
        race(f"sampling, {len(labels)} digits", *[lambda m=m: sampled(m, labels) for m in models], seconds=2),
    ]
    larger = larger_images()
    outcome.timings.append(
        race(
            "training step, 8 images 3x32x32", *[backward(lambda m=m: loss(m, larger[1])) for m in larger[0]]
        )
    )
    kept = [saved_bytes(lambda m=m: loss(m, larger[1])) / 2**20 for m in larger[0]]
    print(f"  which keeps {kept[0]:.1f} MiB for the backward pass originally, {kept[1]:.1f} MiB accelerated")
    outcome.require(kept[1] < kept[0], "more is kept for the backward pass than before")

    outcome.picture = output / "glow.png"
    panels = {
        "digits of the training set": shown(
            torch.cat([greys[classes == c][:SHOWN] for c in range(10)]) / GREYS - 0.49
        ),
        f"samples, a class each row, temperature {TEMPERATURE}": shown(drawn[1]),
        "between a digit and another of its class": shown(between(fast, greys, classes)),
    }
    save_picture(outcome.picture, f"{TITLE}: {len(losses)} training steps, accelerated", panels)
    return outcome


def summary(report: genperf.accelerate.Report) -> str:
    """The rows of one block, and how many there are of all."""
    first = [e for e in report.accelerated if e.name.startswith("flows.0.0")]
    rows = "\n".join(f"  {e.name:<20}{e.was:<40}{e.kernel} ({e.backend})" for e in first)
    return f"{rows}\n  ... {len(report.accelerated)} accelerated, {len(report.left_alone)} left alone"


@torch.no_grad()
def sampled(model: nf.MultiscaleFlow, labels: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model.sample(len(labels), labels, temperature=TEMPERATURE)[0]


@torch.no_grad()
def reconstructed(model: nf.MultiscaleFlow, batch: Batch) -> float:
    z, _ = model.inverse_and_log_det(batch[0])
    return (model.forward_and_log_det(z)[0] - batch[0]).abs().max().item()


@torch.no_grad()
def between(model: nf.MultiscaleFlow, greys: Tensor, classes: Tensor) -> Tensor:
    """Latents on the line from one digit to another, a class each row."""
    ends = [torch.stack([greys[classes == c][i] for c in range(10)]) / GREYS - 0.5 for i in (0, 3)]
    first, last = (model.inverse_and_log_det(x)[0] for x in ends)
    steps = torch.linspace(0, 1, SHOWN)
    latents = [
        torch.stack([a.lerp(b, t) for t in steps.tolist()], 1).flatten(0, 1)
        for a, b in zip(first, last, strict=True)
    ]
    return model.forward_and_log_det(latents)[0]


def evaluating(model: nn.Module, batch: Batch) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            loss(model, batch)

    return forward


def larger_images() -> tuple[tuple[nn.Module, nn.Module], Batch]:
    """An untrained model for images of 32x32, an accelerated copy, and a batch."""
    batch = torch.rand(8, 3, 32, 32) - 0.5, nn.functional.one_hot(torch.arange(8), 10).float()
    original = build(3, 32)
    loss(original, batch)
    fast = deepcopy(original)
    genperf.accelerate(fast, mode="training", strict=True)
    return (original, fast), batch


def shown(x: Tensor) -> object:
    """With greys as the digits have them."""
    return tiles(((x + 0.5) * GREYS).floor() / (GREYS - 1), SHOWN)
