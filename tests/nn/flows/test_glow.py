"""The whole model: densities, samples, state."""

import copy
import math

import pytest
import torch
from genperf_testing.flows import trained
from torch.utils._python_dispatch import TorchDispatchMode

from genperf.nn.flows import Captured, CouplingNet, Glow, ReversibleSequence, dequantize


def glow(shape=(3, 8, 8), levels=2, steps=2, hidden=8, **options):
    torch.manual_seed(0)
    model = trained(Glow(shape, levels, steps, hidden, **options))
    torch.nn.init.normal_(model.prior, 0, 0.2)
    return model


def images(n=4, shape=(3, 8, 8), seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) - 0.5


@pytest.mark.parametrize("permutation", ["dense", "plu"])
def test_inverse(permutation):
    model = glow(levels=3, permutation=permutation).double()
    x = images().double()
    latents, logdet = model(x)
    assert [t.shape[1:] for t in latents] == [(6, 4, 4), (12, 2, 2), (48, 1, 1)]
    back, logdet_back = model.inverse(latents)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-10, atol=1e-10)


def test_log_prob_is_the_density():
    model = glow((1, 4, 4)).double().eval()
    x = images(1, (1, 4, 4)).double()

    def flat(x):
        return torch.cat([t.flatten() for t in model(x.view(1, 1, 4, 4))[0]])

    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    noise = flat(x.flatten())
    expected = (
        torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum() + torch.linalg.slogdet(jacobian).logabsdet
    )
    torch.testing.assert_close(model.log_prob(x)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reversible", [True, False])
def test_classes(reversible):
    model = glow(classes=3, reversible=reversible).double()
    x, labels = images().double(), torch.tensor([0, 2, 2, 1])
    torch.testing.assert_close(model.inverse(model(x, labels)[0], labels)[0], x, rtol=1e-10, atol=1e-10)
    densities = model.log_prob(x, labels)
    assert not torch.allclose(densities, model.log_prob(x, (labels + 1) % 3))
    densities.sum().backward()
    assert (model.prior.grad.abs().sum(1) > 0).all()
    # What the last level adds to the logarithm: a normal density for each class.
    (_, last), _ = model(x, labels)
    raw = copy.deepcopy(model)
    torch.nn.init.zeros_(raw.prior)
    (_, before), _ = raw(x, labels)
    mean, log_std = model.prior[labels][:, :, None, None].chunk(2, 1)
    torch.testing.assert_close(last, (before - mean) * (-log_std).exp())


def test_gradients_are_those_of_autograd():
    found = []
    model = glow(classes=2).double()
    for reversible in (True, False):
        for level in model.levels:
            level.reversible = reversible
        loss = model.bits_per_dim(images().double(), torch.tensor([0, 1, 1, 0])).mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = Glow((1, 4, 4), levels=2, steps=2, hidden=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = (torch.randn(64, 1, 1, 1) + 0.1 * torch.randn(64, 1, 4, 4)) / 4
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = -model.log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 5


def test_samples():
    model = glow(classes=2).eval()
    labels = torch.tensor([0, 1, 1])
    key = torch.tensor([[5, 0], [6, 0], [7, 0]])
    drawn = model.sample(3, 0.7, labels, key=key)
    assert drawn.shape == (3, 3, 8, 8)
    assert not drawn.requires_grad
    for i in range(3):  # each by its own key
        alone = model.sample(1, 0.7, labels[i : i + 1], key=key[i : i + 1])
        torch.testing.assert_close(alone[0], drawn[i], rtol=1e-4, atol=1e-5)
    cold = model.sample(3, 0.0, labels)
    torch.testing.assert_close(cold[1], cold[2])
    assert not torch.allclose(cold[0], cold[1])
    each = model.sample(3, torch.tensor([0.7, 0.0, 0.7]), labels, key=key)
    torch.testing.assert_close(each, torch.stack([drawn[0], cold[1], drawn[2]]), rtol=1e-4, atol=1e-5)
    first, second = (model.sample(3, 1.0, labels, generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first, second)
    latents, _ = model(model.sample(200, 0.5, labels[:1].expand(200)), labels[:1].expand(200))
    noise = torch.cat([t.flatten() for t in latents])
    assert abs(noise.std().item() - 0.5) < 0.01
    assert abs(noise.mean().item()) < 0.01


def test_state():
    torch.manual_seed(0)
    model = Glow((3, 8, 8), 2, 2, 8)
    model(images(8))  # initialises
    other = Glow((3, 8, 8), 2, 2, 8)
    with pytest.raises(RuntimeError, match="not initialised"):
        other.sample(2)
    with pytest.raises(RuntimeError, match="not initialised"):
        other.eval().log_prob(images())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(images()), model.eval().log_prob(images()))


def _step(weight):
    weight.grad = weight.detach().clone()
    torch.optim.SGD([weight], lr=0.5).step()


@pytest.mark.parametrize(
    "write",
    [
        lambda conv: conv.weight.data.mul_(2),
        lambda conv: conv.load_state_dict({"weight": conv.weight.detach() * 2}),
        lambda conv: setattr(conv, "weight", torch.nn.Parameter(conv.weight.detach() * 2)),
        lambda conv: _step(conv.weight),
        lambda conv: conv.double().float(),
        lambda conv: torch.nn.init.eye_(conv.weight),
    ],
    ids=["data", "load_state_dict", "parameter", "optimizer", "to", "init"],
)
def test_determinants_follow_the_weights(write):
    model = glow().eval()
    model.sample(1)
    write(model.levels[0].steps[1].conv)
    x = images()
    latents, logdet = model(x)
    fresh = Glow((3, 8, 8), 2, 2, 8).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x)[1], logdet)
    torch.testing.assert_close(model.inverse(latents)[0], x, rtol=1e-4, atol=1e-4)


def test_determinant_of_a_layer_called_alone_follows_its_weight():
    model = glow().eval()
    model.sample(1)
    conv = model.levels[0].steps[1].conv
    x = torch.randn(2, conv.channels, 2, 2)
    before = conv(x)[1]
    conv.weight.data.mul_(2)
    torch.testing.assert_close(conv(x)[1] - before, torch.full((2,), 4 * conv.channels * math.log(2)))


def test_training_after_inference_mode():
    model = glow()
    with torch.inference_mode():
        model.sample(1)
        density = model.log_prob(images())
    trained = model.log_prob(images())
    trained.sum().backward()
    assert torch.equal(trained, density)
    with torch.inference_mode():
        made = glow()
        assert made.sample(2).isfinite().all()


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_one_call_for_all_determinants():
    model = glow(levels=3)
    model.log_prob(images())  # the host learns that the activation normalization is initialised
    with torch.no_grad():
        model.levels[1].steps[0].conv.weight.mul_(1.01)
    with Calls() as calls:
        model.log_prob(images()).sum().backward()
    assert calls.names.count("genperf::slogdet_inverse") == 1
    assert "aten::_local_scalar_dense" not in calls.names
    with Calls() as calls:
        model.sample(2)
        model.sample(2)
    assert calls.names.count("genperf::slogdet_inverse") == 0
    assert "aten::_local_scalar_dense" not in calls.names


def test_bits_per_dim():
    model = glow((1, 4, 4)).eval()
    x = images(2, (1, 4, 4))
    nats = -model.log_prob(x) + 16 * math.log(32)
    torch.testing.assert_close(model.bits_per_dim(x, bins=32), nats / 16 / math.log(2))


def test_dequantize():
    levels = torch.arange(256, dtype=torch.uint8).repeat(50)
    for bins in (256, 32, 2):
        x = dequantize(levels, bins, generator=torch.Generator().manual_seed(0))
        assert ((x >= -0.5) & (x < 0.5)).all()
        assert torch.equal(((x + 0.5) * bins).floor().long(), levels.long() * bins // 256)
        within = ((x + 0.5) * bins) % 1
        assert abs(within.mean().item() - 0.5) < 0.02
    with pytest.raises(TypeError, match="uint8"):
        dequantize(levels.int())
    with pytest.raises(ValueError, match="power of two"):
        dequantize(levels, 100)


def test_bad_input():
    model = glow()
    labelled = glow(classes=2)
    x = images()
    for call, match in (
        (lambda: Glow((3, 8, 12), 3), "divisible by 8"),
        (lambda: Glow((3, 8, 8), 0), "levels"),
        (lambda: Glow((3, 8, 8), 1, 1, 8, classes=0), "classes"),
        (lambda: Glow((3, 8), 1), "expected"),
        (lambda: model(x[:, :2]), "expected shape"),
        (lambda: model(x, torch.tensor([0] * 4)), "labels"),
        (lambda: labelled(x), "labels"),
        (lambda: labelled(x, torch.tensor([0])), "labels"),
        (lambda: model.inverse([x]), "latents"),
        (lambda: model.sample(2, key=torch.tensor([1, 2]), generator=torch.Generator()), "generator"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="int64"):
        labelled(x, torch.zeros(4))


def test_parts_can_be_reached():
    model = glow(scale="additive", segment=1, fallback="warn")
    assert all(isinstance(level, ReversibleSequence) and level.stored == {0, 1} for level in model.levels)
    net = model.levels[0].steps[0].coupling.net
    assert isinstance(net, CouplingNet)
    assert net.out.out_channels == 6
    torch.testing.assert_close(model.inverse(model(images())[0])[0], images(), rtol=1e-4, atol=1e-5)


def test_capture_needs_a_device():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        Captured(glow().log_prob, images())


@pytest.mark.gpu
def test_captured_sampling():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = glow().cuda().eval()
    key = torch.tensor([3, 0], device="cuda")
    captured = Captured(lambda key: model.sample(4, 0.7, key=key), key)
    torch.testing.assert_close(
        captured(key + 1).clone(), model.sample(4, 0.7, key=key + 1), rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        model.levels[0].steps[0].conv.weight.mul_(1.1)  # a replay computes the inverse again
    torch.testing.assert_close(captured(key).clone(), model.sample(4, 0.7, key=key), rtol=1e-4, atol=1e-5)
    drawn = Captured(lambda: model.sample(4))  # draws its key in the graph
    assert not torch.equal(drawn().clone(), drawn().clone())


@pytest.mark.gpu
@pytest.mark.parametrize("reversible", [True, False])
def test_captured_training(reversible):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    results = []
    batches = [images(4, seed=i).cuda() for i in range(6)]
    for capture in (True, False):
        model = glow(reversible=reversible).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)

        def step(x, model=model, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss = model.bits_per_dim(x).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        if capture:
            run = Captured(step, batches[0], warmup=3)
        else:
            for _ in range(3):
                step(batches[0])
            run = step
        results.append([run(x).clone() for x in batches])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
