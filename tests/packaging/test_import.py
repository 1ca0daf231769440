"""Importing genperf never fails for want of the native module, Triton or CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

BLOCK = """
import sys

for name in {blocked}:
    sys.modules[name] = None
"""

SAMPLE = """
import torch
import genperf
from genperf.ops import gaussian_sample

mean, log_variance = torch.randn(2, 3, 5)
out = gaussian_sample(mean, log_variance, rng="philox", generator=torch.Generator().manual_seed(0))
assert out.z.shape == (3, 5) and out.kl.shape == (3,)
assert (out.kl >= 0).all()
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "blocked",
    [
        ("genperf._native",),
        ("triton",),
        ("genperf._native", "triton"),
        ("tqdm", "matplotlib", "psutil", "tabulate"),
    ],
    ids=" and ".join,
)
def test_works_without(blocked: tuple[str, ...]) -> None:
    run(BLOCK.format(blocked=blocked) + SAMPLE)


def test_doctor_tells_that_the_native_module_is_missing() -> None:
    code = BLOCK.format(blocked=("genperf._native",)) + "from genperf.__main__ import main\nmain([])"
    output = run(code)
    assert "genperf._native" in output
    assert "cannot be loaded" in output


def test_forcing_a_missing_backend_tells_why() -> None:
    code = """
    import torch, genperf
    from genperf.ops import gaussian_sample
    try:
        gaussian_sample(torch.zeros(2, 3), torch.zeros(2, 3))
    except RuntimeError as error:
        print(error)
    """
    blocked = BLOCK.format(blocked=("genperf._native",))
    message = run(blocked + textwrap.dedent(code), GENPERF_BACKEND="cpu")
    assert "cpu" in message
    assert "_native" in message


def test_import_is_lazy() -> None:
    """`import genperf` loads none of the heavy optional packages."""
    heavy = "{'triton', 'matplotlib', 'diffusers', 'pythae', 'transformers', 'scipy', 'pandas'}"
    code = f"""
    import sys, torch
    before = set(sys.modules)
    import genperf
    print(sorted({heavy} & (set(sys.modules) - before)))
    """
    assert run(code).strip() == "[]"
