"""The result file: a header about the machine and the run, and one row for each measurement."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
_PACKAGES = ("genperf", "torch", "triton", "numpy", "diffusers")


@dataclass(frozen=True)
class Row:
    """One provider on one case in one mode. Times are seconds a call; ``None`` where nothing ran.

    ``cpu_s`` is process CPU time over all threads (on CUDA: the host's share). ``bytes`` and ``flops`` are
    the least that the op needs, ``ceiling_fraction`` the time that they take at the measured copy bandwidth
    and matrix rate over the time taken: above 1 where the data stays in a cache. ``peak_bytes`` is memory
    beyond inputs and results. ``max_error`` is the largest of ``max |x - truth| / max |truth|`` over the
    results, with the truth in float64. ``check`` is ``"ok"`` or ``"fail: ..."``.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    provider: str
    device: str
    threads: int
    median_s: float | None
    p20_s: float | None
    p80_s: float | None
    cpu_s: float | None
    bytes: int
    flops: int
    ceiling_fraction: float | None
    peak_bytes: int | None
    max_error: float | None
    check: str
    versions: dict[str, str]
    commit: str

    @property
    def case(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.dtype, self.mode

    @property
    def key(self) -> tuple[str, str, str, str, str, str, int]:
        """What makes two rows of two files the same measurement."""
        return (*self.case, self.provider, self.device, self.threads)

    @property
    def ok(self) -> bool:
        return self.check == "ok"

    @property
    def seconds(self) -> float | None:
        """The time that is compared: CPU time for one thread, which neighbours on the machine do not
        change; else the median of wall time."""
        return self.cpu_s if self.device == "cpu" and self.threads == 1 else self.median_s


FIELDS = tuple(field.name for field in dataclasses.fields(Row))


@dataclass
class Results:
    header: dict[str, Any]
    rows: list[Row]

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"header": self.header, "rows": [dataclasses.asdict(row) for row in self.rows]}
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Raises ValueError, naming the file, where it is not a result file of this schema."""
        try:
            document = json.loads(Path(path).read_text())
            header, rows = document["header"], document["rows"]
            schema = header["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a result file of `genperf bench` ({error!r})") from None
        if schema != SCHEMA:
            raise ValueError(f"{path}: schema {schema}, expected {SCHEMA}")
        for row in rows:
            if set(row) != set(FIELDS):
                raise ValueError(f"{path}: a row has other fields: {sorted(set(row) ^ set(FIELDS))}")
        return cls(header, [Row(**row) for row in rows])

    def cases(self) -> dict[tuple[str, str, str, str], list[Row]]:
        """Rows by case, in the order of the file."""
        grouped: dict[tuple[str, str, str, str], list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.case, []).append(row)
        return grouped


BASELINES = ("eager", "naive")  # what speed-ups are over


def speedup(row: Row, case: Iterable[Row]) -> float | None:
    """The baseline's time over this row's; None where either failed its check or was not measured."""
    base = next((other for other in case if other.provider in BASELINES), None)
    if base is None or not (base.ok and row.ok) or not (base.seconds and row.seconds):
        return None
    return base.seconds / row.seconds


def overhead(row: Row, case: Iterable[Row]) -> float | None:
    """Seconds above the bare native kernel, for cases that have the provider ``native``."""
    native = next((other for other in case if other.provider == "native"), None)
    if native is None or native is row or not (native.ok and row.ok) or not (native.seconds and row.seconds):
        return None
    return row.seconds - native.seconds


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return found


def commit() -> str:
    """The commit of the checkout that genperf runs from, ``-dirty`` if changed; ``"unknown"`` elsewhere."""
    here = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "--", "__init__.py"):
            return "unknown"
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def header(device: torch.device, threads: int) -> dict[str, Any]:
    """What is known before the run; the runner adds ceilings, skipped providers and the load after it."""
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": _cpu_model(),
        "driver": None,
        "cpu": {
            "model": _cpu_model(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": threads,
        },
        "platform": platform.platform(terse=True),
        "versions": versions(),
        "commit": commit(),
        "load_average": {"before": list(os.getloadavg())},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device_name"] = properties.name
        about["driver"] = _driver()
        about["cuda"] = {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "runtime": torch.version.cuda,
        }
    return about


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
