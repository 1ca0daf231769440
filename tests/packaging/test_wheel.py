"""The source distribution and the wheel made of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_LIBRARIES = {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}
SHARED_WITH_TORCH = {"libgomp.so.1"}


def version() -> str:
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it, without CUDA."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        env=os.environ | {"GENPERF_CUDA": "OFF"},
        check=True,
    )
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(distributions: tuple[Path, Path]) -> Path:
    return distributions[1]


def test_sdist_has_the_sources(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("csrc/**/*", "kernels/*.py", "benchmarks/**/*.py", "genperf/**/*.py"):
        sources = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()}
        assert {name for name in sources if "__pycache__" not in name} <= names
    assert {"CMakeLists.txt", "LICENSE", "README.md", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("genperf/**/*.py")}
    expected |= {f"genperf/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/*.py")}
    expected |= {f"genperf/{path.relative_to(ROOT)}" for path in ROOT.glob("benchmarks/**/*.py")}
    expected.add("genperf/py.typed")
    assert expected <= names
    extensions = {name for name in names if name.endswith(".so")}
    assert extensions == {f"genperf/_native{sysconfig.get_config_var('EXT_SUFFIX')}"}
    information = f"genperf-{version()}.dist-info/"
    strays = {name for name in names - expected - extensions if not name.startswith(information)}
    assert strays == set()
    assert f"{information}licenses/LICENSE" in names


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"genperf-{version()}.dist-info/METADATA").decode()
    assert f"\nVersion: {version()}\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert re.findall(r"^Requires-Dist: torch(.*)$", metadata, re.MULTILINE) == [">=2.6"]


def test_wheel_needs_system_libraries_only(wheel: Path) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        with archive.open(name) as file:
            dynamic = elffile.ELFFile(file).get_section_by_name(".dynamic")
            needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
            paths = [tag for kind in ("DT_RPATH", "DT_RUNPATH") for tag in dynamic.iter_tags(kind)]
    assert needed <= SYSTEM_LIBRARIES | SHARED_WITH_TORCH
    assert paths == []


def test_auditwheel_accepts_it(wheel: Path) -> None:
    pytest.importorskip("auditwheel")
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"constrains the platform tag to\s+\"manylinux_2_\d+_x86_64\"", shown), shown
    assert set(re.findall(r"\blib[\w+.-]+\.so[\w.]*", shown)) <= SYSTEM_LIBRARIES | SHARED_WITH_TORCH, shown


def test_installs_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """With nothing of this checkout on the path; torch comes from the running environment."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    code = """
    import importlib.metadata, pathlib, sys, torch, genperf
    from genperf.ops import gaussian_sample
    import genperf._native, genperf.kernels, genperf.benchmarks.ops
    assert pathlib.Path(genperf.__file__).is_relative_to(sys.prefix), genperf.__file__
    out = gaussian_sample(torch.randn(4, 8), torch.randn(4, 8), rng="philox")
    assert (out.kl >= 0).all()
    explanation = str(genperf.explain(gaussian_sample, torch.randn(4, 8), torch.randn(4, 8)))
    assert "cpu" in explanation, explanation
    print(importlib.metadata.version("genperf"))
    """
    code = "\n".join(line.strip() for line in code.strip().splitlines())
    run = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    assert subprocess.run([python, "-c", code], **run).stdout.strip() == version()
    assert version() in subprocess.run([python, "-m", "genperf"], **run).stdout
