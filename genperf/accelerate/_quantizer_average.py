"""Finding how a quantizer moves its codebook in training by exponential averages."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genperf.accelerate._quantizer import MovingAverage, Number
from genperf.accelerate._quantizer_source import Source, Unknown, value_of
from genperf.accelerate._rewrite import CannotRewrite, recompile

if TYPE_CHECKING:
    from genperf.accelerate._quantizer_probe import Probe, Seen, Target


@dataclass(frozen=True)
class _Names:
    counts: str
    sums: str


@dataclass(frozen=True)
class _Solved:
    decay: float
    eps: float
    keeps_smoothed: bool

    def like(self, other: _Solved) -> bool:
        return (
            self.keeps_smoothed == other.keeps_smoothed
            and abs(self.decay - other.decay) < 1e-9
            and abs(self.eps - other.eps) < 1e-3 * abs(other.eps)
        )


def find_average(target: Target, source: Source, probe: Probe, seen: Seen, indices: Tensor) -> MovingAverage:
    """The update of the codebook that turned ``probe.before`` into ``seen.after``; outputs not yet known.

    Raises:
        Unknown: it is none of this kind.
    """
    changed = seen.changed(probe)
    shape = seen.after[target.book].shape if target.book in seen.after else None
    n_codewords = len(target.oriented(probe.before[target.book]))
    others = {name: tuple(seen.after[name].shape) for name in changed - {target.book}}
    counts = [name for name, size in others.items() if size == (n_codewords,)]
    sums = [name for name, size in others.items() if size == shape]
    if target.book not in changed or len(others) != 2 or len(counts) != 1 or len(sums) != 1:
        raise Unknown(f"it changes {', '.join(sorted(changed))}")
    names = _Names(counts[0], sums[0])
    solved = _solved(target, probe, seen, names, indices)
    decay, eps = Number(_rounded(solved.decay)), Number(_rounded(solved.eps))
    for name, value in source.attributes.items():
        if type(value) is not float:
            continue
        overridden = target.probe(1, {name: 0.75 * value})
        try:
            other = _solved(target, overridden, target.run(overridden), names, indices)
        except Exception:  # it is no number of the update
            continue
        decay = _bound(decay, other.decay, name, value)
        eps = _bound(eps, other.eps, name, value)
    return MovingAverage(
        names.counts,
        names.sums,
        decay,
        eps,
        solved.keeps_smoothed,
        False,
        _reduction(target, source, names, indices, solved),
    )


def _solved(
    target: Target, probe: Probe, seen: Seen, names: _Names, indices: Tensor, processes: int = 1
) -> _Solved:
    """The numbers of the update, from its effect; how good they are shows where the update is repeated."""
    book = target.oriented(seen.after[target.book])
    rows = probe.x.detach().movedim(target.dim, -1).flatten(0, -2)
    n = processes * torch.bincount(indices, minlength=len(book)).double()
    s = processes * torch.zeros_like(book).index_add(0, indices, rows)
    old_sums, new_sums = (target.oriented(t[names.sums]) for t in (probe.before, seen.after))
    old_counts, new_counts = probe.before[names.counts], seen.after[names.counts]
    decay = ((new_sums - s) * (old_sums - s)).sum() / (old_sums - s).square().sum()
    raw = decay * old_counts + (1 - decay) * n
    keeps_smoothed = not torch.allclose(new_counts, raw, rtol=1e-9)
    smoothed = new_counts if keeps_smoothed else (new_sums / book).median(1).values
    # smoothed (total + K eps) / total = raw + eps, solved for eps
    total = raw.sum()
    slope = len(book) * smoothed / total - 1
    eps = ((raw - smoothed) * slope).sum() / slope.square().sum()
    expected = (raw + eps) / (total + len(book) * eps) * total
    if not (0 < decay < 1 and torch.allclose(new_sums, decay * old_sums + (1 - decay) * s, rtol=1e-9)):
        raise Unknown(f"it changes {names.sums} otherwise than by a moving average")
    if not torch.allclose(smoothed, expected, rtol=1e-8):
        raise Unknown(f"it smooths {names.counts} otherwise than by adding a number")
    return _Solved(decay.item(), eps.item(), keeps_smoothed)


def _rounded(value: float) -> float:
    """Without what rounding left: eps is known to few digits."""
    return float(f"{value:.5g}") if abs(value) > 1e-12 else 0.0


def _bound(number: Number, changed: float, name: str, value: float) -> Number:
    near = 1e-4 * abs(value)
    if number.attribute or abs(number.factor - value) > near or abs(changed - 0.75 * value) > near:
        return number
    return Number(1.0, name)


def _reduction(
    target: Target, source: Source, names: _Names, indices: Tensor, alone: _Solved
) -> tuple[Callable[[Tensor], Any], ...]:
    """The functions with which the method adds up counts and sums over processes, in this order.

    They are found in its source, and called with a stand-in that adds a process with the same data.
    """
    calls = [(f, node) for f, node, conditional in source.calls("all_reduce") if not conditional]
    if not calls:
        return ()
    function = calls[0][0]
    if len(calls) != 2 or any(f is not function for f, _ in calls) or function is not target.function:
        raise Unknown("it reduces across processes in a way that is not known")
    if any(len(node.args) != 1 or node.keywords for _, node in calls):
        raise Unknown("it reduces across processes with further arguments")
    shapes: list[tuple[int, ...]] = []

    def doubled(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor.mul_(2)

    bindings = {}
    for _, node in calls:
        root, path = _dotted(node.func)
        if root in function.__code__.co_freevars or root not in function.__globals__:
            raise Unknown(f"{root} is not a global name")
        bindings[root] = _stand_in(function.__globals__[root], path, doubled)
    try:
        rewritten = recompile(function, bindings)
    except CannotRewrite as error:
        raise Unknown(str(error)) from error
    probe = target.probe(1)
    seen = replace(target, function=rewritten).run(probe)
    book = tuple(seen.after[names.sums].shape)
    if shapes != [tuple(seen.after[names.counts].shape), book]:
        raise Unknown("it does not reduce the counts, then the sums across processes")
    if not _solved(target, probe, seen, names, indices, processes=2).like(alone):
        raise Unknown("it does not add up counts and sums across processes")
    first, second = (value_of(function, node.func) for _, node in calls)
    return first, second


def _dotted(node: ast.expr) -> tuple[str, list[str]]:
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise Unknown(f"{ast.unparse(node)} is not a global name")
    return node.id, path


def _stand_in(value: Any, path: list[str], function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with another function at the end of a path of attributes."""
    if not path:
        return function
    stand_in = ModuleType(path[0])
    inner = _stand_in(getattr(value, path[0]), path[1:], function)
    stand_in.__getattr__ = lambda name: getattr(value, name)  # type: ignore[method-assign]
    setattr(stand_in, path[0], inner)
    return stand_in
