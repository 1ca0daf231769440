"""State, dtypes, masks and compilation of the modules of vector quantization."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genperf.nn import GroupedResidualVQ, ResidualVQ, VectorQuantize

MODULES = {
    "plain": lambda: VectorQuantize(16, 32),
    "replaced": lambda: VectorQuantize(16, 32, threshold_ema_dead_code=2),
    "k-means": lambda: VectorQuantize(16, 32, kmeans_init=True, threshold_ema_dead_code=2),
    "cosine": lambda: VectorQuantize(16, 32, use_cosine_sim=True, threshold_ema_dead_code=2),
    "learned": lambda: VectorQuantize(16, 32, learnable_codebook=True, threshold_ema_dead_code=2),
    "heads": lambda: VectorQuantize(
        16, 32, 8, 2, True, zero_debias=True, threshold_ema_dead_code=2, rotation_trick=False
    ),
    "heads of one": lambda: VectorQuantize(16, 32, 4, 3, kmeans_init=True),
    "residual": lambda: ResidualVQ(
        dim=16, codebook_size=32, num_quantizers=3, quantize_dropout=True, threshold_ema_dead_code=1
    ),
    "residual, shared": lambda: ResidualVQ(
        dim=16, codebook_size=32, num_quantizers=3, shared_codebook=True, threshold_ema_dead_code=1,
        kmeans_init=True,
    ),
    "residual of cosines": lambda: ResidualVQ(
        dim=16, codebook_size=32, num_quantizers=3, use_cosine_sim=True, quantize_dropout=True
    ),
    "grouped": lambda: GroupedResidualVQ(
        dim=16, codebook_size=32, num_quantizers=2, groups=2, threshold_ema_dead_code=1
    ),
}  # fmt: skip
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


def step(module, seed, function=None, dtype=torch.float32):
    """Everything that a training step gives and leaves."""
    torch.manual_seed(seed)
    x = torch.randn(4, 50, 16).to(dtype).requires_grad_()
    module.zero_grad()
    quantized, indices, losses = (module if function is None else function)(x)[:3]
    (quantized.float().square().sum() + losses.sum()).backward()
    gradients = [p.grad for p in module.parameters()]
    return [quantized, indices, losses, x.grad, *gradients, *(b.clone() for b in module.buffers())]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def made(make, seed=0):
    torch.manual_seed(seed)
    return make()


@every_module
def test_compiled(make):
    torch._dynamo.reset()  # or the modules of other tests count as calls that were compiled again
    module = made(make)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        assert equal(step(twin, seed, compiled), step(module, seed))
    module.eval()
    twin.eval()
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        assert equal(compiled(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "learned", "residual of cosines", "grouped"])
def test_gradients_compiled_by_inductor(name):
    """They are by the codewords before the update, which inductor would read after it."""
    torch._dynamo.reset()
    module = made(MODULES[name])
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True)
    for seed in range(2):
        twin.load_state_dict(module.state_dict())
        actual, expected = step(twin, seed, compiled), step(module, seed)
        for one, other in zip(actual[:4], expected[:4], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        index = args[1] if name == "index" else ()
        if name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal"):
            self.found.append(name)
        if any(i is not None and i.dtype == torch.bool for i in index):
            self.found.append("index by bool")
        return function(*args, **(kwargs or {}))


@every_module
def test_no_host_reads(make):
    """None in training with a mask, once k-means is through."""
    module = made(make)
    mask = torch.rand(4, 50) < 0.7
    for _ in range(2):
        x = torch.randn(4, 50, 16, requires_grad=True)
        with HostReads() as reads:
            quantized, _, losses = module(x, mask=mask)
            (quantized.sum() + losses.sum()).backward()
    assert not reads.found
    with HostReads() as reads:
        torch.ones(3)[torch.ones(3) > 0].sum().item()
    assert reads.found == ["index by bool", "_local_scalar_dense"]


@every_module
def test_repeatable(make):
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            module = made(make)
            results.append([tensor for seed in range(3) for tensor in step(module, seed)])
    finally:
        torch.set_num_threads(threads)
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@every_module
def test_copies(make):
    module = made(make)
    step(module, 0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    expected = step(module, 1)
    for other in copies:
        assert equal(step(other, 1), expected)
    assert (
        len(
            {id(m._codebook.token) for c in (module, *copies) for m in c.modules() if hasattr(m, "_codebook")}
        )
        >= 4
    )


@every_module
def test_checkpoint(make):
    module, other = made(make), made(make, 1)
    step(module, 0)
    step(other, 3)
    other.load_state_dict(module.state_dict())
    module.eval()
    other.eval()
    x = torch.randn(4, 50, 16)
    assert equal(module(x), other(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_module
def test_half_inputs(make, dtype):
    """Computed as the same numbers in float32, but for the rounding of the output."""
    module = made(make)
    twin = copy.deepcopy(module)
    quantized, indices, losses, gradient, *_ = step(module, 0, dtype=dtype)
    torch.manual_seed(0)
    x = torch.randn(4, 50, 16).to(dtype).float().requires_grad_()
    expected = twin(x)[:3]
    (expected[0].to(dtype).float().square().sum() + expected[2].sum()).backward()
    assert torch.equal(quantized, expected[0].to(dtype))
    assert torch.equal(indices, expected[1])
    assert torch.equal(losses, expected[2])
    assert gradient.dtype == dtype
    # The rotation of a residual of 0 multiplies by |q| / 1e-6, as the library's does: beyond float16.
    rounded = x.grad.to(dtype).float()
    torch.testing.assert_close(gradient.float(), rounded, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_module
def test_state_of_another_dtype(make, dtype):
    module = made(make).to(dtype)
    results = step(module, 0, dtype=dtype)
    assert results[0].dtype == dtype
    assert results[2].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The rotation of a residual of 0 multiplies by |q| / 1e-6, which may be beyond float16.
    assert all(r.isfinite().all() for r in (*results[:3], *results[4:]))
    assert not results[3].isnan().any()
    assert dtype == torch.float16 or results[3].isfinite().all()
    assert all(
        b.dtype == dtype for n, b in module.named_buffers() if n.split(".")[-1].startswith(("embed", "clus"))
    )


def test_float64_is_computed_in_float64():
    module = VectorQuantize(4, 8, decay=0.5).double().eval()
    x = module.codebook[2:3] + 1e-13
    quantized, indices, _ = module(x)
    assert indices.item() == 2
    assert torch.equal(quantized, module.codebook[2:3])


@every_module
def test_autocast_changes_no_index(make):
    module = made(make)
    twin = copy.deepcopy(module)
    if any(hasattr(m, "has_projections") and m.has_projections for m in module.modules()):
        pytest.skip("the projections before it are computed in bfloat16")
    expected = step(module, 0)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        actual = twin(torch.randn(4, 50, 16))
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, module.get_buffer(name)), name


def test_autocast_with_projections():
    module = VectorQuantize(16, 32, 8)
    x = torch.randn(4, 50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        projected = module.project_in(x)
        indices = module.eval()(x)[1]
    assert projected.dtype == torch.bfloat16
    distances = (projected.double()[..., None, :] - module.codebook.double()).square().sum(-1)
    assert torch.equal(indices, distances.argmin(-1))


@every_module
def test_empty_batch(make):
    module = made(make)
    before = copy.deepcopy(module.state_dict())
    x = torch.zeros(0, 50, 16, requires_grad=True)
    quantized, indices, losses = module(x)[:3]
    (quantized.sum() + losses.sum()).backward()
    assert quantized.shape == (0, 50, 16)
    assert indices.numel() == 0
    assert (losses == 0).all()
    assert x.grad.shape == x.shape
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_module
def test_vectors_that_are_not_finite_change_no_codeword(make, bad):
    """Nor may padding, whatever it holds."""
    module = made(make)
    twin = copy.deepcopy(module)
    first = torch.randn(4, 50, 16)
    x = torch.randn(4, 50, 16)
    mask = torch.ones(4, 50, dtype=torch.bool)
    mask[0, 3] = mask[2, 7:20] = False
    broken = torch.where(mask[..., None], x, bad)
    for one, second, kwargs in ((module, broken, {}), (twin, x, {"mask": mask})):
        torch.manual_seed(2)
        one(first)
        one(second, **kwargs)
    for name, buffer in module.named_buffers():
        assert buffer.isfinite().all()
        assert torch.equal(buffer, twin.get_buffer(name)), name
    padded = torch.where(mask[..., None], x, bad).requires_grad_()
    quantized, _, losses = module(padded, mask=mask)
    assert losses.isfinite().all()
    assert quantized.isfinite().all()


def test_masked_vectors_do_not_matter():
    module = made(MODULES["replaced"])
    twin = copy.deepcopy(module)
    mask = torch.rand(4, 50) < 0.5
    x = torch.randn(4, 50, 16)
    other = torch.where(mask[..., None], x, torch.randn(4, 50, 16))
    for seed in range(3):
        torch.manual_seed(seed)
        expected = module(x, mask=mask)
        torch.manual_seed(seed)
        assert equal(twin(other, mask=mask), expected)
    assert equal(module.buffers(), twin.buffers())


def test_gradient_of_the_masked_loss_is_that_of_its_vectors():
    module = VectorQuantize(16, 32, learnable_codebook=True)
    mask = torch.rand(4, 50) < 0.5
    x = torch.randn(4, 50, 16, requires_grad=True)
    of_x, of_codes = torch.autograd.grad(module(x, mask=mask)[2], [x, module._codebook.embed])
    chosen = x[mask].detach().requires_grad_()
    expected, expected_codes = torch.autograd.grad(module(chosen)[2], [chosen, module._codebook.embed])
    assert (of_x[~mask] == 0).all()
    torch.testing.assert_close(of_x[mask], expected)
    torch.testing.assert_close(of_codes, expected_codes)


def test_backward_after_another_forward():
    """The codewords that the gradient belongs to are those before the update."""
    module, twin = made(MODULES["plain"]), made(MODULES["plain"])
    x = torch.randn(4, 50, 16, requires_grad=True)
    expected = torch.autograd.grad(twin(x)[2], x)
    loss = module(x)[2]
    module(torch.randn(4, 50, 16))
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected[0])


def test_freezing():
    module = VectorQuantize(16, 32, threshold_ema_dead_code=2)
    before = module._codebook.embed.clone()
    module(torch.randn(4, 50, 16), freeze_codebook=True)
    assert torch.equal(module._codebook.embed, before)
    module.freeze_codebook = True
    module(torch.randn(4, 50, 16))
    assert torch.equal(module._codebook.embed, before)
    module(torch.randn(4, 50, 16), freeze_codebook=False)
    assert not torch.equal(module._codebook.embed, before)


def test_loss_breakdown():
    module = VectorQuantize(16, 32, commitment_weight=0.5)
    *_, loss, parts = module(torch.randn(4, 50, 16), return_loss_breakdown=True)
    assert parts.commitment * 0.5 == loss
    assert parts.codebook_diversity == parts.orthogonal_reg == parts.inplace_optimize == 0


@pytest.mark.parametrize("layout", ["image", "channels first"])
def test_channels_first_is_contiguous(layout):
    options = {"accept_image_fmap": True} if layout == "image" else {"channel_last": False}
    shape = (2, 16, 5, 7) if layout == "image" else (2, 16, 9)
    assert VectorQuantize(16, 32, **options)(torch.randn(shape))[0].is_contiguous()


def test_dropout_draws_every_stage():
    module = ResidualVQ(dim=4, codebook_size=8, num_quantizers=5, quantize_dropout=True,
                        quantize_dropout_cutoff_index=1)  # fmt: skip
    torch.manual_seed(0)
    kept = [int((module(torch.randn(2, 3, 4))[1][0, 0] >= 0).sum()) for _ in range(64)]
    assert set(kept) == {2, 3, 4, 5}


def test_dropped_stages_keep_their_averages():
    module = ResidualVQ(dim=4, codebook_size=8, num_quantizers=3, quantize_dropout=True)
    before = copy.deepcopy(module.state_dict())
    seed = next(s for s in range(99) if module.draw_cutoff("cpu", s) == 1)
    module(torch.randn(2, 30, 4), rand_quantize_dropout_fixed_seed=seed)
    same = {n.split(".")[1] for n, v in module.state_dict().items() if torch.equal(v, before[n])}
    changed = {n.split(".")[1] for n, v in module.state_dict().items() if not torch.equal(v, before[n])}
    assert "2" in same
    assert changed == {"0", "1"}
