"""Numeric checks of a compiled model: that it looks at no future value, and that the program computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf.sampling._errors import CaptureError, CausalityError
from genperf.sampling._interface import Interface
from genperf.sampling._model import first_tensor
from genperf.sampling._program import HeadKind
from genperf.sampling.heads import Callback

POSITIONS = 3  # at which the future is perturbed
_DEAD = 1e-4  # of the largest parameter: what rounding leaves of a change that must have no effect
_WRONG = 1e-3


def perturbed(interface: Interface, values: Tensor, slot: int) -> Tensor:
    """``values`` [B, rows, cols, V] with others from draw ``slot`` on."""
    draws = interface.head.draws
    first = slot * (interface.head.values // draws)
    out = values.flatten(1).clone()
    future = out[:, first:]
    if interface.classes is not None:
        future.copy_((future + 1) % interface.classes)
    elif interface.head.kind == HeadKind.LOGISTIC_MIXTURE:
        future.copy_(torch.where(future > 0, future - 0.7, future + 0.7))
    elif interface.feedback == "index":
        future.copy_(1 - future)
    elif isinstance(interface.head, Callback) and interface.head.span is not None:
        low, high = interface.head.span
        middle = (low + high) / 2
        future.add_(torch.where(future > middle, low - middle, middle - low))
    else:
        future.copy_(future + 1.3)
    return out.view_as(values)


def probes(interface: Interface) -> tuple[Tensor, list[int]]:
    """Random values of one image, and the same with others from some draws on: [1 + slots, rows, cols, V];
    the slots of these draws."""
    count = interface.rows * interface.cols * interface.head.draws
    values = interface.random_values(1, seed=3)
    slots = sorted(set(torch.linspace(0, count - 1, POSITIONS).long().tolist()))
    return torch.cat([values, *(perturbed(interface, values, slot) for slot in slots)]), slots


def check_future(interface: Interface, output: Any, slots: Sequence[int], parameters: int) -> None:
    """See that what the model gives for the draws before a change, and for that one, is not changed.

    Args:
        output: of the model, for the values of :func:`probes`.

    Raises:
        CausalityError: if anything changes.
    """
    draws = interface.head.draws
    ways = interface.parameters(output, 1 + len(slots)).values()
    for number, slot in enumerate(slots, start=1):
        pixel, draw = divmod(slot, draws)
        changes = []
        for params in ways:
            change = (params[0] - params[number]).abs().float()  # [P, cells]
            seen = change[:, :pixel].max().item() if pixel else 0.0
            for d in range(draw + 1):
                seen = max([seen, *change[interface.head.reads(d, parameters), pixel].tolist()])
            changes.append(seen)
        most = _DEAD * max(1.0, first_tensor(output).abs().max().item())
        if min(changes) > most:
            y, x = divmod(pixel, interface.cols)
            raise CausalityError(
                f"the model's output at pixel ({y}, {x}) or before it changes by {min(changes):.3g} when "
                f"{'later channels of it and ' if draw else ''}later pixels change, though its operations do "
                "not show it: it looks at the future in a way that the recording missed"
            )


def forced_parameters(executor: Any, values: Tensor, parameters: int) -> Tensor:
    """The program's parameters [P, cells] of one image that is given: values [1, rows, cols, V]."""
    program = executor.program
    head = program.head
    state = executor.start(1)
    values = values.to(state.values.device)
    noise = torch.full((1, head.rows, head.cols, head.noises), 0.5, device=values.device)
    known = (values, torch.ones_like(values, dtype=torch.bool))
    found = torch.full((program.slots, parameters), torch.nan)
    for slot in range(program.slots):
        if head.kind == HeadKind.CALLBACK:
            executor.run(state, slot, slot + 1, None)
        else:
            executor.run(state, slot, slot + 1, noise, known=known)
        found[slot] = executor.params(state, slot)[0, :parameters].float().cpu()
        if head.kind == HeadKind.CALLBACK:
            pixel, draw = divmod(slot, head.draws)
            executor.feed(state, slot, values[:, pixel // head.cols, pixel % head.cols, draw])
    return found


def compare(
    interface: Interface, executor: Any, values: Tensor, output: Any, parameters: int
) -> tuple[float, bool]:
    """The largest difference between the program's parameters and the model's, and whether the model's
    output has its channels last.

    Args:
        values: [1, rows, cols, V]; ``output`` is the model's for these first.

    Raises:
        CaptureError: if it is more than rounding.
    """
    head = interface.head
    own = forced_parameters(executor, values, parameters)
    batch = first_tensor(output).numel() // (parameters * interface.rows * interface.cols)
    found = {}
    for last, params in interface.parameters(output, batch).items():
        error = 0.0
        for draw in range(head.draws):
            channels = interface.head.reads(draw, parameters)
            if channels:
                wanted = params[0, channels].T.float().cpu()  # [cells, channels]
                error = max(error, _distance(own[draw :: head.draws, channels], wanted))
        found[last] = error, params
    last = min(found, key=lambda way: (found[way][0], way))
    error, params = found[last]
    scale = max(1.0, params.abs().nan_to_num(0.0, 0.0).max().item())
    allowed = max(_WRONG, 30 * torch.finfo(params.dtype).eps) * scale
    if not error <= allowed:
        raise CaptureError(
            f"the program's parameters differ from the model's by {error:.3g}, of {scale:.3g} at most; "
            f"expected {allowed:.3g}. This is a fault of the capture, not of the model; please report it "
            "with the model"
        )
    return error, last


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinities and NaN in the same places are none."""
    same = (a == b) | (a.isnan() & b.isnan())
    return (a - b).masked_fill(same, 0.0).abs().nan_to_num(torch.inf).max().item()
