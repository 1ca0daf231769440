"""genperf.ops.residual_codebook_statistics against sums over one-hot vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.cases import SHAPES, Case, normals

from genperf.ops import residual_codebook_statistics, residual_vector_quantize

BACKENDS = ("reference", "cpu", "triton")


def _indices(shape, n_codewords, stages):
    """From -1, for a stage that was left out."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randint(-1, n_codewords, (*shape[:-1], stages), generator=generator)


CASES = (
    Case(
        "statistics", lambda *tensors: residual_codebook_statistics(*tensors),
        constants=lambda shape: [
            (normals(shape) * 8).round() / 64,
            (normals((3, 37, shape[-1]), "codebooks") * 8).round() / 64,
            _indices(shape, 37, 3),
        ],
        elementwise=False, backends=BACKENDS, nan_as_reference=False,
        shapes=(*(s for s in SHAPES if len(s) > 1), (0, 4), (0, 2, 3)),
    ),
)  # fmt: skip


def expected(x, codebooks, indices):
    """In float64, of one group."""
    counts, sums, residual = [], [], x
    for i, codebook in enumerate(codebooks):
        index = indices[..., i]
        one_hot = F.one_hot(index.clamp(min=0), len(codebook)).double() * (index >= 0)[..., None]
        one_hot = one_hot.flatten(0, -2)
        counts.append(one_hot.sum(0))
        sums.append(one_hot.T @ residual.double().flatten(0, -2))
        residual = residual - codebook[index.clamp(min=0)] * (index >= 0)[..., None]
    return counts, sums


def assert_statistics(out, counts, sums):
    for mine, theirs in zip(out.counts, counts, strict=True):
        assert torch.equal(mine, theirs.to(mine))
    for mine, theirs in zip(out.sums, sums, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_definition(dtype):
    x, codebooks = normals((3, 50, 20), "x").to(dtype), normals((4, 37, 20), "c").to(dtype)
    indices = _indices((3, 50, 20), 37, 4)
    out = residual_codebook_statistics(x, codebooks, indices)
    assert out.counts.shape == (4, 37)
    assert out.sums.shape == (4, 37, 20)
    assert out.sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_statistics(out, *expected(x, codebooks, indices))
    assert_statistics(
        residual_codebook_statistics(x.movedim(-1, 1).contiguous(), codebooks, indices.int(), dim=1),
        *expected(x, codebooks, indices),
    )


def test_of_what_was_quantized():
    """With dropped stages and masked vectors, in groups, one of which sees strided vectors."""
    x = normals((60, 2, 8), "x").movedim(1, 0)
    codebooks = normals((2, 3, 17, 8), "c") / 2
    out = residual_vector_quantize(x, codebooks, n_stages=torch.arange(60) % 4, mask=torch.arange(60) > 6)
    statistics = residual_codebook_statistics(x, codebooks, out.indices)
    assert statistics.counts.sum(-1).tolist() == [[40, 27, 14]] * 2
    for g in range(2):
        group = [y[g] for y in statistics]
        assert_statistics(type(statistics)(*group), *expected(x[g], codebooks[g], out.indices[g]))


def test_codebooks_of_different_sizes():
    x, books = normals((50, 6), "x"), [normals((k, 6), "c") for k in (5, 1, 33)]
    indices = torch.stack([torch.arange(50) % len(c) for c in books], -1)
    out = residual_codebook_statistics(x, books, indices)
    assert [len(c) for c in out.counts] == [5, 1, 33]
    assert_statistics(out, *expected(x, books, indices))
    nested = residual_codebook_statistics(
        x[None].expand(2, -1, -1), [books, books], indices[None].expand(2, -1, -1)
    )
    for g in range(2):
        assert_statistics(type(out)(nested.counts[g], nested.sums[g]), *expected(x, books, indices))


def test_long_sums():
    """All vectors in one codeword."""
    x, codebooks = normals((40000, 3), "x") + 5, torch.zeros(1, 4, 3)
    indices = torch.full((40000, 1), 2)
    out = residual_codebook_statistics(x, codebooks, indices)
    exact = x.double().sum(0)
    assert ((out.sums[0, 2] - exact).abs() / exact).max() < 40000**0.5 * 2**-23
    assert out.sums[0, [0, 1, 3]].eq(0).all()


def test_index_out_of_range():
    x, codebooks = normals((9, 20), "x"), normals((2, 5, 20), "c")
    indices = torch.zeros(9, 2, dtype=torch.int64)
    indices[3, 1] = 5
    with pytest.raises(ValueError, match="residual_codebook_statistics: indices has some beyond"):
        residual_codebook_statistics(x, codebooks, indices)


X, C, INDICES = torch.zeros(2, 3), torch.zeros(4, 5, 3), torch.zeros(2, 4, dtype=torch.int64)

BAD = {
    "x": (TypeError, r"x is list, expected a tensor", [[1.0], C, INDICES]),
    "indices": (TypeError, r"indices is list, expected a tensor", [X, C, [1]]),
    "indices' dtype": (TypeError, r"indices is torch.float32, expected integers", [X, C, INDICES.float()]),
    "indices' shape": (ValueError, r"indices has shape \(2, 3\), expected \(2, 4\)", [X, C, INDICES[:, :3]]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, args = BAD[name]
    with pytest.raises(error, match=f"residual_codebook_statistics: {message}"):
        residual_codebook_statistics(*args)
