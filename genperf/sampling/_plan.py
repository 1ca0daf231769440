"""From a captured graph to the program that executors run: buffers, instructions, segments."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from genperf.sampling import _program as p
from genperf.sampling._errors import CaptureError
from genperf.sampling._feedback import Feedback, Scaled
from genperf.sampling._ir import (
    AttentionNode,
    Constant,
    ConvNode,
    EmbedNode,
    Graph,
    PointwiseNode,
    Source,
    Window,
)
from genperf.sampling._layout import plain
from genperf.sampling._schedule import NEVER, Schedule, Task, schedule
from genperf.sampling._simplify import by_class, simplify
from genperf.sampling._verify import Cells, check_causal, when_known
from genperf.sampling.heads import Description

_IDENTITY = 1 << 30  # bytes of a table of one-hot codes


@dataclass
class Plan:
    """A program, and for each of its instructions the node that it comes from and its role.

    Roles: "row" computes several cells of a row at once; "ahead" does so for the taps of a convolution
    that are known a row before the rest; "pixel" computes one cell a pixel, in the slot in which what it
    reads is drawn; "prefetch" one cell a pixel that is known earlier.
    """

    program: p.Program
    names: list[str]
    roles: list[str]
    head: Description
    feedback: Feedback


def plan(graph: Graph, head: Description, feedback: Feedback) -> Plan:
    """The program that samples from a causal graph.

    Args:
        head: what the graph's output means.
        feedback: how a drawn value enters the graph's input.

    Raises:
        CausalityError: if an output depends on what is not drawn yet.
        CaptureError: if the graph has no incremental form.
    """
    check_causal(graph, when_known(graph, head.draws), _draw_of_channel(head, graph.output.channels))
    classes = by_class(graph) if feedback == "one_hot" and head.draws == 1 else None
    graph = simplify(graph, head.draws) if classes is None else classes
    # Heads read cells: not the zeros beside a node that a shift of the output brings in.
    graph.output = plain(graph.output, graph.input.rows, graph.input.cols, graph.nodes, "the model's output")
    made = schedule(graph, when_known(graph, head.draws))
    return _Emitter(graph, made).plan(head, feedback)


def refill(old: Plan, graph: Graph) -> None:
    """Put the weights and constants of another recording of the same model into a plan.

    Raises:
        CaptureError: if the recording needs another plan.
    """
    new = plan(graph, old.head, old.feedback).program
    tables = zip(old.program.tables().values(), new.tables().values(), strict=True)
    if not all(torch.equal(a, b) for a, b in tables) or not torch.equal(old.program.segments, new.segments):
        raise CaptureError("the structure of the model has changed since it was compiled; compile it again")
    old.program.tensors, old.program.weights = new.tensors, new.weights


def _draw_of_channel(head: Description, channels: int) -> list[int]:
    """The first draw of a pixel that reads each channel of the output; the last one where none does."""
    owner = [head.draws - 1] * channels
    for draw in reversed(range(head.draws)):
        for channel in head.reads(draw, channels):
            owner[channel] = draw
    return owner


class _Emitter:
    """Instructions for the tasks of a schedule."""

    def __init__(self, graph: Graph, made: Schedule) -> None:
        self._graph = graph
        self._made = made
        self._buffer: dict[int, int] = {}
        self._operands: dict[p.Operand, int] = {}
        self._consts: dict[int, int] = {}
        self._program: p.Program = None  # type: ignore[assignment]

    def plan(self, head: Description, feedback: Feedback) -> Plan:
        grid = self._graph.input
        self._program = program = p.Program(head.program(0, grid.rows, grid.cols))
        self._buffers()
        params = self._operand(self._graph.output)
        fed, input, scale = p.FeedbackKind.NONE, -1, Scaled()
        if grid.form != "index":
            input = self._buffer[id(grid)]
            fed = p.FeedbackKind.ONE_HOT
            if isinstance(feedback, Scaled):
                fed, scale = p.FeedbackKind.SCALED, feedback
        program.head = head.program(params, grid.rows, grid.cols, fed, input, scale.scale, scale.offset)
        program.instructions = [self._instruction(task) for task in self._made.tasks]
        self._segments()
        roles = [_role(task) for task in self._made.tasks]
        return Plan(program, [task.value.name for task in self._made.tasks], roles, head, feedback)

    # buffers

    def _buffers(self) -> None:
        homes = [self._graph.input] + [self._made.home[id(task.value)][0] for task in self._made.tasks]
        for node in dict.fromkeys(homes):
            if id(node) not in self._made.first:  # indices, which are read from the values
                continue
            rows, cols = ring(self._made.first[id(node)], self._made.last[id(node)])
            self._buffer[id(node)] = len(self._program.buffers)
            self._program.buffers.append(p.Buffer(self._program.workspace, rows, cols, node.channels))
            self._program.workspace += _padded(rows * cols * node.channels)

    # operands

    def _operand(self, source: Source | None) -> int:
        if source is None:
            return -1
        if isinstance(source, Constant):
            w = _inside(source.window, *(n if n > 1 else None for n in source.tensor.shape[1:3]))
            made = p.Operand(True, self._const(source), 0, w.dy, w.dx, w.y0, w.y1, w.x0, w.x1)
        else:
            home, channel = self._made.home[id(source.node)]
            w = _inside(source.window, source.node.rows, source.node.cols)
            made = p.Operand(
                False, self._buffer[id(home)], channel + source.channel, w.dy, w.dx, w.y0, w.y1, w.x0, w.x1
            )
        if made not in self._operands:
            self._operands[made] = len(self._program.operands)
            self._program.operands.append(made)
        return self._operands[made]

    def _const(self, constant: Constant) -> int:
        if id(constant.tensor) not in self._consts:
            tensor = constant.tensor.float().contiguous()
            strides = [s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
            self._consts[id(constant.tensor)] = len(self._program.consts)
            self._program.consts.append(p.Const(self._tensor(tensor), *strides))
        return self._consts[id(constant.tensor)]

    def _tensor(self, tensor: Tensor) -> int:
        self._program.tensors.append(tensor)
        return len(self._program.tensors) - 1

    # instructions

    def _instruction(self, task: Task) -> p.Instruction:
        home, channel = self._made.home[id(task.value)]
        out, node, program = self._buffer[id(home)], task.node, self._program
        if isinstance(node, PointwiseNode):
            a, b = self._operand(node.a), self._operand(node.b)
            return p.Pointwise(out, channel, node.channels, node.op, a, b, node.p, node.q)
        if isinstance(node, EmbedNode):
            begin = len(program.taps)
            program.taps += node.taps
            return p.Embed(
                out, channel, node.channels, self._tensor(_table(node)), node.draw, begin, len(program.taps),
                self._operand(node.init),
            )  # fmt: skip
        if isinstance(node, AttentionNode):
            q, k, v = (self._operand(replace(s, window=Window())) for s in (node.q, node.k, node.v))
            return p.Attention(
                out, channel, q, k, v, node.heads, node.dim_k, node.dim_v, node.scale,
                self._tensor(node.count), node.k.node.cols,
            )  # fmt: skip
        assert isinstance(node, ConvNode)
        begin = len(program.taps)
        program.taps += node.taps
        program.weights.append(node.weight)
        return p.Conv(
            out, channel, node.channels, self._operand(node.source), node.source.channels, begin,
            len(program.taps), node.num, node.den, len(program.weights) - 1, self._operand(node.init),
        )  # fmt: skip

    def _segments(self) -> None:
        parts = []
        for i, task in enumerate(self._made.tasks):
            slot, row, col, cols = task.runs.T
            parts.append(np.stack([slot, np.full_like(slot, i), row, col, cols], 1))
        table = np.concatenate(parts)
        table = table[np.lexsort((table[:, 3], table[:, 2], table[:, 1], table[:, 0]))]
        counts = np.bincount(table[:, 0], minlength=self._program.slots)
        self._program.slot_begin = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        self._program.segments = torch.from_numpy(np.ascontiguousarray(table[:, 1:], dtype=np.int32))


def _table(node: EmbedNode) -> Tensor:
    if node.table is not None:
        return node.table.contiguous()
    size = 4 * node.channels**2
    if size > _IDENTITY:
        raise CaptureError(
            f"{node.name}: one-hot codes of {node.channels} classes are read by more than convolutions, "
            f"which takes a table of {size} bytes; at most {_IDENTITY} are given. Use an embedding"
        )
    return torch.eye(node.channels)[None]


def _role(task: Task) -> str:
    if len(task.runs) and task.runs[:, 3].mean() > 1:
        return "ahead" if task.ahead else "row"
    return "prefetch" if task.slack else "pixel"


def _inside(window: Window, rows: int | None, cols: int | None) -> Window:
    far = Window().y1
    return window.within(far if rows is None else rows, far if cols is None else cols)


def _padded(floats: int) -> int:
    return -(-floats // 16) * 16


def ring(first: Cells, last: Cells) -> tuple[int, int]:
    """The smallest ring of rows, then of columns, in which a cell is overwritten only after its last read."""
    rows, cols = first.shape
    y, x = np.nonzero(first < NEVER)
    begin, end = first[y, x], last[y, x]

    def fits(r: int, c: int) -> bool:
        spot = y % r * c + x % c
        order = np.lexsort((begin, spot))
        same = spot[order][1:] == spot[order][:-1]
        return not (same & (begin[order][1:] <= end[order][:-1])).any()

    r = next((n for n in range(1, rows) if fits(n, cols)), rows)
    sizes = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024) if n < cols]
    return r, next((n for n in sizes if fits(r, n)), cols)
