"""genperf.sampling.heads: descriptions and drawing, against independent float64 definitions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from genperf.ops import philox_random
from genperf.sampling.heads import (
    Bernoulli,
    Callback,
    Categorical,
    Gaussian,
    LogisticMixture,
    draw,
    make_noise,
    margin,
)

KEY = torch.tensor([2024, 5])
ROUNDING = 2.0**-20  # of a sum of weights in float32, of which each has an error of up to 2^-24 |log w|
INF, NAN = torch.inf, torch.nan
ONE = torch.ones(1, 1)


def program(description, rows=1, cols=1):
    return description.program(0, rows, cols)


def noise_of(description, images):
    return make_noise(program(description), KEY, range(images))[:, 0, 0]


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def accept(p):
    """The seeds are fixed: a failure is no bad luck. Not one of these p-values is this small by chance."""
    assert p > 1e-5, p


# Descriptions


def _name(argument: object) -> str:
    return "callback" if isinstance(argument, Callback) else str(argument)


@pytest.mark.parametrize(
    ("description", "parameters", "draws", "values", "noises"),
    [
        (Categorical(512), 512, 1, 1, 1),
        (Categorical(256, 3), 768, 3, 3, 3),
        (Bernoulli(), 1, 1, 1, 1),
        (Gaussian(2), 4, 2, 2, 2),
        (LogisticMixture(10, 3), 100, 1, 3, 4),
        (LogisticMixture(5, 1), 15, 1, 1, 2),
        (Callback(lambda params, noise, draw: params[:, 0], 2, 3), None, 2, 2, 6),
    ],
    ids=_name,
)
def test_counts(description, parameters, draws, values, noises):
    assert description.parameters == parameters
    head = description.program(7, 4, 5)
    assert (head.kind, head.params, head.rows, head.cols) == (description.kind, 7, 4, 5)
    assert (head.draws, head.values, head.noises) == (draws, values, noises)


@pytest.mark.parametrize(("shape", "class_dim"), [((5, 3), 1), ((3, 5), 2)])
def test_layouts_of_classes(shape, class_dim):
    """Each draw takes the logits that indexing the 5-D output would give."""
    description = Categorical(5, 3, class_dim)
    output = normals(40, *shape)
    logits = output if class_dim == 1 else output.transpose(1, 2)
    noise = noise_of(description, 40)
    for c in range(3):
        drawn = draw(program(description), output.flatten(1), noise, index=c)
        alone = draw(program(Categorical(5)), logits[:, :, c], noise[:, c : c + 1])
        assert torch.equal(drawn, alone)
    assert len(drawn.unique()) == 5


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "Categorical: classes is 1, expected 2 to 65536", lambda: Categorical(1)),
        (TypeError, "Categorical: classes is 2.5, expected an integer", lambda: Categorical(2.5)),
        (ValueError, "Categorical: class_dim is 3, expected 1 to 2", lambda: Categorical(4, 3, 3)),
        (ValueError, "Bernoulli: channels is 0, expected at least 1", lambda: Bernoulli(0)),
        (ValueError, "LogisticMixture: image_channels is 2, expected 1", lambda: LogisticMixture(10, 2)),
        (ValueError, "LogisticMixture: levels is 1, expected 2 to", lambda: LogisticMixture(levels=1)),
        (TypeError, "Callback: function is int, expected a callable", lambda: Callback(3)),
        (ValueError, "draw: a callback head", lambda: draw(program(Callback(print)), ONE, ONE)),
    ],
)  # fmt: skip
def test_bad_input(error, message, make):
    with pytest.raises(error, match=message):
        make()


# Noise


@pytest.mark.parametrize("description", [Categorical(8, 3), LogisticMixture(), Gaussian(2)], ids=str)
def test_noise_of_an_image_depends_on_its_index_alone(description):
    head = program(description, 3, 5)
    together = make_noise(head, KEY, range(6))
    assert together.shape == (6, 3, 5, head.noises)
    kind = "normal" if isinstance(description, Gaussian) else "uniform"
    for images in ([4], [5, 0, 2], torch.tensor([3, 3])):
        assert torch.equal(make_noise(head, KEY, images), together[torch.as_tensor(images)])
    for i in range(6):
        key = KEY + torch.tensor([0, i])
        assert torch.equal(together[i], philox_random((3, 5, head.noises), key, kind))
    assert make_noise(head, KEY, []).shape == (0, 3, 5, head.noises)


# Categorical


@pytest.mark.parametrize("classes", [2, 15, 16, 17, 256, 257, 512, 4097, 65536])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_decisions(classes, temperature):
    """The inverse of the cumulative distribution in float64, where float32 can tell."""
    images = 3000 if classes < 1000 else 40
    head = program(Categorical(classes))
    logits, noise = 3 * normals(images, classes), noise_of(Categorical(classes), images)
    sums = (logits.double() / temperature).softmax(1).cumsum(1)
    exact = torch.searchsorted(sums, noise.double()).double()
    margins = margin(head, logits, noise, temperature)[:, None]
    assert margins.isfinite().all()
    in_double = draw(head, logits.double(), noise, temperature)
    assert in_double.dtype == torch.float64
    assert ((in_double == exact) | (margins < 1e-12)).all()
    in_single = draw(head, logits, noise, temperature)
    assert in_single.dtype == torch.float32
    assert ((in_single == exact) | (margins < ROUNDING)).all()
    assert (in_single == exact).double().mean() > 0.99
    assert torch.equal(draw(head, logits.half(), noise), draw(head, logits.half().float(), noise))


def test_margin_is_the_distance_to_another_choice():
    head = program(Categorical(40))
    logits, noise = 2 * normals(2000, 40).double(), noise_of(Categorical(40), 2000).double()
    chosen, margins = draw(head, logits, noise), margin(head, logits, noise)[:, None]
    for sign in (-1, 1):
        inside = draw(head, logits, noise + sign * 0.999 * margins)
        assert torch.equal(inside, chosen)
    outside = [draw(head, logits, noise + sign * 1.001 * margins) != chosen for sign in (-1, 1)]
    assert (outside[0] | outside[1]).all()
    kept = margin(head, torch.tensor([[0.0, 1.0, 1.001]]), torch.tensor([[0.5]]), 0.5, top_k=1)
    torch.testing.assert_close(kept, torch.tensor([0.001 / 2]).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("classes", "images"), [(2, 20000), (10, 20000), (300, 100000)])
def test_frequencies(classes, images):
    head = program(Categorical(classes))
    logits, noise = normals(1, classes), noise_of(Categorical(classes), images)
    logits[0, 1] = -INF
    for temperature, top_k in ((1.0, 0), (0.6, 0), (1.7, (classes + 1) // 2)):
        drawn = draw(head, logits.expand(images, -1), noise, temperature, top_k)
        kept = np.argsort(-logits[0].numpy(), kind="stable")[: top_k or classes]
        p = np.zeros(classes)
        p[kept] = scipy.special.softmax(logits[0, kept].double().numpy() / temperature)
        counts = np.bincount(drawn[:, 0].long(), minlength=classes)
        assert (counts[p == 0] == 0).all()
        if (p > 0).sum() > 1:
            accept(scipy.stats.chisquare(counts[p > 0], images * p[p > 0]).pvalue)
            with pytest.raises(AssertionError):
                accept(scipy.stats.chisquare(np.roll(counts[p > 0], 1), images * p[p > 0]).pvalue)


@pytest.mark.parametrize("classes", [2, 16, 100, 5000])
def test_the_ends_of_the_uniform(classes):
    """2^-25 and 1 draw the first and the last class of positive probability, never another."""
    head = program(Categorical(classes))
    logits = torch.full((3, classes), -INF)
    first, last = classes // 3, classes - 1 - classes // 7
    logits[0, first : last + 1] = normals(last + 1 - first)
    logits[1, last] = 1e30  # the only one
    logits[2] = -200.0  # e^-200 is 0 in float32
    logits[2, [first, last]] = 0.0
    ends = torch.tensor([2.0**-25, 1.0])
    drawn = torch.stack([draw(head, logits, end.expand(3, 1))[:, 0] for end in ends], 1)
    assert drawn.tolist() == [[first, last], [last, last], [first, last]]


@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 19, 20, 25, 0])
def test_top_k_keeps_the_first_of_equal_logits(top_k):
    head, images = program(Categorical(20)), 4000
    logits = normals(8, 20, seed=3).mul(1.5).round().repeat_interleave(images // 8, 0)
    logits[::3, 4] = -INF
    drawn = draw(head, logits, noise_of(Categorical(20), images), 1.0, top_k)[:, 0].long()
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    rank = (order == drawn.numpy()[:, None]).argmax(1)
    assert (logits.gather(1, drawn[:, None]) > -INF).all()
    if 0 < top_k < 20:
        assert rank.max() == top_k - 1
    zeros = torch.zeros(1000, 20)
    drawn = draw(head, zeros, noise_of(Categorical(20), 1000), 1.0, top_k).unique()
    assert drawn.tolist() == list(range(top_k if 0 < top_k < 20 else 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_logits_that_are_no_distribution(dtype, top_k):
    """Class 0, also where it has no probability; a small temperature is no such thing."""
    head = program(Categorical(3))
    logits = torch.tensor([[-INF, NAN, 1], [-INF] * 3, [-INF, 0, INF], [NAN] * 3, [-INF, INF, INF]])
    for end in (2.0**-25, 0.5, 1.0):
        drawn = draw(head, logits.to(dtype), torch.full((5, 1), end), 1.0, top_k)
        assert drawn.flatten().tolist() == [0] * 5
        assert draw(head, torch.tensor([[3.0, -1e38, 4.0]], dtype=dtype), torch.ones(1, 1), 1e-38) == 2


# The other heads


def test_bernoulli():
    head, images = program(Bernoulli(3)), 20000
    noise = noise_of(Bernoulli(3), images)
    logits = torch.tensor([-1.0, 0.3, 2.0])
    for c, logit in enumerate(logits.tolist()):
        params = logits.expand(images, -1)
        drawn = draw(head, params, noise, 0.7, index=c)
        exact = (noise[:, c : c + 1].double() <= scipy.special.expit(logit / 0.7)).double()
        assert torch.equal(draw(head, params.double(), noise, 0.7, index=c), exact)
        assert ((drawn == exact) | (margin(head, params, noise, 0.7, index=c)[:, None] < ROUNDING)).all()
        accept(scipy.stats.binomtest(int(drawn.sum()), images, scipy.special.expit(logit / 0.7)).pvalue)
    extremes = torch.tensor([[-INF], [INF], [NAN], [-200.0], [200.0]])
    for end in (2.0**-25, 1.0):
        drawn = draw(program(Bernoulli()), extremes, torch.full((5, 1), end))
        assert drawn.flatten().tolist() == [0, 1, 0, 0, 1]


def test_gaussian():
    description, images = Gaussian(2), 20000
    noise = noise_of(description, images)
    params = torch.tensor([0.5, -2.0, -1.0, 0.7]).expand(images, -1)
    for c, (mean, std) in enumerate(((0.5, np.exp(-1)), (-2.0, np.exp(0.7)))):
        drawn = draw(program(description), params, noise, 0.8, index=c)[:, 0]
        accept(scipy.stats.kstest(drawn.numpy(), "norm", (mean, 0.8 * std)).pvalue)
        exact = mean + std * 0.8 * noise[:, c].double()
        torch.testing.assert_close(drawn.double(), exact, rtol=4e-7, atol=4e-7)
    assert margin(program(description), params, noise).isinf().all()
    assert draw(program(Gaussian()), torch.tensor([[NAN, 0.0]]), torch.zeros(1, 1)).isnan().all()


def mixture_by_hand(params, noise, mixtures, temperature, known):
    """One RGB pixel: PixelCNN++'s sampler, but for the mixture by the inverse of its distribution."""
    means, log_scales, coefficients = params[mixtures:].reshape(3, 3, mixtures).transpose(1, 0, 2)
    sums = scipy.special.softmax(params[:mixtures] / temperature).cumsum()
    k = min(np.searchsorted(sums, noise[0]), mixtures - 1)
    u = np.clip(noise[1:], np.float32(1e-5), np.float32(1 - 1e-5))
    x = means[:, k] + temperature * np.exp(np.maximum(log_scales[:, k], -7)) * scipy.special.logit(u)
    c = np.tanh(coefficients[:, k])
    x[0] = np.clip(x[0], -1, 1) if np.isnan(known[0]) else known[0]
    x[1] = np.clip(x[1] + c[0] * x[0], -1, 1) if np.isnan(known[1]) else known[1]
    x[2] = np.clip(x[2] + c[1] * x[0] + c[2] * x[1], -1, 1) if np.isnan(known[2]) else known[2]
    return x


@pytest.mark.parametrize(("mixtures", "temperature", "inpaint"), [(10, 1.0, False), (3, 0.7, True)])
def test_mixture_against_its_definition(mixtures, temperature, inpaint):
    description, images = LogisticMixture(mixtures), 300
    params, noise = normals(images, 10 * mixtures), noise_of(description, images)
    for c in range(3):
        block = params[:, mixtures * (1 + 3 * c) :][:, : 2 * mixtures]
        block[:, :mixtures] *= 0.3
        block[:, mixtures:] = 2 * block[:, mixtures:] - 4.0  # some are below -7
    noise[0, 1:], noise[1, 1:] = 2.0**-25, 1.0
    known = torch.where(normals(images, 3) > 0, normals(images, 3).clamp(-1, 1), NAN) if inpaint else None
    replace = None if known is None else (known.nan_to_num(), ~known.isnan())
    exact = torch.tensor(
        np.stack([
            mixture_by_hand(p, n, mixtures, temperature, k)
            for p, n, k in zip(
                params.double().numpy(), noise.double().numpy(),
                np.full((images, 3), NAN) if known is None else known.double().numpy(), strict=True,
            )
        ])
    )  # fmt: skip
    head = program(description)
    certain = margin(head, params, noise, temperature) > ROUNDING
    assert certain.sum() > images - 5
    assert ((exact > -1) & (exact < 1)).double().mean() > 0.5
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        drawn = draw(head, params.to(dtype), noise, temperature, known=replace)
        torch.testing.assert_close(drawn[certain].double(), exact[certain], rtol=0, atol=tolerance)


def test_grey_mixture_is_distributed_as_it_says():
    description, images = LogisticMixture(3, 1), 20000
    params = torch.tensor([0.0, 1.0, -1.0, -0.5, 0.2, 0.6, -3.5, -4.0, -3.8])
    drawn = draw(program(description), params.expand(images, -1), noise_of(description, images))[:, 0]
    weights, means, scales = scipy.special.softmax(params[:3].numpy()), params[3:6].numpy(), params[6:].exp()

    def cdf(x):
        return scipy.special.expit((x[:, None] - means) / scales.numpy()) @ weights

    assert drawn.abs().max() < 1
    accept(scipy.stats.kstest(drawn.double().numpy(), cdf).pvalue)
    with pytest.raises(AssertionError):
        accept(scipy.stats.kstest(drawn.double().numpy() + 0.005, cdf).pvalue)


def test_mixture_of_nan():
    head = program(LogisticMixture(4))
    params, noise = normals(3, 40), torch.full((3, 4), 0.5)
    params[0, 2] = params[1, 4:] = NAN
    drawn = draw(head, params, noise)
    assert drawn.isnan().all(1).tolist() == [True, True, False]
    assert not drawn[2].isnan().any()


@pytest.mark.parametrize("description", [Categorical(4, 2), Bernoulli(2), Gaussian(2)], ids=str)
def test_known_values(description):
    head, images = program(description), 50
    params, noise = normals(images, description.parameters), noise_of(description, images)
    known, mask = torch.full((images, 2), 0.25), normals(images, 2) > 0
    for c in range(2):
        free = draw(head, params, noise, index=c)
        fixed = draw(head, params, noise, index=c, known=(known, mask))
        assert torch.equal(fixed, torch.where(mask[:, c : c + 1], 0.25, free))
