"""What a method of a vector quantizer computes, as a description that genperf's ops can carry out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genperf import _op
from genperf.ops.codebook_statistics import codebook_statistics
from genperf.ops.vector_quantize import VectorQuantized, vector_quantize
from genperf.ops.vq_nearest import vq_nearest

#: Constants that an output or an attribute may be.
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Number:
    """A number of the method: ``factor``, or ``factor`` times an attribute of the module."""

    factor: float
    attribute: str = ""

    def of(self, module: nn.Module) -> float:
        return self.factor * getattr(module, self.attribute) if self.attribute else self.factor

    def __str__(self) -> str:
        if not self.attribute:
            return f"{self.factor:g}"
        return self.attribute if self.factor == 1 else f"{self.factor:g} {self.attribute}"


@dataclass(frozen=True)
class Role:
    """What one output is.

    Attributes:
        kind: "quantized" (with the straight-through gradient), "codewords" (without a gradient), "lookup"
            (with a gradient for the codebook), "indices", "one_hot", "loss", "perplexity" or "constant".
        form: how it lies: see :func:`arranged`, :func:`index_shape` and :func:`one_hot_form`.
        memory: whatever the layout of the input, it is contiguous ("first") or lies with the elements of a
            vector next to each other ("last"); "": it lies as the input does.
        commitment, codebook: the weights of a loss.
        value: of a constant.
    """

    kind: str
    form: str = ""
    memory: str = ""
    commitment: Number = Number(0.0)
    codebook: Number = Number(0.0)
    value: Any = None


@dataclass(frozen=True)
class MovingAverage:
    """An update of the codebook in training by exponential moving averages.

        counts = decay counts + (1 - decay) n            n: how often each codeword was chosen
        sums = decay sums + (1 - decay) s                s: the sum of the vectors that chose it
        codebook = sums / smoothed,   smoothed = total (counts + eps) / (total + K eps),   total = sum(counts)

    Attributes:
        counts, sums: names of the tensors; ``sums`` lies as the codebook does.
        keeps_smoothed: ``counts`` becomes ``smoothed`` afterwards.
        quantizes_after: the outputs are of the new codebook, the indices of the old one.
        reduce: the module's own functions that add up n and s, in this order, over all processes; or ().
    """

    counts: str
    sums: str
    decay: Number
    eps: Number
    keeps_smoothed: bool
    quantizes_after: bool
    reduce: tuple[Callable[[Tensor], Any], ...] = ()


@dataclass(frozen=True)
class Convention:
    """A method of one argument, in one mode, for inputs of one rank.

    Attributes:
        rank, dim: of the input, and its dimension of the vectors' elements.
        source: the name of the codebook, [K, D], or [D, K] if ``transposed``.
        search: "l2"; "normalised": both are divided by their lengths first; "cosine": for the search only.
        roles: of the outputs; ``structure`` puts them together.
        attributes: what else the method reads of its module, with the values for which all of this holds.
        learned: whether the codebook gets a gradient, if only of zeros; None: it was frozen when probed.
    """

    rank: int
    dim: int
    source: str
    transposed: bool
    search: str
    structure: Structure
    roles: tuple[Role, ...]
    attributes: tuple[tuple[str, Any], ...]
    learned: bool | None
    moving_average: MovingAverage | None = None

    def codebook(self, module: nn.Module) -> Tensor:
        found = tensor_of(module, self.source)
        return found.t() if self.transposed else found

    def holds(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the description applies to this call."""
        book = self.codebook(module)
        if not (x.is_floating_point() and book.is_floating_point() and x.device == book.device):
            return False
        if torch.float64 in (x.dtype, book.dtype) or x.numel() == 0 or x.shape[self.dim] != book.shape[1]:
            return False
        if book.requires_grad and self.learned is None:
            return False
        if torch.jit.is_tracing() or hooked(module, self.source):
            return False
        if not all(0 <= number.of(module) < math.inf for number in self.numbers()):
            return False
        return all(getattr(module, name) == value for name, value in self.attributes)

    def numbers(self) -> list[Number]:
        """Those that are attributes of the module."""
        found = [n for role in self.roles for n in (role.commitment, role.codebook)]
        if self.moving_average is not None:
            found += [self.moving_average.decay, self.moving_average.eps]
        return [n for n in found if n.attribute]

    def run(self, module: nn.Module, x: Tensor) -> Any:
        book = self.codebook(module)
        dtype = torch.promote_types(x.dtype, book.dtype)
        x, book = x.to(dtype), (book if self.learned else book.detach()).to(dtype)
        if self.search == "normalised":
            x, book = F.normalize(x, dim=self.dim), F.normalize(book, dim=-1)
        kinds = {role.kind for role in self.roles}
        if not kinds & {"quantized", "loss", "perplexity"}:
            made = _Made(module, x, book, self._search(x, book))
            return self.structure.build([self._output(role, made) for role in self.roles])
        average, indices = self.moving_average, None
        if average is not None and average.quantizes_after:
            indices = self._search(x, book)
            self._update(module, x, indices, average)
            book = self.codebook(module).detach().to(dtype)
        elif average is not None:
            book = book.clone()  # the backward pass reads it again, after the update
        losses = [role for role in self.roles if role.kind == "loss"]
        one = losses[0] if len(losses) == 1 else None
        result = vector_quantize(
            x,
            book,
            dim=self.dim,
            indices=indices,
            commitment_weight=one.commitment.of(module) if one is not None else 0.0,
            codebook_weight=one.codebook.of(module) if one is not None else 0.0,
            return_losses=len(losses) > 1,
            return_usage="perplexity" in kinds,
        )
        made = _Made(module, x, book, result.indices, result)
        if average is not None and not average.quantizes_after:
            self._update(module, x, made.indices, average)
        return self.structure.build([self._output(role, made) for role in self.roles])

    def _search(self, x: Tensor, book: Tensor) -> Tensor:
        x, book = x.detach(), book.detach()
        if self.search != "cosine":
            return vq_nearest(x, book, dim=self.dim).indices
        if x.device.type == "cpu":
            return vq_nearest(x, book, "cosine", dim=self.dim).indices
        return vq_nearest(F.normalize(x, dim=self.dim), F.normalize(book, dim=-1), dim=self.dim).indices

    def _update(self, module: nn.Module, x: Tensor, indices: Tensor, average: MovingAverage) -> None:
        book = self.codebook(module)
        counts, sums = codebook_statistics(x.detach(), indices, len(book), dim=self.dim)
        if average.reduce:
            counts, sums = counts.clone(), (sums.t() if self.transposed else sums).contiguous()
            for reduce, tensor in zip(average.reduce, (counts, sums), strict=True):
                reduce(tensor)
            sums = sums.t() if self.transposed else sums
        decay, eps = average.decay.of(module), average.eps.of(module)
        mean_counts, mean_sums = tensor_of(module, average.counts), tensor_of(module, average.sums)
        mean_sums = mean_sums.t() if self.transposed else mean_sums
        with torch.no_grad():
            mean_counts.data.mul_(decay).add_(counts.to(mean_counts.dtype), alpha=1 - decay)
            mean_sums.data.mul_(decay).add_(sums.to(mean_sums.dtype), alpha=1 - decay)
            total = mean_counts.sum()
            smoothed = (mean_counts + eps) / (total + len(book) * eps) * total
            if average.keeps_smoothed:
                mean_counts.data.copy_(smoothed)
            book.data.copy_(mean_sums / smoothed.unsqueeze(1))

    def _output(self, role: Role, made: _Made) -> Any:
        x, indices, result = made.x, made.indices, made.result
        if role.kind == "constant":
            return role.value
        if role.kind == "indices":
            return indices.reshape(index_shape(role.form, indices.shape)).contiguous()
        if role.kind == "one_hot":
            return one_hot_form(role.form, one_hot(indices, len(made.book), x.dtype), indices.shape)
        if role.kind in ("codewords", "lookup"):
            book = made.book if role.kind == "lookup" else made.book.detach()
            return self._lying(role, F.embedding(indices, book).movedim(-1, self.dim))
        assert result is not None
        if role.kind == "perplexity":
            assert result.counts is not None
            share = result.counts.to(x.dtype) / indices.numel()
            return torch.exp(-torch.sum(share * torch.log(share + 1e-10)))
        if role.kind == "quantized":
            return self._lying(role, result.quantized)
        loss = result.loss
        if result.commitment_loss is not None and result.codebook_loss is not None:
            loss = role.commitment.of(made.module) * result.commitment_loss
            loss = loss + role.codebook.of(made.module) * result.codebook_loss
        elif self.learned and role.codebook.of(made.module) == 0:
            loss = loss + made.book.reshape(-1)[:0].sum()  # of nothing, for a gradient of zeros
        return loss.to(x.dtype)

    def _lying(self, role: Role, x: Tensor) -> Tensor:
        """``x``, whose elements are along ``dim``, in the form and the memory layout of an output."""
        x = arranged(role.form, x, self.dim)
        if role.memory == "last":
            at = elements_at(role.form, self.dim)
            return x.movedim(at, -1).contiguous().movedim(-1, at)
        return x.contiguous() if role.memory == "first" else x


class _Made(NamedTuple):
    """What outputs are made of."""

    module: nn.Module
    x: Tensor
    book: Tensor
    indices: Tensor
    result: VectorQuantized | None = None


def tensor_of(module: Any, name: str) -> Tensor:
    """The tensor of a dotted name."""
    for part in name.split("."):
        module = getattr(module, part)
    return module


def search_backend(module: nn.Module) -> str:
    """The backend that vq_nearest chooses for the device and dtype of the module."""
    like = next(t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    if like.dtype == torch.float64:
        return "reference"
    x = torch.zeros(1, 1, dtype=like.dtype, device=like.device)
    return _op.explain(vq_nearest, x, x).choices[-1].backend


def hooked(module: Any, name: str) -> bool:
    """Whether the owner of a tensor has hooks, which would run if its forward did."""
    *owners, _ = name.split(".")
    for part in owners:
        module = getattr(module, part)
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return True
    return False


def one_hot(indices: Tensor, n_codewords: int, dtype: torch.dtype) -> Tensor:
    """[N, K]"""
    flat = indices.reshape(-1, 1)
    return torch.zeros(len(flat), n_codewords, dtype=dtype, device=indices.device).scatter_(1, flat, 1)


def arranged(form: str, x: Tensor, dim: int) -> Tensor:
    """``x``, with its elements along ``dim``, in another form: "same", "second", "last" or "rows", [N, D]."""
    if form == "second":
        return x.movedim(dim, 1)
    if form == "last":
        return x.movedim(dim, -1)
    return x.movedim(dim, -1).flatten(0, -2) if form == "rows" else x


def elements_at(form: str, dim: int) -> int:
    """Which dimension of a tensor in this form is that of the vectors' elements."""
    return {"same": dim, "second": 1}.get(form, -1)


def index_shape(form: str, grid: torch.Size) -> tuple[int, ...]:
    """The shape of indices that were [*grid], batch first."""
    if form == "grid":
        return tuple(grid)
    if form == "flat":
        return (-1,)
    if form == "column":
        return (-1, 1)
    if form == "batch":
        return (grid[0], -1)
    if form == "batch column":
        return (grid[0], -1, 1)
    if form == "last":
        return (*grid, 1)
    return (grid[0], 1, *grid[1:])  # "second"


INDEX_FORMS = ("grid", "flat", "column", "batch", "last", "second", "batch column")
TENSOR_FORMS = ("same", "second", "last", "rows")
ONE_HOT_FORMS = ("rows", "last", "second")


def one_hot_form(form: str, rows: Tensor, grid: torch.Size) -> Tensor:
    """[N, K] as it is ("rows"), as [*grid, K] ("last") or as [B, K, ...] ("second")."""
    if form == "rows":
        return rows
    x = rows.view(*grid, -1)
    return x if form == "last" else x.movedim(-1, 1)


class Structure:
    """How the outputs are nested in tuples, lists, mappings and dataclasses; hashable."""

    def __init__(self, kind: Any, keys: tuple[Any, ...] = (), parts: tuple[Structure, ...] = ()) -> None:
        self.kind, self.keys, self.parts = kind, keys, parts
        self.size: int = sum(part.size for part in parts) if kind is not None else 1

    def _identity(self) -> Any:
        return self.kind, self.keys, self.parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def build(self, leaves: list[Any]) -> Any:
        if self.kind is None:
            return leaves[0]
        built, at = [], 0
        for part in self.parts:
            built.append(part.build(leaves[at : at + part.size]))
            at += part.size
        if self.kind in (tuple, list):
            return self.kind(built)
        if self.keys:
            return self.kind(**dict(zip(self.keys, built, strict=True)))
        return self.kind(*built)


def taken_apart(value: Any) -> tuple[Structure, list[Any]]:
    """The structure of an output and its leaves."""
    keys: tuple[Any, ...] = ()
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        parts = list(value)
    elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        keys, parts = tuple(value), list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        keys = tuple(field.name for field in dataclasses.fields(value))
        parts = [getattr(value, key) for key in keys]
    else:
        return Structure(None), [value]
    taken = [taken_apart(part) for part in parts]
    structure = Structure(type(value), keys, tuple(part for part, _ in taken))
    return structure, [leaf for _, leaves in taken for leaf in leaves]
