"""Samples are those of the naive loop with the same noise, whatever else is in the batch or ran before."""

import functools

import pytest
import torch
from genperf_testing import models, naive

from genperf import _backend, sampling
from genperf.sampling import _probe, heads
from genperf.sampling._errors import CaptureError
from genperf.sampling._reference import ReferenceExecutor

KEY = torch.tensor([5, 0])
EXECUTORS = ["reference"] + ["cpu"] * (_backend.native is not None)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@functools.cache
def looped(family, head):
    """Of three images, their noise, conditioning and samples, one model call a draw."""
    tiny = models.tiny_model(family)
    cond = models.conditioning(tiny, 3)
    noise = heads.make_noise(head, KEY, range(3))
    return noise, cond, naive.loop(tiny, head, noise, cond)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_samples_are_the_naive_loops(family, executor):
    tiny = models.tiny_model(family)
    sampler = naive.compiled(tiny, executor=executor)
    head = sampler.program.head
    noise, cond, expected = looped(family, head)
    samples = sampler.sample(3, noise=noise, cond=cond or None)
    assert samples.dtype == (torch.float32 if tiny.head == "logistic_mixture" else torch.int64)
    naive.check(tiny, head, samples, noise, cond)
    naive.check_first_difference(tiny, head, samples, expected, noise, cond)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.6, 0), (1.7, 3), (1.0, 1)])
@pytest.mark.parametrize("family", ["gated_pixelcnn", "pixelcnn_rgb", "wavenet"])
def test_temperature_and_top_k(family, temperature, top_k):
    tiny = models.tiny_model(family)
    sampler = naive.compiled(tiny)
    noise = heads.make_noise(sampler.program.head, KEY, range(4))
    samples = sampler.sample(4, noise=noise, temperature=temperature, top_k=top_k)
    naive.check(tiny, sampler.program.head, samples, noise, {}, temperature, top_k)
    if top_k == 1:
        assert torch.equal(sampler.sample(4, top_k=1, seed=9), samples)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_temperature_of_a_mixture(temperature):
    tiny = models.tiny_model("pixelcnnpp_grey")
    sampler = naive.compiled(tiny)
    noise = heads.make_noise(sampler.program.head, KEY, range(2))
    samples = sampler.sample(2, noise=noise, temperature=temperature)
    naive.check(tiny, sampler.program.head, samples, noise, {}, temperature)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_parameters_are_as_exact_as_the_models(family):
    tiny = models.tiny_model(family)
    cond = models.conditioning(tiny, 1)
    sampler = naive.compiled(tiny)
    samples = sampler.sample(1, seed=3)
    values = sampler._interface.values(samples.float())
    executors = [ReferenceExecutor(sampler.program)]
    if _backend.native is not None:
        executors.append(sampler._prepared(sampler._cond, range(1)))
    plain = naive.parameters(tiny, samples, cond)[0]
    tiny.model.double()
    exact = naive.parameters(tiny, samples, cond)[0]
    channels = exact.shape[0]
    for executor in executors:
        own = _probe.forced_parameters(executor, values, channels)
        draws = sampler.head.draws
        for d in range(draws):
            read = sampler.head.reads(d, channels)
            error = (own[d::draws, read].double() - exact[read].T).abs().max()
            allowed = 2 * (plain[read] - exact[read]).abs().max() + 2e-6 * exact.abs().max()
            assert error <= allowed


@pytest.mark.parametrize("family", ["gated_pixelcnn_class", "pixelsnail_cond"])
def test_each_image_has_its_own_conditioning(family):
    tiny = models.tiny_model(family)
    cond = models.conditioning(tiny, 4, seed=3)
    sampler = naive.compiled(tiny)
    samples = sampler.sample(4, seed=1, cond=cond)
    for i in range(4):
        noise = heads.make_noise(sampler.program.head, torch.tensor([1, 0]), [i])
        alone = sampler.sample(1, noise=noise, cond={n: t[i : i + 1] for n, t in cond.items()})
        assert torch.equal(alone[0], samples[i])
    one = sampler.sample(4, seed=1, cond={n: t[:1] for n, t in cond.items()})
    assert torch.equal(one[0], samples[0])
    assert not torch.equal(one[1:], samples[1:])


@pytest.mark.skipif(_backend.native is None, reason="the extension module is not built")
@pytest.mark.parametrize("family", ["gated_pixelcnn", "pixelcnnpp", "pixelsnail", "wavenet"])
def test_bits_depend_on_neither_batch_nor_threads_nor_what_ran_before(family, threads):
    tiny = models.tiny_model(family)
    sampler = naive.compiled(tiny, executor="cpu")
    samples = sampler.sample(5, seed=7)
    assert torch.equal(sampler.sample(5, seed=7), samples)
    assert torch.equal(sampler.sample(2, seed=7), samples[:2])
    sampler.sample(3, seed=8)
    threads(2)
    assert torch.equal(sampler.sample(5, seed=7), samples)
    assert not torch.equal(sampler.sample(5, seed=8), samples)


def test_batches_run_in_parts_where_memory_is_short(monkeypatch):
    tiny = models.tiny_model("gated_pixelcnn_class")
    cond = models.conditioning(tiny, 5)
    sampler = naive.compiled(tiny)
    whole = sampler.sample(5, seed=1, cond=cond)
    monkeypatch.setattr("genperf.sampling._memory.LIMIT", 2 * 4 * sampler.program.workspace)
    assert torch.equal(sampler.sample(5, seed=1, cond=cond), whole)
    known = torch.rand(5, *tiny.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    again = sampler.sample(5, seed=1, cond=cond, prefix=(whole, known))
    assert torch.equal(again, whole)


def test_seeds_and_generators():
    sampler = naive.compiled(models.tiny_model("gated_pixelcnn"))

    def drawn(seed):
        return sampler.sample(2, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(4)
    first = sampler.sample(2)
    assert not torch.equal(sampler.sample(2), first)
    torch.manual_seed(4)
    assert torch.equal(sampler.sample(2), first)
    assert torch.equal(sampler.sample(2, seed=-1), sampler.sample(2, seed=(1 << 64) - 1))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", ["gated_pixelcnn", "pixelcnn_rgb", "pixelcnnpp", "wavenet"])
def test_known_pixels_are_kept_and_seen(family, executor):
    tiny = models.tiny_model(family)
    sampler = naive.compiled(tiny, executor=executor)
    head = sampler.program.head
    values = sampler.sample(3, seed=1)
    known = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    given = values.masked_fill(~known, -7)
    noise = heads.make_noise(head, torch.tensor([2, 0]), range(3))
    samples = sampler.sample(3, noise=noise, prefix=(given, known))
    assert torch.equal(samples[known], values[known])
    assert not torch.equal(samples, values)
    naive.check(tiny, head, samples, noise, {}, known=(values, known))
    one = sampler.sample(3, noise=noise, prefix=(given[:1], known[0]))
    assert torch.equal(one[0], samples[0])
    everything = torch.ones(1, dtype=torch.bool)
    assert torch.equal(sampler.sample(3, prefix=(values, everything)), values)
    free = sampler.sample(3, noise=noise)
    assert torch.equal(sampler.sample(3, noise=noise, prefix=(given, ~everything)), free)


def test_a_dropout_that_is_on_is_named():
    tiny = models.tiny_model("gated_pixelcnn")
    model = torch.nn.Sequential(tiny.model, torch.nn.Dropout(0.5))
    with pytest.raises(CaptureError, match=r"1: Dropout in training mode.*model\.eval\(\)"):
        sampling.compile(model.train(), tiny.shape)
    sampling.compile(model.eval(), tiny.shape)
