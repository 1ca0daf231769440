"""genperf.ops.vq_nearest against rational arithmetic, written out here."""

from __future__ import annotations

import functools
import math
import re
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from genperf_testing.cases import SHAPES, Case, normals
from genperf_testing.contract import threads
from hypothesis import given, settings
from hypothesis import strategies as st

import genperf
from genperf.ops import vq_nearest

METRICS = ("l2", "cosine", "dot")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def grid(shape, *seed):
    """Multiples of 1/8, the same in every dtype, with ties and duplicates."""
    return (normals(shape, *seed) * 8).round() / 8


def _case(name, backends=("reference", "cpu"), n_codewords=37, **options):
    return Case(
        name,
        lambda x, codebook: vq_nearest(x, codebook, **options),
        constants=lambda shape: [grid(shape, "x"), grid((n_codewords, shape[-1]), "codebook")],
        elementwise=False,
        shapes=(*(shape for shape in SHAPES if len(shape) > 1), (0, 4), (0, 2, 3)),
        backends=backends,
    )


CASES = (
    _case("l2", ("reference", "cpu", "triton"), return_distance=True),
    _case("dot", ("reference", "cpu", "triton"), metric="dot"),
    _case("cosine", metric="cosine", return_distance=True),
    _case("three nearest", ("reference", "cpu"), k=3, return_distance=True),
    _case("many codewords", n_codewords=300),
)


# The oracle.


def _key(x, c, metric):
    """Orders codewords as the distance does; x and c are lists of Fractions."""
    if metric == "l2":
        return sum((a - b) ** 2 for a, b in zip(x, c, strict=True))
    dot = sum(a * b for a, b in zip(x, c, strict=True))
    if metric == "dot":
        return -dot
    return -dot * abs(dot) / sum(b * b for b in c) if dot else Fraction(0)


def exact_order(x, codebook, metric):
    """All usable codewords of [K, D] for each row of x [N, D], nearest first; None for a row without one."""
    words = [[Fraction(v) for v in c.tolist()] if c.isfinite().all() else None for c in codebook]
    orders = []
    for row in x:
        if not row.isfinite().all():
            orders.append(None)
            continue
        values = [Fraction(v) for v in row.tolist()]
        keys = [(_key(values, c, metric), i) for i, c in enumerate(words) if c is not None]
        orders.append([i for _, i in sorted(keys)])
    return orders


def exact_distance(x, c, metric):
    x, c = ([Fraction(v) for v in y.tolist()] for y in (x, c))
    key = _key(x, c, metric)
    if metric != "cosine":
        return float(key)
    return 1 + math.copysign(math.sqrt(abs(key) / sum(a * a for a in x)), key) if key else 1.0


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


def _near_duplicates(words):
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
        "one far codeword": (x, torch.cat([c, 1e8 * c[:1]])),
        "duplicates": (x, c[(torch.arange(3 * n_words) * 11 + 5) % n_words]),
        "one codeword": (x, c[:1]),
        "all alike": (x, c[:1].repeat(n_words, 1)),
        "small integers": ((2 * x).round(), (2 * c).round()),
        "midpoints": ((c[i] + c[j]) / 2, c),
        "codewords themselves": (c[i], c),
        "an ulp apart": (c[i], _near_duplicates(c)),
        "an ulp apart, midpoints": ((c[i] + c[j]) / 2, _near_duplicates(c)),
        "an ulp apart, offset": (c[i] + 100, _near_duplicates(c + 100)),
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
def _sets(*sizes):
    return _data(*sizes)


@functools.cache
def _expected(sizes, name, metric, dtype=torch.float32):
    return exact_order(*(t.to(dtype) for t in _sets(*sizes)[name]), metric)


def check_set(backend, sizes, name, metric, k=None, dtype=torch.float32):
    x, codebook = (t.to(backend.device, dtype) for t in _sets(*sizes)[name])
    check(x, codebook, metric, k and min(k, len(codebook)), _expected(sizes, name, metric, dtype))


def skip_unless_served(backend, metric="l2", k=None):
    if backend.backend == "cuda" or (backend.backend == "triton" and (k is not None or metric == "cosine")):
        pytest.skip("the op has no such backend")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", DATA)
def test_exact(backend, name, metric):
    skip_unless_served(backend, metric)
    for sizes in ((4, 7, 3),) if backend.costly else ((33, 20, 8), (9, 17, 1), (7, 40, 3), (5, 70, 33)):
        check_set(backend, sizes, name, metric)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", DATA)
def test_exact_order_of_the_nearest(backend, name, metric, k):
    skip_unless_served(backend, k=k)
    check_set(backend, (12, 20, 6), name, metric, k)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_exact_in_half_precision(backend, dtype, metric):
    skip_unless_served(backend, metric)
    for name in ("gaussian", "offset 30", "duplicates", "midpoints", "small integers"):
        check_set(backend, (9, 14, 5) if backend.costly else (33, 20, 8), name, metric, dtype=dtype)


_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
_VALUES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1.0 + 2**-23, 3.0e38, 1e-45]), _FLOATS)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("metric", METRICS)
def test_exact_for_any_numbers(metric, data):
    """On the backend that genperf chooses, and on the reference."""
    n, n_words, dim = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4)))
    numbers = st.lists(_VALUES, min_size=(n + n_words) * dim, max_size=(n + n_words) * dim)
    values = torch.tensor(data.draw(numbers)).view(-1, dim)
    x, codebook = values[:n], values[n:]
    check(x.repeat(6, 1), codebook, metric)
    with genperf.backend("reference"):
        check(x, codebook, metric)


def test_float32_is_worse():
    """The data above are not vacuous: the usual formula in float32 errs on them."""

    def eager(x, c):
        return (x.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * x @ c.T).argmin(1)

    for name in ("offset 1e5", "tiny", "huge", "an ulp apart, midpoints"):
        x, c = _sets(33, 20, 8)[name]
        exact = [order[0] for order in exact_order(x, c, "l2")]
        assert eager(x, c).tolist() != exact, name


def _float64(x, codebook):
    """The index by differences in float64, and which rows it settles beyond doubt."""
    rows = x.double().split(max(1, 2**22 // codebook.numel()))
    distance = torch.cat([(some[:, None] - codebook.double()).square().sum(2) for some in rows])
    least, index = distance.topk(2, largest=False, dim=1)
    return index[:, 0], least[:, 1] > least[:, 0] * (1 + 1e-12)


@pytest.mark.parametrize(
    ("n", "n_words", "dim"),
    [(1, 5, 7), (2, 64, 300), (3, 1000, 64), (97, 1023, 64), (130, 513, 255), (200, 65, 1025), (50, 40, 4096),
     (300, 3000, 2), (100, 16, 32), (100, 15, 31), (100, 17, 33), (200, 9000, 255)],
)  # fmt: skip
def test_sizes(backend, n, n_words, dim):
    """Across the blocks of the kernels, against float64 where that is certain."""
    skip_unless_served(backend)
    if backend.costly and n * n_words * dim > 2e5:
        n_words, dim = min(n_words, 300), min(dim, 40)
    x, codebook = normals((n, dim), "x").to(backend.device), normals((n_words, dim), "c").to(backend.device)
    expected, certain = _float64(x, codebook)
    assert certain.float().mean() > 0.99
    index = vq_nearest(x, codebook).indices
    assert torch.equal(index[certain], expected[certain])


LAYOUTS = {
    "images": lambda x: (x.view(2, 12, 5, 7).transpose(1, 2).contiguous().transpose(1, 2), 1),
    "channel first": lambda x: (x.view(2, 12, 35).transpose(1, 2).contiguous().transpose(1, 2), -1),
    "every third": lambda x: (x.repeat_interleave(3, 1)[:, ::3], -1),
    "transposed": lambda x: (x.T.contiguous().T, -1),
    "expanded": lambda x: (x[:1].expand(24, 35), -1),
    "five dimensions": lambda x: (x.view(2, 3, 2, 2, 35).permute(2, 4, 0, 3, 1), 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, dtype):
    skip_unless_served(backend)
    x, dim = LAYOUTS[layout](normals((24, 35), "x").to(backend.device, dtype))
    codebook = normals((50, x.shape[dim]), "c").to(backend.device, dtype)
    rows = x.movedim(dim, -1).contiguous()
    for c in (codebook, codebook.T.contiguous().T, codebook.repeat_interleave(2, 0)[::2]):
        index = vq_nearest(x, c, dim=dim).indices
        assert index.shape == rows.shape[:-1]
        with genperf.backend("reference"):
            assert torch.equal(index, vq_nearest(rows, codebook).indices)


@pytest.mark.parametrize("metric", METRICS)
def test_heads(backend, metric):
    """Each head with its own codebook, taken from one tensor without a copy."""
    skip_unless_served(backend, metric)
    x = normals((2, 9, 3, 8), "x").to(backend.device).permute(2, 0, 1, 3)  # [heads, B, N, D]
    codebook = normals((3, 21, 8), "c").to(backend.device)
    found = vq_nearest(x, codebook, metric, return_distance=True)
    assert found.indices.shape == (3, 2, 9)
    for h in range(3):
        one = vq_nearest(x[h], codebook[h], metric, return_distance=True)
        assert torch.equal(found.indices[h], one.indices)
        assert torch.equal(found.distances[h], one.distances)


def test_images_are_not_copied():
    """Extra memory far below that of x, let alone of N x K, is shown by the benchmark; here: the view."""
    x = normals((2, 6, 4, 5), "x")
    index = vq_nearest(x, normals((9, 6), "c"), dim=1).indices
    assert torch.equal(index, vq_nearest(x.permute(0, 2, 3, 1).contiguous(), normals((9, 6), "c")).indices)


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_threads_and_batch_change_nothing(n):
    x, codebook = normals((n, 24), "x"), _near_duplicates(normals((400, 24), "c"))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(vq_nearest(x, codebook, k=3, return_distance=True))
    for again in results[1:]:
        assert torch.equal(again.indices, results[0].indices)
        assert torch.equal(again.distances, results[0].distances)
    part = vq_nearest(x[n // 2 :], codebook, k=3, return_distance=True)
    assert torch.equal(part.indices, results[0].indices[n // 2 :])
    assert torch.equal(part.distances, results[0].distances[n // 2 :])


def test_flushed_denormals_change_nothing():
    x, codebook = _sets(33, 20, 8)["subnormal"]
    expected = vq_nearest(x, codebook).indices
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        with genperf.backend("cpu"):
            assert torch.equal(vq_nearest(x, codebook).indices, expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif("avx2" not in genperf.cpu_isas(), reason="this processor has no AVX2")
def test_bound(tmp_path):
    """The error bound of the scores that stands in docs/vector_quantization.md holds for the kernel's own."""
    here = Path(__file__).parent
    flags = ["-O2", "-std=c++17", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=off", "-Wno-psabi", "-Wno-unknown-pragmas"]
    program = tmp_path / "bound"
    sources = [f"-I{here.parents[1] / 'csrc'}", str(here / "vq_nearest_bound.cpp")]
    built = subprocess.run(["c++", *flags, *sources, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    found = re.findall(r"largest error (\S+) of the bound, of few (\S+)", result.stdout)
    assert len(found) == 15
    for errors in zip(*found, strict=True):
        assert max(float(e) for e in errors) > 0.05, f"a bound this wide is another's: {result.stdout}"


def test_results_carry_no_gradient():
    x, codebook = (normals((3, 4), i).requires_grad_() for i in range(2))
    index, distance = vq_nearest(x, codebook, return_distance=True)
    assert not index.requires_grad
    assert not distance.requires_grad
    assert vq_nearest(x, codebook).distances is None


def test_empty(backend):
    skip_unless_served(backend)
    codebook = torch.ones(3, 4, device=backend.device)
    assert vq_nearest(codebook[:0], codebook).indices.shape == (0,)
    found = vq_nearest(codebook.new_empty(2, 0, 4), codebook, return_distance=True)
    assert found.indices.shape == found.distances.shape == (2, 0)
    assert vq_nearest(codebook[0], codebook).indices.shape == ()
    assert vq_nearest(codebook.new_empty(0, 5, 4), codebook.new_empty(0, 3, 4)).indices.shape == (0, 5)


X, C = torch.zeros(2, 3), torch.zeros(5, 3)

BAD = {
    "x no tensor": (TypeError, r"x is list, expected a tensor", ([1.0], C), {}),
    "codebook no tensor": (TypeError, r"codebook is NoneType, expected a tensor", (X, None), {}),
    "integers": (TypeError, r"x is torch.int64, expected one of", (X.long(), C.long()), {}),
    "dtypes": (TypeError, r"codebook is torch.float16, expected torch.float32", (X, C.half()), {}),
    "devices": (ValueError, r"codebook is on meta, expected cpu", (X, C.to("meta")), {}),
    "metric": (ValueError, r"metric is 'l1', expected one of l2, cosine, dot", (X, C, "l1"), {}),
    "no codewords": (ValueError, r"codebook has shape \(0, 3\), expected", (X, C[:0]), {}),
    "no channels": (ValueError, r"codebook has shape \(5, 0\), expected", (X[:, :0], C[:, :0]), {}),
    "codebook a vector": (ValueError, r"codebook has shape \(3,\), expected", (X, C[0]), {}),
    "other channels": (
        ValueError, r"x has shape \(2, 3\), expected 2 in dimension -1, as the codebook, \(5, 2\)",
        (X, C[:, :2]), {},
    ),
    "other heads": (
        ValueError, r"x has shape \(2, 3\), expected 4 heads in dimension 0",
        (X, C.expand(4, 5, 3)), {},
    ),
    "channels are heads": (
        ValueError, r"dim is 0 for x of shape \(2, 3\), expected a dimension of it after that of the heads",
        (X, C.expand(2, 5, 3)), {"dim": 0},
    ),
    "no such dimension": (ValueError, r"dim is 2 for x of shape \(2, 3\)", (X, C), {"dim": 2}),
    "dim no integer": (TypeError, r"dim is float, expected an integer", (X, C), {"dim": 1.0}),
    "scalar": (ValueError, r"dim is -1 for x of shape \(\)", (X[0, 0], C), {}),
    "k 0": (ValueError, r"k is 0, expected 1 to 5", (X, C), {"k": 0}),
    "k above K": (ValueError, r"k is 6, expected 1 to 5 for a codebook of shape \(5, 3\)", (X, C), {"k": 6}),
    "k no integer": (TypeError, r"k is float, expected an integer", (X, C), {"k": 1.0}),
    "return_distance no bool": (
        TypeError, r"return_distance is int, expected a bool",
        (X, C), {"return_distance": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, args, options = BAD[name]
    with pytest.raises(error, match=f"vq_nearest: {message}"):
        vq_nearest(*args, **options)
