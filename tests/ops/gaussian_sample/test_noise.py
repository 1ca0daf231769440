"""The noise of genperf.ops.gaussian_sample: keys, generators, and addresses beyond 32 bits."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from genperf_testing.cases import normals
from genperf_testing.gaussian import KEY, keys_of
from torch.utils.checkpoint import checkpoint

import genperf
from genperf.ops import gaussian_sample, philox_random
from genperf.ops.philox_random import _normal_pair, _philox_words


def test_noise_is_that_of_the_key(backend):
    """The same bits as philox_random, on every backend, in the results' logical order."""
    shape = (3, 5, 41, 7) if backend.costly else (3, 5, 131, 67)
    keys = keys_of(shape)[0]
    for key in (KEY, keys):
        with genperf.backend("reference"):
            expected = philox_random(shape, key)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            zeros = torch.zeros(shape, device=backend.device).to(memory_format=memory_format)
            z = gaussian_sample(zeros, zeros, key=key.to(backend.device), kl=False).z
            assert torch.equal(z.cpu(), expected)


def test_backward_makes_the_same_noise(backend):
    """dz / dscale is eps / 2 at mean 0 and log-variance 0."""
    shape = (3, 1030)
    for key in (KEY, *keys_of(shape)):
        leaf = torch.zeros(shape, device=backend.device, requires_grad=True)
        z = gaussian_sample(torch.zeros_like(leaf), leaf, key=key.to(backend.device), kl=False).z
        (gradient,) = torch.autograd.grad(z.sum(), leaf)
        assert torch.equal(gradient, 0.5 * z.detach())


def test_strided_keys(backend):
    shape = (3, 37)
    zeros = torch.zeros(shape, device=backend.device)
    keys = keys_of(shape)[0].to(backend.device)
    expected = gaussian_sample(zeros, zeros, key=keys, kl=False).z
    apart = torch.stack([keys, keys + 5], dim=-1).flatten(1)[:, ::2]
    columns = keys.T.contiguous().T
    shared = keys[:1].expand(3, 2)
    for key in (apart, columns):
        assert torch.equal(gaussian_sample(zeros, zeros, key=key, kl=False).z, expected)
    assert torch.equal(gaussian_sample(zeros, zeros, key=shared, kl=False).z, expected[:1].expand(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rng_torch_is_randn(dtype):
    """Bit for bit, with the default generator, one's own, and a list of them, one a sample."""
    mean, scale = torch.zeros(3, 4, 5, dtype=dtype), torch.zeros(3, 4, 5, dtype=dtype)
    torch.manual_seed(3)
    z = gaussian_sample(mean, scale, rng="torch").z
    torch.manual_seed(3)
    assert torch.equal(z, torch.randn(3, 4, 5, dtype=dtype))

    z = gaussian_sample(mean, scale, rng="torch", generator=torch.Generator().manual_seed(4)).z
    assert torch.equal(z, torch.randn(3, 4, 5, dtype=dtype, generator=torch.Generator().manual_seed(4)))

    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    z = gaussian_sample(mean, scale, rng="torch", generator=generators).z
    rows = [torch.randn(1, 4, 5, dtype=dtype, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert torch.equal(z, torch.cat(rows))


def test_rng_torch_is_that_of_diffusers():
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    zeros = torch.zeros(3, 4, 5)
    for make in (
        lambda: torch.Generator().manual_seed(1),
        lambda: [torch.Generator().manual_seed(i) for i in range(3)],
    ):
        z = gaussian_sample(zeros, zeros, rng="torch", generator=make()).z
        assert torch.equal(z, randn_tensor((3, 4, 5), generator=make()))


def test_seeds():
    mean, scale = torch.zeros(2, 50), torch.zeros(2, 50)

    def sample(seed=None, **options):
        if seed is not None:
            torch.manual_seed(seed)
        return gaussian_sample(mean, scale, **options).z

    first = sample(1)
    assert not torch.equal(sample(), first)
    assert torch.equal(sample(1), first)
    assert not torch.equal(sample(2), first)
    assert torch.equal(
        sample(generator=torch.Generator().manual_seed(1)), sample(generator=torch.Generator().manual_seed(1))
    )
    generators = [torch.Generator().manual_seed(i) for i in (7, 8)]
    alone = gaussian_sample(mean[1:], scale[1:], generator=[torch.Generator().manual_seed(8)]).z
    assert torch.equal(sample(generator=generators)[1:], alone)


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(rng, use_reentrant):
    def gradients(wrap):
        torch.manual_seed(0)
        mean, scale = normals((3, 40), 0).requires_grad_(), normals((3, 40), 1).requires_grad_()
        z, kl, _ = wrap(lambda m, s: gaussian_sample(m, s, rng=rng), mean, scale)
        ((z**2).sum() + kl.sum()).backward()
        return z, mean.grad, scale.grad

    plain = gradients(lambda f, *xs: f(*xs))
    again = gradients(lambda f, *xs: checkpoint(f, *xs, use_reentrant=use_reentrant))
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


@pytest.mark.gpu
def test_a_cpu_generator_serves_a_gpu(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    zeros = torch.zeros(3, 40, device="cuda")
    for rng in ("philox", "torch"):
        z = gaussian_sample(zeros, zeros, rng=rng, generator=torch.Generator().manual_seed(1)).z
        expected = gaussian_sample(
            zeros.cpu(), zeros.cpu(), rng=rng, generator=torch.Generator().manual_seed(1)
        ).z
        assert torch.equal(z.cpu(), expected)


@pytest.mark.gpu
def test_a_graph_draws_anew_at_every_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    zeros = torch.zeros(3, 400, device="cuda")
    gaussian_sample(zeros, zeros)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = gaussian_sample(zeros, zeros).z
    samples = []
    for _ in range(3):
        graph.replay()
        samples.append(z.clone())
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[1], samples[2])


# Addresses


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sparse files")
def test_offsets_beyond_32_bits(kernel, tmp_path):
    """Strides and offsets of more than 2**32 elements, in a file of which only a few pages exist."""
    if kernel.device != "cpu":
        pytest.skip("the memory of a file")
    stride, shape = 2**32 + 24, (3, 40)
    n = 2 * stride + 2 * shape[1] + 8
    path = tmp_path / "sparse"
    try:
        with open(path, "wb") as file:
            file.truncate(2 * n)
        room = torch.from_file(str(path), shared=True, size=n, dtype=torch.bfloat16)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"no sparse file of this size: {error}")
    finally:
        path.unlink(missing_ok=True)
    mean, scale = (room.as_strided(shape, (stride, 1), shift) for shift in (3, 3 + shape[1]))
    for x, i in ((mean, 0), (scale, 1)):
        x.copy_(normals(shape, i))
    leaves = [x.detach().requires_grad_() for x in (mean, scale)]
    dense = [x.detach().contiguous().requires_grad_() for x in (mean, scale)]
    results = []
    for inputs in (leaves, dense):
        # noise= with the strides of mean would be allocated as such
        out = gaussian_sample(*inputs, key=KEY, reduction="none" if inputs is dense else "sample")
        results.append(out)
    assert torch.equal(results[0].z, results[1].z)
    torch.testing.assert_close(results[0].kl, results[1].kl.sum(1), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """On the CPU kernels, with inputs that take no memory; the sample takes 4 GiB."""
    _check_huge("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_more_than_2_to_the_31_elements_on_a_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with genperf.backend(name):
        _check_huge("cuda")


def _check_huge(device):
    n = 2**31 + 29
    mean = torch.zeros(1, 1, dtype=torch.bfloat16, device=device).expand(1, n)
    scale = torch.full((1, 1), 0.5, dtype=torch.bfloat16, device=device).expand(1, n)
    out = gaussian_sample(mean, scale, key=KEY.to(device))
    assert out.z.shape == (1, n)
    torch.testing.assert_close(out.kl.item(), n * 0.5 * (math.exp(0.5) - 1.5), rtol=1e-5, atol=0)
    groups = torch.arange((n - 1) // 4 - 8, (n - 1) // 4 + 1)
    words = torch.stack(
        _philox_words([groups, groups >> 32, *_halves(KEY[1], groups)], _halves(KEY[0], groups)), 1
    )
    eps = torch.stack(_normal_pair(words[:, 0::2].flatten(), words[:, 1::2].flatten()), 1).flatten()
    expected = (math.exp(0.25) * eps)[: n - 4 * int(groups[0])]
    torch.testing.assert_close(out.z[0, -len(expected) :].float().cpu(), expected, rtol=2**-8, atol=0)


def _halves(word, like):
    return [
        torch.full_like(like, int(word) & 0xFFFFFFFF),
        torch.full_like(like, int(word) >> 32 & 0xFFFFFFFF),
    ]
