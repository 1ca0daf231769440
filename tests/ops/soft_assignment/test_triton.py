"""The Triton kernels of soft_assignment: parts, chunks, padding, strides, numbers out of range."""

from __future__ import annotations

import os

import pytest
import torch
from genperf_testing.cases import normals

import genperf
from genperf.ops import soft_assignment

kernels = pytest.importorskip("genperf.kernels.soft_assignment")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ("l2", "euclidean", "cosine", "dot")


@pytest.fixture(autouse=True)
def _runs():
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton is not interpreted")


def run(backend, x, c, metric, temperature, targets, cotangents, dtype, dim=-1):
    leaves = [y.to(DEVICE, dtype).requires_grad_() for y in (x, c)]
    with genperf.backend(backend):
        out = soft_assignment(*leaves, metric, temperature, targets=targets.to(DEVICE), dim=dim)
        cotangents = [g.to(y) for g, y in zip(cotangents, out, strict=True)]
        grads = torch.autograd.grad(out, leaves, cotangents)
    return [y.detach().cpu() for y in (*out, *grads)]


def drawn(n, k, d, offset=0.0, dtype=torch.float32):
    x, c = ((normals((m, d), m) + offset).to(dtype).float() for m in (n, k))
    cotangents = [normals((n,), 1), normals((n,), 2), n * normals((k,), 3), normals((n,), 4)]
    return x, c, torch.arange(n) % (k + 1) - 1, cotangents


def errors(x, c, metric, temperature, targets, cotangents, dtype):
    truth = run("reference", x, c, metric, temperature, targets, cotangents, torch.float64)
    results = [run(b, x, c, metric, temperature, targets, cotangents, dtype) for b in ("reference", "triton")]
    return [[((y.double() - e).norm() / e.norm()).item() for y, e in zip(r, truth, strict=True)]
            for r in results]  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
def test_accuracy(metric, monkeypatch):
    """No more than twice the error of the formulas in torch; of parts and chunks, odd sizes."""
    monkeypatch.setattr(kernels, "PART", 64)
    settings = [((260, 70, 9), 0.5, 0.0, torch.float32), ((9, 40, 65), 2.0, 3.0, torch.bfloat16)]
    for sizes, temperature, offset, dtype in settings:
        x, c, targets, cotangents = drawn(*sizes, offset, dtype)
        for i, (theirs, mine) in enumerate(
            zip(*errors(x, c, metric, temperature, targets, cotangents, dtype), strict=True)
        ):
            assert mine <= 2 * theirs + 2e-7, (i, mine, theirs)


def test_an_offset_is_taken_away():
    x, c, targets, cotangents = drawn(70, 40, 16, 100.0)
    truth = run("reference", x, c, "l2", 1.0, targets, cotangents, torch.float64)
    for a, e in zip(run("triton", x, c, "l2", 1.0, targets, cotangents, torch.float32), truth, strict=True):
        assert (a - e).norm() <= 2e-5 * e.norm()


def test_a_vector_does_not_depend_on_the_others():
    x, c = normals((70, 9), "x").to(DEVICE), normals((70, 9), "c").to(DEVICE)
    rows = [3, 69, 65]
    with genperf.backend("triton"):
        every, some = (soft_assignment(y, c, mean_prob=False)[:2] for y in (x, x[rows]))
    for a, b in zip(every, some, strict=True):
        assert torch.equal(a[rows], b)


def test_heads_of_channel_first_images():
    x, c = normals((2, 3, 5, 4, 3), "x"), normals((2, 11, 5), "c")
    targets = torch.arange(72).view(2, 3, 4, 3) % 12 - 1
    cotangents = [normals((2, 3, 4, 3), 1), normals((2, 3, 4, 3), 2), normals((2, 11), 3),
                  normals((2, 3, 4, 3), 4)]  # fmt: skip
    results = (
        run(backend, x, c, "cosine", 0.3, targets, cotangents, torch.float32, dim=2)
        for backend in ("reference", "triton")
    )
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_numbers_out_of_range():
    """A target that is no codeword, where nothing is read on the host; NaN and infinity; an empty batch."""
    x, c = normals((5, 3), "x").to(DEVICE), normals((4, 3), "c").to(DEVICE)
    x[2, 0], x[3, 1] = torch.nan, torch.inf
    targets = torch.tensor([9, -1, 1, 1, -2], device=DEVICE)
    with genperf.backend("triton"):
        out = kernels.soft_assignment(x[None], c[None], targets[None], 0, 1.0, True)
        lse, entropy, mean, nll = (y[0].cpu() for y in out)
        assert lse.isnan().tolist() == entropy.isnan().tolist() == [False, False, True, True, False]
        assert nll.isnan().tolist() == [True, False, True, True, True]
        assert nll[1] == 0
        assert mean.isnan().all()
        empty = soft_assignment(x[:0].requires_grad_(), c.requires_grad_())
        assert not empty.mean_prob.any()
        (grad,) = torch.autograd.grad(empty.mean_prob.sum(), c)
    assert not grad.any()


def test_what_it_refuses():
    x, c = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    with genperf.backend("triton"), pytest.raises(RuntimeError, match="float64 is left to the reference"):
        soft_assignment(x.to(DEVICE), c.to(DEVICE))
