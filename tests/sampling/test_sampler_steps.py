"""Draws by the caller, one after another, and the range of values that a model can be run on."""

import pytest
import torch
from genperf_testing import models
from torch import nn

from genperf import _backend
from genperf.nn.autoregressive import MaskedConv2d
from genperf.sampling import Callback, Categorical, Scaled, compile

EXECUTORS = ["reference"] + ["cpu"] * (_backend.native is not None)


class Net(nn.Module):
    """Levels 0 to 4 of one channel, with labels; it cannot be run on others."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(MaskedConv2d(1, 8, 3, mask_type="A"), nn.ELU(), nn.Conv2d(8, 5, 1))
        self.label = nn.Embedding(3, 5)
        models.randomise(self)

    def forward(self, x, label):
        self.cost = nn.functional.nll_loss(torch.zeros(len(x), 5, *x.shape[2:]), x[:, 0].long())
        return self.net(x) + self.label(label)[:, :, None, None]


def largest(params, noise, draw):
    return params.argmax(1).float()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_loop_of_steps_is_the_callback(executor):
    net, label = Net(), torch.tensor([2, 0, 1])
    head = Callback(largest, draw_noises=0, span=(0.0, 4.0))
    sampler = compile(net, (1, 4, 6), head, cond={"label": label[:1]}, feedback=Scaled(), executor=executor)
    steps = sampler.steps(3, {"label": label})
    assert (steps.slot, steps.slots) == (0, 24)
    drawn = []
    while steps.slot < steps.slots:
        params = steps.params()
        assert params.shape == (3, 5)
        drawn.append(params.argmax(1))
        steps.feed(drawn[-1])
    found = torch.stack(drawn, 1).view(3, 1, 4, 6).float()
    assert torch.equal(found, sampler.sample(3, cond={"label": label}))
    assert torch.equal(found[:, 0].long(), net(found, label).argmax(1))
    with torch.no_grad():
        net.net[2].weight.neg_()
    again = sampler.steps(3, {"label": label})
    torch.testing.assert_close(again.params(), net(torch.zeros(3, 1, 4, 6), label)[:, :, 0, 0])


def test_bad_arguments():
    net = Net()
    cond = {"label": torch.tensor([1])}
    with pytest.raises(ValueError, match="Target -1 is out of bounds"):  # at random values
        compile(net, (1, 4, 6), Callback(largest), cond=cond, feedback=Scaled())
    for span in ((1.0, 1.0), (2.0, 1.0), (1.0,)):
        with pytest.raises(
            ValueError, match=r"Callback: span is .*, expected two numbers, the lower one first"
        ):
            Callback(largest, span=span)
    sampler = compile(net, (1, 4, 6), Categorical(5), cond=cond, feedback=Scaled())
    with pytest.raises(TypeError, match=r"steps: head is Categorical.*, expected a Callback"):
        sampler.steps(2)
    sampler = compile(net, (1, 4, 6), Callback(largest, span=(0, 4)), cond=cond, feedback=Scaled())
    with pytest.raises(ValueError, match="sample: batch is 0"):
        sampler.steps(0)
    with pytest.raises(ValueError, match=r"steps: cond has nothing, expected \['label'\]"):
        sampler.steps(2, {})
