"""genperf.ops.bernoulli_sample against its definition and torch.bernoulli."""

from __future__ import annotations

import pytest
import torch
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import EMPTY, SHAPES, Case, normals
from scipy import stats

import genperf
from genperf.ops import bernoulli_sample, draw_key

OPS = ("reference", "cpu", "triton")


@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


def _case(name, key):
    return Case(
        name, lambda logits, key: (bernoulli_sample(logits, key=key, temperature=1.5),),
        constants=lambda shape: [normals(shape, "l"), key(shape)], shapes=SHAPES + EMPTY, backends=OPS,
    )  # fmt: skip


CASES = (
    _case("one key", lambda shape: torch.tensor([3, 7])),
    _case("a key a sample", lambda shape: torch.arange(2 * shape[0]).view(-1, 2)),
)


def test_definition(backend):
    n = 300 if backend.costly else 40_000
    logits, u = normals((n,), "l") * 4, torch.rand(n, generator=torch.Generator().manual_seed(0))
    out = bernoulli_sample(logits.to(backend.device), temperature=2.0, noise=u.to(backend.device)).cpu()
    p = torch.sigmoid(logits.double() / 2)
    certain = (u - p).abs() > 1e-6 * p * (1 - p) + 1e-7 * torch.minimum(u, 1 - u)
    assert certain.float().mean() > 0.999
    assert torch.equal(out[certain], (u < p).float()[certain])


def test_the_same_bits(backend):
    n, key = (700 if backend.costly else 2**16 + 5), torch.tensor([2**40 + 3, -5])
    logits = normals((n,), "l") * 10
    with genperf.backend("reference"):
        expected = bernoulli_sample(logits, key=key)
    assert torch.equal(
        bernoulli_sample(logits.to(backend.device), key=key.to(backend.device)).cpu(), expected
    )


def test_the_draws_of_torch():
    logits = normals((8, 1000), "l") * 3
    for generator in (None, torch.Generator()):
        (generator or torch.default_generator).manual_seed(5)
        expected = torch.bernoulli(logits.sigmoid(), generator=generator)
        (generator or torch.default_generator).manual_seed(5)
        assert torch.equal(bernoulli_sample(logits, rng="torch", generator=generator), expected)


def test_certain_values(backend):
    logits = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, torch.nan], device=backend.device)
    u = torch.tensor([0.0, 2.0**-30, 0.5, 1.0 - 2.0**-24, 1.0], device=backend.device)
    expected = torch.tensor([1.0, 0.0, 1.0, 0.0, torch.nan]).expand(5, 5).clone()
    expected[4, :4] = 0.0  # u = 1 is below no probability
    expected[0, :4] = torch.tensor([1.0, 0.0, 1.0, 1.0])  # u = 0 is below all that are more than 0
    out = bernoulli_sample(logits.expand(5, 5), noise=u[:, None].expand(5, 5)).cpu()
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)


def test_the_frequencies(backend):
    """Also of a probability that is below what a float32 of 24 random bits can be."""
    n = 2000 if backend.costly else 500_000
    key = torch.tensor([9, 9], device=backend.device)
    for logit, t in ((-3.0, 1.0), (0.2, 0.5), (4.0, 2.0)):
        logits = torch.full((n,), logit, device=backend.device)
        ones = int(bernoulli_sample(logits, temperature=t, key=key).sum())
        p = torch.tensor(logit / t).sigmoid().item()
        assert stats.binomtest(ones, n, p).pvalue > 1e-4
    assert bernoulli_sample(torch.full((n,), -40.0, device=backend.device), key=key).sum() == 0


def test_randomness():
    logits = torch.zeros(2, 50)
    torch.manual_seed(3)
    first = bernoulli_sample(logits)
    torch.manual_seed(3)
    assert torch.equal(bernoulli_sample(logits, key=draw_key("cpu")), first)
    both = bernoulli_sample(logits, generator=[torch.Generator().manual_seed(i) for i in (1, 1)])
    assert torch.equal(both[0], both[1])
    assert not bernoulli_sample(logits.requires_grad_()).requires_grad


def test_bad_arguments():
    logits = torch.zeros(2, 3)
    for error, match, call in (
        (TypeError, "logits is torch.int64", lambda: bernoulli_sample(logits.long())),
        (
            ValueError,
            "temperature is 0, expected 1e-6 to 1e6",
            lambda: bernoulli_sample(logits, temperature=0),
        ),
        (ValueError, "noise has shape", lambda: bernoulli_sample(logits, noise=torch.rand(3))),
    ):
        with pytest.raises(error, match=match):
            call()
