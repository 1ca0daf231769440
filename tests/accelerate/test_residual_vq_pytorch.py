"""accelerate on ResidualVQ and GroupedResidualVQ of vector-quantize-pytorch: one call from the same state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import genperf

library = pytest.importorskip("vector_quantize_pytorch")
ResidualVQ, GroupedResidualVQ, VectorQuantize = (
    library.ResidualVQ,
    library.GroupedResidualVQ,
    library.VectorQuantize,
)
pytestmark = pytest.mark.filterwarnings("ignore")

LEARNED = {"learnable_codebook": True, "ema_update": False}
IN_ONE_OP = [
    {},
    {"rotation_trick": False},
    {"codebook_dim": 8},
    {"codebook_size": (24, 12, 7)},
    {"shared_codebook": True},
    {"threshold_ema_dead_code": 2},
    {"quantize_dropout": True},
    {"quantize_dropout": True, "quantize_dropout_multiple_of": 2},
    {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "threshold_ema_dead_code": 2},
    LEARNED,
    {"quant_grad_frac": 0.5},
    {"quant_grad_frac": 0.5, "rotation_trick": False},
    {"commitment_weight": 0.0},
    {"commitment_weight": 0.3},
    {"return_zeros_for_masked_padding": False},
    {"freeze_codebook": True},
    {"route_gradients_to_input": False},
]
STAGE_BY_STAGE = [
    {"use_cosine_sim": True},
    {"diveq": True, "threshold_ema_dead_code": 2},
    {"affine_param": True},
    {"orthogonal_reg_weight": 0.1},
]
CALLS = [
    {},
    {"x_gradient": False},
    {"freeze_codebook": True},
    {"return_all_codes": True},
    {"mask": torch.arange(60).view(3, 20) % 7 > 2},
]


def observed(module, x, call):
    """What a copy of the module returns, the gradients, its state and that of the generator afterwards."""
    module, call = copy.deepcopy(module), dict(call)
    x = x.clone().requires_grad_(call.pop("x_gradient", True))
    torch.manual_seed(5)
    outputs = module(x, **call)
    flat = [y for part in outputs for y in (part if isinstance(part, tuple) else (part,))]
    leaves = [y for y in flat if y.requires_grad and not y.is_leaf]
    if leaves:
        torch.autograd.backward(leaves, [torch.linspace(-1, 1, y.numel()).view(y.shape) for y in leaves])
    return {
        "outputs": flat,
        "requires_grad": [y.requires_grad for y in flat],
        "x.grad": x.grad,
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "state": dict(module.state_dict()),
        "generator": torch.get_rng_state(),
    }


def check_call(original, accelerated, x, call):
    try:
        expected = observed(original, x, call)
    except Exception as error:
        with pytest.raises(type(error)):
            observed(accelerated, x, call)
        return
    actual = observed(accelerated, x, call)
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-6, check_stride=False)


def operators(module, *args, **kwargs):
    return {choice.operator for choice in genperf.explain(module, *args, **kwargs).choices}


def built(grouped, options):
    torch.manual_seed(0)
    options = {"num_quantizers": 3, "codebook_size": 24, **options}
    if grouped:
        return GroupedResidualVQ(dim=16, groups=2, **options)
    return ResidualVQ(dim=16, **options)


@pytest.mark.parametrize("grouped", [False, True], ids=["residual", "grouped"])
@pytest.mark.parametrize("options", [*IN_ONE_OP, *STAGE_BY_STAGE], ids=str)
def test_one_call(options, grouped):
    original = built(grouped, options)
    if options.get("affine_param"):
        original(torch.randn(2, 9, 16))
    accelerated = copy.deepcopy(original)
    assert not genperf.accelerate(accelerated).left_alone
    for x in (torch.randn(3, 20, 16), torch.randn(50, 16)):
        for training in (True, False):
            original.train(training)
            accelerated.train(training)
            ran = operators(copy.deepcopy(accelerated), x.clone().requires_grad_())
            learned_in_evaluation = options is LEARNED and not training
            in_one_op = options in IN_ONE_OP and not learned_in_evaluation
            assert ("residual_vector_quantize" in ran) == in_one_op
            assert in_one_op or ran & {"vector_quantize", "vq_nearest"}
            for call in CALLS:
                check_call(original, accelerated, x, call)


@pytest.mark.parametrize("grouped", [False, True], ids=["residual", "grouped"])
def test_kmeans(grouped):
    """The first call finds the codebooks stage by stage, with the library's draws; then it is one op."""
    original = built(grouped, {"kmeans_init": True, "kmeans_iters": 2, "codebook_size": 4})
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    x = torch.randn(
        10, 60, 16
    )  # far more vectors than codewords: a codeword of one vector leaves rounding alone
    check_call(original, accelerated, x, {})
    for module in (original, accelerated):
        torch.manual_seed(0)
        module(x)
    # Sums of about 150 vectors, in another order.
    torch.testing.assert_close(accelerated.state_dict(), original.state_dict(), rtol=5e-5, atol=1e-5)
    assert "residual_vector_quantize" in operators(accelerated, x)


def test_dropout_with_a_given_seed():
    original = built(False, {"quantize_dropout": True})
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    lengths = set()
    for seed in range(6):
        call = {"rand_quantize_dropout_fixed_seed": seed}
        check_call(original, accelerated, torch.randn(3, 20, 16), call)
        lengths.add((copy.deepcopy(accelerated)(torch.randn(1, 4, 16), **call)[1] >= 0).sum().item())
    assert lengths == {4, 8, 12}


def test_half_precision_rounds_between_the_stages():
    original = built(False, {}).eval()
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    x = torch.randn(3, 20, 16).bfloat16()
    theirs, ours = original(x), accelerated(x)
    assert [y.dtype for y in ours] == [y.dtype for y in theirs]
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_codes_are_exact(autocast):
    """By float64, from the residuals of the codes chosen before; under CPU autocast too."""
    original = built(False, {"codebook_size": 256, "num_quantizers": 4}).eval()
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    x = torch.randn(4, 200, 16)

    def wrong(module):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            indices = module(x)[1]
        residual, count = x, 0
        for i, layer in enumerate(original.layers):
            words = layer._codebook.embed[0]
            distances = torch.cdist(residual.double(), words.double())
            chosen = distances.gather(-1, indices[..., i, None])[..., 0]
            count += (chosen > distances.amin(-1)).sum().item()
            residual = residual - words[indices[..., i]]
        return count

    assert wrong(accelerated) == 0
    assert (wrong(original) > 0) or not autocast


def test_compiled_in_training_without_a_graph_break():
    torch._dynamo.reset()
    original = built(False, {"num_quantizers": 2})
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    compiled = torch.compile(accelerated, fullgraph=True)
    for _ in range(2):
        x, results = torch.randn(3, 20, 16), []
        for module in (original, compiled):
            leaf = x.clone().requires_grad_()
            quantized, indices, losses = module(leaf)
            (quantized.square().sum() + losses.sum()).backward()
            results.append([quantized, indices, losses, leaf.grad])
        torch.testing.assert_close(results[1], results[0], rtol=5e-5, atol=5e-6)
        torch.testing.assert_close(accelerated.state_dict(), original.state_dict(), rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("grouped", [False, True], ids=["residual", "grouped"])
def test_the_model_is_what_it_was(grouped):
    model = built(grouped, {})
    cls, keys, x = type(model), list(model.state_dict()), torch.randn(3, 20, 16)
    report = genperf.accelerate(model, mode="training", strict=True)
    entries = {entry.name: entry for entry in report.entries}
    assert entries[""].was == f"{cls.__name__}.forward"
    assert entries[""].kernel == "residual_vector_quantize"
    assert list(model.state_dict()) == keys
    assert isinstance(model, cls)
    assert type(pickle.loads(pickle.dumps(model))) is cls
    assert report.verify(x, seconds=0.05)
    report.restore()
    assert type(model) is cls
    assert not operators(model, x)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"beam_size": 2}, "beam_size searches"),
        ({"implicit_neural_codebook": True}, "a codebook for each vector"),
        ({"accept_image_fmap": True}, "images or channels first"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_options_that_are_left_alone(options, reason):
    original = built(False, options)
    accelerated = copy.deepcopy(original)
    report = genperf.accelerate(accelerated)
    (entry,) = report.left_alone
    assert (entry.name, entry.was) == ("", "ResidualVQ.forward")
    assert reason in entry.reason
    x = torch.randn(2, 16, 16, 16) if "accept_image_fmap" in options else torch.randn(2, 5, 16)
    original.eval()
    torch.testing.assert_close(accelerated.eval()(x), original(x), rtol=1e-5, atol=1e-6)


def test_arguments_that_are_left_alone():
    original = built(False, {})
    accelerated = copy.deepcopy(original)
    genperf.accelerate(accelerated)
    x = torch.randn(2, 5, 16)
    check_call(original, accelerated, x, {"beam_size": 2})
    assert "residual_vector_quantize" not in operators(copy.deepcopy(accelerated), x, beam_size=2)
    check_call(original, accelerated, x, {"indices": torch.arange(30).view(2, 5, 3) % 24})


def test_hooks_on_a_stage_are_called():
    model = built(False, {})
    genperf.accelerate(model)
    calls = []
    handle = model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 4, 16)
    assert "residual_vector_quantize" not in operators(model, x)
    assert len(calls) == 1
    handle.remove()
    assert "residual_vector_quantize" in operators(model, x)


def test_a_stage_of_another_class_is_left_alone():
    class Other(VectorQuantize):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = built(False, {})
    model.layers[1] = Other(dim=16, codebook_size=24)
    left = {entry.name for entry in genperf.accelerate(model).left_alone}
    assert left == {"", "layers.1"}
