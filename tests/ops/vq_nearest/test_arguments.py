"""What vq_nearest refuses, and what it returns besides."""

from __future__ import annotations

import pytest
import torch
from genperf_testing.cases import normals
from torch._subclasses.fake_tensor import FakeTensorMode

from genperf.ops import vq_nearest

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


def test_more_pairs_than_an_int64_counts():
    """N K is formed nowhere where shapes are computed; the kernels address x and the codebook alone."""
    with FakeTensorMode():
        x, codebook = torch.empty(1, 3).expand(2**40, 3), torch.empty(1, 3).expand(2**30, 3)
        assert vq_nearest(x, codebook).indices.shape == (2**40,)


def test_results_carry_no_gradient():
    x, codebook = (normals((3, 4), i).requires_grad_() for i in range(2))
    index, distance = vq_nearest(x, codebook, return_distance=True)
    assert not index.requires_grad
    assert not distance.requires_grad
    assert vq_nearest(x, codebook).distances is None
