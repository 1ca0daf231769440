"""The CPU kernels give the same bits on every instruction set that this machine has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import genperf

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_instruction_sets_agree():
    isas = genperf.cpu_isas()
    if len(isas) < 2:
        pytest.skip(f"this machine has no instruction set but {isas}")
    build = ROOT / "build" / "isa"
    for command in (["-S", ROOT / "tests" / "isa", "-B", build, "-GNinja"], ["--build", build]):
        built = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
    result = subprocess.run([build / "isa"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert f"instruction sets: {' '.join(isas)}\n" in result.stdout
    total = re.search(r"^total: (\d+) cases, (\d+) elements, 0 bytes differ,", result.stdout, re.MULTILINE)
    assert total, result.stdout
    assert int(total[1]) > 10_000
