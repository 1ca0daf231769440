"""What of vector-quantize-pytorch is known, by digests of its source (:mod:`genperf.accelerate._source`).

Versions 1.31.6 to 1.32.0 have this source. A copy of the files in another package is known as well.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

from torch import nn

from genperf.accelerate._source import differences

VERSIONS = "1.31.6 to 1.32.0"

VECTOR_QUANTIZE = {
    "forward": "371d5fbdb7e9a3f3",
    "ema_update": "64e509d5179b6182",
    "maybe_split_heads_from_input": "60b0d025ee20dbbe",
}
CODEBOOK = {
    "forward": "1611ffdde1e8d0c3",
    "init_embed_": "3d6bebea48556fa3",
    "update_with_decay": "fa58d274ca840ebe",
    "update_affine": "c4845c0eb1a41e78",
    "replace": "0b80979c6e66317c",
    "expire_codes_": "77f83f71aad77684",
    "update_ema": "e4a305748963a8aa",
    "track_cluster_size_and_embed_avg": "444bff074be36f33",
    "update_codebook": "bc288b48abea0281",
    "update_indices": "f0bb8ad7015d01eb",
}
RESIDUAL_VQ = {
    "forward": "52f01c1db3fb7714",
    "get_codes_from_indices": "c99e7ba8ec54b96f",
}
GROUPED_RESIDUAL_VQ = {"forward": "a57d570898156f34", "split_dim": "3797a6ae43b8c03d"}
SIM_VQ = {"forward": "ee0b2b1d90f370ca", "codebook": "c5cd9e13f9bb4167"}


def known_as(cls: type, name: str) -> bool:
    """Whether ``cls`` is, or is derived from, a class of that name."""
    return any(base.__name__ == name for base in cls.__mro__)


def is_quantizer(module: nn.Module, cls: type) -> bool:
    """Whether ``module`` looks like a quantizer of the library, of whatever version."""
    if cls.__module__.partition(".")[0] == "genperf":  # modules of the same names
        return False
    parts = module._modules
    return (
        (known_as(cls, "VectorQuantize") and "_codebook" in parts)
        or (known_as(cls, "ResidualVQ") and isinstance(parts.get("layers"), nn.ModuleList))
        or (known_as(cls, "GroupedResidualVQ") and isinstance(parts.get("rvqs"), nn.ModuleList))
        or (known_as(cls, "SimVQ") and "frozen_codebook" in module._buffers)
    )


@functools.lru_cache(maxsize=256)
def _differences(cls: type, known: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    return tuple(differences(cls, dict(known)))


def disagreement(module: nn.Module, cls: type, known: dict[str, str]) -> str:
    """Why the methods of ``module``, whose class was ``cls``, are not the known ones; "" if they are."""
    own = sorted(set(known) & set(module.__dict__))
    if own:
        return f"{', '.join(own)} is set on the module itself"
    differing = _differences(cls, tuple(known.items()))
    if differing:
        return f"{', '.join(differing)}: not the source of vector-quantize-pytorch {VERSIONS}"
    return ""


def helper(function: FunctionType, name: str) -> Any:
    """What ``name`` means in the file of ``function``, a method that may be decorated."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__globals__[name]
