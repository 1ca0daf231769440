"""The documentation says what the code does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
VARIABLE = re.compile(r"\bGENPERF_[A-Z0-9_]+\b")
SOURCES = ("genperf/**/*.py", "kernels/**/*.py", "benchmarks/**/*.py", "setup.py", "tools/*.sh", "Makefile")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def examples() -> list[pytest.ParameterSet]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{named(path)}:{line}"))
    return found


@pytest.mark.parametrize("code", examples())
def test_example_runs(code: str, tmp_path: Path) -> None:
    if "diffusers" in code:
        pytest.importorskip("diffusers")
    if "pythae" in code:
        pytest.importorskip("pythae")
    file = tmp_path / "example.py"  # accelerate reads the source of methods
    file.write_text(code)
    exec(compile(code, str(file), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        if "://" in target:
            continue
        file, _, fragment = target.partition("#")
        destination = (path.parent / file).resolve() if file else path
        assert destination.exists(), f"{named(path)} links to {target}"
        if fragment:
            assert fragment in anchors(destination), f"{named(path)} links to {target}"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def environment_reads() -> set[str]:
    """The GENPERF_ variables that the code takes from the environment."""
    reads = set()
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            for line in path.read_text().splitlines():
                if re.search(r"environ|getenv|\$\{|\benv\b|export", line):
                    reads |= set(VARIABLE.findall(line))
    return reads


def test_every_environment_variable_is_documented() -> None:
    reads = environment_reads()
    assert {"GENPERF_BACKEND", "GENPERF_CUDA"} <= reads, "the search itself is broken"
    documented = set(VARIABLE.findall((ROOT / "ENVIRONMENT.md").read_text()))
    assert reads - documented == set()
    assert documented - reads == set(), "documented, but nothing reads it"


def test_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    for target in ("make test", "make demo"):
        assert target in readme


def test_make_targets_exist() -> None:
    listed = subprocess.run(
        ["make", "--dry-run", "--question", "--print-data-base"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    targets = set(re.findall(r"^([a-z-]+):", listed, re.MULTILINE))
    for path in DOCUMENTS:
        for target in re.findall(r"`make ([a-z-]+)`", path.read_text()):
            assert target in targets, f"{named(path)} names `make {target}`"
