"""Every Triton kernel, compiled ahead of time for GPUs that need not be here, and what must hold of it.

The kernel files list representative launches (``AOT``) on meta tensors: a kernel gets the very arguments
that it would get on a GPU, and is compiled instead of launched. A process whose Triton is interpreted
(TRITON_INTERPRET=1, how the numerics are tested without a GPU) cannot compile; so this file is also a
script, ``python test_aot.py RESULT.json [--slow]``, which the tests run in a process without that
variable. What was compiled once comes from Triton's cache.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
OPS = sorted(path.stem for path in KERNELS.glob("[!_]*.py"))
CAPABILITIES = (80, 90, 100)


@triton.jit
def _broken_dot_kernel(p_a, p_out):
    """A product whose input precision nobody named."""
    i = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    b_a = tl.load(p_a + i)
    tl.store(p_out + i, tl.dot(b_a, b_a))


class _Driver:
    """What Triton asks of a driver before it compiles: no device, but a target."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability = capability
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile_all(slow: bool) -> dict[str, list[dict[str, Any]]]:
    """Compile all examples for all capabilities, and two kernels that must not pass the gates."""
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.runtime import JITFunction
    from triton.runtime.driver import driver

    launch, compiled = JITFunction.run, []

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.append(
            {
                "kernel": self.__name__,
                "capability": driver.active.capability,
                "ptxas": str(get_ptxas(driver.active.capability).path),
                "ptx": kernel.asm["ptx"],
                "fused": kernel.metadata.enable_fp_fusion,
            }
        )

    def kernels_of(action, **facts) -> list[dict[str, Any]]:
        compiled.clear()
        action()
        return [{**kernel, **facts} for kernel in compiled]

    JITFunction.run = run
    modules = {op: importlib.import_module(f"genperf.kernels.{op}") for op in OPS}
    kernels = []
    for capability in CAPABILITIES:
        driver.set_active(_Driver(capability))
        for op, module in modules.items():
            for name, example in module.AOT.items():
                if slow or example.quick:
                    facts = {"op": op, "example": name, "wide": example.wide, "products": example.products}
                    kernels += kernels_of(example.launch, **facts)
    driver.set_active(_Driver(80))
    x = torch.empty(32, 32, device="meta")
    broken = kernels_of(lambda: _broken_dot_kernel[(1,)](x, x), op="dot")
    modules["philox_random"].LAUNCH["enable_fp_fusion"] = True
    broken += kernels_of(modules["philox_random"].AOT["normal"].launch, op="fused")
    return {"kernels": kernels, "broken": broken}


def assert_no_tf32(ptx: str) -> None:
    assert "tf32" not in ptx, "tensor cores round the factors to TF32"


@functools.cache
def _lines_of_ieee_dots(path: str) -> frozenset[int]:
    """The lines of a source file with calls of ``dot`` that name the input precision "ieee"."""
    calls = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.Call)]
    return frozenset(
        line
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "dot"
        if any(
            k.arg == "input_precision" and isinstance(k.value, ast.Constant) and k.value.value == "ieee"
            for k in call.keywords
        )
        for line in range(call.lineno, (call.end_lineno or call.lineno) + 1)
    )


def assert_ieee(ptx: str, products: bool = False) -> None:
    """Each operation on floats is rounded by itself, to nearest, and subnormals are kept.

    But for ``dot`` with ``input_precision="ieee"`` of float32: there a fused multiply-add in float32 is what
    the source asks for. It is rounded once, to nearest, and keeps subnormals; and no two backends are
    promised the same bits of a sum of products. Each one must come from such a line, as the line table of the
    PTX has it, so that none is let through that was fused from multiplications and additions of formulas;
    unless the whole kernel is one of ``products``, of which no formula needs the bits. And sm_80 has no
    subtraction in bfloat16: there it is a multiply-add with a factor of -1.
    """
    ones = {
        found[1]
        for found in re.finditer(r"mov\.b(?:16|32)\s+(%\w+), (-?\d+|0x[0-9A-F]+);", ptx)
        if int(found[2], 0) & 0x7FFF7FFF in (0x3F80, 0x3F803F80)
    }
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, flags=re.MULTILINE))
    inexact, place = set(), ("", 0)
    for line in ptx.splitlines():
        if found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            place = found[1], int(found[2])
        elif found := re.match(r"\s*fma\.rn\.bf16(?:x2)?\s+%\w+, (%\w+), (%\w+),", line):
            if not ones & {found[1], found[2]}:
                inexact.add(line.strip())
        elif found := re.match(r"\s*((?:fma\.|\S+\.(?:approx|full|ftz)\.)\S*)", line):
            in_dot = place[0] in files and place[1] in _lines_of_ieee_dots(files[place[0]])
            if not re.fullmatch(r"fma\.rn\.f32(x2)?", found[1]) or not (products or in_dot):
                inexact.add(found[1])
    assert not inexact, f"not the bits of the other backends: {sorted(inexact)}"


def assert_no_spills(kernel: dict[str, Any], folder: Path) -> None:
    """Assemble the PTX as Triton does, with register spills an error."""
    source, target = folder / "kernel.ptx", re.search(r"\.target (\w+)", kernel["ptx"])[1]
    source.write_text(kernel["ptx"])
    command = [kernel["ptxas"], "--fmad=false", "--warn-on-spills", "--warning-as-error"]
    command += [f"-arch={target}", str(source), "-o", str(folder / "kernel.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def assert_wide(ptx: str) -> None:
    """Tensors are read and written 16 bytes at a time; at most a sum and a gradient of one are not."""
    accesses = re.findall(r"(?:ld|st)\.global\.(?:\w+::\w+\.)*((?:v\d\.)?b\d+)", ptx)
    wide = [a for a in accesses if a in ("v4.b32", "v2.b64", "v8.b32", "v4.b64")]
    narrow = [a for a in accesses if a in ("b16", "b32", "v2.b16", "v4.b16", "v2.b32")]
    assert wide, f"narrow accesses: {accesses}"
    assert len(narrow) <= 4, f"narrow accesses: {accesses}"


def _gate(kernels: list[dict[str, Any]], folder: Path) -> None:
    assert {k["op"] for k in kernels} == set(OPS)
    assert {k["capability"] for k in kernels} == set(CAPABILITIES)
    failures = []
    for kernel in kernels:
        try:
            assert kernel["products"] or not kernel["fused"], "launched without enable_fp_fusion=False"
            assert_no_tf32(kernel["ptx"])
            assert_ieee(kernel["ptx"], kernel["products"])
            assert_no_spills(kernel, folder)
            if kernel["wide"]:
                assert_wide(kernel["ptx"])
        except AssertionError as error:
            name = f"{kernel['op']}, {kernel['example']!r}, {kernel['kernel']}, sm_{kernel['capability']}"
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)


def _compiled(folder: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    """What the script compiles."""
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton does not compile for NVIDIA GPUs")
    result = folder / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, __file__, str(result), *options], env=environment, check=True)
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return _compiled(tmp_path_factory.mktemp("quick"))


def test_kernels(quick, tmp_path):
    _gate(quick["kernels"], tmp_path)


def test_the_search_for_codewords_uses_tensor_cores(quick):
    instructions = {
        80: r"mma\.sync\S*\.f32\.f16\.f16",
        90: r"wgmma\.mma_async\S*\.f32\.f16\.f16",
        100: r"tcgen05\.mma\S*::f16",
    }
    for name in ("search_kernel", "tiny_search_kernel"):
        searches = [k for k in quick["kernels"] if k["kernel"] == name]
        assert {k["capability"] for k in searches} == set(CAPABILITIES)
        for kernel in searches:
            assert re.search(instructions[kernel["capability"]], kernel["ptx"]), (name, kernel["capability"])


@pytest.mark.slow
def test_all_kernels(tmp_path):
    _gate(_compiled(tmp_path, "--slow")["kernels"], tmp_path)


def test_gates_catch(quick, tmp_path):
    """A kernel that breaks a rule does not pass."""
    dot, fused = quick["broken"]
    with pytest.raises(AssertionError, match="TF32"):
        assert_no_tf32(dot["ptx"])
    with pytest.raises(AssertionError, match="fma"):
        assert_ieee(fused["ptx"])
    assert fused["fused"]
    product = next(k for k in quick["kernels"] if k["kernel"] == "_statistics_kernel")
    elsewhere = re.sub(r"(\.loc\s+\d+\s+)\d+", r"\g<1>1", product["ptx"])
    for changed in (elsewhere, product["ptx"].replace("fma.rn.f32", "fma.rn.ftz.f32")):
        with pytest.raises(AssertionError, match="fma"):
            assert_ieee(changed)
    good = next(k for k in quick["kernels"] if k["kernel"] == "_backward_kernel")
    starved = {**good, "ptx": good["ptx"].replace(".reqntid", ".maxnreg 24\n.reqntid")}
    with pytest.raises(AssertionError, match="spill"):
        assert_no_spills(starved, tmp_path)
    narrow = re.sub(r"\.v4\.b32", ".b32", good["ptx"])
    with pytest.raises(AssertionError, match="narrow"):
        assert_wide(narrow)


def _unnamed_precisions(source: str) -> list[int]:
    """Lines of the calls of ``dot`` that name no input_precision."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    dots = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "dot"]
    return [c.lineno for c in dots if "input_precision" not in {k.arg for k in c.keywords}]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_every_dot_names_its_precision(path):
    assert not _unnamed_precisions(path.read_text())


def test_unnamed_precision_is_found():
    assert _unnamed_precisions("x = 1\ny = tl.dot(a, b)\nz = tl.dot(a, b, input_precision='ieee')") == [2]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(_compile_all("--slow" in sys.argv)))
