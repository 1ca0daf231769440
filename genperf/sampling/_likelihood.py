"""Log-likelihoods of given values under the distributions that heads draw from."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genperf.sampling._draw import MIN_LOG_SCALE

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
    """Parameters [B, P, N] in the order of LogisticMixture, values [B, C, N] in [-1, 1]; returns [B, N].

    A level has the mass of the logistic between the halves of the way to its neighbours; the first and
    the last one that of the tails too, so that the probabilities of all levels sum to 1.
    """
    channels, half = values.shape[1], 1.0 / (levels - 1)
    logits = params[:, :mixtures].log_softmax(1)
    blocks = params[:, mixtures:].unflatten(1, (channels, -1, mixtures))  # [B, C, 2 or 3, K, N]
    log_scales = blocks[:, :, 1].clamp(min=MIN_LOG_SCALE)
    means = [blocks[:, c, 0] for c in range(channels)]
    for c in range(1, channels):  # coefficient 0 for green; 1 and 2 for blue
        for other in range(c):
            share = torch.tanh(blocks[:, c - 1 + other, 2])
            means[c] = means[c] + share * values[:, other, None]
    x = values[:, :, None]  # [B, C, 1, N]
    inverse = (-log_scales).exp()
    distance = x - torch.stack(means, 1)
    upper, lower = inverse * (distance + half), inverse * (distance - half)
    below, above = logsigmoid(upper), logsigmoid(-lower)  # of the tails: P(X <= upper), P(X > lower)
    # sigmoid(upper) - sigmoid(lower) = sigmoid(upper) sigmoid(-lower) (1 - exp(lower - upper))
    width = 2 * half * inverse
    series = math.log(2 * half) - log_scales - width / 2 + width.square() / 24
    mass = torch.where(width < 1e-3, series, torch.log(-torch.expm1(-width.clamp(min=1e-3))))
    inside = torch.where(x >= 1.0 - half, above, below + above + mass)
    log_probs = torch.where(x <= -1.0 + half, below, inside)
    return (logits + log_probs.sum(1)).logsumexp(1)
