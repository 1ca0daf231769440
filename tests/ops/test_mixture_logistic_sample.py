"""genperf.ops.mixture_logistic_sample against the pixel sampler's head, public code and the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import Case, normals
from genperf_testing.contract import threads
from genperf_testing.mixture import eager_nll, eager_sample, far_apart, level_values, parameters_of
from scipy import stats

import genperf
from genperf.ops import mixture_logistic_sample, philox_random
from genperf.sampling import heads

OPS = ("reference", "cpu", "triton")


# On a GPU the contract suite runs the ops; these tensors are on the CPU.
@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS and b.device == "cpu"))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


def _case(name, mixtures, channels, keys=False, **options):
    n = mixtures * (3 if channels == 1 else 10)

    def function(params, key):
        return (mixture_logistic_sample(params, image_channels=channels, key=key, **options),)

    def constants(shape):
        key = torch.arange(2 * shape[0]).view(-1, 2) + 3 if keys else torch.tensor([11, 5])
        params = normals((shape[0], n, *shape[1:]), "params")
        params[:, mixtures:] *= 0.25
        return [params, key]

    return Case(
        name, function, constants=constants, backends=OPS, elementwise=False, per_sample=keys,
        shapes=((5, 24), (3, 7), (2, 3, 5, 4), (2, 1100), (0, 4), (3, 0)),
    )  # fmt: skip


CASES = (
    _case("RGB", 3, 3),
    _case("grey, keys, NVAE", 2, 1, keys=True, convention="nvae", temperature=0.8),
)


@pytest.mark.parametrize("mixtures", [1, 10, 16, 17, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_head_of_the_pixel_sampler_draws_the_same(mixtures, channels, backend):
    if backend.costly and (mixtures, channels) not in ((1, 3), (10, 3), (17, 1)):
        pytest.skip("others stand for it where calls are slow")
    params = parameters_of(3, mixtures, channels, 5, 7)
    key = torch.tensor([3, 9])
    keys = torch.stack([torch.full((3,), 3), 9 + torch.arange(3)], 1)
    for temperature in (1.0, 0.7):
        out = mixture_logistic_sample(params, image_channels=channels, key=keys, temperature=temperature)
        head = heads.LogisticMixture(mixtures, channels).program(0, 5, 7)
        noise = heads.make_noise(head, key, range(3)).view(105, 1 + channels)
        flat = params.movedim(1, -1).reshape(105, -1)
        expected = heads.draw(head, flat, noise, temperature).view(3, 5, 7, channels).movedim(-1, 1)
        far = heads.margin(head, flat, noise, temperature).view(3, 1, 5, 7) > 1e-6
        torch.testing.assert_close(out * far, expected * far, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logits_far_apart(temperature, backend):
    """Weights that underflow or are subnormal, excluded mixtures, and a uniform that no sum may reach."""
    params = parameters_of(2, 10, 1, 300)
    params[:, :10] *= 60.0
    params[0, :9, :40] = -torch.inf
    noise = torch.rand(2, 300, 2, generator=torch.Generator().manual_seed(1))
    noise[:, ::7, 0] = 1.0
    out = mixture_logistic_sample(params, image_channels=1, noise=noise, temperature=temperature)
    head = heads.LogisticMixture(10, 1).program(0, 1, 300)
    flat = params.movedim(1, -1).reshape(600, 30)
    expected = heads.draw(head, flat, noise.view(600, 2), temperature).view(2, 1, 300)
    sure = heads.margin(head, flat, noise.view(600, 2), temperature).view(2, 1, 300) > 1e-6
    assert out.isfinite().all()
    sure[:, :, ::7] = False  # there rounding decides
    assert sure.float().mean() > 0.8
    torch.testing.assert_close(out * sure, expected * sure, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("space", [(1, 1), (7, 40)])
@pytest.mark.parametrize("dim", [1, -1])
def test_a_plain_call_takes_a_short_way(dim, space, dtype):
    """Past torch's dispatcher, where nothing listens there: the same result."""
    params = parameters_of(1, 10, 3, *space).to(dtype).movedim(1, dim).requires_grad_()

    def run(**options):
        torch.manual_seed(4)
        return mixture_logistic_sample(params, channel_dim=dim, temperature=0.9, **options)

    with genperf.backend("cpu"):
        for options in ({}, {"key": torch.tensor([1, 2])}, {"convention": "nvae"}, {"mixtures": 10}):
            out, explanation = run(**options), genperf.explain(run, **options)
            assert [c.backend for c in explanation.choices if c.operator == "mixture_logistic_sample"] == [
                "cpu"
            ]
            with torch.profiler.profile() as profile:
                listened = run(**options)
            assert any("mixture_logistic_sample" in event.key for event in profile.key_averages())
            assert torch.equal(out, listened)
            assert out.stride() == listened.stride()
            assert out.dtype == dtype
            assert not out.requires_grad


def _draws(mixtures=10):
    """With a key, with keys and with the noise of public code."""
    params, grey = parameters_of(2, mixtures, 3, 4, 9), parameters_of(2, mixtures, 1, 15)
    keys = torch.tensor([[1, 2], [3, 4]])
    generator = torch.Generator().manual_seed(0)
    yield mixture_logistic_sample(params, key=torch.tensor([5, 6]))
    yield mixture_logistic_sample(grey, image_channels=1, key=keys, convention="nvae", temperature=0.7)
    yield mixture_logistic_sample(params, rng="torch", generator=generator)


def _assert_bits_of_the_cpu(mixtures=10):
    drawn = list(_draws(mixtures))
    with genperf.backend("cpu"), genperf.cpu_isa("baseline"):
        for out, expected in zip(drawn, _draws(mixtures), strict=True):
            assert torch.equal(out, expected)


def test_every_backend_draws_the_same_bits(backend):
    if backend.backend == "reference":
        pytest.skip("takes torch's own exponential")
    _assert_bits_of_the_cpu()


@pytest.mark.slow
def test_a_tree_of_three_levels(backend):
    if backend.backend == "reference":
        pytest.skip("takes torch's own exponential")
    _assert_bits_of_the_cpu(300)


def test_offsets_of_more_than_31_bits(backend):
    params = parameters_of(2, 1, 1, 8).half()
    out, far = (
        mixture_logistic_sample(p, image_channels=1, key=torch.tensor([5, 6]))
        for p in (params, far_apart(params))
    )
    assert torch.equal(out, far)


def test_given_noise_is_the_keys(backend):
    params = parameters_of(2, 4, 3, 5, 6)
    key = torch.tensor([1, 2])
    noise = philox_random((2, 5, 6, 4), key, "uniform")
    out = mixture_logistic_sample(params, key=key)
    assert torch.equal(out, mixture_logistic_sample(params, noise=noise))
    last = mixture_logistic_sample(params.movedim(1, -1).contiguous(), noise=noise, channel_dim=-1)
    assert torch.equal(out, last.movedim(-1, 1))


@pytest.mark.parametrize("nvae", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_noise_of_public_code(channels, nvae, backend):
    """The arrays that it draws, in its order, from the same generator; and what it makes of them."""
    params = parameters_of(2, 5, channels, 6, 7)
    dim = 1 if nvae else -1
    given = params.movedim(1, dim)
    convention = "nvae" if nvae else "default"
    torch.manual_seed(3)
    out = mixture_logistic_sample(
        given, image_channels=channels, channel_dim=dim, convention=convention, temperature=0.8, rng="torch"
    )
    torch.manual_seed(3)
    arrays = [
        torch.empty((2, n, 6, 7) if nvae else (2, 6, 7, n)).uniform_(1e-5, 1 - 1e-5).movedim(dim, 1)
        for n in (5, channels)
    ]
    expected = eager_sample(params, *arrays, t=0.8, nvae=nvae)
    torch.testing.assert_close(out.movedim(dim, 1), expected, rtol=1e-5, atol=1e-5)


def _p_value(seed, levels=16, n=4000):
    """Chi-square of samples of one grey mixture against the probabilities of the levels."""
    params = parameters_of(1, 4, 1, 1, seed="fixed")
    params[:, 8:] = params[:, 8:].clamp(min=-3.0)
    key = torch.tensor([seed, 0])
    x = mixture_logistic_sample(params.expand(1, 12, n), image_channels=1, key=key).double().flatten()
    counts = torch.bincount(((x + 1) * (levels - 1) / 2).round().long(), minlength=levels)
    values = level_values(levels).view(1, 1, -1)
    p = eager_nll(params.double().expand(1, 12, levels), values, "default", levels).neg().exp().flatten()
    return stats.chisquare(counts.numpy(), (p / p.sum()).numpy() * n).pvalue


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_distribution(name):
    with genperf.backend(name):
        p = np.array([_p_value(seed) for seed in range(200 if name == "cpu" else 40)])
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert p.min() > 1e-5


def test_the_shares_of_colours(backend):
    """Green follows red by tanh of its coefficient."""
    params = torch.zeros(1, 10, 50)
    params[:, [2, 5, 8]] = -20.0
    params[:, 1] = 0.5
    params[:, 3], params[:, 6], params[:, 9] = 1.0, -1.0, 2.0
    red, green, blue = mixture_logistic_sample(params, key=torch.tensor([0, 0]))[0].mean(-1)
    t = torch.tensor([1.0, -1.0, 2.0]).tanh()
    assert red == pytest.approx(0.5, abs=1e-3)
    assert green == pytest.approx((t[0] * red).item(), abs=2e-3)
    assert blue == pytest.approx((t[1] * red + t[2] * green).item(), abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounded_result(dtype, backend):
    params, key = parameters_of(2, 3, 3, 20).to(dtype), torch.tensor([1, 1])
    out = mixture_logistic_sample(params, key=key)
    assert out.dtype == dtype
    assert torch.equal(out, mixture_logistic_sample(params.float(), key=key).to(dtype))


def test_threads_and_layouts_give_the_same_bits(backend):
    params, key = parameters_of(3, 10, 3, 20, 24), torch.tensor([1, 4])
    if backend.costly:
        params = params[..., :3]
    with threads(1):
        out = mixture_logistic_sample(params, key=key)
    for n in (2, 3):
        with threads(n):
            assert torch.equal(out, mixture_logistic_sample(params, key=key))
    last = params.contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, mixture_logistic_sample(last, key=key))


def test_nothing_to_choose(backend):
    params = torch.zeros(1, 6, 4)
    params[0, :2, 0] = -torch.inf
    params[0, 0, 1] = torch.nan
    params[0, 1, 2] = torch.inf
    for noise in (torch.full((1, 4, 2), 0.5), (torch.full((1, 2, 4), 0.5), torch.full((1, 1, 4), 0.5))):
        out = mixture_logistic_sample(params, image_channels=1, noise=noise)
        assert out.isnan().flatten().tolist() == [True, True, True, False]


def test_generators():
    params = parameters_of(2, 3, 3, 5)
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    both = mixture_logistic_sample(params, generator=seeds)
    for i, s in enumerate((1, 2)):
        one = mixture_logistic_sample(params[i : i + 1], generator=[torch.Generator().manual_seed(s)])
        assert torch.equal(both[i : i + 1], one)


def test_compile():
    params, key = parameters_of(2, 3, 3, 4), torch.tensor([1, 2])
    compiled = torch.compile(mixture_logistic_sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(params, key=key), mixture_logistic_sample(params, key=key))
    assert compiled(params).shape == (2, 3, 4)


def test_bad_arguments():
    params, run = torch.zeros(2, 10, 4), mixture_logistic_sample
    key = torch.tensor([1, 2])
    for error, match, call in (
        (ValueError, "image_channels is 2", lambda: run(params, image_channels=2)),
        (ValueError, "params has 10 channels", lambda: run(params, image_channels=1)),
        (ValueError, "temperature is 0", lambda: run(params, temperature=0.0)),
        (ValueError, "rng is 'numpy'", lambda: run(params, rng="numpy")),
        (ValueError, "more than one of noise", lambda: run(params, key=key, generator=torch.Generator())),
        (TypeError, "noise is torch.float64", lambda: run(params, noise=torch.zeros(2, 4, 4).double())),
        (ValueError, "noise has shape", lambda: run(params, noise=torch.zeros(2, 4, 5))),
        (ValueError, r"noise\[1\] has shape", lambda: run(params, noise=(torch.zeros(2, 1, 4),) * 2)),
        (TypeError, "key is torch.float32", lambda: run(params, key=torch.zeros(2))),
        (ValueError, "generator has 3 entries", lambda: run(params, generator=[torch.Generator()] * 3)),
        (
            TypeError,
            "generator is a list",
            lambda: run(params, generator=[torch.Generator()] * 2, rng="torch"),
        ),
    ):
        with pytest.raises(error, match=match):
            call()
