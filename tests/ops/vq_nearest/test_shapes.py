"""vq_nearest across blocks, layouts, heads, threads and batches."""

from __future__ import annotations

import pytest
import torch
from genperf_testing.cases import normals
from genperf_testing.contract import threads
from genperf_testing.nearest import (
    CPU,
    DTYPES,
    METRICS,
    REFERENCE,
    TRITON,
    near_duplicates,
    sets,
    slow,
)

import genperf
from genperf.ops import vq_nearest


def _float64(x, codebook):
    """The index by distances in float64, and which rows it settles beyond doubt."""
    words = codebook.double()
    score = torch.addmm(words.square().sum(1) / 2, x.double(), words.T, alpha=-1)
    least, index = score.topk(2, largest=False, dim=1)
    return index[:, 0], least[:, 1] - least[:, 0] > 1e-11 * (1 + least[:, 0].abs())


@pytest.mark.parametrize("backend", CPU + slow(REFERENCE + TRITON), indirect=True)
@pytest.mark.parametrize(
    ("n", "n_words", "dim"),
    [(1, 5, 7), (12, 1000, 64), (13, 1000, 64), (17, 1000, 15), (40, 9000, 3), (2, 64, 300),
     (3, 1000, 64), (97, 1023, 64), (130, 513, 255), (200, 65, 1025), (50, 40, 4096),
     (300, 3000, 2), (100, 16, 32), (100, 15, 31), (100, 17, 33), (200, 9000, 255)],
)  # fmt: skip
def test_sizes(backend, n, n_words, dim):
    """Across the blocks of the kernels, against float64 where that is certain."""
    if backend.costly and n * n_words * dim > 2e5:
        n_words, dim = min(n_words, 300), min(dim, 40)
    x, codebook = normals((n, dim), "x").to(backend.device), normals((n_words, dim), "c").to(backend.device)
    expected, certain = _float64(x, codebook)
    assert certain.float().mean() > 0.99
    index = vq_nearest(x, codebook).indices
    assert torch.equal(index[certain], expected[certain])


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize("dim", [6, 13, 14, 29, 30])
def test_parts_of_the_codebook(backend, monkeypatch, processors, dim):
    """On a GPU of few processors one program looks at several blocks of codewords."""
    monkeypatch.setattr("genperf.kernels.vq_nearest._processors", lambda x: processors)
    x, codebook = (normals(shape, "p").to(backend.device) for shape in ((20, dim), (700, dim)))
    expected, certain = _float64(x, codebook)
    assert certain.all()
    assert torch.equal(vq_nearest(x, codebook).indices, expected)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize(("n", "n_words", "dim"), [(60, 600, 20), (10, 3000, 40), (100, 5000, 2)])
@pytest.mark.parametrize("factor", [1e3, 1e6, 1e12, 1e25])
def test_far_codewords(backend, n, n_words, dim, factor):
    x, codebook = normals((n, dim), "x"), normals((n_words, dim), "c")
    codebook[:: n_words // 7] *= factor
    expected, certain = _float64(x, codebook)
    index = vq_nearest(x, codebook).indices
    assert torch.equal(index[certain], expected[certain])


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("k", [3, 40])
def test_the_nearest_of_many(backend, k):
    x, codebook = normals((40, 24), "x"), normals((1500, 24), "c")
    expected = torch.cdist(x.double(), codebook.double()).topk(k, largest=False).indices
    assert torch.equal(vq_nearest(x, codebook, k=k).indices, expected)
    assert torch.equal(vq_nearest(x[:9], codebook, k=k).indices, expected[:9])


LAYOUTS = {
    "images": lambda x: (x.view(2, 12, 5, 7).transpose(1, 2).contiguous().transpose(1, 2), 1),
    "channel first": lambda x: (x.view(2, 12, 35).transpose(1, 2).contiguous().transpose(1, 2), -1),
    "every third": lambda x: (x.repeat_interleave(3, 1)[:, ::3], -1),
    "transposed": lambda x: (x.T.contiguous().T, -1),
    "expanded": lambda x: (x[:1].expand(24, 35), -1),
    "five dimensions": lambda x: (x.view(2, 3, 2, 2, 35).permute(2, 4, 0, 3, 1), 1),
}


@pytest.mark.parametrize("backend", CPU + slow(TRITON), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, dtype):
    x, dim = LAYOUTS[layout](normals((24, 35), "x").to(backend.device, dtype))
    codebook = normals((50, x.shape[dim]), "c").to(backend.device, dtype)
    rows = x.movedim(dim, -1).contiguous()
    for c in (codebook, codebook.T.contiguous().T, codebook.repeat_interleave(2, 0)[::2]):
        index = vq_nearest(x, c, dim=dim).indices
        assert index.shape == rows.shape[:-1]
        with genperf.backend("reference"):
            assert torch.equal(index, vq_nearest(rows, codebook).indices)


@pytest.mark.parametrize("backend", CPU + REFERENCE + TRITON, indirect=True)
@pytest.mark.parametrize("metric", METRICS)
def test_heads(backend, metric):
    """Each head with its own codebook, taken from one tensor without a copy."""
    x = normals((2, 9, 3, 8), "x").to(backend.device).permute(2, 0, 1, 3)  # [heads, B, N, D]
    codebook = normals((3, 21, 8), "c").to(backend.device)
    found = vq_nearest(x, codebook, metric, return_distance=True)
    assert found.indices.shape == (3, 2, 9)
    for h in range(3):
        one = vq_nearest(x[h], codebook[h], metric, return_distance=True)
        assert torch.equal(found.indices[h], one.indices)
        assert torch.equal(found.distances[h], one.distances)


@pytest.mark.parametrize("n", [1, 7, 18, 1000])
def test_threads_and_batch_change_nothing(n):
    x, codebook = normals((n, 24), "x"), near_duplicates(normals((400, 24), "c"))
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
    x, codebook = sets(33, 20, 8)["subnormal"]
    expected = vq_nearest(x, codebook).indices
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        with genperf.backend("cpu"):
            assert torch.equal(vq_nearest(x, codebook).indices, expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("backend", CPU + REFERENCE + TRITON, indirect=True)
def test_empty(backend):
    codebook = torch.ones(3, 4, device=backend.device)
    assert vq_nearest(codebook[:0], codebook).indices.shape == (0,)
    found = vq_nearest(codebook.new_empty(2, 0, 4), codebook, return_distance=True)
    assert found.indices.shape == found.distances.shape == (2, 0)
    assert vq_nearest(codebook[0], codebook).indices.shape == ()
    assert vq_nearest(codebook.new_empty(0, 5, 4), codebook.new_empty(0, 3, 4)).indices.shape == (0, 5)
