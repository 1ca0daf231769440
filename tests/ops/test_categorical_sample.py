"""genperf.ops.categorical_sample against its definition, the distribution and the pixel sampler's head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import Case, normals
from genperf_testing.contract import threads
from scipy import stats

import genperf
from genperf.ops import categorical_log_prob, categorical_sample, philox_random
from genperf.sampling import heads

OPS = ("reference", "cpu", "triton")


@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


def _case(name, keys, **options):
    def function(logits, key):
        index, log_prob = categorical_sample(logits, key=key, return_log_prob=True, **options)
        return index, 32 * log_prob  # with gradients that float16 can hold

    def constants(shape):
        samples = len(torch.empty(shape).select(options.get("dim", -1), 0))
        return [torch.arange(2 * samples).view(-1, 2) + 3 if keys else torch.tensor([11, 5])]

    return Case(
        name, function, inputs=lambda shape: [2 * normals(shape, "logits")], constants=constants,
        shapes=((5, 24), (3, 7), (1, 1), (2, 3, 5, 4), (2, 1100), (0, 4), (0, 2, 3)), backends=OPS,
        elementwise=False, per_sample=keys, smooth=False,
    )  # fmt: skip


CASES = (
    _case("keys", keys=True, temperature=0.8),
    _case("in dimension 1, limited", keys=False, dim=1, top_k=9, top_p=0.9),
)


def kept_by_definition(logits, temperature, top_k, top_p):
    """By sorting, in float64."""
    p = (logits.double() / temperature).softmax(-1).numpy()
    kept = np.zeros(p.shape, bool)
    for row, of_row, values in zip(kept, p, logits.double().numpy(), strict=True):
        order = np.lexsort((np.arange(len(values)), -values))[: top_k or None]
        share = np.cumsum(of_row[order]) / of_row[order].sum()
        row[order[: 1 + int((share < top_p - 1e-9).sum())]] = True
    return torch.from_numpy(kept)


@pytest.mark.parametrize("n", [5, 16, 40, 300])
def test_every_class_is_drawn_in_its_part_of_the_unit_interval(n, backend):
    """A fine grid of uniforms meets each class in proportion, in the order of the classes."""
    if backend.costly and n != 40:
        pytest.skip("interpreted, it takes long")
    logits = 1.5 * normals((1, n), "grid")
    several = ((1.0, 0, 1.0), (1.0, 30, 0.8), (0.7, 3, 1.0), (1.3, 0, 0.6))
    for temperature, top_k, top_p in several[:2] if backend.costly else several:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        points = 32 if backend.costly else 4000
        u = (torch.arange(points) + 0.5) / points
        index, log_prob = categorical_sample(
            logits.expand(points, n), noise=u, return_log_prob=True, **options
        )
        kept = kept_by_definition(logits, temperature, top_k, top_p)
        p = (logits.double() / temperature).softmax(1) * kept
        p /= p.sum()
        assert (index.diff() >= 0).all()
        assert kept[0, index].all()
        counts = torch.bincount(index, minlength=n)
        assert (counts - points * p[0]).abs().max() <= 1.0 + 1e-3
        torch.testing.assert_close(log_prob.double(), p[0, index].log(), rtol=0, atol=2e-6)


def test_ties_go_to_the_lowest_index(backend):
    u = torch.linspace(0, 1, 60)
    tied = torch.tensor([0.0, 2.0, -0.0, 2.0, 2.0, 0.0]).expand(60, 6)
    for options, kept in (
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 4}, {0, 1, 3, 4}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_k": 3, "top_p": 0.3}, {1}),
        ({"top_k": 5, "top_p": 0.999}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-9}, {1}),
    )[:: 3 if backend.costly else 1]:
        assert set(categorical_sample(tied, noise=u, **options).tolist()) == kept, options


@pytest.mark.parametrize("n", [3, 16, 17, 256, 300, 4100])
def test_every_backend_draws_the_same_bits(n, backend):
    if backend.costly and n not in (17, 300):
        pytest.skip("interpreted, it takes long")
    logits, key = 3 * normals((8 if backend.costly else 48, n), "bits"), torch.tensor([5, 6])
    logits[3, n // 2 :] = -torch.inf
    logits[4, : n // 2] = logits[4, 0]
    several = ({}, {"temperature": 0.7, "top_k": 1 + n // 3}, {"top_k": 9, "top_p": 0.5}, {"top_p": 0.8})
    for options in several[:3] if backend.costly else several:
        out = categorical_sample(logits, key=key, return_log_prob=True, **options)
        with genperf.backend("reference"):
            expected = categorical_sample(logits, key=key, return_log_prob=True, **options)
        assert torch.equal(out[0], expected[0]), options
        assert torch.equal(out[1], expected[1]), options


def test_rows_longer_than_a_program_holds(backend):
    logits = 3 * normals((2, 20000), "long")
    for options in ({}, {"temperature": 0.7}):
        out = categorical_sample(logits, noise=torch.tensor([0.1, 0.9]), return_log_prob=True, **options)
        with genperf.backend("reference"):
            expected = categorical_sample(
                logits, noise=torch.tensor([0.1, 0.9]), return_log_prob=True, **options
            )
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])


def test_the_head_of_the_pixel_sampler_draws_the_same(backend):
    logits, key = 3 * normals((32, 40), "head"), torch.tensor([3, 0])
    noise = philox_random((32,), key, "uniform")
    head = heads.Categorical(40).program(0, 1, 32)
    for top_k in (0, 5):
        expected = heads.draw(head, logits, noise[:, None], 0.9, top_k)[:, 0].long()
        assert torch.equal(categorical_sample(logits, key=key, temperature=0.9, top_k=top_k), expected)


def test_a_class_of_no_probability_is_never_drawn(backend):
    logits = torch.full((5, 40), -torch.inf)
    logits[:, [2, 17, 30]] = torch.tensor([0.0, -200.0, 1.0])  # e^-201 is 0 in float32
    u = torch.tensor([0.0, 2.0**-25, 0.5, 1.0 - 2.0**-24, 1.0])
    index, log_prob = categorical_sample(logits, noise=u, return_log_prob=True)
    assert index.tolist() == [2, 2, 30, 30, 30]
    assert log_prob.isfinite().all()


def test_nothing_to_choose_from(backend):
    logits = torch.zeros(4, 3)
    logits[0], logits[1, 2], logits[2, 1] = -torch.inf, torch.nan, torch.inf
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
        index, log_prob = categorical_sample(logits, noise=torch.ones(4), return_log_prob=True, **options)
        assert index[:3].tolist() == [0, 0, 0]
        assert log_prob.isnan().tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match=r"logits has NaN or \+inf, or nothing but -inf, in row \(0,\)"):
        categorical_sample(logits, check=True)
    assert categorical_sample(logits[3:], check=True).shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, backend):
    """Half-precision logits are exact in float32; its extremes give finite results."""
    logits, key = (4 * normals((6, 70), "half")).to(dtype), torch.tensor([1, 1])
    for options in ({},) if backend.costly else ({"top_k": 7}, {"top_p": 0.6}):
        out = categorical_sample(logits, key=key, return_log_prob=True, **options)
        wide = categorical_sample(logits.float(), key=key, return_log_prob=True, **options)
        assert torch.equal(out[0], wide[0])
        assert torch.equal(out[1], wide[1])
    most = torch.finfo(dtype).max
    extreme = torch.tensor([[most, -most, 0.0, most], [-most, -most, -most, -most]], dtype=dtype)
    for temperature in (1e-4, 1.0, 100.0):
        index, log_prob = categorical_sample(
            extreme, noise=torch.tensor([0.3, 0.3]), temperature=temperature, return_log_prob=True
        )
        assert index.tolist() == [0, 1]
        torch.testing.assert_close(log_prob.exp(), torch.tensor([0.5, 0.25]))


def test_rows_of_any_shape(backend):
    logits = normals((2, 30, 3, 4), "rows")
    u = philox_random((2, 3, 4), torch.tensor([1, 0]), "uniform")
    index = categorical_sample(logits, dim=1, noise=u)
    last = logits.movedim(1, -1).contiguous()
    assert torch.equal(index, categorical_sample(last, noise=u))
    flat = categorical_sample(last.view(24, 30), noise=u.view(24))
    assert torch.equal(index.flatten(), flat)
    one = categorical_sample(last[1, 2, 3], noise=u[1, 2, 3])
    assert torch.equal(one, index[1, 2, 3])
    assert torch.equal(categorical_sample(last, noise=u.double()), index)
    assert categorical_sample(normals((3, 1), "one class")).tolist() == [0, 0, 0]


def test_threads_give_the_same_bits(backend):
    shape = (3, 40) if backend.costly else (40, 1000)
    logits, key = normals(shape, "threads"), torch.tensor([1, 4])
    with threads(1):
        out = categorical_sample(logits, key=key, top_p=0.9)
    with threads(3):
        assert torch.equal(out, categorical_sample(logits, key=key, top_p=0.9))


def _p_value(seed, n, rows, **options):
    """Chi-square of draws from one row against its probabilities."""
    logits = normals((1, n), "fixed")
    index = categorical_sample(logits.expand(rows, n), key=torch.tensor([seed, 0]), **options)
    p = categorical_log_prob(logits.expand(n, n), torch.arange(n), **options).double().exp()
    counts = torch.bincount(index, minlength=n)
    assert not counts[p == 0].any()
    return stats.chisquare(counts[p > 0].numpy(), (p[p > 0] / p.sum()).numpy() * rows).pvalue


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}], ids=["all", "kept"]
)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_distribution(name, options):
    with genperf.backend(name):
        p = np.array([_p_value(seed, 20, 3000, **options) for seed in range(100)])
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert p.min() > 1e-5


def test_given_noise_is_the_keys(backend):
    logits, key = normals((6, 5, 20), "noise"), torch.tensor([1, 2])
    u = philox_random((6, 5), key, "uniform")
    out = categorical_sample(logits, key=key)
    assert torch.equal(out, categorical_sample(logits, noise=u))
    assert torch.equal(out, categorical_sample(logits, noise=u.double()))
    keys = torch.stack([torch.full((6,), 1), torch.arange(6)], 1)
    u = philox_random((6, 5), keys, "uniform")
    assert torch.equal(categorical_sample(logits, key=keys), categorical_sample(logits, noise=u))


def test_generators():
    logits = normals((3, 50), "generators")

    def seeds():
        return [torch.Generator().manual_seed(s) for s in range(3)]

    for rng in ("torch", "philox"):
        rows = categorical_sample(logits, rng=rng, generator=seeds())
        for i, g in enumerate(seeds()):
            assert categorical_sample(logits[i : i + 1], rng=rng, generator=[g]) == rows[i]
    torch.manual_seed(3)
    drawn = categorical_sample(logits, rng="torch")
    torch.manual_seed(3)
    assert torch.equal(drawn, categorical_sample(logits, noise=torch.rand(3)))


def test_the_gradient_of_a_draws_log_probability(backend):
    logits = normals((4, 30), "gradient").requires_grad_()
    index, log_prob = categorical_sample(logits, key=torch.tensor([0, 1]), top_k=8, return_log_prob=True)
    again = categorical_log_prob(logits, index, top_k=8)
    assert torch.equal(log_prob, again)
    assert not index.requires_grad
    weight = torch.arange(1.0, 5.0)
    grads = [torch.autograd.grad((x * weight).sum(), logits)[0] for x in (log_prob, again)]
    assert torch.equal(*grads)
    assert grads[0].count_nonzero(1).tolist() == [8] * 4


def test_compile():
    logits, key = normals((2, 30), "compile"), torch.tensor([1, 2])
    compiled = torch.compile(categorical_sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, key=key, top_p=0.7), categorical_sample(logits, key=key, top_p=0.7))
    assert compiled(logits, rng="torch").shape == (2,)


def test_bad_arguments():
    logits, run = torch.zeros(2, 4), categorical_sample
    for error, match, call in (
        (TypeError, "logits is list", lambda: run([1.0])),
        (TypeError, "logits is torch.int64", lambda: run(torch.zeros(2, 3).long())),
        (ValueError, r"logits has shape \(\)", lambda: run(torch.tensor(1.0))),
        (ValueError, r"logits has shape \(2, 0\), expected a class", lambda: run(torch.zeros(2, 0))),
        (ValueError, "dim is 2, expected -2 to 1", lambda: run(logits, dim=2)),
        (ValueError, "temperature is 0", lambda: run(logits, temperature=0.0)),
        (ValueError, "top_k is -1", lambda: run(logits, top_k=-1)),
        (ValueError, "top_p is 0", lambda: run(logits, top_p=0.0)),
        (ValueError, "rng is 'numpy'", lambda: run(logits, rng="numpy")),
        (TypeError, "noise is torch.float16", lambda: run(logits, noise=torch.zeros(2).half())),
        (ValueError, r"noise has shape \(3,\)", lambda: run(logits, noise=torch.zeros(3))),
        (ValueError, "key has shape", lambda: run(logits, key=torch.zeros(3, 2).long())),
        (ValueError, "generator has 3 entries", lambda: run(logits, generator=[torch.Generator()] * 3)),
    ):
        with pytest.raises(error, match=match):
            call()
