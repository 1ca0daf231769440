"""Log-likelihoods of given values under the distributions that heads draw from."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genperf.ops.mixture_logistic_nll import mixture_logistic_nll

# All take parameters [B, ..., N] and values [B, C, N], and return nats [B, C, N] or [B, N].


def categorical(logits: Tensor, values: Tensor) -> Tensor:
    """Logits [B, K, C, N], classes [B, C, N]."""
    chosen = logits.gather(1, values.long()[:, None])[:, 0]
    return chosen - logits.logsumexp(1)


def bernoulli(logits: Tensor, values: Tensor) -> Tensor:
    """Logits of 1 [B, C, N], values 0 or 1."""
    return logsigmoid(torch.where(values > 0.5, logits, -logits))


def gaussian(params: Tensor, values: Tensor) -> Tensor:
    """Means and log standard deviations [B, 2, C, N]; the logarithm of a density."""
    mean, log_std = params.unbind(1)
    return -0.5 * ((values - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)


def logistic_mixture(params: Tensor, values: Tensor, mixtures: int, levels: int) -> Tensor:
    """Parameters [B, P, N] in the order of LogisticMixture, values [B, C, N] in [-1, 1]; returns [B, N]."""
    return -mixture_logistic_nll(params, values, mixtures=mixtures, levels=levels)
