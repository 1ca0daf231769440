"""Classes drawn from logits: one uniform number a row, by the inverse of the cumulative distribution.

Definition, for a row of K logits l and a uniform number u:

- ``w_k = exp((l_k - max l) / temperature)``;
- of the classes in order of their logits, of equal ones the first, ``top_k`` are kept, if it is not 0;
- of these the fewest are kept whose weights sum up to ``top_p`` times the sum of all of these: the nucleus of
  A. Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020; at least one;
- the class drawn is the first, by index, at which the running sum of the weights that are kept reaches u
  times their sum. A class whose weight is 0 in the arithmetic's precision is never drawn.

Sums are made by a tree of fixed shape (:mod:`genperf.ops._inverse_cdf`), so that every backend draws the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._categorical_checks import (
    check_logits,
    check_settings,
    check_uniforms,
    refuses,
    refuses_triton,
)
from genperf.ops._categorical_reference import reference_sample
from genperf.ops.categorical_log_prob import LogProb, wide_dtype

__all__ = ["categorical_sample"]

OP = "categorical_sample"


def _outputs(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    shape = logits.shape[:-1]
    log_prob = logits.new_empty(shape, dtype=wide_dtype(logits)) if arguments[-1] else None
    return logits.new_empty(shape, dtype=torch.int64), log_prob


_op = Operator(
    OP,
    "(Tensor logits, Tensor? noise, Tensor? key, float temperature, int top_k, float top_p,"
    " bool want_log_prob) -> (Tensor index, Tensor log_prob)",
    reference_sample,
    _outputs,
)


def _cpu(
    logits: Tensor, noise: Tensor | None, key: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor | None]:
    index, log_prob = _outputs(logits, *settings)
    noise = None if noise is None else noise.contiguous()
    _backend.native.cpu.categorical_sample(  # type: ignore[union-attr]
        logits, noise, key, index, log_prob, *settings[:-1]
    )
    return index, log_prob


def _triton(*args: Any) -> tuple[Tensor, Tensor | None]:
    from genperf.kernels.categorical_sample import categorical_sample

    return categorical_sample(*args)


_op.implement("cpu", _cpu, refuses)
_op.implement("triton", _triton, lambda logits, _, __, *settings: refuses_triton(logits, *settings[1:3]))


def categorical_sample(
    logits: Tensor,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: str = "philox",
    noise: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    return_log_prob: bool = False,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw a class for each row of logits, from ``softmax(logits / temperature)`` or its most likely classes.

    Instead of ``torch.multinomial(softmax(logits / temperature), 1)``: the softmax is never stored, nothing
    is read on the host, and a class of zero probability is never drawn. The draws are not
    torch.multinomial's, with no ``rng``.

    Args:
        logits: [*, K] with the classes in dimension ``dim``, any strides. float32, float16, bfloat16, or
            float64 (by the reference alone).
        dim: that of the classes.
        temperature: 1e-6 to 1e6.
        top_k: how many of the most likely classes are kept, ties to the lowest index; 0 keeps all.
        top_p: the share of the probability, after top-k, that the classes which are kept have at least; the
            fewest such classes, ties to the lowest index. Rounded to the precision of the
            arithmetic; 1 keeps all.
        rng: "philox" draws a key; "torch" draws ``torch.rand`` of the result's shape, in float32 (float64 for
            float64 logits).
        noise: uniforms in [0, 1] of the result's shape, float32 or float64. Those of float32 have 24 bits,
            which is how closely probabilities are met.
        key: int64 [2], or [B, 2] with one for each sample (index of the result's first dimension), from
            :func:`genperf.ops.draw_key`: row i, counted over the result or within the sample, takes uniform i
            of docs/randomness.md.
        generator: what noise or key is drawn from; a list has one for each sample.
        return_log_prob: whether to return :func:`genperf.ops.categorical_log_prob` of the draws, too. It has
            a gradient by the logits, for score-function estimators.
        check: whether to raise where a row has nothing to choose from. It reads from the device on the host.

    Returns:
        int64, of the shape of the logits without ``dim``; with ``return_log_prob`` also float32 (float64 for
        float64) of that shape, in nats. Where a logit is NaN or +inf, or all are -inf, class 0 is drawn, as
        by :class:`genperf.sampling.heads.Categorical`, and the log-probability is NaN.

    Raises:
        TypeError: for a non-tensor, a dtype that is not as above, or arguments of other types.
        ValueError: for shapes, devices or numbers that do not fit, and with ``check`` for such a row; the
            message says which.
    """
    logits = check_logits(OP, logits, dim)
    settings = check_settings(OP, temperature, top_k, top_p)
    noise, key = check_uniforms(OP, logits, noise, key, rng, generator)
    differentiable = return_log_prob and logits.requires_grad and torch.is_grad_enabled()
    index, log_prob = _op(logits.detach(), noise, key, *settings, return_log_prob or check)
    if check and bool((wrong := log_prob.isnan()).any()):
        row = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{OP}: logits has NaN or +inf, or nothing but -inf, in row {row}")
    if not return_log_prob:
        return index
    if differentiable:
        log_prob = LogProb.apply(logits, index, log_prob, settings)
    return index, log_prob
