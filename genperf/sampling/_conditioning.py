"""What the images of a batch are conditioned on: each row is recorded once, and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from genperf.sampling._program import Program

MOST = 1 << 28  # bytes of constants that are kept while others are asked for


def row_keys(cond: Mapping[str, Tensor], images: range) -> list[str]:
    """For each image something that is the same where its rows of ``cond`` are."""
    found: dict[int, str] = {}
    keys = []
    several = any(len(t) > 1 for t in cond.values())
    for image in images:
        row = image if several else 0
        if row not in found:
            digest = hashlib.sha256()
            for name in sorted(cond):
                own = cond[name][row if len(cond[name]) > 1 else 0].detach().cpu().reshape(-1)
                digest.update(own.view(torch.uint8).numpy().tobytes())
            found[row] = digest.hexdigest()
        keys.append(found[row])
    return keys


def rows(cond: Mapping[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """The rows of some images."""
    return {n: t if len(t) == 1 else t[list(images)] for n, t in cond.items()}


@dataclass
class Table:
    """The constants of a plan that differ by image, for every row of conditioning that was recorded.

    ``tensors`` are float32 [rows, floats], by their number in the program; ``numbers`` are rows by key.
    """

    numbers: dict[str, int] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def clear(self) -> None:
        self.numbers.clear()
        self.tensors.clear()

    def add(self, keys: Sequence[str], program: Program) -> None:
        """The first images of a program that has just been recorded, one a key."""
        for const in program.consts:
            if const.stride_b:
                flat = program.tensors[const.index].reshape(-1)[: len(keys) * const.stride_b]
                own = [flat.view(len(keys), const.stride_b)]
                if self.numbers:
                    own.insert(0, self.tensors[const.index])
                self.tensors[const.index] = torch.cat(own)
        for key in keys:
            self.numbers[key] = len(self.numbers)

    def program(self, program: Program, images: Sequence[int]) -> Program:
        """The program for images with these rows; a single one serves any number of images."""
        tensors, consts = list(program.tensors), list(program.consts)
        for number, const in enumerate(consts):
            if const.stride_b:
                tensors[const.index] = self.tensors[const.index][list(images)].reshape(-1)
                consts[number] = replace(const, stride_b=const.stride_b if len(images) > 1 else 0)
        return replace(program, tensors=tensors, consts=consts)
