"""A captured graph evaluated over whole images: what its nodes mean, without any plan."""

import torch
from torch import Tensor

from genperf.sampling._ir import (
    AttentionNode,
    ConcatNode,
    Constant,
    ConvNode,
    EmbedNode,
    Graph,
    Input,
    Node,
    PointwiseNode,
    Source,
    Window,
)  # fmt: skip
from genperf.sampling._reference import _POINTWISE
from genperf.sampling._verify import positions, tap_window


def evaluate(graph: Graph, x: Tensor) -> Tensor:
    """The output [B, rows, cols, channels] of a graph for inputs [B, rows, cols, channels], in float64."""
    known: dict[int, Tensor] = {}

    def gather(values: Tensor, window, rows: int, cols: int, num: int = 1, den: int = 1) -> Tensor:
        y, in_y = positions(rows, num, den, window.dy, window.y0, min(window.y1, values.shape[1]))
        c, in_c = positions(cols, num, den, window.dx, window.x0, min(window.x1, values.shape[2]))
        inside = torch.from_numpy(in_y[:, None] & in_c[None])[None, :, :, None]
        return torch.where(inside, values[:, torch.from_numpy(y)][:, :, torch.from_numpy(c)], 0.0)

    def read(source: Source, node: Node) -> Tensor:
        if isinstance(source, Constant):
            return source.tensor.double()
        values = known[id(source.node)][..., source.channel : source.channel + source.channels]
        return gather(values, source.window, node.rows, node.cols)

    for node in graph.nodes:
        if isinstance(node, Input):
            value = x.double()
        elif isinstance(node, EmbedNode):
            value = torch.zeros(len(x), node.rows, node.cols, node.channels, dtype=torch.float64)
            if node.init is not None:
                value = value + read(node.init, node)
            drawn = x[..., node.draw].long()
            for t, tap in enumerate(node.taps):
                if node.table is None:
                    rows_of = torch.nn.functional.one_hot(drawn, node.channels).double()
                else:
                    rows_of = node.table[t].double()[drawn]
                value = value + gather(rows_of, Window(*tap), node.rows, node.cols)
        elif isinstance(node, ConvNode):
            value = torch.zeros(len(x), node.rows, node.cols, node.channels, dtype=torch.float64)
            if node.init is not None:
                value = value + read(node.init, node)
            s = node.source
            source = known[id(s.node)][..., s.channel : s.channel + s.channels]
            for tap, weight in zip(node.taps, node.weight.double(), strict=True):
                window, num, den = tap_window(node, tap)
                value = value + gather(source, window, node.rows, node.cols, num, den) @ weight
        elif isinstance(node, PointwiseNode):
            a = read(node.a, node)
            value = _POINTWISE[node.op](a, None if node.b is None else read(node.b, node), node.p, node.q)
        elif isinstance(node, ConcatNode):
            shape = (len(x), node.rows, node.cols)
            value = torch.cat([read(p, node).expand(*shape, n) for p, n in node.parts], -1)
        else:
            assert isinstance(node, AttentionNode)
            length, heads = node.rows * node.cols, node.heads
            q, k, v = (read(s, node).reshape(len(x), length, heads, -1).transpose(1, 2) for s in node.sources)
            score = q @ k.transpose(2, 3) * node.scale
            allowed = torch.arange(length) < node.count[:, None]
            weight = torch.softmax(score.masked_fill(~allowed, -torch.inf), -1).nan_to_num()
            value = (weight @ v).transpose(1, 2).reshape(len(x), node.rows, node.cols, -1)
        known[id(node)] = value.expand(len(x), node.rows, node.cols, node.channels)
    return read(graph.output, graph.input)
