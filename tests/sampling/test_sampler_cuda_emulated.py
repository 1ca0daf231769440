"""Whole models through the persistent CUDA kernel, emulated on the host: the CPU executor's samples."""

import importlib.util
from pathlib import Path

import pytest
import torch
from genperf_testing import models, naive

from genperf import _backend

_SIMT = Path(__file__).parent.parent / "simt"
_spec = importlib.util.spec_from_file_location("genperf_simt_build", _SIMT / "build.py")
simt = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simt)

pytestmark = pytest.mark.skipif(
    _backend.native is None or _backend.native.isa() == "baseline",
    reason="needs the native CPU executor with fused multiply-adds",
)


@pytest.mark.parametrize(
    "family", ["gated_pixelcnn_class", "pixelcnn_rgb", "pixelcnnpp_grey", "pixelsnail", "wavenet"]
)
def test_the_kernel_draws_what_the_cpu_does(family):
    tiny = models.tiny_model(family)
    expected = naive.compiled(tiny, images=2, executor="cpu")
    with simt.emulated_cuda():
        sampler = naive.compiled(tiny, images=2, executor="cuda")
        assert sampler.executor == "cuda"
        samples = sampler.sample(2, seed=1)
        known = torch.arange(samples.numel()).view(samples.shape) % 3 == 0
        again = sampler.sample(2, seed=2, prefix=(samples, known))
    assert torch.equal(samples, expected.sample(2, seed=1))
    assert torch.equal(again, expected.sample(2, seed=2, prefix=(samples, known)))
