"""Normal numbers between two bounds, by the inverse of the distribution function.

Definitions: the truncation trick of A. Brock et al., "Large scale GAN training for high fidelity natural
image synthesis", ICLR 2019 (arXiv:1809.11096), and ``torch.nn.init.trunc_normal_``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator
from genperf.ops._noise import check_noise
from genperf.ops._truncated_normal_reference import DTYPES, constants_of, reference
from genperf.ops.philox_random import FLOATS

__all__ = ["truncated_normal"]

OP = "truncated_normal"


def _output(shape: Sequence[int], noise: Tensor | None, key: Tensor | None, dtype: int, *_: Any) -> Tensor:
    like = noise if noise is not None else key
    assert like is not None
    return torch.empty(shape, dtype=DTYPES[dtype], device=like.device)


_op = Operator(
    OP,
    "(SymInt[] shape, Tensor? noise, Tensor? key, int dtype, int kind, float[] constants) -> Tensor",
    reference,
    _output,
)


def _cpu(
    shape: Sequence[int], noise: Tensor | None, key: Tensor | None, dtype: int, kind: int, constants: Any
) -> Tensor:
    out = _output(shape, noise, key, dtype)
    _backend.native.cpu.truncated_normal(out, noise, key, kind, constants)  # type: ignore[union-attr]
    return out


def _triton(
    shape: Sequence[int], noise: Tensor | None, key: Tensor | None, dtype: int, kind: int, constants: Any
) -> Tensor:
    from genperf.kernels.truncated_normal import truncated_normal as launch

    return launch(shape, noise, key, DTYPES[dtype], kind, constants)


def _too_many_dims(shape: Sequence[int], *_: Any) -> str | None:
    return f"{len(shape)} dimensions, at most 8" if len(shape) > 8 else None


_op.implement("cpu", _cpu, _too_many_dims)
_op.implement("triton", _triton)


def _check_numbers(**numbers: Any) -> dict[str, float]:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{OP}: {name} is {type(value).__name__}, expected a number")
        positive, bound = name in ("std", "scale"), name in ("low", "high")
        # Comparisons alone: where numbers are inputs of a compiled function, they are symbols here.
        if value != value or (abs(value) == math.inf and not bound) or (positive and value <= 0):
            expected = "a finite number > 0" if positive else "no NaN" if bound else "a finite number"
            raise ValueError(f"{OP}: {name} is {value}, expected {expected}")
    if numbers["low"] >= numbers["high"]:
        raise ValueError(f"{OP}: low is {numbers['low']}, expected less than high, {numbers['high']}")
    return {name: float(value) for name, value in numbers.items()}


def _law(
    low: float, high: float, mean: float, std: float, scale: float, dtype: torch.dtype
) -> tuple[int, list[float]]:
    """Kind and constants of the torch op, for numbers that are drawn in this dtype."""
    law = constants_of(**_check_numbers(low=low, high=high, mean=mean, std=std, scale=scale), dtype=dtype)
    if law is None:
        raise ValueError(
            f"{OP}: low is {low} and high is {high}, times {scale}, with mean {mean} and std {std}: expected "
            f"bounds with a number of {dtype} between them, and within its range"
        )
    return law


#: The same, remembered.
_known_law = functools.lru_cache(maxsize=256, typed=True)(_law)


def _shape(size: Any) -> tuple[int, ...]:
    sizes = size if isinstance(size, (tuple, list)) else (size,)
    for n in sizes:
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
            raise TypeError(f"{OP}: size is {size!r}, expected integers")
        if n < 0:
            raise ValueError(f"{OP}: size is {tuple(sizes)}, expected no negative numbers")
    return tuple(sizes)


def truncated_normal(
    size: int | Sequence[int],
    *,
    low: float = -2.0,
    high: float = 2.0,
    mean: float = 0.0,
    std: float = 1.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    noise: Tensor | None = None,
    key: Tensor | None = None,
    rng: str = "philox",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw ``scale`` times N(mean, std^2) on the condition that it lies between ``low`` and ``high``.

    BigGAN's noise for truncation t is ``scale=t`` with the other numbers as they are (bounds of -2 and 2,
    which the truncation scales); ``torch.nn.init.trunc_normal_`` has the law of ``low=a, high=b, scale=1``.
    One uniform gives one number, through the inverse of the distribution function: nothing is rejected, and
    nothing waits for the device. The tails are as accurate as the middle, also where both bounds are far on
    one side of the mean, since distances from the bounds are computed, and probabilities of the nearer tail.

    Args:
        size: shape of the result.
        low, high: bounds of the normal number, before it is scaled; infinite ones are none.
        mean, std: of the normal distribution before it is cut.
        scale: what is multiplied at the end, greater than 0.
        dtype: float32, float16, bfloat16 or float64 (rounded from float32); by default torch's.
        device: where the result is wanted; by default that of ``noise`` or ``key``, or torch's.
        noise: uniforms in [0, 1] of that shape, float32; they count as at least 2**-25 and at most
            1 - 2**-24. The result grows with them: those of ``numpy.random.RandomState(seed).uniform`` give
            what ``scipy.stats.truncnorm.rvs`` draws with that seed, to the rounding of float32.
        key: int64 [2], or [B, 2] with one for each sample, see :func:`genperf.ops.philox_random`; its
            uniforms are (word + 1/2) 2**-32.
        rng: "philox" draws a key, "torch" the uniforms of ``torch.rand``.
        generator: what either is drawn from; a list has one for each sample.

    Returns:
        Numbers from ``scale * low`` to ``scale * high``, also after their rounding to the dtype, with the
        same bits on every backend for the same key or noise.

    Raises:
        TypeError: for what is not a number, and dtypes that are not as above.
        ValueError: if ``low >= high``, a number is NaN, infinite where it may not be, or not positive; if
            no number of the dtype lies between the bounds; for noise, keys and generators that do not fit.
        RuntimeError: if a backend was forced that cannot run.
    """
    shape = _shape(size)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"{OP}: dtype is {dtype}, expected one of {FLOATS}")
    drawn = torch.float32 if dtype == torch.float64 else dtype
    law = (_law if torch.compiler.is_dynamo_compiling() else _known_law)(low, high, mean, std, scale, drawn)
    if device is None:
        given = next((t for t in (noise, key) if isinstance(t, Tensor)), None)
        device = None if given is None else given.device
    like = torch.empty((), dtype=torch.float32, device=device).expand(shape)
    noise, key = check_noise(OP, "the numbers drawn", like, noise, key, rng, generator, torch.rand)
    out = _op(list(shape), noise, key, DTYPES.index(drawn), *law)
    return out.to(dtype)
