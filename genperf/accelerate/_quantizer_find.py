"""Finding what a method of a vector quantizer computes, by comparing its runs with the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genperf.accelerate._quantizer import (
    INDEX_FORMS,
    ONE_HOT_FORMS,
    PLAIN,
    TENSOR_FORMS,
    Convention,
    Number,
    Role,
    arranged,
    elements_at,
    index_shape,
    one_hot,
    one_hot_form,
)
from genperf.accelerate._quantizer_average import find_average
from genperf.accelerate._quantizer_probe import (
    SEED,
    STATISTICS,
    TOLERANCE,
    Probe,
    Seen,
    Target,
    close,
    rounded,
    tensors,
)
from genperf.accelerate._quantizer_source import Source, Unknown

#: Pairs of (rank, dim) of the input to be tried.
LAYOUTS = ((4, 1), (4, 3), (3, 2), (3, 1), (2, 1), (5, 1), (5, 2), (5, 4))
CANNOT_RUN = "it cannot be run alone"
_SEARCHES = ("l2", "normalised", "cosine")


def find(target: Target, source: Source) -> Convention:
    """The description of a method.

    Raises:
        Unknown: there is none, or a run of the method fails.
    """
    if stored := sorted(source.stored - {name for name, _ in tensors(target.module)}):
        raise Unknown(f"it stores {', '.join(stored)} on its module")
    with torch.random.fork_rng(devices=[]):
        probe = target.probe(1)
        if len(target.oriented(probe.before[target.book])) < 4:
            raise Unknown("its codebook has fewer than 4 codewords")
        try:
            seen = target.run(probe)
        except Exception as error:
            raise Unknown(f"{CANNOT_RUN}: {type(error).__name__}: {error}") from error
        drawn = torch.get_rng_state()
        torch.manual_seed(SEED)
        if not torch.equal(drawn, torch.get_rng_state()):
            raise Unknown("it draws random numbers")
        reasons = []
        for search in _SEARCHES:
            try:
                convention = _described(target, source, probe, seen, search)
                _check(target, convention)
                return convention
            except Unknown as reason:
                reasons.append(str(reason))
    raise Unknown(reasons[0])


def _described(target: Target, source: Source, probe: Probe, seen: Seen, search: str) -> Convention:
    truth, average = Truth(target, probe, seen, search), None
    if seen.changed(probe):
        average = find_average(target, source, probe, seen, truth.indices)
    try:
        roles = truth.roles(seen)
    except Unknown:
        if average is None:
            raise
        truth = Truth(target, probe, seen, search, after=True)
        roles, average = truth.roles(seen), replace(average, quantizes_after=True)
    if all(role.kind == "constant" for role in roles):
        raise Unknown("it gives nothing that depends on its input")
    _note_layouts(target, roles)
    idle = _bind_weights(target, source, roles, truth, seen)
    numbers = [n for role in roles for n in (role.commitment, role.codebook)]
    if any(number.of(target.module) < 0 for number in numbers):
        raise Unknown("a weight of its loss is negative")
    numbers += [average.decay, average.eps] if average is not None else []
    bound = {number.attribute for number in numbers}
    return Convention(
        target.rank,
        target.dim,
        target.book,
        target.transposed,
        search,
        seen.structure,
        tuple(roles),
        tuple((n, v) for n, v in source.attributes.items() if n not in bound | idle),
        _learned(target),
        average,
    )


class Truth:
    """What a quantizer with one kind of search gives, for a run of the method.

    Args:
        after: whether the outputs are of the codebook that the run has left.
    """

    def __init__(self, target: Target, probe: Probe, seen: Seen, search: str, after: bool = False) -> None:
        self.target, self.probe, self.search, self.after = target, probe, search, after
        words = target.oriented(probe.before[target.book])
        rows = probe.x.movedim(target.dim, -1)
        self.grid = torch.Size(rows.shape[:-1])
        rows = rows.flatten(0, -2)
        near, far = (
            (rows.detach(), words) if search == "l2" else (F.normalize(rows.detach()), F.normalize(words))
        )
        self.indices = (far.square().sum(1) - 2 * near @ far.t()).argmin(1)
        self.rows = F.normalize(rows) if search == "normalised" else rows
        if after:
            words = target.oriented(seen.after[target.book])
        self.words = F.normalize(words) if search == "normalised" else words
        self.one_hot = one_hot(self.indices, len(words), torch.float64)

    def roles(self, seen: Seen) -> list[Role]:
        return [self.role(i, leaf) for i, leaf in enumerate(seen.leaves)]

    def role(self, number: int, leaf: Any) -> Role:
        if type(leaf) in PLAIN:
            return Role("constant", value=leaf)
        if not isinstance(leaf, Tensor):
            raise Unknown(f"its output {number} is a {type(leaf).__name__}")
        found = self._real(leaf) if leaf.is_floating_point() else self._index(leaf)
        if found is None:
            raise Unknown(f"its output {number}, {leaf.dtype} of shape {tuple(leaf.shape)}, is not known")
        return found

    def _index(self, leaf: Tensor) -> Role | None:
        for form in INDEX_FORMS if leaf.dtype == torch.int64 else ():
            expected = self.indices.reshape(index_shape(form, self.grid))
            if leaf.shape == expected.shape and torch.equal(leaf, expected):
                return Role("indices", form)
        return None

    def _real(self, leaf: Tensor) -> Role | None:
        if leaf.dim() == 0:
            return self._scalar(leaf)
        quantized = self.words[self.indices].view(*self.grid, -1).movedim(-1, self.target.dim)
        for form in TENSOR_FORMS:
            expected = arranged(form, quantized, self.target.dim)
            if leaf.shape == expected.shape and close(leaf, expected):
                return Role(self._kind(leaf), form)
        for form in ONE_HOT_FORMS:
            expected = one_hot_form(form, self.one_hot, self.grid)
            if leaf.shape == expected.shape and torch.equal(leaf.double(), expected):
                return Role("one_hot", form)
        return None

    def _kind(self, leaf: Tensor) -> str:
        """A guess; all gradients are compared in the end."""
        if not leaf.requires_grad:
            return "codewords"
        (of_x,) = torch.autograd.grad(leaf.sum(), self.probe.x, retain_graph=True, allow_unused=True)
        return "lookup" if of_x is None or not of_x.any() else "quantized"

    def _scalar(self, leaf: Tensor) -> Role | None:
        share = self.one_hot.mean(0)
        if close(leaf, torch.exp(-torch.sum(share * torch.log(share + 1e-10)))):
            return Role("perplexity")
        weights = self.weights(leaf)
        return None if weights is None else Role("loss", "", "", *map(Number, weights))

    def weights(self, leaf: Tensor) -> tuple[float, float] | None:
        """Those of the commitment and the codebook loss, if it is a sum of the two."""
        own = (self.rows - self.words[self.indices]).square().mean()
        total, commitment = (leaf / own).item(), 0.0
        if leaf.requires_grad:
            (of_own,) = torch.autograd.grad(own, self.probe.x, retain_graph=True)
            (of_leaf,) = torch.autograd.grad(leaf, self.probe.x, retain_graph=True, allow_unused=True)
            if of_leaf is not None:
                commitment = ((of_leaf * of_own).sum() / of_own.square().sum()).item()
                if not close(of_leaf, commitment * of_own):
                    return None
        elif total:
            return None
        return rounded(commitment), rounded(total - commitment)


def _bind_weights(target: Target, source: Source, roles: list[Role], truth: Truth, seen: Seen) -> set[str]:
    """Name the attributes of the module that the weights of the losses are proportional to.

    Returns:
        The names of numbers that are read to no effect, as those of an average are in evaluation.
    """
    losses, idle = [i for i, role in enumerate(roles) if role.kind == "loss"], set()
    for name, value in source.attributes.items():
        if type(value) not in (int, float) or not value:
            continue
        other = value * 1.5 + 0.125
        try:
            probe = target.probe(1, {name: other})
            now = target.run(probe)
            changed = Truth(target, probe, now, truth.search, truth.after)
            weights = [changed.weights(now.leaves[i]) for i in losses]
        except Exception:  # it is a size, for instance
            continue
        if type(value) is float and seen.same(now):
            idle.add(name)
        for i, found in zip(losses, weights, strict=True):
            if found is not None:
                pair = (roles[i].commitment, roles[i].codebook)
                new = [_bound(*both, name, value, other) for both in zip(pair, found, strict=True)]
                roles[i] = replace(roles[i], commitment=new[0], codebook=new[1])
    return idle


def _bound(number: Number, changed: float, name: str, value: float, other: float) -> Number:
    factor = rounded(changed / other)
    unchanged = abs(changed - number.factor) <= 1e-8 * abs(changed)
    if number.attribute or unchanged or abs(factor * value - number.factor) > 1e-8 * abs(number.factor):
        return number
    return Number(factor, name)


def _note_layouts(target: Target, roles: list[Role]) -> None:
    """Note which outputs lie in memory as they do whatever the layout of the input."""
    runs = [target.run(target.probe(1, other_layout=other)).leaves for other in (False, True)]
    for i, (role, *leaves) in enumerate(zip(roles, *runs, strict=True)):
        if role.kind not in ("quantized", "codewords", "lookup"):
            continue
        at = elements_at(role.form, target.dim)
        if all(x.is_contiguous() for x in leaves):
            roles[i] = replace(role, memory="first")
        elif all(x.movedim(at, -1).is_contiguous() for x in leaves):
            roles[i] = replace(role, memory="last")


def _check(target: Target, convention: Convention) -> None:
    """Raise unless the description gives what the method gives, with all gradients and changed tensors."""
    for seed, other in ((2, False), (3, True)):
        outcomes = []
        for function in (target.function, convention.run):
            probe = target.probe(seed, other_layout=other)
            seen = replace(target, function=function).run(probe)
            outcomes.append((seen, _gradients(probe, seen)))
        (theirs, their_gradients), (ours, our_gradients) = outcomes
        if theirs.structure != ours.structure:
            raise Unknown("the structure of its output varies")
        for i, (a, b) in enumerate(zip(theirs.leaves, ours.leaves, strict=True)):
            if not _alike(a, b):
                raise Unknown(f"its output {i} is another one for another input")
        for name, gradient in their_gradients.items():
            own = our_gradients[name]
            if (gradient is None) != (own is None) or not (
                gradient is None or own is None or close(own, gradient)
            ):
                raise Unknown(f"its gradient of {name} is another one")
        for name, tensor in theirs.after.items():
            if not close(tensor, ours.after[name], STATISTICS if name in seen.changed(probe) else TOLERANCE):
                raise Unknown(f"it changes {name} otherwise")


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.requires_grad == b.requires_grad and close(b, a)
    return type(a) is type(b) and bool(a == b)


def _learned(target: Target) -> bool | None:
    """Whether the codebook gets a gradient; None if it is frozen."""
    probe = target.probe(1)
    gradients = _gradients(probe, target.run(probe))
    if target.book in gradients:
        return gradients[target.book] is not None
    return False if target.book in dict(probe.module.named_buffers()) else None


def _gradients(probe: Probe, seen: Seen) -> dict[str, Tensor | None]:
    """Of a fixed linear function of the outputs."""
    generator = torch.Generator().manual_seed(5)
    outputs = [x for x in seen.leaves if isinstance(x, Tensor) and x.requires_grad]
    leaves = {"its input": probe.x}
    leaves.update({n: p for n, p in probe.module.named_parameters() if p.requires_grad})
    if not outputs:
        return dict.fromkeys(leaves)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return dict(zip(leaves, found, strict=True))
