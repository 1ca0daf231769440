"""A captured graph rewritten with fewer nodes: gates as one function, sums and scales inside convolutions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TypeAlias

import torch

from genperf.sampling._ir import (
    WHOLE,
    AttentionNode,
    ConcatNode,
    Constant,
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
from genperf.sampling._program import Op
from genperf.sampling._verify import Times, positions, tap_window, when_known, windowed

_Sum: TypeAlias = ConvNode | EmbedNode  # what starts from an init
_TABLES = 64 << 20  # bytes of tables that replace a convolution with fewer weights
_NARROW = 8  # channels of an embedding from which tables are faster than its convolution


def by_class(graph: Graph) -> Graph | None:
    """A simplified graph of drawn classes, for one whose input is their one-hot code.

    None where something else than convolutions reads the code.
    """
    simple = simplify(_Indexer(graph).run())
    return None if any(isinstance(n, EmbedNode) and n.table is None for n in simple.nodes) else simple


def simplify(graph: Graph, draws: int = 1) -> Graph:
    """An equivalent graph; values differ by rounding where sums and scales move into a convolution."""
    graph = _Mover(graph).run()
    graph = _Folder(graph, when_known(graph, draws)).run()
    return _Tabulator(graph).run()


class _Mover:
    """Lets readers of one part of a concatenation read where that part comes from."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self._now: dict[int, Node] = {}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            made = node if node is self.graph.input else self.rewritten(node)
            self._now[id(node)] = made
            self.nodes.append(made)
        return self.finished(self.graph.input)

    def finished(self, grid: Input) -> Graph:
        moved = Graph(grid, self.nodes, self.moved(self.graph.output))
        moved.prune()
        return moved

    def moved(self, ref: Ref) -> Ref:
        """The same values in the new graph."""
        node, channel, window = self._now[id(ref.node)], ref.channel, ref.window
        while isinstance(node, ConcatNode):
            start, source = 0, None
            for part, channels in node.parts:
                if start <= channel and channel + ref.channels <= start + channels:
                    source = part
                    break
                start += channels
            if not isinstance(source, Ref):
                break
            window = source.window.then(window.within(node.rows, node.cols))
            node, channel = source.node, source.channel + channel - start
        return Ref(node, channel, ref.channels, window)

    def source(self, source: Source) -> Source:
        return self.moved(source) if isinstance(source, Ref) else source

    def rewritten(self, node: Node) -> Node:
        if isinstance(node, PointwiseNode):
            a = self.source(node.a)
            b = None if node.b is None else self.source(node.b)
            return self.pointwise(replace(node, a=a, b=b))
        if isinstance(node, ConvNode):
            init = None if node.init is None else self.source(node.init)
            return replace(node, source=self.moved(node.source), init=init)
        if isinstance(node, ConcatNode):
            return replace(node, parts=[(self.source(source), n) for source, n in node.parts])
        if isinstance(node, AttentionNode):
            return replace(node, q=self.moved(node.q), k=self.moved(node.k), v=self.moved(node.v))
        if isinstance(node, GlobalNode):
            return replace(node, source=self.moved(node.source))
        assert isinstance(node, EmbedNode)
        return replace(node, init=None if node.init is None else self.source(node.init))

    def pointwise(self, node: PointwiseNode) -> Node:
        return node


class _Indexer(_Mover):
    """Reads drawn classes instead of their one-hot codes, which are the input's channels."""

    def run(self) -> Graph:
        grid = self.graph.input
        drawn = Input(grid.name, grid.rows, grid.cols, 1, "index")
        codes = EmbedNode(grid.name, grid.rows, grid.cols, grid.channels, drawn)
        self.nodes += [drawn, codes]
        self._now[id(grid)] = codes
        for node in self.graph.nodes:
            if node is not grid:
                self._now[id(node)] = self.rewritten(node)
                self.nodes.append(self._now[id(node)])
        return self.finished(drawn)


class _Folder(_Mover):
    def __init__(self, graph: Graph, times: Times) -> None:
        super().__init__(graph)
        refs = [s for n in graph.nodes for s in n.sources if isinstance(s, Ref)] + [graph.output]
        self._uses = Counter(id(ref.node) for ref in refs)
        self._known = {id(n): times.latest(n) for n in graph.nodes}

    def rewritten(self, node: Node) -> Node:
        made = super().rewritten(node)
        self._uses[id(made)], self._known[id(made)] = self._uses[id(node)], self._known[id(node)]
        return made

    def pointwise(self, node: PointwiseNode) -> Node:
        if node.b is None:
            return node
        pairs = [(node.a, node.b), (node.b, node.a)]
        for a, b in pairs:
            gate = self._only(b, node)
            if node.op == Op.MUL and isinstance(gate, PointwiseNode) and gate.op == Op.SIGMOID:
                other = self._only(a, node)
                if isinstance(other, PointwiseNode) and other.op == Op.TANH:
                    return replace(node, op=Op.TANH_SIGMOID, a=other.a, b=gate.a)
                return replace(node, op=Op.MUL_SIGMOID, a=a, b=gate.a)
        for a, b in pairs:
            conv = self._only(a, node)
            folded: Node | None = None
            if node.op == Op.ADD and isinstance(conv, ConvNode | EmbedNode):
                folded = self._plus(conv, b)
            elif node.op == Op.MUL and isinstance(conv, ConvNode) and isinstance(b, Constant):
                folded = self._times(conv, b)
            if folded is not None:
                return folded
        return node

    def _only(self, source: Source, reader: Node) -> Node | None:
        """The node that ``source`` reads whole, on the reader's grid, if nobody else reads it."""
        if not isinstance(source, Ref) or self._uses[id(source.node)] != 1:
            return None
        node, window = source.node, source.window.within(source.node.rows, source.node.cols)
        whole = source.channel == 0 and source.channels == node.channels == reader.channels
        inside = window.y0 <= window.dy and window.dy + reader.rows <= window.y1
        inside = inside and window.x0 <= window.dx and window.dx + reader.cols <= window.x1
        if not (whole and inside):
            return None
        same = window.is_plain and (node.rows, node.cols) == (reader.rows, reader.cols)
        return node if same else self._moved_to(node, window.dy, window.dx, reader)

    def _moved_to(self, node: Node, dy: int, dx: int, reader: Node) -> Node | None:
        """A node that computes at (y, x) of the reader's grid what ``node`` does at (y + dy, x + dx)."""
        rows, cols = reader.rows, reader.cols

        def read(source: Source) -> Source:
            if isinstance(source, Constant) and source.window == WHOLE:
                tensor = source.tensor
                tensor = tensor[:, dy : dy + rows] if tensor.shape[1] > 1 else tensor
                return Constant(tensor[:, :, dx : dx + cols] if tensor.shape[2] > 1 else tensor)
            return replace(source, window=source.window.then(Window(dy, dx))) if dy or dx else source

        moved: Node
        if isinstance(node, PointwiseNode):
            b = None if node.b is None else read(node.b)
            moved = replace(node, rows=rows, cols=cols, a=read(node.a), b=b)
        elif isinstance(node, ConvNode | EmbedNode):
            num = node.num if isinstance(node, ConvNode) else 1
            taps = [(y + num * dy, x + num * dx) for y, x in node.taps]
            init = None if node.init is None else read(node.init)
            moved = replace(node, rows=rows, cols=cols, taps=taps, init=init)
        else:
            return None
        known = windowed(self._known[id(node)], Window(dy, dx), rows, cols)
        self._uses[id(moved)], self._known[id(moved)] = 1, known
        return moved

    def _times(self, conv: ConvNode, factor: Constant) -> ConvNode | None:
        """``conv * factor`` as one convolution."""
        by_channel = factor.window.is_plain and tuple(factor.tensor.shape[:3]) == (1, 1, 1)
        if not by_channel or isinstance(conv.init, Ref):
            return None
        scale = factor.tensor.double()
        init = None if conv.init is None else Constant((conv.init.tensor.double() * scale).float())
        return replace(conv, weight=(conv.weight.double() * scale[0, 0]).float(), init=init)

    def _plus(self, conv: _Sum, other: Source) -> _Sum | None:
        """``conv + other`` as one node, where that needs no further sum and makes few cells later.

        At the border a convolution may depend on less than anywhere else.
        """
        if isinstance(other, Ref):
            known = windowed(self._known[id(other.node)], other.window, conv.rows, conv.cols)
            if (known > self._known[id(conv)]).mean() >= 0.5:
                return None
        if conv.init is None:
            return replace(conv, init=other)
        if isinstance(conv.init, Constant) and isinstance(other, Constant):
            if not (other.window.is_plain and conv.init.window.is_plain):
                return None
            return replace(conv, init=Constant((conv.init.tensor.double() + other.tensor.double()).float()))
        # Of a reference and a constant, the constant moves on to the convolution that is referred to.
        ref, constant = (conv.init, other) if isinstance(conv.init, Ref) else (other, conv.init)
        if not isinstance(ref, Ref) or not isinstance(constant, Constant):
            return None
        below = self._only(ref, conv)
        merged = self._plus(below, constant) if isinstance(below, ConvNode | EmbedNode) else None
        if merged is None:
            return None
        self.nodes[self.nodes.index(ref.node)] = merged
        self._uses[id(merged)], self._known[id(merged)] = 1, self._known[id(below)]
        return replace(conv, init=Ref(merged, 0, merged.channels))


class _Tabulator(_Mover):
    """Turns convolutions over embeddings, or one-hot codes, into sums of table rows."""

    def rewritten(self, node: Node) -> Node:
        made = super().rewritten(node)
        return (_tabulated(made) if isinstance(made, ConvNode) else None) or made


def _tabulated(conv: ConvNode) -> EmbedNode | None:
    """The sum of rows of ``embedding @ weight[tap]``; None where that is something else, or no faster."""
    embed, source = conv.source.node, conv.source
    if not isinstance(embed, EmbedNode) or embed.init is not None or len(embed.taps) > 1:
        return None
    taps = _drawn_at(conv, embed)
    if taps is None or (conv.num, conv.den) != (1, 1):
        return None
    weight = conv.weight[list(taps)]
    if embed.table is None:
        if source.channels < embed.channels:
            return None
        table = weight
    else:
        classes = embed.table.shape[1]
        size = 4 * len(taps) * classes * conv.channels
        if source.channels < min(_NARROW, classes) or (size > _TABLES and classes > source.channels):
            return None
        rows = embed.table[0, :, source.channel : source.channel + source.channels]
        table = (rows.double() @ weight.double()).to(torch.promote_types(rows.dtype, weight.dtype))
    shape = (conv.name, conv.rows, conv.cols, conv.channels)
    return EmbedNode(*shape, embed.input, table, embed.draw, list(taps.values()), conv.init)


def _drawn_at(conv: ConvNode, embed: EmbedNode) -> dict[int, tuple[int, int]] | None:
    """Where each tap that reads anything finds its class; None if a window hides cells of the input."""
    taps = {}
    for i, tap in enumerate(conv.taps):
        window, _, _ = tap_window(conv, tap)
        dy, dx = window.dy + embed.taps[0][0], window.dx + embed.taps[0][1]
        drawn = [
            positions(conv.rows, 1, 1, dy, 0, embed.input.rows)[1],
            positions(conv.cols, 1, 1, dx, 0, embed.input.cols)[1],
        ]
        read = [
            positions(conv.rows, 1, 1, window.dy, window.y0, min(window.y1, embed.rows))[1],
            positions(conv.cols, 1, 1, window.dx, window.x0, min(window.x1, embed.cols))[1],
        ]
        if not all(d.any() for d in drawn):
            continue
        if any((d & ~r).any() for d, r in zip(drawn, read, strict=True)):
            return None
        taps[i] = dy, dx
    return taps or None
