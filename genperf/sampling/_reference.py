"""A program run by plain torch: the oracle of the other executors, and the cached loop to compare with.

Row segments run as one product over all their cells; single cells take their operands as views of the
line buffers, which are made once and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ._program import Attention, Conv, Embed, FeedbackKind, HeadKind, Op, Operand, Pointwise, Program
from .heads import draw

Known = tuple[Tensor, Tensor]

_POINTWISE: dict[Op, Callable[..., Tensor]] = {
    Op.COPY: lambda a, b, p, q: a,
    Op.AFFINE: lambda a, b, p, q: a * p + q,
    Op.ADD: lambda a, b, p, q: a + b,
    Op.SUB: lambda a, b, p, q: a - b,
    Op.MUL: lambda a, b, p, q: a * b,
    Op.DIV: lambda a, b, p, q: a / b,
    Op.MAXIMUM: lambda a, b, p, q: torch.maximum(a, b),
    Op.MINIMUM: lambda a, b, p, q: torch.minimum(a, b),
    Op.RELU: lambda a, b, p, q: torch.relu(a),
    Op.LEAKY_RELU: lambda a, b, p, q: F.leaky_relu(a, p),
    Op.ELU: lambda a, b, p, q: F.elu(a, p),
    Op.TANH: lambda a, b, p, q: torch.tanh(a),
    Op.SIGMOID: lambda a, b, p, q: torch.sigmoid(a),
    Op.SILU: lambda a, b, p, q: F.silu(a),
    Op.GELU: lambda a, b, p, q: F.gelu(a),
    Op.GELU_TANH: lambda a, b, p, q: F.gelu(a, approximate="tanh"),
    Op.SOFTPLUS: lambda a, b, p, q: F.softplus(a, p, q),
    Op.EXP: lambda a, b, p, q: torch.exp(a),
    Op.LOG: lambda a, b, p, q: torch.log(a),
    Op.SQRT: lambda a, b, p, q: torch.sqrt(a),
    Op.RECIPROCAL: lambda a, b, p, q: torch.reciprocal(a),
    Op.SQUARE: lambda a, b, p, q: torch.square(a),
    Op.ABS: lambda a, b, p, q: torch.abs(a),
    Op.CLAMP: lambda a, b, p, q: torch.clamp(a, p, q),
    Op.TANH_SIGMOID: lambda a, b, p, q: torch.tanh(a) * torch.sigmoid(b),
    Op.MUL_SIGMOID: lambda a, b, p, q: a * torch.sigmoid(b),
    Op.ERF: lambda a, b, p, q: torch.erf(a),
}


@dataclass
class State:
    """One batch of images under way.

    ``workspace`` holds the line buffers of all images, ``values`` float32 [B, rows, cols, values] what
    was drawn. Neither needs to be initialised.
    """

    batch: int
    workspace: Tensor
    values: Tensor
    cells: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


class ReferenceExecutor:
    """Runs a program with torch, in float32 or float64, on any device.

    ``draw`` replaces :func:`genperf.sampling.heads.draw`.
    """

    makes_noise = False

    def __init__(
        self,
        program: Program,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        draw: Callable[..., Tensor] = draw,
    ) -> None:
        self.program = program
        self._draw = draw
        self.device = torch.device(device)
        self.dtype = dtype
        self._weights = [w.to(self.device, dtype) for w in program.weights]
        self._tensors = [
            t.to(self.device, dtype if t.is_floating_point() else t.dtype).contiguous()
            for t in program.tensors
        ]
        self._slot_begin = program.slot_begin.tolist()
        self._products: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._gathers: dict[tuple[int, int, int, int], tuple[Tensor, Tensor | None, tuple[int, ...]]] = {}

    def start(self, batch: int) -> State:
        """Memory for ``batch`` images; to be followed by :meth:`run` from slot 0."""
        head = self.program.head
        workspace = torch.empty(self.program.workspace * batch, dtype=self.dtype, device=self.device)
        values = torch.empty(batch, head.rows, head.cols, head.values, device=self.device)
        return State(batch, workspace, values)

    @torch.no_grad()
    def run(
        self,
        state: State,
        begin: int,
        end: int,
        noise: Tensor | None,
        temperature: float = 1.0,
        top_k: int = 0,
        known: Known | None = None,
    ) -> None:
        """Slots ``begin`` to ``end - 1``: their segments, then their draws.

        Args:
            noise: float32 [B, rows, cols, noises]; None for ``HeadKind.CALLBACK``, where the caller draws
                from :meth:`params` and calls :meth:`feed` after each slot.
            temperature, top_k: see :mod:`genperf.sampling.heads`.
            known: values float32 and a mask bool, both [B, rows, cols, values]; where the mask holds the
                value is taken instead of drawn.
        """
        head = self.program.head
        for slot in range(begin, end):
            pixel, d = divmod(slot, head.draws)
            y, x = divmod(pixel, head.cols)
            if d == 0:
                state.values[:, y, x] = 0
                if head.feedback != FeedbackKind.NONE:
                    self._input(state, y, x).zero_()
            begin_of, end_of = self._slot_begin[slot], self._slot_begin[slot + 1]
            for index, row, col, n in self.program.segments[begin_of:end_of].tolist():
                self._segment(state, index, row, col, n)
            if head.kind != HeadKind.CALLBACK:
                assert noise is not None
                pixel_known = None if known is None else (known[0][:, y, x], known[1][:, y, x])
                params = self.params(state, slot)
                values = self._draw(head, params, noise[:, y, x], temperature, top_k, d, pixel_known)
                self._feed(state, y, x, d, values)

    def params(self, state: State, slot: int) -> Tensor:
        """What the network gives for this slot: [B, channels of its buffer from the operand's on]."""
        head = self.program.head
        y, x = divmod(slot // head.draws, head.cols)
        operand = self.program.operands[head.params]
        channels = self.program.buffers[operand.index].channels - operand.channel
        return self._read(state, operand, y, x, 1, channels)

    def feed(self, state: State, slot: int, value: Tensor) -> None:
        """Takes ``value`` [B] as what was drawn in this slot."""
        head = self.program.head
        pixel, d = divmod(slot, head.draws)
        y, x = divmod(pixel, head.cols)
        self._feed(state, y, x, d, value.to(self.device, torch.float32).view(state.batch, 1))

    def _feed(self, state: State, y: int, x: int, d: int, values: Tensor) -> None:
        head = self.program.head
        count = values.shape[1]
        state.values[:, y, x, d : d + count] = values
        if head.feedback == FeedbackKind.SCALED:
            cell = self._input(state, y, x)
            cell[:, d : d + count] = values.to(self.dtype) * head.scale + head.offset
        elif head.feedback == FeedbackKind.ONE_HOT:
            cell = self._input(state, y, x)
            cell.scatter_(1, values.long() + d * head.classes, 1.0)

    def _input(self, state: State, y: int, x: int) -> Tensor:
        index = self.program.head.input
        cells = self._cells(state, index, 0, self.program.buffers[index].channels, y, x, 1)
        assert cells is not None
        return cells

    def _cells(
        self, state: State, index: int, channel: int, channels: int, y: int, x: int, n: int
    ) -> Tensor | None:
        """A view [n * B, channels] of cells (y, x) to (y, x + n - 1), where they lie side by side."""
        b = self.program.buffers[index]
        row, col = y % b.ring_rows, x % b.ring_cols
        if col + n > b.ring_cols:
            return None
        key = (index, channel, channels, row, col, n)
        view = state.cells.get(key)
        if view is None:
            start = (b.offset + (row * b.ring_cols + col) * b.channels) * state.batch
            cells = state.workspace[start : start + n * state.batch * b.channels]
            view = cells.view(-1, b.channels)[:, channel : channel + channels]
            state.cells[key] = view
        return view

    def _inside(self, state: State, op: Operand, y: int, x: int, n: int, channels: int) -> Tensor:
        """Source cells that all lie in the window, [n * B, channels]."""
        if op.is_const:
            c = self.program.consts[op.index]
            start = y * c.stride_y + x * c.stride_x + op.channel * c.stride_c
            size = (n, state.batch, channels)
            cells = torch.as_strided(
                self._tensors[c.index], size, (c.stride_x, c.stride_b, c.stride_c), start
            )
            return cells.reshape(-1, channels)
        view = self._cells(state, op.index, op.channel, channels, y, x, n)
        if view is not None:
            return view
        halves = n // 2
        first = self._inside(state, op, y, x, halves, channels)
        return torch.cat([first, self._inside(state, op, y, x + halves, n - halves, channels)])

    def _read(self, state: State, op: Operand, y: int, x: int, n: int, channels: int) -> Tensor:
        """What an operand is for output cells (y, x) to (y, x + n - 1): [n * B, channels]."""
        y, x = y + op.dy, x + op.dx
        if op.y0 <= y < op.y1 and op.x0 <= x and x + n <= op.x1:
            return self._inside(state, op, y, x, n, channels)
        out = torch.zeros(n * state.batch, channels, dtype=self.dtype, device=self.device)
        first, last = max(x, op.x0), min(x + n, op.x1)
        if op.y0 <= y < op.y1 and first < last:
            cells = self._inside(state, op, y, first, last - first, channels)
            out[(first - x) * state.batch : (last - x) * state.batch] = cells
        return out

    def _write(self, state: State, index: int, channel: int, y: int, x: int, n: int, result: Tensor) -> None:
        out = self._cells(state, index, channel, result.shape[1], y, x, n)
        if out is not None:
            out.copy_(result)
            return
        halves = n // 2
        cut = halves * state.batch
        self._write(state, index, channel, y, x, halves, result[:cut])
        self._write(state, index, channel, y, x + halves, n - halves, result[cut:])

    def _segment(self, state: State, index: int, y: int, x: int, n: int) -> None:
        i = self.program.instructions[index]
        if isinstance(i, Conv):
            self._conv(state, index, i, y, x, n)
        elif isinstance(i, Pointwise):
            operands = self.program.operands
            a = self._read(state, operands[i.a], y, x, n, i.channels)
            b = None if i.b < 0 else self._read(state, operands[i.b], y, x, n, i.channels)
            self._write(state, i.out, i.out_channel, y, x, n, _POINTWISE[i.op](a, b, i.p, i.q))
        elif isinstance(i, Embed):
            self._embed(state, i, y, x, n)
        else:
            self._attention(state, i, y, x, n)

    def _embed(self, state: State, i: Embed, y: int, x: int, n: int) -> None:
        head, table = self.program.head, self._tensors[i.table]
        if i.init < 0:
            result = state.workspace.new_zeros(n * state.batch, i.channels)
        else:
            result = self._read(state, self.program.operands[i.init], y, x, n, i.channels).clone()
        for rows, (dy, dx) in zip(table, self.program.taps[i.tap_begin : i.tap_end], strict=True):
            first, last = max(x + dx, 0), min(x + n + dx, head.cols)
            if not 0 <= y + dy < head.rows or first >= last:
                continue
            values = state.values[:, y + dy, first:last, i.draw].t().reshape(-1)
            values = torch.where((values >= 0) & (values < len(rows)), values, 0.0).long()
            result[(first - x - dx) * state.batch : (last - x - dx) * state.batch] += rows[values]
        self._write(state, i.out, i.out_channel, y, x, n, result)

    def _conv(self, state: State, index: int, i: Conv, y: int, x: int, n: int) -> None:
        source = self.program.operands[i.source]
        if n == 1 or source.is_const:
            parts, taps = self._tap_cells(state, i, source, y, x, n)
        else:
            parts, taps = self._tap_rows(state, index, i, source, y, x, n)
        init = None
        if i.init >= 0:
            init = self._read(state, self.program.operands[i.init], y, x, n, i.channels)
        out = self._cells(state, i.out, i.out_channel, i.channels, y, x, n)
        if not taps:
            result = state.workspace.new_zeros(n * state.batch, i.channels) if init is None else init
        else:
            weight = self._weight(i, taps)
            cells = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if init is None:
                result = torch.mm(cells, weight) if out is None else torch.mm(cells, weight, out=out)
            else:
                result = torch.addmm(init, cells, weight, out=out)
        if out is None or result is not out:
            self._write(state, i.out, i.out_channel, y, x, n, result)

    def _weight(self, i: Conv, taps: tuple[int, ...]) -> Tensor:
        """The weight of some taps, [taps * channels_in, channels]."""
        key = (i.weight, taps)
        weight = self._products.get(key)
        if weight is None:
            weight = self._weights[i.weight][list(taps)].reshape(-1, i.channels)
            self._products[key] = weight
        return weight

    def _tap_source(self, i: Conv, tap: int, y: int, x: int) -> tuple[int, int] | None:
        dy, dx = self.program.taps[i.tap_begin + tap]
        sy, y_rest = divmod(y * i.num + dy, i.den)
        sx, x_rest = divmod(x * i.num + dx, i.den)
        return None if y_rest or x_rest else (sy, sx)

    def _tap_cells(
        self, state: State, i: Conv, op: Operand, y: int, x: int, n: int
    ) -> tuple[list[Tensor], tuple[int, ...]]:
        """The operand of each tap, [n * B, channels_in], and the taps that are not outside everywhere."""
        parts, taps = [], []
        for tap in range(i.tap_end - i.tap_begin):
            cells, empty = [], True
            for col in range(x, x + n):
                at = self._tap_source(i, tap, y, col)
                inside = at is not None and (
                    op.y0 <= at[0] + op.dy < op.y1 and op.x0 <= at[1] + op.dx < op.x1
                )
                if at is not None and inside:
                    cells.append(self._read(state, op, *at, 1, i.channels_in))
                    empty = False
                else:
                    cells.append(state.workspace.new_zeros(state.batch, i.channels_in))
            if not empty:
                parts.append(cells[0] if n == 1 else torch.cat(cells))
                taps.append(tap)
        return parts, tuple(taps)

    def _tap_rows(
        self, state: State, index: int, i: Conv, op: Operand, y: int, x: int, n: int
    ) -> tuple[list[Tensor], tuple[int, ...]]:
        """The same from one gather over the ring of a line buffer."""
        key = (index, y, x, n)
        found = self._gathers.get(key)
        if found is None:
            found = self._gathers[key] = self._gather(i, op, y, x, n)
        cells, outside, taps = found
        if not taps:
            return [], ()
        b = self.program.buffers[op.index]
        ring = state.workspace[b.offset * state.batch :][
            : b.ring_rows * b.ring_cols * b.channels * state.batch
        ]
        ring = ring.view(-1, state.batch, b.channels)[:, :, op.channel : op.channel + i.channels_in]
        picked = ring[cells]
        if outside is not None:
            picked.masked_fill_(outside, 0.0)
        return [picked.permute(0, 2, 1, 3).reshape(n * state.batch, -1)], taps

    def _gather(
        self, i: Conv, op: Operand, y: int, x: int, n: int
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        b = self.program.buffers[op.index]
        columns, taps = [], []
        for tap in range(i.tap_end - i.tap_begin):
            column = []
            for col in range(x, x + n):
                at = self._tap_source(i, tap, y, col)
                cell = -1
                if at is not None:
                    sy, sx = at[0] + op.dy, at[1] + op.dx
                    if op.y0 <= sy < op.y1 and op.x0 <= sx < op.x1:
                        cell = sy % b.ring_rows * b.ring_cols + sx % b.ring_cols
                column.append(cell)
            if max(column) >= 0:
                columns.append(column)
                taps.append(tap)
        cells = torch.tensor(columns, dtype=torch.int64, device=self.device).view(-1, n).t()
        outside = (cells < 0)[:, :, None, None] if bool((cells < 0).any()) else None
        return cells.clamp(min=0), outside, tuple(taps)

    def _attention(self, state: State, i: Attention, y: int, x: int, n: int) -> None:
        operands = self.program.operands
        counts = self._tensors[i.count][y * i.cols + x :][:n]
        count = int(counts.max())
        q = self._read(state, operands[i.q], y, x, n, i.heads * i.dim_k)
        if count == 0:
            result = q.new_zeros(n * state.batch, i.heads * i.dim_v)
        else:
            k = self._keys(state, operands[i.k], count, i.cols, i.heads * i.dim_k)
            v = self._keys(state, operands[i.v], count, i.cols, i.heads * i.dim_v)
            q = q.reshape(n, state.batch, i.heads, i.dim_k).permute(1, 2, 0, 3)
            k = k.view(count, state.batch, i.heads, i.dim_k).permute(1, 2, 3, 0)
            v = v.view(count, state.batch, i.heads, i.dim_v).permute(1, 2, 0, 3)
            scores = (q @ k) * i.scale
            if n > 1:
                later = torch.arange(count, device=self.device) >= counts[:, None]
                scores.masked_fill_(later, float("-inf"))
            out = torch.softmax(scores, -1) @ v
            if n > 1:
                out.masked_fill_((counts == 0)[:, None], 0.0)
            result = out.permute(2, 0, 1, 3).reshape(n * state.batch, -1)
        self._write(state, i.out, i.out_channel, y, x, n, result)

    def _keys(self, state: State, op: Operand, count: int, cols: int, channels: int) -> Tensor:
        """The first ``count`` cells of a grid in raster order: [count * B, channels]."""
        rows, rest = divmod(count, cols)
        if not op.is_const and self.program.buffers[op.index].ring_cols == cols and op.dy == op.dx == 0:
            b = self.program.buffers[op.index]
            cells = state.workspace[b.offset * state.batch :][: count * state.batch * b.channels]
            return cells.view(-1, b.channels)[:, op.channel : op.channel + channels]
        parts = [self._read(state, op, y, 0, cols, channels) for y in range(rows)]
        if rest:
            parts.append(self._read(state, op, rows, 0, rest, channels))
        return torch.cat(parts)
