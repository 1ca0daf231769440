"""One batch of images from the first slot to the last."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genperf.sampling import heads
from genperf.sampling._executors import Executor
from genperf.sampling._memory import Need
from genperf.sampling._program import Program


@dataclass
class Noise:
    """The random numbers of some images of a batch: the caller's own, or those of a key."""

    images: range
    given: Tensor | None
    key: Tensor | None

    def made(self, program: Program, device: torch.device) -> Tensor:
        if self.given is not None:
            return self.given[self.images.start : self.images.stop].to(device)
        assert self.key is not None
        return heads.make_noise(program.head, self.key, self.images, device)

    def arguments(self, executor: Executor, device: torch.device) -> dict[str, Any]:
        """For ``executor.run``: the kernel makes the numbers itself where it can."""
        if self.given is None and executor.makes_noise:
            images = torch.tensor(self.images, device=device)
            return {"noise": None, "key": self.key, "images": images}
        return {"noise": self.made(executor.program, device)}


@dataclass
class Run:
    """One batch of images."""

    executor: Executor
    noise: Noise
    temperature: float
    top_k: int
    known: tuple[Tensor, Tensor] | None

    def __call__(self, head: heads.Description, bar: Any) -> Tensor:
        """The values [B, rows, cols, V]; ``bar``, if any, is told of each row."""
        program = self.executor.program
        state = self.executor.start(len(self.noise.images))
        device = state.values.device
        calls_back = isinstance(head, heads.Callback)
        noise = self.noise.made(program, device) if calls_back else torch.empty(0)
        drawing: dict[str, Any] = {"temperature": self.temperature, "top_k": self.top_k}
        if not calls_back:
            drawing.update(self.noise.arguments(self.executor, device))
        known = None if self.known is None else (self.known[0].to(device), self.known[1].to(device))
        row = program.slots // program.head.rows
        step = program.slots if bar is None else row
        for begin in range(0, program.slots, step):
            if isinstance(head, heads.Callback):
                for slot in range(begin, begin + step):
                    self._call_back(head, state, slot, noise, known)
            else:
                self.executor.run(state, begin, begin + step, known=known, **drawing)
            if bar is not None:
                bar.update()
        return state.values

    def _call_back(
        self, head: heads.Callback, state: Any, slot: int, noise: Tensor, known: tuple[Tensor, Tensor] | None
    ) -> None:
        pixel, draw = divmod(slot, head.draws)
        y, x = divmod(pixel, self.executor.program.head.cols)
        self.executor.run(state, slot, slot + 1, None)
        params = self.executor.params(state, slot).clone()
        first = draw * head.draw_noises
        value = head.function(params, noise[:, y, x, first : first + head.draw_noises], draw)
        if not isinstance(value, Tensor) or value.shape != (len(params),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"sample: the callback's function gave {got}, expected a tensor [{len(params)}]")
        if known is not None:
            values, mask = (t[:, y, x, draw].to(value.device) for t in known)
            value = torch.where(mask, values.to(value.dtype), value)
        self.executor.feed(state, slot, value)


def parts_of(images: range, need: Need) -> list[range]:
    size = need.chunk() if images else 1
    return [images[at : at + size] for at in range(0, len(images), size)]


def progress_bar(rows: int, progress: bool) -> Any:
    if not progress:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("sample: progress needs tqdm: pip install tqdm", name=error.name) from None
    return tqdm(total=rows, unit="row", desc="sample")
