"""genperf.ops.mixture_logistic_nll against the definitions of the public libraries in float64."""

from __future__ import annotations

import math

import pytest
import torch
from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.cases import Case, normals
from genperf_testing.mixture import eager_nll, far_apart, level_values, parameters_of, random_levels

import genperf
from genperf.bench.measure import peak_bytes
from genperf.ops import mixture_logistic_nll

OPS = ("reference", "cpu", "triton")
CONVENTIONS = ("default", "openai", "vdvae", "nvae")
any_convention = pytest.mark.parametrize("convention", CONVENTIONS)


# On a GPU the contract suite runs the ops; these tensors are on the CPU.
@pytest.fixture(params=parameters(b for b in BACKENDS if b.backend in OPS and b.device == "cpu"))
def backend(request):
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


def _case(name, mixtures, channels, per_sample=True, backends=OPS, **options):
    n = mixtures * (3 if channels == 1 else 10)

    def function(*tensors):
        *planes, x = tensors
        return (mixture_logistic_nll(torch.stack(planes, 1), x, **options),)

    def inputs(shape):
        blocks = [normals(shape, i) for i in range(n)]
        for c in range(channels):
            first = mixtures * (1 + c * (2 if channels == 1 else 3))
            for k in range(mixtures):
                blocks[first + k] = blocks[first + k] * 0.5
                blocks[first + mixtures + k] = blocks[first + mixtures + k] * 0.5 - 1.0
        return blocks

    unit = options.get("convention") == "nvae"

    def constants(shape):
        return [random_levels((shape[0], channels, *shape[1:]), options.get("levels", 256), unit).float()]

    return Case(
        name, function, inputs, constants, backends=backends, elementwise=False, per_sample=per_sample,
        packs=True, shapes=((5, 24), (3, 7), (2, 3, 5, 4), (2, 1100), (0, 4), (3, 0)),
    )  # fmt: skip


CASES = (
    _case("grey, sums", 2, 1, reduction="sample"),
    _case("RGB", 1, 3),
    _case(
        "grey, 5 bits, VDVAE, mean",
        1,
        1,
        convention="vdvae",
        levels=32,
        reduction="sample_mean",
        backends=("reference", "cpu"),
    ),
    _case("grey, NVAE, sum", 1, 1, convention="nvae", reduction="sum", per_sample=False),
)


@any_convention
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mixtures", [1, 5, 10])
def test_definition(convention, channels, mixtures, backend):
    if backend.costly and (mixtures != 5 or convention == "vdvae" or channels == 1):
        pytest.skip("others stand for it where calls are slow")
    params = parameters_of(2, mixtures, channels, 5, 15)
    x = random_levels((2, channels, 5, 15), unit=convention == "nvae")
    expected = eager_nll(params.double(), x, "openai" if convention == "vdvae" else convention)
    out = mixture_logistic_nll(params, x.float(), convention=convention)
    assert out.shape == (2, 5, 15)
    assert out.dtype == torch.float32
    # Where a mass is so near 1e-5 that rounding decides, either side of the definition is right.
    near = (out.double() - expected).abs() > 2e-5 * (1 + expected.abs())
    assert near.sum() <= (0 if convention == "default" else 1)


@any_convention
def test_values_at_the_ends(convention, backend):
    if backend.costly and convention == "vdvae":
        pytest.skip("as OpenAI's, and calls are slow")
    params = parameters_of(5, 2, 3, 4, 6, seed=1)
    levels = torch.tensor([0, 1, 127, 254, 255])
    x = level_values(256, convention == "nvae")[levels].view(5, 1, 1, 1).expand(5, 3, 4, 6)
    leaf, exact = params.clone().requires_grad_(), params.double().requires_grad_()
    out = mixture_logistic_nll(leaf, x.float(), convention=convention)
    expected = eager_nll(exact, x, convention)
    torch.testing.assert_close(out.double(), expected, rtol=3e-5, atol=3e-5)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    (true,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(grad.double(), true, rtol=2e-4, atol=2e-4)


def test_the_upper_tail_of_nvae():
    """Its threshold of 0.99 gives the level before the last the tail of both."""
    params = torch.zeros(1, 3, 1)
    params[:, 2] = -1.0
    x = level_values(256, True).view(1, 1, -1)
    each = params.expand(1, 3, 256)
    probs = mixture_logistic_nll(each, x.float(), convention="nvae").double().neg().exp()[0]
    torch.testing.assert_close(
        probs, eager_nll(each.double(), x, "nvae").neg().exp()[0], rtol=1e-5, atol=1e-6
    )
    assert probs.sum() > 1.05
    assert probs[254] > probs[255]


def _sums(levels, log_scales, means, backend):
    """Sums of the probabilities of all levels, for each log-scale and mean."""
    s, m = torch.meshgrid(torch.tensor(log_scales), torch.tensor(means), indexing="ij")
    params = torch.stack([torch.zeros_like(s), m, s]).view(1, 3, -1, 1).float()
    x = level_values(levels).float().expand(1, 1, s.numel(), levels)
    nll = mixture_logistic_nll(params.expand(1, 3, s.numel(), levels), x, levels=levels)
    return nll.double().neg().exp().sum(-1)


@pytest.mark.parametrize("levels", [2, 32, 256])
def test_probabilities_sum_to_one(levels, backend):
    if backend.costly and levels == 256:
        pytest.skip("interpreted, it takes long")
    log_scales = [-7.0, -5.5, -3.0, -1.0, 0.0, 1.5, 3.0]
    sums = _sums(levels, log_scales, [-30.0, -1.2, -1.0, -0.3, 0.001, 0.5, 1.0, 2.5], backend)
    # Of two levels the midpoint is 1 away from each: the rounding of a distance counts e^7 times.
    assert (sums - 1).abs().max() < (1e-5 if levels > 2 else 2**-24 * math.exp(7))


def test_probabilities_of_sixteen_bits_sum_to_one():
    sums = _sums(1 << 16, [-7.0, -2.0, 3.0], [-1.5, 0.2], None)
    assert (sums - 1).abs().max() < 1e-4


def test_joint_probabilities_of_colours_sum_to_one():
    levels, params = 8, parameters_of(1, 4, 3, 1)
    values = level_values(levels).float()
    x = torch.cartesian_prod(values, values, values).T[None]
    nll = mixture_logistic_nll(params.expand(1, 40, levels**3), x, levels=levels)
    assert nll.double().neg().exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@any_convention
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_by_finite_differences(channels, convention):
    params = parameters_of(2, 2, channels, 1, seed=1).double()
    params = params.clamp(min=-6.5) + 0.01
    x = random_levels((2, channels, 1), unit=convention == "nvae", seed=3)

    def function(p, values):
        return mixture_logistic_nll(p, values, convention=convention)

    # Levels away from the thresholds: there the definition is smooth.
    leaves = params.requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradient_by_values(backend):
    params, x = parameters_of(3, 4, 3, 7, 9), random_levels((3, 3, 7, 9))
    out = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        f = mixture_logistic_nll if dtype == torch.float32 else eager_nll
        nll = (
            f(params.to(dtype), leaf)
            if dtype == torch.float32
            else eager_nll(params.double(), leaf, "default")
        )
        out.append(torch.autograd.grad(nll.sum(), leaf)[0])
    torch.testing.assert_close(out[0].double(), out[1], rtol=2e-4, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
def test_finite_at_the_extremes(channels, dtype, backend):
    """Where eager code in that dtype gives inf or NaN."""
    largest = torch.finfo(dtype).max
    mixtures = 2
    n = mixtures * (3 if channels == 1 else 10)
    corners = torch.tensor([-largest, -30.0, 0.0, 30.0, largest])
    generator = torch.Generator().manual_seed(0)
    params = corners[torch.randint(5, (1, n, 128), generator=generator)].to(dtype).requires_grad_()
    x = random_levels((1, channels, 128)).float()
    for convention in ("default", "openai"):
        nll = mixture_logistic_nll(params, x, convention=convention)
        assert nll.isfinite().all()
        grad = torch.autograd.grad(nll.sum(), params)[0]
        assert not grad.isnan().any()
    eager = eager_nll(params.detach(), x.to(dtype), "openai")
    assert not eager.isfinite().all()


def _layouts(params, x):
    channels_last = params.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(*params.shape[:-1], 2 * params.shape[-1])
    wide[..., ::2] = params
    yield params, x, 1
    yield channels_last, x.contiguous(memory_format=torch.channels_last), 1
    yield params.movedim(1, -1), x.movedim(1, -1), -1
    yield params.movedim(1, -1).contiguous(), x.movedim(1, -1).contiguous(), -1
    yield wide[..., ::2], x, 1
    yield params.transpose(2, 3).contiguous().transpose(2, 3), x, 1
    padded = torch.zeros(params.shape[0], params.shape[1] + 3, *params.shape[2:])
    padded[:, 2:-1] = params
    yield padded[:, 2:-1], x, 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_give_the_same_bits(dtype, backend):
    params = parameters_of(2, 2, 3, 5, 11).to(dtype)
    x = random_levels((2, 3, 5, 11)).float()
    results = []
    layouts = list(_layouts(params, x))
    for p, values, dim in layouts[::3] if backend.costly else layouts:
        p = p.to(dtype)
        leaf = p.detach().requires_grad_()
        nll = mixture_logistic_nll(leaf, values, channel_dim=dim)
        (grad,) = torch.autograd.grad(nll.sum(), leaf)
        results.append((nll, grad if dim == 1 else grad.movedim(-1, 1)))
    for nll, grad in results[1:]:
        assert torch.equal(nll, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_offsets_of_more_than_31_bits(backend):
    dense, x = parameters_of(2, 1, 1, 8).half(), random_levels((2, 1, 8)).float()
    results = []
    for params in (dense, far_apart(dense)):
        leaf = params.detach().requires_grad_()
        nll = mixture_logistic_nll(leaf, x)
        results.append((nll, *torch.autograd.grad(nll.sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_reductions(backend):
    params, x = parameters_of(3, 2, 1, 4, 21), random_levels((3, 1, 4, 21)).float()
    each = mixture_logistic_nll(params, x).double()
    run = lambda r: mixture_logistic_nll(params, x, reduction=r)  # noqa: E731
    torch.testing.assert_close(run("sample").double(), each.flatten(1).sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(run("sum").double(), each.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(run("sample_mean").double(), each.flatten(1).sum(1) / 84, rtol=1e-6, atol=0)


def test_memory_is_the_gradient_alone():
    """What autograd saves are the arguments themselves, and backward makes nothing of their size."""
    params = parameters_of(2, 10, 3, 16, 16).requires_grad_()
    x = random_levels((2, 3, 16, 16)).float()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixture_logistic_nll(params, x, reduction="sum")
    assert {t.data_ptr() for t in saved} <= {params.data_ptr(), x.data_ptr()}
    assert len(saved) == 2

    def peak(function):
        """Beyond the gradient, which is returned."""
        return peak_bytes(
            lambda: None, lambda _: torch.autograd.grad(function().sum(), params), torch.device("cpu")
        )

    assert peak(lambda: mixture_logistic_nll(params, x, reduction="sum")) < 1024
    assert peak(lambda: mixture_logistic_nll(params, x)) < params.numel() * 4 // 8
    assert peak(lambda: eager_nll(params, x, "openai")) > params.numel() * 4


def test_many_mixtures(backend):
    if backend.costly:
        pytest.skip("interpreted, it takes long")
    params, x = parameters_of(2, 100, 3, 3, 3), random_levels((2, 3, 3, 3))
    out = mixture_logistic_nll(params, x.float())
    torch.testing.assert_close(out.double(), eager_nll(params.double(), x, "default"), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("reduction", ["none", "sample", "sum", "sample_mean"])
def test_empty(reduction, backend):
    for shape in ((0, 10, 4), (2, 10, 0)):
        params = torch.empty(shape, requires_grad=True)
        out = mixture_logistic_nll(params, torch.empty(shape[0], 3, shape[2]), reduction=reduction)
        assert (out == 0).all()
        (grad,) = torch.autograd.grad(out.sum(), params)
        assert grad.shape == shape


def test_nan_stays_at_its_pixel(backend):
    clean = parameters_of(2, 2, 3, 6)
    x = random_levels((2, 3, 6)).float()
    for channel in (0, 5) if backend.costly else (0, 3, 5, 7):
        params = clean.clone()
        params[1, channel, 4] = torch.nan
        params.requires_grad_()
        nll = mixture_logistic_nll(params, x)
        assert nll.isnan().nonzero().tolist() == [[1, 4]]
        (grad,) = torch.autograd.grad(nll.sum(), params)
        assert not grad.transpose(1, 2)[~nll.isnan()].isnan().any()
    dark = x.clone()
    dark[0, 1, 2] = torch.nan
    assert mixture_logistic_nll(clean, dark).isnan().nonzero().tolist() == [[0, 2]]


def test_an_excluded_mixture(backend):
    """A logit of -inf takes its mixture away; with none left there is nothing to compute."""
    params, x = parameters_of(1, 2, 1, 8), random_levels((1, 1, 8)).float()
    params[:, 1] = -torch.inf
    alone = params[:, [0, 2, 4]]
    torch.testing.assert_close(mixture_logistic_nll(params, x), mixture_logistic_nll(alone, x))
    params[:, 0] = -torch.inf
    assert mixture_logistic_nll(params, x).isnan().all()


def test_compile():
    params, x = parameters_of(2, 3, 3, 4, 4).requires_grad_(), random_levels((2, 3, 4, 4)).float()

    def loss(p):
        return mixture_logistic_nll(p, x, reduction="sample_mean").mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params), loss(params))
    torch.testing.assert_close(*(torch.autograd.grad(f(params), params)[0] for f in (compiled, loss)))


def test_bad_arguments():
    params, x = torch.zeros(2, 20, 4, 4), torch.zeros(2, 3, 4, 4)
    run = mixture_logistic_nll
    for error, match, call in (
        (TypeError, "params is list", lambda: run([1.0], x)),
        (TypeError, "params is torch.int64", lambda: run(params.long(), x)),
        (TypeError, "x is torch.uint8", lambda: run(params, x.byte())),
        (ValueError, "params has 21 channels", lambda: run(torch.zeros(2, 21, 4, 4), x)),
        (ValueError, "expected 30 for 3 mixtures", lambda: run(params, x, mixtures=3)),
        (ValueError, "mixtures is 0", lambda: run(params, x, mixtures=0)),
        (ValueError, "params has 0 channels", lambda: run(params[:, :0], x)),
        (ValueError, "image_channels is 2", lambda: run(params, x[:, :2])),
        (ValueError, "x has batch 1", lambda: run(params, x[:1])),
        (ValueError, "space", lambda: run(params, x[..., :3])),
        (ValueError, "levels is 1", lambda: run(params, x, levels=1)),
        (ValueError, "levels is 65537", lambda: run(params, x, levels=65537)),
        (ValueError, "convention is 'pixelcnn'", lambda: run(params, x, convention="pixelcnn")),
        (ValueError, "reduction is 'mean'", lambda: run(params, x, reduction="mean")),
        (ValueError, "channel_dim is 2", lambda: run(params, x, channel_dim=2)),
        (ValueError, "edge", lambda: run(params, x, edge=-1.0)),
        (ValueError, "min_log_scale is -50", lambda: run(params, x, min_log_scale=-50.0)),
        (ValueError, "expected -1 to 1", lambda: run(params, x + 1.5, check=True)),
        (ValueError, "no NaN", lambda: run(params, x * torch.nan, check=True)),
        (ValueError, "expected 0 to 1", lambda: run(params, x - 0.1, convention="nvae", check=True)),
        (ValueError, "x has shape", lambda: run(params, torch.zeros(3))),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_heads_of_the_sampler_agree():
    from genperf.sampling import heads

    params, x = parameters_of(2, 5, 3, 4, 4), random_levels((2, 3, 4, 4)).float()
    log_prob = heads.log_prob(heads.LogisticMixture(5), params, x)
    torch.testing.assert_close(-log_prob, mixture_logistic_nll(params, x, reduction="sample"))


@pytest.mark.parametrize("name", ["cpu-avx2", "cpu-avx512"])
def test_instruction_sets_give_the_same_bits(name):
    """float32 and half precision, forward and backward."""
    if name.removeprefix("cpu-") not in genperf.cpu_isas():
        pytest.skip(f"this processor has no {name}")
    x = random_levels((2, 3, 9, 11)).float()
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for isa in ("baseline", name.removeprefix("cpu-")):
            params = parameters_of(2, 4, 3, 9, 11).to(dtype).requires_grad_()
            with genperf.cpu_isa(isa):
                nll = mixture_logistic_nll(params, x)
                results.append((nll, torch.autograd.grad(nll.sum(), params)[0]))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
