"""genperf.ops.gaussian_sample against formulas in float64 that are written out here."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from genperf_testing.cases import EMPTY, SHAPES, Case, normals
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

import genperf
from genperf.ops import gaussian_sample, philox_random
from genperf.ops.philox_random import _normal_pair, _philox_words

KEY = torch.tensor([0x1234_5678_9ABC, -7])
LOW, HIGH = -1.5, 0.75


def _inputs(parametrization, prior, boundary):
    def inputs(shape):
        tensors = [normals(shape, i) for i in range(4 if prior else 2)]
        for scale in tensors[1::2]:
            if parametrization == "std":
                scale.exp_()
            if boundary:
                scale.view(-1)[::3], scale.view(-1)[1::7] = LOW, HIGH
        return tensors

    return inputs


def _keys(shape):
    return [torch.stack([KEY + (i << 31) for i in range(shape[0])]) if shape[0] else KEY.new_empty(0, 2)]


def _case(name, parametrization="logvar", prior=False, constants="key", boundary=False, **options):
    made = {"key": lambda shape: [KEY], "keys": _keys, "noise": lambda shape: [normals(shape, "noise")],
            "nothing": lambda shape: []}  # fmt: skip

    def function(mean, scale, *rest):
        given = {"noise" if constants == "noise" else "key": rest[-1]} if constants != "nothing" else {}
        return gaussian_sample(
            mean,
            scale,
            parametrization=parametrization,
            prior=rest[:2] if prior else None,
            **given,
            **options,
        )

    return Case(
        name, function, _inputs(parametrization, prior, boundary), made[constants], smooth=not boundary,
        per_sample=constants != "key" and options.get("reduction") != "mean",
        shapes=SHAPES if options.get("reduction") == "mean" else SHAPES + EMPTY,
    )  # fmt: skip


def _packed(name, dim, prior=False, **options):
    def inputs(shape):
        mean, scale, *others = _inputs("logvar", prior, boundary=False)(shape)
        return [torch.cat([mean, scale], dim), *others]

    def function(packed, *rest):
        return gaussian_sample(packed, dim=dim, prior=rest[:2] if prior else None, key=rest[-1], **options)

    shapes = tuple(shape for shape in SHAPES + EMPTY if len(shape) > 1)
    return Case(name, function, inputs, _keys, per_sample=True, shapes=shapes)


CASES = (
    _packed("packed", 1, log_prob=True),
    _packed("packed in the last dimension, prior", -1, prior=True, clamp=(LOW, HIGH)),
    _case("logvar", log_prob=True),
    _case("logvar, prior, keys", prior=True, constants="keys", log_prob=True),
    _case("logvar, clamp", clamp=(LOW, HIGH), temperature=0.7, constants="noise", log_prob=True),
    _case("logvar, clamp, prior, boundary", clamp=(LOW, HIGH), prior=True, boundary=True, reduction="none"),
    _case("logsigma", "logsigma", clamp=(LOW, HIGH), boundary=True, constants="keys"),
    _case("logsigma, prior, none", "logsigma", prior=True, reduction="none", temperature=1.3, log_prob=True),
    _case("std", "std", constants="noise", log_prob=True, reduction="mean"),
    _case("std, prior", "std", prior=True, constants="keys"),
    _case("softplus", "softplus", offset=1e-3, log_prob=True),
    _case("softplus, prior, none", "softplus", prior=True, constants="noise", reduction="none"),
    _case("soft_clamp", "soft_clamp", constants="keys", log_prob=True),
    _case("soft_clamp, prior, mean", "soft_clamp", prior=True, reduction="mean", temperature=0.9),
    _case("sample alone", kl=False, constants="keys"),
    _case("divergence alone", sample=False, constants="nothing"),
    _case("log_prob alone", sample=False, kl=False, log_prob=True, constants="noise", reduction="none"),
)


# The formulas, in float64, of the definitions alone.


def posterior(mean, scale, parametrization, clamp=None, offset=None, temperature=1.0):
    """torch.distributions.Normal of the parameters."""
    mean, scale = mean.double(), scale.double()
    if clamp:
        scale = scale.clamp(*clamp)
    if parametrization == "logvar":
        sigma = torch.exp(scale / 2)
    elif parametrization == "logsigma":
        sigma = torch.exp(scale)
    elif parametrization == "std":
        sigma = scale
    elif parametrization == "softplus":
        sigma = torch.nn.functional.softplus(scale) + (offset or 0.0)
    else:
        sigma = torch.exp(5 * torch.tanh(scale / 5)) + (1e-2 if offset is None else offset)
        mean = 5 * torch.tanh(mean / 5)
    return Normal(mean, sigma * temperature, validate_args=False)


def reduced(x, reduction):
    if reduction == "none":
        return x
    sums = x.flatten(1).sum(1)
    return sums if reduction == "sample" else sums.mean()


PARAMETRIZATIONS = {
    "logvar": {},
    "logvar, clamp": {"clamp": (-0.5, 0.5)},
    "logsigma": {},
    "logsigma, clamp": {"clamp": (-1.0, 0.25)},
    "std": {},
    "softplus": {},
    "softplus, offset": {"offset": 1e-3},
    "soft_clamp": {},
    "soft_clamp, offset": {"offset": 0.0},
}


@pytest.mark.parametrize("with_prior", [False, True], ids=["standard normal", "prior"])
@pytest.mark.parametrize("reduction", ["none", "sample", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("which", PARAMETRIZATIONS)
def test_definition(which, temperature, reduction, with_prior):
    """Values and gradients of the reference, by torch.distributions and autograd."""
    parametrization, options = which.split(",")[0], PARAMETRIZATIONS[which]
    tensors = [normals((3, 4, 5), i).double() for i in range(4)]
    if parametrization == "std":
        tensors[1::2] = [x.exp() for x in tensors[1::2]]
    noise = normals((3, 4, 5), "noise").double()
    mine, theirs = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))

    out = gaussian_sample(
        *mine[:2], parametrization=parametrization, prior=mine[2:] if with_prior else None,
        temperature=temperature, noise=noise, log_prob=True, reduction=reduction, **options,
    )  # fmt: skip
    q = posterior(*theirs[:2], parametrization, temperature=temperature, **options)
    p = posterior(*theirs[2:], parametrization, **options) if with_prior else Normal(0.0, 1.0)
    z = q.mean + q.stddev * noise
    # Its gradient is that at a fixed eps, like z's: (z - mean) / sigma does not depend on the parameters.
    log_prob = -0.5 * noise**2 - q.stddev.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(q.log_prob(z), log_prob)
    expected = (z, reduced(kl_divergence(q, p), reduction), reduced(log_prob, reduction))

    for name, x, y in zip(out._fields, out, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for x, y in zip(out, expected, strict=True):
        weight = normals(tuple(y.shape), "weight").double()
        leaves = 4 if with_prior and y is expected[1] else 2
        gradients = torch.autograd.grad(
            (x * weight).sum(), mine[:leaves], retain_graph=True, allow_unused=True
        )
        exact = torch.autograd.grad((y * weight).sum(), theirs[:leaves], retain_graph=True, allow_unused=True)
        for a, e in zip(gradients, exact, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("parametrization", "low", "high"), [("logvar", -1.5, 0.75), ("logsigma", -2.0, 1.0)]
)
def test_clamp_passes_gradient_at_its_bounds(backend, parametrization, low, high):
    """As torch.clamp: inclusive."""
    values = [low - 1, math.nextafter(low, -math.inf), low, 0.0, high, high + 1e-6, high + 1]
    scale = torch.tensor([values], device=backend.device, requires_grad=True)
    noise = torch.ones_like(scale)
    out = gaussian_sample(
        torch.zeros_like(scale),
        scale,
        parametrization=parametrization,
        clamp=(low, high),
        noise=noise,
        kl=False,
    )
    (gradient,) = torch.autograd.grad(out.z.sum(), scale)
    inside = torch.tensor(values) >= low
    inside &= torch.tensor(values) <= high
    assert torch.equal(gradient.cpu()[0] != 0, inside)
    (by_clamp,) = torch.autograd.grad(scale.clamp(low, high).sum(), scale)
    assert torch.equal(gradient != 0, by_clamp != 0)


# Where eager gives inf, NaN or a negative divergence.

EXTREMES = {
    # name: (options, mean, scale, prior)
    "log-variance 20": ({}, 0.0, 20.0, None),
    "log-variance -30": ({}, 0.0, -30.0, None),
    "log-variance 11.1": ({}, 0.0, 11.1, None),
    "log-variance 100": ({}, 1.0, 100.0, None),
    "log-variance -200": ({}, 1.0, -200.0, None),
    "log-variance 1e-4": ({}, 0.0, 1e-4, None),
    "log-variance 0.01": ({}, 0.0, 0.01, None),
    "log-variance -0.01": ({}, 0.0, -0.01, None),
    "mean 1e15": ({}, 1e15, 0.0, None),
    "both log-sigmas -60": ({"parametrization": "logsigma"}, 0.25, -60.0, (0.25, -60.0)),
    "prior's log-sigma -45": ({"parametrization": "logsigma"}, 0.0, -1.0, (0.0, -45.0)),
    "prior's log-sigma -45, other mean": ({"parametrization": "logsigma"}, 1.0, -1.0, (0.0, -45.0)),
    "equal": ({}, 0.3, 0.7, (0.3, 0.7)),
    "softplus -80": ({"parametrization": "softplus"}, 0.0, -80.0, None),
    "soft clamp -1e4": ({"parametrization": "soft_clamp"}, 1e4, -1e4, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(backend, name, dtype):
    """Finite and never negative, and near the exact value wherever float32 can hold it."""
    options, mean, scale, prior = EXTREMES[name]
    tensors = [torch.full((2, 3), x, device=backend.device).to(dtype) for x in (mean, scale, *(prior or ()))]
    if not all(x.isfinite().all() for x in tensors):
        pytest.skip(f"{dtype} does not hold the parameters")
    given = {"prior": tensors[2:] if prior else None, "noise": torch.ones_like(tensors[0]), **options}
    parametrization = options.get("parametrization", "logvar")
    q = posterior(*tensors[:2], parametrization)
    p = (
        posterior(*tensors[2:], parametrization)
        if prior
        else posterior(*map(torch.zeros_like, tensors[:2]), "logvar")
    )
    shift = torch.where(q.mean == p.mean, 0.0, (q.mean - p.mean) / p.stddev)
    ratio = 2 * (q.stddev.log() - p.stddev.log())
    exact = 0.5 * shift**2 + 0.5 * (torch.expm1(ratio) - ratio)
    for reduction in ("none", "sample"):
        kl = gaussian_sample(*tensors[:2], reduction=reduction, **given).kl
        assert kl.isfinite().all()
        assert (kl >= 0).all()
        expected = reduced(exact, reduction).clamp(max=torch.finfo(torch.float32).max)
        # Float64 loses 1e-16 to the cancellation in e^x - 1 - x; and a rounding of an exponent of 200 is 200
        # roundings of its power.
        torch.testing.assert_close(kl.double(), expected, rtol=2e-5, atol=1e-12)


def test_softplus_of_infinity(backend):
    """softplus(-inf) is 0, as that of -200, and softplus(inf) is inf; a NaN stays at its place."""
    scale = torch.tensor([[-math.inf, -200.0, math.nan, 0.0]], device=backend.device, requires_grad=True)
    mean = torch.full_like(scale, 0.25)
    options = {"parametrization": "softplus", "noise": torch.ones_like(mean), "reduction": "none"}
    out = gaussian_sample(mean, scale, offset=0.5, log_prob=True, **options)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in out), scale)
    for x in (*out, gradient):
        assert x[0, 0] == x[0, 1]
        assert x.isnan().tolist() == [[False, False, True, False]]
    assert (out.z[0, 0], gradient[0, 0]) == (0.75, 0)
    assert gaussian_sample(mean, scale, **options).z[0, 0] == 0.25
    assert (gaussian_sample(mean, torch.full_like(mean, math.inf), **options).z == math.inf).all()


def test_eager_is_worse():
    """The cases above are not vacuous: the usual formula fails in them."""

    def eager(mean, logvar):
        return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)

    zero = torch.zeros(())
    assert eager(zero.half(), torch.tensor(11.1).half()).isinf()
    assert eager(zero.bfloat16(), torch.tensor(0.01).bfloat16()) < 0
    assert abs(eager(zero, torch.tensor(1e-4)) - 2.5e-9) > 2e-9


def test_small_divergences_are_accurate(backend):
    """Each to a dozen roundings, where 1 + x - e^x would cancel."""
    logvar = torch.cat([s * torch.logspace(-7, 0, 400) for s in (-1.0, 1.0)])[None].to(backend.device)
    kl = gaussian_sample(torch.zeros_like(logvar), logvar, sample=False, reduction="none").kl.cpu().double()
    x = logvar.cpu().double()
    series = sum(x**k / math.factorial(k) for k in range(2, 20))
    torch.testing.assert_close(kl, 0.5 * series, rtol=2e-6, atol=0)


def test_sums_saturate(backend):
    mean = torch.full((2, 64), 1e19, device=backend.device)
    kl = gaussian_sample(mean, torch.zeros_like(mean), sample=False).kl
    assert (kl == torch.finfo(torch.float32).max).all()


def test_no_early_overflow(kernel):
    mean = torch.full((1, 1), 2.4e19, device=kernel.device)
    kl = gaussian_sample(mean, torch.zeros_like(mean), sample=False).kl
    torch.testing.assert_close(kl.item(), 0.5 * mean.double().item() ** 2, rtol=1e-6, atol=0)


def test_broadcasting(backend):
    mean, scale = normals((3, 1, 5)).to(backend.device), normals((4, 1)).to(backend.device)
    prior = normals((5,)).to(backend.device), torch.zeros((), device=backend.device)
    leaves = [x.requires_grad_() for x in (mean, scale, *prior)]
    key = KEY.to(backend.device)
    out = gaussian_sample(mean, scale, prior=prior, key=key)
    full = [x.detach().expand(3, 4, 5).contiguous().requires_grad_() for x in leaves]
    expected = gaussian_sample(*full[:2], prior=full[2:], key=key)
    assert torch.equal(out.z, expected.z)
    torch.testing.assert_close(out.kl, expected.kl, rtol=1e-6, atol=0)
    (out.z.sum() + out.kl.sum()).backward()
    (expected.z.sum() + expected.kl.sum()).backward()
    for x, y in zip(leaves, full, strict=True):
        torch.testing.assert_close(x.grad, y.grad.sum_to_size(x.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_packed_is_its_halves(backend, dim, memory_format):
    packed = normals((4, 6, 2, 8)).to(backend.device).to(memory_format=memory_format).requires_grad_()
    halves = [x.detach().requires_grad_() for x in packed.chunk(2, dim)]
    results = [
        gaussian_sample(*x, dim=dim, key=KEY.to(backend.device), log_prob=True) for x in ([packed], halves)
    ]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    gradients = [
        torch.autograd.grad((out.z**2).sum() + out.kl.sum() + out.log_prob.sum(), leaves)
        for out, leaves in zip(results, ([packed], halves), strict=True)
    ]
    assert torch.equal(gradients[0][0], torch.cat(gradients[1], dim))
    assert gradients[0][0].stride() == packed.stride()


def test_only_what_is_wanted():
    mean, scale = normals((3, 4), 0), normals((3, 4), 1)
    out = gaussian_sample(mean, scale, sample=False, kl=False)
    assert out == (None, None, None)
    out = gaussian_sample(mean, scale, sample=False, log_prob=True, noise=normals((3, 4), 2))
    assert out.z is None
    assert out.kl.shape == out.log_prob.shape == (3,)
    assert gaussian_sample(mean[0, 0], scale[0, 0], reduction="none", log_prob=True).z.shape == ()


@pytest.mark.parametrize("reduction", ["none", "sample", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_shapes_of_results(dtype, reduction):
    shape = (3, 4, 2)
    out = gaussian_sample(
        *(normals(shape, i).to(dtype) for i in range(2)), log_prob=True, reduction=reduction
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (out.z.dtype, out.z.shape) == (dtype, shape)
    sums = {"none": shape, "sample": shape[:1], "mean": ()}[reduction]
    for x in (out.kl, out.log_prob):
        assert (x.dtype, x.shape) == (wide, sums)


def test_memory_format_of_results(backend):
    """As torch.empty_like would give it, on every backend."""
    mean, scale = (
        normals((2, 3, 4, 5), i).to(backend.device, memory_format=torch.channels_last).requires_grad_()
        for i in range(2)
    )
    out = gaussian_sample(mean, scale, noise=torch.ones_like(mean), reduction="none")
    assert out.z.stride() == out.kl.stride() == mean.stride()
    gradients = torch.autograd.grad(out.z.sum(), (mean, scale))
    assert [g.stride() for g in gradients] == [mean.stride()] * 2


shapes = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)
values = st.floats(-80, 80, width=32)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, parametrization=st.sampled_from(["logvar", "logsigma", "softplus", "soft_clamp"]),
       mean=values, scale=values, seed=st.integers(-(2**63), 2**63 - 1), dtype=st.sampled_from(
           [torch.float32, torch.float16, torch.bfloat16]), prior=st.booleans())  # fmt: skip
def test_any_shape_and_value(shape, parametrization, mean, scale, seed, dtype, prior):
    """On the CPU kernels: finite, never negative, and the reference's sample."""
    tensors = [(normals(shape, i) * 2 + x).to(dtype) for i, x in enumerate((mean, scale, -mean, scale / 2))]
    results = []
    for name in ("reference", "cpu"):
        with genperf.backend(name):
            results.append(
                gaussian_sample(
                    *tensors[:2], parametrization=parametrization, prior=tensors[2:] if prior else None,
                    key=torch.tensor([seed, 1]),
                )
            )  # fmt: skip
    expected, out = results
    assert out.kl.isfinite().all()
    assert (out.kl >= 0).all()
    held = expected.kl < 1e38
    torch.testing.assert_close(out.kl[held], expected.kl[held], rtol=1e-4, atol=1e-5)
    rtol = (
        2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
    )  # exp(80) multiplies the error by 80
    close = torch.isclose(out.z, expected.z, rtol=rtol, atol=1e-5) | (out.z == expected.z)
    size = expected.z.abs().nan_to_num(posinf=torch.inf)
    cancelled = size.double() < 1e-2 * (tensors[0].abs() + 1).double()  # mean and sigma * eps nearly equal
    assert (close | cancelled | (parametrization == "soft_clamp")).all()


@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(-(2**63), 2**63 - 1), offset=st.integers(-(2**63), 2**63 - 1))
def test_any_key(shape, seed, offset):
    """With mean 0 and sigma 1 the sample is the noise itself."""
    key, zeros = torch.tensor([seed, offset]), torch.zeros(shape)
    assert torch.equal(gaussian_sample(zeros, zeros, key=key, kl=False).z, philox_random(shape, key))


# Noise


def test_noise_is_that_of_the_key(backend):
    """The same bits as philox_random, on every backend, in the results' logical order."""
    shape = (3, 5, 41, 7) if backend.costly else (3, 5, 131, 67)
    keys = _keys(shape)[0]
    for key in (KEY, keys):
        with genperf.backend("reference"):
            expected = philox_random(shape, key)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            zeros = torch.zeros(shape, device=backend.device).to(memory_format=memory_format)
            z = gaussian_sample(zeros, zeros, key=key.to(backend.device), kl=False).z
            assert torch.equal(z.cpu(), expected)


def test_backward_makes_the_same_noise(backend):
    """dz / dscale is eps / 2 at mean 0 and log-variance 0."""
    shape = (3, 1030)
    for key in (KEY, *_keys(shape)):
        leaf = torch.zeros(shape, device=backend.device, requires_grad=True)
        z = gaussian_sample(torch.zeros_like(leaf), leaf, key=key.to(backend.device), kl=False).z
        (gradient,) = torch.autograd.grad(z.sum(), leaf)
        assert torch.equal(gradient, 0.5 * z.detach())


def test_strided_keys(backend):
    shape = (3, 37)
    zeros = torch.zeros(shape, device=backend.device)
    keys = _keys(shape)[0].to(backend.device)
    expected = gaussian_sample(zeros, zeros, key=keys, kl=False).z
    apart = torch.stack([keys, keys + 5], dim=-1).flatten(1)[:, ::2]
    columns = keys.T.contiguous().T
    shared = keys[:1].expand(3, 2)
    for key in (apart, columns):
        assert torch.equal(gaussian_sample(zeros, zeros, key=key, kl=False).z, expected)
    assert torch.equal(gaussian_sample(zeros, zeros, key=shared, kl=False).z, expected[:1].expand(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rng_torch_is_randn(dtype):
    """Bit for bit, with the default generator, one's own, and a list of them, one a sample."""
    mean, scale = torch.zeros(3, 4, 5, dtype=dtype), torch.zeros(3, 4, 5, dtype=dtype)
    torch.manual_seed(3)
    z = gaussian_sample(mean, scale, rng="torch").z
    torch.manual_seed(3)
    assert torch.equal(z, torch.randn(3, 4, 5, dtype=dtype))

    z = gaussian_sample(mean, scale, rng="torch", generator=torch.Generator().manual_seed(4)).z
    assert torch.equal(z, torch.randn(3, 4, 5, dtype=dtype, generator=torch.Generator().manual_seed(4)))

    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    z = gaussian_sample(mean, scale, rng="torch", generator=generators).z
    rows = [torch.randn(1, 4, 5, dtype=dtype, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert torch.equal(z, torch.cat(rows))


def test_rng_torch_is_that_of_diffusers():
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    zeros = torch.zeros(3, 4, 5)
    for make in (
        lambda: torch.Generator().manual_seed(1),
        lambda: [torch.Generator().manual_seed(i) for i in range(3)],
    ):
        z = gaussian_sample(zeros, zeros, rng="torch", generator=make()).z
        assert torch.equal(z, randn_tensor((3, 4, 5), generator=make()))


def test_seeds():
    mean, scale = torch.zeros(2, 50), torch.zeros(2, 50)

    def sample(seed=None, **options):
        if seed is not None:
            torch.manual_seed(seed)
        return gaussian_sample(mean, scale, **options).z

    first = sample(1)
    assert not torch.equal(sample(), first)
    assert torch.equal(sample(1), first)
    assert not torch.equal(sample(2), first)
    assert torch.equal(
        sample(generator=torch.Generator().manual_seed(1)), sample(generator=torch.Generator().manual_seed(1))
    )
    generators = [torch.Generator().manual_seed(i) for i in (7, 8)]
    alone = gaussian_sample(mean[1:], scale[1:], generator=[torch.Generator().manual_seed(8)]).z
    assert torch.equal(sample(generator=generators)[1:], alone)


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(rng, use_reentrant):
    def gradients(wrap):
        torch.manual_seed(0)
        mean, scale = normals((3, 40), 0).requires_grad_(), normals((3, 40), 1).requires_grad_()
        z, kl, _ = wrap(lambda m, s: gaussian_sample(m, s, rng=rng), mean, scale)
        ((z**2).sum() + kl.sum()).backward()
        return z, mean.grad, scale.grad

    plain = gradients(lambda f, *xs: f(*xs))
    again = gradients(lambda f, *xs: checkpoint(f, *xs, use_reentrant=use_reentrant))
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


@pytest.mark.gpu
def test_a_cpu_generator_serves_a_gpu(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    zeros = torch.zeros(3, 40, device="cuda")
    for rng in ("philox", "torch"):
        z = gaussian_sample(zeros, zeros, rng=rng, generator=torch.Generator().manual_seed(1)).z
        expected = gaussian_sample(
            zeros.cpu(), zeros.cpu(), rng=rng, generator=torch.Generator().manual_seed(1)
        ).z
        assert torch.equal(z.cpu(), expected)


@pytest.mark.gpu
def test_a_graph_draws_anew_at_every_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    zeros = torch.zeros(3, 400, device="cuda")
    gaussian_sample(zeros, zeros)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = gaussian_sample(zeros, zeros).z
    samples = []
    for _ in range(3):
        graph.replay()
        samples.append(z.clone())
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[1], samples[2])


# Addresses


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sparse files")
def test_offsets_beyond_32_bits(kernel, tmp_path):
    """Strides and offsets of more than 2**32 elements, in a file of which only a few pages exist."""
    if kernel.device != "cpu":
        pytest.skip("the memory of a file")
    stride, shape = 2**32 + 24, (3, 40)
    n = 2 * stride + 2 * shape[1] + 8
    path = tmp_path / "sparse"
    try:
        with open(path, "wb") as file:
            file.truncate(2 * n)
        room = torch.from_file(str(path), shared=True, size=n, dtype=torch.bfloat16)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"no sparse file of this size: {error}")
    finally:
        path.unlink(missing_ok=True)
    mean, scale = (room.as_strided(shape, (stride, 1), shift) for shift in (3, 3 + shape[1]))
    for x, i in ((mean, 0), (scale, 1)):
        x.copy_(normals(shape, i))
    leaves = [x.detach().requires_grad_() for x in (mean, scale)]
    dense = [x.detach().contiguous().requires_grad_() for x in (mean, scale)]
    results = []
    for inputs in (leaves, dense):
        # noise= with the strides of mean would be allocated as such
        out = gaussian_sample(*inputs, key=KEY, reduction="none" if inputs is dense else "sample")
        results.append(out)
    assert torch.equal(results[0].z, results[1].z)
    torch.testing.assert_close(results[0].kl, results[1].kl.sum(1), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """On the CPU kernels, with inputs that take no memory; the sample takes 4 GiB."""
    _check_huge("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_more_than_2_to_the_31_elements_on_a_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with genperf.backend(name):
        _check_huge("cuda")


def _check_huge(device):
    n = 2**31 + 29
    mean = torch.zeros(1, 1, dtype=torch.bfloat16, device=device).expand(1, n)
    scale = torch.full((1, 1), 0.5, dtype=torch.bfloat16, device=device).expand(1, n)
    out = gaussian_sample(mean, scale, key=KEY.to(device))
    assert out.z.shape == (1, n)
    torch.testing.assert_close(out.kl.item(), n * 0.5 * (math.exp(0.5) - 1.5), rtol=1e-5, atol=0)
    groups = torch.arange((n - 1) // 4 - 8, (n - 1) // 4 + 1)
    words = torch.stack(
        _philox_words([groups, groups >> 32, *_halves(KEY[1], groups)], _halves(KEY[0], groups)), 1
    )
    eps = torch.stack(_normal_pair(words[:, 0::2].flatten(), words[:, 1::2].flatten()), 1).flatten()
    expected = (math.exp(0.25) * eps)[: n - 4 * int(groups[0])]
    torch.testing.assert_close(out.z[0, -len(expected) :].float().cpu(), expected, rtol=2**-8, atol=0)


def _halves(word, like):
    return [
        torch.full_like(like, int(word) & 0xFFFFFFFF),
        torch.full_like(like, int(word) >> 32 & 0xFFFFFFFF),
    ]


# Bad input

T = torch.zeros(2, 3)

BAD: dict[str, tuple[type[Exception], str, tuple, dict]] = {
    "mean no tensor": (TypeError, r"mean is list, expected a tensor", ([1.0], T), {}),
    "scale no tensor": (TypeError, r"scale is float, expected a tensor", (T, 1.0), {}),
    "mean of integers": (TypeError, r"mean is torch.int64, expected one of", (T.long(), T), {}),
    "scale of another dtype": (
        TypeError, r"scale is torch.float16, expected torch.float32",
        (T, T.half()), {},
    ),
    "complex": (TypeError, r"mean is torch.complex64", (T.cfloat(), T.cfloat()), {}),
    "device": (ValueError, r"scale is on meta, expected cpu", (T, T.to("meta")), {}),
    "nothing to halve": (TypeError, r"mean is int, expected a tensor", (3,), {}),
    "odd halves": (ValueError, r"mean has shape \(2, 3\), expected an even size in dimension 1", (T,), {}),
    "no such dimension": (ValueError, r"mean has shape \(2, 3\), .* in dimension 2", (T,), {"dim": 2}),
    "shapes": (ValueError, r"scale has shape \(4, 3\), .* mean, \(2, 3\)", (T, torch.zeros(4, 3)), {}),
    "no batch": (ValueError, r"mean has shape \(\), .* reduction 'sample'", (T[0, 0], T[0, 0]), {}),
    "parametrization": (
        ValueError, r"parametrization is 'var', expected one of logvar",
        (T, T), {"parametrization": "var"},
    ),
    "reduction": (ValueError, r"reduction is 'sum', expected one of none", (T, T), {"reduction": "sum"}),
    "clamp upside down": (
        ValueError, r"clamp is \(2, 1\), expected .* low <= high",
        (T, T), {"clamp": (2, 1)},
    ),
    "clamp of NaN": (ValueError, r"clamp is \(nan, 1\)", (T, T), {"clamp": (math.nan, 1)}),
    "clamp of one": (ValueError, r"clamp is \(1,\)", (T, T), {"clamp": (1,)}),
    "clamp a number": (ValueError, r"clamp is 3", (T, T), {"clamp": 3}),
    "clamp of a std": (
        ValueError, r"clamp is \(0, 1\) for parametrization 'std'",
        (T, T), {"clamp": (0, 1), "parametrization": "std"},
    ),
    "offset of a logvar": (
        ValueError, r"offset is 0.1 for parametrization 'logvar'",
        (T, T), {"offset": 0.1},
    ),
    "negative offset": (
        ValueError, r"offset is -1 .* >= 0",
        (T, T), {"offset": -1, "parametrization": "softplus"},
    ),
    "infinite offset": (
        ValueError, r"offset is inf",
        (T, T), {"offset": math.inf, "parametrization": "softplus"},
    ),
    "temperature 0": (
        ValueError, r"temperature is 0, expected a finite number > 0",
        (T, T), {"temperature": 0},
    ),
    "temperature NaN": (ValueError, r"temperature is nan", (T, T), {"temperature": math.nan}),
    "prior no pair": (TypeError, r"prior is Tensor, expected a pair", (T, T), {"prior": T}),
    "prior of one": (TypeError, r"prior is tuple, expected a pair", (T, T), {"prior": (T,)}),
    "prior no tensor": (TypeError, r"prior\[1\] is int, expected a tensor", (T, T), {"prior": (T, 0)}),
    "prior of another dtype": (
        TypeError, r"prior is torch.float64, expected torch.float32",
        (T, T), {"prior": (T.double(), T.double())},
    ),
    "prior elsewhere": (
        ValueError, r"prior is on meta, expected cpu",
        (T, T), {"prior": (T.to("meta"),) * 2},
    ),
    "prior too large": (
        ValueError, r"prior has shape \(5, 2, 3\), expected .* \(2, 3\)",
        (T, T), {"prior": (T.expand(5, 2, 3),) * 2},
    ),
    "rng": (ValueError, r"rng is 'numpy', expected 'philox' or 'torch'", (T, T), {"rng": "numpy"}),
    "noise no tensor": (TypeError, r"noise is str, expected", (T, T), {"noise": "gaussian"}),
    "noise of another dtype": (TypeError, r"noise is torch.float16, expected", (T, T), {"noise": T.half()}),
    "noise of another shape": (
        ValueError, r"noise has shape \(3,\) on cpu, expected \(2, 3\)",
        (T, T), {"noise": T[0]},
    ),
    "noise elsewhere": (
        ValueError, r"noise has shape \(2, 3\) on meta, expected",
        (T, T), {"noise": T.to("meta")},
    ),
    "noise with gradient": (
        ValueError, r"noise requires a gradient",
        (T, T), {"noise": T.clone().requires_grad_()},
    ),
    "noise and key": (
        ValueError, r"more than one of noise, key and generator",
        (T, T), {"noise": T, "key": KEY},
    ),
    "key no tensor": (TypeError, r"key is int, expected an int64 tensor", (T, T), {"key": 7}),
    "key of floats": (TypeError, r"key is torch.float32, expected an int64", (T, T), {"key": T[0, :2]}),
    "key of another shape": (
        ValueError, r"key has shape \(3,\), expected \(2,\) or \(2, 2\)",
        (T, T), {"key": torch.zeros(3, dtype=torch.int64)},
    ),
    "keys of other samples": (
        ValueError, r"key has shape \(3, 2\), expected \(2,\) or \(2, 2\)",
        (T, T), {"key": torch.zeros(3, 2, dtype=torch.int64)},
    ),
    "key elsewhere": (ValueError, r"key is on meta, expected cpu", (T, T), {"key": KEY.to("meta")}),
    "generator": (TypeError, r"generator is int, expected", (T, T), {"generator": 3}),
    "generators of other samples": (
        ValueError, r"generator has 3 entries",
        (T, T), {"generator": [torch.Generator()] * 3},
    ),
    "generator of torch": (
        TypeError, r"generator is int, expected",
        (T, T), {"generator": 3, "rng": "torch"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, args, options = BAD[name]
    with pytest.raises(error, match=f"(gaussian_sample|draw_key): .*{message}"):
        gaussian_sample(*args, **options)
