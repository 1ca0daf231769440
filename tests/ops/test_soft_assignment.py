"""genperf.ops.soft_assignment against softmax over the whole matrix, and the losses of public libraries."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from genperf_testing.cases import SHAPES, Case, normals
from genperf_testing.contract import threads

import genperf
from genperf.ops import soft_assignment

METRICS = ("l2", "euclidean", "cosine", "dot")
BACKENDS = ("reference", "cpu")
BOTH = [
    "reference",
    "cpu",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="not interpreted here"),
    ),
]


def _case(name, metric, temperature, n_codewords=37, mean_prob=False, with_targets=True, triton=False):
    def function(x, codebook, targets=None):
        # In proportion to the distances, which grow with D.
        scale = temperature * {"l2": x.shape[-1], "cosine": 1}.get(metric, math.sqrt(x.shape[-1]))
        return soft_assignment(x, codebook, metric, scale, targets=targets, mean_prob=mean_prob)

    def constants(shape):
        codebook = normals((n_codewords, shape[-1]), "codebook")
        targets = normals(shape[:-1], "targets").mul(n_codewords / 2).long().clamp(-1, n_codewords - 1)
        return [codebook, targets] if with_targets else [codebook]

    # A NaN in one vector reaches every element of the mean probabilities.
    return Case(
        name, function, lambda shape: [normals(shape)], constants, elementwise=False,
        nan_as_reference=not mean_prob, backends=BACKENDS + ("triton",) * triton,
        shapes=(*(s for s in SHAPES if len(s) > 1), (0, 4), (0, 2, 3)),
    )  # fmt: skip


CASES = (
    _case("l2", "l2", 0.3, triton=True),
    _case("l2, mean", "l2", 0.5, n_codewords=70, mean_prob=True, with_targets=False),
    _case("cosine, mean", "cosine", 0.1, mean_prob=True, triton=True),
    _case("dot", "dot", 1.0, n_codewords=3),
    _case("euclidean, mean", "euclidean", 0.1, mean_prob=True),
)


def _scores(x, c, metric):
    """[..., K] in the dtype of x, from differences and lengths alone."""
    if metric == "dot":
        return x @ c.T
    if metric == "cosine":
        return F.cosine_similarity(x[..., None, :], c, dim=-1, eps=1e-300)
    distance = (x[..., None, :] - c).square().sum(-1)
    return -distance if metric == "l2" else -distance.clamp(min=1e-8).sqrt()


def expected(x, c, metric, temperature, targets):
    s = _scores(x, c, metric) / temperature
    p = s.softmax(-1)
    nll = F.cross_entropy(s.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="none")
    entropy = torch.distributions.Categorical(logits=s).entropy()
    return s.logsumexp(-1), entropy, p.flatten(0, -2).mean(0), nll.view(targets.shape)


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("metric", METRICS)
def test_definition(metric, temperature):
    """Values and gradients in float64."""
    tensors = [normals((6, 5, 4), "x").double(), normals((9, 4), "c").double()]
    targets = torch.arange(30).view(6, 5) % 10 - 1
    mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    out = soft_assignment(*mine, metric, temperature, targets=targets)
    truth = expected(*theirs, metric, temperature, targets)
    for a, b in zip(out, truth, strict=True):
        torch.testing.assert_close(a, b)
        weight = normals(tuple(a.shape), "weight").double()
        grads = [
            torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True)
            for y, leaves in ((a, mine), (b, theirs))
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_both_operands(metric):
    x, c = normals((5, 3), "x").double().requires_grad_(), normals((7, 3), "c").double().requires_grad_()
    targets = torch.tensor([0, 6, -1, 3, 3])
    function = lambda x, c: tuple(soft_assignment(x, c, metric, 0.7, targets=targets))  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, c))
    assert torch.autograd.gradgradcheck(function, (x, c))


def _run(x, c, metric, temperature, targets, cotangents, backend, dtype):
    leaves = [x.to(dtype).requires_grad_(), c.to(dtype).requires_grad_()]
    with genperf.backend(backend):
        out = soft_assignment(*leaves, metric, temperature, targets=targets)
    grads = torch.autograd.grad(out, leaves, [g.to(y) for g, y in zip(cotangents, out, strict=True)])
    return [y.detach() for y in (*out, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "n_codewords", "dim", "temperature", "offset"),
    [(1500, 512, 64, 1.0, 0), (700, 3000, 8, 0.1, 0), (300, 700, 32, 0.01, 0), (500, 300, 300, 2.0, 5.0)],
)
@pytest.mark.parametrize("metric", METRICS)
def test_accuracy(metric, n, n_codewords, dim, temperature, offset, dtype):
    """No more than twice the error of the formulas in torch, against float64."""
    x, c = normals((n, dim), "x") + offset, normals((n_codewords, dim), "c") + offset
    x, c = x.to(dtype).float(), c.to(dtype).float()
    targets = torch.arange(n) % (n_codewords + 1) - 1
    cotangents = [normals((n,), 1), normals((n,), 2), n * normals((n_codewords,), 3), normals((n,), 4)]
    arguments = (x, c, metric, temperature, targets, cotangents)
    truth = _run(*arguments, "reference", torch.float64)
    torchs = _run(*arguments, "reference", dtype)
    for i, (a, t, e) in enumerate(zip(_run(*arguments, "cpu", dtype), torchs, truth, strict=True)):
        assert a.dtype == t.dtype
        error, theirs = ((y.double() - e).norm() / e.norm() for y in (a, t))
        assert error <= 2 * theirs + 2e-7, (i, error, theirs)


def test_an_offset_is_taken_away():
    """At an offset of 100, where |x|^2 - 2 x.c + |c|^2 keeps three digits."""
    x, c = normals((400, 16), "x") + 100, normals((200, 16), "c") + 100
    targets = torch.arange(400) % 200
    cotangents = [torch.ones(400), torch.ones(400), normals((200,), 3), torch.ones(400)]
    arguments = (x, c, "l2", 1.0, targets, cotangents)
    truth = _run(*arguments, "reference", torch.float64)
    for a, e in zip(_run(*arguments, "cpu", torch.float32), truth, strict=True):
        assert (a - e).norm() <= 2e-5 * e.norm()


@pytest.mark.parametrize("n", [5, 3000])
def test_bits_do_not_depend_on_threads(n):
    x, c = normals((n, 24), "x"), normals((600, 24), "c")
    cotangents = [normals((n,), 1), normals((n,), 2), normals((600,), 3), normals((n,), 4)]
    arguments = (x, c, "l2", 1.0, torch.arange(n) % 600, cotangents)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(_run(*arguments, "cpu", torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_vector_does_not_depend_on_the_others():
    x, c = normals((500, 24), "x"), normals((90, 24), "c")
    rows = [3, 499, 77]
    every, some = (soft_assignment(y, c, mean_prob=False)[:2] for y in (x, x[rows]))
    for a, b in zip(every, some, strict=True):
        assert torch.equal(a[rows], b)


def _most_memory():
    """Of this process since the last call, in MB."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory():
    """Where the matrix of scores has 256 MB, forward and backward take less than 16, with the gradients."""
    x, c = normals((8192, 8), "x").requires_grad_(), normals((8192, 8), "c").requires_grad_()
    with threads(1):
        for _ in range(2):  # the first is not counted
            _most_memory()
            before = _most_memory()
            out = soft_assignment(x, c, targets=torch.arange(8192))
            torch.autograd.grad(sum(y.sum() for y in out), [x, c])
    assert _most_memory() - before < 16


def test_heads():
    x, c = normals((3, 4, 5, 6), "x"), normals((3, 11, 6), "c")
    targets = torch.arange(60).view(3, 4, 5) % 11
    x.requires_grad_(), c.requires_grad_()
    out = soft_assignment(x, c, "cosine", 0.3, targets=targets)
    assert [tuple(y.shape) for y in out] == [(3, 4, 5), (3, 4, 5), (3, 11), (3, 4, 5)]
    grads = torch.autograd.grad(sum(y.square().sum() for y in out), [x, c])
    for h in range(3):
        one = soft_assignment(x[h], c[h], "cosine", 0.3, targets=targets[h])
        for a, b in zip(out, one, strict=True):
            assert torch.equal(a[h], b)
        of_one = torch.autograd.grad(sum(y.square().sum() for y in one), [x, c])
        for a, b in zip(grads, of_one, strict=True):
            assert torch.equal(a[h], b[h])


def test_channel_first():
    x, c = normals((2, 6, 4, 5), "x").requires_grad_(), normals((11, 6), "c")
    out = soft_assignment(x, c, dim=1)
    assert out.entropy.shape == (2, 4, 5)
    other = soft_assignment(x.movedim(1, -1).contiguous(), c)
    for a, b in zip(out[:3], other[:3], strict=True):
        assert torch.equal(a, b)
    (grad,) = torch.autograd.grad(out.entropy.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("backend", BOTH)
def test_empty_batch(backend):
    x, c = torch.zeros(0, 3, requires_grad=True), normals((4, 3)).requires_grad_()
    with genperf.backend(backend):
        out = soft_assignment(x, c, targets=torch.zeros(0, dtype=torch.int64))
        assert out.mean_prob.tolist() == [0.0] * 4
        grads = torch.autograd.grad(sum(y.sum() for y in out), [x, c])
    assert grads[0].shape == (0, 3)
    assert not grads[1].any()


@pytest.mark.parametrize("backend", BOTH)
def test_zero_vectors_of_the_cosine(backend):
    x, c = normals((3, 4), "x"), normals((5, 4), "c")
    x[1], c[2] = 0, 0
    x.requires_grad_(), c.requires_grad_()
    with genperf.backend(backend):
        out = soft_assignment(x, c, "cosine")
        torch.testing.assert_close(out.log_sum_exp[1].item(), torch.tensor(5.0).log().item())
        grads = torch.autograd.grad(out.log_sum_exp.sum() + out.mean_prob[0], [x, c])
    assert not grads[0][1].any()
    assert not grads[1][2].any()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BOTH)
def test_no_gradient_where_vector_and_codeword_meet(backend):
    c = normals((5, 4), "c")
    x = c[:2].clone().requires_grad_()
    with genperf.backend(backend):
        out = soft_assignment(x, c, "euclidean")
        (grad,) = torch.autograd.grad(out.log_sum_exp.sum(), x)
    others = expected(x.detach().double(), c.double(), "euclidean", 1.0, torch.tensor([0, 1]))
    torch.testing.assert_close(out.log_sum_exp.double(), others[0], rtol=1e-5, atol=1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("metric", METRICS)
def test_probabilities_of_zero(metric, backend):
    """Far beyond the range of exp: nothing becomes NaN."""
    x = torch.tensor([[1e4, 0.0], [0.0, 3e4], [-1.0, 1.0]], requires_grad=True)
    c = torch.tensor([[1e4, 1.0], [0.0, -3e4], [0.5, 0.5], [2.0, 2.0]], requires_grad=True)
    with genperf.backend(backend):
        out = soft_assignment(x, c, metric, 1e-3, targets=torch.tensor([0, 1, 2]))
        grads = torch.autograd.grad(sum(y.sum() for y in out), [x, c])
    assert all(y.isfinite().all() for y in (*out, *grads))


def test_not_finite():
    x, c = normals((4, 3), "x"), normals((5, 3), "c")
    x[2, 0] = torch.nan
    out = soft_assignment(x, c)
    assert out.entropy.isnan().tolist() == [False, False, True, False]
    assert out.mean_prob.isnan().all()
    c[1, 1] = torch.nan
    assert soft_assignment(x, c).log_sum_exp.isnan().all()


def test_layouts_of_cotangents():
    """Expanded ones, as from a sum or a mean, are taken as they are."""
    x, c = normals((40, 6), "x").requires_grad_(), normals((9, 6), "c").requires_grad_()
    out = soft_assignment(x, c)
    (a,) = torch.autograd.grad(out.entropy.mean(), x, retain_graph=True)
    (b,) = torch.autograd.grad(out.entropy, x, torch.full((40,), 1 / 40))
    torch.testing.assert_close(a, b)


# What public quantizers compute, written out.


def test_recipe_lfq():
    """Entropy terms of vector-quantize-pytorch's LFQ, but for its floor of 1e-5 under a logarithm."""
    bits = (torch.arange(64)[:, None] >> torch.arange(5, -1, -1)) & 1
    codebook = bits * 2.0 - 1
    x, inverse_temperature = 0.02 * normals((50, 6), "x"), 100.0
    prob = (2 * inverse_temperature * x @ codebook.T).softmax(-1)
    entropy = lambda p: -(p * p.clamp(min=1e-5).log()).sum(-1)  # noqa: E731
    out = soft_assignment(x, codebook, "dot", 1 / (2 * inverse_temperature))
    torch.testing.assert_close(out.entropy.mean(), entropy(prob).mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(entropy(out.mean_prob), entropy(prob.mean(0)), rtol=1e-5, atol=1e-6)
    # Independent bits: the entropy of a row without any codebook.
    logits = 4 * inverse_temperature * x
    of_bits = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").sum(-1)
    torch.testing.assert_close(out.entropy, of_bits, rtol=1e-4, atol=1e-5)


def test_recipe_llamagen():
    x, c = (F.normalize(normals(shape, "x"), dim=-1) for shape in ((60, 8), (90, 8)))
    affinity = -torch.cdist(x, c).square() / 0.01
    p, log_p = affinity.softmax(-1), (affinity + 1e-5).log_softmax(-1)
    mean = p.mean(0)
    theirs = -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
    out = soft_assignment(x, c, "l2", 0.01)
    mine = out.entropy.mean() + (out.mean_prob * (out.mean_prob + 1e-5).log()).sum()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_recipe_sq_vae():
    """A precision for all, and one for each vector."""
    x, c = normals((60, 8), "x"), normals((30, 8), "c")
    square = torch.cdist(x.double(), c.double()).square()

    def kld(logits):
        return (logits.softmax(-1) * logits.log_softmax(-1)).sum() / 4

    precision = torch.tensor(0.7)
    scale = (precision / 2).sqrt()
    mine = -soft_assignment(scale * x, scale * c, mean_prob=False).entropy.sum() / 4
    torch.testing.assert_close(mine.double(), kld(-0.5 * precision * square), rtol=1e-5, atol=0)

    half = torch.linspace(0.1, 2, 60)[:, None] / 2
    rows, words = torch.cat((2 * half * x, -half), 1), torch.cat((c, c.square().sum(1, keepdim=True)), 1)
    mine = -soft_assignment(rows, words, "dot", mean_prob=False).entropy.sum() / 4
    torch.testing.assert_close(mine.double(), kld(-half.double() * square), rtol=1e-5, atol=0)


def test_recipe_cross_entropy_of_vector_quantize_pytorch():
    vqp = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    vq = vqp.VectorQuantize(dim=8, codebook_size=32).eval()
    x, indices = normals((2, 30, 8), "x").requires_grad_(), torch.arange(60).view(2, 30) % 33 - 1
    _, theirs = vq(x, indices=indices)
    out = soft_assignment(x, vq.codebook, "euclidean", targets=indices, mean_prob=False)
    mine = out.nll.sum() / (indices >= 0).sum()
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (mine, theirs)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is list"),
        ({"codebook": None}, TypeError, "codebook is NoneType"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"codebook": torch.zeros(5, 3).double()}, TypeError, "codebook is torch.float64, expected torch"),
        ({"codebook": torch.zeros(5, 3, device="meta")}, ValueError, "codebook is on meta"),
        ({"metric": "manhattan"}, ValueError, "metric is 'manhattan'"),
        ({"metric": ["l2"]}, ValueError, "metric is"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a finite number"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": "1"}, TypeError, "temperature is str"),
        ({"codebook": torch.zeros(0, 3)}, ValueError, r"codebook has shape \(0, 3\)"),
        ({"codebook": torch.zeros(5)}, ValueError, r"codebook has shape \(5,\)"),
        ({"codebook": torch.zeros(5, 2)}, ValueError, r"x has shape \(4, 3\), expected 2 in dimension -1"),
        ({"codebook": torch.zeros(2, 5, 3), "dim": 1}, ValueError, "expected 2 heads"),
        ({"dim": 5}, ValueError, "dim is 5"),
        ({"dim": 1.0}, TypeError, "dim is float"),
        ({"mean_prob": 1}, TypeError, "mean_prob is int"),
        ({"targets": [0]}, TypeError, "targets is list"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, TypeError, "targets is torch.int32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets has shape \(3,\)"),
        ({"targets": torch.full((4,), 5)}, ValueError, "targets has values from 5 to 5, expected 0 to 4"),
        ({"targets": torch.full((4,), -2)}, ValueError, "targets has values from -2"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {"x": torch.zeros(4, 3), "codebook": torch.zeros(5, 3), **change}
    with pytest.raises(error, match=message):
        soft_assignment(**arguments)
