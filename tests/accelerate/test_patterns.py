"""Which modules are recognised, which are left alone, and that the recognised ones give eager's bits."""

import pytest
import torch

import genperf


def accelerated(model, **options):
    report = genperf.accelerate(model, **options)
    return {entry.was: entry for entry in report.accelerated}, {e.was: e.reason for e in report.left_alone}


@pytest.mark.parametrize(
    ("name", "was"),
    [
        ("LinearVAE", "LinearVAE.reparameterize(mean, logvar) -> z"),
        ("MeanInEval", "MeanInEval.reparameterize(mean, logvar) -> z; the mean in eval"),
        ("ScaleFirst", "ScaleFirst.reparametrize(logsigma, mean) -> z"),
        ("StdAndNoise", "StdAndNoise._sample_gauss(mean, std) -> (z, noise)"),
        ("Float32Noise", "Float32Noise.reparameterize(mean, logvar) -> z"),
    ],
)
@pytest.mark.parametrize("shape", [(5, 12), (300, 512)])
def test_conventions(models, name, was, shape):
    model = getattr(models, name)(shape[1], shape[1] // 2)
    x = torch.randn(shape)
    outputs = []
    for step in ("original", "accelerated"):
        if step == "accelerated":
            found, _ = accelerated(model)
            assert was in found
        for training in (True, False):
            model.train(training)
            torch.manual_seed(3)
            outputs.append(model(x)[0])
            outputs.append(torch.randn(1))
    assert all(torch.equal(a, b) for a, b in zip(outputs[:4], outputs[4:], strict=True))
    model.train()
    assert genperf.accelerate(model, rng="philox").verify(x, seconds=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SquareRoot", "bits of mean"),
        ("Tempered", "it reads temperature of its module"),
        ("Stores", "it stores mu on its module"),
        ("Detached", "gradient"),
        ("ManySamples", r"it takes \(self, mu, logvar, n=1\)"),
    ],
)
def test_left_alone_with_the_reason(models, name, reason):
    model = getattr(models, name)()
    _, refused = accelerated(model, exclude=None)
    assert reason.replace("\\", "") in refused[f"{name}.reparameterize"]
    with pytest.raises(
        RuntimeError, match=rf"strict, and left alone would be:\n  \(model\): {name}.*{reason}"
    ):
        genperf.accelerate(type(model)(), strict=True)


def test_a_method_set_on_the_instance_is_left_alone(models):
    model = models.LinearVAE()
    model.reparameterize = lambda mu, logvar: mu
    _, refused = accelerated(model)
    assert refused["LinearVAE.reparameterize"] == "it is set on the module itself"
    assert torch.equal(model.reparameterize(torch.ones(2), torch.ones(2)), torch.ones(2))


def test_unsupported_arguments_run_the_original(models):
    model = models.Float32Noise()
    genperf.accelerate(model)
    mu, logvar = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    torch.manual_seed(0)
    actual = model.reparameterize(mu, logvar=logvar)
    torch.manual_seed(0)
    assert torch.equal(actual, models.Float32Noise.reparameterize(model, mu, logvar))
    model = models.LinearVAE()
    genperf.accelerate(model)
    assert model.reparameterize(torch.zeros(3, 4), torch.zeros(4)).shape == (3, 4)


def test_a_posterior_of_another_definition_is_left_alone(models):
    _, refused = accelerated(models.ScaledAutoencoder())
    assert refused == {
        "ScaledAutoencoder.encode: ScaledGaussianDistribution": "its sample is not mean + std * randn"
    }


def test_probing_leaves_the_generator_and_the_module_as_they_were(models):
    model, other = models.MeanInEval().eval(), models.LatentAutoencoder()
    state = torch.get_rng_state()
    genperf.accelerate(model)
    genperf.accelerate(other)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


@pytest.mark.parametrize("shape", [(4, 6), (400, 300)])
def test_divergences(models, shape):
    model = models.Divergences()
    mu, log_var = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    expected = [getattr(model, name)(mu, log_var) for name in "abcde"]
    found, refused = accelerated(model)
    assert list(found) == ["Divergences.a, b, c, d: KL to N(0, 1)"]
    assert not refused
    for value, name in zip(expected, "abcde", strict=True):
        torch.testing.assert_close(getattr(model, name)(mu, log_var), value, rtol=1e-12, atol=1e-12)


def test_other_sums_are_not_taken_for_the_divergence(models):
    assert accelerated(models.NotTheDivergence()) == ({}, {})


def test_rewritten_source_must_be_what_is_running(models):
    from genperf.accelerate._rewrite import CannotRewrite, recompile

    namespace = {"torch": torch}
    exec("def f(x):\n    return x + 1\n", namespace)
    with pytest.raises(CannotRewrite, match="source of f is not available"):
        recompile(namespace["f"], {})
    moved = type(recompile)(
        models.logged.__code__.replace(co_firstlineno=models.Divergences.a.__code__.co_firstlineno),
        vars(models),
    )
    with pytest.raises(CannotRewrite, match="is not what is running"):
        recompile(moved, {})


def test_rewriting_keeps_super_defaults_and_private_names():
    from genperf.accelerate._rewrite import recompile

    class Base:
        def f(self, x):
            return x

    class Child(Base):
        __secret = 3

        def f(self, x, *, y=2):
            return super().f(x) + y + self.__secret + unknown()  # noqa: F821

    function = recompile(Child.f, {"unknown": lambda: 10})
    assert function(Child(), 1) == 16
    assert function.__qualname__ == Child.f.__qualname__
    assert function.__kwdefaults__ == {"y": 2}
