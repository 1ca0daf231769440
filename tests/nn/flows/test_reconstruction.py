"""What reversible training costs and what it notices: memory, operations, errors of what it rebuilds."""

import copy
import importlib.util
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from genperf_testing.flows import as_eager, sequence
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from genperf.bench.measure import peak_bytes
from genperf.nn.flows import GlowStep, ReversibleSequence


def step_of(model, x):
    z, logdet = model(x)
    loss = (z.square().sum() / 2 - logdet.sum()) / x.numel()
    return torch.autograd.grad(loss, list(model.parameters()))


def peak(model, x):
    """Bytes at the most, beyond parameters and their gradients."""
    return peak_bytes(lambda: None, lambda _: step_of(model, x), torch.device("cpu"))


def test_memory_does_not_grow_with_depth():
    x = torch.randn(4, 6, 16, 16)
    found = {}
    for n in (4, 12):
        model = sequence(n, hidden=64)
        step_of(model, x)
        found[n] = peak(model, x), peak(as_eager(model, 6, 64), x)
    slope, eagers = ((found[12][i] - found[4][i]) / 8 for i in (0, 1))
    one = x.numel() * x.element_size()
    assert eagers > 20 * one
    assert slope < one / 4  # random states, a few elements of x
    assert found[12][0] < found[12][1] / 5


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("permutation", ["dense", "plu"])
def test_training_reads_nothing_on_the_host(reversible, permutation):
    model = sequence(3, permutation=permutation, reversible=reversible)
    x = torch.randn(2, 6, 8, 8)
    step_of(model, x)
    with Operations() as operations:
        step_of(model, x)
    assert not READS & set(operations.names)
    with Operations() as eager:
        step_of(as_eager(sequence(3), 6, 8), x)
    assert "aten::_local_scalar_dense" in eager.names  # which the counter would have seen
    with Operations() as sampling, torch.no_grad():
        model.inverse(x)
    assert not READS & set(sampling.names)


def test_determinants_in_one_call():
    model = sequence(5)
    x = torch.randn(2, 6, 8, 8)
    step_of(model, x)
    with Operations() as again:
        step_of(model, x)
    assert "genperf::slogdet_inverse" not in again.names  # no weight was written
    with torch.no_grad():
        model.steps[2].conv.weight.mul_(1.01)
    with Operations() as changed:
        step_of(model, x)
    assert changed.names.count("genperf::slogdet_inverse") == 1


class Scaled(nn.Module):
    """Invertible, but ``inverse`` is off by a factor."""

    def __init__(self, error):
        super().__init__()
        self.scale, self.error = nn.Parameter(torch.tensor(0.7)), error

    def forward(self, x):
        return x * self.scale, x[0].numel() * self.scale.log().expand(len(x))

    def inverse(self, z):
        return z * (1 + self.error) / self.scale, -z[0].numel() * self.scale.log().expand(len(z))


def off(error=0.05, n=5, at=2, **options):
    return ReversibleSequence([Scaled(error if i == at else 0.0) for i in range(n)], **options)


def test_errors_are_measured():
    model = off(fallback="warn")
    step_of(model, torch.randn(3, 4, 8, 8))
    errors = model.reconstruction_errors
    assert (errors[3:] < 1e-5).all()
    assert ((errors[:3] > 0.04) & (errors[:3] < 0.05 * 6)).all()  # relative to the root mean square


def test_input_is_stored_after_a_warning():
    model = off()
    x = torch.randn(3, 4, 8, 8)
    model.reversible = False
    exact = step_of(model, x)
    model.reversible = True
    wrong = step_of(model, x)
    assert not torch.allclose(wrong[0], exact[0], rtol=1e-3)
    with pytest.warns(RuntimeWarning, match=r"input of steps\[2\] .* stored from now on"):
        right = step_of(model, x)
    assert model.stored == {2}
    torch.testing.assert_close(right, exact, rtol=1e-5, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_of(model, x)
    assert (model.reconstruction_errors < 1e-5).all()


def test_warn_only_once():
    model = off(fallback="warn", at=4, n=5)
    x = torch.randn(3, 4, 8, 8)
    step_of(model, x)
    with pytest.warns(RuntimeWarning, match="gradients are off"):
        step_of(model, x)
    assert model.stored == set()


def test_error():
    model = off(fallback="error")
    x = torch.randn(3, 4, 8, 8)
    step_of(model, x)
    with pytest.raises(RuntimeError, match=r"steps\[2\] was rebuilt with a relative error"):
        step_of(model, x)


def test_no_check():
    model = off(check_reconstruction=None)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step_of(model, torch.randn(3, 4, 8, 8))
    assert (model.reconstruction_errors == 0).all()


@pytest.mark.parametrize("singular", ["zero", "small"])
def test_ill_conditioned_weight(singular):
    """A step that loses what it is given is noticed, and its input is stored."""
    model = sequence(4)
    with torch.no_grad():
        model.steps[1].conv.weight[0].mul_(0.0 if singular == "zero" else 1e-7)
    x = torch.randn(2, 6, 8, 8)
    weight = model.steps[0].conv.weight

    def gradient():
        z, _ = model(x)
        return torch.autograd.grad(z.square().sum(), [weight])[0]

    model.reversible = False
    exact = gradient()
    model.reversible = True
    gradient()
    with pytest.warns(RuntimeWarning, match=r"steps\[1\]"):
        right = gradient()
    torch.testing.assert_close(right, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_round_trip_of_a_deep_stack():
    """32 steps with mixing matrices of condition number 3."""
    torch.manual_seed(0)
    model = ReversibleSequence([GlowStep(12, hidden=8) for _ in range(32)])
    with torch.no_grad():
        for step in model:
            step.actnorm.initialized.fill_(1)
            u, v = (torch.linalg.qr(torch.randn(12, 12)).Q for _ in range(2))
            step.conv.weight.copy_(u @ torch.diag(torch.linspace(3**-0.5, 3**0.5, 12)) @ v)
            nn.init.normal_(step.coupling.net.out.weight, 0, 0.02)
        x = torch.randn(4, 12, 16, 16)
        z, logdet = model(x)
        back, logdet_back = model.inverse(z)
    assert (back - x).norm() <= 5e-4 * x.norm()
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-4, atol=0)


def test_copies_between_passes():
    model = off(fallback="warn")
    step_of(model, torch.randn(3, 4, 8, 8))  # errors wait to be read
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        step_of(other, torch.randn(3, 4, 8, 8))


def test_tool_measures_all_variants(monkeypatch, capsys):
    path = Path(__file__).parents[3] / "tools" / "glow_training.py"
    spec = importlib.util.spec_from_file_location("genperf_glow_training", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sizes = ["--steps", "4", "--rounds", "1", "--batch", "2", "--size", "4", "--hidden", "8"]
    monkeypatch.setattr(sys, "argv", ["glow_training.py", *sizes])
    threads = torch.get_num_threads()
    tool.main()
    torch.set_num_threads(threads)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row for row in rows[2:]}
    assert table.keys() == tool.VARIANTS.keys()
    reads, by_x, by_parameters = (
        rows[0].index(name) for name in ("host reads", "error of dx", "of parameters")
    )
    assert table["eager"][reads] == "4"
    for name in ("activations kept", "activations rebuilt"):
        assert table[name][reads] == "0"
        assert max(float(table[name][column]) for column in (by_x, by_parameters)) < 1e-5
