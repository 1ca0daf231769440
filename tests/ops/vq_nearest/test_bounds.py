"""The bounds behind vq_nearest, and the count of its errors over many vectors."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from genperf_testing.backends import TESTS, load

import genperf
from genperf.ops import vq_nearest

TOOL = load(TESTS.parent / "tools" / "vq_exactness.py", "genperf_vq_exactness")


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in genperf.cpu_isas(), reason="this processor has no AVX2")
def test_bound(tmp_path):
    """The error bound of the scores that stands in docs/vector_quantization.md holds for the kernel's own."""
    here = Path(__file__).parent
    flags = [
        "-O2",
        "-std=c++17",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-ffp-contract=off",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
    ]
    program = tmp_path / "bound"
    sources = [f"-I{here.parents[2] / 'csrc'}", str(here / "bound.cpp")]
    built = subprocess.run(["c++", *flags, *sources, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    found = re.findall(r"(\S+) of the bound, of bytes (\S+), of few (\S+), (\S+) candidates", result.stdout)
    assert len(found) == 21
    *errors, candidates = ([float(number) for number in numbers] for numbers in zip(*found, strict=True))
    assert min(map(max, errors)) > 0.05, f"a bound this wide is another's: {result.stdout}"
    assert max(candidates[::3]) < 3, f"candidates by distance are measured two by two: {result.stdout}"


@pytest.mark.parametrize("name", TOOL.KINDS)
def test_no_index_is_wrong(name):
    tally = TOOL.count(name, 300)
    assert tally["rows"] == tally["by_float64"] + tally["by_integers"] == 300
    assert tally["wrong"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOL.KINDS)
def test_no_index_of_many_is_wrong(name):
    assert TOOL.count(name, round(4e6 * TOOL.KINDS[name].share), seed=7)["wrong"] == 0


def test_a_wrong_index_is_counted():
    def one_off(x, codebook):
        index = vq_nearest(x, codebook).indices
        index[5] = (index[5] + 1) % len(codebook)
        return index

    assert TOOL.count("gaussian", 100, search=one_off)["wrong"] == 1


def test_float32_is_counted():
    def eager(x, codebook):
        return torch.cdist(x, codebook).argmin(1)

    assert TOOL.count("VQGAN initialisation", 500, search=eager)["wrong"] > 0
