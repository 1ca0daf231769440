"""What cannot be right is refused, with the argument, its value and what was expected."""

import re

import pytest
import torch
from genperf_testing import idioms, models, naive
from torch import nn

from genperf import _backend, sampling
from genperf.sampling import CaptureError, CausalityError, Scaled, heads


@pytest.fixture(scope="module")
def sampler():
    return naive.compiled(models.tiny_model("gated_pixelcnn"))


@pytest.fixture(scope="module")
def mixture():
    return naive.compiled(models.tiny_model("pixelcnnpp_grey"))


@pytest.fixture(scope="module")
def conditioned():
    return naive.compiled(models.tiny_model("gated_pixelcnn_class"))


def noise(value=0.5, shape=(1, 7, 6, 1), dtype=torch.float32):
    return torch.full(shape, value, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch is 0, expected at least 1"),
        ({"batch": -3}, ValueError, "batch is -3, expected at least 1"),
        ({"batch": 1.5}, TypeError, "batch is 1.5, expected an integer"),
        ({"batch": True}, TypeError, "batch is True, expected an integer"),
        ({"temperature": 0}, ValueError, "temperature is 0, expected a finite number above 0"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0, expected a finite number above 0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf"),
        ({"temperature": "hot"}, TypeError, "temperature is 'hot', expected a number"),
        ({"top_k": -1}, ValueError, "top_k is -1, expected 1 to 9"),
        ({"top_k": 10}, ValueError, "top_k is 10, expected 1 to 9"),
        ({"top_k": 2.0}, TypeError, "top_k is 2.0, expected an integer"),
        ({"seed": 1.0}, TypeError, "seed is 1.0, expected an integer"),
        ({"seed": 1 << 64}, ValueError, "expected an integer of 64 bits"),
        ({"generator": 3}, TypeError, "generator is int, expected a torch.Generator"),
        ({"seed": 1, "noise": noise()}, ValueError, "noise and seed are given, expected one of them"),
        (
            {"noise": noise(dtype=torch.float64)},
            TypeError,
            "noise is torch.float64, expected a float32",
        ),
        ({"noise": 0.5}, TypeError, "noise is float, expected a float32 tensor"),
        ({"noise": noise(shape=(2, 7, 6, 1))}, ValueError, "(2, 7, 6, 1), expected (1, 7, 6, 1)"),
        ({"noise": noise(0.0)}, ValueError, "noise has 0.0, expected uniform numbers above 0 and up to 1"),
        ({"noise": noise(1.5)}, ValueError, "noise has 1.5, expected uniform numbers above 0 and up to 1"),
        ({"noise": noise(torch.nan)}, ValueError, "noise has nan"),
        ({"cond": {"label": torch.zeros(1)}}, ValueError, "cond has ['label'], expected nothing"),
        ({"distributed": True}, RuntimeError, "distributed is True, expected torch.distributed"),
    ],
)
def test_sample(sampler, no_process_group, options, error, message):
    with pytest.raises(error, match=f"^sample: .*{re.escape(message)}"):
        sampler.sample(**options)


@pytest.mark.parametrize(
    ("values", "known", "error", "message"),
    [
        (
            torch.full((1, 7, 6), 9),
            torch.ones(1, 7, 6) > 0,
            ValueError,
            "the known value 9, expected",
        ),
        (torch.full((1, 7, 6), -1), torch.ones(6) > 0, ValueError, "expected integers in 0 to 8"),
        (torch.full((1, 7, 6), 0.5), torch.ones(6) > 0, ValueError, "the known value 0.5, expected integers"),
        (torch.full((1, 7, 6), torch.nan), torch.ones(6) > 0, ValueError, "the known value nan"),
        (torch.zeros(7, 6), torch.ones(6) > 0, ValueError, "(7, 6), expected (2, 7, 6) or (1, 7, 6)"),
        (torch.zeros(3, 7, 6), torch.ones(6) > 0, ValueError, "shape (3, 7, 6), expected (2, 7, 6)"),
        (torch.zeros(1, 7, 6), torch.ones(7) > 0, ValueError, "shape (7,), expected one that broadcasts"),
        (torch.zeros(1, 7, 6), torch.ones(6), TypeError, "known of prefix is torch.float32, expected a bool"),
        (torch.zeros(1, 7, 6) > 0, torch.ones(6) > 0, TypeError, "values of prefix are torch.bool"),
        ([[0]], torch.ones(6) > 0, TypeError, "values of prefix are list, expected a tensor"),
    ],
)
def test_prefix(sampler, values, known, error, message):
    with pytest.raises(error, match=f"^sample: .*{re.escape(message)}"):
        sampler.sample(2, prefix=(values, known))


def test_prefix_alone(sampler, mixture):
    with pytest.raises(TypeError, match=r"prefix is no pair, expected \(values, known\)"):
        sampler.sample(prefix=torch.zeros(1, 7, 6))
    with pytest.raises(ValueError, match=r"known value 1\.5, expected numbers in -1 to 1"):
        mixture.sample(prefix=(torch.full((1, 1, 12, 8), 1.5), torch.ones(1, dtype=torch.bool)))


def test_top_k_needs_classes(mixture):
    with pytest.raises(ValueError, match="top_k is 3, expected 0 for a logistic_mixture head"):
        mixture.sample(top_k=3)


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        ({}, ValueError, "cond has nothing, expected ['label']"),
        ({"other": torch.zeros(1)}, ValueError, "cond has ['other'], expected ['label']"),
        ({"label": torch.zeros(2, dtype=torch.int64)}, ValueError, "shape (2,), expected (1 or 3)"),
        ({"label": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, "shape (1, 1), expected (1 or 3)"),
        ({"label": torch.zeros(1)}, TypeError, "cond['label'] is torch.float32, expected torch.int64"),
        ({"label": 3}, TypeError, "cond['label'] is int, expected a tensor"),
        ({"label": torch.tensor(3)}, ValueError, "shape (), expected one row an image"),
    ],
)
def test_cond(conditioned, cond, error, message):
    with pytest.raises(error, match=f"^sample: .*{re.escape(message)}"):
        conditioned.sample(3, cond=cond)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.full((1, 7, 6), 9), ValueError, "x has 9, expected integers in 0 to 8"),
        (torch.full((1, 7, 6), 0.5), ValueError, "x has 0.5, expected integers"),
        (torch.zeros(7, 6), ValueError, "x is (7, 6), expected a tensor [B, 7, 6]"),
        (torch.zeros(0, 7, 6), ValueError, "x is (0, 7, 6), expected"),
    ],
)
def test_log_prob(sampler, x, error, message):
    with pytest.raises(error, match=f"^log_prob: {re.escape(message)}"):
        sampler.log_prob(x)


def gated(**options):
    tiny = models.tiny_model("gated_pixelcnn")
    return sampling.compile(
        tiny.model, options.pop("shape", tiny.shape), options.pop("head", None), **options
    )


def raw(**options):
    tiny = models.tiny_model("pixelcnn_raw")
    return sampling.compile(
        tiny.model, options.pop("shape", tiny.shape), options.pop("head", None), **options
    )


FIVE = sampling.Categorical(5)


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (gated, {"shape": (0, 6)}, ValueError, "shape is (0, 6), expected (T,), (H, W) or (C, H, W)"),
        (gated, {"shape": (1, 1, 7, 6)}, ValueError, "shape is (1, 1, 7, 6), expected"),
        (gated, {"shape": 7}, ValueError, "shape is 7, expected"),
        (gated, {"head": 9}, TypeError, "head is 9, expected one of genperf.sampling.heads"),
        (gated, {"head": sampling.Categorical(8)}, ValueError, "9 parameters a pixel, but head Categorical"),
        (gated, {"head": sampling.Categorical(3, channels=3)}, ValueError, "with 1 values a pixel, but head"),
        (gated, {"feedback": "indices"}, TypeError, "feedback is 'indices', expected 'index', 'one_hot' or"),
        (gated, {"head": sampling.Gaussian(), "feedback": "index"}, ValueError, "expected Scaled for values"),
        (gated, {"head": sampling.Gaussian(), "feedback": "one_hot"}, ValueError, "no number of classes"),
        (
            gated,
            {"executor": "gpu"},
            ValueError,
            "executor is 'gpu', expected one of auto",
        ),
        (gated, {"executor": "cpu", "device": "meta"}, RuntimeError, "executor cpu cannot run on meta"),
        (gated, {"cond": {"a": torch.zeros(2), "b": torch.zeros(3)}}, ValueError, "of [2, 3] rows"),
        (raw, {}, ValueError, "feedback cannot be found: the model takes no int64 [B, 1, 6, 7]"),
        (raw, {"head": FIVE}, ValueError, "Give feedback: Scaled(1, 0) for the index as a float"),
        (raw, {"feedback": Scaled()}, ValueError, "head is None, expected one of genperf.sampling.heads"),
        (raw, {"head": sampling.Bernoulli(3)}, ValueError, "with 1 values a pixel, but head Bernoulli"),
    ],
)
def test_compile(build, options, error, message):
    with pytest.raises(error, match=f"^compile: .*{re.escape(message)}"):
        build(**options)


def test_a_call_that_fails_says_what_to_give():
    class Labelled(nn.Module):
        def forward(self, x, label):
            return x

    with pytest.raises(
        ValueError, match=r"missing 1 required positional argument: 'label'.*by cond and fixed"
    ):
        sampling.compile(Labelled(), (5, 6))
    message = r"cannot be called with torch\.float32 \[2, 6, 7\] .*shape is \(1, H, W\) where a model of grey"
    with pytest.raises(ValueError, match=message):
        sampling.compile(nn.Conv2d(1, 5, 3, padding=1), (6, 7), FIVE, feedback=Scaled())


def test_compile_takes_a_module():
    with pytest.raises(TypeError, match=r"compile: model is function, expected a torch\.nn\.Module"):
        sampling.compile(lambda x: x, (3, 3))


@pytest.mark.parametrize("name", idioms.NOT_CAUSAL + idioms.NOT_RECORDABLE)
def test_models_that_cannot_be_sampled(name):
    tiny = idioms.idiom(name)
    feedback = Scaled() if tiny.input == "raw" else None
    with pytest.raises((CaptureError, CausalityError), match=r"aten\.|depends on the values of its input"):
        sampling.compile(tiny.model, tiny.shape, sampling.Categorical(4), feedback=feedback)


class FunctionalDropout(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return nn.functional.dropout(self.inner(x), 0.3, self.training)


def test_dropout_by_a_function_is_named():
    tiny = models.tiny_model("gated_pixelcnn")
    model = nn.Sequential(FunctionalDropout(tiny.model))
    with pytest.raises(CaptureError, match=r"0: aten\.\w+ draws random numbers.*model\.eval\(\)"):
        sampling.compile(model.train(), tiny.shape)
    # In training mode, but with nothing in it for which that makes a difference:
    trained = sampling.compile(tiny.model.train(), tiny.shape).sample(2, seed=1)
    assert torch.equal(sampling.compile(model.eval(), tiny.shape).sample(2, seed=1), trained)


def test_too_little_memory_says_how_much_is_needed(sampler, monkeypatch):
    monkeypatch.setattr("genperf.sampling._memory.SMALL", 0)
    monkeypatch.setattr("genperf.sampling._memory.available", lambda device: 9000)
    message = (
        r"batch is 100: the plan needs \d+ bytes for an image.*9000 are free on cpu, where a batch of \d+"
    )
    with pytest.raises(MemoryError, match=message) as raised:
        sampler.sample(100)
    fits = int(re.search(r"a batch of (\d+) would fit", str(raised.value))[1])
    assert fits > 0
    sampler.sample(fits)
    with pytest.raises(MemoryError):
        sampler.sample(fits + 1)


def test_an_allocation_that_fails_says_how_much_is_needed(sampler, monkeypatch):
    def start(self, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")

    monkeypatch.setattr(type(sampler._prepared({}, range(1))), "start", start)
    with pytest.raises(MemoryError, match="batch is 2: the plan needs"):
        sampler.sample(2)


def test_a_backend_that_is_forced_runs_or_says_why_not(sampler):
    tiny = models.tiny_model("gated_pixelcnn")
    with _backend.backend("reference"):
        assert sampling.compile(tiny.model, tiny.shape).executor == "reference"
    with _backend.backend("triton"), pytest.raises(RuntimeError, match="no triton executor"):
        sampling.compile(tiny.model, tiny.shape)
    best = "reference" if _backend.native is None else "cpu"
    assert sampler.executor == best


def test_make_noise_is_what_a_seed_draws(sampler):
    drawn = sampler.sample(3, noise=heads.make_noise(sampler.program.head, torch.tensor([4, 0]), range(3)))
    assert torch.equal(sampler.sample(3, seed=4), drawn)
