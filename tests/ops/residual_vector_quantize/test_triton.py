"""The Triton kernels of residual_vector_quantize: few vectors in one launch, many stage by stage."""

from __future__ import annotations

import math
import os

import pytest
import torch
from genperf_testing.cases import normals

import genperf
from genperf.ops import residual_vector_quantize

kernels = pytest.importorskip("genperf.kernels.residual_vector_quantize")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(backend, *args, **options):
    with genperf.backend(backend):
        return residual_vector_quantize(*args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("few", "prepared"),
    [(512, 0), (0, 1 << 21), (0, 0)],
    ids=["one launch", "stages at once", "stage by stage"],
)
def test_values(monkeypatch, few, prepared, dtype):
    """Ties, duplicates, NaN and infinity, groups, dropped stages, strided vectors, lists of codebooks."""
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton is not interpreted")
    monkeypatch.setattr(kernels, "FEW", few)
    monkeypatch.setattr(kernels, "PREPARED", prepared)
    x = normals((2, 8, 7), "x").to(DEVICE, dtype).movedim(1, -1)  # [groups, N, D]
    codebooks = (normals((2, 2, 17, 8), "c") / 1.5).to(DEVICE, dtype)
    x[0, 2, 1], x[1, 3, 2] = math.nan, math.inf
    codebooks[:, 1, 15] = codebooks[:, 1, 1]
    codebooks[0, 0, 5, 2] = math.inf
    x[0, 4] = (codebooks[0, 0, 7] + codebooks[0, 0, 9]) / 2
    limits = torch.arange(7, device=DEVICE) % 3
    lists = [[book.clone() for book in group] for group in codebooks]
    for args, options in (
        ((x, codebooks), {}),
        ((x, codebooks), {"n_stages": limits}),
        ((x, codebooks), {"n_stages": 1}),
        ((x, lists), {"mask": limits > 0}),
    ):
        expected, actual = (run(backend, *args, **options) for backend in ("reference", "triton"))
        assert torch.equal(actual.indices, expected.indices)
        assert torch.equal(actual.quantized.nan_to_num(9.0), expected.quantized.nan_to_num(9.0))
        torch.testing.assert_close(actual.losses, expected.losses, equal_nan=True)
