"""The backward pass of a sequence of invertible steps, which rebuilds what each step was given from its
output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genperf.nn.flows._recompute import RandomStates, Recompute, Surroundings, random_states, slots_of
from genperf.nn.flows._reconstruction import Probes


class Reversed(NamedTuple):
    """What ``step.backward_from_output`` returns.

    Attributes:
        x: the step's input, rebuilt.
        grad_x: the gradient by it.
        parameters: gradients by the step's parameters; those without one may be missing.
        conditions: gradients by keyword arguments, likewise.
    """

    x: Tensor
    grad_x: Tensor | None
    parameters: Mapping[nn.Parameter, Tensor]
    conditions: Mapping[str, Tensor]


class Pass:
    """One forward pass of a sequence, as its backward pass needs to know it.

    Attributes:
        steps: the modules.
        stored: indices of steps whose input is kept.
        conditions: the keyword arguments; ``tensors`` names those that are tensors of a floating dtype.
        probes: a few elements of each step's input.
        rebuilt: the output of the step whose turn it is in the backward pass.
        random: the random states before the step whose turn it is in the forward pass.
    """

    def __init__(
        self,
        steps: Sequence[nn.Module],
        stored: frozenset[int],
        conditions: Mapping[str, Any],
        probes: Probes | None,
    ) -> None:
        self.steps, self.stored, self.conditions, self.probes = steps, stored, dict(conditions), probes
        self.tensors = [n for n, c in conditions.items() if isinstance(c, Tensor) and c.is_floating_point()]
        self.rebuilt: Tensor | None = None
        self.random: RandomStates = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logdet = torch.zeros(x.shape[0], device=x.device, dtype=x.dtype)
        inputs = [self.conditions[name] for name in self.tensors]
        self.conditions.update({n: c.detach() for n, c in zip(self.tensors, inputs, strict=True)})
        self.random = random_states(x.device)
        for index, step in enumerate(self.steps):
            slots = slots_of(step)
            parameters = list(dict.fromkeys(s.parameter for s in slots if s.parameter.requires_grad))
            x, logdet = _Step.apply(self, index, slots, parameters, x, logdet, *inputs, *parameters)
        return x, logdet

    def reverse(
        self,
        index: int,
        x: Tensor | None,
        z: Tensor | None,
        grad_z: Tensor | None,
        grad_logdet: Tensor | None,
        conditions: dict[str, Any],
        surroundings: Surroundings,
        wants_x: bool,
    ) -> Reversed:
        """Through one step, from its input where that is kept, else from its output."""
        step, recompute = self.steps[index], Recompute(surroundings)
        with surroundings.again():
            if x is None:
                assert z is not None
                if hasattr(step, "backward_from_output"):
                    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
                    grad_logdet = z.new_zeros(z.shape[0]) if grad_logdet is None else grad_logdet
                    return step.backward_from_output(  # type: ignore[operator]
                        z, grad_z, grad_logdet, recompute, wants_x=wants_x, **conditions
                    )
                x = recompute.inverse(step, z, **conditions)[0]
        with surroundings.again():
            recorded = recompute(step, x.detach().requires_grad_(wants_x), **conditions)
            z, logdet = recorded.output
            of_logdet = (
                None if grad_logdet is None else grad_logdet.sum_to_size(logdet.shape).to(logdet.dtype)
            )
            of_z = None if grad_z is None else grad_z.to(z.dtype)
            (grad_x, *_), by_name, by_parameter = recorded.gradients([(z, of_z), (logdet, of_logdet)])
        return Reversed(x, grad_x, by_parameter, by_name)


class _Step(torch.autograd.Function):
    """One step. Its input is not saved, unless it is to be stored; the output is that of the last step
    alone."""

    @staticmethod
    def forward(ctx, run, index, slots, parameters, x, logdet, *tensors):
        ctx.set_materialize_grads(False)
        step = run.steps[index]
        if run.probes is not None:
            run.probes.observe(index, x)
        ctx.surroundings = Surroundings(step, x.device, slots, run.random)
        with ctx.surroundings.autocast():
            z, change = output_of(step, index, step(x, **run.conditions))
        run.random = ctx.surroundings.ran()
        z = z if z.dtype in (torch.float32, torch.float64) else z.float()
        z = z.view_as(z) if z is x else z
        ctx.run, ctx.index, ctx.parameters = run, index, parameters
        ctx.has_x, ctx.has_z = index in run.stored, index == len(run.steps) - 1
        saved = [x] * ctx.has_x + [z] * (ctx.has_z and not ctx.has_x)
        ctx.save_for_backward(*saved, *tensors[: len(run.tensors)])
        return z, logdet + change

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_z, grad_logdet):
        run, index = ctx.run, ctx.index
        name = f"ReversibleSequence: steps[{index}]"
        if grad_z is None and grad_logdet is None:
            return (None,) * len(ctx.needs_input_grad)
        ctx.surroundings.check_unchanged(name)
        saved = list(ctx.saved_tensors)
        x = saved.pop(0) if ctx.has_x else None
        z = None
        if x is None:
            z = saved.pop(0) if ctx.has_z else run.rebuilt
        run.rebuilt = None
        _, _, _, _, wants_x, _, *wanted = ctx.needs_input_grad
        conditions = dict(run.conditions)
        for key, tensor, wants in zip(run.tensors, saved, wanted, strict=False):
            conditions[key] = tensor.detach().requires_grad_(wants)
        result = ctx.surroundings.with_parameters(
            run.steps[index],
            lambda: run.reverse(index, x, z, grad_z, grad_logdet, conditions, ctx.surroundings, wants_x),
        )
        if run.probes is not None:
            run.probes.compare(index, result.x, last=index == 0 or not wants_x)
        if wants_x:
            run.rebuilt = result.x
        by_condition = [result.conditions.get(key) for key in run.tensors]
        by_parameter = [result.parameters.get(p) for p in ctx.parameters]
        return None, None, None, None, result.grad_x, grad_logdet, *by_condition, *by_parameter


def output_of(step: nn.Module, index: int, output: Any) -> tuple[Tensor, Tensor]:
    """A step's output (z, logdet); TypeError for anything else."""
    if isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(t, Tensor) for t in output):
        return output[0], output[1]
    raise TypeError(
        f"ReversibleSequence: steps[{index}], {type(step).__name__}, returned {type(output).__name__}, "
        "expected (z, logdet)"
    )
