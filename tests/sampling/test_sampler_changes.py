"""Weights and conditioning that change after compile; files, pickles and copies; the model stays as it is."""

import copy
import pickle

import pytest
import torch
from genperf_testing import idioms, models, naive
from torch import nn

from genperf import sampling
from genperf.nn import autoregressive as ar
from genperf.sampling import CaptureError, Scaled, heads
from genperf.sampling._model import fingerprint


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def step(model, rate=0.1):
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimiser.step()


def zero(model):
    """Weights that are 0 need no instructions."""
    step(model, 0.5)
    assert not any(p.any() for p in model.parameters())


def load(model):
    model.load_state_dict({n: t * 0.7 for n, t in model.state_dict().items()})


def data(model):
    for p in model.parameters():
        p.data.mul_(0.7)


def exchanged(model):
    """The same numbers in another order, behind the version counter's back."""
    weight = model.output_conv[-1].weight
    weight.data.copy_(weight.data.flip(1))


def replaced(model):
    model.output_conv[-1].weight = nn.Parameter(model.output_conv[-1].weight.detach() * 0.5)


@pytest.mark.parametrize("change", [step, zero, load, data, exchanged, replaced, lambda m: m.double()])
def test_changed_weights_are_noticed(change):
    tiny = models.tiny_model("gated_pixelcnn")
    sampler = naive.compiled(tiny)
    before = sampler.sample(2, seed=1)
    change(tiny.model)
    after = sampler.sample(2, seed=1)
    assert torch.equal(after, naive.compiled(tiny).sample(2, seed=1))
    if tiny.model.embedding.weight.dtype == torch.float32:
        assert not torch.equal(after, before)


def test_nothing_is_recorded_again_while_nothing_changes(monkeypatch):
    tiny = models.tiny_model("gated_pixelcnn_class")
    sampler = naive.compiled(tiny)
    cond = models.conditioning(tiny, 3, seed=5)
    cond["label"] = torch.tensor([2, 1, 2])
    expected = sampler.sample(3, seed=1, cond=cond)
    monkeypatch.setattr("genperf.sampling._recorded.capture", None)
    assert torch.equal(sampler.sample(3, seed=1, cond={"label": torch.tensor([2, 1, 2])}), expected)
    assert torch.equal(sampler.sample(1, seed=1, cond={"label": torch.tensor([2])}), expected[:1])
    assert torch.equal(sampler.sample(2, seed=1, cond={"label": torch.tensor([2, 1])}), expected[:2])
    cond["label"][0] = 3
    with pytest.raises(TypeError):
        sampler.sample(3, seed=1, cond=cond)


def test_rows_of_conditioning_are_forgotten_where_they_take_much_memory(monkeypatch):
    tiny = models.tiny_model("gated_pixelcnn_class")
    sampler, other = naive.compiled(tiny), naive.compiled(tiny)
    expected = {label: other.sample(2, seed=1, cond={"label": torch.tensor([label])}) for label in range(4)}
    monkeypatch.setattr("genperf.sampling._planned.MOST", 0)
    for label in (3, 1, 0, 2, 3):
        assert torch.equal(sampler.sample(2, seed=1, cond={"label": torch.tensor([label])}), expected[label])
        assert len(sampler._planned.table.numbers) == 1
    both = sampler.sample(2, seed=1, cond={"label": torch.tensor([1, 3])})
    assert torch.equal(both[0], expected[1][0])
    assert torch.equal(both[1], expected[3][1])


def test_conditioning_that_makes_another_plan():
    """Constants that are 0 may have no instruction; others have."""
    tiny = models.tiny_model("gated_pixelcnn_class")
    with torch.no_grad():
        for layer in tiny.model.layers:
            layer.class_cond_embedding.weight[0] = 0
            layer.class_cond_embedding.weight[1] = layer.class_cond_embedding.weight[2]
    sampler = naive.compiled(tiny, executor="reference")
    for labels in ([0], [1], [0, 2], [2, 0], [0, 3]):
        cond = {"label": torch.tensor(labels)}
        noise = heads.make_noise(sampler.program.head, torch.tensor([1, 0]), range(len(labels)))
        samples = sampler.sample(len(labels), noise=noise, cond=cond)
        naive.check(tiny, sampler.program.head, samples, noise, cond)


def test_refresh_sees_what_is_not_watched():
    tiny = models.tiny_model("gated_pixelcnn")
    sampler = naive.compiled(tiny)
    before = sampler.sample(2, seed=1)
    tiny.model.output_conv[1] = nn.Tanh()
    assert torch.equal(sampler.sample(2, seed=1), before)
    sampler.refresh()
    assert torch.equal(sampler.sample(2, seed=1), naive.compiled(tiny).sample(2, seed=1))


def test_another_number_of_classes_is_refused():
    tiny = models.tiny_model("gated_pixelcnn")
    sampler = naive.compiled(tiny)
    tiny.model.output_conv[2] = nn.Conv2d(10, 8, 1)
    with pytest.raises(CaptureError, match=r"8 parameters a pixel now, but head Categorical.*reads 9"):
        sampler.sample()


def test_a_model_put_into_training_and_changed_is_refused_by_name():
    tiny = models.tiny_model("pixelcnn_raw")
    sampler = naive.compiled(tiny)
    samples = sampler.sample(1, seed=1)
    tiny.model.train()
    assert torch.equal(sampler.sample(1, seed=1), samples)
    data(tiny.model)
    with pytest.raises(CaptureError, match=r"BatchNorm2d in training mode.*call model\.eval\(\)"):
        sampler.sample(1, seed=1)
    tiny.model.eval()
    assert torch.equal(sampler.sample(1, seed=1), naive.compiled(tiny).sample(1, seed=1))


def test_the_model_is_left_as_it_was():
    tiny = idioms.idiom("masked_in_place")
    model = tiny.model
    next(model.parameters()).requires_grad_(False)
    model[2].train()  # of a ReLU, which makes no difference
    model.calls = []
    model.register_forward_pre_hook(lambda m, _: m.calls.append(1))
    seen = fingerprint(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [(m.training, *(p.requires_grad for p in m.parameters())) for m in model.modules()]
    random = torch.get_rng_state()
    sampler = sampling.compile(model, tiny.shape, sampling.Categorical(5), feedback=Scaled())
    sampler.sample(2, seed=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert fingerprint(model) == seen
    assert flags == [(m.training, *(p.requires_grad for p in m.parameters())) for m in model.modules()]
    assert model.calls == []
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["gated_pixelcnn_class", "pixelcnnpp_grey", "pixelsnail"])
def test_the_callers_modes_make_no_difference(family):
    tiny = models.tiny_model(family)
    cond = models.conditioning(tiny, 2) or None
    expected = naive.compiled(tiny).sample(2, seed=1, cond=cond)
    with torch.inference_mode():
        sampler = naive.compiled(tiny)
        assert torch.equal(sampler.sample(2, seed=1, cond=cond), expected)
    sampler.refresh()
    assert torch.equal(sampler.sample(2, seed=1, cond=cond), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(naive.compiled(tiny).sample(2, seed=1, cond=cond), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_widened(dtype):
    tiny = models.tiny_model("gated_pixelcnn")
    sampler = naive.compiled(tiny._replace(model=tiny.model.to(dtype)))
    samples = sampler.sample(2, seed=1)
    assert torch.equal(samples, naive.compiled(tiny._replace(model=tiny.model.float())).sample(2, seed=1))


def test_the_fingerprint_sees_single_bits():
    model = nn.Linear(7, 9)
    model.register_buffer("count", torch.zeros(3, dtype=torch.int16))
    model.register_buffer("flag", torch.zeros((), dtype=torch.bool))
    model.register_buffer("phase", torch.zeros(5, dtype=torch.complex64)[1:])
    for name, tensor in model.state_dict().items():
        before = fingerprint(model)
        assert fingerprint(model) == before
        last = tensor.data.view(-1)[-1:]
        last.copy_(~last if tensor.dtype == torch.bool else last + 1)
        assert fingerprint(model) != before, name


@pytest.mark.parametrize("family", ["gated_pixelcnn_class", "pixelcnnpp_grey", "pixelsnail"])
def test_files(family, tmp_path):
    tiny = models.tiny_model(family)
    sampler = naive.compiled(tiny, images=3)
    sampler.save(tmp_path / "sampler.pt")
    loaded = sampling.Sampler.load(tmp_path / "sampler.pt")
    expected = sampler.sample(3, seed=1)
    assert torch.equal(loaded.sample(3, seed=1), expected)
    assert (loaded.shape, loaded.head, loaded.feedback) == (sampler.shape, sampler.head, sampler.feedback)
    assert loaded.probe_error == sampler.probe_error
    assert loaded.explain() == sampler.explain()
    with pytest.raises(RuntimeError, match="log_prob: this sampler was loaded without its model"):
        loaded.log_prob(expected)
    with pytest.raises(RuntimeError, match=r"give model to Sampler\.load"):
        loaded.refresh()
    loaded = sampling.Sampler.load(tmp_path / "sampler.pt", tiny.model)
    assert torch.equal(loaded.sample(3, seed=1), expected)
    assert torch.equal(loaded.log_prob(expected), sampler.log_prob(expected))
    data(tiny.model)
    assert torch.equal(loaded.sample(3, seed=1), sampler.sample(3, seed=1))


def test_a_loaded_sampler_draws_parts_of_the_conditioned_batch(tmp_path, monkeypatch):
    tiny = models.tiny_model("gated_pixelcnn_class")
    cond = models.conditioning(tiny, 5)
    sampler = naive.compiled(tiny, images=5)
    expected = sampler.sample(5, seed=1)
    sampler.save(tmp_path / "sampler.pt")
    loaded = sampling.Sampler.load(tmp_path / "sampler.pt")
    monkeypatch.setattr("genperf.sampling._memory.LIMIT", 2 * 4 * sampler.program.workspace)
    assert torch.equal(loaded.sample(5, seed=1), expected)
    with pytest.raises(RuntimeError, match="new conditioning"):
        loaded.sample(5, seed=1, cond={"label": (cond["label"] + 1) % 4})


def test_files_of_something_else_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"load: .*other\.pt is no file of genperf\.sampling, version 1"):
        sampling.Sampler.load(tmp_path / "other.pt")
    tiny = models.tiny_model("gated_pixelcnn")
    naive.compiled(tiny).save(tmp_path / "sampler.pt")
    other = ar.GatedPixelCNN(9, 6, 2, 0, hidden_dim=10).eval()
    with pytest.raises(CaptureError, match="compile it again"):
        sampling.Sampler.load(tmp_path / "sampler.pt", other).sample()


def test_copies_and_pickles():
    tiny = models.tiny_model("gated_pixelcnn_class")
    sampler = naive.compiled(tiny, images=2)
    expected = sampler.sample(2, seed=1)
    copied = copy.deepcopy(sampler)
    pickled = pickle.loads(pickle.dumps(sampler))
    data(tiny.model)
    assert torch.equal(pickled.sample(2, seed=1), expected)
    changed = sampler.sample(2, seed=1)
    assert not torch.equal(changed, expected)
    assert torch.equal(copied.sample(2, seed=1), changed)
    assert torch.equal(copied.log_prob(expected), sampler.log_prob(expected))
    assert copied.program.weights[0].data_ptr() != sampler.program.weights[0].data_ptr()
