"""Builds the extension module with CMake; everything else stands in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def parallel_jobs() -> int:
    """MAX_JOBS, or as many compilers as cores and memory (2 GB each) allow."""
    if jobs := os.environ.get("MAX_JOBS"):
        return max(1, int(jobs))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, memory // 2_000_000_000))


class BuildCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = (ROOT / "build" / f"cmake-{sys.implementation.cache_tag}").resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGENPERF_VERSION={self.distribution.get_version()}",
            f"-DGENPERF_CUDA={os.environ.get('GENPERF_CUDA', 'AUTO')}",
        ]  # fmt: skip
        if architectures := os.environ.get("GENPERF_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        if shutil.which("ninja"):
            configure.append("-GNinja")
        if shutil.which("ccache"):
            configure += [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("CXX", "CUDA")]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(parallel_jobs())], check=True)


setup(ext_modules=[Extension("genperf._native", sources=[])], cmdclass={"build_ext": BuildCMake})
