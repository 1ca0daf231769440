"""Zeros and ones drawn from a Bernoulli variable for each value, given its logit.

Definitions: see :mod:`genperf.ops.bernoulli_nll`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._element_nll import refuses
from genperf.ops._mixture_logistic_checks import check_number
from genperf.ops._mixture_logistic_reference import wide
from genperf.ops._noise import check_noise
from genperf.ops._truncated_normal_reference import _log1p, distances
from genperf.ops.bernoulli_nll import check_logits
from genperf.ops.philox_random import _log

__all__ = ["bernoulli_sample"]

OP = "bernoulli_sample"


def _reference(logits: Tensor, noise: Tensor | None, key: Tensor | None, temperature: float) -> Tensor:
    if noise is None:
        assert key is not None
        w, below = distances(key, logits.shape)
    else:
        below = noise <= 0.5
        w = torch.where(below, noise, 1.0 - noise)
    positive = w > 0.0
    w = torch.where(positive, w, 1.0)
    quantile = torch.where(positive, (_log(w) - _log1p(-torch.where(positive, w, 0.0))), -torch.inf)
    quantile = torch.where(below, quantile, -quantile) * temperature
    x = (wide(logits) > quantile).to(logits.dtype)
    return torch.where(logits.isnan(), logits, x).contiguous()


def _output(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


_op = Operator(
    OP,
    "(Tensor logits, Tensor? noise, Tensor? key, float temperature) -> Tensor",
    _reference,
    _output,
)


def _cpu(logits: Tensor, noise: Tensor | None, key: Tensor | None, temperature: float) -> Tensor:
    out = _output(logits)
    _backend.native.cpu.bernoulli_sample(out, logits, noise, key, temperature)  # type: ignore[union-attr]
    return out


def _triton(logits: Tensor, noise: Tensor | None, key: Tensor | None, temperature: float) -> Tensor:
    from genperf.kernels.bernoulli_sample import bernoulli_sample as launch

    return launch(logits, noise, key, temperature)


def _refuses(logits: Tensor, *_: Any) -> str | None:
    return refuses(logits)


_op.implement("cpu", _cpu, _refuses)
_op.implement("triton", _triton, _refuses)


def bernoulli_sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    noise: Tensor | None = None,
    key: Tensor | None = None,
    rng: str = "philox",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw 1 with probability sigmoid(logits / temperature), else 0.

    A uniform u is below that probability where the logit is above the quantile ``log(u / (1 - u))`` of the
    logistic distribution; so the smallest probabilities count too, down to those of u.

    Args:
        logits: [B, *], float32, float16, bfloat16 or float64, any strides.
        temperature: divides the logits, 1e-6 to 1e6.
        noise: uniforms in [0, 1] of that shape, float32.
        key: int64 [2], or [B, 2] with one for each sample, see :func:`genperf.ops.philox_random`; its
            uniforms are (word + 1/2) 2**-32.
        rng: "philox" draws a key, "torch" the uniforms of ``torch.rand``, which ``torch.bernoulli`` draws on
            the CPU for contiguous float32.
        generator: what either is drawn from; a list has one for each sample.

    Returns:
        0 and 1 of the shape and dtype of ``logits``, contiguous, without a gradient; NaN where that is.

    Raises:
        TypeError, ValueError, RuntimeError: as of :func:`genperf.ops.bernoulli_nll`, and for noise, keys and
            generators that do not fit.
    """
    check_logits(OP, logits)
    temperature = check_number(OP, "temperature", temperature, 1e-6, 1e6, "1e-6 to 1e6")
    like = torch.empty((), dtype=torch.float32, device=logits.device).expand(logits.shape)
    noise, key = check_noise(OP, "the numbers drawn", like, noise, key, rng, generator, torch.rand)
    return _op(logits.detach(), noise, key, temperature)
