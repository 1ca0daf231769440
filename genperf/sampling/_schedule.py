"""When each cell of a graph is computed: as late as its readers allow, many cells of a row together.

Slot t runs before draw t. A cell can be computed from the slot after the last draw that it depends on,
and has to be by the first slot in which something reads it. Where a row of cells fits between the two, one
segment computes it; otherwise runs of cells do, down to one at a time. A convolution that has to go cell
by cell leaves the taps that are known a row ahead to another one, which runs a row at a time.

Where the values of a pixel are drawn one after another, a cell whose channels are known at different draws
is computed at each of them: what is not known yet is finite, and has weight 0 in what is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from genperf.sampling._errors import CaptureError
from genperf.sampling._ir import (
    WHOLE,
    AttentionNode,
    ConcatNode,
    ConvNode,
    EmbedNode,
    Graph,
    Input,
    Node,
    PointwiseNode,
    Ref,
    Window,
)
from genperf.sampling._program import Op
from genperf.sampling._verify import Cells, Times, node_times, positions, tap_times, tap_window

NEVER = np.iinfo(np.int64).max
LONG = 4  # cells in a run that make it worth to compute them apart

Runs = NDArray[np.int64]  # [n, 4]: slot, row, first column, columns


@dataclass(eq=False)
class Task:
    """One instruction: ``node`` computes ``value``, which is what its readers refer to."""

    value: Node
    node: Node
    runs: Runs
    slots: list[Cells]  # of the first time a cell is computed, and of further times; NEVER for none
    slack: bool  # whether every cell could have been computed in an earlier slot
    ahead: bool = False  # taps computed a row ahead of the rest of their convolution


@dataclass
class Schedule:
    """Tasks in the order in which a slot runs them, and what holds the values.

    ``home`` gives for a value the node whose buffer holds it, and its first channel there. ``first`` and
    ``last`` are, for each buffer, the slots of the first write and the last read of each cell.
    """

    tasks: list[Task] = field(default_factory=list)
    home: dict[int, tuple[Node, int]] = field(default_factory=dict)
    first: dict[int, Cells] = field(default_factory=dict)
    last: dict[int, Cells] = field(default_factory=dict)


def runs_of(ready: Cells, need: Cells) -> Runs:
    """Neighbouring cells of a row as long as one slot suits all: the last one that does."""
    found: list[tuple[int, int, int, int]] = []
    wanted = need < NEVER
    for y in range(len(need)):
        r, n = ready[y], need[y]
        if wanted[y].all():
            if r.max() <= n.min():
                found.append((int(n.min()), y, 0, len(n)))
                continue
            if (r[1:] > n[:-1]).all():
                found.extend((int(slot), y, x, 1) for x, slot in enumerate(n))
                continue
        found.extend(_greedy(y, r.tolist(), n.tolist()))
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def _greedy(y: int, ready: list[int], need: list[int]) -> Iterator[tuple[int, int, int, int]]:
    start, low, high = 0, 0, NEVER
    for x in range(len(need) + 1):
        now_low, now_high = (max(low, ready[x]), min(high, need[x])) if x < len(need) else (1, 0)
        ends = now_low > now_high or need[x] == NEVER
        if ends:
            if x > start and high < NEVER:
                yield high, y, start, x - start
            start, low, high = x, 0, NEVER
            if x < len(need) and need[x] < NEVER:
                low, high = ready[x], need[x]
            else:
                start = x + 1
        else:
            low, high = now_low, now_high


def _mean_run(runs: Runs) -> float:
    return float(runs[:, 3].mean()) if len(runs) else 0.0


def _slots(runs: Runs, rows: int, cols: int) -> Cells:
    cells = np.full((rows, cols), NEVER)
    for slot, y, x, n in runs.tolist():
        cells[y, x : x + n] = slot
    return cells


def schedule(graph: Graph, times: Times) -> Schedule:
    """The tasks of a causal graph. ``times`` gains those of nodes that are made here.

    Raises:
        CaptureError: if a cell has channels of which some are read before others are known, in another
            pixel's slot.
    """
    graph = _housed(graph, times)
    return _Scheduler(graph, times).run()


def _housed(graph: Graph, times: Times) -> Graph:
    """The same with only whole nodes as parts of concatenations: those can be written in place."""
    nodes: list[Node] = []
    taken: set[int] = {id(graph.input)}
    for node in graph.nodes:
        if isinstance(node, ConcatNode):
            for i, (source, channels) in enumerate(node.parts):
                if isinstance(source, Ref) and _is_whole(source, node) and id(source.node) not in taken:
                    taken.add(id(source.node))
                    continue
                copy = PointwiseNode(node.name, node.rows, node.cols, channels, Op.COPY, source)
                times.known[id(copy)] = node_times(times, copy)
                node.parts[i] = (Ref(copy, 0, channels), channels)
                taken.add(id(copy))
                nodes.append(copy)
        nodes.append(node)
    return Graph(graph.input, nodes, graph.output)


def _is_whole(ref: Ref, reader: Node) -> bool:
    node, window = ref.node, ref.window.within(reader.rows, reader.cols)
    return (ref.channel, ref.channels, node.rows, node.cols) == (
        0,
        node.channels,
        reader.rows,
        reader.cols,
    ) and window == WHOLE.within(reader.rows, reader.cols)


class _Scheduler:
    def __init__(self, graph: Graph, times: Times) -> None:
        self.graph = graph
        self.times = times
        self.made = Schedule()
        self._need: dict[int, Cells] = {}
        self._last: dict[int, Cells] = {}
        for node in graph.nodes:
            self._prepare(node)
        for node in reversed(graph.nodes):  # an outer concatenation before those that are parts of it
            if isinstance(node, ConcatNode):
                home, channel = self.made.home[id(node)]
                for source, channels in node.parts:
                    assert isinstance(source, Ref)
                    self.made.home[id(source.node)] = (home, channel)
                    channel += channels

    def _prepare(self, node: Node) -> None:
        self.made.home[id(node)] = (node, 0)
        self._need[id(node)] = np.full((node.rows, node.cols), NEVER)
        self._last[id(node)] = np.full((node.rows, node.cols), -1)

    def run(self) -> Schedule:
        grid = self.graph.input
        first = np.arange(grid.rows * grid.cols).reshape(grid.rows, grid.cols) * self.times.draws
        output = self.graph.output
        self._read(output, output.window, first, first + self.times.draws - 1, grid)
        for node in reversed(self.graph.nodes):
            if not isinstance(node, ConcatNode | Input):
                self._node(node)
        self.made.tasks.reverse()
        self._lifetimes(first)
        return self.made

    def _node(self, node: Node) -> None:
        need = self._need[id(node)]
        ready = self.times.known[id(node)].cells + 1
        runs, slots = self._times_of(ready, need)
        if isinstance(node, ConvNode):
            split = self._split(node, runs, slots[0])
            if split is not None:
                last, *before = split
                self._task(node, last, runs, slots, ready)
                for part in before:
                    self._prepare(part)
                self._add_reads(last, slots)
                for part in before:
                    early = self.times.known[id(part)].cells + 1
                    runs, slots = self._times_of(early, self._need[id(part)])
                    self._task(part, part, runs, slots, early, ahead=isinstance(part, ConvNode))
                    self._add_reads(part, slots)
                return
        self._task(node, node, runs, slots, ready)
        self._add_reads(node, slots)

    def _task(
        self, value: Node, node: Node, runs: Runs, slots: list[Cells], ready: Cells, ahead: bool = False
    ) -> None:
        known = ready.max(0)
        slack = bool((known[slots[0] < NEVER] < slots[0][slots[0] < NEVER]).all())
        self.made.tasks.append(Task(value, node, runs, slots, slack, ahead))

    def _times_of(self, ready: Cells, need: Cells) -> tuple[Runs, list[Cells]]:
        """Runs for cells that are known in time as a whole, and more than one evaluation for others."""
        latest = ready.max(0)
        again = (latest > need) & (need < NEVER)
        runs = runs_of(latest, np.where(again, NEVER, need))
        slots = [_slots(runs, *need.shape)]
        if not again.any():
            return runs, slots
        slots[0] = np.where(again, need, slots[0])
        moments = np.sort(np.where(again & (ready > need), ready, NEVER), axis=0)
        for i, moment in enumerate(moments):
            fresh = moment < NEVER
            if i:
                fresh &= moment != moments[i - 1]
            if fresh.any():
                slots.append(np.where(fresh, moment, NEVER))
        singles = [runs]
        for i, cells in enumerate(slots):
            y, x = np.nonzero(again if i == 0 else cells < NEVER)
            singles.append(np.stack([cells[y, x], y, x, np.ones_like(x)], 1))
        return np.concatenate(singles), slots

    def _split(self, node: ConvNode, runs: Runs, slots: Cells) -> list[Node] | None:
        """Nodes, the last one first: of the taps that are known long before, and of the rest.

        Between them an init that is not known so early is added.
        """
        enough = max(min(LONG, node.cols), 2 * _mean_run(runs))

        def early(known: Cells) -> bool:
            in_time = known + 1 <= slots
            return bool(in_time.all()) and _mean_run(runs_of(known + 1, slots)) >= enough

        chosen = [i for i, tap in enumerate(node.taps) if early(tap_times(self.times, node, tap))]
        if not chosen:
            return None
        others = [i for i in range(len(node.taps)) if i not in chosen]
        takes_init = early(self.times.of(node.init, node.rows, node.cols))
        if not others and takes_init:
            return None
        ahead = replace(
            node,
            taps=[node.taps[i] for i in chosen],
            weight=node.weight[chosen],
            init=node.init if takes_init else None,
        )
        parts: list[Node] = [ahead]
        shape = (node.name, node.rows, node.cols, node.channels)
        if not takes_init:
            assert node.init is not None
            parts.insert(0, PointwiseNode(*shape, Op.ADD, Ref(ahead, 0, node.channels), node.init))
        if others:
            taps = [node.taps[i] for i in others]
            so_far = Ref(parts[0], 0, node.channels)
            parts.insert(0, replace(node, taps=taps, weight=node.weight[others], init=so_far))
        for part in reversed(parts):
            self.times.known[id(part)] = node_times(self.times, part)
        return parts

    def _add_reads(self, node: Node, slots: list[Cells]) -> None:
        """Note what a task reads, and when."""
        first = slots[0]
        last = np.where(first == NEVER, -1, first)
        for further in slots[1:]:
            last = np.maximum(last, np.where(further == NEVER, -1, further))
        if isinstance(node, ConvNode):
            for tap in node.taps:
                window, num, den = tap_window(node, tap)
                self._read(node.source, window, first, last, node, num, den)
        if isinstance(node, ConvNode | EmbedNode):
            if isinstance(node.init, Ref):
                self._read(node.init, node.init.window, first, last, node)
        elif isinstance(node, AttentionNode):
            self._read(node.q, node.q.window, first, last, node)
            for keys in (node.k, node.v):
                self._attend(keys, node, first, last)
        else:
            for source in node.sources:
                if isinstance(source, Ref):
                    self._read(source, source.window, first, last, node)

    def _leaves(self, node: Node, channel: int, channels: int) -> Iterator[Node]:
        """The nodes that compute some channels of a value."""
        if not isinstance(node, ConcatNode):
            yield node
            return
        start = 0
        for source, size in node.parts:
            low, high = max(channel, start), min(channel + channels, start + size)
            if low < high:
                assert isinstance(source, Ref)
                yield from self._leaves(source.node, low - start, high - low)
            start += size

    def _read(
        self, ref: Ref, window: Window, first: Cells, last: Cells, reader: Node, num: int = 1, den: int = 1
    ) -> None:
        node = ref.node
        y, in_y = positions(reader.rows, num, den, window.dy, window.y0, min(window.y1, node.rows))
        x, in_x = positions(reader.cols, num, den, window.dx, window.x0, min(window.x1, node.cols))
        to, of = np.ix_(y[in_y], x[in_x]), np.ix_(in_y, in_x)
        for leaf in self._leaves(node, ref.channel, ref.channels):
            need, latest = self._need[id(leaf)], self._last[id(leaf)]
            need[to] = np.minimum(need[to], first[of])
            latest[to] = np.maximum(latest[to], last[of])

    def _attend(self, ref: Ref, node: AttentionNode, first: Cells, last: Cells) -> None:
        """Cell j of the keys is read by the queries that look at more than j cells."""
        count = node.count.numpy()
        looked = first.ravel() < NEVER
        shape = (ref.node.rows, ref.node.cols)
        size = shape[0] * shape[1]
        need, latest = np.full(size + 1, NEVER), np.full(size + 1, -1)
        np.minimum.at(need, count[looked], first.ravel()[looked])
        np.maximum.at(latest, count[looked], last.ravel()[looked])
        earliest = np.minimum.accumulate(need[::-1])[::-1][1:].reshape(shape)
        longest = np.maximum.accumulate(latest[::-1])[::-1][1:].reshape(shape)
        for leaf in self._leaves(ref.node, ref.channel, ref.channels):
            self._need[id(leaf)] = np.minimum(self._need[id(leaf)], earliest)
            self._last[id(leaf)] = np.maximum(self._last[id(leaf)], longest)

    def _lifetimes(self, start: Cells) -> None:
        """First writes and last reads of the buffers."""
        grid = self.graph.input
        if grid.form != "index":
            need = self._need[id(grid)]
            if (need < start).any():
                y, x = np.argwhere(need < start)[0]
                raise CaptureError(
                    f"the model computes values known at different pixels together, so that pixel ({y}, {x}) "
                    "is read before it is drawn"
                )
            self.made.first[id(grid)] = start
            self.made.last[id(grid)] = np.maximum(self._last[id(grid)], start)
        for task in self.made.tasks:
            home, _ = self.made.home[id(task.value)]
            first = task.slots[0]
            last = np.maximum(self._last[id(task.value)], np.where(first == NEVER, -1, first))
            for further in task.slots[1:]:
                last = np.maximum(last, np.where(further == NEVER, -1, further))
            if id(home) in self.made.first:
                first = np.minimum(first, self.made.first[id(home)])
                last = np.maximum(last, self.made.last[id(home)])
            self.made.first[id(home)], self.made.last[id(home)] = first, last
