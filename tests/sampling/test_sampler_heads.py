"""Every head, every way back into the model, every place of the channels; likelihoods; the plan in words."""

import math
from types import SimpleNamespace

import pytest
import torch
from genperf_testing import models, naive
from torch import nn

from genperf import _backend, sampling
from genperf.nn.autoregressive import MaskedConv2d
from genperf.sampling import (
    Bernoulli,
    Callback,
    CaptureError,
    Categorical,
    CausalityError,
    Gaussian,
    LogisticMixture,
    Scaled,
    _probe,
    heads,
)
from genperf.sampling._explain import work_by_instruction
from genperf.sampling._interface import Interface
from genperf.sampling._program import Conv

EXECUTORS = ["reference"] + ["cpu"] * (_backend.native is not None)
KEY = torch.tensor([3, 0])


class Net(nn.Module):
    """A masked convolution and a 1x1 one; ``before`` and ``after`` change the shapes."""

    def __init__(self, inputs, outputs, before=lambda x: x, after=lambda y: y):
        super().__init__()
        self.net = nn.Sequential(
            MaskedConv2d(inputs, 8, 3, mask_type="A"), nn.ELU(), nn.Conv2d(8, outputs, 1)
        )
        self.before, self.after = before, after
        models.randomise(self)

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def teacher_forced(sampler, model_input, samples, noise, known=None):
    """Every value of the samples is what a draw from the model's own output gives."""
    head, batch = sampler.program.head, len(samples)
    output = sampler._planned.recorded.model(model_input)
    params = sampler._interface.parameters(output, batch)[sampler._channels_last]
    pixels = naive.by_pixel(samples.float(), head)
    for pixel in range(pixels.shape[1]):
        for d in range(head.draws):
            u, p = noise.flatten(1, 2)[:, pixel], params[:, :, pixel].detach()
            wanted = heads.draw(head, p, u, index=d).float()
            sure = heads.margin(head, p, u, index=d) > naive.CERTAIN
            actual = pixels[sure, pixel, d : d + wanted.shape[1]]
            torch.testing.assert_close(actual, wanted[sure], rtol=1e-4, atol=1e-4)


CASES = {
    "bernoulli": (Net(1, 1), (1, 5, 6), Bernoulli(), None, lambda x: x.float()),
    "gaussian": (Net(1, 2), (1, 5, 6), Gaussian(), None, lambda x: x),
    "mixture": (Net(3, 40), (3, 5, 6), LogisticMixture(4), None, lambda x: x),
    "scaled": (Net(1, 6), (1, 5, 6), Categorical(6), Scaled(0.4, -1), lambda x: x * 0.4 - 1),
    "one_hot": (
        Net(6, 6), (5, 6), Categorical(6), "one_hot",
        lambda x: nn.functional.one_hot(x, 6).permute(0, 3, 1, 2).float(),
    ),
    "index with a channel": (Net(1, 6, lambda x: x.float()), (1, 5, 6), Categorical(6), None, lambda x: x),
    "index divided": (Net(1, 6, lambda x: x / 2.5 - 1), (1, 5, 6), Categorical(6), None, lambda x: x.float()),
    "floats without channels": (
        Net(1, 6, lambda x: x[:, None]), (5, 6), Categorical(6), Scaled(), lambda x: x.float()
    ),
    "a sequence of floats": (
        Net(1, 2, lambda x: x[:, None, None], lambda y: y[:, :, 0]), (9,), Gaussian(), None, lambda x: x
    ),
    "channels last": (
        Net(1, 6, after=lambda y: y.permute(0, 2, 3, 1)), (1, 5, 6), Categorical(6), Scaled(),
        lambda x: x.float(),
    ),
    "pixels in rows": (
        Net(1, 6, after=lambda y: y.permute(0, 2, 3, 1).reshape(-1, 6)), (1, 5, 6), Categorical(6), Scaled(),
        lambda x: x.float(),
    ),
    "as many channels as rows": (
        Net(1, 5, after=lambda y: y.permute(0, 2, 3, 1)), (1, 5, 5), Categorical(5), Scaled(),
        lambda x: x.float(),
    ),
    "a dict": (
        Net(1, 6, after=lambda y: {"shape": y.shape, "logits": y}), (1, 5, 6), Categorical(6), Scaled(),
        lambda x: x.float(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("case", CASES)
def test_samples_are_drawn_from_the_models_output(case, executor):
    model, shape, head, feedback, encode = CASES[case]
    sampler = sampling.compile(model, shape, head, feedback=feedback, executor=executor)
    assert sampler.probe_error < 1e-5
    noise = heads.make_noise(sampler.program.head, KEY, range(3))
    samples = sampler.sample(3, noise=noise)
    assert samples.shape == (3, *shape)
    assert samples.dtype == (torch.int64 if head.kind in (1, 2) else torch.float32)
    assert len(samples.unique()) > 1
    teacher_forced(sampler, encode(samples), samples, noise)


@pytest.mark.parametrize("case", CASES)
def test_log_prob(case):
    model, shape, head, feedback, encode = CASES[case]
    sampler = sampling.compile(model, shape, head, feedback=feedback)
    x = sampler.sample(3, seed=1)
    nats = sampler.log_prob(x)
    assert nats.shape == (3,)
    sampler.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    if not isinstance(head, Categorical):
        return
    logits = model(encode(x))
    logits = logits["logits"] if isinstance(logits, dict) else logits
    logits = logits.view(3, -1, head.classes) if sampler._channels_last else logits.flatten(2).transpose(1, 2)
    expected = -nn.functional.cross_entropy(logits.transpose(1, 2), x.flatten(1), reduction="none").sum(1)
    torch.testing.assert_close(nats, expected)


def test_log_prob_with_conditioning():
    tiny = models.tiny_model("gated_pixelcnn_class")
    sampler = naive.compiled(tiny, images=3)
    x = sampler.sample(3, seed=1)
    cond = models.conditioning(tiny, 3)
    logits = tiny.model(x, **cond)
    expected = -nn.functional.cross_entropy(logits, x, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(sampler.log_prob(x), expected)
    changed = {"label": (cond["label"] + 1) % 4}
    assert not torch.allclose(sampler.log_prob(x, changed), expected)
    one = sampler.log_prob(x, {"label": cond["label"][:1]})
    torch.testing.assert_close(one[0], expected[0])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_callback(executor):
    """A Gaussian of two channels, drawn by the caller."""
    model = Net(2, 4)

    def function(params, noise, draw):
        assert noise.shape == (len(params), 2)
        normal = (-2 * noise[:, 0].log()).sqrt() * (2 * math.pi * noise[:, 1]).cos()
        return params[:, draw] + params[:, 2 + draw].exp() * normal

    head = Callback(function, channels=2, draw_noises=2)
    sampler = sampling.compile(model, (2, 4, 5), head, executor=executor)
    noise = heads.make_noise(sampler.program.head, KEY, range(2))
    samples = sampler.sample(2, noise=noise)
    with torch.no_grad():
        params = model(samples)
    for y in range(4):
        for x in range(5):
            for d in range(2):
                wanted = function(params[:, :, y, x], noise[:, y, x, 2 * d : 2 * d + 2], d)
                torch.testing.assert_close(samples[:, d, y, x], wanted, rtol=1e-4, atol=1e-4)
    known = torch.zeros(2, 4, 5, dtype=torch.bool)
    known[0, 1] = True
    again = sampler.sample(2, noise=noise, prefix=(torch.full_like(samples, 0.25), known))
    assert (again[:, known] == 0.25).all()
    assert torch.equal(again[:, :, 0], samples[:, :, 0])
    with pytest.raises(TypeError, match="a callback head has no likelihood"):
        sampler.log_prob(samples)
    with pytest.raises(TypeError, match="expected one that is data"):
        sampler.save("/dev/null")
    with pytest.raises(ValueError, match="temperature is 2, expected 1 for a callback head"):
        sampler.sample(temperature=2)
    wrong = sampling.compile(model, (2, 4, 5), Callback(lambda p, n, d: p, 2))
    with pytest.raises(ValueError, match=r"the callback's function gave \(1, 4\), expected a tensor \[1\]"):
        wrong.sample()


def test_fixed_arguments_and_wrappers():
    class Shifted(Net):
        def forward(self, x, extra, flip=False):
            y = super().forward(x) + extra
            return -y if flip else y

    model = Shifted(1, 6)
    extra = torch.randn(6, 1, 1, generator=torch.Generator().manual_seed(0))
    options = {"feedback": Scaled(), "fixed": {"extra": extra, "flip": True}}
    sampler = sampling.compile(nn.DataParallel(model), (1, 5, 6), Categorical(6), **options)
    noise = heads.make_noise(sampler.program.head, KEY, range(2))
    samples = sampler.sample(2, noise=noise)
    sampler._planned.recorded.model = lambda x: model(x, extra, True)
    teacher_forced(sampler, samples.float(), samples, noise)


def test_progress(capsys):
    sampler = naive.compiled(models.tiny_model("gated_pixelcnn"))
    assert torch.equal(sampler.sample(2, seed=1, progress=True), sampler.sample(2, seed=1))
    assert "7/7" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gated_pixelcnn", "pixelcnnpp_grey", "pixelsnail"])
def test_explain(family):
    sampler = naive.compiled(models.tiny_model(family))
    text = sampler.explain(batch=16)
    assert f"{4 * sampler.program.workspace} bytes an image" in text
    assert f"executor {sampler.executor}" in text
    for role in set(sampler.plan.roles):
        assert f"\n{role} " in text
    assert "H100, batch 16:" in text
    assert "phases" in text
    flops = 0
    for index, _, _, cols in sampler.program.segments.tolist():
        i = sampler.program.instructions[index]
        if isinstance(i, Conv):
            flops += 2 * cols * (i.tap_end - i.tap_begin) * i.channels_in * i.channels
    works = zip(work_by_instruction(sampler.program), sampler.program.instructions, strict=True)
    assert sum(w.flops for w, i in works if isinstance(i, Conv)) == flops


def test_the_probe_sees_the_future():
    interface = Interface((1, 5, 6), Categorical(4), Scaled())
    net = Net(1, 4)

    values, slots = _probe.probes(interface)
    x = values.permute(0, 3, 1, 2)
    with torch.no_grad():
        seen = net(x)
        _probe.check_future(interface, seen, slots, 4)
        with pytest.raises(CausalityError, match="in a way that the recording missed"):
            _probe.check_future(interface, seen + 0.1 * x.sum((2, 3), keepdim=True), slots, 4)
        with pytest.raises(CausalityError, match=r"at pixel \(4, 5\) or before it"):
            _probe.check_future(interface, seen + (torch.arange(30) == 29).view(5, 6) * x, slots, 4)


def test_the_probe_sees_a_wrong_program():
    tiny = models.tiny_model("gated_pixelcnn")
    sampler = naive.compiled(tiny)
    own = sampler._prepared({}, range(1))
    executor = SimpleNamespace(program=own.program, start=own.start, run=own.run, params=own.params)

    values, _ = _probe.probes(sampler._interface)
    with torch.no_grad():
        output = tiny.model(values[..., 0].long())
    arguments = sampler._interface, executor, values[:1], output, 9
    assert _probe.compare(*arguments)[0] == sampler.probe_error
    executor.params = lambda state, slot: own.params(state, slot) + (slot == 41) * 0.01
    with pytest.raises(CaptureError, match="This is a fault of the capture"):
        _probe.compare(*arguments)
    assert sampling.compile(tiny.model, tiny.shape, probe=False).probe_error is None
