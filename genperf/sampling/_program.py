"""The program that every executor of a sampler runs: buffers, instructions, and when each cell is computed.

A *cell* is one position (row, column) of a node's grid, for every image of the batch; its channels are
contiguous. Time is cut into *slots*, one before each draw: slot ``t`` runs its segments in order and then
draws value ``t`` (pixel ``t // draws_per_pixel`` in raster order, draw ``t % draws_per_pixel`` of it).
A *segment* is one instruction over neighbouring cells of a row. ``csrc/pixel_sampler/program.h`` is the
same in C++; :meth:`Program.tables` packs the one into the other.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields

import torch
from torch import Tensor

PANEL = 16  # output channels that are packed side by side
BLOCK = 128  # products of a convolution that are summed in one chain


class Kind(enum.IntEnum):
    """What an instruction does."""

    CONV = 0
    POINTWISE = 1
    ATTENTION = 2
    EMBED = 3


class Op(enum.IntEnum):
    """Pointwise functions; ``p`` and ``q`` are the instruction's parameters, ``a``, ``b`` its operands."""

    COPY = 0
    AFFINE = 1  # a * p + q
    ADD = 2
    SUB = 3
    MUL = 4
    DIV = 5
    MAXIMUM = 6
    MINIMUM = 7
    RELU = 8
    LEAKY_RELU = 9  # a if a > 0 else a * p
    ELU = 10  # a if a > 0 else p * expm1(a)
    TANH = 11
    SIGMOID = 12
    SILU = 13
    GELU = 14  # exact, with erf
    GELU_TANH = 15
    SOFTPLUS = 16  # log(1 + exp(p * a)) / p, linear where p * a > q
    EXP = 17
    LOG = 18
    SQRT = 19
    RECIPROCAL = 20
    SQUARE = 21
    ABS = 22
    CLAMP = 23  # between p and q
    TANH_SIGMOID = 24  # tanh(a) * sigmoid(b)
    MUL_SIGMOID = 25  # a * sigmoid(b)
    ERF = 26


class HeadKind(enum.IntEnum):
    """How a pixel is drawn from the parameters that the network gives for it."""

    CALLBACK = 0  # by the caller, between two slots
    CATEGORICAL = 1
    BERNOULLI = 2
    GAUSSIAN = 3
    LOGISTIC_MIXTURE = 4


class FeedbackKind(enum.IntEnum):
    """How a drawn value enters the network's input buffer."""

    NONE = 0  # EMBED reads the values themselves
    SCALED = 1  # value * scale + offset in channel `draw`
    ONE_HOT = 2  # 1 in channel `draw * classes + value`, 0 in the others


@dataclass(frozen=True)
class Buffer:
    """Line buffer float32 of one node.

    Cell (y, x) of image b of B lies at float
    ``offset * B + ((y % ring_rows * ring_cols + x % ring_cols) * B + b) * channels``. Buffers do not
    overlap: threads that have images of their own are at different slots.
    """

    offset: int
    ring_rows: int
    ring_cols: int
    channels: int


@dataclass(frozen=True)
class Const:
    """Constant float32 values by image, row, column and channel; a stride of 0 repeats.

    ``index`` numbers the tensors that are handed to the executor; strides are in floats.
    """

    index: int
    stride_b: int
    stride_y: int
    stride_x: int
    stride_c: int


@dataclass(frozen=True)
class Operand:
    """What an instruction reads for output cell (y, x): source cell (y + dy, x + dx) from ``channel`` on.

    Where the source row is outside [y0, y1) or the column outside [x0, x1), it reads 0.
    """

    is_const: bool
    index: int
    channel: int = 0
    dy: int = 0
    dx: int = 0
    y0: int = 0
    y1: int = 1 << 30
    x0: int = 0
    x1: int = 1 << 30


@dataclass(frozen=True)
class Conv:
    """out[n] = init[n] (an operand, or 0) + sum over taps, then c, of source[c] * weight[tap, c, n].

    The products k = tap * channels_in + c are summed in blocks of ``BLOCK``: each block is one chain of
    fused multiply-adds from 0, and the blocks are added to init in order. So a value depends on
    nothing that is computed beside it, and blocks can be worked on at the same time. Tap (dy, dx) reads
    source row (y * num + dy) / den, where that division leaves no rest (else 0), and columns
    likewise; ``source`` then adds its own window.
    ``weight`` numbers a tensor packed by :func:`pack_weight`.
    """

    out: int
    out_channel: int
    channels: int
    source: int
    channels_in: int
    tap_begin: int
    tap_end: int
    num: int
    den: int
    weight: int
    init: int = -1  # operand


@dataclass(frozen=True)
class Pointwise:
    """out = op(a, b) on ``channels`` channels."""

    out: int
    out_channel: int
    channels: int
    op: Op
    a: int
    b: int = -1
    p: float = 0.0
    q: float = 0.0


@dataclass(frozen=True)
class Attention:
    """out[h] = sum over j < count[y, x] of softmax_j(scale * <q[h], k_j[h]>) v_j[h], j in raster order.

    Head h of q and k has ``dim_k`` channels from ``h * dim_k`` on; of v and out ``dim_v``. ``count``
    numbers an int64 tensor [rows * cols]; where it is 0 the result is 0. q, k and v are operands
    without a window.
    """

    out: int
    out_channel: int
    q: int
    k: int
    v: int
    heads: int
    dim_k: int
    dim_v: int
    scale: float
    count: int
    cols: int  # columns of the grid of k and v


@dataclass(frozen=True)
class Embed:
    """out = init (an operand, or 0) + sum over taps, in order, of a row of that tap's table.

    Tap (dy, dx) takes row ``value`` of its table, where ``value`` is draw ``draw`` of cell
    (y + dy, x + dx): a convolution over an embedding or a one-hot code of the drawn classes. Outside of the
    head's grid nothing is added. A value that is no class (of a cell that is not drawn yet, or given from
    outside) takes row 0. The additions are in float32, each rounded.
    """

    out: int
    out_channel: int
    channels: int
    table: int  # float32 tensor [taps, classes, channels]
    draw: int
    tap_begin: int
    tap_end: int
    init: int = -1  # operand


@dataclass(frozen=True)
class Head:
    """How values are drawn from the parameters, and where they go.

    CATEGORICAL: logit of class k for draw s in channel ``k * stride_class + s * stride_draw``.
    BERNOULLI: one logit a draw, ``stride_draw`` apart. GAUSSIAN: mean and, ``stride_class`` on, log
    standard deviation, ``stride_draw`` apart. LOGISTIC_MIXTURE: ``classes`` mixtures in the channel
    order of PixelCNN++ (logits; then for each image channel means, log-scales and, for colour,
    coefficients).
    """

    kind: HeadKind
    params: int  # operand
    rows: int
    cols: int
    draws: int  # slots a pixel
    values: int  # values a pixel: draws, except LOGISTIC_MIXTURE, which draws all at once
    noises: int  # noise numbers a pixel
    classes: int
    stride_class: int
    stride_draw: int
    feedback: FeedbackKind
    input: int  # buffer, -1 for FeedbackKind.NONE
    scale: float
    offset: float


Instruction = Conv | Pointwise | Attention | Embed
_KIND = {Conv: Kind.CONV, Pointwise: Kind.POINTWISE, Attention: Kind.ATTENTION, Embed: Kind.EMBED}
INSTRUCTION_WORDS = 12


@dataclass
class Program:
    """See the module's docstring. ``segments`` is int32 [S, 4]: instruction, row, first column, columns.

    Slot t runs segments ``slot_begin[t]`` to ``slot_begin[t + 1]``.
    """

    head: Head
    buffers: list[Buffer] = field(default_factory=list)
    consts: list[Const] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)
    taps: list[tuple[int, int]] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    segments: Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.int32))
    slot_begin: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    tensors: list[Tensor] = field(default_factory=list)  # constants, tables and counts
    weights: list[Tensor] = field(default_factory=list)  # [taps, channels_in, channels]
    workspace: int = 0  # floats an image

    @property
    def slots(self) -> int:
        return self.head.rows * self.head.cols * self.head.draws

    def tables(self) -> dict[str, Tensor]:
        """The program as int64 tensors, one row an entry, in the order of the structs of program.h."""
        instructions = [(int(_KIND[type(i)]), *astuple(i)) for i in self.instructions]
        return {
            "head": _table([astuple(self.head)], len(fields(Head))),
            "buffers": _table([astuple(b) for b in self.buffers], len(fields(Buffer))),
            "consts": _table([astuple(c) for c in self.consts], len(fields(Const))),
            "operands": _table([astuple(o) for o in self.operands], len(fields(Operand))),
            "taps": _table(self.taps, 2),
            "instructions": _table(instructions, INSTRUCTION_WORDS),
        }


def _word(value: float) -> int:
    """An int64 that holds an integer, or the bits of a double."""
    if isinstance(value, float):
        return struct.unpack("<q", struct.pack("<d", value))[0]
    return int(value)


def _table(rows: Iterable[Sequence[float]], width: int) -> Tensor:
    words = [[_word(v) for v in row] + [0] * (width - len(row)) for row in rows]
    return torch.tensor(words, dtype=torch.int64).view(-1, width)


def pack_weight(weight: Tensor) -> Tensor:
    """[taps, channels_in, channels] as float32 [ceil(channels / 16), taps * channels_in, 16], zero padded."""
    taps, channels_in, channels = weight.shape
    panels = -(-channels // PANEL)
    padded = weight.new_zeros(taps * channels_in, panels * PANEL, dtype=torch.float32)
    padded[:, :channels] = weight.reshape(taps * channels_in, channels)
    return padded.view(-1, panels, PANEL).transpose(0, 1).contiguous()
