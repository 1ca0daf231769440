"""Sequences that rebuild activations give the gradients of autograd."""

import copy
import pickle

import pytest
import torch
from genperf_testing.flows import as_eager, same_parameters, sequence
from torch import nn

from genperf.nn.flows import ActNorm, AffineCoupling, GlowStep, InvertibleConv1x1, ReversibleSequence, Squeeze


def data(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(z, logdet):
    return (z.square().sum() + z[:, :2].pow(3).sum() / 9 - 2 * logdet.sin().sum()) / 2


def gradients(model, x, **conditions):
    x = x.detach().requires_grad_()
    given = [c for c in conditions.values() if isinstance(c, torch.Tensor) and c.requires_grad]
    leaves = [x, *given, *[p for p in model.parameters() if p.requires_grad]]
    return torch.autograd.grad(loss_of(*model(x, **conditions)), leaves)


def assert_as_autograd(model, x, **conditions):
    """In float64 both are the same but for rounding."""
    model.reversible = True
    ours = gradients(model, x, **conditions)
    model.reversible = False
    torch.testing.assert_close(ours, gradients(model, x, **conditions), rtol=1e-9, atol=1e-9)


class Net(nn.Module):
    """A network of coupling layers that counts its calls."""

    def __init__(self, inner, out=6):
        super().__init__()
        self.inner, self.last = inner, nn.Conv2d(8, out, 3, padding=1)
        self.calls = 0

    def forward(self, x, context=None):
        self.calls += 1
        h = self.inner(x)
        if context is not None:
            h = h + context[:, :, None, None]
        return self.last(h.tanh())


class Skewed(nn.Module):
    """A step as a user writes it: nothing but forward and inverse."""

    def __init__(self, channels=6):
        super().__init__()
        self.net = nn.Linear(channels // 2, channels // 2)
        self.amount = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, **_):
        a, b = x.chunk(2, 1)
        shift = self.net(a.movedim(1, -1)).movedim(-1, 1)
        n = b[0].numel()
        return torch.cat([b * self.amount.exp() + shift, a], 1), n * self.amount  # a log-determinant []

    def inverse(self, z, **_):
        b, a = z.chunk(2, 1)
        shift = self.net(a.movedim(1, -1)).movedim(-1, 1)
        n = b[0].numel()
        return torch.cat([a, (b - shift) * (-self.amount).exp()], 1), -n * self.amount


def ours(n=3, inner=None, **options):
    torch.manual_seed(0)
    steps = [GlowStep(6, Net(copy.deepcopy(inner) if inner else nn.Conv2d(3, 8, 1))) for _ in range(n)]
    model = ReversibleSequence(steps, **options).double()
    model(data(4, 6, 4, 4, seed=5))  # initialises
    for step in model:
        step.coupling.net.calls = 0
    return model


@pytest.mark.parametrize("permutation", ["dense", "plu"])
@pytest.mark.parametrize("order", ["actnorm-conv-coupling", "coupling-actnorm-conv"])
def test_glow_steps(permutation, order):
    assert_as_autograd(sequence(permutation=permutation, order=order).double(), data(2, 6, 4, 6))


@pytest.mark.parametrize("options", [{"segment": 2}, {"stored": [1, 4]}, {"segment": 1}], ids=str)
def test_steps_of_all_kinds(options):
    torch.manual_seed(0)
    steps = [
        ActNorm(6), Skewed(), GlowStep(6, hidden=4), Squeeze(), InvertibleConv1x1(24), Skewed(24),
        AffineCoupling(24, nn.Conv2d(12, 24, 3, padding=1)),
    ]  # fmt: skip
    model = ReversibleSequence(steps, **options).double()
    x = data(2, 6, 4, 4)
    model(x)
    assert_as_autograd(model, x)
    z, logdet = model(x)
    back, logdet_back = model.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-10, atol=1e-10)


def test_as_eager_in_float32():
    """No more than a small multiple of eager's own error: steps are undone one after another."""
    model = sequence(8, hidden=32)
    x = data(2, 6, 8, 8)
    eager = as_eager(model, 6, 32)
    exact = copy.deepcopy(eager).double()
    results = []
    for run, dtype in ((exact, torch.float64), (eager, torch.float32), (model, torch.float32)):
        given = x.to(dtype, copy=True).requires_grad_()
        loss_of(*run(given)).backward()
        results.append([given.grad])
    for theirs, mine, true in zip(eager.steps, model, exact.steps, strict=True):
        for (a, b), (c, _) in zip(same_parameters(theirs, mine), same_parameters(true, mine), strict=True):
            for result, grad in zip(results, (c.grad, a.grad, b.grad), strict=True):
                result.append(grad.view(b.shape) if grad.numel() > 1 else grad)
    for i, (true, theirs, mine) in enumerate(zip(*results, strict=True)):
        size = true.norm()
        error, eagers = ((g.double().view(true.shape) - true).norm() / size for g in (mine, theirs))
        assert error <= 4 * eagers + 2e-5, i


def test_network_runs_once_each_way():
    model = ours()
    nets = [step.coupling.net for step in model]
    gradients(model, data(2, 6, 4, 4))
    assert [net.calls for net in nets] == [2, 2, 2]
    with torch.no_grad():
        model(data(2, 6, 4, 4))
    assert [net.calls for net in nets] == [3, 3, 3]


def test_backward_and_hooks():
    model = ours()
    x = data(2, 6, 4, 4)
    expected = gradients(model, x)[1:]
    seen = []
    model.steps[1].conv.weight.register_hook(lambda grad: seen.append(1))
    model.steps[1].coupling.net.last.weight.register_hook(lambda grad: seen.append(2))
    model.steps[0].actnorm.shift.register_post_accumulate_grad_hook(lambda p: seen.append(3))
    loss_of(*model(x)).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), rtol=0, atol=0)
    assert sorted(seen) == [1, 2, 3]
    loss_of(*model(x)).backward()  # gradients add up
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], [2 * g for g in expected], rtol=1e-12, atol=0
    )


def test_frozen_parameters_and_inputs():
    model = ours()
    x = data(2, 6, 4, 4)
    full = dict(zip(["x", *dict(model.named_parameters())], gradients(model, x), strict=True))
    frozen = {"steps.0", "steps.1.conv", "steps.2.coupling.net.inner"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(name.startswith(f) for f in frozen))
    loss_of(*model(x)).backward()  # x without a gradient, and the first step without any
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, full[name], rtol=1e-9, atol=1e-9)
        else:
            assert parameter.grad is None
    model.requires_grad_(False)
    given = x.clone().requires_grad_()
    loss_of(*model(given)).backward()
    torch.testing.assert_close(given.grad, full["x"], rtol=1e-9, atol=1e-9)
    assert not model(x)[0].requires_grad


def test_parts_of_the_output():
    model = ours()
    x = data(2, 6, 4, 4)

    def both(of):
        found = []
        for reversible in (True, False):
            model.reversible = reversible
            given = x.clone().requires_grad_()
            leaves = [given, *model.parameters()]
            found.append(torch.autograd.grad(of(*model(given)), leaves, allow_unused=True))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(
                torch.zeros(()) if a is None else a.norm(), _norm(b), rtol=1e-9, atol=1e-9
            )
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    both(lambda z, logdet: z[0, 0].sum())
    both(lambda z, logdet: logdet[1])
    both(lambda z, logdet: logdet.sum() * 0 + z.sum())


def _norm(grad):
    return torch.zeros(()) if grad is None else grad.norm()


def test_several_losses_and_passes():
    model = ours()
    x, other = data(2, 6, 4, 4), data(3, 6, 4, 4, seed=1)
    weights = list(model.parameters())
    expected = [a + b for a, b in zip(gradients(model, x)[1:], gradients(model, other)[1:], strict=True)]
    first, second = model(x), model(other)  # two passes under way at once
    got = torch.autograd.grad(loss_of(*first) + loss_of(*second), weights)
    torch.testing.assert_close(list(got), expected, rtol=1e-9, atol=1e-9)
    z, logdet = model(x)
    separate = []
    for loss in (z.square().sum() / 2, z[:, :2].pow(3).sum() / 18, -logdet.sin().sum()):
        separate.append(torch.autograd.grad(loss, weights, retain_graph=True))
    summed = [sum(grads) for grads in zip(*separate, strict=True)]
    torch.testing.assert_close(summed, list(gradients(model, x)[1:]), rtol=1e-9, atol=1e-9)
    # One parameter of the middle: the pass ends there.
    only = torch.autograd.grad(loss_of(*model(x)), [model.steps[1].conv.weight])[0]
    index = list(dict(model.named_parameters())).index("steps.1.conv.weight")
    torch.testing.assert_close(only, gradients(model, x)[1 + index], rtol=1e-9, atol=1e-9)


def test_shared_steps():
    step = ours(1).steps[0]
    model = ReversibleSequence([step, Skewed().double(), step])
    assert_as_autograd(model, data(2, 6, 4, 4))


@pytest.mark.parametrize("stored", [(), (0, 2)], ids=["rebuilt", "stored"])
def test_dropout(stored):
    model = ours(inner=nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5)), stored=stored)
    x = data(2, 6, 4, 4)
    found, states = [], []
    for reversible in (True, False):
        model.reversible = reversible
        torch.manual_seed(3)
        found.append(gradients(model, x))
        states.append(torch.get_rng_state())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert torch.equal(*states), "the backward pass draws nothing that is its own"


class Written(nn.Module):
    """A user's step with running statistics and dropout, of the kind that goes the general way."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.3)

    def _shift(self, a):
        return self.drop(self.norm(a.flatten(2)).view(a.shape))

    def forward(self, x, **_):
        a, b = x.chunk(2, 1)
        return torch.cat([b + self._shift(a), a], 1), x.new_zeros(len(x))

    def inverse(self, z, **_):
        b, a = z.chunk(2, 1)
        return torch.cat([a, b - self._shift(a)], 1), z.new_zeros(len(z))


@pytest.mark.parametrize("kind", ["fast", "general", "stored"])
def test_running_statistics_move_once(kind):
    if kind == "general":
        torch.manual_seed(0)
        model = ReversibleSequence([Written() for _ in range(3)]).double()
    else:
        inner = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        model = ours(inner=inner, stored=(0, 1, 2) if kind == "stored" else ())
    x = data(2, 6, 4, 4)
    found = []
    for reversible in (True, False):
        one = copy.deepcopy(model)
        one.reversible = reversible
        torch.manual_seed(3)
        found.append((gradients(one, x), one.state_dict()))
    (a, state_a), (b, state_b) = found
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for name in state_b:
        torch.testing.assert_close(state_a[name], state_b[name], rtol=1e-12, atol=1e-12)
    assert any(not torch.equal(state_a[n], v) for n, v in model.state_dict().items() if "running" in n)


def test_conditions():
    model = ours()
    context = data(2, 8, seed=3).requires_grad_()
    assert_as_autograd(model, data(2, 6, 4, 4), context=context)
    embedding = nn.Embedding(4, 8).double()  # a condition with a graph of its own, before and after
    found = []
    for reversible in (True, False):
        model.reversible = reversible
        z, logdet = model(data(2, 6, 4, 4), context=embedding(torch.tensor([1, 3])))
        found.append(torch.autograd.grad(loss_of(z, logdet), [embedding.weight])[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_functional_call():
    model = ours()
    x = data(2, 6, 4, 4)
    moved = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
    found = []
    for reversible in (True, False):
        model.reversible = reversible
        leaves = {name: p.clone().requires_grad_() for name, p in moved.items()}
        z, logdet = torch.func.functional_call(model, leaves, (x,))
        found.append(torch.autograd.grad(loss_of(z, logdet), list(leaves.values())))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stored", [(), (0, 1, 2)], ids=["rebuilt", "stored"])
def test_autocast(stored):
    """The network runs in bfloat16 both times, the state in float32; backward within autocast or after."""
    torch.manual_seed(0)
    model = sequence(3, hidden=16, stored=stored)
    x = data(2, 6, 8, 8, dtype=torch.float32)
    found = []
    for reversible, within in ((True, False), (True, True), (False, False)):
        model.reversible = reversible
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, logdet = model(given)
            if within:
                loss_of(z, logdet).backward()
        assert z.dtype == logdet.dtype == torch.float32
        if not within:
            loss_of(z, logdet).backward()
        found.append([given.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for a, b, c in zip(*found, strict=True):
        assert a.dtype == c.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * c.abs().max().item())
        # Inputs of the network that differ by a rounding may round to other bfloat16 numbers.
        assert (a - c).norm() <= 0.02 * c.norm()
    rebuilt = model.inverse(z.detach())[0]
    assert (rebuilt - x).norm() > 1e-4 * x.norm()  # in float32 the network is another one
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rebuilt = model.inverse(z.detach())[0]
    assert (rebuilt - x).norm() <= 1e-2 * x.norm()


def test_half_precision_input():
    model = sequence()
    x = data(2, 6, 4, 4, dtype=torch.bfloat16)
    z, _ = model(x)
    assert z.dtype == torch.float32
    with pytest.raises(TypeError, match="floating"):
        model(torch.ones(2, 6, 4, 4, dtype=torch.int64))


def test_parameters_modified_before_backward():
    model = ours()
    loss = loss_of(*model(data(2, 6, 4, 4)))
    with torch.no_grad():
        model.steps[1].coupling.net.last.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"steps\[1\].*modified in place"):
        loss.backward()


def test_not_invertible():
    class Rounds(nn.Module):
        def forward(self, x):
            return x.relu(), x.new_zeros(len(x))

    with pytest.raises(TypeError, match=r"steps\[1\], Rounds, has no method inverse"):
        ReversibleSequence([Skewed(), Rounds()])
    with pytest.raises(TypeError, match=r"steps\[1\], Rounds, has no method inverse"):
        ReversibleSequence([Skewed(), Rounds()], segment=1)
    model = ReversibleSequence([Skewed(), Rounds(), Skewed()], stored=[1]).double()
    assert_as_autograd(model, data(2, 6, 4, 4))
    with pytest.raises(TypeError, match="no method inverse"):
        model.inverse(data(2, 6, 4, 4))
    for bad in (nn.Identity(), nn.Flatten(0)):
        with pytest.raises(TypeError, match=r"steps\[0\].* expected \(z, logdet\)"):
            ReversibleSequence([bad], stored=[0])(data(2, 6).requires_grad_())


def test_bad_arguments():
    for options, match in (
        ({"segment": 0}, "segment"), ({"fallback": "ignore"}, "fallback"), ({"stored": [3]}, "stored"),
        ({"check_reconstruction": 0.0}, "check_reconstruction"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ReversibleSequence([Skewed(), Skewed()], **options)
    with pytest.raises(TypeError, match="expected a module"):
        ReversibleSequence([lambda x: x])


def test_copies():
    model = ours()
    x = data(2, 6, 4, 4)
    expected = gradients(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(gradients(other, x), expected, rtol=0, atol=0)
    other = ours()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(gradients(other, x), expected, rtol=0, atol=0)


def test_no_second_derivatives():
    x = data(2, 6, 4, 4).requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(*ours()(x)), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compile_breaks_the_graph():
    torch.compiler.reset()
    model = ours(2)
    x = data(2, 6, 4, 4)
    expected = gradients(model, x)
    torch.testing.assert_close(
        gradients(torch.compile(model, backend="eager"), x), expected, rtol=1e-9, atol=1e-9
    )
