"""A baseline of sampling benchmarks: the whole network once a pixel, replayed as a CUDA graph.

It removes what launches cost, and none of the work: what a user can reach without another engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Draw = Callable[[Tensor, Tensor], Tensor]


class GraphPerPixel:
    """Samples images pixel by pixel, with one forward and draw captured as a ``torch.cuda.CUDAGraph``.

    Args:
        model: in eval mode on a CUDA device; maps [B, *shape] to [B, ..., H, W].
        shape: of one input, ending in rows and columns.
        draw: maps the model's output at one pixel, [B, ...], and that pixel's noise [B, noises] to the values
            that are stored there, broadcast to [B, *shape[:-2]].
        dtype: of the model's input.

    Raises:
        RuntimeError: if there is no CUDA device.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        shape: Sequence[int],
        draw: Draw,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("GraphPerPixel: no CUDA device")
        self.model, self.shape, self.draw, self.dtype = model, tuple(shape), draw, dtype
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Images [B, *shape] from noise [B, H, W, noises] on the device."""
        batch, (rows, cols) = len(noise), self.shape[-2:]
        graph, x, pixel, pixel_noise = self._captured(batch, noise.shape[-1])
        x.zero_()
        flat = noise.reshape(batch, rows * cols, -1)
        for i in range(rows * cols):
            pixel.fill_(i)
            pixel_noise.copy_(flat[:, i])
            graph.replay()
        return x.clone()

    def _captured(self, batch: int, noises: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        key = (batch, noises)
        if key not in self._graphs:
            x = torch.zeros(batch, *self.shape, dtype=self.dtype, device="cuda")
            pixel = torch.zeros(1, dtype=torch.int64, device="cuda")
            noise = torch.full((batch, noises), 0.5, device="cuda")
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._step(x, pixel, noise)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(x, pixel, noise)
            self._graphs[key] = graph, x, pixel, noise
        return self._graphs[key]

    def _step(self, x: Tensor, pixel: Tensor, noise: Tensor) -> None:
        out = self.model(x).flatten(-2)
        values = self.draw(out.index_select(-1, pixel).squeeze(-1), noise)
        flat = x.view(*x.shape[:-2], -1)
        flat.index_copy_(-1, pixel, values.to(self.dtype).expand(x.shape[:-2])[..., None])
