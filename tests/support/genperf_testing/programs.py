"""Random sampler programs that read nothing too early."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch

from genperf.sampling._program import (
    Attention,
    Buffer,
    Const,
    Conv,
    Embed,
    FeedbackKind,
    Head,
    HeadKind,
    Op,
    Operand,
    Pointwise,
    Program,
)

SMOOTH = [op for op in Op if op not in (Op.DIV, Op.EXP, Op.LOG, Op.SQRT, Op.RECIPROCAL)]
BINARY = {Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.MAXIMUM, Op.MINIMUM, Op.TANH_SIGMOID, Op.MUL_SIGMOID}

HEADS = {
    "categorical": (HeadKind.CATEGORICAL, FeedbackKind.ONE_HOT, 1),
    "categorical_embed": (HeadKind.CATEGORICAL, FeedbackKind.NONE, 1),
    "categorical_rgb": (HeadKind.CATEGORICAL, FeedbackKind.SCALED, 3),
    "bernoulli": (HeadKind.BERNOULLI, FeedbackKind.SCALED, 1),
    "gaussian": (HeadKind.GAUSSIAN, FeedbackKind.SCALED, 2),
    "mixture": (HeadKind.LOGISTIC_MIXTURE, FeedbackKind.SCALED, 1),
    "callback": (HeadKind.CALLBACK, FeedbackKind.SCALED, 1),
}


@dataclass
class Node:
    """A buffer whose cell (y, x) is there from some slot on.

    ``when``: "input" after the draw of (y, x), "pixel" in its slots, "row" from the first slot of row y,
    "coarse" (half the rows and columns) from the first slot of row 2 y + 2. ``back``: how many rows above
    the current one the ring still holds; ``left``: how many columns, None for all.
    """

    buffer: int
    channels: int
    when: str
    back: int
    left: int | None


@dataclass
class Builder:
    """Appends nodes at random; see :func:`random_program`."""

    rng: random.Random
    head: Head
    program: Program
    steps: list[tuple[str, int]] = field(default_factory=list)  # when, instruction
    nodes: list[Node] = field(default_factory=list)

    def weights(self, *shape: int, gain: float = 1.0) -> torch.Tensor:
        seed = self.rng.randrange(1 << 30)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * gain

    def node(self, when: str, channels: int, full: bool = False) -> Node:
        rows, cols = self.head.rows, self.head.cols
        back, left = self.rng.choice([0, 1, 2, 3] if self.nodes else [2, 3]), None
        if when == "pixel" and not full and self.rng.random() < 0.4:
            back, left = 0, self.rng.choice([0, 1, 3])
        ring = [back + 1 + self.rng.choice([0, 0, 1]), cols if left is None else left + 1]
        if full:
            back, ring = rows, [rows, cols]
        if when == "coarse":
            back, ring = rows, [rows // 2, cols // 2]
        self.program.buffers.append(Buffer(self.program.workspace, *ring, channels))
        self.program.workspace += math.prod(ring) * channels
        node = Node(len(self.program.buffers) - 1, channels, when, back, left)
        self.nodes.append(node)
        return node

    def offsets(self, reader: str, source: Node) -> list[tuple[int, int]]:
        """Where a reader may look, from its own cell."""
        out = []
        for dy in range(-3, 1):
            for dx in range(-3, 4):
                early = source.when in ("input", "pixel")
                if dy == 0 and early:
                    if reader != "pixel":
                        continue
                    own_slot = source.when == "pixel" or self.head.draws > 1
                    if dx > 0 or (dx == 0 and not own_slot):
                        continue
                if -dy > source.back or (source.left is not None and -dx > source.left):
                    continue
                out.append((dy, dx))
        return out

    def const(self, channels: int) -> int:
        """An operand: random strides over images, rows and columns."""
        rows, cols = self.head.rows, self.head.cols
        shape = [self.rng.choice([1, n]) for n in (16, rows, cols)]
        if self.rng.random() < 0.3:
            tensor = self.weights(shape[0], channels, shape[1], shape[2]).permute(0, 2, 3, 1)
        else:
            tensor = self.weights(*shape, channels)
        strides = [s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
        if channels == 1:
            strides[3] = 1
        storage = tensor.as_strided((tensor.numel(),), (1,)).clone()
        self.program.tensors.append(storage)
        self.program.consts.append(Const(len(self.program.tensors) - 1, *strides))
        return self.operand(Operand(True, len(self.program.consts) - 1, **self.window(0.3)))

    def window(self, crop: float = 0.3, half: int = 1) -> dict[str, int]:
        rows, cols = self.head.rows // half, self.head.cols // half
        cut = [int(self.rng.random() < crop) for _ in range(4)]
        return {"y0": cut[0], "y1": rows - cut[1], "x0": cut[2], "x1": cols - cut[3]}

    def operand(self, operand: Operand) -> int:
        self.program.operands.append(operand)
        return len(self.program.operands) - 1

    def read(self, when: str, channels: int) -> int | None:
        """An operand of ``channels`` channels on the reader's own grid."""
        found = [n for n in self.nodes if n.channels >= channels and n.when != "coarse"]
        found = [n for n in found if self.offsets(when, n)]
        if not found or self.rng.random() < 0.2:
            return self.const(channels)
        node = self.rng.choice(found)
        dy, dx = self.rng.choice(self.offsets(when, node))
        first = self.rng.randrange(node.channels - channels + 1)
        return self.operand(Operand(False, node.buffer, first, dy, dx, **self.window()))

    def add(self, when: str, instruction: Conv | Pointwise | Attention | Embed) -> None:
        self.program.instructions.append(instruction)
        self.steps.append((when, len(self.program.instructions) - 1))

    def conv(self, when: str, channels: int, out: tuple[int, int] | None = None) -> None:
        """A convolution into a new buffer, or into ``out`` (buffer, channel)."""
        program, rng = self.program, self.rng
        num = den = 1
        if when == "coarse":
            num = 2
            sources = [n for n in self.nodes if n.when != "coarse" and n.back >= 1 and n.left is None]
        else:
            sources = [n for n in self.nodes if n.when == "coarse" or self.offsets(when, n)]
        source = rng.choice(sources)
        shift, half = (0, 0), 1
        if when == "coarse":
            offsets = [(dy, dx) for dy in (0, 1) for dx in range(-2, 4) if 2 - dy <= source.back]
        elif source.when == "coarse":
            den, half = 2, 2
            offsets = [(dy, dx) for dy in range(-5, -1) for dx in range(-3, 4)]
        else:
            offsets = self.offsets(when, source)
            if rng.random() < 0.3:
                shift = rng.choice(offsets)
                offsets = [(y - shift[0], x - shift[1]) for y, x in offsets]
        taps = rng.sample(offsets, min(len(offsets), rng.randint(1, 6)))
        first = rng.randrange(min(source.channels, 8))
        channels_in = rng.choice([source.channels - first, rng.randint(1, source.channels - first)])
        init = -1
        if rng.random() < 0.7 and when != "coarse":
            init = self.read(when, channels)
        if out is None:
            node = self.node(when, channels + rng.choice([0, 0, 3]))
            out = (node.buffer, rng.randrange(node.channels - channels + 1))
            if node.channels > channels:  # the rest must be there too
                self.nodes[-1] = Node(node.buffer, channels, when, node.back, node.left)
                out = (node.buffer, 0)
        window = self.window(0.3, half)
        operand = self.operand(Operand(False, source.buffer, first, *shift, **window))
        weight = self.weights(len(taps), channels_in, channels, gain=(len(taps) * channels_in) ** -0.5)
        program.weights.append(weight)
        begin = len(program.taps)
        program.taps += taps
        conv = Conv(
            *out, channels, operand, channels_in, begin, len(program.taps), num, den,
            len(program.weights) - 1, init,
        )  # fmt: skip
        self.add(when, conv)

    def embed(self, when: str, channels: int) -> None:
        """Sums of table rows for drawn classes, from any row above and what is drawn of this one."""
        program, rng, head = self.program, self.rng, self.head
        taps = [(dy, dx) for dy in range(-3, 0) for dx in range(-3, 4)]
        if when == "pixel":
            taps += [(0, dx) for dx in range(-3, 0)] + [(0, 0)] * (head.draws > 1)
        taps = rng.sample(taps, rng.randint(1, 7))
        program.tensors.append(self.weights(len(taps), head.classes, channels))
        table, begin = len(program.tensors) - 1, len(program.taps)
        program.taps += taps
        init = self.read(when, channels) if rng.random() < 0.5 else -1
        out = self.node(when, channels).buffer
        draw = rng.randrange(head.draws)
        assert init is not None
        self.add(when, Embed(out, 0, channels, table, draw, begin, len(program.taps), init))

    def pointwise(self, when: str, channels: int, out: tuple[int, int] | None = None) -> None:
        op = self.rng.choice(SMOOTH)
        a = self.read(when, channels)
        b = self.read(when, channels) if op in BINARY else -1
        if out is None:
            out = (self.node(when, channels).buffer, 0)
        low, high = sorted(self.rng.uniform(-1, 1) for _ in range(2))
        p, q = (1.5, 20.0) if op == Op.SOFTPLUS else (low, high)
        assert a is not None
        assert b is not None
        self.add(when, Pointwise(*out, channels, op, a, b, p, q))

    def concat(self, when: str) -> None:
        """A buffer that two instructions write, and a third changes in place."""
        first, second = self.rng.randint(1, 20), self.rng.randint(1, 20)
        node = self.node(when, first + second)
        self.nodes.remove(node)
        self.conv(when, first, (node.buffer, 0))
        self.pointwise(when, second, (node.buffer, first))
        whole = self.operand(Operand(False, node.buffer))
        self.add(when, Pointwise(node.buffer, 0, node.channels, Op.LEAKY_RELU, whole, -1, 0.3))
        self.nodes.append(node)

    def attention(self, when: str) -> None:
        rows, cols = self.head.rows, self.head.cols
        heads, dim_k, dim_v = self.rng.randint(1, 5), self.rng.randint(1, 20), self.rng.choice([3, 16, 24])
        node = self.node("pixel", heads * (dim_k + dim_v), full=True)
        self.nodes.remove(node)
        self.conv("pixel", node.channels, (node.buffer, 0))
        self.nodes.append(node)
        q = self.read(when, heads * dim_k)
        k = self.operand(Operand(False, node.buffer))
        v = self.operand(Operand(False, node.buffer, heads * dim_k))
        cells = torch.arange(rows * cols)
        count = cells + self.rng.randint(0, 1) if when == "pixel" else cells // cols * cols
        self.program.tensors.append(count)
        out = self.node(when, heads * dim_v).buffer
        assert q is not None
        index = len(self.program.tensors) - 1
        self.add(when, Attention(out, 0, q, k, v, heads, dim_k, dim_v, dim_k**-0.5, index, cols))

    def schedule(self) -> None:
        rows, cols, draws = self.head.rows, self.head.cols, self.head.draws
        segments: list[tuple[int, ...]] = []
        begin = [0]
        for slot in range(rows * cols * draws):
            pixel, draw = divmod(slot, draws)
            y, x = divmod(pixel, cols)
            for when, i in self.steps:
                if when == "input" and draw == 0 and pixel > 0:
                    segments.append((i, (pixel - 1) // cols, (pixel - 1) % cols, 1))
            for when, i in self.steps:
                if when == "row" and x == draw == 0:
                    cut = self.rng.randrange(cols)
                    parts = [(0, cut), (cut, cols - cut)] if cut else [(0, cols)]
                    segments += [(i, y, first, n) for first, n in parts]
                if when == "coarse" and x == draw == 0 and y % 2 == 0 and y >= 2:
                    segments.append((i, y // 2 - 1, 0, cols // 2))
            segments += [(i, y, x, 1) for when, i in self.steps if when == "pixel"]
            begin.append(len(segments))
        self.program.segments = torch.tensor(segments, dtype=torch.int32)
        self.program.slot_begin = torch.tensor(begin)


def _head(name: str, rows: int, cols: int, input: int) -> tuple[Head, int]:
    """The head with operand 0 as its parameters, and how many channels those have."""
    kind, feedback, draws = HEADS[name]
    classes, values, stride = 5, draws, (1, 0)
    channels = draws * classes
    if kind == HeadKind.CATEGORICAL:
        stride = (draws, 1)
    elif kind == HeadKind.GAUSSIAN:
        stride, channels = (draws, 1), 2 * draws
    elif kind == HeadKind.LOGISTIC_MIXTURE:
        values, channels, stride = 3, 10 * classes, (0, 3 * classes)
    elif kind == HeadKind.BERNOULLI:
        classes, channels = 2, 1
    noises = values + (kind == HeadKind.LOGISTIC_MIXTURE)
    head = Head(kind, 0, rows, cols, draws, values, noises, classes, *stride, feedback, input, 0.5, -0.25)
    return head, channels


def random_program(seed: int, head: str, rows: int = 6, cols: int = 5, wide: int = 40) -> Program:
    """About a dozen instructions of all kinds, with up to ``wide`` channels, that end in a head of HEADS.

    Constants hold 16 images at most.
    """
    rng = random.Random(seed)
    description, params = _head(head, rows, cols, -1 if HEADS[head][1] == FeedbackKind.NONE else 0)
    program = Program(description, operands=[Operand(False, 0)])
    b = Builder(rng, description, program)
    classes = description.classes
    inputs = description.draws * classes if HEADS[head][1] == FeedbackKind.ONE_HOT else description.values
    if HEADS[head][1] == FeedbackKind.NONE:
        b.node("input", 12)
        program.tensors.append(b.weights(1, classes, 12))
        program.taps.append((0, 0))
        b.add("input", Embed(0, 0, 12, 0, 0, 0, 1))
    else:
        b.node("input", inputs)
    for when in ("row", "pixel"):
        b.conv(when, rng.randint(wide // 2, wide))
        if description.kind in (HeadKind.CATEGORICAL, HeadKind.BERNOULLI):
            b.embed(when, rng.choice([rng.randint(1, wide), 64]))
    b.attention("pixel")
    b.attention("row")
    for _ in range(6):
        when = rng.choice(["row", "pixel", "coarse"])
        if when == "coarse":
            if any(n.when != "coarse" and n.back >= 1 and n.left is None for n in b.nodes):
                b.conv("coarse", rng.randint(1, wide))
            continue
        step = rng.choice([b.conv, b.pointwise, b.concat])
        if step == b.concat:
            b.concat(when)
        else:
            step(when, rng.randint(1, wide))
    for _ in range(3):
        b.pointwise("pixel", rng.choice([16, 16, rng.randint(1, wide)]))
    b.conv("pixel", wide)
    last = b.nodes[-1].buffer
    out = b.node("pixel", params + 2)
    weight = b.weights(1, wide, params, gain=wide**-0.5)
    program.weights.append(weight)
    program.taps.append((0, 0))
    source = b.operand(Operand(False, last))
    taps = len(program.taps)
    b.add("pixel", Conv(out.buffer, 2, params, source, wide, taps - 1, taps, 1, 1, len(program.weights) - 1))
    program.operands[0] = Operand(False, out.buffer, 2)
    b.schedule()
    return program
