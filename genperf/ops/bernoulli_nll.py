"""The negative log-likelihood of a Bernoulli variable for each value, given its logit.

Definitions: ``torch.nn.functional.binary_cross_entropy_with_logits``; D. P. Kingma and M. Welling,
"Auto-Encoding Variational Bayes", ICLR 2014, for the decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genperf.ops._element_nll import ElementNll, check_reduction, check_values
from genperf.ops._element_nll_reference import bernoulli, bernoulli_backward
from genperf.ops._mixture_logistic_checks import check_tensor

__all__ = ["bernoulli_nll"]

OP = "bernoulli_nll"
_head = ElementNll(OP, 0, bernoulli, bernoulli_backward)


def check_logits(op: str, logits: Any) -> None:
    check_tensor(op, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{op}: logits has shape (), expected [B, *]")


def bernoulli_nll(logits: Tensor, x: Tensor, *, reduction: str = "none", check: bool = False) -> Tensor:
    """Negative log-likelihood of values under a Bernoulli variable for each, in nats.

    ``-x log p - (1 - x) log(1 - p)`` with p = sigmoid(logits), computed as ``|l| y + log(1 + e^-|l|)`` with
    y = 1 - x for a positive logit l and x for another: no term is negative, so that nothing cancels or
    overflows. A logit of infinite size is right for the value that it makes certain. For x strictly between
    0 and 1 it is the cross-entropy of that probability, as public code uses it.

    Differentiable in ``logits`` and ``x``. Arithmetic is in float32 for half precision; backward computes all
    again, but for float32 logits on the CPU, whose gradient is made in forward and scaled in backward.

    Args:
        logits: [B, *], float32, float16, bfloat16 or float64, any strides.
        x: of that shape, 0 to 1, any float dtype. Values outside are not looked for.
        reduction: "none" (the shape of x), "sample" [B]: the sum over all other dimensions, or "sum" [].
        check: whether to raise for values out of range, which waits for the device.

    Returns:
        float32 (float64 for float64).

    Raises:
        TypeError: for a non-tensor, or a dtype that is not as above.
        ValueError: for shapes, devices, values or names that do not fit; the message says which.
        RuntimeError: if a backend was forced that cannot run.
    """
    check_logits(OP, logits)
    check_values(OP, x, logits, "logits")
    settings = (1.0, 0.0, 0.0, check_reduction(OP, reduction))
    if check and x.numel():
        least, most = torch.aminmax(x)
        if not (least >= 0.0 and most <= 1.0):  # NaN among them
            raise ValueError(
                f"{OP}: x has values {least.item()} to {most.item()}, expected 0 to 1 and no NaN"
            )
    return _head(logits[:, None], None, x, settings)
