"""Runs a sampler program cell by cell, as _program.py defines it: what the reference is compared with."""

from __future__ import annotations

import math

import numpy as np

from genperf.sampling._program import Attention, Conv, Embed, FeedbackKind, Op, Pointwise, Program


class Interpreter:
    """Runs the network of a program in float64, one number after another, as _program.py defines it."""

    def __init__(self, program: Program, batch: int) -> None:
        self.program, self.batch = program, batch
        self.memory = np.full(program.workspace * batch, np.nan)
        head = program.head
        self.values = np.full((batch, head.rows, head.cols, head.values), np.nan, np.float32)

    def cell(self, buffer: int, y: int, x: int, b: int) -> np.ndarray:
        f = self.program.buffers[buffer]
        at = (y % f.ring_rows * f.ring_cols + x % f.ring_cols) * self.batch + b
        return self.memory[f.offset * self.batch + at * f.channels :][: f.channels]

    def read(self, number: int, y: int, x: int, b: int, channels: int) -> np.ndarray:
        op = self.program.operands[number]
        y, x = y + op.dy, x + op.dx
        if not (op.y0 <= y < op.y1 and op.x0 <= x < op.x1):
            return np.zeros(channels)
        if not op.is_const:
            return self.cell(op.index, y, x, b)[op.channel : op.channel + channels]
        c = self.program.consts[op.index]
        at = b * c.stride_b + y * c.stride_y + x * c.stride_x
        index = at + (op.channel + np.arange(channels)) * c.stride_c
        return self.program.tensors[c.index].double().numpy()[index]

    def segments(self, slot: int) -> None:
        """What runs before the draw of a slot."""
        head = self.program.head
        pixel, draw = divmod(slot, head.draws)
        y, x = divmod(pixel, head.cols)
        if draw == 0:
            self.values[:, y, x] = 0
            for b in range(self.batch if head.feedback != FeedbackKind.NONE else 0):
                self.cell(head.input, y, x, b)[:] = 0
        begin, end = self.program.slot_begin[slot : slot + 2].tolist()
        for index, row, col, n in self.program.segments[begin:end].tolist():
            for column in range(col, col + n):
                for b in range(self.batch):
                    self.step(index, row, column, b)

    def step(self, index: int, y: int, x: int, b: int) -> None:
        i = self.program.instructions[index]
        if isinstance(i, Conv):
            result = np.zeros(i.channels) if i.init < 0 else self.read(i.init, y, x, b, i.channels).copy()
            weight = self.program.weights[i.weight].double().numpy()
            for t, (dy, dx) in enumerate(self.program.taps[i.tap_begin : i.tap_end]):
                at = (y * i.num + dy, x * i.num + dx)
                if at[0] % i.den == 0 and at[1] % i.den == 0:
                    source = self.read(i.source, at[0] // i.den, at[1] // i.den, b, i.channels_in)
                    result += source @ weight[t]
        elif isinstance(i, Pointwise):
            a = self.read(i.a, y, x, b, i.channels)
            result = pointwise(i.op, a, None if i.b < 0 else self.read(i.b, y, x, b, i.channels), i.p, i.q)
        elif isinstance(i, Embed):
            result = np.zeros(i.channels) if i.init < 0 else self.read(i.init, y, x, b, i.channels).copy()
            head, table = self.program.head, self.program.tensors[i.table].double().numpy()
            for t, (dy, dx) in enumerate(self.program.taps[i.tap_begin : i.tap_end]):
                if 0 <= y + dy < head.rows and 0 <= x + dx < head.cols:
                    result += table[t, int(self.values[b, y + dy, x + dx, i.draw])]
        else:
            result = self.attend(i, y, x, b)
        self.cell(i.out, y, x, b)[i.out_channel : i.out_channel + len(result)] = result

    def attend(self, i: Attention, y: int, x: int, b: int) -> np.ndarray:
        count = int(self.program.tensors[i.count][y * i.cols + x])
        q = self.read(i.q, y, x, b, i.heads * i.dim_k)
        cells = [divmod(j, i.cols) for j in range(count)]
        k = [self.read(i.k, *cell, b, i.heads * i.dim_k) for cell in cells]
        v = [self.read(i.v, *cell, b, i.heads * i.dim_v) for cell in cells]
        result = np.zeros(i.heads * i.dim_v)
        for h in range(i.heads if count else 0):
            own = slice(h * i.dim_k, (h + 1) * i.dim_k)
            scores = np.array([i.scale * (q[own] @ key[own]) for key in k])
            weights = np.exp(scores - scores.max())
            mixed = sum(
                w * value[h * i.dim_v : (h + 1) * i.dim_v] for w, value in zip(weights, v, strict=True)
            )
            result[h * i.dim_v : (h + 1) * i.dim_v] = mixed / weights.sum()
        return result

    def feed(self, slot: int, values: np.ndarray) -> None:
        """Takes float32 values [B, n] as drawn."""
        head = self.program.head
        pixel, draw = divmod(slot, head.draws)
        y, x = divmod(pixel, head.cols)
        self.values[:, y, x, draw : draw + values.shape[1]] = values
        for b in range(self.batch):
            if head.feedback == FeedbackKind.SCALED:
                cell = self.cell(head.input, y, x, b)
                scaled = values[b].astype(np.float64) * head.scale + head.offset
                cell[draw : draw + values.shape[1]] = scaled
            elif head.feedback == FeedbackKind.ONE_HOT:
                self.cell(head.input, y, x, b)[draw * head.classes + int(values[b, 0])] = 1.0

    def params(self, slot: int) -> np.ndarray:
        y, x = divmod(slot // self.program.head.draws, self.program.head.cols)
        op = self.program.operands[self.program.head.params]
        channels = self.program.buffers[op.index].channels - op.channel
        cells = [self.read(self.program.head.params, y, x, b, channels) for b in range(self.batch)]
        return np.stack(cells)


def pointwise(op: Op, a: np.ndarray, b: np.ndarray | None, p: float, q: float) -> np.ndarray:
    """One pointwise function in float64."""
    other = a if b is None else b
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    erf = np.vectorize(math.erf, otypes=[np.float64])
    functions = {
        Op.COPY: lambda: a.copy(),
        Op.AFFINE: lambda: a * p + q,
        Op.ADD: lambda: a + other,
        Op.SUB: lambda: a - other,
        Op.MUL: lambda: a * other,
        Op.DIV: lambda: a / other,
        Op.MAXIMUM: lambda: np.maximum(a, other),
        Op.MINIMUM: lambda: np.minimum(a, other),
        Op.RELU: lambda: np.maximum(a, 0),
        Op.LEAKY_RELU: lambda: np.where(a > 0, a, a * p),
        Op.ELU: lambda: np.where(a > 0, a, p * np.expm1(np.minimum(a, 0))),
        Op.TANH: lambda: np.tanh(a),
        Op.SIGMOID: lambda: sigmoid(a),
        Op.SILU: lambda: a * sigmoid(a),
        Op.GELU: lambda: 0.5 * a * (1 + erf(a / math.sqrt(2))),
        Op.GELU_TANH: lambda: 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
        Op.SOFTPLUS: lambda: np.where(p * a > q, a, np.log1p(np.exp(np.minimum(p * a, q))) / p),
        Op.EXP: lambda: np.exp(a),
        Op.LOG: lambda: np.log(a),
        Op.SQRT: lambda: np.sqrt(a),
        Op.RECIPROCAL: lambda: 1 / a,
        Op.SQUARE: lambda: a * a,
        Op.ABS: lambda: np.abs(a),
        Op.CLAMP: lambda: np.clip(a, p, q),
        Op.TANH_SIGMOID: lambda: np.tanh(a) * sigmoid(other),
        Op.MUL_SIGMOID: lambda: a * sigmoid(other),
        Op.ERF: lambda: erf(a),
    }
    return functions[op]()
