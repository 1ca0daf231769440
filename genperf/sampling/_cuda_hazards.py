"""Where the blocks of a team have to wait for each other.

Convolutions and attention are shared out among a team's blocks; the rest is done by each of them, and
writes the same values. Between two barriers blocks are ahead of each other by any number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ._program import Attention, Conv, Embed, FeedbackKind, Pointwise, Program

SHARE_ELEMENTS = 4096  # of a pointwise step, or rows of an embedding, from which a team shares it out


@dataclass(frozen=True)
class Access:
    """Channels of a buffer; ``kind``: "r" read by all members, "w" written by all with the same values,
    "s" written by the one that has it."""

    kind: str
    buffer: int
    begin: int
    end: int


def _reads(program: Program, i: Conv | Pointwise | Attention | Embed) -> Iterator[Access]:
    if isinstance(i, Conv):
        pairs = [(i.source, i.channels_in), (i.init, i.channels)]
    elif isinstance(i, Pointwise):
        pairs = [(i.a, i.channels), (i.b, i.channels)]
    elif isinstance(i, Attention):
        pairs = [(i.q, i.heads * i.dim_k), (i.k, i.heads * i.dim_k), (i.v, i.heads * i.dim_v)]
    else:
        pairs = [(i.init, i.channels)]
    for index, channels in pairs:
        if index >= 0 and not (op := program.operands[index]).is_const:
            yield Access("r", op.index, op.channel, op.channel + channels)


def _overlap(a: Access, b: Access) -> bool:
    return a.buffer == b.buffer and a.begin < b.end and b.begin < a.end


def _conflict(before: Access, after: Access) -> bool:
    """Whether a barrier has to lie between two accesses, because members may be ahead of each other."""
    if before.kind == "r" and after.kind == "r":
        return False
    if before.kind == "w" and after.kind == "r":
        return False  # each member wrote it itself
    return _overlap(before, after)


class Hazards:
    """Which steps of a slot need a barrier of the team before them. Cells of a buffer are not told apart."""

    def __init__(self, program: Program, size: int, images: int) -> None:
        self.program, self.size, self.images = program, size, images
        head = program.head
        params, fed = program.operands[head.params], head.feedback != FeedbackKind.NONE
        whole = 1 << 30
        self.clear = [Access("w", head.input, 0, whole)] if fed else []
        self.draw = list(self.clear)
        if not params.is_const:
            self.draw.append(Access("r", params.index, 0, whole))

    def shared(self, index: int, cols: int) -> bool:
        """Whether a pointwise step or embedding is shared out: it is large, or reads what it overwrites."""
        i = self.program.instructions[index]
        if self.size == 1 or not isinstance(i, (Pointwise, Embed)):
            return False
        read = i.tap_end - i.tap_begin if isinstance(i, Embed) else 1
        if cols * self.images * i.channels * read >= SHARE_ELEMENTS:
            return True
        out = Access("w", i.out, i.out_channel, i.out_channel + i.channels)
        return any(_overlap(out, read) for read in _reads(self.program, i))

    def accesses(self, index: int, cols: int) -> list[Access]:
        i = self.program.instructions[index]
        channels = i.heads * i.dim_v if isinstance(i, Attention) else i.channels
        alone = isinstance(i, (Conv, Attention)) or self.shared(index, cols)
        out = Access("s" if alone else "w", i.out, i.out_channel, i.out_channel + channels)
        return [*_reads(self.program, i), out]

    def barriers(self, segments: Sequence[tuple[int, int]], clears: bool) -> list[bool]:
        """For (instruction, columns) of a slot that follows another.

        The slot's draw, which always needs one, is not among them.
        """
        if self.size == 1:
            return [False] * len(segments)
        pending = [*self.draw, *(self.clear if clears else [])]
        found = []
        for index, cols in segments:
            new = self.accesses(index, cols)
            needed = any(_conflict(a, b) for a in pending for b in new)
            if needed:
                pending = []
            found.append(needed)
            pending += new
        return found
