"""vq_nearest against exact arithmetic on data of all kinds."""

from __future__ import annotations

import functools

import pytest
import torch
from genperf_testing.nearest import (
    CPU,
    DATA,
    DTYPES,
    METRICS,
    REFERENCE,
    TRITON,
    check,
    check_set,
    exact_order,
    sets,
    slow,
    slow_unless,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import genperf
from genperf.ops import vq_nearest

QUICK = ("gaussian", "offset 30", "subnormal", "duplicates", "an ulp apart, midpoints", "not finite")
HALF = ("gaussian", "offset 30", "duplicates", "midpoints", "small integers")
# More than a few vectors and fewer, which the CPU searches in other ways.
SIZES = ((33, 20, 8), (9, 17, 1), (18, 40, 3), (5, 70, 33))


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", DATA)
def test_cpu(backend, name, metric):
    for sizes in SIZES:
        check_set(backend, sizes, name, metric)


@pytest.mark.parametrize("backend", REFERENCE, indirect=True)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", slow_unless(QUICK, DATA))
def test_reference(backend, name, metric):
    for sizes in SIZES[1:]:
        check_set(backend, sizes, name, metric)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", slow_unless(QUICK[2:], DATA))
def test_triton(backend, name, metric):
    check_set(backend, (4, 7, 3), name, metric)


@pytest.mark.slow
@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", DATA)
def test_triton_with_more_dimensions(backend, name, metric):
    check_set(backend, (5, 9, 31), name, metric)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", DATA)
def test_order_of_the_nearest_on_the_cpu(backend, name, metric, k):
    for sizes in ((12, 20, 6), (17, 20, 6)):
        check_set(backend, sizes, name, metric, k)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", slow_unless(("duplicates", "not finite", "zeros"), DATA))
def test_order_of_the_nearest_by_triton(backend, name, metric):
    check_set(backend, (4, 7, 3), name, metric, 3)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("metric", METRICS)
def test_many_of_many_codewords_by_triton(backend, metric):
    """Two blocks of the codebook, of which one is not full, and more duplicates than are ranked by name."""
    x, codebook = sets(3, 130, 6)["gaussian"]
    x, codebook = x[:2].to(backend.device), codebook.clone().to(backend.device)
    check(x, codebook, metric, 5)
    codebook[40:60] = codebook[1]
    check(codebook[1:2], codebook, metric, 2)


@pytest.mark.parametrize("backend", REFERENCE, indirect=True)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", slow_unless(QUICK, DATA))
def test_order_of_the_nearest_by_the_reference(backend, name, metric, k):
    check_set(backend, (12, 20, 6), name, metric, k)


@pytest.mark.parametrize("backend", CPU + slow(REFERENCE) + TRITON, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision(backend, dtype, metric):
    for name in HALF[2:4] if backend.costly else HALF:
        check_set(backend, (6, 14, 40) if backend.costly else (33, 20, 8), name, metric, dtype=dtype)


_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
_VALUES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1.0 + 2**-23, 3.0e38, 1e-45]), _FLOATS)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("metric", METRICS)
def test_any_numbers(metric, data):
    """On the backend that genperf chooses, for few and for more vectors, and on the reference."""
    n, n_words, dim = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4)))
    numbers = st.lists(_VALUES, min_size=(n + n_words) * dim, max_size=(n + n_words) * dim)
    values = torch.tensor(data.draw(numbers)).view(-1, dim)
    x, codebook = values[:n], values[n:]
    check(x.repeat(17, 1), codebook, metric)
    check(x, codebook, metric)
    with genperf.backend("reference"):
        check(x, codebook, metric)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_many_vectors_have_what_few_have(backend, metric, k):
    """Enough of them for products of bytes, and too few."""
    for name, (x, codebook) in sets(530, 70, 26).items():
        search = functools.partial(vq_nearest, metric=metric, k=min(k, len(codebook)), return_distance=True)
        parts = zip(*(search(part, codebook) for part in x.split(106)), strict=True)
        for found, expected in zip(search(x, codebook), parts, strict=True):
            same = found.view(-1).view(torch.int32).equal(torch.cat(expected).view(-1).view(torch.int32))
            assert same, name


def test_float32_is_worse():
    """The data above are not vacuous: the usual formula in float32 errs on them."""

    def eager(x, c):
        return (x.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * x @ c.T).argmin(1)

    for name in ("offset 1e5", "tiny", "huge", "an ulp apart, midpoints"):
        x, c = sets(33, 20, 8)[name]
        exact = [order[0] for order in exact_order(x, c, "l2")]
        assert eager(x, c).tolist() != exact, name
