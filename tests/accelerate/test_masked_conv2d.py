"""accelerate on the masked convolutions of PixelCNN repositories, in the ways in which these are written."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import genperf
from genperf.nn import autoregressive


class Conv(nn.Conv2d):
    """A causal mask in a buffer, and no forward of its own."""

    def __init__(self, ins=4, outs=6, kernel=5, kind="B", **options):
        super().__init__(ins, outs, kernel, padding=kernel // 2, **options)
        mask = torch.ones_like(self.weight.data)
        mask[:, :, kernel // 2, kernel // 2 + (kind == "B") :] = 0
        mask[:, :, kernel // 2 + 1 :] = 0
        self.register_buffer("mask", mask)


class InPlace(Conv):
    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


class InPlaceExplicitSuper(Conv):
    def forward(self, inputs):
        self.weight.data.mul_(self.mask)
        return super(InPlaceExplicitSuper, self).forward(inputs)  # noqa: UP008


class NoGrad(Conv):
    def forward(self, x):
        with torch.no_grad():
            self.weight *= self.mask
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Product(Conv):
    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding, self.dilation)


class ConvForward(Conv):
    def forward(self, x):
        return self._conv_forward(x, self.mask * self.weight, self.bias)


class MaskParameter(Conv):
    def __init__(self, **options):
        super().__init__(**options)
        mask = self.mask[:1, :1]
        del self.mask
        self.allowed = nn.Parameter(mask, requires_grad=False)

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.allowed, self.bias)


IN_PLACE = (InPlace, InPlaceExplicitSuper, NoGrad)
CLASSES = (*IN_PLACE, Product, ConvForward, MaskParameter)


def _step(model, x, steps=3):
    """Training with momentum and a clipped norm: the losses, gradients and state."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
    return seen + [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kind": "A", "kernel": 3}], ids=str)
def test_training_goes_on_as_before(cls, options):
    torch.manual_seed(3)
    original = nn.Sequential(cls(**options))
    model = copy.deepcopy(original)
    report = genperf.accelerate(model, mode="training", strict=True)
    (entry,) = report.entries
    assert (entry.kernel, entry.backend) == ("masked_conv2d", "cpu")
    x = torch.randn(2, 4, 9, 8)
    for actual, expected in zip(_step(model, x), _step(original, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("cls", IN_PLACE)
def test_weights_are_zeroed_in_place_as_before(cls):
    layer = cls()
    genperf.accelerate(layer)
    assert (layer.weight[layer.mask == 0] != 0).any()
    layer(torch.randn(1, 4, 6, 6)).sum().backward()
    assert (layer.weight[layer.mask == 0] == 0).all()
    assert (layer.weight.grad[layer.mask == 0] != 0).any()


def test_the_kernel_runs_and_is_taken_back():
    model = nn.Sequential(Conv(), InPlace(ins=6))
    keys, x = list(model.state_dict()), torch.randn(2, 4, 9, 8)
    report = genperf.accelerate(model)
    assert [c.operator for c in genperf.explain(model, x).choices] == ["masked_conv2d"]
    assert list(model.state_dict()) == keys
    assert isinstance(model[1], InPlace)
    assert type(pickle.loads(pickle.dumps(model))[1]) is InPlace
    assert report.verify(x)
    report.restore()
    assert type(model[1]) is InPlace
    assert genperf.explain(model, x).choices == []


def test_own_models():
    model = autoregressive.PixelCNN(classes=5, channels=6, layers=2, kernel_size=5).eval()
    convolutions = [m for m in model.modules() if isinstance(m, autoregressive.MaskedConv2d)]
    report = genperf.accelerate(model)
    spatial = [m for m in convolutions if m.mask.mean() < 0.85]
    assert len([e for e in report.entries if e.kernel == "masked_conv2d"]) == len(spatial) > 0


def test_masks_by_channel():
    torch.manual_seed(0)
    layer = autoregressive.MaskedConv2d(6, 9, 3, mask_type="B", data_channels=3)
    x = torch.randn(2, 6, 7, 8)
    expected = layer(x)
    genperf.accelerate(layer, strict=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("data_channels", [1, 3])
def test_module(kind, data_channels):
    """genperf.nn.MaskedConv2d gives what the plain class gives, and loads its state."""
    options = {"mask_type": kind, "data_channels": data_channels, "dilation": 2}
    plain = autoregressive.MaskedConv2d(6, 9, 3, **options)
    ours = genperf.nn.MaskedConv2d(6, 9, 3, **options)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 7, 8)
    results = []
    for layer in (plain, ours):
        image = x.clone().requires_grad_()
        y = layer(image)
        y.square().sum().backward()
        results.append([y.detach(), image.grad, layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert [c.operator for c in genperf.explain(ours, x).choices] == ["masked_conv2d"]
    assert genperf.accelerate(ours).entries == []


def test_module_under_autocast_transforms_and_in_float64():
    layer = genperf.nn.MaskedConv2d(4, 4, 3, mask_type="B")
    plain = autoregressive.MaskedConv2d(4, 4, 3, mask_type="B")
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(torch.vmap(layer)(x[None]), torch.vmap(plain)(x[None]))
    assert torch.equal(layer.double()(x.double()), plain.double()(x.double()))


class Scaled(Conv):
    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask * 2, self.bias)


class Counting(Conv):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class OnlyInTraining(Conv):
    def forward(self, x):
        if self.training:
            self.weight.data *= self.mask
        return super().forward(x)


class Normalised(Conv):
    def forward(self, x):
        self.weight.data *= self.mask / 2
        return super().forward(x)


class Above(InPlace):
    def forward(self, x):
        return super().forward(x)


class TwoMasks(Product):
    def __init__(self):
        super().__init__()
        self.register_buffer("other", self.mask.clone())


class Replacing(Conv):
    def forward(self, x):
        self.weight = nn.Parameter(self.weight * self.mask)
        return super().forward(x)


def _dense():
    layer = Product()
    layer.mask.fill_(1)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scaled, "does not give the convolution"),
        (Counting, "it uses calls of its module|in a way that is not known"),
        (OnlyInTraining, "it uses training of its module"),
        (Normalised, "otherwise than by the mask"),
        (Above, "calls that of another class"),
        (TwoMasks, "may all be its mask"),
        (Replacing, "it replaces its weight"),
        (_dense, "nothing would be gained"),
        (lambda: Product(ins=4, outs=4, groups=2), "2 groups"),
        (lambda: Product(padding_mode="circular"), "circular"),
        (lambda: Product().double(), "no kernel for torch.float64"),
        (lambda: Product().to("meta"), "meta device"),
        (lambda: nn.utils.weight_norm(Product()), "computed"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_left_alone(layer, reason):
    module = layer()
    cls, state = type(module), {k: v.clone() for k, v in module.state_dict().items()}
    (entry,) = genperf.accelerate(module).entries
    assert not entry.kernel
    assert re.search(reason, entry.reason), entry.reason
    assert type(module) is cls
    for key, value in module.state_dict().items():
        assert value.is_meta or torch.equal(value, state[key]), key


def test_not_recognised():
    assert genperf.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), Conv())).entries == []
