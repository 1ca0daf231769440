"""Losses, samplers and distribution classes of discretized logistics: found, replaced, restored."""

import copy
import pickle
import sys
import types

import numpy as np
import pytest
import torch

import genperf
from genperf.accelerate._logistic_functions import replaces

LOSSES = {
    "discretized_mix_logistic_loss": (True, 3, False),
    "discretized_mix_logistic_loss_1d": (True, 1, False),
    "mix_logistic_bits": (False, 3, True),
    "low_bit_mix_logistic_loss": (False, 3, False),
}
SAMPLERS = {
    "sample_from_discretized_mix_logistic": (True, 3),
    "sample_from_discretized_mix_logistic_1d": (True, 1),
    "sample_mix_logistic_last": (False, 3),
}
CLASSES = {"Normal", "DiscLogistic", "DiscMixLogistic"}


def example(channels_first, channels, mixtures=4, dtype=torch.float32, side=8):
    generator = torch.Generator().manual_seed(0)
    n_params = mixtures * (3 if channels == 1 else 10)
    params = torch.randn(2, side, side, n_params, generator=generator).to(dtype)
    x = torch.randint(256, (2, side, side, channels), generator=generator).to(dtype) / 127.5 - 1
    if channels_first:
        params, x = (t.permute(0, 3, 1, 2).contiguous() for t in (params, x))
    return x, params


def test_names_of_a_module_are_replaced_and_restored(logistics, monkeypatch):
    user = types.ModuleType("a_training_script")
    user.loss = logistics.discretized_mix_logistic_loss  # as after "from utils import *"
    monkeypatch.setitem(sys.modules, user.__name__, user)
    before = dict(vars(logistics))
    methods = {name: dict(vars(getattr(logistics, name))) for name in CLASSES}
    with genperf.accelerate.namespace(logistics) as report:
        names = {entry.name for entry in report.accelerated}
        assert names == {*LOSSES, *SAMPLERS, *CLASSES}
        reasons = {
            "mix_logistic_wide_loss": "it gives another value than",
            "sample_mix_logistic_unclamped": "from one seed it draws something else",
            "WiderNormal": "its sample is not that of",
        }
        assert [entry.name for entry in report.left_alone] == list(reasons)
        assert all(entry.reason.startswith(reasons[entry.name]) for entry in report.left_alone)
        assert "mixture_logistic_nll" in str(report)
        assert user.loss is logistics.discretized_mix_logistic_loss
        assert replaces(user.loss) is before["discretized_mix_logistic_loss"]
        again = genperf.accelerate.namespace(logistics)  # what is replaced is not probed again
        assert not again.accelerated
        again.restore()
        later = logistics.mix_logistic_bits = lambda *_: 0
    assert user.loss is before["discretized_mix_logistic_loss"]
    assert logistics.mix_logistic_bits is later
    logistics.mix_logistic_bits = before["mix_logistic_bits"]
    assert dict(vars(logistics)) == before
    assert {name: dict(vars(getattr(logistics, name))) for name in CLASSES} == methods
    with pytest.raises(RuntimeError, match="left alone would be:\n  mix_logistic_wide_loss"):
        genperf.accelerate.namespace(logistics, strict=True)
    assert dict(vars(logistics)) == before


@pytest.mark.parametrize("name", LOSSES)
def test_losses(logistics, name):
    channels_first, channels, params_first = LOSSES[name]
    x, params = example(channels_first, channels)
    flag = {"low_bit_mix_logistic_loss": "low_bit", "mix_logistic_bits": "per_pixel"}.get(name)

    def run(dtype, named):
        arguments = [t.to(dtype).requires_grad_() for t in (x, params)]
        value = getattr(logistics, name)(*(arguments[::-1] if params_first else arguments), **named)
        return value, *torch.autograd.grad(value.square().sum(), arguments)

    for named in ({}, {flag: True}) if flag else ({},):
        exact, original = run(torch.float64, named), run(torch.float32, named)
        with genperf.accelerate.namespace(logistics):
            wide, ours = run(torch.float64, named), run(torch.float32, named)
        for e, w, theirs, o in zip(exact, wide, original, ours, strict=True):
            assert (o.dtype, w.dtype, o.shape) == (theirs.dtype, e.dtype, theirs.shape)
            size = e.abs().max()
            torch.testing.assert_close(w, e, rtol=1e-6, atol=1e-7 * size.item())
            assert (o - e).abs().max() <= 2 * (theirs - e).abs().max() + 1e-6 * size


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_the_same(logistics, name):
    channels_first, channels = SAMPLERS[name]
    _, params = example(channels_first, channels, side=16)
    results = []
    for step in range(2):
        with genperf.accelerate.namespace(logistics) if step else torch.no_grad():
            torch.manual_seed(5)
            results.append((getattr(logistics, name)(params, 4), torch.get_rng_state()))
    (expected, state), (actual, after) = results
    assert all(
        a == b for a, b, n in zip(expected.stride(), actual.stride(), actual.shape, strict=True) if n > 1
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    assert torch.equal(state, after)
    with genperf.accelerate.namespace(logistics, rng="philox"):
        other = getattr(logistics, name)(params, nr_mix=4)
    assert other.shape == expected.shape
    assert not torch.equal(other, expected)
    assert abs(other.mean() - expected.mean()) < 0.15


def test_what_is_not_covered_runs_the_original(logistics):
    x, params = example(True, 3)
    with genperf.accelerate.namespace(logistics):
        drawn = logistics.sample_from_discretized_mix_logistic(params.requires_grad_(), 4)
        assert drawn.requires_grad  # the original's samples have a gradient
        with pytest.raises(RuntimeError):
            logistics.discretized_mix_logistic_loss(x[:, :, :4], params)
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            logistics.discretized_mix_logistic_loss(x)
        with pytest.raises(AssertionError):
            logistics.DiscMixLogistic(params, 4).log_prob(2 * x)
        with pytest.raises(AssertionError):
            logistics.DiscMixLogistic(params, 3)
        whole = logistics.low_bit_mix_logistic_loss(x.movedim(1, -1), params.movedim(1, -1), low_bit=None)
    torch.testing.assert_close(
        whole, logistics.low_bit_mix_logistic_loss(x.movedim(1, -1), params.movedim(1, -1))
    )


@torch.no_grad()
def sampled(model, z, x):
    return model.both(z, x)[1]


def test_modules_that_name_the_functions(logistics):
    model = logistics.OutputNet().eval()
    x, _ = example(False, 3)
    z = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model.sample(z)
        keys = list(model.state_dict())
        report = genperf.accelerate(model, mode="training")
        torch.manual_seed(1)
        actual = model.sample(z)
    assert {entry.was: entry.kernel for entry in report.entries} == {
        "OutputNet.nll, both: low_bit_mix_logistic_loss": "mixture_logistic_nll",
        "OutputNet.sample, both: sample_mix_logistic_last": "mixture_logistic_sample",
    }
    assert np.abs(actual.astype(int) - expected).max() <= 1
    assert list(model.state_dict()) == keys
    for low_bit in (False, True):
        model.low_bit = low_bit
        assert report.verify(z, x, call=lambda m, z, x: m.nll(z, x), seconds=0)
    assert report.verify(z, x, call=lambda m, z, x: m.both(z.detach(), x)[0], seconds=0)
    report.restore()
    assert type(model) is logistics.OutputNet
    philox = genperf.accelerate(copy.deepcopy(model), rng="philox")
    assert philox.verify(z, x, call=sampled, seconds=0)  # with the noise of the original
    assert logistics.low_bit_mix_logistic_loss is model.nll.__func__.__globals__["low_bit_mix_logistic_loss"]
    other = genperf.accelerate(logistics.OtherNet())
    assert [entry.was for entry in other.left_alone] == ["OtherNet.nll: mix_logistic_wide_loss"]


def test_modules_that_construct_the_classes(logistics):
    model = logistics.HierarchicalVAE()
    x = torch.randint(256, (2, 3, 8, 8)) / 255
    report = genperf.accelerate(model, mode="training")
    assert {entry.was: entry.kernel for entry in report.entries} == {
        "HierarchicalVAE.forward: Normal": "gaussian_sample",
        "HierarchicalVAE.decoder_output: DiscMixLogistic": "mixture_logistic_nll, _sample",
    }
    assert report.verify(x, call=lambda m, x: m.loss(x), seconds=0)
    output = model(x)[0]
    assert isinstance(output, logistics.DiscMixLogistic)
    assert "means" not in vars(output)
    original = logistics.DiscMixLogistic(output.logit_probs.new_zeros(2, 30, 8, 8), 3)
    assert output.mean().shape == original.mean().shape  # which needs what was not computed so far
    assert output.mean().requires_grad
    for copied in (pickle.loads(pickle.dumps(copy_of(output))), copy.deepcopy(copy_of(output))):
        assert type(copied) is logistics.DiscMixLogistic
        torch.testing.assert_close(copied.log_prob(x), output.log_prob(x).detach(), rtol=1e-4, atol=1e-3)
    report.restore()
    assert type(model(x)[0]) is logistics.DiscMixLogistic


def copy_of(output):
    """The same distribution without a graph, which neither pickle nor deepcopy takes."""
    kept = vars(output)["_genperf_kept"].params.detach()
    return type(output)(kept, 3)


@pytest.mark.parametrize("name", ["DiscMixLogistic", "DiscLogistic"])
def test_classes_sample_the_same(logistics, name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    params = torch.randn(2, 40 if name == "DiscMixLogistic" else 6, 8, 8)
    given = (4,) if name == "DiscMixLogistic" else ()
    for t in ((), (0.7,)) if given else ((),):
        results = []
        for step in range(2):
            with genperf.accelerate.namespace(logistics) if step else torch.no_grad():
                torch.manual_seed(2)
                results.append((getattr(logistics, name)(params, *given).sample(*t), torch.get_rng_state()))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=2e-6)
        assert torch.equal(results[0][1], results[1][1])


def test_compiled(logistics):
    image = torch.randint(256, (2, 3, 8, 8))
    z, x = torch.randn(2, 16, 8, 8), image.movedim(1, -1) / 127.5 - 1
    calls = [
        (logistics.OutputNet(), lambda model: model.nll(z, x)),
        (logistics.OutputNet(), lambda model: model.both(z.detach(), x)[1].detach()),
        (logistics.HierarchicalVAE(), lambda model: model.loss(image / 255)),
        (logistics.HierarchicalVAE(), lambda model: model(image / 255)[0].mean()),
    ]
    for model, call in calls:
        genperf.accelerate(model)
        results = []
        for run in (call, torch.compile(call, backend="eager", fullgraph=True)):
            torch.manual_seed(4)
            results.append(run(model))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
