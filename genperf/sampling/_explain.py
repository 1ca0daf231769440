"""A plan in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from genperf.sampling._program import Attention, Conv, Embed, HeadKind, Program

_ROLES = {
    "row": "several cells of a row at once",
    "ahead": "taps that are known a row before the rest",
    "prefetch": "a cell a pixel, known before the draw",
    "pixel": "a cell a pixel, between one draw and the next",
}
_MOST = 12


@dataclass
class Work:
    """Of one image. ``weight_bytes`` counts a weight, or a row of a table, each time that it is read."""

    instructions: int = 0
    segments: int = 0
    cells: int = 0
    flops: float = 0.0
    weight_bytes: float = 0.0

    def add(self, other: Work) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def work_by_instruction(program: Program) -> list[Work]:
    """Multiplications and additions of convolutions, attention and embeddings, operations of the rest."""
    count = len(program.instructions)
    index, cols = program.segments[:, 0].long(), program.segments[:, 3].long()
    segments = torch.bincount(index, minlength=count).tolist()
    cells = torch.bincount(index, cols.double(), minlength=count).long().tolist()
    found = []
    for i, n, m in zip(program.instructions, segments, cells, strict=True):
        if isinstance(i, Conv):
            weights = (i.tap_end - i.tap_begin) * i.channels_in * i.channels
            found.append(Work(1, n, m, 2.0 * m * weights, 4.0 * n * weights))
        elif isinstance(i, Attention):
            keys = program.tensors[i.count].double().mean().item()
            found.append(Work(1, n, m, 2.0 * m * keys * i.heads * (i.dim_k + i.dim_v)))
        elif isinstance(i, Embed):
            rows = (i.tap_end - i.tap_begin) * i.channels
            found.append(Work(1, n, m, float(m * rows), 4.0 * m * rows))
        else:
            found.append(Work(1, n, m, float(m * i.channels)))
    return found


def explain(
    program: Program, roles: Sequence[str], names: Sequence[str], executor: str, why: str, batch: int
) -> str:
    from tabulate import tabulate

    head = program.head
    pixels = head.rows * head.cols
    works = work_by_instruction(program)
    by_role = {role: Work() for role in dict.fromkeys((*_ROLES, *roles))}
    for role, work in zip(roles, works, strict=True):
        by_role[role].add(work)
    total = Work()
    for work in by_role.values():
        total.add(work)
    rows = [
        (role, _ROLES.get(role, ""), *_numbers(work, pixels))
        for role, work in [*by_role.items(), ("all", total)]
        if role == "all" or work.instructions
    ]
    columns = ("role", "", "instructions", "runs/pixel", "cells/pixel", "kflop/pixel", "weight KiB/pixel")
    slots = f"{program.slots} slots: {head.rows} x {head.cols} pixels" + (
        f" of {head.draws} draws" if head.draws > 1 else ""
    )
    lines = [
        f"{head.kind.name.lower()} head, {slots}; executor {executor} ({why})",
        f"line buffers: {4 * program.workspace} bytes an image in {len(program.buffers)} buffers; "
        f"weights: {4 * sum(w.numel() for w in program.weights)} bytes, constants: "
        f"{sum(t.numel() * t.element_size() for t in program.tensors)} bytes",
        "",
        tabulate(rows, headers=columns, floatfmt=".4g", tablefmt="simple"),
    ]
    by_name: dict[tuple[str, str], Work] = {}
    for name, role, work in zip(names, roles, works, strict=True):
        by_name.setdefault((name, role), Work()).add(work)
    most = sorted(by_name.items(), key=lambda entry: -entry[1].flops)[:_MOST]
    lines += [
        "",
        tabulate(
            [(name, role, *_numbers(work, pixels)) for (name, role), work in most],
            headers=("most work in", *columns[:1], *columns[2:]),
            floatfmt=".4g",
            tablefmt="simple",
        ),
        "",
        "A CPU cannot be faster than its rates for these flops, and for these weights where they stay in no "
        "cache.",
        _cuda(program, batch),
    ]
    return "\n".join(lines)


def _numbers(work: Work, pixels: int) -> tuple[float, ...]:
    return (
        work.instructions,
        work.segments / pixels,
        work.cells / pixels,
        work.flops / pixels / 1e3,
        work.weight_bytes / pixels / 1024,
    )


def _cuda(program: Program, batch: int) -> str:
    if program.head.kind == HeadKind.CALLBACK:
        return "cuda: a callback draws between launches, one a pixel; nothing is predicted."
    from genperf.sampling._cuda_cost import predict

    return f"cuda, predicted and not measured: {predict(program, batch)}"
