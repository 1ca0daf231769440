"""The arguments of accelerate, its report, and verify."""

import pytest
import torch
from torch import nn

import genperf
from genperf.accelerate import Verification
from genperf.accelerate._noise import NoiseMismatch, NoiseTape


@pytest.fixture
def pair(models):
    torch.manual_seed(0)
    return nn.ModuleDict({"first": models.LinearVAE(), "second": models.LatentAutoencoder()})


def names(report):
    return {entry.name for entry in report.accelerated}


def test_only_and_exclude(pair):
    assert names(genperf.accelerate(pair)) == {"first", "second"}
    assert names(genperf.accelerate(pair, only="first")) == {"first"}
    assert names(genperf.accelerate(pair, only=["fir*", "second"])) == {"first", "second"}
    assert names(genperf.accelerate(pair, exclude="fir*")) == {"second"}
    assert names(genperf.accelerate(pair, only=lambda name, module: hasattr(module, "calls"))) == {"second"}
    assert names(genperf.accelerate(pair["first"], only="")) == {""}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("model",), {}, TypeError, r"model: str; expected a torch\.nn\.Module"),
        ((None,), {"mode": "train"}, ValueError, r"mode: 'train'; expected \"inference\" or \"training\""),
        ((None,), {"rng": "numpy"}, ValueError, r"rng: 'numpy'; expected \"torch\" or \"philox\""),
        ((None,), {"only": "third"}, ValueError, r"only: 'third' fits the name of no module"),
        ((None,), {"exclude": 3}, TypeError, r"exclude: int; expected a name pattern, a function or several"),
        ((None,), {"only": [3]}, TypeError, r"only: int; expected a name pattern or a function"),
    ],
)
def test_bad_input(pair, arguments, options, error, message):
    with pytest.raises(error, match=message):
        genperf.accelerate(*(pair if a is None else a for a in arguments), **options)


def test_report_prints_a_table(pair, models):
    pair["third"] = models.SquareRoot()
    text = str(genperf.accelerate(pair))
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["module", "what", "it", "was"]
    assert any(
        "LatentAutoencoder.encode: DiagonalGaussianDistribution" in line and "gaussian_sample" in line
        for line in lines
    )
    assert any(
        "SquareRoot.reparameterize" in line and "left alone: it does not give" in line for line in lines
    )
    assert lines[-1] == "4 accelerated, 1 left alone"
    assert str(genperf.accelerate(nn.Linear(1, 1))) == "Linear: nothing in it is known to genperf"
    with genperf.backend("reference"):
        assert {e.backend for e in genperf.accelerate(pair).accelerated} == {"reference"}


def test_strict_changes_nothing_when_it_raises(pair, models):
    pair["third"] = models.SquareRoot()
    classes = [type(m) for m in pair.modules()]
    with pytest.raises(RuntimeError, match=r"third: SquareRoot\.reparameterize"):
        genperf.accelerate(pair, strict=True)
    assert [type(m) for m in pair.modules()] == classes


@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize("name", ["LatentAutoencoder", "LinearVAE"])
def test_verify_compares_outputs_and_gradients(models, name, rng):
    torch.manual_seed(0)
    model = getattr(models, name)()
    x = torch.randn((2, 3, 64, 64) if name == "LatentAutoencoder" else (5, 12))
    state, grads = torch.get_rng_state(), [p.grad for p in model.parameters()]
    report = genperf.accelerate(model, mode="training", rng=rng)
    result = report.verify(x, seconds=0.05)
    assert isinstance(result, Verification)
    assert result
    assert {c.name for c in result.comparisons} == {
        "output[0]",
        "output[1]",
        "gradient of input[0]",
        *(f"gradient of {n}" for n, _ in model.named_parameters()),
    }
    assert result.speedup > 0
    assert result.timed == "forward + backward"
    assert "ok" in str(result)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.grad for p in model.parameters()] == grads
    assert x.grad is None


def test_verify_catches_a_wrong_sample_and_a_wrong_gradient(models, monkeypatch):
    from genperf.accelerate.patterns import reparameterize

    right = reparameterize.eager_sample
    x = torch.randn(300, 512)

    def verified(wrong, strict=False):
        model = models.LinearVAE(512, 256)
        report = genperf.accelerate(model, strict=strict)
        monkeypatch.setattr(reparameterize, "eager_sample", wrong)
        return report.verify(x, seconds=0)

    assert verified(right)
    shifted = verified(lambda mean, scale, noise, **k: (right(mean, scale, noise, **k)[0] * (1 + 1e-5), None))
    assert not shifted
    assert not shifted.comparisons[0].passed
    assert "FAILED" in str(shifted)
    cut = verified(lambda mean, scale, noise, **k: right(mean, scale.detach(), noise, **k))
    assert not cut
    assert all(c.passed for c in cut.comparisons if c.name.startswith("output"))
    other = verified(lambda mean, scale, noise, **k: right(mean, scale, torch.randn_like(noise), **k))
    assert not other
    assert "does not draw the same noise" in str(other)
    with pytest.raises(RuntimeError, match="does not agree with the original"):
        verified(lambda mean, scale, noise, **k: (mean, None), strict=True)


def test_verify_of_a_call(models):
    model = models.LatentAutoencoder()
    report = genperf.accelerate(model)

    def loss(model, x):
        posterior = model.encode(x)
        return {"kl": posterior.kl(), "mode": posterior.mode()}

    result = report.verify(torch.randn(2, 3, 8, 8), call=loss, seconds=0)
    assert result
    assert {"output.kl", "output.mode"} <= {c.name for c in result.comparisons}


def test_tape_replays_every_kind_of_draw_in_float64():
    def draw(dtype):
        x = torch.zeros(3, 4, dtype=dtype)
        return [
            torch.randn(2, 3),
            torch.randn_like(x),
            torch.rand_like(x),
            torch.empty_like(x).normal_(),
            torch.empty_like(x).exponential_(),
            torch.bernoulli(torch.full_like(x, 0.5)),
            torch.nn.functional.dropout(torch.ones_like(x), 0.5),
            torch.normal(torch.zeros_like(x), torch.ones_like(x)),
            torch.randperm(5),
            torch.ones(3).float(),
        ]

    tape = NoiseTape()
    with tape.record():
        recorded = draw(torch.float32)
    with tape.replay(in_float64=True):
        replayed = draw(torch.float64)
    assert torch.get_default_dtype() == torch.float32
    for a, b in zip(recorded, replayed, strict=True):
        assert b.dtype == (torch.float64 if a.is_floating_point() else a.dtype)
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=0)
    for match, run in (
        ("drawn after the 9 recorded draws", lambda: (draw(torch.float32), torch.randn(1))),
        ("8 of 9 recorded draws were not made", lambda: torch.randn(2, 3)),
        (r"draw 0: randn \(7,\), where randn \(2, 3\) was", lambda: torch.randn(7)),
    ):
        with pytest.raises(NoiseMismatch, match=match), tape.replay():
            run()


def test_tape_takes_the_place_of_keys():
    x = torch.zeros(3, 4, requires_grad=True)
    tape = NoiseTape()
    with tape.record():
        noise = torch.randn(3, 4)
    with tape.replay():
        z = genperf.ops.gaussian_sample(x, x, kl=False).z
        z.square().sum().backward()
    torch.testing.assert_close(z.detach(), noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, 2 * noise + noise * noise, rtol=1e-5, atol=1e-5)
