"""The pattern of methods that call torch.nn.functional.gumbel_softmax."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import gumbel_softmax

import genperf
from genperf.accelerate import _distribution_targets


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch):
    """Where torch is as fast, the kernel is tested all the same."""
    for rng in ("torch", "philox"):
        monkeypatch.setitem(_distribution_targets._FEWEST_GUMBEL, rng, 0)


class DiscreteVAE(nn.Module):
    """Categorical latent variables, as AntixK's and many others'."""

    def __init__(self, latent=8, classes=20):
        super().__init__()
        self.shape = latent, classes
        self.encoder = nn.Linear(32, latent * classes)
        self.decoder = nn.Linear(latent * classes, 32)
        self.temperature = 0.7

    def forward(self, x):
        logits = self.encoder(x).view(-1, *self.shape)
        z = F.gumbel_softmax(logits, tau=self.temperature, hard=not self.training)
        return self.decoder(z.flatten(1)), logits

    def draw(self, logits, hard=False):
        return gumbel_softmax(logits, self.temperature, hard, dim=1) + nn.functional.gumbel_softmax(logits)


class Own(nn.Module):
    """Calls something else of that name."""

    def gumbel_softmax(self, x):
        return x

    def forward(self, x):
        return self.gumbel_softmax(x)


class Quantizer(nn.Module):
    """A codebook, whose logits gumbel_quantize does not take."""

    def __init__(self):
        super().__init__()
        self.proj, self.embed = nn.Conv2d(4, 16, 1), nn.Embedding(16, 6)

    def forward(self, z):
        one_hot = F.gumbel_softmax(2 * self.proj(z), dim=1, hard=True)
        return torch.einsum("bnhw,nd->bdhw", one_hot, self.embed.weight)


def test_discrete_autoencoder():
    model = DiscreteVAE()
    x = torch.randn(64, 32)
    logits = torch.randn(64, 8, 20)
    expected = []
    for step in range(2):
        if step:
            report = genperf.accelerate(model, mode="training")
        for training in (True, False):
            model.train(training)
            torch.manual_seed(0)
            expected.append((model(x)[0], model.draw(logits), model.draw(logits, True), torch.randn(1)))
    assert {entry.was: entry.kernel for entry in report.entries} == {
        "DiscreteVAE.forward: gumbel_softmax": "gumbel_softmax",
        "DiscreteVAE.draw: gumbel_softmax": "gumbel_softmax",
    }
    for a, b in zip(expected[:2], expected[2:], strict=True):
        for theirs, ours in zip(a, b, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for training in (True, False):
        assert report.verify(x, call=lambda m, x, t=training: m.train(t)(x), seconds=0)
    other = DiscreteVAE()
    assert genperf.accelerate(other, rng="philox").verify(x, seconds=0)
    drawn = other.draw(logits, hard=True)
    assert drawn.shape == logits.shape
    assert drawn.isfinite().all()
    report.restore()
    assert type(model) is DiscreteVAE


def test_what_is_not_covered_runs_torch():
    model = DiscreteVAE()
    genperf.accelerate(model)
    model.temperature = torch.tensor(0.5, requires_grad=True)
    model(torch.randn(4, 32))[0].sum().backward()
    assert model.temperature.grad is not None
    model.temperature = 0.5
    with pytest.raises(IndexError, match="Dimension out of range"):  # torch's own message
        model.draw(torch.zeros(3))
    assert not genperf.accelerate(Own()).entries


def test_a_quantizer_that_is_not_taken_whole():
    model = Quantizer()
    report = genperf.accelerate(model)
    assert [entry.was for entry in report.accelerated] == ["Quantizer.forward: gumbel_softmax"]
    assert [entry.was for entry in report.left_alone] == ["Quantizer.forward"]
    assert report.verify(torch.randn(4, 4, 16, 16), seconds=0)
