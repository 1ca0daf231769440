"""Each layer of a flow: invertible, with the log-determinant of its Jacobian."""

import copy
import pickle

import pytest
import torch
from genperf_testing.flows import EagerStep, same_parameters, trained
from torch import nn

from genperf.nn.flows import (
    ActNorm,
    AffineCoupling,
    GlowStep,
    InvertibleConv1x1,
    Split,
    Squeeze,
    Unsqueeze,
    ZeroConv2d,
)

LAYERS = {
    "actnorm": lambda: ActNorm(4),
    "dense": lambda: InvertibleConv1x1(4),
    "plu": lambda: InvertibleConv1x1(4, "plu"),
    "coupling": lambda: AffineCoupling(4, ZeroConv2d(2, 4)),
    "first": lambda: AffineCoupling(4, ZeroConv2d(2, 4), transformed="first", layout="interleaved"),
    "odd": lambda: AffineCoupling(5, ZeroConv2d(2, 6)),
    "additive": lambda: AffineCoupling(4, ZeroConv2d(2, 2), scale="additive"),
    "squeeze": Squeeze,
    "unsqueeze": Unsqueeze,
    "step": lambda: GlowStep(4, hidden=8),
    "step, plu": lambda: GlowStep(4, hidden=8, permutation="plu"),
    "step, coupling first": lambda: GlowStep(4, hidden=8, order="coupling-actnorm-conv"),
    "step, exp": lambda: GlowStep(4, hidden=8, scale="exp", transformed="first"),
    "step, additive": lambda: GlowStep(5, hidden=8, scale="additive"),
}


def make(name):
    torch.manual_seed(0)
    return trained(LAYERS[name]()).double()


def image(name, batch=2):
    channels = 5 if name in ("odd", "step, additive") else 4
    return torch.randn(batch, channels, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAYERS)
def test_inverse(name):
    layer, x = make(name), image(name)
    z, logdet = layer(x)
    back, logdet_back = layer.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-11, atol=1e-11)
    assert logdet.shape == (2,)


@pytest.mark.parametrize("name", LAYERS)
def test_logdet_is_that_of_the_jacobian(name):
    layer, x = make(name), image(name)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0][0], x[0])
    expected = torch.linalg.slogdet(jacobian.reshape(x[0].numel(), -1)).logabsdet
    torch.testing.assert_close(layer(x)[1][0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name):
    layer, x = make(name), image(name).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())

    def run(x, *given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-7, fast_mode=name.startswith("step"))


def test_step_is_the_eager_step():
    torch.manual_seed(0)
    step = trained(GlowStep(6, hidden=8)).double()
    eager = EagerStep(6, 8).double()
    with torch.no_grad():
        for theirs, ours in same_parameters(eager, step):
            theirs.copy_(ours.view(theirs.shape))
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    for got, expected in zip(step(x), eager(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_split():
    split = trained(Split(4)).double()
    x = image("split")
    (first, noise), logdet = split(x)
    mean, log_std = split.prior(x[:, :2]).chunk(2, 1)
    torch.testing.assert_close(noise, (x[:, 2:] - mean) * (-log_std).exp(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logdet, -log_std.sum((1, 2, 3)), rtol=1e-12, atol=1e-12)
    assert torch.equal(first, x[:, :2])
    back, logdet_back = split.inverse(first, noise)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-12, atol=1e-12)


def test_squeeze_order():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    z, _ = Squeeze()(x)
    for c in range(3):
        for row in range(2):
            for col in range(2):
                assert torch.equal(z[:, 4 * c + 2 * row + col], x[:, c, row::2, col::2])


def test_zero_convolution_pads_with_ones():
    conv = trained(ZeroConv2d(3, 4)).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=1.0)
    expected = nn.functional.conv2d(padded, conv.weight, conv.bias) * (3 * conv.scale).exp()[:, None, None]
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *conv.parameters()]
    grads = [torch.autograd.grad(y.sin().sum(), leaves) for y in (conv(x), expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    other = ZeroConv2d(3, 4, pad_value=0)
    other.load_state_dict(conv.state_dict())
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    expected = nn.functional.conv2d(padded, conv.weight, conv.bias) * (3 * conv.scale).exp()[:, None, None]
    torch.testing.assert_close(other.double()(x), expected, rtol=1e-12, atol=1e-12)


def batch(seed=0, shift=3.0):
    return shift + 2 * torch.randn(16, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [ActNorm(4), GlowStep(4, hidden=8)], ids=["actnorm", "step"])
def test_first_batch_initialises(layer):
    layer = copy.deepcopy(layer)
    norm = layer if isinstance(layer, ActNorm) else layer.actnorm
    layer(batch())
    z, _ = norm(batch())
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(4), rtol=1e-5, atol=0)
    before = norm.shift.clone()
    layer(batch(1, shift=-2.0))
    assert torch.equal(norm.shift, before)


def test_initialisation_is_saved():
    first, second = ActNorm(4), ActNorm(4)
    first(batch())
    second.load_state_dict(first.state_dict())
    for layer in (second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        torch.testing.assert_close(layer.eval()(batch(1))[0], first(batch(1))[0], rtol=0, atol=0)
        layer.train()(batch(2, shift=-5.0))
        assert torch.equal(layer.shift, first.shift)
    first.load_state_dict(ActNorm(4).state_dict())  # back to where nothing is initialised
    first(batch(3, shift=7.0))
    assert not torch.equal(first.shift, second.shift)


@pytest.mark.parametrize("layer", [ActNorm(4), GlowStep(4, hidden=8)], ids=["actnorm", "step"])
def test_uninitialised(layer):
    layer = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="not initialised"):
        layer.inverse(batch())  # a latent is no data, in training mode neither
    layer.eval()
    with pytest.raises(RuntimeError, match="not initialised"):
        layer(batch())
    layer.train()
    for bad in (torch.full((2, 4, 3, 5), float("nan")), torch.empty(0, 4, 3, 5)):
        with pytest.raises(ValueError, match="empty or not finite"):
            layer(bad)
    layer(batch())


def test_bad_input():
    x = torch.randn(2, 4, 4, 4)
    for call, match in (
        (lambda: ActNorm(0), "channels"),
        (lambda: trained(ActNorm(3))(x), "3 channels"),
        (lambda: InvertibleConv1x1(4, "lu"), "permutation"),
        (lambda: InvertibleConv1x1(3)(x), r"weight has shape \(3, 3\)"),
        (lambda: AffineCoupling(1, nn.Identity()), "channels"),
        (lambda: AffineCoupling(4, nn.Identity(), transformed="third"), "transformed"),
        (lambda: AffineCoupling(6, nn.Identity())(x), "6 channels"),
        (lambda: AffineCoupling(4, nn.Identity())(x), "h has shape"),
        (lambda: GlowStep(4, order="conv"), "order"),
        (lambda: GlowStep(True), "channels"),
        (lambda: Squeeze()(x[:, :, :3]), "even H and W"),
        (lambda: Squeeze()(x[..., :3]), "even H and W"),
        (lambda: Squeeze().inverse(x[:, :3]), "4 C"),
        (lambda: Split(3), "even"),
        (lambda: Split(6)(x), "6 channels"),
        (lambda: Split(4).inverse(x, x), "2 channels"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="float16"):
        InvertibleConv1x1(4).half()(x.half())


def test_singular_weight():
    conv = InvertibleConv1x1(4)
    with torch.no_grad():
        conv.weight[1] = 0
    x = torch.randn(2, 4, 3, 3)
    z, logdet = conv(x)
    assert z.isfinite().all()
    assert (logdet == -torch.inf).all()
    assert conv.inverse(z)[0].isnan().all()
