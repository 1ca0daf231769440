"""The Triton kernels of gumbel_quantize: the noise's bits, parts and chunks, layouts, extremes."""

from __future__ import annotations

import math
import os

import pytest
import torch
from genperf_testing.cases import normals

import genperf
from genperf.ops import gumbel_quantize
from genperf.ops._gumbel_quantize_reference import reference_gumbels

kernels = pytest.importorskip("genperf.kernels.gumbel_quantize")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
hard_or_mixed = pytest.mark.parametrize("hard", [True, False], ids=["hard", "mixed"])


@pytest.fixture(autouse=True)
def _runs():
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton is not interpreted")


def run(backend, logits, codebook, temperature, hard, dtype=torch.float32, key=(3, 4)):
    """quantized, divergence, gradients by both, indices."""
    leaves = [y.to(DEVICE, dtype).requires_grad_() for y in (logits, codebook)]
    with genperf.backend(backend):
        out = gumbel_quantize(*leaves, temperature, hard, key=torch.tensor(key, device=DEVICE))
        results = [out.quantized, out.kl]
        grads = torch.autograd.grad(results, leaves, [normals(tuple(y.shape), "g").to(y) for y in results])
    return [y.detach().cpu() for y in (*results, *grads, out.indices)]


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 37, 36), (3, 2, 33)], ids=str)
def test_noise(shape):
    """The same bits as the reference, of whole groups of four positions and of single ones."""
    logits, codebook = torch.zeros(shape, device=DEVICE), torch.eye(shape[1], device=DEVICE)
    for key in (torch.tensor([5, 8]), torch.arange(2 * shape[0]).view(-1, 2)):
        noise = reference_gumbels(shape, key)
        with genperf.backend("triton"):
            drawn = gumbel_quantize(logits, codebook, key=key.to(DEVICE))
            assert torch.equal(drawn.indices.cpu(), noise.argmax(1))
            mixes = [gumbel_quantize(logits, codebook, 1.0, False, **{k: v.to(DEVICE)}).quantized
                     for k, v in (("key", key), ("noise", noise))]  # fmt: skip
        assert torch.equal(*mixes)


@hard_or_mixed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(dtype, hard, monkeypatch):
    """No more than twice the error of the formulas in torch; codebooks in parts."""
    monkeypatch.setattr(kernels, "PART", 64)
    logits, codebook = normals((2, 70, 36), "l").to(dtype).float(), normals((70, 19), "c").to(dtype).float()
    arguments = (logits, codebook, 0.6, hard)
    truth = run("reference", *arguments, torch.float64)
    results = zip(run("reference", *arguments, dtype), run("triton", *arguments, dtype), truth, strict=True)
    for i, (t, a, e) in enumerate(results):
        error, theirs = ((y.double() - e).norm() / e.double().norm() for y in (a, t))
        assert error <= 2 * theirs + 2e-7, (i, error, theirs)


@hard_or_mixed
def test_chunks_of_positions(hard, monkeypatch):
    """Whatever their number; the mix's gradient of the codebook adds them up."""
    logits, codebook = normals((2, 9, 40), "l"), normals((9, 3), "c")
    expected = run("reference", logits, codebook, 1.0, hard)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    for a, e in zip(run("triton", logits, codebook, 1.0, hard), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_layouts():
    """Channels last, every other codeword of logits and codebook, expanded gradients."""
    wide, words = normals((2, 24, 5, 6), "l").to(DEVICE), normals((3, 24), "c").to(DEVICE).T
    for logits in (wide.to(memory_format=torch.channels_last), wide[:, ::2]):
        codebook = words[: logits.shape[1]]
        results = []
        for tensors in ((logits, codebook), (logits.contiguous(), codebook.contiguous())):
            leaves = [y.detach().requires_grad_() for y in tensors]
            with genperf.backend("triton"):
                out = gumbel_quantize(*leaves, key=torch.tensor([1, 2], device=DEVICE))
                grads = torch.autograd.grad(out.quantized.sum() + out.kl.mean(), leaves)
            results.append([out.quantized, out.indices, out.kl, *grads])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@hard_or_mixed
def test_extremes(hard):
    """Logits of -inf, NaN, and near the largest number; infinite noise; ties."""
    logits = normals((1, 6, 8), "l").to(DEVICE)
    logits[:, [0, 3]] = -torch.inf
    logits[0, 1, 2], logits[0, 2, 3] = torch.nan, 3e38
    noise = torch.zeros_like(logits)
    noise[0, 4, 5] = torch.inf
    noise[0, :, 6] = -logits[0, :, 6].nan_to_num(neginf=0.0)
    leaves = [logits.requires_grad_(), normals((6, 2), "c").to(DEVICE).requires_grad_()]
    with genperf.backend("triton"):
        out = gumbel_quantize(*leaves, 1e-3, hard, noise=noise)
        grads = torch.autograd.grad(out.quantized.sum() + out.kl.sum(), leaves[:1])[0].cpu()
    index = out.indices[0].cpu()
    assert index[2:4].tolist() == [0, 2]
    assert index[5:7].tolist() == [4, 1]
    bad = torch.arange(8) == 2
    assert torch.equal(out.kl[0].isnan().cpu(), bad)
    assert torch.equal(out.quantized[0].isnan().cpu(), bad.expand(2, 8))
    assert grads[0, :, ~bad].isfinite().all()
    assert not grads[0, [0, 3]][:, ~bad].any()
    assert (out.kl[0].cpu()[~bad] <= math.log(6) + 1e-5).all()


def test_without_divergence():
    leaves = [normals((2, 4, 5), "l").to(DEVICE).requires_grad_(), torch.eye(4, device=DEVICE)]
    with genperf.backend("triton"):
        out = gumbel_quantize(*leaves, kl=False, key=torch.tensor([1, 2], device=DEVICE))
        (grad,) = torch.autograd.grad(out.quantized.sum(), leaves[:1])
    assert out.kl is None
    assert grad.isfinite().all()


def test_what_it_refuses():
    tensors = torch.zeros(2, 3, 4, device=DEVICE).double(), torch.eye(3, device=DEVICE).double()
    with genperf.backend("triton"), pytest.raises(RuntimeError, match="float64 is left to the reference"):
        gumbel_quantize(*tensors)
