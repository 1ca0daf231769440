"""genperf.sampling.heads.log_prob against independent float64 definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from genperf.sampling.heads import Bernoulli, Callback, Categorical, Gaussian, LogisticMixture, log_prob

INF, NAN = torch.inf, torch.nan
ONE = torch.ones(1, 1)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("class_dim", [1, 2])
def test_log_prob_of_classes(dtype, class_dim):
    logits = (3 * normals(4, 9, 3, 5, 6)).to(dtype)
    logits[0, 3, 1] = -INF
    values = torch.randint(0, 9, (4, 3, 5, 6), generator=torch.Generator().manual_seed(1))
    values[values == 3] = 4
    exact = -cross_entropy(logits.double(), values, reduction="none").flatten(1).sum(1)
    given = logits if class_dim == 1 else logits.transpose(1, 2)
    result = log_prob(Categorical(9, 3, class_dim), given, values.float())
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(log_prob(Categorical(9, 3, class_dim), given.flatten(1, 2), values), result)


def test_log_prob_of_an_impossible_class():
    logits = torch.tensor([[0.0, -INF], [0.0, 0.0]])[:, :, None]
    assert log_prob(Categorical(2), logits, torch.ones(2, 1)).tolist() == pytest.approx([-INF, np.log(0.5)])


def test_log_prob_of_bits_and_floats():
    logits, noise = 10 * normals(4, 1, 5, 6), normals(4, 5, 6, seed=1)
    bits = (noise > 0).float()
    exact = -binary_cross_entropy_with_logits(logits[:, 0].double(), bits.double(), reduction="none")
    torch.testing.assert_close(log_prob(Bernoulli(), logits, bits).double(), exact.flatten(1).sum(1))
    assert log_prob(Bernoulli(), torch.tensor([[200.0], [-INF]]), torch.zeros(2, 1)).tolist() == [-200, 0]
    params, x = normals(4, 4, 5, 6), normals(4, 2, 5, 6, seed=2)
    exact = scipy.stats.norm.logpdf(x, params[:, :2], params[:, 2:].double().exp()).reshape(4, -1).sum(1)
    torch.testing.assert_close(log_prob(Gaussian(2), params, x).double(), torch.tensor(exact))
    assert log_prob(Gaussian(), torch.zeros(0, 2, 3, 3), torch.zeros(0, 1, 3, 3)).shape == (0,)


def levels_of(n):
    return torch.arange(n, dtype=torch.float64) * 2 / (n - 1) - 1


@pytest.mark.parametrize("log_scale", [-20.0, -7.0, -4.0, -1.0, 0.0, 3.0])
@pytest.mark.parametrize("mean", [-1.5, -1.0, -0.3, 0.0, 0.999, 4.0])
def test_levels_of_grey_sum_to_one(mean, log_scale):
    params = torch.tensor([0.0, 1.0, mean, mean / 2, log_scale, log_scale - 1], dtype=torch.float64)
    scale = np.exp(np.maximum([log_scale, log_scale - 1], -7))
    edges = np.concatenate([[-INF], (levels_of(256)[1:] - 1 / 255).numpy(), [INF]])
    means, weights = np.array([mean, mean / 2]), scipy.special.softmax([0.0, 1.0])
    cdf = scipy.special.expit((edges[:, None] - means) / scale)
    exact = np.diff(cdf, axis=0) @ weights
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = params.to(dtype).expand(256, -1)[:, :, None]
        log_probs = log_prob(LogisticMixture(2, 1), given, levels_of(256)[:, None])
        assert log_probs.isfinite().all()
        assert log_probs.double().exp().sum().item() == pytest.approx(1, abs=tolerance)
        # What rounding of values to float32 does, where a scale is e^-7.
        rtol, atol = (1e-9, 1e-13) if dtype == torch.float64 else (4 * 2**-24 * np.exp(7), 1e-7)
        np.testing.assert_allclose(log_probs.double().exp().numpy(), exact, rtol, atol)


def test_colours_sum_to_one():
    """All 8^3 colours of three mixtures whose channels depend on each other."""
    colours = torch.tensor(list(itertools.product(levels_of(8).tolist(), repeat=3)), dtype=torch.float64)
    params = normals(1, 30).double().expand(512, -1)[:, :, None]
    log_probs = log_prob(LogisticMixture(3, 3, levels=8), params, colours[:, :, None])
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    by_hand = []
    p = params[0, :, 0].numpy()
    means, log_scales, coefficients = p[3:].reshape(3, 3, 3).transpose(1, 0, 2)
    c = np.tanh(coefficients)
    for x in colours.numpy():
        m = np.stack([means[0], means[1] + c[0] * x[0], means[2] + c[1] * x[0] + c[2] * x[1]])
        ends = np.where(x < -0.999, -INF, x - 1 / 7), np.where(x > 0.999, INF, x + 1 / 7)
        low, high = (scipy.special.expit((e[:, None] - m) / np.exp(log_scales)) for e in ends)
        by_hand.append(scipy.special.softmax(p[:3]) @ (high - low).prod(0))
    np.testing.assert_allclose(log_probs.numpy(), np.log(by_hand), rtol=1e-9)


def test_log_prob_of_mixtures_at_extremes():
    """In float32 as in float64: scales too wide for their levels to differ, means far away."""
    description = LogisticMixture(1, 1)
    params = torch.tensor(
        [
            [0, mean, scale]
            for mean in (0.0, 0.5, 30.0, -1e4)
            for scale in (-7.0, -2.0, 6.0, 20.0, 60.0, 300.0)
        ]
    )
    for x in (-1.0, 1 / 255, 1.0):
        values = torch.full((len(params), 1), x)
        single = log_prob(description, params[:, :, None], values)
        double = log_prob(description, params[:, :, None].double(), values)
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)


def test_log_prob_has_gradients():
    values = torch.tensor([[[-1.0, 1.0, 1.0]], [[-1.0, 0.2, -1.0]], [[1.0, -0.6, 0.0]]]).double()
    params = normals(3, 20, 1).double().requires_grad_()
    x = values.transpose(1, 2)
    assert torch.autograd.gradcheck(lambda p: log_prob(LogisticMixture(2, 3), p, x), params)
    wide = torch.tensor([0.0, 0.0, 90.0]).view(1, 3, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(LogisticMixture(1, 1), wide, torch.zeros(1, 1)).sum(), wide)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([0.0, 0.0, -1.0]))


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "log_prob: a callback head", lambda: log_prob(Callback(print), ONE, ONE)),
        (ValueError, r"params has shape \(2, 3, 4\) and values \(2, 4\), expected \[B, 5, \.\.\.\]",
         lambda: log_prob(Categorical(5), torch.zeros(2, 3, 4), torch.zeros(2, 4))),
        (ValueError, "values has 5.0, expected integers in 0 to 4",
         lambda: log_prob(Categorical(5), torch.zeros(1, 5, 1), torch.tensor([[5.0]]))),
        (ValueError, "values has 0.5, expected integers in 0 to 1",
         lambda: log_prob(Bernoulli(), torch.zeros(1, 1, 1), torch.tensor([[0.5]]))),
        (ValueError, "values has nan, expected numbers in -1 to 1",
         lambda: log_prob(LogisticMixture(1, 1), torch.zeros(1, 3, 1), torch.tensor([[NAN]]))),
    ],
)  # fmt: skip
def test_bad_input(error, message, make):
    with pytest.raises(error, match=message):
        make()
