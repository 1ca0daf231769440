"""Counter-based random numbers: one key, the same bits on every backend.

Definition: Philox4x32-10 (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
with the 64-bit seed as key and ``(element // 4, offset)`` as counter, both as 64 bits; element ``i``
takes word ``i % 4``. Uniforms are ``(bits >> 8) * 2**-24 + 2**-25``; normals come from Box-Muller
over the word pairs (0, 1) and (2, 3), with the polynomials of ``csrc/common/math.h``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from genperf import _backend
from genperf._op import Operator, cuda_stream

__all__ = ["draw_key", "philox_random"]

DISTRIBUTIONS = {"normal": 0, "uniform": 1, "bits": 2}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPES = (torch.float32, torch.float32, torch.int64)

_MASK = 0xFFFFFFFF
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def _philox_words(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Ten rounds over int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, which leaves both halves right
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return [c0, c1, c2, c3]


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


def _uniform(bits: Tensor) -> Tensor:
    return (bits >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25


def _log(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    t = (bits - (e << 23)).view(torch.float32) - 1.0
    fe, z = e.to(torch.float32), t * t
    z2 = z * z
    low = (_LOG[8] + _LOG[7] * t) + (_LOG[6] + _LOG[5] * t) * z
    high = (_LOG[4] + _LOG[3] * t) + (_LOG[2] + _LOG[1] * t) * z
    y = (low + (high + _LOG[0] * z2) * z2) * t * z
    y = y + fe * -2.12194440e-4
    y = y - 0.5 * z
    return (t + y) + fe * 0.693359375


def _cos_sin_of_turn(k: Tensor) -> tuple[Tensor, Tensor]:
    quadrant = (k + (1 << 21)) >> 22
    x = ((k - (quadrant << 22)).to(torch.float32) + 0.5) * 3.7450705e-7
    z = x * x
    s = _polynomial(z, _SIN) * z * x + x
    c = _polynomial(z, _COS) * z * z - 0.5 * z + 1.0
    swap = (quadrant & 1) != 0
    cq, sq = torch.where(swap, s, c), torch.where(swap, c, s)
    return (
        torch.where(((quadrant + 1) & 2) != 0, -cq, cq),
        torch.where((quadrant & 2) != 0, -sq, sq),
    )


def _normal_pair(even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    # Through float64, since torch.sqrt in float32 is not correctly rounded on every CPU build.
    radius = (-2.0 * _log(_uniform(even))).to(torch.float64).sqrt().to(torch.float32)
    cosine, sine = _cos_sin_of_turn(odd >> 8)
    return radius * cosine, radius * sine


def reference_words(n: int, key: Tensor) -> Tensor:
    """The first ``n`` random words of a key int64 [2], as int64 [n]."""
    groups = torch.arange((n + 3) // 4, dtype=torch.int64, device=key.device)
    seed, offset = key.unbind()
    zeros = torch.zeros_like(groups)
    counter = [groups & _MASK, groups >> 32, zeros + (offset & _MASK), zeros + (offset >> 32 & _MASK)]
    words = _philox_words(counter, (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack(words, dim=1).flatten()[:n]


def reference_normals(shape: Sequence[int], key: Tensor) -> Tensor:
    """Standard normals float32 of a key int64 [2], or [B, 2] where ``shape[0] == B``."""
    return _reference(list(shape), key, DISTRIBUTIONS["normal"])


def reference_uniforms(shape: Sequence[int], key: Tensor) -> Tensor:
    """Uniforms float32 of a key int64 [2], or [B, 2] where ``shape[0] == B``."""
    return _reference(list(shape), key, DISTRIBUTIONS["uniform"])


def _reference(shape: list[int], key: Tensor, distribution: int) -> Tensor:
    if key.dim() == 2:
        rows = [_reference(shape[1:], k, distribution) for k in key.unbind()]
        return (
            torch.stack(rows) if rows else torch.empty(shape, dtype=_DTYPES[distribution], device=key.device)
        )
    n = math.prod(shape)
    if distribution == DISTRIBUTIONS["bits"]:
        return reference_words(n, key).view(shape)
    if distribution == DISTRIBUTIONS["uniform"]:
        return _uniform(reference_words(n, key)).view(shape)
    pairs = reference_words((n + 1) // 2 * 2, key).view(-1, 2)
    return torch.stack(_normal_pair(pairs[:, 0], pairs[:, 1]), dim=1).flatten()[:n].view(shape)


def _fake(shape: list[int], key: Tensor, distribution: int) -> Tensor:
    return torch.empty(shape, dtype=_DTYPES[distribution], device=key.device)


def _cpu(shape: list[int], key: Tensor, distribution: int) -> Tensor:
    out = _fake(shape, key, distribution)
    _backend.native.cpu.philox_random(out, key, distribution)  # type: ignore[union-attr]
    return out


def _cuda(shape: list[int], key: Tensor, distribution: int) -> Tensor:
    out = _fake(shape, key, distribution)
    _backend.cuda_functions().philox_random(out, key, distribution, cuda_stream(out))
    return out


def _triton(shape: list[int], key: Tensor, distribution: int) -> Tensor:
    from genperf.kernels.philox_random import philox_random

    return philox_random(shape, key, distribution, _DTYPES[distribution])


def _too_many_dims(shape: list[int], key: Tensor, distribution: int) -> str | None:
    return f"{len(shape)} dimensions, at most 8" if len(shape) > 8 else None


_philox_random = Operator(
    "philox_random", "(SymInt[] shape, Tensor key, int distribution) -> Tensor", _reference, _fake
)
_philox_random.implement("cpu", _cpu, _too_many_dims)
_philox_random.implement("cuda", _cuda, _too_many_dims)
_philox_random.implement("triton", _triton)


def philox_random(
    shape: Sequence[int],
    key: Tensor,
    distribution: str = "normal",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Random numbers that depend on nothing but the key and the element's index.

    Args:
        shape: shape of the result.
        key: int64 [2], (seed, offset): elements are numbered in row-major order. Or int64 [B, 2] with
            ``shape[0] == B``: one key a sample, elements numbered within the sample.
        distribution: "normal" (standard normal), "uniform" (multiples of 2**-25 in [2**-25, 1]) or
            "bits" (the 32-bit words, as int64).
        dtype: float32, float16, bfloat16 or float64; rounded from float32. "bits" takes none but int64.

    Returns:
        A tensor of that shape on the key's device, the same bits on every backend.

    Raises:
        TypeError: if ``key`` is not an int64 tensor, or ``dtype`` does not fit the distribution.
        ValueError: if ``key`` has another shape, or the distribution is unknown.
    """
    check_key(key, shape, "philox_random")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"philox_random: distribution is {distribution!r}, expected one of {', '.join(DISTRIBUTIONS)}"
        )
    kind = DISTRIBUTIONS[distribution]
    dtypes = (torch.int64,) if distribution == "bits" else FLOATS
    if dtype is not None and dtype not in dtypes:
        raise TypeError(f"philox_random: dtype is {dtype}, expected one of {dtypes} for {distribution!r}")
    out = _philox_random(list(shape), key, kind)
    return out if dtype is None else out.to(dtype)


def check_key(key: Tensor, shape: Sequence[int], op: str) -> None:
    """Raise TypeError or ValueError unless ``key`` is int64 [2], or [B, 2] with B = shape[0]."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        got = key.dtype if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"{op}: key is {got}, expected an int64 tensor (see genperf.ops.draw_key)")
    if key.shape != (2,) and not (key.dim() == 2 and len(shape) > 0 and key.shape == (shape[0], 2)):
        batch = shape[0] if len(shape) > 0 else "B"
        raise ValueError(f"{op}: key has shape {tuple(key.shape)}, expected (2,) or ({batch}, 2)")


def _draw(device: torch.device, generator: torch.Generator | None, distinct: Tensor | None = None) -> Tensor:
    if generator is None or generator.device.type == device.type:
        return torch.empty(2, dtype=torch.int64, device=device).random_(generator=generator)
    return torch.empty(2, dtype=torch.int64, device=generator.device).random_(generator=generator).to(device)


_draw_key = Operator(
    "draw_key",
    "(Device device, Generator? generator, Tensor? distinct=None) -> Tensor",
    _draw,
    lambda device, *_: torch.empty(2, dtype=torch.int64, device=device),
    tags=(torch.Tag.nondeterministic_seeded,),
)


class _Passing(threading.local):
    """A thread's key int64 [2] on the CPU for a call that keeps none: each such call draws into it anew."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.key = torch.empty(2, dtype=torch.int64, device="cpu")


passing = _Passing()


def draw_key(
    device: torch.device | str,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """A fresh key from torch's generator, drawn on the device (so that a CUDA graph can replay it).

    Args:
        device: where the key is wanted.
        generator: None for the device's default generator. A CPU generator for a CUDA key is drawn on
            the CPU and copied (and cannot be captured in a graph). A list: one key for each.

    Returns:
        int64 [2], (seed, offset); for a list of B generators int64 [B, 2].

    Raises:
        TypeError: if ``generator`` is anything else.
    """
    device = torch.device(device)
    if generator is None or isinstance(generator, torch.Generator):
        if torch.compiler.is_compiling():
            # The compiler takes operators with equal arguments for equal; an empty tensor is one to none.
            return _draw_key(device, generator, torch.empty(0, device=device))
        return _draw_key(device, generator)
    if not isinstance(generator, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generator):
        raise TypeError(
            f"draw_key: generator is {type(generator).__name__}, expected a torch.Generator or a list of them"
        )
    if not generator:
        return torch.empty(0, 2, dtype=torch.int64, device=device)
    return torch.stack([_draw_key(device, g) for g in generator])
