"""Builds and loads the CUDA sources for the host, and chooses the order in which threads run."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "simt"

#: Orders of blocks, warps and lanes that a right kernel cannot tell apart; simt.cpp defines them.
SCHEDULES = ("forward", "reverse", "shuffle:1", "shuffle:2")


@contextmanager
def _one_build_at_a_time() -> Iterator[None]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*command: str | Path) -> None:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")


@functools.cache
def load() -> ModuleType:
    """The extension module with every ``csrc/<op>/cuda.cu`` emulated; built, or built again, if needed."""
    with _one_build_at_a_time():
        folder = BUILD / str(sys.implementation.cache_tag)
        _run("cmake", "-S", HERE, "-B", folder, "-GNinja", f"-DPython_EXECUTABLE={sys.executable}",
             f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")  # fmt: skip
        _run("cmake", "--build", folder)
    (path,) = folder.glob("_simt.*.so")
    spec = importlib.util.spec_from_file_location("_simt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """Backend ``cuda`` runs on CPU tensors: ``with emulated_cuda(), genperf.backend("cuda"): ...``."""
    from genperf import _backend

    with _backend.emulate_cuda(load()):
        yield


@contextmanager
def schedule(name: str) -> Iterator[None]:
    """One of ``forward``, ``reverse`` and ``shuffle:SEED``."""
    previous = os.environ.get("GENPERF_SIMT_SCHEDULE")
    os.environ["GENPERF_SIMT_SCHEDULE"] = name
    try:
        yield
    finally:
        del os.environ["GENPERF_SIMT_SCHEDULE"]
        if previous is not None:
            os.environ["GENPERF_SIMT_SCHEDULE"] = previous


def compile_source(source: Path, *flags: str) -> ctypes.CDLL:
    """A single CUDA source as a library; its ``extern "C"`` functions end in ``catch_faults``."""
    command = [
        os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing",
        "-ffp-contract=off", "-Wall", "-Werror", "-DGENPERF_SIMT", f"-I{HERE}", f"-I{ROOT / 'csrc'}", *flags,
    ]  # fmt: skip
    model = [HERE / name for name in ("simt.h", "simt.cpp", "fiber.h")]
    inputs = [source, *model, ROOT / "csrc" / "common" / "cuda.h"]
    text = " ".join(command) + "".join(path.read_text() for path in inputs)
    library = BUILD / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    with _one_build_at_a_time():
        if not library.exists():
            _run(*command, "-x", "c++", source, HERE / "simt.cpp", "-o", library)
    return ctypes.CDLL(str(library))


def call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    """Run a function of such a library; a fault of the kernel raises RuntimeError."""
    function.restype = ctypes.c_char_p
    if message := function(*arguments):
        raise RuntimeError(message.decode())
