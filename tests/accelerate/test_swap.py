"""What a swapped module keeps: everything but its speed."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import genperf
from genperf.accelerate import Report

NAMES = ["LatentAutoencoder", "LinearVAE"]


def build(models, name):
    torch.manual_seed(0)
    model = getattr(models, name)()
    shape = (2, 3, 64, 64) if name == "LatentAutoencoder" else (5, 12)
    return model, torch.randn(shape)


def seeded(model, x):
    torch.manual_seed(7)
    return model(x)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.fixture(params=NAMES)
def case(request, models):
    model, x = build(models, request.param)
    return model, x, seeded(model, x)


def test_reconstruction_is_bit_identical_and_restorable(case):
    model, x, before = case
    cls = type(model)
    report = genperf.accelerate(model)
    assert type(model) is not cls
    after = seeded(model, x)
    assert torch.equal(after[0], before[0])
    assert_same(after, before)
    report.restore()
    assert type(model) is cls
    assert all(torch.equal(a, b) for a, b in zip(seeded(model, x), before, strict=True))
    report.restore()


def test_identity_of_the_module_is_kept(case):
    model, _, _ = case
    cls, keys, text = type(model), list(model.state_dict()), repr(model)
    attributes = dict(model.__dict__)
    genperf.accelerate(model)
    assert isinstance(model, cls)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert (type(model).__name__, type(model).__qualname__, type(model).__module__) == (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    assert type(model).__doc__ == cls.__doc__
    assert model.__dict__ == attributes
    model.load_state_dict(model.state_dict())


def test_deepcopy_stays_accelerated(case):
    model, x, before = case
    genperf.accelerate(model)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert_same(seeded(twin, x), before)
    pairs = zip(twin.parameters(), model.parameters(), strict=True)
    assert all(a is not b and torch.equal(a, b) for a, b in pairs)
    shared = nn.ModuleList([model, model])
    both = copy.deepcopy(shared)
    assert both[0] is both[1]


def test_pickle_is_of_the_original_class(case):
    model, x, before = case
    cls = type(model)
    genperf.accelerate(model)
    data = pickle.dumps(model)
    assert b"genperf" not in data
    assert type(pickle.loads(data)) is cls
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is cls
    assert all(torch.equal(a, b) for a, b in zip(seeded(loaded, x), before, strict=True))


def test_hooks_keep_running(case):
    model, x, before = case
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append("before"))
    genperf.accelerate(model)
    model.register_forward_pre_hook(lambda module, inputs: seen.append("after"))
    assert_same(seeded(model, x), before)
    assert seen == ["after", "before"]


def test_decorators_keep_running(models):
    model, x = build(models, "LatentAutoencoder")
    genperf.accelerate(model)
    model(x)
    assert model.calls == 1
    posterior = model.encode(x)
    assert isinstance(posterior, models.DiagonalGaussianDistribution)
    assert isinstance(posterior, genperf.nn.DiagonalGaussian)
    assert type(pickle.loads(pickle.dumps(posterior))) is models.DiagonalGaussianDistribution


def test_globals_stay_those_of_the_library(models):
    model, _ = build(models, "LatentAutoencoder")
    genperf.accelerate(model)
    function = type(model).__dict__["encode"].__wrapped__
    assert function.__globals__ is vars(models)
    assert function.__code__.co_filename == models.__file__


def test_data_parallel_replica(case):
    model, x, before = case
    genperf.accelerate(model)
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)
    wrapped = nn.DataParallel(model)
    assert_same(seeded(wrapped, x), before)


@pytest.fixture(scope="session")
def wrap(process_group):
    """DistributedDataParallel; what was wrapped is kept until the group's end."""

    def wrap(model):
        process_group.append(nn.parallel.DistributedDataParallel(model))
        return process_group[-1]

    return wrap


def test_distributed_data_parallel(case, wrap):
    model, x, before = case
    wrapped = wrap(model)
    report = genperf.accelerate(wrapped, mode="training")
    assert report.accelerated
    assert all(entry.name.startswith("module") for entry in report.accelerated)
    output = seeded(wrapped, x)
    assert_same(output, before)
    sum(value.sum() for value in output).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    assert report.verify(x, seconds=0)
    report.restore()
    model.zero_grad()
    sum(value.sum() for value in seeded(wrapped, x)).backward()
    for a, b in zip(gradients, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiles_without_a_graph_break(case):
    model, x, before = case
    genperf.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(seeded(compiled, x), before)


def test_a_compiled_model_is_accelerated_inside(case):
    model, x, before = case
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(seeded(compiled, x), before)
    cls = type(model)
    report = genperf.accelerate(compiled)
    assert type(model) is not cls
    assert_same(seeded(compiled, x), before)
    assert report.verify(x, seconds=0)
    report.restore()
    assert type(model) is cls


def test_accelerating_again_changes_the_options(case):
    model, _, _ = case
    cls = type(model)
    first = genperf.accelerate(model)
    accelerated = type(model)
    again = genperf.accelerate(model)
    assert type(model) is accelerated
    assert again.entries == first.entries
    genperf.accelerate(model, rng="philox")
    assert type(model) is not accelerated
    assert type(model).__mro__[1] is cls
    genperf.accelerate(model)
    assert type(model) is accelerated
    again.restore()
    assert type(model) is cls


def test_a_class_changed_afterwards_is_not_restored_over(models):
    model, _ = build(models, "LinearVAE")
    report = genperf.accelerate(model)
    accelerated = type(model)
    model.__class__ = type("Parametrized", (accelerated,), {})
    with pytest.raises(RuntimeError, match="changed again after accelerate"):
        report.restore()
    assert "changed again" in genperf.accelerate(model).entries[0].reason
    model.__class__ = accelerated
    report.restore()


def test_own_deepcopy_and_getstate_are_respected(models):
    class Own(models.LinearVAE):
        def __deepcopy__(self, memo):
            twin = Own()
            twin.load_state_dict(self.state_dict())
            twin.copied = True
            return twin

    model = Own()
    genperf.accelerate(model)
    twin = copy.deepcopy(model)
    assert twin.copied
    assert type(twin) is type(model)


@pytest.mark.parametrize(
    "imports",
    [
        "import genperf; f = genperf.accelerate",
        "from genperf.accelerate import Report; import genperf; f = genperf.accelerate",
        "from genperf import accelerate as f; import genperf.accelerate",
        "import genperf; genperf.accelerate; import genperf.accelerate; f = genperf.accelerate",
    ],
)
def test_callable_in_every_order_of_imports(imports):
    code = f"{imports}\nfrom torch import nn\nprint(type(f(nn.Linear(1, 1))).__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == Report.__name__
