"""genperf.ops.gaussian_sample against formulas in float64. More of its tests are in ``gaussian_sample/``."""

from __future__ import annotations

import math

import pytest
import torch
from genperf_testing.cases import EMPTY, SHAPES, Case, normals
from genperf_testing.gaussian import KEY, keys_of, posterior, reduced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import genperf
from genperf.ops import gaussian_sample, philox_random

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


def _case(name, parametrization="logvar", prior=False, constants="key", boundary=False, **options):
    made = {"key": lambda shape: [KEY], "keys": keys_of, "noise": lambda shape: [normals(shape, "noise")],
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
    return Case(name, function, inputs, keys_of, per_sample=True, shapes=shapes)


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
