"""Which backends this machine can run, and which one the user asked for.

``cpu``, ``cuda``, ``triton`` and ``reference`` (plain torch). The choice among them is made below each
torch op by :class:`genperf._op.Operator`; here stand the facts that it rests on.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

#: In order of preference.
BACKENDS = ("cpu", "cuda", "triton", "reference")

_native_error = ""


def _import_native() -> ModuleType | None:
    global _native_error
    try:
        return importlib.import_module("genperf._native")
    except ImportError as error:
        _native_error = str(error)
        return None


#: The extension module, or None where it is not built or cannot be loaded.
native: ModuleType | None = _import_native()

_emulated_cuda: ModuleType | None = None
_forced: str | None = None

#: What the operators remember of `unusable` and `forced`; cleared whenever either may change.
choices: list[dict] = []


def _forget_choices() -> None:
    for remembered in choices:
        remembered.clear()


def _check_name(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def forced() -> str | None:
    """The backend that every op must use, if the user named one."""
    return _forced


def cuda_functions() -> ModuleType:
    """The CUDA launchers of the extension module (or their emulation, in the tests)."""
    module = _emulated_cuda or native
    assert module is not None
    return module.cuda


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unusable(name: str, device: str) -> str | None:
    """Why backend ``name`` cannot run on tensors of this device type; None if it can."""
    if name == "reference":
        return None
    if name == "cpu":
        if device != "cpu":
            return f"the tensors are on {device}"
        return None if native else f"the extension module cannot be loaded ({_native_error})"
    if name == "cuda":
        if _emulated_cuda:
            return (
                None if device == "cpu" else f"CUDA is emulated on the CPU, and the tensors are on {device}"
            )
        if native is None:
            return f"the extension module cannot be loaded ({_native_error})"
        if not hasattr(native, "cuda"):
            return "CUDA kernels are not built in (build with nvcc and GENPERF_CUDA=ON)"
        return None if device == "cuda" else f"the tensors are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and interpreting() and _forced == "triton"):
        return None
    hint = "; TRITON_INTERPRET=1 interprets it, where it is asked for" if device == "cpu" else ""
    return f"the tensors are on {device}{hint}"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Make every op use one backend: ``with genperf.backend("triton"): ...``.

    Holds for the whole process until the block ends; the environment variable ``GENPERF_BACKEND`` does
    the same from the start. An op that this backend cannot serve raises RuntimeError with the reason.

    Args:
        name: "cpu", "cuda", "triton" or "reference".

    Raises:
        ValueError: for any other name.
    """
    global _forced
    previous, _forced = _forced, _check_name(name, "genperf.backend")
    _forget_choices()
    try:
        yield
    finally:
        _forced = previous
        _forget_choices()


@contextmanager
def emulate_cuda(module: ModuleType) -> Iterator[None]:
    """Run backend ``cuda`` on CPU tensors through an emulated build of the CUDA sources (for tests)."""
    global _emulated_cuda
    previous, _emulated_cuda = _emulated_cuda, module
    _forget_choices()
    try:
        yield
    finally:
        _emulated_cuda = previous
        _forget_choices()


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that the CPU kernels can use here, narrowest first."""
    return native.isas() if native else ()


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Make the CPU kernels use one instruction set: "baseline", "avx2" or "avx512".

    The environment variable ``GENPERF_CPU_ISA`` does the same from the start. Results do not depend on
    the choice.

    Raises:
        ValueError: if this machine does not have it.
    """
    if native is None or name not in cpu_isas():
        raise ValueError(f"genperf.cpu_isa: {name!r} cannot be used here; expected one of {cpu_isas()}")
    previous = native.isa()
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa(previous)


def _read_environment() -> None:
    global _forced
    if name := os.environ.get("GENPERF_BACKEND"):
        _forced = _check_name(name, "environment variable GENPERF_BACKEND")
    if (isa := os.environ.get("GENPERF_CPU_ISA")) and native:
        if isa not in cpu_isas():
            raise ValueError(
                f"environment variable GENPERF_CPU_ISA: {isa!r} cannot be used here; "
                f"expected one of {cpu_isas()}"
            )
        native.set_isa(isa)


_read_environment()


def doctor() -> str:
    """What is installed, what is built and what can run here, as text."""
    from importlib.metadata import PackageNotFoundError, version

    from tabulate import tabulate

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    facts = [
        ("genperf", installed("genperf")),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", installed("triton")),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        ("extension module", f"built by {native.compiler}" if native else f"missing: {_native_error}"),
        ("CPU instruction sets", f"{', '.join(cpu_isas())} (using {native.isa()})" if native else "-"),
        ("CUDA kernels", (native.cuda_architectures if native else "") or "not built in"),
        ("CUDA device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        (name, on, "no: " + reason if (reason := unusable(name, on)) else "yes")
        for on in dict.fromkeys(("cpu", device))
        for name in BACKENDS
    ]
    asked = f"\n\nEvery op is asked to use {_forced!r}." if _forced else ""
    return (
        tabulate(facts, tablefmt="plain")
        + "\n\n"
        + tabulate(rows, headers=("backend", "tensors on", "usable"), tablefmt="simple")
        + asked
    )
