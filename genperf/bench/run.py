"""Measures benchmarks: check first, then race the providers, then look at memory."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import measure
from .case import Benchmark, Case, CheckError
from .providers import Problem, Provider, check, errors, gradients, providers
from .results import Results, Row, header

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to measure and how hard. Filters are shell patterns; None takes everything."""

    device: str = "cpu"
    threads: int | None = None
    quick: bool = False
    shape: str | None = None
    dtype: str | None = None
    mode: str | None = None
    provider: str | None = None
    skip: tuple[str, ...] = ()
    commit: str | None = None

    def takes(self, case: Case, mode: str) -> bool:
        values = ((case.shape_name, self.shape), (case.dtype_name, self.dtype), (mode, self.mode))
        return all(matches(value, pattern) for value, pattern in values)

    def takes_provider(self, name: str) -> bool:
        skipped = any(matches(name, pattern) for pattern in self.skip)
        return matches(name, self.provider) and not skipped


def matches(value: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(value, pattern)


def plan(benchmarks: Iterable[Benchmark], options: Options) -> list[tuple[Benchmark, Case, tuple[str, ...]]]:
    """The cases that the filters leave, with their modes."""
    chosen = []
    for benchmark in benchmarks:
        for case in benchmark.cases:
            modes = tuple(mode for mode in case.modes if options.takes(case, mode))
            if modes:
                chosen.append((benchmark, case, modes))
    return chosen


def run(benchmarks: Iterable[Benchmark], options: Options, progress: Progress = lambda _: None) -> Results:
    """Measures what the filters leave and returns the rows.

    An interrupt ends the run and keeps what was measured. ``progress`` is called at the start of each
    case and mode, with its name.
    """
    device = torch.device(options.device)
    threads = options.threads or torch.get_num_threads()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = Results(header(device, threads), [])
        if options.commit:
            results.header["commit"] = options.commit
        session = _Session(options, device, threads, results)
        try:
            for benchmark, case, modes in plan(benchmarks, options):
                session.case(benchmark, case, modes, progress)
        except KeyboardInterrupt:
            results.header["interrupted"] = True
        results.header["load_average"]["after"] = list(os.getloadavg())
        return results
    finally:
        torch.set_num_threads(threads_before)


class _Session:
    def __init__(self, options: Options, device: torch.device, threads: int, results: Results):
        self.options, self.device, self.threads, self.results = options, device, threads, results
        self.effort = measure.QUICK if options.quick else measure.THOROUGH
        self.clock = measure.CudaClock(device) if device.type == "cuda" else measure.CpuClock()
        results.header["ceilings"] = measure.ceilings(device, options.quick)
        self.skipped: list[dict[str, str]] = []
        results.header["skipped"] = self.skipped

    def case(self, benchmark: Benchmark, case: Case, modes: tuple[str, ...], progress: Progress) -> None:
        torch.compiler.reset()
        problem = Problem(benchmark, case, self.device)
        available = providers(benchmark, self.device)
        for mode in modes:
            progress(" ".join((benchmark.op, case.shape_name, case.dtype_name, mode)))
            self.mode(problem, available, mode)

    def mode(self, problem: Problem, available: list[Provider], mode: str) -> None:
        eager_errors = None
        verdicts: dict[str, tuple[str, float | None]] = {}
        contenders: dict[str, measure.Contender] = {}
        for provider in available:
            wanted = self.options.takes_provider(provider.name)
            if not wanted and provider.name != "eager":
                continue
            if provider.unusable:
                self.skip(provider, problem, provider.unusable)
                continue
            try:
                with provider.context():
                    found = errors(problem, provider, mode)
                    if provider.name == "eager":
                        eager_errors = found
                    if not wanted:
                        continue
                    verdicts[provider.name] = check(problem, found, eager_errors), max(found.values())
                    prepare, run = problem.steps(provider.function, mode)
            except (NotImplementedError, ImportError) as error:
                self.skip(provider, problem, str(error))
                continue
            except CheckError as error:
                verdicts[provider.name] = f"fail: {error}", None
                prepare, run = problem.steps(provider.function, mode)
            except Exception as error:  # a provider that breaks is a result, not the end of the run
                verdicts[provider.name] = f"fail: {_summary(error)}", None
                continue
            contenders[provider.name] = measure.Contender(prepare, run, _within(provider, mode))
        measure.race(list(contenders.values()), self.clock, self.effort)
        for name, (verdict, max_error) in verdicts.items():
            row = self.row(problem, mode, name, verdict, max_error, contenders.get(name))
            self.results.rows.append(row)

    def skip(self, provider: Provider, problem: Problem, reason: str) -> None:
        """Leaves a provider out, and says so once."""
        entry = {"op": problem.benchmark.op, "provider": provider.name, "reason": reason}
        if entry not in self.skipped:
            self.skipped.append(entry)

    def row(
        self,
        problem: Problem,
        mode: str,
        provider: str,
        verdict: str,
        max_error: float | None,
        contender: measure.Contender | None,
    ) -> Row:
        benchmark, case = problem.benchmark, problem.case
        work = {
            "bytes": benchmark.bytes(case.shape, case.dtype, mode),
            "flops": benchmark.flops(case.shape, case.dtype, mode),
        }
        timing: dict[str, Any] = dict.fromkeys(("p20_s", "median_s", "p80_s", "cpu_s", "peak_bytes"))
        if contender is not None:
            parts = benchmark.parts[provider](case.shape) if provider in benchmark.parts else 1
            wall = measure.quantiles([parts * sample for sample in contender.samples.wall])
            timing.update(zip(("p20_s", "median_s", "p80_s"), wall, strict=True))
            timing["cpu_s"] = parts * measure.quantiles(contender.samples.cpu)[1]
            with contender.context():
                timing["peak_bytes"] = measure.peak_bytes(contender.prepare, contender.run, self.device)
        row = Row(
            op=benchmark.op,
            shape=case.shape_name,
            dtype=case.dtype_name,
            mode=mode,
            provider=provider,
            device=self.device.type,
            threads=self.threads,
            ceiling_fraction=None,
            max_error=max_error,
            check=verdict,
            versions=self.results.header["versions"],
            commit=self.results.header["commit"],
            **work,
            **timing,
        )
        return self.with_ceiling(row, problem)

    def with_ceiling(self, row: Row, problem: Problem) -> Row:
        if not row.seconds:
            return row
        ceilings = self.results.header["ceilings"]
        least = max(row.bytes / ceilings["copy_bytes_per_s"], row.flops / ceilings["matmul_flops_per_s"])
        if problem.benchmark.floor is not None:
            least = problem.floor
        return dataclasses.replace(row, ceiling_fraction=least / row.seconds)


def _within(provider: Provider, mode: str) -> Callable[[], Any]:
    @contextlib.contextmanager
    def entered() -> Any:
        with provider.context(), gradients(mode):
            yield

    return entered


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
