"""What the parts of the demo share: images, timing, pictures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from skimage import data
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

import genperf

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

Loss = Callable[[nn.Module, Tensor], Tensor]
SAME_NOISE, OWN_NOISE = "#0072B2", "#009E73"


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing before and after acceleration, with the same noise and with genperf's own; None
    for what was not measured."""

    what: str
    original: float
    same_noise: float | None = None
    own_noise: float | None = None

    def line(self) -> str:
        line = f"  {self.what:<34}{1e3 * self.original:>9.3f} ms"
        for seconds in (self.same_noise, self.own_noise):
            if seconds is None:
                line += f"{'-':>20}"
            else:
                line += f"{1e3 * seconds:>9.3f} ms ({ratio(self.original / seconds)})"
        return line.rstrip(" -")


def ratio(gain: float) -> str:
    return f"{gain:4.2f}x" if gain < 10 else f"{gain:4.0f}x"


@dataclass
class Outcome:
    """What a part of the demo hands back."""

    title: str
    timings: list[Timing] = field(default_factory=list)
    picture: Path | None = None
    problems: list[str] = field(default_factory=list)

    def require(self, condition: object, problem: str) -> None:
        if not condition:
            self.problems.append(problem)
            print(f"  FAILED: {problem}")


def digits() -> tuple[Tensor, Tensor]:
    """[1797, 1, 8, 8] float32 in [0, 1], and which digit each is: scikit-learn's handwritten digits."""
    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float().unsqueeze(1) / 16
    return images, torch.from_numpy(loaded.target).long()


def photos() -> tuple[list[Tensor], Tensor]:
    """[3, H, W] float32 in [-1, 1]: photos of scikit-learn and scikit-image, and one kept out of training."""
    images = [*load_sample_images().images, data.astronaut(), data.coffee(), data.rocket()]
    return [_tensor(image) for image in images], _tensor(data.chelsea())[:, :288, 92:380]


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1


def crops(images: list[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """[count, 3, size, size]: random crops of random photos."""

    def below(bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=generator))

    out = []
    for _ in range(count):
        image = images[below(len(images))]
        top, left = below(image.shape[1] - size + 1), below(image.shape[2] - size + 1)
        out.append(image[:, top : top + size, left : left + size])
    return torch.stack(out)


def train(
    model: nn.Module,
    loss: Loss,
    batches: Iterator[Tensor],
    steps: int,
    rate: float,
    seconds: float = 60,
) -> list[float]:
    """Adam with a one-cycle schedule, stopped early if ``seconds`` are over. Returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        value = loss(model, next(batches))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        if time.perf_counter() - start > seconds:
            print(f"  stopped after {len(losses)} of {steps} steps: {seconds:.0f} s are over")
            break
    return losses


def race(
    what: str,
    original: Callable,
    same_noise: Callable | None = None,
    own_noise: Callable | None = None,
    seconds: float = 4,
) -> Timing:
    """Medians of interleaved runs, in CPU time."""
    given = {"original": original, "same_noise": same_noise, "own_noise": own_noise}
    contenders = [run for run in given.values() if run is not None]
    taken: list[list[float]] = [[] for _ in contenders]
    for run in contenders:
        run()
    start = time.perf_counter()
    while len(taken[0]) < 5 or (time.perf_counter() - start < seconds and len(taken[0]) < 400):
        for run, times in zip(contenders, taken, strict=True):
            begin = time.process_time()
            run()
            times.append(time.process_time() - begin)
    names = [name for name, run in given.items() if run is not None]
    timing = Timing(what, **dict(zip(names, map(statistics.median, taken), strict=True)))
    print(timing.line())
    return timing


def accelerated(outcome: Outcome, original: nn.Module, loss: Loss, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """Copies of a model, with the noise that torch would draw and with genperf's own; verified."""
    same_noise, own_noise = deepcopy(original), deepcopy(original)
    report = genperf.accelerate(same_noise, mode="training")
    genperf.accelerate(own_noise, mode="training", rng="philox")
    print(report)
    outcome.require(report.accelerated, "nothing was accelerated")
    outcome.require(not report.left_alone, "something was left alone")
    verification = report.verify(x, call=loss, seconds=0)
    print(f"\n{verification}\n")
    outcome.require(verification, "the accelerated model does not agree with the original in float64")
    return same_noise, own_noise


def compare_training(
    outcome: Outcome, original: nn.Module, fast: nn.Module, loss: Loss, batches: list[Tensor]
) -> None:
    """Trains copies of both from one seed and compares the losses."""
    losses = []
    for model in (deepcopy(original), deepcopy(fast)):
        torch.manual_seed(1)
        losses.append(train(model, loss, iter(batches), len(batches), 1e-3))
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    print(f"  {len(batches)} training steps from one seed: the losses agree to {apart:.0e} of their size")
    outcome.require(apart < 1e-4, "the training losses differ")


def race_header() -> None:
    print(f"  {'':<34}{'original':>12}{'same noise':>20}{'own noise':>20}")


def backward(forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward, without an optimizer; gradients accumulate in place, as they do in training."""

    def run() -> None:
        forward().backward()

    return run


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the tensors that ``forward`` keeps for backward, each storage counted once."""
    storages: dict[int, int] = {}
    kept = []

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept.append(forward())
    return sum(storages.values())


def peak_bytes(run: Callable[[], object]) -> int:
    """How much more memory the process holds at some time during ``run`` than before; by Linux's count."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))

    run()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before)


def psnr(a: Tensor, b: Tensor, peak: float) -> float:
    return 10 * torch.log10(peak**2 / (a - b).square().mean()).item()


def tiles(images: Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """[N, C, H, W] in [0, 1] as one picture, light grey between the images; C = 1 is black on white."""
    images = images.clamp(0, 1) if images.shape[1] == 3 else 1 - images.clamp(0, 1).expand(-1, 3, -1, -1)
    padded = nn.functional.pad(images, (0, gap, 0, gap), value=0.85)
    rows = [torch.cat(list(row), dim=2) for row in padded.split(columns)]
    grid = torch.cat(rows, dim=1).permute(1, 2, 0)
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap].numpy()


def save_picture(path: Path, title: str, panels: dict[str, np.ndarray]) -> None:
    """Panels side by side, each under its caption."""
    widths = [panel.shape[1] / panel.shape[0] for panel in panels.values()]
    height = 4.2
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(height * sum(widths) + 0.3, height + 0.6),
        width_ratios=widths,
        layout="constrained",
    )
    for axis, (caption, panel) in zip(axes, panels.items(), strict=True):
        axis.imshow(panel, interpolation="nearest")
        axis.set_title(caption, fontsize=10)
        axis.axis("off")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save_chart(path: Path, outcomes: list[Outcome], conditions: str) -> None:
    """Speed-ups over the original, one group of bars a timing."""
    count = sum(len(outcome.timings) for outcome in outcomes)
    figure, axes = pyplot.subplots(
        len(outcomes),
        figsize=(9, 1.6 + 0.75 * count + 0.35 * len(outcomes)),
        height_ratios=[len(outcome.timings) for outcome in outcomes],
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    gains = [1.0]
    for axis, outcome in zip(axes[:, 0], outcomes, strict=True):
        for row, timing in enumerate(outcome.timings):
            both = None not in (timing.same_noise, timing.own_noise)
            for shift, seconds, colour in (
                (-0.19 if both else 0, timing.same_noise, SAME_NOISE),
                (0.19 if both else 0, timing.own_noise, OWN_NOISE),
            ):
                if seconds is None:
                    continue
                gain = timing.original / seconds
                gains.append(gain)
                axis.barh(row + shift, gain - 1, left=1, height=0.36, color=colour)
                side = "left" if gain >= 1 else "right"
                axis.text(
                    gain, row + shift, f" {ratio(gain).strip()[:-1]}\u00d7 ", va="center", ha=side, fontsize=9
                )
        axis.set_yticks(range(len(outcome.timings)), [timing.what for timing in outcome.timings])
        axis.invert_yaxis()
        axis.axvline(1, color="#444444", linewidth=1)
        axis.set_title(outcome.title, loc="left", fontsize=11, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[-1, 0].set_xscale("log")  # a loss is as long as a gain
    axes[-1, 0].set_xlim(min(*gains, 0.8) / 1.6, max(*gains, 1.25) * 1.5)
    axes[-1, 0].xaxis.set_major_locator(ticker.LogLocator(10, subs=(1, 2, 5)))
    axes[-1, 0].xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}\u00d7"))
    axes[-1, 0].xaxis.set_minor_locator(ticker.NullLocator())
    axes[-1, 0].set_xlabel("times as fast as the unmodified model")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in (SAME_NOISE, OWN_NOISE)]
    labels = [
        "the noise of the original (rng='torch', the default)",
        "genperf's own noise (rng='philox')",
    ]
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel(conditions, fontsize=8, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
