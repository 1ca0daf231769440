"""The Triton kernels of gumbel_softmax: draws and noise as the reference has them, layouts, extremes."""

from __future__ import annotations

import os

import pytest
import torch
from genperf_testing.cases import normals

import genperf
from genperf.ops import gumbel_softmax
from genperf.ops._gumbel_quantize_reference import reference_gumbels

pytest.importorskip("genperf.kernels.gumbel_softmax")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = torch.tensor([5, 8])
# Noise in groups of classes, of positions, and element by element; several blocks of classes.
LAYOUTS = [((5, 24), 1), ((3, 1100), 1), ((3, 7), 1), ((2, 37, 36), 1), ((2, 70, 3), 1), ((9, 2), 0)]
any_layout = pytest.mark.parametrize(("shape", "dim"), LAYOUTS, ids=str)


@pytest.fixture(autouse=True)
def _runs():
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton is not interpreted")


def run(backend, logits, tau, hard, dim, dtype=torch.float32, **given):
    x = logits.to(DEVICE, dtype).requires_grad_()
    given = {name: y.to(DEVICE, dtype if y.is_floating_point() else None) for name, y in given.items()}
    with genperf.backend(backend):
        y = gumbel_softmax(x, tau, hard, dim, **given)
        (grad,) = torch.autograd.grad(y, x, normals(tuple(y.shape), "g").to(y))
    return y.detach().cpu(), grad.cpu()


@any_layout
def test_draws_are_those_of_the_noise(shape, dim):
    logits = normals(shape, "l")
    for key in [KEY] if dim == 0 else [KEY, torch.arange(2 * shape[0]).view(-1, 2)]:
        expected = (logits.double() + reference_gumbels(shape, key).double()).argmax(dim)
        y, _ = run("triton", logits, 0.7, True, dim, key=key)
        assert torch.equal(y.argmax(dim), expected)
        assert torch.equal(y.sum(dim), torch.ones_like(y.sum(dim)))


@any_layout
def test_noise(shape, dim):
    """A key gives the bits that its noise gives."""
    noise = reference_gumbels(shape, KEY)
    for a, b in zip(*(run("triton", normals(shape), 0.5, False, dim, **given)
                      for given in ({"key": KEY}, {"noise": noise})), strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_accuracy(hard):
    """No more than twice the error of the formulas in torch."""
    for (shape, dim), dtype in zip(LAYOUTS[1:4], (torch.float32, torch.bfloat16, torch.float32), strict=True):
        logits = normals(shape, "l").to(dtype).float()
        truth, torchs, ours = (
            run(backend, logits, 0.6, hard, dim, d, key=KEY)
            for backend, d in (("reference", torch.float64), ("reference", dtype), ("triton", dtype))
        )
        for t, a, e in zip(torchs, ours, truth, strict=True):
            error, theirs = ((y.double() - e).norm() / e.norm() for y in (a, t))
            assert error <= 2 * theirs + 2e-7


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_extremes(hard):
    """As the reference: infinite logits and noise, NaN, low temperatures, shifts."""
    logits, noise = normals((7, 40), "l"), reference_gumbels((7, 40), KEY)
    logits[0, [3, 9]] = torch.inf
    logits[1] = -torch.inf
    logits[2, :-2] = -torch.inf
    logits[3] = 1e30
    logits[4, 7] = torch.nan
    noise[5, 11] = torch.inf
    logits[6] += 2**20
    for tau in (1e-4, 1.0):
        for given in ({"noise": noise}, {"key": KEY}):
            for a, e in zip(run("triton", logits, tau, hard, 1, **given),
                            run("reference", logits, tau, hard, 1, **given), strict=True):  # fmt: skip
                torch.testing.assert_close(a, e, rtol=2e-5, atol=1e-6, equal_nan=True)
                assert torch.equal(a.isnan().all(1), torch.arange(7) == 4)
