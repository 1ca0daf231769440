"""genperf.ops.bernoulli_nll against torch's binary cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import EMPTY, SHAPES, Case, normals

import genperf
from genperf.bench.measure import peak_bytes
from genperf.ops import bernoulli_nll

OPS = ("reference", "cpu", "triton")


@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


def _case(name, of_x=False, **options):
    def function(logits, x):
        return (bernoulli_nll(logits, x.sigmoid() if of_x else x, **options),)

    tensors = [lambda s: normals(s, "l") * 3, lambda s: normals(s, "x") * 2]
    return Case(
        name, function, lambda s: [t(s) for t in tensors[: 1 + of_x]],
        lambda s: [] if of_x else [(normals(s, "x") * 2).sigmoid()],
        backends=OPS, elementwise=options.get("reduction") != "sum", saves_outputs=False,
        per_sample=options.get("reduction") != "sum", shapes=SHAPES + EMPTY,
    )  # fmt: skip


CASES = (_case("each"), _case("by sample", reduction="sample"))


@pytest.mark.parametrize("reduction", ["none", "sample", "sum"])
def test_definition(reduction, backend):
    """Gradients by both, too."""
    logits = (normals((3, 2, 7, 5), "l") * 6).requires_grad_()
    x = (normals((3, 2, 7, 5), "x") * 3).sigmoid().round(decimals=1).requires_grad_()
    out = bernoulli_nll(logits, x, reduction=reduction)
    exact = [t.detach().double().requires_grad_() for t in (logits, x)]
    each = F.binary_cross_entropy_with_logits(*exact, reduction="none")
    expected = {"none": each, "sample": each.sum((1, 2, 3)), "sum": each.sum()}[reduction]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=3e-7 if reduction != "none" else 2e-6, atol=1e-12)
    cotangent = normals(tuple(out.shape), "g")
    grads = torch.autograd.grad(out, (logits, x), cotangent)
    for g, e in zip(grads, torch.autograd.grad(expected, exact, cotangent.double()), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=2e-6, atol=2e-7)


def test_the_gradient_in_forward_and_in_backward():
    """The same bits, from a first and a second pass over one graph."""
    logits, x = normals((5, 300), "l").requires_grad_(), (normals((5, 300), "x") > 0).float()
    for reduction, cotangent in (("none", normals((5, 300), "g")), ("sample", normals((5,), "g"))):
        out = bernoulli_nll(logits, x, reduction=reduction)
        first, second = (torch.autograd.grad(out, logits, cotangent, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        with torch.no_grad():
            assert torch.equal(bernoulli_nll(logits, x, reduction=reduction), out)


def test_small_values_keep_their_digits(backend):
    """Where 1 - p or p is lost in rounding."""
    logits = torch.tensor([40.0, -40.0, 18.0, 1e-4, 88.0])
    x = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0])
    wrong = logits.double() * (1 - 2 * x)
    exact = torch.where(x == 0.5, (2 * torch.cosh(logits.double() / 2)).log(), wrong.exp().log1p())
    out = bernoulli_nll(logits.to(backend.device), x.to(backend.device)).cpu()
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extremes(dtype, backend):
    most = torch.finfo(dtype).max
    logits = torch.tensor([[most, -most, most, -most, 0.0, torch.inf, -torch.inf]], dtype=dtype)
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.5, 1.0, 0.0]])
    leaf = logits.to(backend.device).requires_grad_()
    out = bernoulli_nll(leaf, x.to(backend.device))
    expected = torch.tensor([[0.0, 0.0, most, most, 0.6931472, 0.0, 0.0]])
    torch.testing.assert_close(out.detach().cpu(), expected)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(grad.float().cpu(), torch.tensor([[0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(dtype):
    """Nothing of the size of the values but the gradient, which is returned."""
    n = 1 << 14
    params = normals((2, n), "p").to(dtype).requires_grad_()
    x = normals((2, n), "x").sigmoid()

    def run(_):
        return torch.autograd.grad(bernoulli_nll(params, x, reduction="sum"), params)

    with genperf.backend("cpu"):
        assert peak_bytes(lambda: None, run, torch.device("cpu")) < 1024


def test_bad_arguments():
    logits = torch.zeros(2, 3)
    for error, match, call in (
        (TypeError, "logits is NoneType", lambda: bernoulli_nll(None, logits)),
        (TypeError, "x is torch.int64", lambda: bernoulli_nll(logits, logits.long())),
        (ValueError, r"logits has shape \(\)", lambda: bernoulli_nll(logits[0, 0], logits[0, 0])),
        (ValueError, r"x has shape \(3,\), expected \(2, 3\), as logits",
         lambda: bernoulli_nll(logits, logits[0])),
        (ValueError, "reduction is 'mean', expected one of none, sample, sum",
         lambda: bernoulli_nll(logits, logits, reduction="mean")),
        (ValueError, "x has values -1.0 to -1.0, expected 0 to 1",
         lambda: bernoulli_nll(logits, logits - 1, check=True)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
