"""The sampler's view of a causal convolutional network: nodes over grids of cells.

A node has a value for each cell (row, column) of its grid and each image, with ``channels`` channels.
Layout operations of torch (permute, view, slice, pad, split) are no nodes: they only change which cells
and channels of a node a :class:`Ref` reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from genperf.sampling._program import Op

FAR = 1 << 30


@dataclass(frozen=True)
class Window:
    """Cell (y, x) reads source cell (y + dy, x + dx), and 0 outside [y0, y1) x [x0, x1) of the source."""

    dy: int = 0
    dx: int = 0
    y0: int = 0
    y1: int = FAR
    x0: int = 0
    x1: int = FAR

    @property
    def is_plain(self) -> bool:
        return self.dy == 0 and self.dx == 0

    def then(self, outer: Window) -> Window:
        """The window of a value that reads this one through ``outer``."""
        return Window(
            self.dy + outer.dy,
            self.dx + outer.dx,
            max(self.y0, outer.y0 + self.dy),
            min(self.y1, outer.y1 + self.dy),
            max(self.x0, outer.x0 + self.dx),
            min(self.x1, outer.x1 + self.dx),
        )

    def within(self, rows: int, cols: int) -> Window:
        """The same, with nothing read outside of that many rows and columns of the source."""
        return Window(
            self.dy, self.dx, max(self.y0, 0), min(self.y1, rows), max(self.x0, 0), min(self.x1, cols)
        )


WHOLE = Window()


@dataclass(frozen=True)
class Ref:
    """``channels`` channels of a node from ``channel`` on, through a window."""

    node: Node
    channel: int
    channels: int
    window: Window = WHOLE


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor [B or 1, rows or 1, columns or 1, channels or 1], read through a window."""

    tensor: Tensor
    window: Window = WHOLE


Source = Ref | Constant


@dataclass(eq=False)
class Node:
    """One node; ``name`` tells which module and operation of the user's model it comes from."""

    name: str
    rows: int
    cols: int
    channels: int

    @property
    def sources(self) -> list[Source]:
        return []


@dataclass(eq=False)
class Input(Node):
    """The sampled values as the model sees them: ``form`` is "float", "one_hot" or "index"."""

    form: str = "float"


@dataclass(eq=False)
class EmbedNode(Node):
    """Rows of ``table`` [taps, classes, channels], chosen by drawn indices ``draw``; see ``_program.Embed``.

    Without a table the one-hot code: one row of the identity, of as many classes as channels.
    """

    input: Input = field(default=None)  # type: ignore[assignment]
    table: Tensor | None = None
    draw: int = 0
    taps: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    init: Source | None = None

    @property
    def sources(self) -> list[Source]:
        drawn: list[Source] = [Ref(self.input, self.draw, 1)]
        return drawn + ([self.init] if self.init is not None else [])


@dataclass(eq=False)
class ConvNode(Node):
    """Taps (dy, dx) with weight [taps, channels_in, channels]; see ``_program.Conv``."""

    source: Ref = field(default=None)  # type: ignore[assignment]
    taps: list[tuple[int, int]] = field(default_factory=list)
    weight: Tensor = field(default_factory=lambda: torch.zeros(0))
    init: Source | None = None
    num: int = 1
    den: int = 1

    @property
    def sources(self) -> list[Source]:
        return [self.source] + ([self.init] if self.init is not None else [])


@dataclass(eq=False)
class PointwiseNode(Node):
    op: Op = Op.COPY
    a: Source = field(default=None)  # type: ignore[assignment]
    b: Source | None = None
    p: float = 0.0
    q: float = 0.0

    @property
    def sources(self) -> list[Source]:
        return [self.a] + ([self.b] if self.b is not None else [])


@dataclass(eq=False)
class ConcatNode(Node):
    """Channels of several sources, one after another."""

    parts: list[tuple[Source, int]] = field(default_factory=list)  # source, its channels

    @property
    def sources(self) -> list[Source]:
        return [source for source, _ in self.parts]


@dataclass(eq=False)
class AttentionNode(Node):
    """See ``_program.Attention``; ``count`` is int64 [rows * cols]."""

    q: Ref = field(default=None)  # type: ignore[assignment]
    k: Ref = field(default=None)  # type: ignore[assignment]
    v: Ref = field(default=None)  # type: ignore[assignment]
    heads: int = 1
    dim_k: int = 1
    dim_v: int = 1
    scale: float = 1.0
    count: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def sources(self) -> list[Source]:
        return [self.q, self.k, self.v]


@dataclass(eq=False)
class GlobalNode(Node):
    """An operation that looks at every cell, such as a GroupNorm over an image; never causal."""

    source: Ref = field(default=None)  # type: ignore[assignment]

    @property
    def sources(self) -> list[Source]:
        return [self.source]


@dataclass
class Graph:
    """Nodes in topological order, and where the head's parameters are read."""

    input: Input
    nodes: list[Node]
    output: Ref

    def prune(self) -> None:
        """Drop the nodes that the output does not depend on."""
        needed: set[int] = set()
        stack: list[Node] = [self.output.node]
        while stack:
            node = stack.pop()
            if id(node) not in needed:
                needed.add(id(node))
                stack.extend(s.node for s in node.sources if isinstance(s, Ref))
        self.nodes = [n for n in self.nodes if id(n) in needed]
