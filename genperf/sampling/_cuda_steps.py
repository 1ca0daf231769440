"""A program as the persistent CUDA kernel reads it: steps, and the stream of entries that name them.

The layouts are those of ``csrc/pixel_sampler/step.cuh``. A step is an instruction with every address
resolved for a number of images a team; an entry is a segment, a draw or the clearing of a pixel.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._cuda_hazards import Hazards
from ._program import (
    BLOCK,
    PANEL,
    Attention,
    Conv,
    Embed,
    FeedbackKind,
    HeadKind,
    Operand,
    Pointwise,
    Program,
)

THREADS = 256
WARPS = THREADS // 32
PITCH = 4  # floats between the rows of a convolution's sources in shared memory
STEP_BYTES = 336
ENTRY_WORDS = 8
_WORKSPACE, _CONSTANT = 0, 1
_CONV, _POINTWISE, _ATTENTION, _EMBED, _CLEAR, _DRAW = range(6)
_NO_CELLS = bytes(64)
_INT32 = 1 << 31


@dataclass(frozen=True)
class Memory:
    """Shared memory of a block: floats of each part."""

    sources: int  # of a convolution, or attention's weights
    head: int  # of a warp
    head_in_shared: bool
    resident: int  # weights


@dataclass
class Stream:
    """``entries`` int32 [E, 8]; slot t has entries ``begin[t]`` to ``begin[t + 1]``."""

    entries: Tensor
    begin: list[int]
    steps: Tensor  # uint8 [steps, STEP_BYTES]
    resident: Tensor  # int32 [team size, steps]
    memory: Memory
    barriers: int = 0
    kept: set[int] = field(default_factory=set)  # instructions with weights in some member's shared memory


def head_floats(program: Program) -> int:
    """Scratch memory of the warp that draws: its noise, then what ``head_scratch`` of head.h says."""
    head = program.head
    total = -(-head.noises // 4) * 4
    if head.kind in (HeadKind.CATEGORICAL, HeadKind.LOGISTIC_MIXTURE):
        n = _padded(head.classes)
        for _ in range(4):
            total += n
            n = _padded(n // 16)
    return total


def _padded(classes: int) -> int:
    return -(-classes // 32) * 32


def depth(i: Conv) -> int:
    """Products of one output value."""
    return (i.tap_end - i.tap_begin) * i.channels_in


def panels(i: Conv) -> int:
    return -(-i.channels // PANEL)


def in_row(program: Program) -> set[int]:
    """Convolutions that run more often than twice a row: those whose weights are worth keeping."""
    runs = Counter(program.segments[:, 0].tolist())
    rows = program.head.rows
    return {k for k, i in enumerate(program.instructions) if isinstance(i, Conv) and runs[k] > 2 * rows}


@dataclass(frozen=True)
class Tile:
    """Cells of a convolution that are worked on at a time, and by a thread (0: see conv.cuh)."""

    cells: int
    thread: int


def tile_of(i: Conv, cells: int, size: int, sources: int, spread: bool) -> Tile:
    if cells * PANEL <= THREADS and cells * (BLOCK + PITCH) <= sources:
        return Tile(cells, 0)
    most = max(1, sources // (BLOCK + PITCH))
    owned = max(1, panels(i) // size)
    for thread in (4, 2, 1):
        count = min(cells, most, 64 * thread)
        if spread:  # something for every member
            count = min(count, max(8, -(-cells * panels(i) // size)))
        if thread == 1 or 4 * -(-count // thread) * owned >= THREADS:
            return Tile(min(count, 64 * thread), thread)
    raise AssertionError


class _Packer:
    """Steps of a program for ``images`` images a team."""

    def __init__(self, program: Program, images: int, tensors: Sequence[Tensor], weights: Sequence[Tensor]):
        self.program, self.images, self.tensors, self.weights = program, images, tensors, weights

    def cells(self, op: Operand, channels: int = 1) -> bytes:
        program = self.program
        window = (op.dy, op.dx, *(min(v, _INT32 - 1) for v in (op.y0, op.y1, op.x0, op.x1)))
        if op.is_const:
            c = program.consts[op.index]
            tensor = self.tensors[c.index]
            base = tensor.data_ptr() + 4 * op.channel * c.stride_c
            strides = (c.stride_y, c.stride_x, c.stride_b, c.stride_c)
            rows, cols, space, misaligned = 0, 0, _CONSTANT, base // 4
        else:
            b = program.buffers[op.index]
            base = b.offset * self.images + op.channel
            image = b.channels
            strides = (b.ring_cols * self.images * image, self.images * image, image, 1)
            rows, cols, space, misaligned = b.ring_rows, b.ring_cols, _WORKSPACE, base
        if max(strides) >= _INT32:
            raise ValueError(
                f"CUDAExecutor: a line buffer has rows of {max(strides)} floats; at most 2**31 fit"
            )
        aligned = strides[3] == 1 and channels % 4 == 0 and not any(v % 4 for v in (misaligned, *strides[:3]))
        return struct.pack("<q14i", base, space, rows, cols, *strides, *window, int(aligned))

    def output(self, buffer: int, channel: int, channels: int, vectors: bool = True) -> bytes:
        packed = self.cells(Operand(False, buffer, channel), channels)
        return packed if vectors else packed[:-4] + bytes(4)

    def operand(self, index: int, channels: int) -> bytes:
        return self.cells(self.program.operands[index], channels) if index >= 0 else _NO_CELLS

    def vectors(self, cells: bytes) -> bool:
        return cells[-4:] != bytes(4)

    def step(
        self,
        kind: int,
        cells: Sequence[bytes],
        ints: Sequence[int] = (),
        p: float = 0.0,
        q: float = 0.0,
        tap_begin: int = 0,
        table: int = 0,
    ) -> bytes:
        words = [*ints, *[0] * (10 - len(ints))]
        header = struct.pack("<12i2f2iqq", kind, *words, -1, p, q, tap_begin, 0, table, 0)
        record = header + b"".join(cells) + _NO_CELLS * (4 - len(cells))
        assert len(record) == STEP_BYTES
        return record

    def conv(self, i: Conv, first: int, spread: bool) -> bytes:
        table = self.weights[i.weight].data_ptr()
        taps = i.tap_end - i.tap_begin
        ints = (
            int(i.init >= 0),
            i.channels,
            i.channels_in,
            taps,
            i.num,
            i.den,
            panels(i),
            depth(i),
            first,
            spread,
        )
        cells = (
            self.output(i.out, i.out_channel, i.channels),
            self.operand(i.source, i.channels_in),
            self.operand(i.init, i.channels),
        )
        return self.step(_CONV, cells, ints, tap_begin=i.tap_begin, table=table)

    def instruction(self, i: Pointwise | Attention | Embed) -> bytes:
        program = self.program
        if isinstance(i, Pointwise):
            a, b = self.operand(i.a, i.channels), self.operand(i.b, i.channels)
            vectors = self.vectors(a) and (i.b < 0 or self.vectors(b))
            out = self.output(i.out, i.out_channel, i.channels, vectors)
            return self.step(_POINTWISE, (out, a, b), (int(i.op), i.channels), i.p, i.q)
        if isinstance(i, Embed):
            table, init = self.tensors[i.table], self.operand(i.init, i.channels)
            out = self.output(i.out, i.out_channel, i.channels, i.init < 0 or self.vectors(init))
            ints = (int(i.init >= 0), i.channels, 0, i.tap_end - i.tap_begin, i.draw, table.shape[1])
            return self.step(_EMBED, (out, init), ints, tap_begin=i.tap_begin, table=table.data_ptr())
        for operand in (i.q, i.k, i.v):
            op = program.operands[operand]
            if op.is_const and program.consts[op.index].stride_c != 1:
                raise ValueError(
                    "CUDAExecutor: attention reads a constant whose channels are not side by side"
                )
        cells = (
            self.output(i.out, i.out_channel, i.heads * i.dim_v),
            *(self.operand(o, 1) for o in (i.q, i.k, i.v)),
        )
        sizes = (i.dim_v, i.heads, i.dim_k, 0, 0, i.cols)
        return self.step(_ATTENTION, cells, sizes, i.scale, table=self.tensors[i.count].data_ptr())

    def clear_and_draw(self) -> tuple[bytes, bytes]:
        head = self.program.head
        fed = head.feedback != FeedbackKind.NONE
        cells = self.output(head.input, 0, 1) if fed else _NO_CELLS
        channels = self.program.buffers[head.input].channels if fed else 0
        params = self.operand(head.params, 1)
        return self.step(_CLEAR, (cells,), (0, channels)), self.step(_DRAW, (cells, params))


def build(
    program: Program,
    images: int,
    size: int,
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    shared_bytes: int,
) -> Stream:
    """The program for teams of ``size`` blocks with ``images`` images each.

    Raises:
        ValueError: if attention has more keys than shared memory holds.
    """
    often = in_row(program)
    memory = _memory(program, images, tensors, shared_bytes)
    packer = _Packer(program, images, tensors, weights)
    records, firsts, next_first = [], [], 0
    for index, i in enumerate(program.instructions):
        firsts.append(next_first)
        if isinstance(i, Conv):
            records.append(packer.conv(i, next_first, index not in often))
            next_first = (next_first + panels(i)) % size if index in often else next_first
        else:
            records.append(packer.instruction(i))
    records += packer.clear_and_draw()
    resident, kept = _residents(program, size, firsts, often, memory.resident, len(records))
    entries, begin, barriers = _entries(program, images, size, memory.sources, often)
    used = int((resident.max().item() >= 0) and memory.resident)
    memory = Memory(memory.sources, memory.head, memory.head_in_shared, used)
    steps = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8).view(-1, STEP_BYTES)
    return Stream(entries, begin, steps, resident, memory, barriers, kept)


def _memory(program: Program, images: int, tensors: Sequence[Tensor], shared_bytes: int) -> Memory:
    cells = 64 if images < 8 else 128
    sources = cells * (BLOCK + PITCH)
    for i in program.instructions:
        if isinstance(i, Attention):
            keys = int(tensors[i.count].max())
            sources = max(sources, keys + -(-keys // BLOCK) * (i.dim_v + 1))
    sources = -(-sources // 4) * 4
    head = head_floats(program)
    head = -(-head // 4) * 4
    head_in_shared = WARPS * head <= 1 << 14
    fixed = 2 * STEP_BYTES // 4 + 4 * ENTRY_WORDS + THREADS + 2 * len(program.taps) + 4
    rest = shared_bytes // 4 - fixed - sources - (WARPS * head if head_in_shared else 0)
    if rest < 0:
        raise ValueError(
            f"CUDAExecutor: the program needs {-4 * rest} bytes more than the {shared_bytes} bytes of shared "
            "memory that a block has (for attention's keys, or taps)"
        )
    return Memory(sources, head, head_in_shared, rest // 4 * 4)


def _residents(
    program: Program, size: int, firsts: list[int], often: set[int], room: int, steps: int
) -> tuple[Tensor, set[int]]:
    """Where each member keeps the panels that it has of an instruction, as long as there is room."""
    runs = Counter(program.segments[:, 0].tolist())
    offsets = torch.full((size, steps), -1, dtype=torch.int32)
    kept = set()
    order = sorted(often, key=lambda index: -runs[index])
    for rank in range(size):
        used = 0
        for index in order:
            i = program.instructions[index]
            assert isinstance(i, Conv)
            owned = len(range((rank - firsts[index]) % size, panels(i), size))
            floats = owned * depth(i) * PANEL
            if owned and used + floats <= room:
                offsets[rank, index] = used
                used += floats
                kept.add(index)
    return offsets, kept


def _entries(
    program: Program, images: int, size: int, sources: int, often: set[int]
) -> tuple[Tensor, list[int], int]:
    head = program.head
    hazards = Hazards(program, size, images)
    clear, draw = len(program.instructions), len(program.instructions) + 1
    draws = head.kind != HeadKind.CALLBACK
    segments, slot_begin = program.segments, program.slot_begin.tolist()
    pairs = [tuple(p) for p in segments[:, [0, 3]].tolist()]
    columns: dict[tuple, Tensor] = {}  # barrier, shared, cells and tile of a slot's entries

    def layout(key: tuple, clears: bool) -> Tensor:
        rows = [(0, 0, 0, 0)] if clears else []
        for (index, cols), barrier in zip(key, hazards.barriers(key, clears), strict=True):
            i = program.instructions[index]
            tile = Tile(0, 0)
            if isinstance(i, Conv):
                tile = tile_of(i, cols * images, size, sources, index not in often)
            rows.append((barrier, hazards.shared(index, cols), tile.cells, tile.thread))
        if draws:
            rows.append((size > 1, 0, 0, 0))
        return torch.tensor(rows, dtype=torch.int32).view(-1, 4)

    parts, begin, barriers = [], [0], 0
    for slot in range(program.slots):
        pixel, d = divmod(slot, head.draws)
        y, x = divmod(pixel, head.cols)
        first, last = slot_begin[slot], slot_begin[slot + 1]
        key = (d == 0, *pairs[first:last])
        if key not in columns:
            columns[key] = layout(key[1:], d == 0)
        whole = [segments[first:last]]
        if d == 0:
            whole.insert(0, torch.tensor([[clear, y, x, 1]], dtype=torch.int32))
        if draws:
            whole.append(torch.tensor([[draw, y, x, d]], dtype=torch.int32))
        parts.append(torch.cat([torch.cat(whole), columns[key]], 1))
        begin.append(begin[-1] + len(parts[-1]))
    entries = torch.cat(parts)
    barriers = int(entries[:, 4].sum())
    return entries, begin, barriers
