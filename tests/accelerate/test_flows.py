"""accelerate on flow layers as public repositories write them."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import genperf

pytestmark = pytest.mark.filterwarnings("ignore")


class Operators(TorchDispatchMode):
    """Counts aten operators, and the elements of what is padded."""

    def __init__(self):
        super().__init__()
        self.names, self.padded = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        if func._schema.name == "aten::constant_pad_nd":
            self.padded += args[0].numel()
        return func(*args, **(kwargs or {}))


def perturbed(model, *inputs):
    """Initialised by the inputs, then moved away from where it starts."""
    if inputs:
        model(*inputs)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def reverse(model, y):
    return model.reverse(y)


def kernels(report):
    return {entry.kernel for entry in report.accelerated}


@pytest.mark.parametrize("conv_lu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_steps_that_reverse(flows, affine, conv_lu):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, 6)
    model = perturbed(flows.Reversible(*(flows.Flow(6, affine, conv_lu) for _ in range(3))), x)
    before = copy.deepcopy(model)
    report = genperf.accelerate(model, mode="training", strict=True)
    assert len(report.accelerated) == 3 * 5
    assert "invertible_conv1x1, actnorm folded" in kernels(report)
    assert report.verify(x, seconds=0), report.verify(x, seconds=0)
    assert report.verify(x, call=reverse, seconds=0)
    y, logdet = model(x)
    assert logdet.shape == ((3,) if affine else ())
    torch.testing.assert_close(model.reverse(y), x, atol=2e-5, rtol=0)
    assert list(model.state_dict()) == list(before.state_dict())
    report.restore()
    assert type(model.steps[0]) is flows.Flow


@pytest.mark.parametrize("names", [("l", "u"), ("lower", "upper"), None])
@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_steps_that_add_to_a_log_determinant(flows, coupling, names):
    torch.manual_seed(0)
    net = "block" if names == ("lower", "upper") else "f"
    step = flows.FlowStep(6, coupling, names is not None, names or ("l", "u"), net)
    x, logdet = torch.randn(3, 6, 4, 6), torch.randn(3)
    report = genperf.accelerate(perturbed(step, x, logdet), mode="training", strict=True)
    assert kernels(report) == {"invertible_conv1x1", "invertible_conv1x1, actnorm folded; affine_coupling"}
    assert report.verify(x, logdet, seconds=0)
    assert report.verify(x, logdet, call=lambda m, x, d: m(x, d, reverse=True), seconds=0)


def test_step_that_refers_to_itself(flows):
    step = perturbed(flows.FlowStepOfLambdas(6), torch.randn(4, 6, 4, 4), torch.zeros(4))
    x, logdet = torch.randn(4, 6, 4, 4), torch.zeros(4)
    expected = step(x, logdet)
    report = genperf.accelerate(step, strict=True)
    assert len(report.accelerated) == 2
    for found, other in zip(step(x, logdet), expected, strict=True):
        torch.testing.assert_close(found, other, atol=1e-4, rtol=1e-5)


def test_bijections(flows):
    torch.manual_seed(0)
    for rank, sizes in enumerate([(), (7,), (4, 3), (2, 3, 2)]):
        x = torch.randn(3, 5, *sizes)
        layers = [perturbed(flows.ActNormBijection(5, rank), x)]
        layers += [flows.Conv1x1(5)] if rank else []
        for layer in layers:
            report = genperf.accelerate(layer, mode="training", strict=True)
            assert len(report.accelerated) == 1
            assert report.verify(x, seconds=0)
            assert report.verify(x, call=lambda m, z: m.inverse(z), seconds=0)


def test_waveglow_inverse_is_that_of_the_weight(flows):
    torch.manual_seed(0)
    layer = flows.Invertible1x1Conv(8)
    x = torch.randn(2, 8, 30)
    layer(x, reverse=True)  # keeps an inverse
    report = genperf.accelerate(layer, mode="training", strict=True)
    assert report.verify(x, seconds=0)
    with torch.no_grad():
        layer.conv.weight[0] *= -3  # now det < 0, too
    y, logdet = layer(x)
    torch.testing.assert_close(layer(y, reverse=True), x)
    expected = 60 * torch.slogdet(layer.conv.weight[..., 0])[1]
    torch.testing.assert_close(logdet, expected)
    # As in the original, whose stored inverse has no history.
    assert layer.conv.weight.grad is None
    assert not layer(y.detach(), reverse=True).requires_grad


@pytest.mark.parametrize("no_jacobian", [False, True])
def test_glow_tts_groups(flows, no_jacobian):
    torch.manual_seed(0)
    layer = flows.InvConvNear(12, no_jacobian=no_jacobian)
    x = torch.randn(3, 12, 9)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None])[:, None].float()
    report = genperf.accelerate(layer, mode="training", strict=True)
    assert len(report.accelerated) == 1
    assert report.verify(x, mask, call=lambda m, x, k: m(x, k)[: 2 - no_jacobian], seconds=0)
    assert report.verify(x, mask, call=lambda m, x, k: m(x, k, reverse=True)[0], seconds=0)
    assert layer(x, mask, reverse=True)[1] is None
    with torch.no_grad():
        layer.weight[0] *= -1
    assert no_jacobian or layer(x)[1].isfinite().all()


def test_first_batch_initialises_as_before(flows):
    torch.manual_seed(0)
    original = flows.Reversible(flows.Flow(4), flows.Flow(4))
    fast = copy.deepcopy(original)
    genperf.accelerate(fast, strict=True)
    x = 3 * torch.randn(8, 4, 4, 4) + 1
    for _ in range(2):
        for found, expected in zip(fast(x), original(x), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value)
    # A state that is not initialised makes the next batch initialise again.
    empty = copy.deepcopy(original)
    for model in (empty, fast):
        state = original.state_dict()
        model.load_state_dict({n: torch.zeros_like(v) if "initialized" in n else v for n, v in state.items()})
        model(x + 5)
    torch.testing.assert_close(fast.steps[0].actnorm.loc, empty.steps[0].actnorm.loc)


def test_nothing_is_read_on_the_host_or_copied_to_pad(flows):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 4)
    model = perturbed(flows.Reversible(flows.Flow(6), flows.Flow(6, conv_lu=False)), x)
    with Operators() as before:
        model(x)
    genperf.accelerate(model, strict=True)
    model(x)
    with Operators() as after:
        model(x)
    assert before.names.count("aten::_local_scalar_dense") == 2
    assert "aten::_local_scalar_dense" not in after.names
    assert before.padded == 2 * x.numel() // 6 * 8
    assert after.padded == 2 * 4 * 4  # the frame


def test_what_is_other_is_left_alone(flows):
    torch.manual_seed(0)
    step = flows.Flow(6)
    step.actnorm, step.coupling = flows.ShiftedActNorm(6), flows.OtherCoupling(6)
    x = torch.randn(2, 6, 4, 4)
    perturbed(step, x)
    expected = step(x)
    report = genperf.accelerate(step)
    reasons = {entry.name: entry.reason for entry in report.left_alone}
    assert set(reasons) == {"", "actnorm", "coupling"}
    assert "another than expected" in reasons["actnorm"]
    assert {e.name for e in report.accelerated} == {"invconv", "coupling.net.2"}
    for found, other in zip(step(x), expected, strict=True):
        torch.testing.assert_close(found, other, atol=1e-4, rtol=1e-5)
    with pytest.raises(RuntimeError, match="ShiftedActNorm"):
        genperf.accelerate(flows.ShiftedActNorm(6), strict=True)


def test_masks_that_are_not_triangular(flows):
    layer = flows.InvConv2dLU(4)
    layer.l_mask[0, 1] = 1
    assert not genperf.accelerate(layer).accelerated


def test_a_layer_left_out_or_hooked_is_called(flows):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 4)
    step = perturbed(flows.Flow(6), x)
    expected = step(x)
    report = genperf.accelerate(step, exclude="invconv")
    torch.testing.assert_close(step(x)[0], expected[0], atol=1e-5, rtol=1e-5)
    report.restore()
    genperf.accelerate(step)
    called = []
    handle = step.actnorm.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(step(x)[0], expected[0], atol=1e-5, rtol=1e-5)
    assert called == [1]
    handle.remove()
    step(x)
    assert called == [1]


def test_what_the_ops_do_not_take_runs_the_original(flows):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 4)
    step = perturbed(flows.Flow(6, conv_lu=True), x)
    genperf.accelerate(step)
    half = copy.deepcopy(step).bfloat16()
    assert half(x.bfloat16())[0].dtype == torch.bfloat16
    assert step.double()(x.double())[0].dtype == torch.float64
    assert step.float()(x[:0])[0].shape == (0, 6, 4, 4)
    with pytest.raises(RuntimeError):
        step(torch.randn(2, 5, 4, 4))


def test_autocast_keeps_the_state_in_float32(flows):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 4)
    model = perturbed(flows.Reversible(flows.Flow(6), flows.Flow(6)), x)
    exact, exact_logdet = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)[0]
    genperf.accelerate(model, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, logdet = model(x)
        back = model.reverse(y)
    assert y.dtype == logdet.dtype == torch.float32
    assert (y - exact).abs().max() <= (before - exact).abs().max()
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(logdet.double(), exact_logdet, rtol=0.02, atol=0.5)
    (y.square().sum() - logdet.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["reverse", "logdet"])
def test_compiled_in_one_graph(flows, kind):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 4)
    inputs = (x,) if kind == "reverse" else (x, torch.zeros(2))
    step = perturbed(flows.Flow(4) if kind == "reverse" else flows.FlowStep(4), *inputs)
    genperf.accelerate(step, strict=True)
    expected = step(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = compiled(*inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    sum(t.sum() for t in found).backward()
    torch._dynamo.reset()
