"""genperf.accelerate.distributions: what it covers gives what torch gives, where and as long as it is to."""

import threading

import pytest
import torch
import torch.distributions.kl as kl_module
import torch.nn.functional as F
from torch.distributions import (
    Categorical,
    Independent,
    LogNormal,
    Normal,
    RelaxedOneHotCategorical,
    kl_divergence,
)

import genperf
from genperf.accelerate import _distribution_targets

distributions = genperf.accelerate.distributions
CLASSES = (Normal, Categorical, RelaxedOneHotCategorical)


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch):
    """Where torch is as fast, the kernels are tested all the same."""
    for name in ("_FEWEST_RELAXED", "_FEWEST_GUMBEL"):
        for rng in ("torch", "philox"):
            monkeypatch.setitem(getattr(_distribution_targets, name), rng, 1 << 12)


@pytest.fixture(autouse=True)
def nothing_stays():
    """The classes are what they were, whatever a test did."""
    before = [dict(vars(cls)) for cls in CLASSES], F.gumbel_softmax, kl_module._KL_REGISTRY[Normal, Normal]
    yield
    after = [dict(vars(cls)) for cls in CLASSES], F.gumbel_softmax, kl_module._KL_REGISTRY[Normal, Normal]
    assert before == after
    assert before[2] in (kl_module._KL_MEMOIZE.get((Normal, Normal)), kl_module._kl_normal_normal)


def normal(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    loc, scale = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return Normal(loc.requires_grad_(), scale.abs().add(0.1).requires_grad_())


def both(run, rng="torch"):
    """What a function gives without and with an override, each with the state of the generator afterwards."""
    results = []
    for override in (None, distributions(rng)):
        torch.manual_seed(3)
        if override is None:
            results.append((run(), torch.get_rng_state()))
        else:
            with override:
                results.append((run(), torch.get_rng_state()))
    return *results[0], *results[1], override


SAMPLES = {
    "many": lambda: normal(40, 600).rsample(),
    "few": lambda: normal(3, 5).rsample(),
    "sample_shape": lambda: normal(1, 300).rsample((4, 50)),
    "expanded": lambda: normal(300).expand((100, 300)).rsample(torch.Size([2])),
    "without a gradient": lambda: normal(200, 300).sample([2]),
    "Independent": lambda: Independent(normal(40, 600), 1).rsample(),
    "LogNormal": lambda: LogNormal(torch.zeros(30000), torch.ones(30000)).sample(),
    "float64": lambda: normal(200, 300, dtype=torch.float64).rsample(),
    "bfloat16": lambda: normal(200, 300, dtype=torch.bfloat16).rsample(),
    "relaxed": lambda: RelaxedOneHotCategorical(torch.tensor(0.5), logits=normal(30, 200).loc).rsample(),
    "relaxed, probs": lambda: RelaxedOneHotCategorical(2.0, probs=torch.rand(8, 40)).sample((20,)),
    "gumbel": lambda: F.gumbel_softmax(normal(30, 200).loc, 0.5, dim=0),
    "gumbel, hard": lambda: F.gumbel_softmax(normal(30, 200).loc, tau=2, hard=True),
    "categorical": lambda: Categorical(logits=normal(30, 200).loc).sample(),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_draws_of_torch(name):
    expected, state, actual, after, override = both(SAMPLES[name])
    assert (expected.shape, expected.dtype, expected.requires_grad) == (
        actual.shape,
        actual.dtype,
        actual.requires_grad,
    )
    assert torch.equal(state, after)
    if "relaxed" in name or "gumbel" in name:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
    if name in ("few", "categorical"):
        assert sum(override.left.values()) == 1
        assert not override.covered
    else:
        assert sum(override.covered.values()) == 1, override


@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize(
    "run",
    [
        lambda a, b: Normal(a, b.exp()).rsample(),
        lambda a, b: F.gumbel_softmax(a, 0.7, hard=True) * b,
        lambda a, b: RelaxedOneHotCategorical(torch.tensor(0.7), logits=a).rsample() * b,
    ],
)
def test_gradients(run, rng):
    tensors = [torch.randn(300, 300, dtype=torch.float64).requires_grad_() for _ in range(2)]
    weight = torch.randn(300, 300)

    def once():
        y = run(*tensors)
        return y, *torch.autograd.grad((y * weight).sum(), tensors, allow_unused=True)

    expected, _, actual, _, override = both(once, rng)
    assert override.covered
    if rng == "torch":
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    else:
        assert all(x is None or x.isfinite().all() for x in actual)
        assert not torch.equal(actual[0], expected[0])


def test_divergence():
    p, q = normal(700, 400), normal(400)
    tensors = (p.loc, p.scale, q.loc, q.scale)

    def once():
        kl = kl_divergence(p, q)
        return kl, *torch.autograd.grad(kl.square().sum(), tensors)

    expected, _, actual, _, override = both(once)
    assert override.covered == {"kl_divergence(Normal, Normal)": 1}
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5 * a.abs().max().item())
    half = Normal(torch.zeros(1 << 18, dtype=torch.float16), torch.ones(1 << 18, dtype=torch.float16))
    expected, _, actual, _, override = both(lambda: kl_divergence(Independent(half, 1), Independent(half, 1)))
    assert actual.dtype == expected.dtype
    assert override.covered
    with distributions():
        assert kl_divergence(LogNormal(0.0, 1.0), LogNormal(1.0, 1.0)) == 0.5
        with pytest.raises(NotImplementedError):
            kl_divergence(p, Categorical(logits=torch.zeros(3)))


def test_categorical():
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()
    with distributions("philox") as report:
        for c in (Categorical(logits=logits), Categorical(probs=logits.exp())):
            drawn = c.expand((20000,)).sample()
            assert drawn.dtype == torch.int64
            counts = drawn.bincount(minlength=4)
            assert counts[1] == 0
            expected = 20000 * logits.exp()
            chi_square = ((counts - expected).square() / expected)[[0, 2, 3]].sum()
            assert chi_square < 20
            assert c.sample().shape == ()
            assert c.sample((1, 1)).shape == (1, 1)
            assert c.sample((5,)).shape == (5,)
        unchecked = Categorical(probs=torch.rand(1000, 4), validate_args=False)
        unchecked.sample()
        unchecked.probs[700] = 0
        with pytest.raises(RuntimeError):  # torch.multinomial's own
            unchecked.sample()
    assert report.left["Categorical.sample", "a row with nothing to choose from"] == 1
    assert report.left["Categorical.sample", "fewer than 2048 elements"] == 6
    assert "categorical_sample" in str(report)
    probs = torch.rand(300, 50).requires_grad_()
    value = torch.randint(50, (4, 300))

    def once():
        log_prob = Categorical(probs=probs).log_prob(value)
        return log_prob, *torch.autograd.grad(log_prob.sum(), probs)

    expected, _, actual, _, override = both(once)
    assert torch.equal(expected[0], actual[0])
    torch.testing.assert_close(expected[1], actual[1])
    assert override.covered["Categorical.log_prob"] == 1


def test_errors_are_those_of_torch():
    p = normal(100, 300)
    with distributions():
        with pytest.raises(ValueError, match="Expected parameter scale"):
            Normal(torch.zeros(3), -torch.ones(3))
        with pytest.raises(RuntimeError, match=r"normal expects all elements of std >= 0\.0"):
            Normal(p.loc, -p.scale, validate_args=False).sample()
        with pytest.raises(ValueError, match="within the support"):
            Categorical(probs=torch.ones(2, 3)).log_prob(torch.tensor([0, 7]))
        with pytest.raises(TypeError):
            p.rsample((2.5,))
        with pytest.raises(TypeError):
            p.rsample(shape=(2,))
        with pytest.warns(UserWarning, match="deprecated"):
            F.gumbel_softmax(p.loc, eps=1e-3)
    with pytest.raises(ValueError, match='rng: \'cuda\'; expected "torch" or "philox"'):
        distributions("cuda")


class Shifted(Normal):
    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return super().rsample(sample_shape) + 1


def test_subclasses_run_what_they_inherit():
    with distributions("philox") as report:
        dist = Shifted(torch.zeros(100000), torch.ones(100000))
        assert dist.rsample().mean() > 0.9
        dist.sample()
        kl_divergence(dist, dist)
    assert not report.covered
    assert not report.left


def test_scopes():
    p = normal(100, 300)
    original = Normal.rsample
    outer, inner = distributions(), distributions("philox")
    with outer:
        p.rsample()
        with inner:
            p.sample()
            with pytest.raises(KeyError), outer:
                {}[p.rsample()]
            p.sample()
        p.rsample()
        assert Normal.rsample is not original
    assert Normal.rsample is original
    assert outer.covered == {"Normal.rsample": 3}
    assert inner.covered == {"Normal.sample": 2}
    p.rsample()
    assert outer.covered == {"Normal.rsample": 3}


def test_installed_for_all_threads_and_entered_for_one():
    p = normal(100, 300)

    def elsewhere():
        thread = threading.Thread(target=p.sample)
        thread.start()
        thread.join()

    one, everywhere = distributions(), distributions("philox")
    with one:
        elsewhere()
        assert not one.covered
        assert everywhere.install() is everywhere
        elsewhere()
        p.sample()
    p.sample()
    everywhere.restore()
    everywhere.restore()
    p.sample()
    assert one.covered == {"Normal.sample": 1}
    assert everywhere.covered == {"Normal.sample": 2}

    overrides = [distributions() for _ in range(4)]

    def work(override):
        for _ in range(50):
            with override:
                p.sample()

    threads = [threading.Thread(target=work, args=(override,)) for override in overrides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [override.covered["Normal.sample"] for override in overrides] == [50] * 4


def test_what_was_patched_by_others_stays():
    p, original = normal(100, 300), Normal.sample
    try:
        with distributions():
            covering = Normal.sample
            Normal.sample = lambda self: covering(self) + 100
        assert p.sample().mean() > 90  # theirs, over what now runs the original
        with distributions() as report:
            assert p.sample().mean() > 90
            assert "other code has replaced it" in str(report)
    finally:
        Normal.sample = original


def test_compiled_code_and_transforms_run_the_original():
    p = normal(100, 300)
    compiled = torch.compile(lambda: p.sample(), backend="eager", fullgraph=True)
    with distributions("philox") as report:
        compiled()
        assert not report.covered
        torch.func.vmap(lambda loc: Normal(loc, 1.0).rsample(), randomness="same")(torch.ones(2, 20000))
        assert report.left == {("Normal.rsample", "inside of a transform of torch.func"): 1}
        with torch.autocast("cpu", torch.bfloat16):
            p.rsample()
        assert report.left["Normal.rsample", "autocast"] == 1
