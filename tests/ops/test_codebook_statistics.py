"""genperf.ops.codebook_statistics against one-hot products in float64."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.cases import SHAPES, Case, normals
from genperf_testing.contract import threads

from genperf.ops import codebook_statistics, vq_nearest

BACKENDS = ("reference", "cpu", "triton")


def codes(shape, n_codewords, *seed):
    """Indices in int64, some of them -1."""
    return (normals(shape, *seed) * 1e4).round().long().remainder(n_codewords + 1) - 1


def _case(name, n_codewords, **options):
    return Case(
        name,
        lambda x, indices: codebook_statistics(x, indices, n_codewords, **options),
        constants=lambda shape: [normals(shape, "x"), codes(shape[:-1], n_codewords)],
        elementwise=False,
        shapes=(*(shape for shape in SHAPES if len(shape) > 1), (0, 4), (0, 2, 3)),
        backends=BACKENDS,
    )


CASES = (_case("five codewords", 5), _case("more than vectors", 60))


def one_hot(x, indices, n_codewords):
    """Of x [N, D] in float64; vectors with index -1 are left out."""
    x, indices = x[indices >= 0].double(), indices[indices >= 0]
    hot = F.one_hot(indices, n_codewords).double()
    return hot.sum(0), hot.T @ x


def check(result, x, indices, n_codewords):
    counts, sums = one_hot(x, indices, n_codewords)
    assert result.counts.dtype == result.sums.dtype == torch.float32
    assert torch.equal(result.counts.double(), counts)
    _, size = one_hot(x.abs(), indices, n_codewords)
    error = (result.sums.double() - sums).abs()
    assert (error <= 2**-24 * counts.sqrt()[:, None] * 3 * size + 1e-40).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "n_codewords", "dim"),
    [
        (1, 1, 1),
        (7, 3, 16),
        (1000, 1, 5),
        (2000, 7, 64),
        (3000, 200, 33),
        (500, 1000, 24),
        (130, 9, 300),
        (40, 9, 70),
    ],
    ids=str,
)
def test_values(n, n_codewords, dim, dtype, kernel):
    if kernel.backend not in BACKENDS:
        pytest.skip("the op has no such backend")
    if kernel.costly and n * dim > 60000:
        pytest.skip("interpreted, this takes long")
    x = normals((n, dim), "x").to(kernel.device, dtype)
    indices = codes((n,), n_codewords).to(kernel.device)
    check(codebook_statistics(x, indices, n_codewords), x, indices, n_codewords)


def test_all_in_one_codeword(kernel):
    if kernel.backend not in BACKENDS:
        pytest.skip("the op has no such backend")
    n = 700 if kernel.costly else 70000
    x = normals((n, 8), "x").to(kernel.device)
    for code in (0, 5, 11):
        indices = torch.full((n,), code, device=kernel.device)
        check(codebook_statistics(x, indices, 12), x, indices, 12)


def test_any_integers():
    x, indices = normals((40, 6), "x"), codes((40,), 9)
    expected = codebook_statistics(x, indices, 9)
    for dtype in (torch.int32, torch.int16, torch.int8):
        for result, other in zip(codebook_statistics(x, indices.to(dtype), 9), expected, strict=True):
            assert torch.equal(result, other)
    assert torch.equal(codebook_statistics(x, indices.abs().byte(), 9).counts.sum(), torch.tensor(40.0))


def test_layouts_of_images():
    """Channel-first and channels-last images, and heads that are slices of the channels."""
    x, indices = normals((3, 12, 5, 7), "x"), codes((3, 5, 7), 10)
    rows = x.movedim(1, -1).reshape(-1, 12)
    expected = codebook_statistics(rows, indices.flatten(), 10)
    for image in (x, x.to(memory_format=torch.channels_last)):
        result = codebook_statistics(image, indices, 10, dim=1)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    heads = x.unflatten(1, (4, 3)).movedim(1, 0)
    head_indices = torch.stack([indices, indices, indices.flip(0), indices])
    result = codebook_statistics(heads, head_indices, 10, dim=2, heads=True)
    assert result.counts.shape == (4, 10)
    for h in range(4):
        one = codebook_statistics(heads[h], head_indices[h], 10, dim=1)
        assert torch.equal(result.counts[h], one.counts)
        assert torch.equal(result.sums[h], one.sums)


def test_indices_of_any_strides():
    x, indices = normals((4, 6, 3), "x"), codes((6, 4), 5)
    result = codebook_statistics(x, indices.T, 5)
    check(result, x.flatten(0, 1), indices.T.flatten(), 5)
    every_other = torch.stack([indices.T, indices.T + 7], -1)[..., 0]
    assert torch.equal(codebook_statistics(x, every_other, 5).sums, result.sums)


def test_mask():
    x, indices, mask = normals((50, 6), "x"), codes((50,), 9), normals((50,), "mask") > 0
    x[~mask] = torch.nan
    indices[0], mask[0] = 4096, False
    kept = codebook_statistics(x[mask], indices[mask], 9)
    result = codebook_statistics(x, indices, 9, mask=mask)
    assert torch.equal(result.counts, kept.counts)
    torch.testing.assert_close(result.sums, kept.sums)


def test_not_finite():
    """A NaN stays with its codeword."""
    x, indices = normals((50, 6), "x"), torch.arange(50) % 5
    clean = codebook_statistics(x, indices, 5).sums
    x[12, 3] = torch.nan
    result = codebook_statistics(x, indices, 5).sums
    assert result[2, 3].isnan()
    result[2, 3] = clean[2, 3]
    assert torch.equal(result, clean)


def test_same_bits_for_any_threads():
    for n, n_codewords, dim in ((4000, 30, 40), (3000, 2000, 32), (5000, 3, 7)):
        x, indices = normals((n, dim), "x"), codes((n,), n_codewords)
        results = []
        for count in (1, 2, 3, 7):
            with threads(count):
                results.append(codebook_statistics(x, indices, n_codewords))
        for other in results[1:]:
            assert torch.equal(other.sums, results[0].sums)
            assert torch.equal(other.counts, results[0].counts)


def test_k_means_step():
    """Where it is used: the means of the vectors nearest to each codeword."""
    x, codebook = normals((600, 8), "x"), normals((20, 8), "c")
    indices = vq_nearest(x, codebook).indices
    counts, sums = codebook_statistics(x, indices, 20)
    for k in range(20):
        mine = x[indices == k]
        assert counts[k] == len(mine)
        if len(mine):
            torch.testing.assert_close(sums[k] / counts[k], mine.mean(0))


def test_no_gradient():
    x = normals((10, 3), "x").requires_grad_()
    assert not codebook_statistics(x, codes((10,), 4), 4).sums.requires_grad


X, I = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)  # noqa: E741
BAD = {
    "no tensor": (TypeError, "x is list, expected a tensor", ([1.0], I, 4), {}),
    "integers": (TypeError, r"x is torch.int64, expected one of", (X.long(), I, 4), {}),
    "float indices": (TypeError, "indices is torch.float32, expected one of", (X, I.float(), 4), {}),
    "mask": (TypeError, "mask is torch.int64, expected torch.bool", (X, I, 4), {"mask": I}),
    "mask list": (TypeError, "mask is list, expected a tensor", (X, I, 4), {"mask": [True]}),
    "no codewords": (ValueError, "n_codewords is 0, expected at least 1", (X, I, 0), {}),
    "float codewords": (TypeError, "n_codewords is float, expected an integer", (X, I, 4.0), {}),
    "dim": (ValueError, r"dim is 2 for x of shape \(4, 3\)", (X, I, 4), {"dim": 2}),
    "dim type": (TypeError, "dim is float, expected an integer", (X, I, 4), {"dim": 1.0}),
    "dim of heads": (ValueError, "dim is 0 .*after that of the heads", (X, I, 4), {"dim": 0, "heads": True}),
    "heads": (TypeError, "heads is int, expected a bool", (X, I, 4), {"heads": 1}),
    "shape": (ValueError, r"indices has shape \(3,\), expected \(4,\)", (X, I[:3], 4), {}),
    "mask shape": (ValueError, r"mask has shape \(3,\), expected \(4,\)", (X, I, 4), {"mask": I[:3] > 0}),
    "empty vectors": (ValueError, r"x has shape \(4, 0\), expected D of at least 1", (X[:, :0], I, 4), {}),
    "device": (ValueError, "indices is on meta, expected cpu, as x", (X, I.to("meta"), 4), {}),
    "index above": (ValueError, "indices contains 4, expected -1 to 3", (X, I + 4, 4), {}),
    "index below": (ValueError, "indices contains -2, expected -1 to 3", (X, I - 2, 4), {}),
    "index far above": (
        ValueError, f"indices contains {2**40}, expected -1 to 3", (X, torch.tensor([0, 1, 2**40, 1]), 4), {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, args, options = BAD[name]
    with pytest.raises(error, match=f"codebook_statistics: {message}"):
        codebook_statistics(*args, **options)


def test_bad_index_of_the_reference():
    with pytest.raises(ValueError, match=re.escape("indices contains 4, expected -1 to 3")):
        codebook_statistics(X.double(), I + 4, 4)
