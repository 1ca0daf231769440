"""Quantizers that draw a codeword by Gumbel-softmax: GumbelQuantize of taming-transformers and its kin.

A convolution gives the logits; a soft or a hard sample of them is multiplied with the codebook, and the loss
is the divergence of their softmax from the uniform distribution. Which attributes are the temperature and the
weight of the loss, in which mode the sample is hard, and what is returned, is found by running the method.
The quantized tensor is contiguous; the product of the original may leave another layout.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._quantizer import PLAIN, Number, Structure, search_backend, taken_apart
from genperf.accelerate._quantizer_probe import SEED, close, probing, random_copy
from genperf.accelerate._quantizer_source import (
    Source,
    Unknown,
    as_method_of,
    first_argument,
    given_defaults,
)
from genperf.accelerate._rewrite import methods_of
from genperf.ops.gumbel_quantize import gumbel_quantize


@dataclass(frozen=True)
class Convention:
    """What a forward computes in one mode.

    Attributes:
        logits, codebook: names of the convolution and of the embedding.
        hard: whether codewords are given out, not mixtures.
        roles: of the outputs: "quantized", "loss", "indices", "logits", or a constant in a tuple.
        attributes: what else the method reads of its module, with the values for which this holds.
    """

    logits: str
    codebook: str
    temperature: Number
    hard: bool
    weight: Number
    structure: Structure
    roles: tuple[Any, ...]
    attributes: tuple[tuple[str, Any], ...]

    def holds(self, module: nn.Module, x: Tensor) -> bool:
        book = getattr(module, self.codebook).weight
        return (
            x.dim() == 4
            and x.is_floating_point()
            and torch.float64 not in (x.dtype, book.dtype)
            and x.numel() > 0
            and x.device == book.device
            and self.temperature.of(module) >= 1e-6
            and not torch.jit.is_tracing()
            and all(getattr(module, name) == value for name, value in self.attributes)
        )

    def run(self, module: nn.Module, x: Tensor, rng: str) -> Any:
        logits = getattr(module, self.logits)(x)
        book = getattr(module, self.codebook).weight
        dtype = torch.promote_types(logits.dtype, book.dtype)
        found = gumbel_quantize(
            logits.to(dtype), book.to(dtype), self.temperature.of(module), self.hard, rng=rng
        )
        assert found.kl is not None
        outputs = {
            "quantized": found.quantized,
            "loss": self.weight.of(module) * found.kl.mean(),
            "indices": found.indices,
            "logits": logits,
        }
        return self.structure.build(
            [role[0] if isinstance(role, tuple) else outputs[role] for role in self.roles]
        )


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a forward that calls ``gumbel_softmax`` on a module with a codebook."""
    function = methods_of(cls).get("forward")
    if function is None or "gumbel_softmax" not in inspect.unwrap(function).__code__.co_names:
        return
    parts = module._modules.items()
    books = [n for n, p in parts if type(p) is nn.Embedding]
    sources = [n for n, p in parts if isinstance(p, (nn.Conv2d, nn.Linear))]
    if len(books) != 1:
        return
    was = f"{cls.__name__}.forward"
    try:
        if "forward" in module.__dict__:
            raise Unknown("forward is set on the module itself")
        if len(sources) != 1 or not first_argument(function):
            raise Unknown("its logits do not come from one convolution")
        if any(p.is_meta for p in module.parameters()):
            raise Unknown("it is on the meta device, where nothing can be probed")
        source = Source(module, cls, function)
        conventions = {t: _found(module, function, source, sources[0], books[0], t) for t in (True, False)}
    except Unknown as reason:
        yield Refusal(was, str(reason))
        return
    key = ("gumbel_quantizer", function, tuple(conventions.items()), options.rng)
    method = _replacement(function, conventions, options.rng)
    yield Match(was, "gumbel_quantize", key, {"forward": method}, search_backend(module))


def _replacement(function: FunctionType, conventions: dict[bool, Convention], rng: str) -> FunctionType:
    is_default = given_defaults(function)

    def method(self: nn.Module, x: Any, *more: Any, **named: Any) -> Any:
        convention = conventions[self.training]
        if not isinstance(x, Tensor) or ((more or named) and not is_default(more, named)):
            return function(self, x, *more, **named)
        if not convention.holds(self, x):
            return function(self, x, *more, **named)
        return convention.run(self, x, rng)

    return as_method_of(function, method)


class _Run:
    """A run of a method on a random copy: its outputs and gradients."""

    def __init__(
        self, module: nn.Module, function: Any, training: bool, seed: int = 1, **changed: Any
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.module = random_copy(module, generator, training)
        for name, value in changed.items():
            setattr(self.module, name, value)
        conv = next(p for p in self.module.modules() if isinstance(p, (nn.Conv2d, nn.Linear)))
        channels = conv.weight.shape[1]
        x = torch.randn(2, channels, 3, 4 + seed, generator=generator, dtype=torch.float64).requires_grad_()
        torch.manual_seed(SEED)
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), probing():
                self.structure, self.leaves = taken_apart(function(self.module, x))
        except Exception as error:
            raise Unknown(f"it cannot be run alone: {type(error).__name__}: {error}") from error
        self.x = x

    def gradients(self) -> list[Tensor | None]:
        real = [y for y in self.leaves if isinstance(y, Tensor) and y.requires_grad]
        generator = torch.Generator().manual_seed(5)
        weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in real]
        given = [self.x, *self.module.parameters()]
        return list(torch.autograd.grad(real, given, weights, allow_unused=True))


def _found(
    module: nn.Module, function: FunctionType, source: Source, logits: str, book: str, training: bool
) -> Convention:
    """Raises Unknown if nothing that is tried gives what the method gives."""
    theirs = _Run(module, function, training)
    numbers = [Number(1.0)]
    for name, value in source.attributes.items():
        if type(value) in (int, float) and value > 0:
            numbers.append(Number(1.0, name))
    for hard, temperature in itertools.product((True, False), reversed(numbers)):
        roles = tuple(_roles(theirs, temperature, hard, logits, book))
        if None in roles or "quantized" not in roles:
            continue
        for weight in reversed(numbers):
            bound = {temperature.attribute, weight.attribute}
            fixed = tuple((n, v) for n, v in source.attributes.items() if n not in bound)
            convention = Convention(logits, book, temperature, hard, weight, theirs.structure, roles, fixed)
            changed = {n: 1.5 * getattr(module, n) for n in bound - {""}}
            if all(_same(module, function, convention, training, s, c) for s, c in ((1, {}), (2, changed))):
                return convention
    mode = "training" if training else "evaluation"
    raise Unknown(f"in {mode} it does not give what a draw by Gumbel-softmax gives")


def _roles(theirs: _Run, temperature: Number, hard: bool, logits: str, book: str) -> Iterator[Any]:
    """What each output is, or None."""
    module = theirs.module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        scores = getattr(module, logits)(theirs.x)
        words = getattr(module, book).weight
        found = gumbel_quantize(scores, words, temperature.of(module), hard, rng="torch")
    for leaf in theirs.leaves:
        if type(leaf) in PLAIN:
            yield (leaf,)
        elif not isinstance(leaf, Tensor):
            yield None
        elif leaf.shape == found.quantized.shape and close(leaf, found.quantized, 1e-7):
            yield "quantized"
        elif leaf.shape == found.indices.shape and torch.equal(leaf, found.indices):
            yield "indices"
        elif leaf.shape == scores.shape and close(leaf, scores):
            yield "logits"
        else:
            yield "loss" if leaf.dim() == 0 else None


def _same(
    module: nn.Module,
    function: FunctionType,
    convention: Convention,
    training: bool,
    seed: int,
    changed: dict[str, Any],
) -> bool:
    theirs = _Run(module, function, training, seed, **changed)

    def ours(copied: nn.Module, x: Tensor) -> Any:
        return convention.run(copied, x, "torch")

    own = _Run(module, ours, training, seed, **changed)
    pairs = [*zip(theirs.leaves, own.leaves, strict=True)]
    pairs += [*zip(theirs.gradients(), own.gradients(), strict=True)]
    return theirs.structure == own.structure and all(
        close(b, a, 1e-6) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in pairs
    )
