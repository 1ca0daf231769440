"""Vector quantizers with one codebook: taming-transformers' and diffusers', rosinality's, DAC's, EnCodec's,
Hugging Face's, and the many written like them.

They differ in the layout of their input, in what they return and how it lies, in which loss beta weighs, and
in whether a gradient or an average moves the codebook. All of this is found by running the method, separately
in training and evaluation; a mode in which it does something else (it draws, takes an entropy over all
codewords, replaces codewords) is left alone.
"""

from __future__ import annotations

import inspect
import itertools
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._quantizer import Convention, search_backend
from genperf.accelerate._quantizer_find import CANNOT_RUN, LAYOUTS
from genperf.accelerate._quantizer_find import find as find_convention
from genperf.accelerate._quantizer_probe import Target, codebooks
from genperf.accelerate._quantizer_source import Source, Unknown, as_method_of, first_argument, given_defaults
from genperf.accelerate._rewrite import methods_of
from genperf.accelerate.patterns._vqp_source import is_quantizer

#: Methods that may search a codebook.
_METHODS = ("forward", "quantize", "decode_latents")
_SEARCHES = {"argmin", "argmax", "min", "max", "topk"}
_LIKELY = re.compile(r"quanti|codebook|vq", re.IGNORECASE)
_MODES = {True: "training", False: "evaluation"}


@dataclass(frozen=True)
class _Found:
    """Descriptions by (training, rank of the input), and why there is none for a mode."""

    conventions: dict[tuple[bool, int], Convention]
    reasons: dict[bool, str]


_known: weakref.WeakKeyDictionary[FunctionType, dict[Any, _Found]] = weakref.WeakKeyDictionary()


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for each method that searches a codebook of the module."""
    if is_quantizer(module, cls):  # of vector-quantize-pytorch, which has a pattern of its own
        return
    methods = methods_of(cls)
    for name in _METHODS:
        names = set(inspect.unwrap(methods[name]).__code__.co_names) if name in methods else set()
        if not _SEARCHES & names or "gumbel_softmax" in names:
            continue
        function, was = methods[name], f"{cls.__name__}.{name}"
        if name in module.__dict__:
            yield Refusal(was, "it is set on the module itself")
            continue
        try:
            found = _found(module, cls, function)
        except Unknown as reason:
            if _LIKELY.search(cls.__name__):
                yield Refusal(was, str(reason))
            continue
        modes = sorted({training for training, _ in found.conventions})
        if modes:
            if len(modes) == 1:
                was += f" in {_MODES[modes[0]]}"
            key = ("vector_quantizer", name, function, tuple(found.conventions.items()))
            kernel = "vector_quantize" if name == "forward" else "vq_nearest"
            method = _replacement(function, found.conventions)
            yield Match(was, kernel, key, {name: method}, search_backend(module))
        needed = (True, False) if options.mode == "training" or not modes else (False,)
        for training in needed:
            if training not in modes:
                yield Refusal(f"{cls.__name__}.{name} in {_MODES[training]}", found.reasons[training])


def _found(module: nn.Module, cls: type, function: FunctionType) -> _Found:
    """What the method does, from memory where a module alike was looked at before.

    Raises:
        Unknown: it is not the method of a quantizer, or it does what no probe can show.
    """
    if not first_argument(function):
        raise Unknown("it needs more than one argument")
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise Unknown("it is on the meta device, where nothing can be probed")
    source = Source(module, cls, function)
    shapes = tuple((n, t.shape, t.requires_grad, t.numel() == 1 and t.item()) for n, t in tensors.items())
    key = (cls, shapes, tuple(source.attributes.items()))
    known = _known.setdefault(function, {})
    if key not in known:
        known[key] = _search(module, function, source)
    return known[key]


def _search(module: nn.Module, function: FunctionType, source: Source) -> _Found:
    books = list(codebooks(module, source))
    if not books:
        raise Unknown("it has no codebook of its own")
    found: dict[tuple[bool, int], Convention] = {}
    reasons: dict[bool, list[str]] = {True: [], False: []}
    for training in (False, True):
        for (rank, dim), (book, transposed) in itertools.product(LAYOUTS, books):
            if (training, rank) in found:
                continue
            target = Target(module, function, training, book, transposed, rank, dim)
            try:
                found[training, rank] = find_convention(target, source)
            except Unknown as reason:
                reasons[training].append(str(reason))
    best = {}
    for training, all_reasons in reasons.items():
        telling = [r for r in all_reasons if not r.startswith(CANNOT_RUN)]
        best[training] = (telling or all_reasons)[0]
    if not found and all(reason.startswith(CANNOT_RUN) for reason in best.values()):
        raise Unknown(best[False])
    return _Found(found, best)


def _replacement(function: FunctionType, conventions: dict[tuple[bool, int], Convention]) -> FunctionType:
    """A method by genperf's ops; what they do not cover runs ``function``."""
    is_default = given_defaults(function)

    def method(self: nn.Module, x: Any, *more: Any, **named: Any) -> Any:
        convention = conventions.get((self.training, x.dim())) if isinstance(x, Tensor) else None
        if convention is None or ((more or named) and not is_default(more, named)):
            return function(self, x, *more, **named)
        if not convention.holds(self, x):
            return function(self, x, *more, **named)
        return convention.run(self, x)

    return as_method_of(function, method)
