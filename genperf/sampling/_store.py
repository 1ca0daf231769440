"""A program as plain numbers, lists and tensors, for files and pickles."""

from __future__ import annotations

from dataclasses import astuple, fields, is_dataclass, replace
from typing import Any

from genperf.sampling import heads
from genperf.sampling._feedback import Feedback, Scaled
from genperf.sampling._program import (
    Attention,
    Buffer,
    Const,
    Conv,
    Embed,
    FeedbackKind,
    Head,
    HeadKind,
    Op,
    Operand,
    Pointwise,
    Program,
)

_INSTRUCTIONS = {c.__name__: c for c in (Conv, Pointwise, Attention, Embed)}
_HEADS = {c.__name__: c for c in (heads.Categorical, heads.Bernoulli, heads.Gaussian, heads.LogisticMixture)}


def _plain(entry: Any) -> list[Any]:
    return [v if isinstance(v, (bool, float)) else int(v) for v in astuple(entry)]


def program_to_plain(program: Program) -> dict[str, Any]:
    return {
        "head": _plain(program.head),
        "buffers": [_plain(b) for b in program.buffers],
        "consts": [_plain(c) for c in program.consts],
        "operands": [_plain(o) for o in program.operands],
        "taps": [list(map(int, t)) for t in program.taps],
        "instructions": [[type(i).__name__, *_plain(i)] for i in program.instructions],
        "segments": program.segments,
        "slot_begin": program.slot_begin,
        "tensors": list(program.tensors),
        "weights": list(program.weights),
        "workspace": int(program.workspace),
    }


def program_from_plain(plain: dict[str, Any]) -> Program:
    head = Head(*plain["head"])
    instructions = []
    for name, *numbers_of in plain["instructions"]:
        i = _INSTRUCTIONS[name](*numbers_of)
        if isinstance(i, Pointwise):
            i = replace(i, op=Op(i.op))
        instructions.append(i)
    return Program(
        replace(head, kind=HeadKind(head.kind), feedback=FeedbackKind(head.feedback)),
        [Buffer(*b) for b in plain["buffers"]],
        [Const(*c) for c in plain["consts"]],
        [Operand(*o) for o in plain["operands"]],
        [(dy, dx) for dy, dx in plain["taps"]],
        instructions,
        plain["segments"],
        plain["slot_begin"],
        list(plain["tensors"]),
        list(plain["weights"]),
        plain["workspace"],
    )


def head_to_plain(head: heads.Description) -> dict[str, Any]:
    """Raises TypeError for a callback, whose function is not data."""
    name = type(head).__name__
    if _HEADS.get(name) is not type(head) or not is_dataclass(head):
        raise TypeError(f"save: head is {head!r}, expected one that is data, not a function")
    return {"name": name, **{f.name: getattr(head, f.name) for f in fields(head)}}


def head_from_plain(plain: dict[str, Any]) -> heads.Description:
    arguments = {k: v for k, v in plain.items() if k != "name"}
    return _HEADS[plain["name"]](**arguments)


def feedback_to_plain(feedback: Feedback) -> str | list[float]:
    return [feedback.scale, feedback.offset] if isinstance(feedback, Scaled) else feedback


def feedback_from_plain(plain: Any) -> Feedback:
    return plain if isinstance(plain, str) else Scaled(*plain)  # type: ignore[return-value]
