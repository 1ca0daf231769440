"""The CUDA sources under nvcc: registers, spills and the width of memory accesses, without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/cuda.cu"))
#: As in CMakeLists.txt.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr")


def _tool(name: str) -> str | None:
    """A CUDA tool on the path, in the toolkit's usual place, or in the copy that Triton carries."""
    places = [None, "/usr/local/cuda/bin"]
    if triton := importlib.util.find_spec("triton"):
        places += [f"{place}/backends/nvidia/bin" for place in triton.submodule_search_locations]
    return next((found for path in places if (found := shutil.which(name, path=path))), None)


pytestmark = pytest.mark.skipif(_tool("nvcc") is None, reason="nvcc is not installed")


class Usage(NamedTuple):
    """What ptxas reports of one kernel, in registers a thread and bytes."""

    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int


class Compiled(NamedTuple):
    cubin: Path
    usage: tuple[Usage, ...]


def parse_usage(report: str) -> tuple[Usage, ...]:
    """The report of ``ptxas -v``, a kernel an entry; names are mangled."""
    entries = re.split(r"Compiling entry function '", report)[1:]
    return tuple(
        Usage(
            kernel=entry.split("'")[0],
            registers=int(re.search(r"Used (\d+) registers", entry)[1]),
            stack=int(re.search(r"(\d+) bytes stack frame", entry)[1]),
            spills=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", entry))),
            shared=int(match[1]) if (match := re.search(r"(\d+) bytes smem", entry)) else 0,
        )
        for entry in entries
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    results: dict[tuple[Path, int], Compiled] = {}

    def compile_for(source: Path, architecture: int) -> Compiled:
        if (source, architecture) not in results:
            cubin = tmp_path_factory.mktemp("nvcc") / f"{source.parent.name}_{architecture}.cubin"
            command = [_tool("nvcc"), *FLAGS, "-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin"]
            run = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
            results[source, architecture] = Compiled(cubin, parse_usage(run.stdout + run.stderr))
        return results[source, architecture]

    return compile_for


def _readable(mangled: list[str]) -> list[str]:
    if (filt := shutil.which("c++filt")) is None:
        return mangled
    names = subprocess.run([filt, *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    noise = r"genperf::|\(anonymous namespace\)::|\((?:Transform|RandomKind)\)|^void |\(.*\)$"
    return [re.sub(noise, "", name.replace("(genperf::", "(")) for name in names]


@pytest.mark.parametrize(
    "architecture", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_no_kernel_spills(compiled, source, architecture, capsys):
    usage = compiled(source, architecture).usage
    assert usage, "ptxas reported no kernel"
    with capsys.disabled():
        print(f"\n{source.parent.name}, sm_{architecture}: registers, shared memory")
        for name, u in zip(_readable([u.kernel for u in usage]), usage, strict=True):
            print(f"  {u.registers:3d} {u.shared:6d} B  {name}")
    assert [u for u in usage if u.spills or u.stack] == []


def test_the_gate_sees_a_spill():
    report = """ptxas info    : Compiling entry function 'k' for 'sm_90'
ptxas info    : Function properties for k
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 128 bytes smem, 8 bytes cmem[2]"""
    assert parse_usage(report) == (Usage("k", 64, 8, 40, 128),)


def _global_accesses(cubin: Path, kernel: str) -> dict[str, set[int]]:
    """Widths in bits of the global loads ("LDG") and stores ("STG") of the kernels of this mangled name."""
    command = [_tool("cuobjdump"), "-sass", cubin]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    widths: dict[str, set[int]] = {"LDG": set(), "STG": set()}
    bodies = [part for part in re.split(r"Function : ", sass)[1:] if re.search(kernel, part.split("\n")[0])]
    assert bodies, f"no kernel named {kernel}"
    for body in bodies:
        for instruction, suffixes in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", body):
            width = re.search(r"\.(64|128)\b", suffixes)
            widths[instruction].add(int(width[1]) if width else 32)
    return widths


@pytest.mark.skipif(_tool("cuobjdump") is None, reason="cuobjdump is not installed")
def test_contiguous_samples_move_by_16_bytes(compiled):
    cubin = compiled(ROOT / "csrc" / "gaussian_sample" / "cuda.cu", 90).cubin
    forward = _global_accesses(cubin, r"forward_kernel.*VectorsIf")
    assert forward["LDG"] == {128, 64}  # operands; the key's words
    assert 128 in forward["STG"]
    backward = _global_accesses(cubin, r"backward_kernel.*VectorsIf")
    assert backward["LDG"] == {128, 64, 32}  # 32: the gradient of a sum, one a sample
    assert backward["STG"] == {128}
    halves = _global_accesses(cubin, r"backward_kernel.*VectorsIt")
    assert halves["STG"] == {64}
    assert 32 in _global_accesses(cubin, r"forward_kernel.*Strided")["LDG"]
