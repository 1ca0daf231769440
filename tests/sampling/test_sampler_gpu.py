"""Models on a CUDA device: recorded there, sampled by the persistent kernel and by torch."""

import pytest
import torch
from genperf_testing import models, naive

from genperf import _backend
from genperf.sampling import heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KERNEL = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() and _backend.unusable("cuda", "cuda") is not None,
        reason="the CUDA kernels are not built",
    ),
)


def on_device(family):
    tiny = models.tiny_model(family)
    return tiny._replace(model=tiny.model.cuda())


@pytest.mark.parametrize("executor", ["reference", KERNEL])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_models_on_the_device(family, executor):
    sampler = naive.compiled(on_device(family), executor=executor)
    assert sampler.probe_error < 1e-3
    tiny = models.tiny_model(family)
    cond = models.conditioning(tiny, 3)
    noise = heads.make_noise(sampler.program.head, torch.tensor([5, 0]), range(3))
    samples = sampler.sample(3, noise=noise, cond=cond or None)
    assert samples.is_cuda
    naive.check(tiny, sampler.program.head, samples.cpu(), noise, cond)
    known = torch.arange(samples.numel()).view(samples.shape) % 3 == 0
    again = sampler.sample(3, seed=6, cond=cond or None, prefix=(samples, known))
    assert torch.equal(again.cpu()[known], samples.cpu()[known])
    nats = sampler.log_prob(samples, {n: t.cuda() for n, t in cond.items()} or None)
    assert nats.is_cuda
    expected = naive.compiled(tiny, images=3).log_prob(samples.cpu())
    torch.testing.assert_close(nats.cpu(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["gated_pixelcnn_class", "pixelcnn_embedding", "wavenet"])
def test_a_seed_draws_the_same_on_every_device(family):
    tiny = models.tiny_model(family)
    cond = models.conditioning(tiny, 3) or None
    expected = naive.compiled(tiny).sample(3, seed=1, cond=cond)
    sampler = naive.compiled(tiny, device="cuda")  # recorded on the CPU
    assert torch.equal(sampler.sample(3, seed=1, cond=cond).cpu(), expected)


def test_a_model_that_moves_is_followed():
    tiny = models.tiny_model("gated_pixelcnn")
    sampler = naive.compiled(tiny)
    assert not sampler.sample(seed=1).is_cuda
    tiny.model.cuda()
    assert sampler.sample(seed=1).is_cuda
    tiny.model.cpu()
    assert not sampler.sample(seed=1).is_cuda
