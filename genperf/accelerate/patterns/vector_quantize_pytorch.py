"""The quantizers of vector-quantize-pytorch, recognised by the source of their methods and by a probe.

Options that are not covered run the original code, and are reported; docs/vector_quantization.md lists them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from genperf import _op
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._swap import original_class
from genperf.accelerate.patterns import _vqp_source as source
from genperf.accelerate.patterns._vqp_probe import (
    probe,
    small_grouped,
    small_quantizer,
    small_residual,
    small_sim,
)  # fmt: skip
from genperf.accelerate.patterns._vqp_quantize import quantizer_forward, uncovered_in_training
from genperf.accelerate.patterns._vqp_residual import Facts, grouped_forward, residual_forward, uncovered
from genperf.accelerate.patterns._vqp_sim import sim_forward
from genperf.accelerate.patterns._vqp_update import library_of
from genperf.ops.vq_nearest import vq_nearest


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a quantizer of the library."""
    if not source.is_quantizer(module, cls):
        return
    if source.known_as(cls, "VectorQuantize"):
        yield from _quantizer(module, cls)
    elif source.known_as(cls, "ResidualVQ"):
        yield from _residual(module, cls)
    elif source.known_as(cls, "GroupedResidualVQ"):
        yield from _grouped(module, cls)
    else:
        yield from _sim(module, cls)


def _quantizer(module: Any, cls: type) -> Iterator[Match | Refusal]:
    was = f"{cls.__name__}.forward"
    if reason := _unknown_quantizer(module, cls):
        yield Refusal(was, reason)
        return
    codebook = original_class(type(module._codebook))
    samples = _samples(module)
    method = quantizer_forward(cls.forward, codebook, samples)  # type: ignore[attr-defined]
    in_training = uncovered_in_training(module, samples)
    if reason := probe(module, cls, method, small_quantizer, bool(in_training)):
        yield Refusal(was, reason)
        return
    key = ("vector_quantize_pytorch", cls.forward, codebook, samples)  # type: ignore[attr-defined]
    yield Match(was, "vector_quantize", key, {"forward": method}, _backend_for(module._codebook.embed))
    if in_training:
        yield Refusal(f"{was} in training", in_training)


def _residual(module: Any, cls: type) -> Iterator[Match | Refusal]:
    was = f"{cls.__name__}.forward"
    reason, facts = _stages(module, cls)
    if facts is None:
        yield Refusal(was, reason)
        return
    method = residual_forward(cls.forward, facts)  # type: ignore[attr-defined]
    if reason := probe(module, cls, method, small_residual, _draws([module])):
        yield Refusal(was, reason)
        return
    key = ("vector_quantize_pytorch", cls.forward, facts)  # type: ignore[attr-defined]
    backend = _backend_for(module.layers[0]._codebook.embed)
    yield Match(was, "residual_vector_quantize", key, {"forward": method}, backend)


def _grouped(module: Any, cls: type) -> Iterator[Match | Refusal]:
    was = f"{cls.__name__}.forward"
    rvqs = list(module.rvqs)
    found = {_stages(rvq, original_class(type(rvq))) for rvq in rvqs}
    reason = source.disagreement(module, cls, source.GROUPED_RESIDUAL_VQ)
    reason = reason or next((reason for reason, _ in found if reason), "")
    if not reason and len({type(rvq) for rvq in rvqs} | found) != 2:
        reason = "its groups are not alike"
    if reason:
        yield Refusal(was, reason)
        return
    ((_, facts),) = found
    method = grouped_forward(cls.forward, original_class(type(rvqs[0])).forward, facts)  # type: ignore
    if reason := probe(module, cls, method, small_grouped, _draws(rvqs)):
        yield Refusal(was, reason)
        return
    key = ("vector_quantize_pytorch", cls.forward, facts)  # type: ignore[attr-defined]
    backend = _backend_for(rvqs[0].layers[0]._codebook.embed)
    yield Match(was, "residual_vector_quantize", key, {"forward": method}, backend)


def _sim(module: Any, cls: type) -> Iterator[Match | Refusal]:
    was = f"{cls.__name__}.forward"
    if reason := source.disagreement(module, cls, source.SIM_VQ):
        yield Refusal(was, reason)
        return
    method = sim_forward(cls.forward)  # type: ignore[attr-defined]
    if reason := probe(module, cls, method, small_sim):
        yield Refusal(was, reason)
        return
    key = ("vector_quantize_pytorch", cls.forward)  # type: ignore[attr-defined]
    yield Match(was, "vector_quantize", key, {"forward": method}, _backend_for(module.frozen_codebook))


def _unknown_quantizer(module: Any, cls: type) -> str:
    """Why a ``VectorQuantize`` is not the known one; "" if it is."""
    codebook = module._codebook
    codebook_class = original_class(type(codebook))
    return (
        source.disagreement(module, cls, source.VECTOR_QUANTIZE)
        or source.disagreement(codebook, codebook_class, source.CODEBOOK)
        or _unknown_parts(codebook, codebook_class)
    )


def _draws(rvqs: list[Any]) -> bool:
    """Whether a stage runs the original code in training."""
    return any(uncovered_in_training(vq, _samples(vq)) for rvq in rvqs for vq in rvq.layers)


def _samples(module: Any) -> bool:
    """Whether a ``VectorQuantize`` draws its codewords in training."""
    return any(module._codebook.gumbel_sample.keywords.values())


def _stages(module: Any, cls: type) -> tuple[str, Facts | None]:
    """Why a ``ResidualVQ`` is left alone, or what is known of its stages."""
    reason = source.disagreement(module, cls, source.RESIDUAL_VQ)
    for vq in module.layers:
        reason = reason or _unknown_quantizer(vq, original_class(type(vq)))
    reason = reason or uncovered(module)
    codebooks = [vq._codebook for vq in module.layers]
    classes = {original_class(type(codebook)) for codebook in codebooks}
    if not reason and len(classes) > 1:
        reason = "its stages are of several classes"
    if reason:
        return reason, None
    initialised = all(not c.embed.is_meta and bool(c.initted) for c in codebooks)
    return "", Facts(library_of(classes.pop()), any(map(_samples, module.layers)), initialised)


def _unknown_parts(codebook: Any, cls: type) -> str:
    """What was given to a codebook in place of the library's own functions."""
    forward = cls.forward  # type: ignore[attr-defined]
    sample = codebook.gumbel_sample
    own = isinstance(sample, functools.partial) and sample.func is source.helper(forward, "gumbel_sample")
    if not own or sample.args or set(sample.keywords) != {"stochastic", "straight_through"}:
        return "gumbel_sample is not the library's"
    if codebook.transform_input is not source.helper(
        forward, "l2norm" if codebook.use_cosine_sim else "identity"
    ):
        return "transform_input is not the library's"
    return ""


def _backend_for(codewords: Tensor) -> str:
    if codewords.is_meta:
        return "-"
    words = torch.zeros(8, codewords.shape[-1], device=codewords.device)
    return _op.explain(vq_nearest, words, words).choices[-1].backend
