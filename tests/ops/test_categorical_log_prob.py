"""genperf.ops.categorical_log_prob against log_softmax, and its gradient."""

from __future__ import annotations

import pytest
import torch
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import Case, normals

from genperf.ops import categorical_log_prob

OPS = ("reference", "cpu", "triton")


@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


def _case(name, **options):
    dim = options.get("dim", -1)

    def function(logits):
        if options.get("top_k"):
            index = logits.detach().argmax(dim)  # which is always kept
        else:
            n = logits.shape[dim]
            rows = logits.select(dim, 0).numel()
            index = (
                torch.arange(rows, device=logits.device).mul(7).remainder(n).view(logits.select(dim, 0).shape)
            )
        # Large enough for gradients that float16 can hold.
        return (32 * categorical_log_prob(logits, index, **options),)

    return Case(
        name, function, inputs=lambda shape: [2 * normals(shape, "logits")],
        shapes=((5, 24), (3, 7), (1, 1), (2, 3, 5, 4), (2, 1100), (0, 4), (0, 2, 3)), backends=OPS,
        elementwise=False,
    )  # fmt: skip


CASES = (_case("plain", temperature=0.8), _case("in dimension 1, limited", dim=1, top_k=9, top_p=0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, -1])
def test_as_log_softmax(dtype, dim, backend):
    if backend.costly and (dim == 1) == (dtype == torch.float32):
        pytest.skip("interpreted, it takes long")
    logits = (3 * normals((2, 40, 3, 20), "softmax")).to(dtype).requires_grad_()
    index = torch.arange(2 * 3 * 40).view(2, -1, 3, 1).expand(2, -1, 3, 20).movedim(dim, 1).select(1, 5) % 20
    out = categorical_log_prob(logits, index, dim=dim, temperature=0.6)
    assert out.dtype == torch.float32
    exact = logits.detach().double().requires_grad_()
    picked = (exact / 0.6).log_softmax(dim).gather(dim, index.unsqueeze(dim)).squeeze(dim)
    torch.testing.assert_close(out.double(), picked, rtol=1e-6, atol=1e-6)
    weight = normals(tuple(out.shape), "weight")
    of_logits = torch.autograd.grad(out, logits, weight)[0]
    expected = torch.autograd.grad(picked, exact, weight.double())[0]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(of_logits.double(), expected, rtol=2 * eps, atol=1e-6 if eps < 1e-5 else eps)


def test_probabilities_sum_to_one(backend):
    logits = 3 * normals((1, 30), "sum").expand(30, 30)
    several = ({}, {"top_k": 20, "top_p": 0.7}, {"top_k": 7, "temperature": 2.0}, {"top_p": 0.5})
    for options in several[:2] if backend.costly else several:
        log_prob = categorical_log_prob(logits, torch.arange(30), **options)
        assert log_prob.exp().sum() == pytest.approx(1.0, abs=1e-6)
        if "top_k" in options:
            assert 1 <= log_prob.isfinite().sum() <= options["top_k"]


def test_classes_that_are_left_out_and_rows_of_nothing(backend):
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]]).repeat(5, 1)
    logits[2], logits[3, 1], logits[4, 1] = -torch.inf, torch.nan, torch.inf
    logits.requires_grad_()
    log_prob = categorical_log_prob(logits, torch.tensor([1, 2, 0, 0, 0]), top_k=2)
    assert log_prob[0] == -torch.inf
    assert log_prob[1].isfinite()
    assert log_prob[2:].isnan().all()
    (of_logits,) = torch.autograd.grad(log_prob[1], logits)
    p = torch.tensor([3.0, 2.0]).softmax(0)
    expected = torch.stack([-p[0], torch.tensor(0.0), 1 - p[1], torch.tensor(0.0)])
    torch.testing.assert_close(of_logits[1], expected)
    assert categorical_log_prob(logits[:2], torch.tensor([-1, 4])).isnan().all()


def test_finite_at_the_extremes_of_half_precision(backend):
    for dtype in (torch.float16, torch.bfloat16):
        most = torch.finfo(dtype).max
        logits = torch.tensor([[most, -most, 0.0], [-most, -most, -most]], dtype=dtype).requires_grad_()
        log_prob = categorical_log_prob(logits, torch.tensor([0, 1]))
        torch.testing.assert_close(log_prob, torch.tensor([1.0, 1 / 3]).log())
        log_prob.sum().backward()
        assert logits.grad.isfinite().all()


def test_rows_longer_than_a_program_holds(backend):
    logits, index = normals((2, 17000), "long").requires_grad_(), torch.tensor([3, 16990])
    log_prob = categorical_log_prob(logits, index, temperature=0.5)
    exact = (logits.detach().double() / 0.5).log_softmax(1)
    picked = exact.gather(1, index[:, None])[:, 0]
    torch.testing.assert_close(log_prob.double(), picked, rtol=1e-6, atol=1e-6)
    (of_logits,) = torch.autograd.grad(log_prob.sum(), logits)
    expected = -exact.exp() / 0.5
    expected[torch.arange(2), index] += 2.0
    torch.testing.assert_close(of_logits.double(), expected, rtol=1e-5, atol=1e-8)


def test_bad_arguments():
    run = categorical_log_prob
    logits, index = torch.zeros(2, 4), torch.zeros(2).long()
    for error, match, call in (
        (TypeError, "index is torch.float32", lambda: run(logits, torch.zeros(2))),
        (TypeError, "index is int", lambda: run(logits, 1)),
        (ValueError, r"index has shape \(2,\) on cpu, expected \(4,\)", lambda: run(logits, index, dim=0)),
        (ValueError, "top_p is 1.5", lambda: run(logits, index, top_p=1.5)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
