"""The oracle of ``vq_nearest``, in integers, and the data that it is asked about."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import pytest
import torch

from genperf.ops import vq_nearest
from genperf_testing.backends import BACKENDS, parameters
from genperf_testing.cases import normals

METRICS = ("l2", "cosine", "dot")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The backends of the op. Interpreted Triton is slow; its tests are chosen by themselves.
REFERENCE = parameters(b for b in BACKENDS if b.backend == "reference")
CPU = parameters(b for b in BACKENDS if b.backend == "cpu")
TRITON = parameters(b for b in BACKENDS if b.backend == "triton")


def grid(shape, *seed):
    """Multiples of 1/8, the same in every dtype, with ties and duplicates."""
    return (normals(shape, *seed) * 8).round() / 8


def _integers(rows):
    """Finite rows times one power of two that makes integers of all; None for the others."""
    finite = rows.isfinite().all(1).tolist()
    pairs = zip(rows.tolist(), finite, strict=True)
    ratios = [[v.as_integer_ratio() for v in row] if ok else None for row, ok in pairs]
    unit = max((d for row in ratios if row for _, d in row), default=1)
    return [row and [n * (unit // d) for n, d in row] for row in ratios]


def _key(x, c, metric):
    """Orders codewords as the distance does; x and c are lists of integers."""
    if metric == "l2":
        return sum((a - b) ** 2 for a, b in zip(x, c, strict=True))
    dot = sum(a * b for a, b in zip(x, c, strict=True))
    if metric == "dot":
        return -dot
    return Fraction(-dot * abs(dot), sum(b * b for b in c)) if dot else Fraction(0)


def exact_order(x, codebook, metric):
    """All usable codewords of [K, D] for each row of x [N, D], nearest first; None for a row without one."""
    integers = _integers(torch.cat([x, codebook]))
    rows, words = integers[: len(x)], integers[len(x) :]
    orders = []
    for row in rows:
        keys = [(_key(row, c, metric), i) for i, c in enumerate(words) if c is not None] if row else None
        orders.append(keys and [i for _, i in sorted(keys)] if keys else (None if row is None else []))
    return orders


def exact_distance(x, c, metric):
    x, c = ([Fraction(v) for v in y.tolist()] for y in (x, c))
    dot = sum(a * b for a, b in zip(x, c, strict=True))
    if metric == "l2":
        return float(sum((a - b) ** 2 for a, b in zip(x, c, strict=True)))
    if metric == "dot":
        return float(-dot)
    if dot == 0:
        return 1.0
    square = dot * dot / sum(b * b for b in c) / sum(a * a for a in x)
    return 1 - math.copysign(math.sqrt(square), dot)


def check(x, codebook, metric, k=None, expected=None):
    """Indices, and distances to a few roundings, of vq_nearest(x [N, D], codebook [K, D])."""
    expected = expected or exact_order(x.cpu(), codebook.cpu(), metric)
    index, distance = vq_nearest(x, codebook, metric, k=k, return_distance=True)
    shape = (len(x),) if k is None else (len(x), k)
    assert index.shape == distance.shape == shape
    assert index.dtype == torch.int64
    index, distance = index.reshape(len(x), -1).cpu(), distance.reshape(len(x), -1).cpu()
    for i, order in enumerate(expected):
        found = index[i].tolist()
        if order is None:
            assert found == list(range(len(found)))
            assert distance[i].isnan().all()
            continue
        others = sorted(set(range(len(codebook))) - set(order))
        assert found == (order + others)[: len(found)], f"row {i}: {found}, expected {order[: len(found)]}"
        for j, d in zip(found, distance[i], strict=True):
            if j in others:
                assert d.isnan()
                continue
            exact = exact_distance(x[i].cpu(), codebook[j].cpu(), metric)
            size = (x[i].cpu().double() * codebook[j].cpu().double()).abs().sum().item()
            slack = {"l2": 0.0, "dot": 1e-13 * size, "cosine": 1e-12}[metric]
            limit = torch.finfo(torch.float32).max
            exact = math.copysign(math.inf, exact) if abs(exact) > limit else exact
            torch.testing.assert_close(d.double().item(), exact, rtol=1e-6, atol=slack + 1e-44)


def near_duplicates(words):
    """The codewords, and each with one element moved by one ulp."""
    moved = words.clone()
    i = torch.arange(len(words))
    moved[i, i % words.shape[1]] = torch.nextafter(moved[i, i % words.shape[1]], torch.tensor(torch.inf))
    return torch.cat([moved, words])


def _data(n, n_words, dim):
    """Name to (x, codebook)."""
    x, c = normals((n, dim), "x"), normals((n_words, dim), "codebook")
    i, j = torch.arange(n) % n_words, (torch.arange(n) * 7 + 1) % n_words
    spread = 10.0 ** torch.linspace(-18, 18, n_words)[:, None]
    spread_words = c * spread.flip(0)[(torch.arange(n_words) * 7) % n_words]
    bad_x = x.masked_fill(normals((n, dim), "bad") > 2, torch.inf).masked_fill(x > 2.2, torch.nan)
    bad_words = c.masked_fill(normals(c.shape, "bad") > 2, torch.nan).masked_fill(c < -2.2, -torch.inf)
    return {
        "gaussian": (x, c),
        "uniform in 1/K": (x, torch.special.erf(c) / 16384),
        "offset 30": (x + 30, c + 30),
        "offset 1e5": (x + 1e5, c + 1e5),
        "tiny": (x * 1e-30, c * 1e-30),
        "subnormal": (x * 1e-42, c * 1e-42),
        "subnormal codebook": (x, c * 1e-43),
        "huge": (x * 1e19, c * 1e19),
        "largest": (x.clamp(-3, 3) * 1e38, c.clamp(-3, 3) * 1e38),
        "huge x": (x * 1e30, c),
        "huge codebook": (x, c * 1e30),
        "norms apart": (x * spread[i], spread_words),
        "mostly far codewords": (x, torch.where(torch.arange(n_words)[:, None] % 4 == 1, c, spread_words)),
        "one far codeword": (x, torch.cat([c, 1e8 * c[:1]])),
        "duplicates": (x, c[(torch.arange(3 * n_words) * 11 + 5) % n_words]),
        "one codeword": (x, c[:1]),
        "all alike": (x, c[:1].repeat(n_words, 1)),
        "small integers": ((2 * x).round(), (2 * c).round()),
        "midpoints": ((c[i] + c[j]) / 2, c),
        "codewords themselves": (c[i], c),
        "an ulp apart": (c[i], near_duplicates(c)),
        "an ulp apart, midpoints": ((c[i] + c[j]) / 2, near_duplicates(c)),
        "an ulp apart, offset": (c[i] + 100, near_duplicates(c + 100)),
        "zeros": (torch.where(x > 0, 0.0, -0.0), torch.cat([c, torch.zeros(2, dim), -c])),
        "zero codewords first": (x, torch.cat([torch.zeros(2, dim), c * 1e-3])),
        "parallel": (x, torch.cat([c, 3 * c, c * 2.0**-20, 5 * c])),
        "opposite": (x * 0, torch.cat([c, -c])),
        "corners of a cube": (x.sign(), normals(c.shape, "corner").sign()),
        "not finite": (bad_x, bad_words),
        "no codeword finite": (x, c * torch.nan),
    }  # fmt: skip


DATA = tuple(_data(1, 2, 3))


@functools.cache
def sets(*sizes):
    return _data(*sizes)


@functools.cache
def _expected(sizes, name, metric, dtype=torch.float32):
    return exact_order(*(t.to(dtype) for t in sets(*sizes)[name]), metric)


def check_set(backend, sizes, name, metric, k=None, dtype=torch.float32):
    x, codebook = (t.to(backend.device, dtype) for t in sets(*sizes)[name])
    check(x, codebook, metric, k and min(k, len(codebook)), _expected(sizes, name, metric, dtype))


def slow_unless(quick, values):
    """For pytest.mark.parametrize: the values, all but the quick ones marked slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow(parameters):
    return [pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.slow]) for p in parameters]
