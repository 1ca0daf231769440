"""The law of :func:`genperf.ops.truncated_normal`: numbers of the host, and formulas in plain torch.

Every operation of the formulas is rounded by itself in float32, so that each backend gets the same bits. The
two rational functions are fits to the quantile of the normal distribution, in the variables of M. J. Wichura,
"Algorithm AS 241: the percentage points of the normal distribution", Applied Statistics 37 (1988): their
relative errors are 5e-8 for |p - 1/2| <= 0.425 and 6e-9 for p from 6e-34 to 0.075.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genperf.ops.philox_random import _log, _polynomial, reference_words

CENTRAL = 0.425
_CENTRAL_NUMERATOR = (59.10843276977539, 159.28977966308594, 50.434104919433594, 3.3871326446533203)
_CENTRAL_DENOMINATOR = (67.18669891357422, 78.75720977783203, 17.89512062072754, 1.0)
_TAIL_NUMERATOR = (
    0.6401156187057495, 5.35111665725708, 5.392025947570801, -5.0748419761657715, -2.906881332397461,
)  # fmt: skip
_TAIL_DENOMINATOR = (0.4525196850299835, 3.793017625808716, 4.832771301269531, 1.0)

#: From here on, in standard deviations from the mean to the nearest bound, the law is that of a far tail.
FAR = 10.0
#: What noise counts as at least and at most: the distances of a float32 from 0 and 1.
LEAST, MOST = 2.0**-25, 1.0 - 2.0**-24

#: Significant bits, exponent of the smallest normal number as ``math.frexp`` has it, and the largest number.
_FORMATS = {
    torch.float32: (24, -125, 3.4028234663852886e38),
    torch.float16: (11, -13, 65504.0),
    torch.bfloat16: (8, -125, 3.3895313892515355e38),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _rounded(x: float, dtype: torch.dtype, direction: int) -> float:
    """To the nearest number of the dtype, or the nearest that is not below (1) or above (-1) x."""
    if abs(x) == math.inf or x == 0.0:
        return x
    digits, least, largest = _FORMATS[dtype]
    exponent = max(math.frexp(x)[1], least) - digits
    scaled = math.ldexp(x, -exponent)
    whole = round(scaled) if direction == 0 else math.ceil(scaled) if direction > 0 else math.floor(scaled)
    y = math.ldexp(float(whole), exponent)
    if abs(y) <= largest:
        return y
    within = (y > 0) == (direction < 0) and direction != 0
    return math.copysign(largest if within else math.inf, y)


def _log_mills(v: float) -> float:
    """log(x R(x)) of Mills' ratio R for v = 1 / x^2 <= 1 / FAR^2: its asymptotic series."""
    return v * (-1.0 + v * (2.5 + v * (-37.0 / 3.0 + v * (353.0 / 4.0 - v * 4081.0 / 5.0))))


def _upper(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2.0))


def constants_of(
    low: float, high: float, mean: float, std: float, scale: float, dtype: torch.dtype
) -> tuple[int, list[float]] | None:
    """What the torch op is given to draw scale N(mean, std^2) in [scale low, scale high].

    The kind is 0 for the body of the distribution, 1 for its upper and 2 for its lower far tail. None where
    no number of the dtype lies between the bounds, or these are beyond all numbers.
    """
    a, b = (low - mean) / std, (high - mean) / std
    least, most = _rounded(low * scale, dtype, 1), _rounded(high * scale, dtype, -1)
    if not (least <= most and a < math.inf and b > -math.inf):
        return None
    if a < FAR and b > -FAR:
        p_low, p_high = _upper(-a), _upper(b)  # of the two tails that are cut off
        width = _upper(a) - p_high if a > 0 else _upper(-b) - p_low if b < 0 else 1.0 - p_low - p_high
        half = math.sqrt(0.5)
        numbers = [
            0.5 * math.erf(a * half), 0.5 * math.erf(b * half), width, p_low, p_high, mean * scale,
            std * scale, least, most,
        ]  # fmt: skip
        return 0, [_rounded(x, torch.float32, 0) for x in numbers]
    mirrored = a < FAR
    near, far = (-b, -a) if mirrored else (a, b)
    inverse = (1.0 / near) ** 2
    logarithm = -math.inf  # of the share of the tail from `near` on that is beyond `far`
    if far < math.inf:
        logarithm = -(high - low) / std * (near + far) / 2.0 - math.log(far / near)
        logarithm += _log_mills((1.0 / far) ** 2) - _log_mills(inverse)
    step = std * scale / near
    numbers = [
        -math.expm1(logarithm), math.exp(logarithm), inverse, -step if mirrored else step,
        (high if mirrored else low) * scale, 0.0, 0.0, least, most,
    ]  # fmt: skip
    return 2 if mirrored else 1, [_rounded(x, torch.float32, 0) for x in numbers]


def _sqrt(x: Tensor) -> Tensor:
    # Through float64, since torch.sqrt in float32 is not correctly rounded on every CPU build.
    return x.to(torch.float64).sqrt().to(torch.float32)


def _log1p(x: Tensor) -> Tensor:
    """log(1 + x) for x > -1, without the rounding of 1 + x."""
    y = 1.0 + x
    return _log(y) + (x - (y - 1.0)) / y


def _body(w: Tensor, below: Tensor, c: Sequence[float]) -> Tensor:
    q_low, q_high, width, p_low, p_high, mean, step = c[:7]
    rest = 1.0 - w
    q = torch.where(below, q_low + w * width, q_high - w * width)
    negative = q < 0.0
    p_of_low = p_low + torch.where(below, w, rest) * width
    p_of_high = p_high + torch.where(below, rest, w) * width
    t = _sqrt(-_log(torch.where(negative, p_of_low, p_of_high)))
    tail = _polynomial(t, _TAIL_NUMERATOR)
    r = 0.180625 - q * q
    central = q.abs() <= CENTRAL
    numerator = torch.where(
        central, q * _polynomial(r, _CENTRAL_NUMERATOR), torch.where(negative, -tail, tail)
    )
    denominator = torch.where(
        central, _polynomial(r, _CENTRAL_DENOMINATOR), _polynomial(t, _TAIL_DENOMINATOR)
    )
    return mean + step * (numerator / denominator)


def _far_tail(w: Tensor, below: Tensor, c: Sequence[float]) -> Tensor:
    """Bound + step (x - a) a, with x of the tail from a on: x^2 by a step of Newton's method.

    With D = x^2 - a^2 and V = 1 / a^2 it solves D + log(1 + D V) - 2 (h(x) - h(a)) = -2 log q for the share q
    of the tail beyond x, h being the logarithm of x times Mills' ratio.
    """
    share, beyond, v0, step, bound = c[:5]
    rest = 1.0 - w
    y = torch.where(below, w, rest) * share
    near = _log1p(-torch.where(y <= 0.5, y, torch.zeros_like(y)))
    far = _log(beyond + torch.where(below, rest, w) * share)
    d = -2.0 * torch.where(y <= 0.5, near, far)
    g = d * v0
    v = v0 / (1.0 + g)
    mills = g * v * ((1.0 - 2.5 * (v + v0)) + 12.333333015441895 * (v * v + v * v0 + v0 * v0))
    slope = 1.0 + v * (1.0 - v * (2.0 - 10.0 * v))
    d = d - (_log1p(g) - 2.0 * mills) / slope
    return bound + step * (d / (_sqrt(1.0 + d * v0) + 1.0))


def distances(key: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of the key's uniforms (word + 1/2) 2^-32 the distance to the nearer of 0 and 1, and whether it is 0."""
    if key.dim() == 2:
        rows = [distances(k, shape[1:]) for k in key.unbind()]
        if not rows:
            empty = torch.empty(tuple(shape), device=key.device)
            return empty, empty > 0.0
        return torch.stack([w for w, _ in rows]), torch.stack([below for _, below in rows])
    words = reference_words(math.prod(shape), key).view(tuple(shape))
    below = words < 1 << 31
    nearest = torch.where(below, words, (1 << 32) - 1 - words)
    return nearest.to(torch.float32) * 2.0**-32 + 2.0**-33, below


def reference(
    shape: Sequence[int], noise: Tensor | None, key: Tensor | None, dtype: int, kind: int, c: Sequence[float]
) -> Tensor:
    """The torch op ``genperf::truncated_normal``."""
    if noise is None:
        assert key is not None
        w, below = distances(key, shape)
    else:
        u = noise.clamp(LEAST, MOST)
        below = u <= 0.5
        w = torch.where(below, u, 1.0 - u)
    if kind == 2:
        below = ~below
    y = _far_tail(w, below, c) if kind else _body(w, below, c)
    return y.clamp(c[7], c[8]).to(DTYPES[dtype])
