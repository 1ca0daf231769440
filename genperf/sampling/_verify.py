"""The proof that a graph is causal: when the inputs of every cell are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from genperf.sampling._errors import CausalityError
from genperf.sampling._ir import (
    AttentionNode,
    ConcatNode,
    ConvNode,
    EmbedNode,
    GlobalNode,
    Graph,
    Input,
    Node,
    PointwiseNode,
    Ref,
    Source,
    Window,
)

Cells = NDArray[np.int64]  # [rows, cols]: number of the last draw that a cell depends on, -1 for none


@dataclass
class Known:
    """When a node is known: group ``label[c]`` of channel c, and the cells [groups, rows, cols] of each."""

    label: NDArray[np.int64]
    cells: NDArray[np.int64]


@dataclass
class Times:
    """For each node, the draw after which each of its cells is known, by groups of channels."""

    known: dict[int, Known]
    draws: int

    def latest(self, node: Node) -> Cells:
        """When all channels of a node are known."""
        cells: Cells = self.known[id(node)].cells.max(0)
        return cells

    def of(self, source: Source | None, rows: int, cols: int) -> Cells:
        """The same for a source as it is read by a node of that grid."""
        cells: Cells = self.parts(source, rows, cols, 1).cells.max(0)
        return cells

    def parts(self, source: Source | None, rows: int, cols: int, channels: int) -> Known:
        """A source as it is read by a node of that grid and so many channels."""
        if not isinstance(source, Ref):
            return Known(np.zeros(channels, dtype=np.int64), np.full((1, rows, cols), -1))
        read = _slice(self.known[id(source.node)], source)
        return Known(read.label, np.stack([windowed(c, source.window, rows, cols) for c in read.cells]))


def _slice(known: Known, ref: Ref) -> Known:
    """The channels that ``ref`` reads, in cells of its node."""
    groups, label = np.unique(known.label[ref.channel : ref.channel + ref.channels], return_inverse=True)
    return Known(label, known.cells[groups])


def windowed(cells: Cells, window: Window, rows: int, cols: int, num: int = 1, den: int = 1) -> Cells:
    """``cells`` through a window, at rows and columns that are scaled by num / den; -1 where 0 is read."""
    y, in_y = positions(rows, num, den, window.dy, window.y0, min(window.y1, cells.shape[0]))
    x, in_x = positions(cols, num, den, window.dx, window.x0, min(window.x1, cells.shape[1]))
    read: Cells = np.where(in_y[:, None] & in_x[None], cells[y[:, None], x[None]], -1)
    return read


def positions(
    n: int, num: int, den: int, offset: int, low: int, high: int
) -> tuple[Cells, NDArray[np.bool_]]:
    """Where n rows or columns read, and which of them read anything."""
    at = np.arange(n) * num + offset
    inside = (at % den == 0) & (at // den >= max(low, 0)) & (at // den < high)
    return np.where(inside, at // den, 0), inside


def tap_window(node: ConvNode, tap: tuple[int, int]) -> tuple[Window, int, int]:
    """How a tap reads: the scaled offset, and then the window of the source."""
    w = node.source.window
    shifted = Window(tap[0] + w.dy * node.den, tap[1] + w.dx * node.den, w.y0, w.y1, w.x0, w.x1)
    return shifted, node.num, node.den


def tap_times(times: Times, node: ConvNode, tap: tuple[int, int]) -> Cells:
    """When all that a tap reads is known."""
    window, num, den = tap_window(node, tap)
    latest = _slice(times.known[id(node.source.node)], node.source).cells.max(0)
    return windowed(latest, window, node.rows, node.cols, num, den)


def when_known(graph: Graph, draws: int = 1) -> Times:
    """Exact times for every node, tap by tap and channel by channel."""
    times = Times({}, draws)
    for node in graph.nodes:
        times.known[id(node)] = node_times(times, node)
    return times


def node_times(times: Times, node: Node) -> Known:
    """When a node is known, given those that it reads."""
    rows, cols, channels = node.rows, node.cols, node.channels
    if isinstance(node, Input):
        pixels = np.arange(rows * cols).reshape(1, rows, cols) * times.draws
        draw = np.arange(channels) * times.draws // channels
        return Known(draw, pixels + np.arange(draw[-1] + 1)[:, None, None])
    if isinstance(node, ConvNode):
        return _merged(*_conv_times(times, node))
    if isinstance(node, EmbedNode):
        return _merged(*_embed_times(times, node))
    if isinstance(node, ConcatNode):
        parts = [times.parts(source, rows, cols, n) for source, n in node.parts]
        starts = np.cumsum([0] + [len(p.cells) for p in parts])
        label = np.concatenate([p.label + start for p, start in zip(parts, starts, strict=False)])
        return _merged(label, np.concatenate([p.cells for p in parts]))
    if isinstance(node, PointwiseNode):
        a, b = (times.parts(s, rows, cols, channels) for s in (node.a, node.b))
        first, label = _distinct(np.stack([a.label, b.label], 1))
        return _merged(label, np.maximum(a.cells[a.label[first]], b.cells[b.label[first]]))
    if isinstance(node, AttentionNode):
        keys = np.maximum(times.of(node.k, rows, cols), times.of(node.v, rows, cols)).ravel()
        last = np.concatenate([[-1], np.maximum.accumulate(keys)])
        count = node.count.numpy()
        cells = np.maximum(last[count].reshape(rows, cols), times.of(node.q, rows, cols))
        cells = np.where(count.reshape(rows, cols) > 0, cells, -1)
    else:
        assert isinstance(node, GlobalNode)
        cells = np.full((rows, cols), times.latest(node.source.node).max())
    return Known(np.zeros(channels, dtype=np.int64), cells[None])


def _conv_times(times: Times, node: ConvNode) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    init = times.parts(node.init, node.rows, node.cols, node.channels)
    if not node.taps:
        return init.label, init.cells
    source = _slice(times.known[id(node.source.node)], node.source)
    live = node.weight.numpy() != 0  # [taps, channels in, channels]
    member = source.label[:, None] == np.arange(len(source.cells))
    used = np.stack([live[:, member[:, g]].any(1) for g in range(member.shape[1])], 1)  # [taps, groups, n]
    seen = np.stack(
        [
            windowed(cells, window, node.rows, node.cols, num, den)
            for window, num, den in (tap_window(node, tap) for tap in node.taps)
            for cells in source.cells
        ]
    )
    return _sum_times(init, used.reshape(-1, node.channels), seen)


def _embed_times(times: Times, node: EmbedNode) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    init = times.parts(node.init, node.rows, node.cols, node.channels)
    (drawn,) = _slice(times.known[id(node.input)], Ref(node.input, node.draw, 1)).cells
    seen = np.stack([windowed(drawn, Window(*tap), node.rows, node.cols) for tap in node.taps])
    table = torch.ones(1, 1, node.channels) if node.table is None else node.table
    return _sum_times(init, (table != 0).any(1).numpy(), seen)


def _sum_times(
    init: Known, used: NDArray[np.bool_], seen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of init and terms known at ``seen`` [terms, rows, cols]; ``used`` [terms, n]: which a channel has.

    One group for every set of terms that some channel depends on.
    """
    first, label = _distinct(np.concatenate([init.label[:, None], used.T], 1))
    known = [np.maximum(init.cells[init.label[c]], seen[used[:, c]].max(0, initial=-1)) for c in first]
    return label, np.stack(known)


def _merged(label: NDArray[np.int64], cells: NDArray[np.int64]) -> Known:
    """Groups of equal times as one."""
    if len(cells) == 1:
        return Known(label, cells)
    first, same = _distinct(cells.reshape(len(cells), -1))
    return Known(same[label], cells[first])


def _distinct(rows: NDArray[np.int64]) -> tuple[list[int], NDArray[np.int64]]:
    """Where each different row is first, and for every row which of these it is.

    ``np.unique`` would sort them, which takes most of the time of a plan.
    """
    found: dict[bytes, int] = {}
    label = [found.setdefault(row.tobytes(), len(found)) for row in rows]
    first = [label.index(i) for i in range(len(found))]
    return first, np.array(label)


def check_causal(graph: Graph, times: Times, draw: Sequence[int] | None = None) -> None:
    """Raise CausalityError unless the parameters of each draw depend on earlier draws alone.

    ``draw[c]`` is the draw that channel c of the output belongs to: by default the first of the pixel.
    """
    rows, cols = graph.input.rows, graph.input.cols
    seen = times.parts(graph.output, rows, cols, graph.output.channels)
    first = np.arange(rows * cols).reshape(rows, cols) * times.draws
    for channel in range(graph.output.channels):
        own = 0 if draw is None else draw[channel]
        cells = seen.cells[seen.label[channel]]
        late = np.argwhere(cells >= first + own)
        if len(late):
            y, x = map(int, late[len(late) // 2])
            raise CausalityError(_complaint(graph, times, channel, y, x, int(cells[y, x])))


def _complaint(graph: Graph, times: Times, channel: int, y: int, x: int, seen: int) -> str:
    sees = divmod(seen // times.draws, graph.input.cols)
    name, tap = _offender(times, graph.output, channel, y, x)
    at = f" through its tap (row {tap[0]:+d}, column {tap[1]:+d})" if tap else ""
    of = f", value {seen % times.draws}," if times.draws > 1 else ""
    return (
        f"{name}{at} looks at the future: the output at pixel ({y}, {x}) depends on pixel {sees}{of} "
        "which is drawn at the same time or later"
    )


def _offender(times: Times, ref: Ref, channel: int, y: int, x: int) -> tuple[str, tuple[int, int] | None]:
    """On the way from an output cell to its last input, the node that looks furthest ahead."""
    best: tuple[tuple[int, int], str, tuple[int, int] | None] = ((-(1 << 30), 0), ref.node.name, None)
    node, c, y, x = ref.node, ref.channel + channel, y + ref.window.dy, x + ref.window.dx
    while not isinstance(node, Input):
        if isinstance(node, AttentionNode | GlobalNode):
            return node.name, None
        if isinstance(node, ConvNode):
            found = _latest_tap(times, node, c, y, x)
            if found is not None:
                tap, c = found
                if tap >= best[0]:  # of several, the one nearest to the input
                    best = (tap, node.name, tap)
                window, num, den = tap_window(node, tap)
                node, y, x = node.source.node, (y * num + window.dy) // den, (x * num + window.dx) // den
                continue
        ref, c = _latest_source(times, node, c, y, x)
        node, c, y, x = ref.node, ref.channel + c, y + ref.window.dy, x + ref.window.dx
    return best[1], best[2]


def _latest_tap(times: Times, node: ConvNode, c: int, y: int, x: int) -> tuple[tuple[int, int], int] | None:
    """The tap, and channel of the source's node, that gives a channel its last dependence."""
    source = times.known[id(node.source.node)]
    live = node.weight.numpy()[:, :, c] != 0
    best, found = -1, None
    for t, tap in enumerate(node.taps):
        window, num, den = tap_window(node, tap)
        for i in np.unique(source.label[node.source.channel + np.flatnonzero(live[t])], return_index=True)[1]:
            channel = node.source.channel + int(np.flatnonzero(live[t])[i])
            cells = source.cells[source.label[channel]]
            seen = int(windowed(cells, window, node.rows, node.cols, num, den)[y, x])
            if seen > best:
                best, found = seen, (tap, channel)
    if isinstance(node.init, Ref):
        init = times.parts(node.init, node.rows, node.cols, node.channels)
        if int(init.cells[init.label[c]][y, x]) > best:
            return None
    return found


def _latest_source(times: Times, node: Node, c: int, y: int, x: int) -> tuple[Ref, int]:
    """The reference that gives a channel its last dependence, and which of its channels that is."""
    if isinstance(node, ConcatNode):
        for source, channels in node.parts:
            if c < channels:
                assert isinstance(source, Ref)
                return source, c
            c -= channels
    sources = [node.init] if isinstance(node, ConvNode) else node.sources
    refs = [s for s in sources if isinstance(s, Ref)]

    def seen(ref: Ref) -> int:
        known = times.parts(ref, node.rows, node.cols, ref.channels)
        return int(known.cells[known.label[min(c, ref.channels - 1)]][y, x])

    ref = max(refs, key=seen)
    return ref, min(c, ref.channels - 1)
