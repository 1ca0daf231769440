"""Fixtures of all tests. ``support/genperf_testing`` is importable from every test file."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it has to be set before any is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))

from genperf_testing.backends import BACKENDS, parameters, skip_if_missing
from genperf_testing.poison import poisoned_memory


@pytest.fixture(autouse=True, scope="session")
def _poison():
    with poisoned_memory():
        yield


@pytest.fixture(params=parameters(BACKENDS))
def backend(request):
    """Each backend in turn, in force during the test."""
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


@pytest.fixture(params=parameters(b for b in BACKENDS if b.name != "reference"))
def kernel(request):
    """Each backend but plain torch."""
    skip_if_missing(request.param)
    with request.param.active():
        yield request.param


@pytest.fixture(params=[pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device, with the backend that genperf chooses there."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
