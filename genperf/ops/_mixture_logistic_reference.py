"""The formulas of the discretized mixture of logistics, in torch: the specification.

Parameters are [B, P, *] in the order of T. Salimans et al., "PixelCNN++", ICLR 2017: K logits; then for each
image channel K means, K log-scales and, for RGB, K coefficients. Without logits there is one logistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genperf.ops._inverse_cdf import choose
from genperf.ops.philox_random import philox_random

FAR = 2.0**60  # log-scales, and distances from a mean in scales, count as no larger: nothing overflows
NARROW = 1e-3  # widths below take series
LEAST = 1e-5  # probability below which OpenAI's definition takes the density
# As float32, so that the same uniform gives the same logistic number in float32 and in float64.
_CLAMP = tuple(torch.tensor([1e-5, 1 - 1e-5], dtype=torch.float32).tolist())


class Definition(NamedTuple):
    """What of the torch op's arguments tells how a level's probability is computed.

    Attributes:
        mixtures: K.
        logits: whether parameters begin with K logits.
        levels: of the data.
        low, high: at or below, and at or above which a value has the tail's mass.
        exact: whether a level has the mass between the midpoints to its neighbours wherever it is; otherwise
            the density at it times the width where that mass is at most ``LEAST``.
        unit: whether values are in [0, 1] rather than [-1, 1].
        min_log_scale: lower bound of the log-scales.
    """

    mixtures: int
    logits: bool
    levels: int
    low: float
    high: float
    exact: bool
    unit: bool
    min_log_scale: float


def wide(x: Tensor) -> Tensor:
    """In the precision of the computation."""
    return x if x.dtype == torch.float64 else x.float()


def coefficient(channel: int, other: int) -> int:
    """In which image channel's block the share of channel ``other`` in the mean of ``channel`` stands."""
    return channel - 1 + other


class _Terms(NamedTuple):
    """Of each channel and mixture [B, C, K, *]: log-probability, its derivatives; and what they need."""

    log_probs: Tensor
    by_distance: Tensor
    by_log_scale: Tensor
    shares: Tensor | None  # [B, 3, K, *]
    values: Tensor  # in [-1, 1] [B, C, *]


def _terms(params: Tensor, x: Tensor, d: Definition) -> _Terms:
    channels, half = x.shape[1], 1.0 / (d.levels - 1)
    params, x = wide(params), wide(x).to(wide(params).dtype)
    if d.unit:
        x = 2.0 * x - 1.0
    rest = params[:, d.mixtures :] if d.logits else params
    blocks = rest.unflatten(1, (channels, -1, d.mixtures))  # [B, C, 2 or 3, K, *]
    shares = blocks[:, :, 2].tanh() if channels > 1 else None
    means = [blocks[:, c, 0] for c in range(channels)]
    for c in range(1, channels):
        assert shares is not None
        for other in range(c):
            means[c] = means[c] + shares[:, coefficient(c, other)] * x[:, other, None]
    log_scales = blocks[:, :, 1].clamp(d.min_log_scale, FAR)
    value = x[:, :, None]  # [B, C, 1, *]
    inverse = (-log_scales).exp()
    middle = (inverse * (value - torch.stack(means, 1))).clamp(-FAR, FAR)
    upper, lower = middle + inverse * half, middle - inverse * half
    below, above = logsigmoid(upper), logsigmoid(-lower)  # of the tails: P(X <= upper), P(X > lower)
    at_upper, at_lower = torch.sigmoid(-upper), torch.sigmoid(lower)  # their slopes
    # sigmoid(upper) - sigmoid(lower) = sigmoid(upper) sigmoid(-lower) (1 - exp(-width))
    width = 2 * half * inverse
    narrow, safe = width < NARROW, width.clamp(min=NARROW)
    series = math.log(2 * half) - log_scales - width / 2 + width.square() / 24
    inside = below + above + torch.where(narrow, series, torch.log(-torch.expm1(-safe)))
    slope = torch.where(
        narrow, 1 - width / 2 + width.square() / 12, safe * (-safe).exp() / -torch.expm1(-safe)
    )
    by_distance = inverse * (at_upper - at_lower)
    by_log_scale = lower * at_lower - upper * at_upper - slope
    if not d.exact:
        density = logsigmoid(middle) + logsigmoid(-middle) - log_scales + math.log(2 * half)
        bend = torch.tanh(middle / 2)
        likely = inside > math.log(LEAST)
        by_distance = torch.where(likely, by_distance, -inverse * bend)
        by_log_scale = torch.where(likely, by_log_scale, middle * bend - 1)
        inside = torch.where(likely, inside, density)
    first, last = value <= d.low, value >= d.high

    def with_tails(low: Tensor, high: Tensor, inside: Tensor) -> Tensor:
        return torch.where(first, low, torch.where(last, high, inside))

    moved = (blocks[:, :, 1] >= d.min_log_scale) | blocks[:, :, 1].isnan()
    by_log_scale = with_tails(-upper * at_upper, lower * at_lower, by_log_scale)
    return _Terms(
        with_tails(below, above, inside),
        with_tails(inverse * at_upper, -inverse * at_lower, by_distance),
        torch.where(moved, by_log_scale, torch.zeros_like(by_log_scale)),
        shares,
        x,
    )


def _joint(params: Tensor, terms: _Terms, d: Definition) -> Tensor:
    """Log-probability of each mixture and the values [B, K, *]."""
    log_probs = terms.log_probs.sum(1)
    return log_probs + wide(params[:, : d.mixtures]).log_softmax(1) if d.logits else log_probs


def _reduced(nll: Tensor, reduction: int) -> Tensor:
    if reduction == 0:
        return nll
    sums = nll.flatten(1).sum(1, dtype=torch.float64)
    return (sums if reduction == 1 else sums.sum()).to(nll.dtype)


def reference(params: Tensor, x: Tensor, *settings) -> Tensor:
    """The torch op ``genperf::mixture_logistic_nll``; the last argument is the reduction."""
    d = Definition(*settings[:-1])
    return _reduced(-_joint(params, _terms(params, x, d), d).logsumexp(1), settings[-1])


def reference_backward(
    grad: Tensor, params: Tensor, x: Tensor, *settings
) -> tuple[Tensor | None, Tensor | None]:
    """The torch op ``genperf::mixture_logistic_nll_backward``; after the reduction come the two that tell
    which gradients are wanted."""
    *definition, reduction, want_params, want_x = settings
    d, channels = Definition(*definition), x.shape[1]
    terms = _terms(params, x, d)
    joint = _joint(params, terms, d)
    grad = grad.reshape(-1, *(1,) * (joint.dim() - 2)) if reduction else grad
    grad = grad.to(joint.dtype)[:, None] if reduction != 2 else grad.to(joint.dtype)[None]
    weight = joint.softmax(1) * -grad  # [B, K, *]
    by_value = weight[:, None] * terms.by_distance  # [B, C, K, *]
    parts = [-by_value, weight[:, None] * terms.by_log_scale]
    of_x = by_value.sum(2)
    if terms.shares is not None:
        by_share: list[Tensor] = [by_value] * 3
        of_others = [of_x[:, c] for c in range(channels)]
        for c in range(1, channels):
            for other in range(c):
                k = coefficient(c, other)
                of_others[other] = of_others[other] - (by_value[:, c] * terms.shares[:, k]).sum(1)
                by_share[k] = -by_value[:, c] * terms.values[:, other, None]
        parts.append(torch.stack(by_share, 1) * (1 - terms.shares.square()))
        of_x = torch.stack(of_others, 1)
    of_params = torch.stack(parts, 2).flatten(1, 3)
    if d.logits:
        prior = wide(params[:, : d.mixtures]).softmax(1)
        of_params = torch.cat([prior * grad + weight, of_params], 1)
    return (
        of_params.to(params.dtype) if want_params else None,
        (of_x * (2.0 if d.unit else 1.0)).to(x.dtype) if want_x else None,
    )


def logistic_value(mean: Tensor, log_scale: Tensor, u: Tensor, heat: float, min_log_scale: float) -> Tensor:
    """A logistic number within [-1, 1], of a uniform one."""
    u = u.clamp(*_CLAMP).to(mean.dtype)
    scale = log_scale.clamp(min=min_log_scale).exp() * heat
    return (mean + scale * (u.log() - (1.0 - u).log())).clamp(-1.0, 1.0)


def draw_values(
    params: Tensor, mixture: Tensor, valid: Tensor, u: Tensor, mixtures: int, heat: float,
    min_log_scale: float = -7.0, known: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Values [N, C] of the mixture of each row, from parameters without logits [N, P] and uniforms [N, C].

    Where ``valid`` does not hold they are NaN; ``known`` are values and a mask of those to keep, both [N, C].
    """
    channels = u.shape[1]
    blocks = params.unflatten(1, (channels, -1, mixtures))
    chosen = blocks[torch.arange(len(params), device=params.device), :, :, mixture]  # [N, C, 2 or 3]
    values: list[Tensor] = []
    for c in range(channels):
        mean = chosen[:, c, 0]
        for other, value in enumerate(values):
            mean = mean + torch.tanh(chosen[:, coefficient(c, other), 2]) * value
        value = logistic_value(mean, chosen[:, c, 1], u[:, c], heat, min_log_scale)
        value = value.masked_fill(~valid, torch.nan)
        if known is not None:
            value = torch.where(known[1][:, c], known[0][:, c].to(value.dtype), value)
        values.append(value)
    return torch.stack(values, 1)


def uniforms_of(
    key: Tensor, batch: int, space: Sequence[int], channels: int, logits: bool
) -> tuple[Tensor | None, Tensor]:
    """The key's uniforms [B, *, 1 + C], as [B, 1, *] for the mixture and [B, C, *] for the values."""
    noise = philox_random((batch, *space, channels + logits), key, "uniform").movedim(-1, 1)
    return (noise[:, :1], noise[:, 1:]) if logits else (None, noise)


def reference_sample(
    params: Tensor, of_mixture: Tensor | None, of_values: Tensor | None, key: Tensor | None,
    channels: int, mixtures: int, logits: bool, unit: bool, min_log_scale: float, temperature: float,
    heat: float,
) -> Tensor:  # fmt: skip
    """The torch op ``genperf::mixture_logistic_sample``."""
    batch, space = len(params), params.shape[2:]
    if key is not None:
        of_mixture, of_values = uniforms_of(key, batch, space, channels, logits)
    assert of_values is not None
    flat = wide(params).movedim(1, -1).reshape(-1, params.shape[1])  # [N, P]
    u = of_values.movedim(1, -1).reshape(-1, channels)
    if logits:
        assert of_mixture is not None
        scores = flat[:, :mixtures]
        v = of_mixture.movedim(1, -1).reshape(len(flat), of_mixture.shape[1])
        if key is None and of_mixture.shape[1] == mixtures > 1:
            mixture, valid = _largest(scores, v, temperature)
        else:
            mixture, valid = choose(scores, v[:, 0].to(flat.dtype), temperature)
        flat = flat[:, mixtures:]
    else:
        mixture = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
        valid = torch.ones_like(mixture, dtype=torch.bool)
    values = draw_values(flat, mixture, valid, u, mixtures, heat, min_log_scale)
    if unit:
        values = values * 0.5 + 0.5
    return values.to(params.dtype).view(batch, *space, channels).movedim(-1, 1).contiguous()


def _largest(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The class whose logit with Gumbel noise of the uniforms [N, K] is the largest, as public code draws."""
    noise = -(-u.clamp(*_CLAMP).to(logits.dtype).log()).log()
    # The largest logit may be -inf for all, or there may be a NaN or +inf among them: nothing to choose.
    valid = logits.amax(1).isfinite() & ~logits.isnan().any(1)
    return (logits / temperature + noise).argmax(1), valid
