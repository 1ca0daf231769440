"""What the executors have in common that run many slots in one call of a kernel."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ._program import FeedbackKind, Program


class KernelState(Protocol):
    """One batch of images under way.

    ``workspace`` float32 holds the line buffers, [floats] or [teams, floats of a team], where a team has
    ``images`` images (the last one may have fewer); ``values`` is float32 [B, rows, cols, values].
    """

    batch: int
    workspace: Tensor
    values: Tensor

    @property
    def images(self) -> int: ...


class KernelExecutor:
    """A program with its tensors on a device, as the kernels read them: float32 or int64, contiguous."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program = program
        self.device = device
        self._tensors = [
            t.detach().to(device, torch.float32 if t.is_floating_point() else torch.int64).contiguous()
            for t in program.tensors
        ]

    def params(self, state: KernelState, slot: int) -> Tensor:
        """What the network gives for this slot: [B, channels of its buffer from the operand's on]."""
        head = self.program.head
        operand = self.program.operands[head.params]
        y, x = divmod(slot // head.draws, head.cols)
        y, x = y + operand.dy, x + operand.dx
        if not (operand.y0 <= y < operand.y1 and operand.x0 <= x < operand.x1):
            channels = self.program.buffers[operand.index].channels - operand.channel
            return state.values.new_zeros(state.batch, channels)
        cells = self._cells(state, operand.index, y, x)
        return cells.flatten(0, 1)[: state.batch, operand.channel :]

    def feed(self, state: KernelState, slot: int, value: Tensor) -> None:
        """Takes ``value`` [B] as what was drawn in this slot."""
        head = self.program.head
        pixel, d = divmod(slot, head.draws)
        y, x = divmod(pixel, head.cols)
        value = value.to(self.device, torch.float32)
        state.values[:, y, x, d] = value
        if head.feedback == FeedbackKind.NONE:
            return
        cells = self._cells(state, head.input, y, x)
        rows = torch.nn.functional.pad(value, (0, cells.shape[0] * cells.shape[1] - state.batch))
        rows = rows.view(cells.shape[:2])
        if head.feedback == FeedbackKind.SCALED:
            cells[:, :, d] = rows * head.scale + head.offset
        else:
            cells.scatter_(2, (rows.long() + d * head.classes)[:, :, None], 1.0)

    def _cells(self, state: KernelState, buffer: int, y: int, x: int) -> Tensor:
        """One cell of all images, as a view [teams, images of a team, channels]."""
        b = self.program.buffers[buffer]
        teams = state.workspace if state.workspace.dim() == 2 else state.workspace[None]
        first = (b.offset + (y % b.ring_rows * b.ring_cols + x % b.ring_cols) * b.channels) * state.images
        return teams[:, first : first + state.images * b.channels].view(len(teams), state.images, b.channels)
