"""genperf.ops.philox_random and draw_key: known answers, the same bits everywhere, and statistics."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess

import numpy as np
import pytest
import scipy.stats
import torch
from genperf_testing.backends import TESTS, load
from genperf_testing.cases import Case

import genperf
from genperf.ops import draw_key, gaussian_sample, philox_random
from genperf.ops.philox_random import _normal_pair, _philox_words

M = 0xFFFFFFFF
DISTRIBUTIONS = ("normal", "uniform", "bits")
KEY = torch.tensor([0x1234_5678_9ABC, -7])


def _keys(shape):
    return torch.stack([KEY + i for i in range(shape[0])]) if shape[0] else KEY.new_empty(0, 2)


def _case(distribution, keys):
    return Case(
        f"{distribution}, keys" if keys else distribution,
        lambda like, key: [philox_random(like.shape, key, distribution)],
        constants=lambda shape: [torch.zeros(shape), _keys(shape) if keys else KEY],
        per_sample=keys,
    )


CASES = tuple(_case(distribution, keys) for distribution in DISTRIBUTIONS for keys in (False, True))


# Known answers

#: Random123's kat_vectors for philox4x32-10: counter, key, words.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((M, M, M, M), (M, M), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox(counter, key):
    """Philox4x32-10 as the paper has it, on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & M, p0 >> 32 ^ c[3] ^ k[1], p0 & M]
        k = [k[0] + 0x9E3779B9 & M, k[1] + 0xBB67AE85 & M]
    return tuple(c)


def words_of(key, group):
    """The four words of elements 4 group .. 4 group + 3."""
    seed, offset = (int(x) & 2**64 - 1 for x in key)
    return philox((group & M, group >> 32, offset & M, offset >> 32), (seed & M, seed >> 32))


def signed(low, high):
    """The int64 of two 32-bit words."""
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


#: (key, group) whose words are known; the element of most of these groups is beyond what memory holds.
BLOCKS = tuple(((signed(*k), signed(*c[2:])), c[0] | c[1] << 32, words) for c, k, words in KNOWN)

KEYS = {
    "zeros": (0, 0),
    "ones": (-1, -1),
    "Random123's third": BLOCKS[2][0],
    "high words": (5 << 32, 7 << 32),
    "low words": (5, 7),
    "extremes": (-(2**63), 2**63 - 1),
}

#: Groups on both sides of what 32 bits, 31 bits and 62 bits hold.
GROUPS = sorted({g + d for g in (0, 2**31, 2**32, 2**33, 2**61) for d in range(-3, 4) if g + d >= 0})


def test_the_paper_on_integers():
    for counter, key, words in KNOWN:
        assert philox(counter, key) == words


@pytest.mark.parametrize("name", KEYS)
def test_bits(backend, name):
    for n in (23, 1027):
        key = torch.tensor(KEYS[name], device=backend.device)
        bits = philox_random((n,), key, "bits")
        expected = [word for group in range((n + 3) // 4) for word in words_of(KEYS[name], group)][:n]
        assert bits.dtype == torch.int64
        assert bits.tolist() == expected
    if name == "zeros":
        assert tuple(bits[:4].tolist()) == KNOWN[0][2]


def test_bits_of_samples(backend):
    """One key a sample: elements are numbered from 0 in each."""
    keys = torch.tensor([*KEYS.values()], device=backend.device)
    bits = philox_random((len(keys), 3, 5), keys, "bits")
    for row, key in zip(bits, KEYS.values(), strict=True):
        assert row.flatten().tolist() == [w for g in range(4) for w in words_of(key, g)][:15]


# The functions below the backends, for groups whose elements no memory holds


def normals_in_float64(words):
    """Box-Muller, by the library of the host."""
    words = np.asarray(words, dtype=np.uint64).reshape(-1, 2)
    uniform = ((words[:, 0] >> np.uint64(8)) * 2.0**-24 + 2.0**-25).astype(np.float32).astype(float)
    turn = ((words[:, 1] >> np.uint64(8)) + 0.5) * 2.0**-24
    radius = np.sqrt(-2 * np.log(uniform))
    return np.stack([radius * np.cos(2 * np.pi * turn), radius * np.sin(2 * np.pi * turn)], 1).ravel()


def normals_of_reference(words):
    words = torch.tensor(words).view(-1, 2)
    return torch.stack(_normal_pair(words[:, 0], words[:, 1]), 1).flatten()


def _columns(numbers):
    return [torch.tensor([n & M for n in numbers]), torch.tensor([n >> 32 & M for n in numbers])]


def test_blocks_of_the_reference():
    keys, groups, expected = zip(*BLOCKS, strict=True)
    seeds, offsets = zip(*keys, strict=True)
    words = _philox_words([*_columns(groups), *_columns(offsets)], tuple(_columns(seeds)))
    assert [tuple(row) for row in torch.stack(words, 1).tolist()] == list(expected)


SOURCE = """
#include "common/philox_cpu.h"
using namespace genperf;

extern "C" void words(uint64_t seed, uint64_t offset, uint64_t group, uint32_t* out) {
  uint32_t w[4];
  philox_words({seed, offset}, group, w);
  for (int i = 0; i < 4; ++i) out[i] = w[i];
}

extern "C" void normals(uint64_t seed, uint64_t offset, uint64_t start, int n, float* out) {
  alignas(64) PhiloxBuffer buffer;
  const float* x = philox_chunk<Distribution::kNormal>({seed, offset}, start, n, buffer);
  for (int i = 0; i < n; ++i) out[i] = x[i];
}
"""

FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
}


@pytest.fixture(scope="module", params=FLAGS)
def library(request, tmp_path_factory):
    """The C++ headers, compiled as they are for an instruction set."""
    if request.param not in genperf.cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    compiler = os.environ.get("CXX", "c++")
    folder = tmp_path_factory.mktemp("blocks")
    source = folder / "blocks.cpp"
    source.write_text(SOURCE)
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-psabi",
         f"-DGENPERF_ISA={request.param}", *FLAGS[request.param], f"-I{TESTS.parent / 'csrc'}", str(source),
         "-o", str(folder / "blocks.so")],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "blocks.so"))


def _uint64(*numbers):
    return [ctypes.c_uint64(int(n) & 2**64 - 1) for n in numbers]


def test_blocks_of_the_headers(library):
    out = (ctypes.c_uint32 * 4)()
    for key, group, words in (*BLOCKS, *((KEY.tolist(), g, words_of(KEY, g)) for g in GROUPS)):
        library.words(*_uint64(*key, group), out)
        assert tuple(out) == words


@pytest.mark.parametrize("start", [0, 2, 4 * (2**31 - 9), 4 * (2**32 - 9) + 2, 4 * (2**61 - 9)])
def test_normals_of_the_headers(library, start):
    """Runs of elements that cross a power of two, from any start."""
    n = 96
    out = np.empty(n, np.float32)
    library.normals(*_uint64(*KEY, start), n, ctypes.c_void_p(out.ctypes.data))
    groups = range(start // 4, (start + n + 3) // 4)
    words = [word for group in groups for word in words_of(KEY, group)]
    expected = normals_of_reference(words)[start % 4 :][:n]
    assert torch.equal(torch.from_numpy(out), expected)


def test_blocks_of_triton():
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs the interpreter or a GPU")
    kernels = load(TESTS / "ops" / "triton_blocks.py", "genperf_triton_blocks")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = [*BLOCKS, *((tuple(KEY.tolist()), g, words_of(KEY, g)) for g in GROUPS)]
    groups = torch.tensor([signed(g & M, g >> 32) for _, g, _ in examples], device=device)
    keys = torch.tensor([key for key, _, _ in examples], device=device)
    expected = torch.tensor([words for _, _, words in examples])
    words, normals = kernels.blocks(keys, groups)
    assert torch.equal(words.cpu(), expected)
    assert torch.equal(normals.cpu(), normals_of_reference(expected.tolist()).view(-1, 4))


# The same bits everywhere


@functools.cache
def numbers_of_reference(distribution, n):
    with genperf.backend("reference"):
        return philox_random((n,), KEY, distribution)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_same_bits(kernel, distribution):
    n = (2**15 if kernel.costly else 2**18) + 5
    numbers = philox_random((n,), KEY.to(kernel.device), distribution)
    assert torch.equal(numbers.cpu(), numbers_of_reference(distribution, n))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_same_bits_for_many_keys(kernel, distribution):
    """High words of seed and offset, and samples that are no whole number of groups."""
    numbers = 150 if kernel.costly else 4000
    keys = torch.randint(-(2**63), 2**63 - 1, (numbers, 2), generator=torch.Generator().manual_seed(0))
    with genperf.backend("reference"):
        expected = philox_random((40, 23), keys[:40], distribution)
    drawn = philox_random((numbers, 23), keys.to(kernel.device), distribution).cpu()
    assert torch.equal(drawn[:40], expected)
    with genperf.backend("cpu"):
        assert torch.equal(drawn, philox_random((numbers, 23), keys, distribution))


def test_normals_are_accurate():
    """Box-Muller's to two units of roundoff of the radius."""
    words = numbers_of_reference("bits", 2**18).tolist()
    exact = normals_in_float64(words)
    radius = np.repeat(np.hypot(exact[::2], exact[1::2]), 2)
    error = np.abs(numbers_of_reference("normal", 2**18).double().numpy() - exact)
    assert (error <= 2 * 2.0**-23 * radius).all()


@pytest.mark.parametrize("word", [0, 1, 2**7, 2**8, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, M - 255, M])
def test_normals_at_the_ends(word):
    """The smallest and largest radius, and the angles at the quadrants' borders."""
    for pair in ((word, 12345 << 8), (12345 << 8, word), (word, word)):
        exact = normals_in_float64(pair)
        actual = normals_of_reference(pair).double().numpy()
        assert np.isfinite(actual).all()
        np.testing.assert_allclose(actual, exact, rtol=0, atol=2 * 2.0**-23 * np.hypot(*exact))


def test_uniforms_are_the_definition():
    bits, uniforms = numbers_of_reference("bits", 4096), numbers_of_reference("uniform", 4096)
    exact = (bits >> 8).double() * 2.0**-24 + 2.0**-25
    assert torch.equal(uniforms, exact.float())
    assert uniforms.min() > 0


# Statistics. The seeds are fixed, so a failure is no bad luck, but a property of the numbers.

SEEDS = (0, 1, 2**40 + 3, -5)
N = 2**20


def accept(p):
    """Of some forty p-values none is this small by chance, or only once in twenty-five thousand times."""
    assert p > 1e-6, p


@functools.cache
def drawn(seed, distribution, offset=0):
    return philox_random((N,), torch.tensor([seed, offset]), distribution).double().numpy()


@pytest.mark.parametrize("seed", SEEDS)
def test_normals_are_normal(seed):
    x = drawn(seed, "normal")
    accept(scipy.stats.kstest(x, "norm").pvalue)
    accept(scipy.stats.kstest(x[: N // 64], "norm", method="exact").pvalue)


@pytest.mark.parametrize("seed", SEEDS)
def test_moments_of_normals(seed):
    x = drawn(seed, "normal")
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        accept(2 * scipy.stats.norm.sf(abs((x**power).mean() - mean) / np.sqrt(variance / N)))


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_are_independent(seed):
    """Within a pair, a group, a chunk and a row, also in their squares: Box-Muller pairs share a radius."""
    x = drawn(seed, "normal")
    for values in (x, x**2 - 1):
        for lag in (1, 2, 3, 4, 8, 64, 512, 1024):
            accept(
                2
                * scipy.stats.norm.sf(abs((values[lag:] * values[:-lag]).mean()) * np.sqrt(N) / values.var())
            )
    even, odd = x[::2], x[1::2]
    counts, _, _ = np.histogram2d(
        np.arctan2(odd, even), even**2 + odd**2, bins=(16, (0, 0.5, 1, 2, 3, 5, 100))
    )
    accept(scipy.stats.chi2_contingency(counts).pvalue)


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbouring_keys_are_independent(seed):
    x = drawn(seed, "normal")
    for other in (drawn(seed + 1, "normal"), drawn(seed, "normal", 1), drawn(seed, "normal", 2**32)):
        accept(2 * scipy.stats.norm.sf(abs((x * other).mean()) * np.sqrt(N)))


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_are_uniform(seed):
    """Chi-square of each byte and of each bit."""
    bits = drawn(seed, "bits").astype(np.uint64)
    for shift in (0, 8, 16, 24):
        accept(
            scipy.stats.chisquare(np.bincount((bits >> np.uint64(shift) & np.uint64(255)).astype(int))).pvalue
        )
    for shift in range(32):
        ones = int((bits >> np.uint64(shift) & np.uint64(1)).sum())
        accept(scipy.stats.binomtest(ones, N).pvalue)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniforms_are_uniform(seed):
    accept(scipy.stats.kstest(drawn(seed, "uniform"), "uniform").pvalue)


def test_the_statistics_can_fail():
    """Numbers that are wrong by a little do not pass."""
    x = drawn(0, "normal")
    for wrong in (1.01 * x, x + 0.01, np.round(x, 1), np.where(np.abs(x) > 1.5, x[::-1], x)):
        with pytest.raises(AssertionError):
            accept(scipy.stats.kstest(wrong, "norm").pvalue)
    with pytest.raises(AssertionError):
        accept(
            scipy.stats.chisquare(np.bincount(np.minimum(drawn(0, "bits") // 2**24, 254).astype(int))).pvalue
        )


# philox_random and draw_key as functions


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_shapes(backend, distribution, shape):
    numbers = philox_random(shape, KEY.to(backend.device), distribution)
    assert numbers.shape == shape
    assert numbers.dtype == (torch.int64 if distribution == "bits" else torch.float32)
    assert (
        numbers.flatten().tolist()
        == philox_random((24,), KEY.to(backend.device), distribution).tolist()[: numbers.numel()]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    numbers = philox_random((100,), KEY, dtype=dtype)
    assert torch.equal(numbers, philox_random((100,), KEY).to(dtype))


@pytest.mark.parametrize(
    ("error", "message", "shape", "key", "options"),
    [
        (TypeError, "key is list, expected an int64 tensor", (2,), [1, 2], {}),
        (TypeError, "key is torch.int32, expected an int64 tensor", (2,), KEY.int(), {}),
        (ValueError, r"key has shape \(1,\), expected \(2,\) or \(4, 2\)", (4,), KEY[:1], {}),
        (ValueError, r"key has shape \(3, 2\), expected \(2,\) or \(4, 2\)", (4,), KEY.expand(3, 2), {}),
        (ValueError, r"key has shape \(1, 2\), expected \(2,\) or \(B, 2\)", (), KEY[None], {}),
        (ValueError, "distribution is 'cauchy', expected one of normal, uniform, bits", (2,), KEY,
         {"distribution": "cauchy"}),
        (TypeError, "dtype is torch.int32, expected one of .* 'normal'", (2,), KEY, {"dtype": torch.int32}),
        (TypeError, "dtype is torch.float32, expected one of .* 'bits'", (2,), KEY,
         {"dtype": torch.float32, "distribution": "bits"}),
    ],
)  # fmt: skip
def test_bad_input(error, message, shape, key, options):
    with pytest.raises(error, match=f"philox_random: {message}"):
        philox_random(shape, key, **options)


def test_keys_are_reproducible():
    torch.manual_seed(1)
    first, second = draw_key("cpu"), draw_key("cpu")
    assert first.dtype == torch.int64
    assert first.shape == (2,)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(draw_key("cpu"), first)

    state = torch.get_rng_state()
    third = draw_key("cpu")
    torch.set_rng_state(state)
    assert torch.equal(draw_key("cpu"), third)


def test_keys_of_generators():
    def generators():
        return [torch.Generator().manual_seed(i) for i in (3, 4, 3)]

    keys = draw_key("cpu", generators())
    assert keys.shape == (3, 2)
    assert torch.equal(keys[0], keys[2])
    assert not torch.equal(keys[0], keys[1])
    for key, generator in zip(keys, generators(), strict=True):
        assert torch.equal(draw_key("cpu", generator), key)
    assert draw_key("cpu", []).shape == (0, 2)
    before = torch.get_rng_state()
    draw_key("cpu", generators())
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_fill_their_words():
    """Both halves of seed and offset vary (torch gives 63 random bits)."""
    keys = torch.stack([draw_key("cpu", torch.Generator().manual_seed(i)) for i in range(64)])
    for words in (keys & M, keys >> 32):
        assert len(words.unique()) == words.numel()


@pytest.mark.parametrize("generator", [3, [3], "default"])
def test_bad_generators(generator):
    with pytest.raises(
        TypeError, match=r"draw_key: generator is .*, expected a torch.Generator or a list of them"
    ):
        draw_key("cpu", generator)


def test_compiled():
    def function(x, generator=None):
        return philox_random(x.shape, draw_key(x.device, generator))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.zeros(3, 5)
    torch.manual_seed(0)
    expected = function(x), function(x)
    torch.manual_seed(0)
    assert all(torch.equal(compiled(x), e) for e in expected)


@pytest.mark.gpu
def test_keys_on_a_gpu(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    key = draw_key("cuda", torch.Generator().manual_seed(1))
    assert key.is_cuda
    assert torch.equal(key.cpu(), draw_key("cpu", torch.Generator().manual_seed(1)))
    keys = draw_key("cuda", [torch.Generator("cuda").manual_seed(i) for i in (1, 2, 1)])
    assert torch.equal(keys[0], keys[2])
    assert not torch.equal(keys[0], keys[1])


def test_keys_of_a_compiled_function_that_is_differentiated_are_different():
    """The compiler's search for common subexpressions takes place where there is a backward pass."""

    def difference(parameters):
        return gaussian_sample(parameters).z - gaussian_sample(parameters + 0.0).z

    parameters = torch.zeros(2, 8, 3, requires_grad=True)
    torch.manual_seed(0)
    expected = difference(parameters)
    torch.manual_seed(0)
    actual = torch.compile(difference, fullgraph=True, backend="aot_eager")(parameters)
    assert expected.abs().max() > 0
    assert torch.equal(actual, expected)
