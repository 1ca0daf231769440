"""accelerate on vector quantizers as repositories write them."""

import copy
import pickle
import re

import pytest
import torch
import torch.multiprocessing
from torch.utils._pytree import tree_leaves

import genperf

IMAGE, LAST, AUDIO = (2, 6, 7, 5), (2, 7, 5, 6), (2, 6, 33)
#: class, options, shape of the input, the entries of the report
CASES = [
    ("ImageQuantizer", {}, IMAGE, {"forward"}),
    ("ImageQuantizer", {"legacy": False, "sane_index_shape": True}, IMAGE, {"forward"}),
    ("ImageQuantizer", {"beta": 0.0}, IMAGE, {"forward"}),
    ("OneHotQuantizer", {}, IMAGE, {"forward"}),
    ("TransposedAverages", {}, LAST, {"forward"}),
    ("TransposedAverages", {}, (40, 6), {"forward"}),
    ("SmoothedAverages", {}, LAST, {"forward"}),
    ("Normalised", {}, IMAGE, {"forward"}),
    ("Factorised", {}, (2, 10, 33), {"decode_latents"}),
    ("AudioCodebook", {}, (2, 33, 6), {"quantize", "forward: averages of codewords"}),
    ("AudioCodebook", {"kmeans_init": True}, (2, 33, 6), {"quantize", "forward: averages of codewords"}),
]


def seen(model, x, training):
    """Outputs, gradients and tensors after one call, all by name; the generator starts the same."""
    model.train(training)
    model.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(3)
    output = model(x)
    leaves = list(output.values()) if isinstance(output, dict) else tree_leaves(output)
    generator = torch.Generator().manual_seed(1)
    real = [y for y in leaves if isinstance(y, torch.Tensor) and y.requires_grad]
    if real:
        weights = [torch.randn(y.shape, generator=generator).to(y) for y in real]
        torch.autograd.backward(real, weights)
    found = {f"output {i}": y for i, y in enumerate(leaves)}
    found["type"] = type(output)
    found["gradient"] = x.grad
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return found | {n: t.detach().clone() for n, t in model.state_dict().items()}


def assert_same(found, expected, strides=True):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].stride() == value.stride() or not strides, name
            tolerance = 2e-6 * max(1.0, value.abs().max().item()) if value.is_floating_point() else 0
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert found[name] == value, name


def build(quantizers, name, options):
    torch.manual_seed(0)
    return getattr(quantizers, name)(**options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "options", "shape", "methods"), CASES)
def test_gives_what_it_gave(quantizers, name, options, shape, methods, training):
    original = build(quantizers, name, options)
    x, cls = torch.randn(shape), type(original)
    fast = copy.deepcopy(original)
    report = genperf.accelerate(fast, mode="training", strict=True)
    assert {entry.was for entry in report.accelerated} == {f"{name}.{m}" for m in methods}
    assert type(fast) is not cls
    assert isinstance(fast, cls)
    keys = list(original.state_dict())
    for _ in range(3):
        assert_same(seen(fast, x, training), seen(original, x, training))
    assert list(fast.state_dict()) == keys
    last = x.transpose(1, -1).contiguous().transpose(1, -1)  # the same values in another memory layout
    assert_same(seen(fast, last, training), seen(original, last, training))
    assert type(pickle.loads(pickle.dumps(fast))) is cls
    assert_same(seen(copy.deepcopy(fast), x, training), seen(original, x, training))
    report.restore()
    assert type(fast) is cls


def test_the_matrix_of_distances_is_not_made(quantizers):
    model = build(quantizers, "ImageQuantizer", {"n_e": 4096, "e_dim": 6})
    genperf.accelerate(model, mode="training")
    rows = 16 * 16
    largest = []
    with _Largest(largest):
        output = model(torch.randn(1, 6, 16, 16, requires_grad=True))
        (output[0].sum() + output[1]).backward()
    assert max(largest) < rows * 4096


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes.extend(y.numel() for y in tree_leaves(result) if isinstance(y, torch.Tensor))
        return result


def test_codes_under_autocast_are_those_of_the_distances(quantizers):
    model = build(quantizers, "ImageQuantizer", {"n_e": 256, "e_dim": 64})
    model.embedding.weight.data.normal_()
    x = torch.randn(4, 64, 24, 24)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 64).double()
    nearest = torch.cdist(rows, model.embedding.weight.detach().double()).argmin(1)
    with torch.autocast("cpu", torch.bfloat16):
        wrong = model(x)[2][2] != nearest
        genperf.accelerate(model, mode="training")
        output = model(x)
    assert wrong.any()  # what rounding to bfloat16 does
    assert torch.equal(output[2][2], nearest)
    assert output[0].dtype == torch.float32
    assert model(x.bfloat16())[0].dtype == torch.float32
    low = model.bfloat16()(x.bfloat16())
    assert low[0].dtype == low[1].dtype == torch.bfloat16


def test_follows_its_attributes(quantizers):
    original = build(quantizers, "ImageQuantizer", {})
    fast = copy.deepcopy(original)
    genperf.accelerate(fast, mode="training")
    x = torch.randn(IMAGE)
    for model in (original, fast):
        model.beta = 0.7  # a weight that is read
    assert_same(seen(fast, x, True), seen(original, x, True))
    calls = counted(fast)
    fast(x)
    assert calls == []
    for model in (original, fast):
        model.legacy = False  # another branch: the original runs
    assert_same(seen(fast, x, True), seen(original, x, True))
    assert calls


def counted(model):
    """The calls of the embedding, which the accelerated forward does not make."""
    calls, function = [], type(model.embedding).forward
    model.embedding.forward = lambda x: calls.append(1) or function(model.embedding, x)
    return calls


def test_average_follows_its_attributes(quantizers):
    original = build(quantizers, "TransposedAverages", {})
    fast = copy.deepcopy(original)
    genperf.accelerate(fast, mode="training")
    for model in (original, fast):
        model.decay, model.eps = 0.5, 1e-3
    x = torch.randn(LAST)
    assert_same(seen(fast, x, True), seen(original, x, True))


def test_calls_that_are_not_covered_run_the_original(quantizers):
    original = build(quantizers, "ImageQuantizer", {})
    fast = copy.deepcopy(original)
    genperf.accelerate(fast, mode="training")
    x = torch.randn(IMAGE)
    calls = counted(fast)
    fast(z=x)
    fast(x, None, return_logits=False)
    assert not calls
    with pytest.raises(AssertionError):
        fast(x, temp=2.0)
    with pytest.raises(RuntimeError):
        fast(x[:, :5])
    for given in (x.double(), x[:0]):
        model = copy.deepcopy(original)
        fast_twin = copy.deepcopy(fast)
        if given.dtype == torch.float64:
            model, fast_twin = model.double(), fast_twin.double()
        torch.testing.assert_close(fast_twin(given)[0], model(given)[0])
    handle = fast.embedding.register_forward_hook(lambda *_: calls.append(2))
    fast(x)
    handle.remove()
    assert 2 in calls


def test_a_frozen_codebook_that_is_set_free_gets_its_gradient(quantizers):
    original = build(quantizers, "ImageQuantizer", {})
    original.embedding.weight.requires_grad_(False)
    fast = copy.deepcopy(original)
    genperf.accelerate(fast, mode="training")
    x = torch.randn(IMAGE)
    assert_same(seen(fast, x, True), seen(original, x, True))
    for model in (original, fast):
        model.embedding.weight.requires_grad_()
    assert_same(seen(fast, x, True), seen(original, x, True))


REFUSED = [
    ("ImageQuantizer", {"remap": "3 1 2 5"}, r"its output 4, torch.int64 of shape \(\d+,\), is not known"),
    ("RestartingQuantizer", {}, "it branches on self.training and self.cluster_size.min"),
    ("InnerProductQuantizer", {}, "its output 0"),
    ("NoisyQuantizer", {}, "it draws random numbers"),
    ("CountingQuantizer", {}, "it stores last on its module"),
    ("ImageQuantizer", {"beta": -1.0}, "a weight of its loss is negative"),
    ("ImageQuantizer", {"n_e": 3}, "fewer than 4 codewords"),
]


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED)
def test_refuses(quantizers, name, options, reason):
    model = build(quantizers, name, options)
    cls = type(model)
    report = genperf.accelerate(model)
    assert type(model) is cls
    assert report.left_alone
    for entry in report.left_alone:
        assert entry.was.startswith(f"{name}.forward")
        assert re.search(reason, entry.reason)


def test_a_mode_that_is_not_covered_runs_the_original(quantizers):
    original = build(quantizers, "EntropyQuantizer", {})
    fast = copy.deepcopy(original)
    report = genperf.accelerate(fast, mode="training")
    assert [e.was for e in report.accelerated] == ["EntropyQuantizer.forward in evaluation"]
    assert [e.was for e in report.left_alone] == ["EntropyQuantizer.forward in training"]
    assert "its output 1, torch.float64 of shape (), is not known" in report.left_alone[0].reason
    x = torch.randn(IMAGE)
    for training in (True, False):
        assert_same(seen(fast, x, training), seen(original, x, training))
    assert not genperf.accelerate(copy.deepcopy(original), mode="inference").left_alone


def test_what_is_no_quantizer_is_not_reported(quantizers):
    model = build(quantizers, "TextEncoder", {})
    assert not genperf.accelerate(model).entries


@pytest.mark.parametrize("n_q", [None, 2])
def test_residual_codes(quantizers, n_q):
    original = build(quantizers, "ResidualCodec", {})
    fast = copy.deepcopy(original)
    report = genperf.accelerate(fast, mode="training", strict=True)
    assert report.entries[0].was == "ResidualCodec.encode: self.layers one after another"
    assert report.entries[0].kernel == "residual_vector_quantize"
    x = 2 * torch.randn(AUDIO)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[..., :1], x.bfloat16(), x.half()):
        expected = original.encode(given.float(), n_q=n_q)
        assert torch.equal(fast.encode(given, n_q=n_q), expected)
        assert fast.encode(given, n_q=n_q).dtype == torch.int64
    assert fast.encode(x[..., :0]).shape == original.encode(x[..., :0]).shape
    for training in (True, False):
        for _ in range(3):
            assert_same(seen(fast, x, training), seen(original, x, training))


def test_residual_codes_of_layers_that_project(quantizers):
    original = build(quantizers, "ResidualCodec", {"codebook_dim": 4})
    fast = copy.deepcopy(original)
    report = genperf.accelerate(fast, mode="training")
    (left,) = report.left_alone
    assert left.was == "ResidualCodec.encode: self.layers one after another"
    assert left.reason == "its layers do more than to search a codebook" or "cannot be run" in left.reason
    x = torch.randn(AUDIO)
    assert torch.equal(fast.encode(x), original.encode(x))


def test_a_residual_that_is_used_keeps_its_loop(quantizers):
    original = build(quantizers, "UsedResidual", {})
    fast = copy.deepcopy(original)
    report = genperf.accelerate(fast, mode="training")
    assert all("one after another" not in entry.was for entry in report.entries)
    x = torch.randn(AUDIO)
    for found, expected in zip(fast.encode(x), original.encode(x), strict=True):
        assert torch.equal(found, expected)


def test_a_codebook_that_is_a_property(quantizers):
    model = build(quantizers, "LazyCodebook", {})
    report = genperf.accelerate(model, strict=True)
    assert [entry.was for entry in report.accelerated] == ["LazyCodebook.quantize"]
    assert model._embed is None  # it may be computed when the weights are loaded, not before
    x = torch.randn(2, 33, 6)
    expected = torch.cdist(x, model.embed).argmin(-1)
    assert torch.equal(model.encode(x), expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(case[0], case[2]) for case in CASES if case[0] != "AudioCodebook" and not case[1]]
    + [("GumbelQuantizer", (2, 5, 7, 4))],
)
def test_compiles_without_a_graph_break(quantizers, name, shape):
    model = build(quantizers, name, {})
    genperf.accelerate(model, mode="training", strict=True)
    x = torch.randn(shape)
    for training in (True, False):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        expected = seen(copy.deepcopy(model), x, training)
        found = seen(compiled, x, training)
        found = {n.replace("_orig_mod.", ""): value for n, value in found.items()}
        assert found.keys() == expected.keys()
        for key in expected:
            if isinstance(expected[key], torch.Tensor):
                torch.testing.assert_close(found[key], expected[key])


def test_verify(quantizers):
    for name, options, shape, _ in CASES:
        model = build(quantizers, name, options)
        report = genperf.accelerate(model, mode="training")
        result = report.verify(torch.randn(shape), seconds=0)
        assert result, f"{name}: {result}"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("straight_through", [True, False])
def test_gumbel(quantizers, straight_through, training):
    original = build(quantizers, "GumbelQuantizer", {"straight_through": straight_through})
    fast = copy.deepcopy(original)
    report = genperf.accelerate(fast, mode="training", strict=True)
    assert [(e.was, e.kernel) for e in report.accelerated] == [("GumbelQuantizer.forward", "gumbel_quantize")]
    x = torch.randn(2, 5, 7, 4)
    assert_same(seen(fast, x, training), seen(original, x, training), strides=False)
    for model in (original, fast):
        model.temperature, model.kl_weight = 0.6, 0.5  # as it is annealed
    assert_same(seen(fast, x, training), seen(original, x, training), strides=False)
    for arguments in ({"temp": 2.0}, {"return_logits": True}):
        results = []
        for model in (original, fast):
            torch.manual_seed(2)
            results.append(tree_leaves(model(x, **arguments)))
        for found, expected in zip(*results, strict=True):
            assert found is expected is None or torch.equal(found, expected)
    assert report.verify(x, seconds=0)


def test_gumbel_with_its_own_noise(quantizers):
    model = build(quantizers, "GumbelQuantizer", {})
    report = genperf.accelerate(model, rng="philox", strict=True)
    z_q, diff, (_, _, indices) = model(torch.randn(2, 5, 7, 4))
    assert torch.equal(z_q, model.embed.weight[indices].permute(0, 3, 1, 2))
    assert diff.requires_grad
    assert report.verify(torch.randn(2, 5, 7, 4), seconds=0)  # with the noise of the original


def test_gumbel_of_other_probabilities_is_refused(quantizers):
    model = build(quantizers, "SharpGumbelQuantizer", {})
    (entry,) = genperf.accelerate(model).left_alone
    assert entry.reason == "in training it does not give what a draw by Gumbel-softmax gives"


def _process(rank, file, accelerated, results):
    import importlib.util
    import pathlib
    import sys

    path = pathlib.Path(__file__).with_name("quantizers.py")
    spec = importlib.util.spec_from_file_location("accelerate_quantizers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["accelerate_quantizers"] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = module.TransposedAverages()
    if accelerated:
        assert genperf.accelerate(model, mode="training", strict=True).accelerated
    torch.manual_seed(rank + 1)
    for step in range(4):
        model(torch.randn(3 + rank + step, 5, 6))
    torch.save(model.state_dict(), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_averages_over_two_processes(tmp_path):
    states = []
    for accelerated in (False, True):
        folder = tmp_path / str(accelerated)
        folder.mkdir()
        torch.multiprocessing.spawn(_process, (folder / "store", accelerated, folder), nprocs=2)
        states.append([torch.load(folder / f"{rank}.pt") for rank in (0, 1)])
    for of_rank in states[1]:
        for key, expected in states[0][0].items():
            torch.testing.assert_close(of_rank[key], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(of_rank[key], states[1][0][key])
