"""Plans of the small models, and what their programs compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from genperf.sampling import heads
from genperf.sampling._feedback import Feedback, Scaled
from genperf.sampling._graph import capture
from genperf.sampling._ir import Graph
from genperf.sampling._program import FeedbackKind, Head, HeadKind, Program
from genperf_testing.models import TinyModel, conditioning, example


class Planned(NamedTuple):
    graph: Graph
    head: heads.Description
    feedback: Feedback


def planned(tiny: TinyModel, images: int = 2, cond: dict[str, Tensor] | None = None) -> Planned:
    """The graph of a small model recorded with some images, its head and its feedback."""
    x = example(tiny, images)
    cond = conditioning(tiny, images) if cond is None else cond
    classes = tiny.model.classes if tiny.input == "index" else None
    graph = capture(tiny.model, x, torch.zeros_like(x), classes, (), cond)
    colours = tiny.shape[0] if len(tiny.shape) == 3 else 1
    if tiny.head == "logistic_mixture":
        mixtures = graph.output.channels // (10 if colours == 3 else 3)
        return Planned(graph, heads.LogisticMixture(mixtures, colours), Scaled())
    feedback = {"index": "index", "raw": Scaled()}.get(tiny.input, Scaled(1 / (tiny.model.classes - 1)))
    return Planned(graph, heads.Categorical(tiny.model.classes, colours), feedback)


def values_of(tiny: TinyModel, x: Tensor, head: Head) -> Tensor:
    """A model's input as float32 values [B, rows, cols, values]."""
    if tiny.input == "unit":
        x = (x * (tiny.model.classes - 1)).round()
    return x.reshape(len(x), head.values, head.rows, head.cols).permute(0, 2, 3, 1).float()


def owned(head: Head, draw: int, channels: int) -> list[int]:
    """The channels of the parameters that a draw reads."""
    if head.draws == 1:
        return list(range(channels))
    return [k * head.stride_class + draw * head.stride_draw for k in range(head.classes)]


def teacher_forced(executor: Any, program: Program, values: Tensor, poison: bool = True) -> list[Tensor]:
    """Parameters [B, channels] of every slot, when all the values are known."""
    state = executor.start(len(values))
    if poison:
        state.workspace.fill_(torch.nan)
        state.values.fill_(torch.nan)
    head = program.head
    noise = None
    if head.kind != HeadKind.CALLBACK:
        noise = torch.full((len(values), head.rows, head.cols, head.noises), 0.5)
    known = (values, torch.ones_like(values, dtype=torch.bool))
    found = []
    for slot in range(program.slots):
        executor.run(state, slot, slot + 1, noise, known=known)
        found.append(executor.params(state, slot).clone())
    return found


def input_values(program: Program, values: Tensor) -> Tensor:
    """What the model's input holds for values [B, rows, cols, values]: float64, channels last."""
    head = program.head
    if head.feedback == FeedbackKind.NONE:
        return values.double()
    if head.feedback == FeedbackKind.SCALED:
        return values.double() * head.scale + head.offset
    return torch.nn.functional.one_hot(values.long(), head.classes).flatten(3).double()
