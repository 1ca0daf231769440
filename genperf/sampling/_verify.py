"""The proof that a graph is causal: when the inputs of every cell are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genperf.sampling._errors import CausalityError
from genperf.sampling._ir import (
    AttentionNode,
    ConvNode,
    GlobalNode,
    Graph,
    Input,
    Node,
    Ref,
    Source,
    Window,
)

Cells = NDArray[np.int64]  # [rows, cols]: number of the last draw that a cell depends on, -1 for none


@dataclass
class Times:
    """For each node, the draw after which each of its cells is known."""

    known: dict[int, Cells]
    draws: int

    def of(self, source: Source | None, rows: int, cols: int) -> Cells:
        """The same for a source as it is read by a node of that grid."""
        if not isinstance(source, Ref):
            return np.full((rows, cols), -1)
        return windowed(self.known[id(source.node)], source.window, rows, cols)


def windowed(cells: Cells, window: Window, rows: int, cols: int, num: int = 1, den: int = 1) -> Cells:
    """``cells`` through a window, at rows and columns that are scaled by num / den; -1 where 0 is read."""
    y, in_y = _positions(rows, num, den, window.dy, window.y0, min(window.y1, cells.shape[0]))
    x, in_x = _positions(cols, num, den, window.dx, window.x0, min(window.x1, cells.shape[1]))
    read: Cells = np.where(in_y[:, None] & in_x[None], cells[y[:, None], x[None]], -1)
    return read


def _positions(
    n: int, num: int, den: int, offset: int, low: int, high: int
) -> tuple[Cells, NDArray[np.bool_]]:
    at = np.arange(n) * num + offset
    inside = (at % den == 0) & (at // den >= max(low, 0)) & (at // den < high)
    return np.where(inside, at // den, 0), inside


def tap_window(node: ConvNode, tap: tuple[int, int]) -> tuple[Window, int, int]:
    """How a tap reads: the scaled offset, and then the window of the source."""
    w = node.source.window
    shifted = Window(tap[0] + w.dy * node.den, tap[1] + w.dx * node.den, w.y0, w.y1, w.x0, w.x1)
    return shifted, node.num, node.den


def tap_times(times: Times, node: ConvNode, tap: tuple[int, int]) -> Cells:
    window, num, den = tap_window(node, tap)
    return windowed(times.known[id(node.source.node)], window, node.rows, node.cols, num, den)


def when_known(graph: Graph, draws: int = 1) -> Times:
    """Exact times for every node, tap by tap."""
    times = Times({}, draws)
    for node in graph.nodes:
        times.known[id(node)] = _node_times(times, node)
    return times


def _node_times(times: Times, node: Node) -> Cells:
    rows, cols = node.rows, node.cols
    if isinstance(node, Input):
        pixels = np.arange(rows * cols).reshape(rows, cols)
        return pixels * times.draws + times.draws - 1
    if isinstance(node, ConvNode):
        cells = times.of(node.init, rows, cols)
        for tap in node.taps:
            cells = np.maximum(cells, tap_times(times, node, tap))
        return cells
    if isinstance(node, AttentionNode):
        keys = np.maximum(times.of(node.k, rows, cols), times.of(node.v, rows, cols)).ravel()
        last = np.concatenate([[-1], np.maximum.accumulate(keys)])
        count = node.count.numpy()
        cells = np.maximum(last[count].reshape(rows, cols), times.of(node.q, rows, cols))
        return np.where(count.reshape(rows, cols) > 0, cells, -1)
    if isinstance(node, GlobalNode):
        return np.full((rows, cols), times.known[id(node.source.node)].max())
    cells = np.full((rows, cols), -1)
    for source in node.sources:
        cells = np.maximum(cells, times.of(source, rows, cols))
    return cells


def check_causal(graph: Graph, times: Times) -> None:
    """Raise CausalityError unless the parameters of each draw depend on earlier draws alone."""
    rows, cols = graph.input.rows, graph.input.cols
    seen = times.of(graph.output, rows, cols)
    allowed = np.arange(rows * cols).reshape(rows, cols) * times.draws - 1
    late = np.argwhere(seen > allowed)
    if len(late) == 0:
        return
    y, x = map(int, late[len(late) // 2])
    sees = divmod(int(seen[y, x]) // times.draws, cols)
    name, tap = _offender(times, graph.output, y, x)
    at = f" through its tap (row {tap[0]:+d}, column {tap[1]:+d})" if tap else ""
    raise CausalityError(
        f"{name}{at} looks at the future: the output at pixel ({y}, {x}) depends on pixel {sees}, "
        "which is drawn at the same time or later"
    )


def _offender(times: Times, ref: Ref, y: int, x: int) -> tuple[str, tuple[int, int] | None]:
    """On the way from an output cell to its last input, the node that looks furthest ahead."""
    best: tuple[tuple[int, int], str, tuple[int, int] | None] = ((-(1 << 30), 0), ref.node.name, None)
    node, y, x = ref.node, y + ref.window.dy, x + ref.window.dx
    while not isinstance(node, Input):
        if isinstance(node, AttentionNode | GlobalNode):
            return node.name, None
        if isinstance(node, ConvNode) and node.taps:
            tap = max(node.taps, key=lambda t, n=node, i=y, j=x: int(tap_times(times, n, t)[i, j]))  # type: ignore[misc]
            if tap >= best[0]:  # of several, the one nearest to the input
                best = (tap, node.name, tap)
            window, num, den = tap_window(node, tap)
            node, y, x = node.source.node, (y * num + window.dy) // den, (x * num + window.dx) // den
            continue
        rows, cols = node.rows, node.cols
        refs = [s for s in node.sources if isinstance(s, Ref)]
        source = max(refs, key=lambda s, i=y, j=x, r=rows, c=cols: int(times.of(s, r, c)[i, j]))  # type: ignore[misc]
        node, y, x = source.node, y + source.window.dy, x + source.window.dx
    return best[1], best[2]
