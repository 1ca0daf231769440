"""genperf.nn.DiagonalGaussian against the definition it follows, written out here."""

import copy
import math

import pytest
import torch

from genperf.nn import DiagonalGaussian


class Reference:
    """The posterior of diffusers and latent-diffusion, in plain torch."""

    def __init__(self, parameters, deterministic=False):
        self.parameters = parameters
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = torch.clamp(logvar, -30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def sample(self, generator=None):
        return self.mean + self.std * torch.randn(
            self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device
        )

    def kl(self, other=None):
        if other is None:
            return 0.5 * torch.sum(self.mean**2 + self.var - 1.0 - self.logvar, dim=[1, 2, 3])
        return 0.5 * torch.sum(
            (self.mean - other.mean) ** 2 / other.var
            + self.var / other.var
            - 1.0
            - self.logvar
            + other.logvar,
            dim=[1, 2, 3],
        )

    def nll(self, sample, dims=(1, 2, 3)):
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * torch.sum(terms, dim=dims)


def parameters(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def within_twice(actual, reference, exact, floor=4):
    """err(actual) <= 2 err(reference) + floor units of roundoff of the largest value."""
    size = exact.abs().max().item()
    limit = (
        2 * (reference.double() - exact).abs().max().item() + floor * torch.finfo(torch.float32).eps * size
    )
    assert (actual.double() - exact).abs().max().item() <= limit


SHAPES = [(2, 8, 5, 7), (3, 2, 1, 1), (4, 8, 64, 64), (2, 6, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_sample_has_the_bits_of_eager(shape, dtype, layout):
    p = parameters(*shape, dtype=dtype)
    if layout == "channels last":
        p = p.contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.channels_last_3d)
    elif layout == "strided":
        p = torch.cat([p, p], dim=-1)[..., ::2]
    for requires_grad in (False, True):
        p = p.detach().requires_grad_(requires_grad)
        torch.manual_seed(3)
        expected = Reference(p).sample()
        torch.manual_seed(3)
        actual = DiagonalGaussian(p).sample()
        assert torch.equal(actual, expected)
        assert actual.dtype == dtype
        assert actual.stride() == expected.stride()


def test_sample_from_generators():
    p = parameters(3, 8, 5, 7)
    expected = Reference(p).sample(torch.Generator().manual_seed(5))
    assert torch.equal(DiagonalGaussian(p).sample(torch.Generator().manual_seed(5)), expected)
    assert torch.equal(DiagonalGaussian(p).sample([torch.Generator().manual_seed(5)]), expected)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    each = [Reference(p[i : i + 1]).sample(torch.Generator().manual_seed(i)) for i in range(3)]
    assert torch.equal(DiagonalGaussian(p).sample(generators), torch.cat(each))
    with pytest.raises(ValueError, match=r"generator: a list of 2 for a batch of 3"):
        DiagonalGaussian(p).sample(generators[:2])


def test_attributes_are_those_of_the_definition():
    p = 20 * parameters(2, 8, 5, 7)
    ours, reference = DiagonalGaussian(p), Reference(p)
    for name in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(reference, name)), name
    assert ours.parameters is p
    assert ours.deterministic is False
    assert ours.mode() is ours.mean
    assert ours.mean.data_ptr() == p.data_ptr()


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_and_nll(shape):
    p, q = parameters(*shape), parameters(*shape, seed=1)
    exact_p, exact_q = Reference(p.double()), Reference(q.double())
    ours, reference = DiagonalGaussian(p), Reference(p)
    within_twice(ours.kl(), reference.kl(), exact_p.kl())
    within_twice(ours.kl(DiagonalGaussian(q)), reference.kl(Reference(q)), exact_p.kl(exact_q))
    within_twice(ours.kl(Reference(q)), reference.kl(Reference(q)), exact_p.kl(exact_q))
    z = ours.sample()
    within_twice(ours.nll(z), reference.nll(z), exact_p.nll(z.double()))
    within_twice(
        ours.nll(z, dims=[1, 2]), reference.nll(z, dims=[1, 2]), exact_p.nll(z.double(), dims=[1, 2])
    )
    normal = torch.distributions.Normal(exact_p.mean, exact_p.std)
    log_prob = normal.log_prob(z.double()).flatten(1).sum(1)
    within_twice(ours.log_prob(z), log_prob.float(), log_prob)


@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (4, 8, 64, 64)])
def test_gradients_of_sample_and_kl(shape, rng):
    p = parameters(*shape).requires_grad_()
    weight = parameters(shape[0], shape[1] // 2, *shape[2:], seed=2)
    torch.manual_seed(3)
    ours = DiagonalGaussian(p, rng=rng)
    z, kl = ours.sample(), None
    kl = ours.kl()
    (actual,) = torch.autograd.grad((z * weight).sum() + kl.sum(), p)

    def reference(p):
        noise = ((z - ours.mean) / ours.std).detach().to(p.dtype)
        d = Reference(p)
        return torch.autograd.grad(((d.mean + d.std * noise) * weight).sum() + d.kl().sum(), p)[0]

    within_twice(actual, reference(p), reference(p.detach().double().requires_grad_()), floor=16)


def test_sampling_in_training_leaves_no_second_pass_for_kl():
    p = parameters(4, 8, 64, 64).requires_grad_()
    ours = DiagonalGaussian(p)
    ours.sample()
    assert ours.kl() is ours.kl()
    with torch.no_grad():
        without = DiagonalGaussian(p)
        without.sample()
        assert without.kl() is not without.kl()
    assert torch.equal(ours.kl(), without.kl())


def test_clamp_passes_no_gradient_outside():
    p = torch.tensor([0.5, 25.0]).view(1, 2, 1, 1).requires_grad_()
    d = DiagonalGaussian(p)
    (gradient,) = torch.autograd.grad(d.sample().sum() + d.kl().sum(), p)
    assert gradient[0, 1].item() == 0


def test_twice_differentiable():
    p = parameters(4, 8, 64, 64, dtype=torch.float64).requires_grad_()
    d, reference = DiagonalGaussian(p), Reference(p)
    torch.manual_seed(0)
    z = d.sample()
    torch.manual_seed(0)
    expected = reference.sample()
    for value, other in ((z, expected), (d.kl(), reference.kl())):
        pair = []
        for x in (value, other):
            (first,) = torch.autograd.grad(x.square().sum(), p, create_graph=True)
            pair.append(torch.autograd.grad(first.square().sum(), p, retain_graph=True)[0])
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


def test_half_precision_is_finite_where_eager_overflows():
    p = torch.full((1, 2, 2, 2), 20.0, dtype=torch.float16)
    assert Reference(p).kl().isinf().all()
    ours = DiagonalGaussian(p).kl()
    assert ours.dtype == torch.float32
    exact = Reference(p.double()).kl()
    assert abs(ours.item() - exact.item()) <= 1e-6 * exact.item()
    low = torch.full((1, 2, 2, 2), -30.0, dtype=torch.float16)
    assert not Reference(low).nll(torch.zeros(1, 1, 2, 2, dtype=torch.float16)).isfinite().all()
    assert DiagonalGaussian(low).nll(torch.zeros(1, 1, 2, 2, dtype=torch.float16)).isfinite().all()


def test_nan_stays_in_its_place():
    p = parameters(2, 4, 3, 3)
    p[0, 1, 2, 2] = math.nan
    z = DiagonalGaussian(p).sample()
    assert z.isnan().sum() == 1
    assert DiagonalGaussian(p).kl().isnan().tolist() == [True, False]


def test_deterministic():
    p = parameters(2, 4, 3, 3)
    d = DiagonalGaussian(p, deterministic=True)
    assert not d.std.any()
    assert not d.var.any()
    assert torch.equal(d.kl(), torch.tensor([0.0]))
    assert torch.equal(d.nll(p), torch.tensor([0.0]))
    torch.manual_seed(0)
    assert torch.equal(d.sample(), d.mean)
    after = torch.randn(1)
    torch.manual_seed(0)
    Reference(p, deterministic=True).sample()
    assert torch.equal(torch.randn(1), after)


def test_philox_is_reproducible_and_independent_of_the_batch():
    p = parameters(2, 4, 3, 3)
    torch.manual_seed(0)
    first = DiagonalGaussian(p, rng="philox").sample()
    torch.manual_seed(0)
    assert torch.equal(DiagonalGaussian(p, rng="philox").sample(), first)
    assert not torch.equal(DiagonalGaussian(p, rng="philox").sample(), first)
    one = DiagonalGaussian(p[:1], rng="philox").sample([torch.Generator().manual_seed(4)])
    both = DiagonalGaussian(p, rng="philox").sample([torch.Generator().manual_seed(i) for i in (4, 5)])
    assert one.shape == (1, 2, 3, 3)
    assert not torch.equal(both[0], both[1])


def test_compiles_without_a_graph_break():
    def f(p):
        d = DiagonalGaussian(p)
        return d.sample(), d.kl(), d.std

    p = parameters(4, 8, 64, 64).requires_grad_()
    torch.manual_seed(0)
    expected = f(p)
    torch.manual_seed(0)
    actual = torch.compile(f, fullgraph=True, backend="aot_eager")(p)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    gradients = [torch.autograd.grad(z.sum() + kl.sum(), p)[0] for z, kl, _ in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_copies():
    d = copy.deepcopy(DiagonalGaussian(parameters(2, 4, 3, 3)))
    assert d.sample().shape == (2, 2, 3, 3)
    assert repr(d) == "DiagonalGaussian((2, 2, 3, 3), torch.float32, deterministic=False, rng='torch')"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0, 2.0],), {}, TypeError, r"parameters: list; expected a tensor \[B, 2 C, \*\]"),
        (
            (torch.ones(2, 4, dtype=torch.int64),),
            {},
            TypeError,
            r"parameters: torch\.int64; expected float32",
        ),
        ((torch.ones(2, 3, 4, 4),), {}, ValueError, r"parameters: shape \(2, 3, 4, 4\); expected"),
        ((torch.ones(4),), {}, ValueError, r"parameters: shape \(4,\); expected"),
        (
            (torch.ones(2, 4),),
            {"rng": "numpy"},
            ValueError,
            r"rng: 'numpy'; expected \"torch\" or \"philox\"",
        ),
        ((torch.ones(2, 4),), {"clamp": (1.0, -1.0)}, ValueError, r"clamp: \(1\.0, -1\.0\); expected"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        DiagonalGaussian(*arguments, **options)


def test_call_compatible_with_diffusers():
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    p = 4 * parameters(2, 8, 5, 7)
    theirs, ours = vae.DiagonalGaussianDistribution(p), DiagonalGaussian(p)
    names = set(vars(theirs)) | {n for n in vars(type(theirs)) if not n.startswith("_")}
    assert {n for n in names if not hasattr(ours, n)} == set()
    torch.manual_seed(0)
    expected = theirs.sample()
    torch.manual_seed(0)
    assert torch.equal(ours.sample(), expected)
    torch.testing.assert_close(ours.kl(), theirs.kl(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.kl(theirs), theirs.kl(theirs), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.nll(expected), theirs.nll(expected), rtol=1e-5, atol=0)
