"""The quantizers of vector-quantize-pytorch, recognised by the source of their methods and by a probe.

Options that are not covered run the original code, and are reported; docs/vector_quantization.md lists them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from genperf import _op
from genperf.accelerate._pattern import Match, Options, Refusal
from genperf.accelerate._swap import original_class
from genperf.accelerate.patterns import _vqp_source as source
from genperf.accelerate.patterns._vqp_quantize import quantizer_forward, uncovered_in_training
from genperf.ops.vq_nearest import vq_nearest


def find(module: nn.Module, cls: type, options: Options) -> Iterator[Match | Refusal]:
    """Yield a match or a refusal for a quantizer of the library."""
    if source.known_as(cls, "VectorQuantize") and isinstance(getattr(module, "_codebook", None), nn.Module):
        yield from _quantizer(module, cls)


def _quantizer(module: Any, cls: type) -> Iterator[Match | Refusal]:
    was = f"{cls.__name__}.forward"
    codebook = module._codebook
    codebook_class = original_class(type(codebook))
    reason = source.disagreement(module, cls, source.VECTOR_QUANTIZE)
    reason = reason or source.disagreement(codebook, codebook_class, source.CODEBOOK)
    reason = reason or _unknown_parts(codebook, codebook_class)
    if reason:
        yield Refusal(was, reason)
        return
    samples = any(codebook.gumbel_sample.keywords.values())
    method = quantizer_forward(cls.forward, codebook_class, samples)
    key = ("vector_quantize_pytorch", cls.forward, codebook_class, samples)
    yield Match(was, "vector_quantize", key, {"forward": method}, _backend_for(codebook))
    if in_training := uncovered_in_training(module, samples):
        yield Refusal(f"{was} in training", in_training)


def _unknown_parts(codebook: Any, cls: type) -> str:
    """What was given to a codebook in place of the library's own functions."""
    forward = cls.forward  # type: ignore[attr-defined]
    sample = codebook.gumbel_sample
    own = isinstance(sample, functools.partial) and sample.func is source.helper(forward, "gumbel_sample")
    if not own or sample.args or set(sample.keywords) != {"stochastic", "straight_through"}:
        return "gumbel_sample is not the library's"
    if codebook.transform_input is not source.helper(forward, "l2norm" if codebook.use_cosine_sim else "identity"):
        return "transform_input is not the library's"
    return ""


def _backend_for(codebook: Any) -> str:
    embed = codebook.embed
    if embed.is_meta:
        return "-"
    words = torch.zeros(8, embed.shape[-1], device=embed.device)
    return _op.explain(vq_nearest, words, words).choices[-1].backend
