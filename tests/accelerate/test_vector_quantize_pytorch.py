"""accelerate on VectorQuantize and SimVQ of vector-quantize-pytorch: one call from the original's state."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import sys

import pytest
import torch
from torch import nn

import genperf
from genperf.accelerate.patterns import vector_quantize_pytorch as pattern

library = pytest.importorskip("vector_quantize_pytorch")
VectorQuantize, SimVQ = library.VectorQuantize, library.SimVQ
pytestmark = pytest.mark.filterwarnings("ignore")

PER_HEAD = {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True}
LEARNED = {"learnable_codebook": True, "ema_update": False}
OPTIONS = [
    {},
    {"rotation_trick": False},
    {"heads": 2, "codebook_dim": 8},
    PER_HEAD,
    {"use_cosine_sim": True},
    {"codebook_dim": 6, "layernorm_after_project_in": True},
    {"accept_image_fmap": True},
    {"accept_image_fmap": True, "heads": 2, "codebook_dim": 8},
    {"accept_3d_fmap": True},
    {"channel_last": False},
    {"kmeans_init": True, "kmeans_iters": 3, "codebook_size": 5},
    {"kmeans_init": True, "kmeans_iters": 3, "codebook_size": 5, "use_cosine_sim": True},
    {"threshold_ema_dead_code": 2},
    {"threshold_ema_dead_code": 2, "heads": 2, "codebook_dim": 8},
    {"threshold_ema_dead_code": 2, "use_cosine_sim": True, **PER_HEAD},
    {"threshold_ema_dead_code": 2, **LEARNED},
    LEARNED,
    {"sync_update_v": 0.3, **LEARNED},
    {"route_gradients_to_input": False, **LEARNED},
    {"vq_bridge": nn.Linear(16, 16)},
    {"affine_param": True},
    {"orthogonal_reg_weight": 0.1},
    {"orthogonal_reg_weight": 0.1, "orthogonal_reg_active_codes_only": True, "orthogonal_reg_max_codes": 5},
    {"directional_reparam": True, "threshold_ema_dead_code": 2},
    {"commitment_weight": 0.0},
    {"commitment_weight": 0.3},
    {"freeze_codebook": True},
    {"manual_ema_update": True},
    {"ema_update": False},
    {"return_zeros_for_masked_padding": False},
    {"route_gradients_to_input": False},
]
CALLS = [
    {},
    {"x_gradient": False},
    {"freeze_codebook": True},
    {"return_loss_breakdown": True},
    {"ema_update": False},
    {"ema_update_weight": torch.tensor(0.5).expand(1, 24)},
    {"accum_ema_update": True},
    {"mask": torch.arange(60).view(3, 20) % 7 > 2},
    {"lens": torch.tensor([20, 3, 7])},
]


def inputs(options):
    if options.get("accept_image_fmap"):
        return [torch.randn(3, 16, 4, 5)]
    if options.get("accept_3d_fmap"):
        return [torch.randn(3, 16, 4, 5, 2)]
    if options.get("channel_last") is False:
        return [torch.randn(3, 16, 20)]
    return [torch.randn(3, 20, 16), torch.randn(50, 16)]


def observed(module, x, call, seed=5):
    """What a copy of the module returns, the gradients, its state and that of the generator afterwards."""
    module, call = copy.deepcopy(module), dict(call)
    x = x.clone().requires_grad_(call.pop("x_gradient", True))
    torch.manual_seed(seed)
    outputs = module(x, **call)
    flat = [y for y in (*outputs[:3], *(outputs[3] if len(outputs) > 3 else ())) if torch.is_tensor(y)]
    leaves = [y for y in flat if y.requires_grad and not y.is_leaf]
    if leaves:
        torch.autograd.backward(leaves, [torch.linspace(-1, 1, y.numel()).view(y.shape) for y in leaves])
    return {
        "outputs": flat,
        "requires_grad": [y.requires_grad for y in flat],
        "x.grad": x.grad,
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "accumulated": {n: b.grad for n, b in module.named_buffers() if n != "zero"},
        "state": dict(module.state_dict()),
        "generator": torch.get_rng_state(),
    }


def check_call(original, accelerated, x, call):
    """Both give the same from the same state, or raise the same."""
    try:
        expected = observed(original, x, call)
    except Exception as error:
        with pytest.raises(type(error)):
            observed(accelerated, x, call)
        return
    actual = observed(accelerated, x, call)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6, check_stride=False)


def operators(module, *args, **kwargs):
    return {choice.operator for choice in genperf.explain(module, *args, **kwargs).choices}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_call(options):
    torch.manual_seed(0)
    original = VectorQuantize(dim=16, **{"codebook_size": 24, **options})
    if options.get("affine_param"):
        original(torch.randn(2, 9, 16))  # its parameters are not initialised before
    accelerated = copy.deepcopy(original)
    assert all(entry.kernel for entry in genperf.accelerate(accelerated).entries)
    for x in inputs(options):
        for training in (True, False):
            original.train(training)
            accelerated.train(training)
            ran = operators(copy.deepcopy(accelerated), x.clone().requires_grad_())
            assert "vq_nearest" in ran or "vector_quantize" in ran
            for call in CALLS:
                if "lens" in call and options.get("channel_last") is False:
                    continue  # the library takes the length of another dimension
                if "ema_update_weight" in call and (
                    options.keys() & {"separate_codebook_per_head", "codebook_size"}
                ):
                    continue
                if "accum_ema_update" in call and "kmeans_init" in options:
                    continue
                check_call(original, accelerated, x, call)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, options):
    """The library quantizes in float32 whatever it is given, and returns what it was given."""
    torch.manual_seed(0)
    original = VectorQuantize(dim=16, codebook_size=24, **options)
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    x = torch.randn(3, 20, 16).to(dtype)
    for training in (True, False):
        original.train(training)
        accelerated.train(training)
        expected, actual = (observed(m, x, {}) for m in (original, accelerated))
        for name in ("outputs", "x.grad"):
            tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5
            torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(actual["state"], expected["state"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_short_vectors(training):
    """Their gradient is the library's, the quantized vector the codeword, which its rotation misses."""
    torch.manual_seed(0)
    original = VectorQuantize(dim=16, codebook_size=24).train(training)
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    x = torch.randn(3, 20, 16)
    x[0] *= torch.logspace(-9, 0, 20)[:, None]
    x[1, 3] = 0
    short = x.norm(dim=-1, keepdim=True) < 1e-6
    assert 5 < short.sum() < 10
    codewords = original._codebook.embed[0].clone()
    cotangent = torch.randn_like(x)
    found = []
    for module in (original, accelerated):
        leaf = x.clone().requires_grad_()
        quantized, indices, loss = module(leaf)
        grads = torch.autograd.grad(quantized, leaf, cotangent, retain_graph=True) if training else ()
        found.append((quantized, indices, loss, *(g / g.norm(dim=-1, keepdim=True) for g in grads)))
        found[-1] += torch.autograd.grad(loss, leaf) if training else ()
    theirs, ours = found
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=1e-6)
    expected = torch.where(short, codewords[ours[1]], theirs[0]) if training else theirs[0]
    torch.testing.assert_close(ours[0], expected, rtol=1e-5, atol=1e-6)
    if training:
        assert not torch.allclose(ours[0], theirs[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("data", ["offset", "vqgan"])
def test_an_index_differs_only_where_the_original_is_wrong(data, training):
    torch.manual_seed(0)
    original = VectorQuantize(dim=32, codebook_size=512, freeze_codebook=True).train(training)
    if data == "vqgan":
        original._codebook.embed.uniform_(-1 / 512, 1 / 512)
    else:
        original._codebook.embed.normal_().add_(100)
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    x = torch.randn(4, 1000, 32) + (100 if data == "offset" else 0)
    theirs, ours = (module(x)[1] for module in (original, accelerated))
    differ = theirs != ours
    assert differ.any()
    rows, words = x[differ].double(), original._codebook.embed[0].double()
    distances = [(rows - words[index[differ]]).square().sum(-1) for index in (ours, theirs)]
    assert (distances[0] < distances[1]).all()


def test_under_autocast_on_the_cpu():
    """The library computes distances in bfloat16 there."""
    torch.manual_seed(0)
    original = VectorQuantize(dim=64, codebook_size=512).eval()
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    x = torch.randn(2, 500, 64)
    exact = torch.cdist(x.double(), original._codebook.embed.double()).argmin(-1)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = original(x), accelerated(x)
    assert torch.equal(ours[1], exact)
    assert not torch.equal(theirs[1], exact)
    assert [y.dtype for y in ours] == [y.dtype for y in theirs]
    for options in ({"codebook_dim": 8}, {"codebook_dim": 8, "heads": 2}):
        original = VectorQuantize(dim=16, codebook_size=24, **options)
        accelerated = copy.deepcopy(original)
        genperf.accelerate(accelerated)
        x = torch.randn(3, 20, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = original(x), accelerated(x)
        assert [y.dtype for y in ours] == [y.dtype for y in theirs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"threshold_ema_dead_code": 2, "kmeans_init": True}, marks=pytest.mark.slow),
        pytest.param({"heads": 2, "codebook_dim": 8, "rotation_trick": False}, marks=pytest.mark.slow),
        pytest.param({"use_cosine_sim": True}, marks=pytest.mark.slow),
        pytest.param({**LEARNED, "threshold_ema_dead_code": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_in_training_without_a_graph_break(options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    original = VectorQuantize(dim=16, codebook_size=8, **options)
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    compiled = torch.compile(accelerated, fullgraph=True)
    for step in range(3):
        x = torch.randn(3, 20, 16)
        results = []
        for module in (original, compiled):
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = module(leaf)
            (quantized.square().sum() + loss).backward()
            results.append([quantized, indices, loss, leaf.grad])
        torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(accelerated.state_dict(), original.state_dict(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotation_trick": False},
        {"channel_first": True},
        {"input_to_quantize_commit_loss_weight": 0.5, "commitment_weight": 2.0},
        {"codebook_transform": nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_sim_vq(options):
    torch.manual_seed(0)
    original = SimVQ(dim=16, codebook_size=24, **options)
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated, strict=True)
    shapes = [(3, 16, 20), (3, 16, 4, 5)] if options.get("channel_first") else [(3, 20, 16), (3, 4, 5, 16)]
    for shape in shapes:
        for call in ({}, {"x_gradient": False}):
            check_call(original, accelerated, torch.randn(shape), call)


def test_sync_codebook(process_group):
    """Statistics go through the process group, here of one process."""
    torch.manual_seed(0)
    original = VectorQuantize(dim=16, codebook_size=24, sync_codebook=True)
    model = copy.deepcopy(original)
    genperf.accelerate(model, strict=True)
    check_call(original, model, torch.randn(3, 20, 16), {})


def test_the_model_is_what_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), VectorQuantize(dim=16, codebook_size=24))
    keys, x = list(model.state_dict()), torch.randn(3, 20, 16)
    report = genperf.accelerate(model, mode="training")
    (entry,) = report.entries
    assert (entry.name, entry.was, entry.kernel) == ("1", "VectorQuantize.forward", "vector_quantize")
    assert list(model.state_dict()) == keys
    assert isinstance(model[1], VectorQuantize)
    assert type(pickle.loads(pickle.dumps(model))[1]) is VectorQuantize
    assert "vector_quantize" in operators(copy.deepcopy(model), x)
    assert report.verify(x, seconds=0.05)
    report.restore()
    assert type(model[1]) is VectorQuantize
    assert not operators(model, x)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stochastic_sample_codes": True}, "weighs every codeword"),
        ({"straight_through": True, "rotation_trick": False}, "weighs every codeword"),
        ({"codebook_diversity_loss_weight": 0.1}, "takes all distances"),
        ({"commitment_use_cross_entropy_loss": True}, "takes all distances"),
        (
            {"in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1), **LEARNED},
            "steps within forward",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_options_whose_training_is_left_alone(options, reason):
    torch.manual_seed(0)
    original = VectorQuantize(dim=16, codebook_size=24, **options)
    accelerated = copy.deepcopy(original)
    (entry,) = genperf.accelerate(accelerated).left_alone
    assert entry.was == "VectorQuantize.forward in training"
    assert reason in entry.reason
    x = torch.randn(3, 20, 16)
    assert not operators(copy.deepcopy(accelerated), x)
    if "in_place_codebook_optimizer" not in options:  # a copy's optimizer has another's parameters
        check_call(original, accelerated, x, {})
    check_call(original.eval(), accelerated.eval(), x, {})
    assert operators(accelerated, x) == {"vq_nearest"}


@pytest.mark.parametrize(
    "call",
    [
        {"topk": 2},
        {"indices": torch.arange(60).view(3, 20) % 24},
        {"codebook_transform_fn": lambda codes: codes[:, None, None].expand(-1, 3, 20, -1, -1)},
    ],
    ids=lambda call: next(iter(call)),
)
def test_arguments_that_are_left_alone(call):
    torch.manual_seed(0)
    original = VectorQuantize(dim=16, codebook_size=24)
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    x = torch.randn(3, 20, 16)
    check_call(original, accelerated, x, call)
    assert not operators(accelerated, x, **call)


def test_hooks_on_the_codebook_are_called():
    model = VectorQuantize(dim=16, codebook_size=24)
    genperf.accelerate(model)
    calls = []
    handle = model._codebook.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(1, 4, 16))
    assert calls
    handle.remove()
    assert operators(model, torch.randn(1, 4, 16))


def _edited(tmp_path, old, new):
    """The library's file with one text in the place of another, imported under another name."""
    source = inspect.getsource(sys.modules[VectorQuantize.__module__])
    assert source.count(old) >= 1
    path = tmp_path / "vendored_quantizers.py"
    path.write_text(source.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location("vendored_quantizers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["vendored_quantizers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("old", "new", "methods"),
    [
        ("import torch\n", "import torch\n", None),
        ("def l2norm(t, dim = -1,  eps = 1e-6)", "def l2norm(t, dim = -1,  eps = 1e-12)", "forward"),
        ("old.data.lerp_(new, (1. - decay) * weight)", "old.data.lerp_(new, decay)", "track_cluster_size"),
        ("loss = loss + commit_loss * self.commitment_weight", "loss = loss + commit_loss", "forward"),
        ("num_dead > num_samples", "num_dead >= num_samples", "replace"),
    ],
)
def test_other_sources_are_refused(tmp_path, old, new, methods):
    """A copy of the library's file is known by its source, and one that was edited is not."""
    module = _edited(tmp_path, old, new)
    (entry,) = genperf.accelerate(module.VectorQuantize(dim=16, codebook_size=24)).entries
    assert bool(entry.kernel) == (methods is None)
    if methods is not None:
        assert methods in entry.reason
        assert "not the source of vector-quantize-pytorch" in entry.reason


class Overriding(VectorQuantize):
    def forward(self, x):
        return super().forward(2 * x)


class Subclass(VectorQuantize):
    def __init__(self):
        super().__init__(dim=16, codebook_size=24)
        self.more = 1


def _own_forward():
    module = VectorQuantize(dim=16, codebook_size=24)
    module.forward = lambda x: x
    return module


def _own_sampling():
    module = VectorQuantize(dim=16, codebook_size=24)
    module._codebook.gumbel_sample = lambda *args, **kwargs: None
    return module


def _own_codebook():
    module = VectorQuantize(dim=16, codebook_size=24)
    module._codebook.__class__ = type(
        "Codebook", (type(module._codebook),), {"update_ema": lambda self: None}
    )
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Overriding(dim=16, codebook_size=24), "forward: not the source"),
        (_own_forward, "forward is set on the module itself"),
        (_own_sampling, "gumbel_sample is not the library's"),
        (_own_codebook, "update_ema: not the source"),
    ],
)
def test_what_is_not_the_library_is_left_alone(make, reason):
    model = make()
    (entry,) = genperf.accelerate(model).entries
    assert not entry.kernel
    assert reason in entry.reason


def test_a_subclass_is_covered():
    assert genperf.accelerate(Subclass(), strict=True).accelerated


def test_the_probe_catches_another_result(monkeypatch):
    def wrong(forward, codebook, samples):
        right = quantizer_forward(forward, codebook, samples)

        def method(self, x, *args, **kwargs):
            quantized, indices, loss = right(self, x, *args, **kwargs)
            return quantized, indices, loss * (1 + 1e-3)

        return method

    quantizer_forward = pattern.quantizer_forward
    monkeypatch.setattr(pattern, "quantizer_forward", wrong)
    (entry,) = genperf.accelerate(VectorQuantize(dim=16, codebook_size=24)).entries
    assert entry.reason == "its forward in training gives something else"
