"""A small Gated PixelCNN that draws handwritten digits pixel by pixel, given the class."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import Outcome, Timing, digits, race_header, save_picture, tiles, train
from torch import Tensor, nn

import genperf
from genperf.nn import autoregressive
from genperf.sampling import heads

TITLE = "Gated PixelCNN, handwritten digits"
LEVELS = 17
STEPS = 350
BATCH = 64
SHOWN = 10  # samples of each class


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, label = batch
    return F.cross_entropy(model(x, label), x)


@torch.no_grad()
def one_by_one(model: nn.Module, labels: Tensor, noise: Tensor, head: heads.Head) -> Tensor:
    """What one would write: the whole network once a pixel."""
    x = torch.zeros(len(labels), head.rows, head.cols, dtype=torch.int64)
    for y in range(head.rows):
        for col in range(head.cols):
            logits = model(x, labels)[:, :, y, col]
            x[:, y, col] = heads.draw(head, logits, noise[:, y, col])[:, 0].long()
    return x


def cpu_time(run) -> tuple[float, Tensor]:
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


def run(output: Path) -> Outcome:
    outcome = Outcome(TITLE)
    images, classes = digits()
    x = (16 * images[:, 0]).round().long()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            chosen = torch.randint(len(x), (BATCH,), generator=generator)
            yield x[chosen], classes[chosen]

    model = autoregressive.GatedPixelCNN(LEVELS, 32, 5, 10, hidden_dim=64)
    losses = train(model, loss, batches(), STEPS, 3e-3, seconds=45)
    print(f"  trained for {len(losses)} steps: {losses[-1] / 0.6931:.2f} bits a pixel at the last one")
    model.eval()

    labels = torch.arange(10).repeat_interleave(SHOWN)
    sampler = genperf.sampling.compile(model, (8, 8), cond={"label": labels})
    print(sampler.explain(), "\n")
    head = sampler.program.head
    noise = heads.make_noise(head, torch.tensor([0, 0]), range(len(labels)))
    race_header()
    drawn = {}
    for batch in (len(labels), 1):
        own = {"label": labels[:batch]}
        sampler.sample(batch, noise=noise[:batch], cond=own)  # conditioning is recorded once
        naive, slow = cpu_time(lambda n=batch: one_by_one(model, labels[:n], noise[:n], head))
        engine = []
        for _ in range(5):
            taken, fast = cpu_time(lambda n=batch, c=own: sampler.sample(n, noise=noise[:n], cond=c))
            engine.append(taken)
        outcome.require(torch.equal(slow, fast), f"the samples of a batch of {batch} differ")
        outcome.timings.append(Timing(f"sampling, batch of {batch}, 8x8 pixels", naive, sorted(engine)[2]))
        print(outcome.timings[-1].line())
        drawn[batch] = fast
    print(f"  the {len(labels)} digits are the same integers both ways")

    top = torch.zeros(8, 8, dtype=torch.bool)
    top[:4] = True
    real = x[:SHOWN]
    completed = sampler.sample(
        SHOWN * SHOWN,
        seed=1,
        prefix=(real.repeat(SHOWN, 1, 1), top),
        cond={"label": classes[:SHOWN].repeat(SHOWN)},
    )
    outcome.require((completed[:, :4] == real.repeat(SHOWN, 1, 1)[:, :4]).all(), "known pixels have changed")
    outcome.picture = output / "pixelcnn.png"
    panels = {
        "digits of the training set": grid(torch.cat([x[classes == c][:SHOWN] for c in range(10)])),
        "samples, a class each row": grid(drawn[len(labels)]),
        "upper half given, lower half drawn": grid(completed),
    }
    save_picture(outcome.picture, f"{TITLE}: {len(losses)} training steps", panels)
    return outcome


def grid(x: Tensor) -> object:
    return tiles(x[:, None] / 16, SHOWN)
