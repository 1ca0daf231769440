"""Loops over pixels: the same integers, the same state of the generator, and what is left alone."""

import copy
import gc
import io
import pickle
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

import genperf
from genperf.accelerate._swap import _kept
from genperf.sampling import Categorical, Sampler


def drawn(model, *args, seed=3, **kwargs):
    """What the model's loop gives, and the state that it leaves the generator in."""
    torch.manual_seed(seed)
    method = model.generate if hasattr(model, "generate") else model.sample
    result = method(*args, **kwargs)
    return (result if isinstance(result, tuple) else (result,)), torch.get_rng_state()


def assert_equal(found, expected):
    (a, state), (b, wanted) = found, expected
    assert len(a) == len(b)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(state, wanted)


def counted(model, network, *args, **kwargs):
    """How often a run of the loop calls a module of the model; warnings are errors."""
    module, calls = model.get_submodule(network), 0
    forward = type(module).forward

    def count(self, *inputs):
        nonlocal calls
        calls += 1
        return forward(self, *inputs)

    cls = type("Counting", (type(module),), {"forward": count})
    before, module.__class__ = type(module), cls
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawn(model, *args, **kwargs)
    finally:
        module.__class__ = before
    return calls


LABELS = torch.tensor([1, 4, 0])
CASES = {
    "Codes": ("Codes", (), [((LABELS,), {"shape": (7, 7), "batch_size": 3}), ((LABELS[:1], (6, 6), 1), {})]),
    "Colours": (
        "Colours",
        (),
        [(((3, 5, 7), 2), {"device": "cpu"}), (((3, 4, 4), 3, 7, "cpu"), {}), (((3, 4, 4), 1, 2, "cpu"), {})],
    ),
    "Bits": ("Bits", (), [((), {}), ((3,), {"height": 5, "width": 9}), ((1, 8, 4), {})]),
    "dict": ("Named", ("dict",), [((3,), {})]),
    "tuple": ("Named", ("tuple",), [((3,), {})]),
    "Warm": ("Warm", (), [((3,), {}), ((2, 0.6), {}), ((2,), {"temperature": 2.0})]),
    "AllChannels": ("AllChannels", (), [((2,), {}), ((3,), {})]),
}


def build(loops, name):
    cls, options, _ = CASES[name]
    torch.manual_seed(0)
    return loops.randomised(getattr(loops, cls)(*options))


@pytest.mark.parametrize("name", CASES)
def test_the_same_integers(loops, name):
    model, runs = build(loops, name), CASES[name][2]
    expected = [drawn(model, *args, **kwargs) for args, kwargs in runs]
    state, keys, random = dict(model.__dict__), list(model.state_dict()), torch.get_rng_state()
    weights = [v.clone() for v in model.state_dict().values()]
    report = genperf.accelerate(model, exclude="?*")
    (entry,) = report.entries
    assert (entry.kernel, entry.backend) == ("pixel_sampler", "cpu"), entry.reason
    assert torch.equal(torch.get_rng_state(), random)
    assert model.__dict__ == state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for (args, kwargs), wanted in zip(runs, expected, strict=True):
                assert_equal(drawn(model, *args, **kwargs), wanted)
    assert list(model.state_dict()) == keys
    if name != "Codes":  # which masks its weights in place
        assert all(torch.equal(a, b) for a, b in zip(weights, model.state_dict().values(), strict=True))
    report.restore()
    assert_equal(drawn(model, *runs[0][0], **runs[0][1]), expected[0])
    assert model not in _kept


def test_the_network_is_not_called_for_each_pixel(loops):
    model = build(loops, "Bits")
    assert counted(model, "net", 2, 6, 6) == 36
    report = genperf.accelerate(model, exclude="?*")
    counted(model, "net", 2, 6, 6)
    assert counted(model, "net", 2, 6, 6) == 0
    report.restore()
    assert counted(model, "net", 2, 6, 6) == 36


def test_with_accelerated_convolutions(loops):
    model = build(loops, "Bits")
    expected = drawn(model, 3)
    report = genperf.accelerate(model)
    assert {e.kernel for e in report.accelerated} == {"pixel_sampler", "masked_conv2d"}
    assert_equal(drawn(model, 3), expected)
    assert all(type(m) is not loops.Masked for m in model.net.layers if isinstance(m, loops.Masked))


def test_changed_weights(loops):
    model, twin = build(loops, "Codes"), build(loops, "Codes")
    genperf.accelerate(model)
    args = (LABELS, (6, 6), 3)
    assert_equal(drawn(model, *args), drawn(twin, *args))
    for change in (
        lambda m: m.layers[1].horiz_resid.weight.data.mul_(-2),
        lambda m: m.load_state_dict({k: v.flip(0) for k, v in m.state_dict().items()}),
        lambda m: setattr(m.embedding, "weight", nn.Parameter(m.embedding.weight.detach() * 3)),
    ):
        before = drawn(twin, *args)
        change(model)
        change(twin)
        expected = drawn(twin, *args)
        assert not torch.equal(expected[0][0], before[0][0])
        assert_equal(drawn(model, *args), expected)
    assert_equal(drawn(model, LABELS.flip(0), (6, 6), 3), drawn(twin, LABELS.flip(0), (6, 6), 3))


def test_copies_and_pickles(loops):
    model = build(loops, "Codes")
    args = (LABELS, (6, 6), 3)
    expected = drawn(model, *args)
    genperf.accelerate(model)
    drawn(model, *args)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert_equal(drawn(twin, *args), expected)
    data = pickle.dumps(model)
    assert b"genperf.accelerate" not in data
    loaded = pickle.loads(data)
    assert type(loaded) is loops.Codes
    assert_equal(drawn(loaded, *args), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    with torch.no_grad():
        twin.output_conv[2].bias += 5 * torch.randn(7)
    assert not torch.equal(drawn(twin, *args)[0][0], expected[0][0])
    assert_equal(drawn(model, *args), expected)


def test_nothing_keeps_the_model_alive(loops):
    model = build(loops, "Codes")
    genperf.accelerate(model)
    drawn(model, LABELS, (6, 6), 3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_few_plans_are_kept(loops):
    model = build(loops, "Bits")
    genperf.accelerate(model)
    for width in range(4, 11):
        drawn(model, 1, 3, width)
    assert len(_kept[model]) == 4


def test_hooks_run_at_each_call(loops):
    model = build(loops, "Bits")
    expected = drawn(model, 2)
    genperf.accelerate(model)
    seen = []
    handle = model.net.last.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(RuntimeWarning, match="last has hooks"):
        assert_equal(drawn(model, 2), expected)
    assert len(seen) == 36
    assert "has hooks" in genperf.accelerate(model).left_alone[0].reason
    handle.remove()
    genperf.accelerate(model)
    assert_equal(drawn(model, 2), expected)
    assert len(seen) == 36


def test_training_mode_stays_what_it_was(loops):
    model = loops.randomised(loops.Bits(norm=True)).train()
    twin = copy.deepcopy(model)
    report = genperf.accelerate(model, exclude="?*")
    assert report.entries[0].was == "Bits.sample: self.net for each pixel; needs self.net.eval()"
    with pytest.warns(RuntimeWarning, match="BatchNorm2d in training mode looks at the whole batch"):
        found = drawn(model, 3)
    assert_equal(found, drawn(twin, 3))
    assert torch.equal(model.net.layers[4].running_mean, twin.net.layers[4].running_mean)
    model.eval()
    assert counted(model, "net", 3) > 0
    assert counted(model, "net", 3) == 0
    assert_equal(drawn(model, 3), drawn(twin.eval(), 3))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Columns", "otherwise than pixel by pixel|perhaps it reads"),
        ("Sees", r"CausalityError: .*layers\.2"),
        ("Scales", "output is written to"),
        ("Peeks", "perhaps it reads the output at later pixels"),
        ("Tracks", "its result requires a gradient"),
        ("Asks", "takes mood, whose meaning is not known"),
        ("Twice", "one network goes into another"),
    ],
)
def test_left_alone(loops, name, reason):
    torch.manual_seed(0)
    model = loops.randomised(getattr(loops, name)())
    report = genperf.accelerate(model, exclude="?*")
    (entry,) = report.entries
    assert not entry.kernel
    assert re.search(reason, entry.reason), entry.reason
    assert type(model) is getattr(loops, name)


def test_set_on_the_module_itself(loops):
    model = build(loops, "Bits")
    model.sample = lambda: 3
    assert genperf.accelerate(model, exclude="?*").entries[0].reason == "it is set on the module itself"
    assert model.sample() == 3


def test_without_source(loops):
    space = {"loops": loops, "torch": torch, "__name__": "typed"}
    exec(
        "class Typed(loops.Bits):\n    def sample(self, n=2):\n        return torch.bernoulli(torch.rand(n))",
        space,
    )
    (entry,) = genperf.accelerate(space["Typed"](), exclude="?*").entries
    assert entry.reason == "the source of Typed.sample is not available"


def test_not_recognised(loops):
    assert genperf.accelerate(loops.Once()).entries == []


def test_arguments_that_are_not_known_run_the_original(loops):
    model = build(loops, "Warm")
    start = torch.zeros(1, 1, 6, 6)
    start[0, 0, 2:4, 1:5] = 2.0
    expected = drawn(model, 1, start=start)
    genperf.accelerate(model)
    assert_equal(drawn(model, 1, start=start), expected)
    with pytest.raises(TypeError, match="unexpected keyword"):
        model.sample(2, colour=3)


def test_errors_are_those_of_the_loop(loops):
    model = build(loops, "Codes")
    genperf.accelerate(model)
    for args in ((torch.tensor([9, 9]), (5, 5), 2), (LABELS, (5, 5), 2), (None, (5, 5), 2)):
        with pytest.raises((IndexError, RuntimeError, TypeError, ValueError)) as expected:
            loops.Codes.generate(model, *args)
        with pytest.warns(RuntimeWarning, match="runs as it was"), pytest.raises(type(expected.value)):
            model.generate(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(LABELS[:2], (5, 5), 2)


def test_a_loop_that_fails_begins_again_with_the_same_numbers(loops):
    model = build(loops, "Bits")
    expected = drawn(model, 2)
    genperf.accelerate(model)
    with pytest.MonkeyPatch.context() as patch:
        calls = iter(range(100))

        def broken(p):
            if next(calls) == 7:
                raise RuntimeError("probability is NaN")
            return bernoulli(p)

        bernoulli = torch.bernoulli
        patch.setattr(torch, "bernoulli", broken)
        with pytest.warns(RuntimeWarning, match="Bits.sample runs as it was: pixel by pixel it raises"):
            assert_equal(drawn(model, 2), expected)
    with pytest.warns(RuntimeWarning, match="pixel by pixel it raises"):
        assert_equal(drawn(model, 2), expected)


@pytest.mark.parametrize("name", ["Codes", "Colours"])
def test_philox(loops, name):
    model = build(loops, name)
    original = copy.deepcopy(model)
    (entry,) = genperf.accelerate(model, exclude="?*", rng="philox").entries
    assert entry.kernel == "pixel_sampler, one call"
    args = (LABELS, (6, 6), 3) if name == "Codes" else ((3, 6, 5), 3, 2, "cpu")
    ((found,), _), ((expected,), _) = drawn(model, *args), drawn(original, *args)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert set(found.unique().tolist()) <= set(
        torch.linspace(0, 1, 5).tolist() if name == "Colours" else range(7)
    )
    assert torch.equal(found, drawn(model, *args)[0][0])
    assert not torch.equal(found, drawn(model, *args, seed=4)[0][0])
    (plan,) = _kept[model].values()
    assert isinstance(plan.sampler, Sampler)
    assert plan.sampler.head == (
        Categorical(7) if name == "Codes" else Categorical(5, channels=3, class_dim=1)
    )


def test_philox_draws_from_the_same_distribution(loops):
    model = build(loops, "Codes")
    label = torch.zeros(4000, dtype=torch.int64)
    with torch.no_grad():
        p = model(torch.zeros(1, 2, 2, dtype=torch.int64), label[:1])[0, :, 0, 0].softmax(0)
    genperf.accelerate(model, rng="philox")
    torch.manual_seed(0)
    codes = model.generate(label, (2, 2), 4000)
    counts = codes[:, 0, 0].bincount(minlength=7).double()
    expected = 4000 * p.double()
    assert ((counts - expected).square() / expected).sum() < 22.5  # 0.1 % of chi-square with 6 degrees


def test_philox_leaves_the_loop_where_it_does_more(loops):
    warm, bits = build(loops, "Warm"), build(loops, "Bits")
    expected = drawn(warm, 2, temperature=0.5), drawn(bits, 2)
    (entry,) = genperf.accelerate(warm, exclude="?*", rng="philox").entries
    assert entry.kernel == "pixel_sampler, one call"
    assert not torch.equal(drawn(warm, 2)[0][0], drawn(warm, 2, seed=4)[0][0])
    assert_equal(drawn(warm, 2, temperature=0.5), expected[0])  # of which one call knows nothing
    (entry,) = genperf.accelerate(bits, exclude="?*", rng="philox").entries
    assert entry.kernel == "pixel_sampler"
    assert_equal(drawn(bits, 2), expected[1])


def test_strict(loops):
    with pytest.raises(RuntimeError, match=r"Scales\.sample: self\.net for each pixel"):
        genperf.accelerate(loops.randomised(loops.Scales()), strict=True)
