"""Clocks, memory and ceilings."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_RUN = "genperf::bench"

Prepare = Callable[[], Any]
Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least ``rounds`` samples, each of ``sample_s``, ``budget_s`` a provider.

    Where a round of all providers takes longer than ``budget_s``, ``least`` rounds will do.
    """

    sample_s: float
    rounds: int
    max_rounds: int
    budget_s: float
    stable: float = 0.003
    least: int = 5


THOROUGH = Effort(sample_s=2e-3, rounds=15, max_rounds=400, budget_s=2.0)
QUICK = Effort(sample_s=5e-4, rounds=5, max_rounds=40, budget_s=0.15, least=1)


@dataclass
class Samples:
    """Seconds a call, one entry a sample."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def stable(self, effort: Effort) -> bool:
        if len(self.wall) < effort.rounds:
            return False
        low, median, high = quantiles(self.cpu if min(self.cpu) > 0 else self.wall)
        return (high - low) / math.sqrt(len(self.wall)) <= effort.stable * median


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


class CpuClock:
    """Wall and process CPU time of a batch of calls."""

    def measure(self, prepare: Prepare, run: Run, calls: int) -> tuple[list[float], list[float]]:
        states = [prepare() for _ in range(calls)]
        cpu, wall = time.process_time(), time.perf_counter()
        for state in states:
            run(state)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return [wall / calls], [cpu / calls]


class CudaClock:
    """Event time of each call, with the L2 cache flushed before it; CPU time is the host's share."""

    calls = 10

    def __init__(self, device: torch.device):
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.flush = torch.empty(max(4 * cache, 128 << 20), dtype=torch.uint8, device=device)

    def measure(self, prepare: Prepare, run: Run, calls: int) -> tuple[list[float], list[float]]:
        states = [prepare() for _ in range(calls)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda.synchronize()
        cpu = time.process_time()
        for state, (start, end) in zip(states, events, strict=True):
            self.flush.zero_()
            start.record()
            run(state)
            end.record()
        cpu = time.process_time() - cpu
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events], [cpu / calls]


@contextmanager
def quiet() -> Iterator[None]:
    """The garbage collector off."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class Contender:
    """One provider's timed steps; ``context`` is entered around a sample, outside the clock."""

    prepare: Prepare
    run: Run
    context: Callable[[], Any]
    samples: Samples = field(default_factory=Samples)
    calls: int = 1


def race(contenders: list[Contender], clock: CpuClock | CudaClock, effort: Effort) -> None:
    """Fills each contender's samples, round robin, so that all meet the same state of the machine.

    A sample lasts at least a tenth of the longest one, so that it is not about the caches as another
    contender left them.
    """
    with quiet():
        single = []
        for contender in contenders:
            with contender.context():
                once = clock.measure(contender.prepare, contender.run, 1)[0][0]
                if once < effort.budget_s / 5:
                    clock.measure(contender.prepare, contender.run, 2)
                    once = min(clock.measure(contender.prepare, contender.run, 1)[0] for _ in range(2))[0]
            single.append(max(once, 1e-7))
        least = max(effort.sample_s, max(single, default=0.0) / 10)
        for contender, once in zip(contenders, single, strict=True):
            if isinstance(clock, CudaClock):
                contender.calls = clock.calls
            else:
                contender.calls = min(10_000, math.ceil(least / once))
        started = time.perf_counter()
        for done in range(effort.max_rounds):
            spent = time.perf_counter() - started
            slow = done >= effort.least and spent > done * effort.budget_s
            if slow or (
                done >= effort.rounds
                and (
                    spent > effort.budget_s * len(contenders)
                    or all(contender.samples.stable(effort) for contender in contenders)
                )
            ):
                break
            for contender in contenders:
                with contender.context():
                    wall, cpu = clock.measure(contender.prepare, contender.run, contender.calls)
                contender.samples.wall += wall
                contender.samples.cpu += cpu


def peak_bytes(prepare: Prepare, run: Run, device: torch.device) -> int:
    """Peak memory of one call beyond what existed before it and the tensors that it returns.

    On a CPU this counts torch's allocator, as the profiler reports it; scratch that a native kernel takes
    from elsewhere is not seen.
    """
    if device.type == "cuda":
        state = prepare()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run(state)
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before - storage_bytes(kept))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        state = prepare()
        with torch.profiler.record_function(_RUN):
            kept = run(state)
    held = before = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == _RUN:
            before = peak = held
        elif event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return max(0, peak - before - storage_bytes(kept))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """The machine's best in this run: copy bandwidth (bytes read and written a second) and float32 matrix
    multiplications (multiplications and additions a second, no TF32). By the clock of ``Row.seconds``."""
    by_cpu_time = device.type == "cpu" and torch.get_num_threads() == 1
    clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    repeats = 5 if quick else 15
    elements = (256 << 20 if device.type == "cuda" else 32 << 20) // 4 * (1 if quick else 4)
    source = torch.zeros(elements, device=device)
    target = torch.zeros_like(source)
    side = 4096 if device.type == "cuda" else 512 if quick else 1024
    left, right = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    product = torch.empty_like(left)

    def best(run: Run) -> float:
        run(None)
        samples = [clock.measure(lambda: None, run, 1) for _ in range(repeats)]
        return min(cpu[0] if by_cpu_time else wall[0] for wall, cpu in samples)

    with quiet(), torch.no_grad():
        copy = best(lambda _: target.copy_(source))
        matmul = best(lambda _: torch.mm(left, right, out=product))
    return {"copy_bytes_per_s": 2 * 4 * elements / copy, "matmul_flops_per_s": 2 * side**3 / matmul}
