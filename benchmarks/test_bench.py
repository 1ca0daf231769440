"""The cases of ``python -m genperf bench`` under pytest-benchmark: ``pytest benchmarks/``.

``-k`` chooses, e.g. ``-k "gaussian_sample and 256x128 and not compile"``. CUDA is used where there is one,
else one CPU thread; add ``--benchmark-timer=time.process_time`` for CPU time, on a machine that is shared.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from genperf.bench import Benchmark, Case, discover
from genperf.bench.providers import Problem, Provider, check, errors, gradients, providers

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _names(benchmark: Benchmark) -> list[str]:
    return [provider.name for provider in providers(benchmark, DEVICE)]


def _cases() -> list[object]:
    return [
        pytest.param(
            benchmark,
            case,
            mode,
            provider,
            id=f"{benchmark.op}-{case.shape_name}-{case.dtype_name}-{mode}-{provider}",
        )
        for benchmark in discover()
        for case in benchmark.cases
        for mode in case.modes
        for provider in _names(benchmark)
    ]


@functools.lru_cache(maxsize=1)
def _prepared(benchmark: Benchmark, case: Case) -> tuple[Problem, dict[str, Provider]]:
    torch.compiler.reset()
    return Problem(benchmark, case, DEVICE), {found.name: found for found in providers(benchmark, DEVICE)}


@pytest.mark.parametrize(("case_of", "case", "mode", "name"), _cases())
def test_provider(benchmark, case_of: Benchmark, case: Case, mode: str, name: str) -> None:
    problem, available = _prepared(case_of, case)
    provider = available[name]
    if provider.unusable:
        pytest.skip(provider.unusable)
    with provider.context():
        try:
            found = errors(problem, provider, mode)
            prepare, run = problem.steps(provider.function, mode)
        except (NotImplementedError, ImportError) as error:
            pytest.skip(str(error))
        eager = available.get("eager")
        eager_errors = errors(problem, eager, mode) if eager else None
        assert check(problem, found, eager_errors) == "ok"

        def synchronised(state: object) -> None:
            run(state)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        with gradients(mode):
            benchmark.group = "-".join((case_of.op, case.shape_name, case.dtype_name, mode))
            benchmark.pedantic(
                synchronised, setup=lambda: ((prepare(),), {}), rounds=15, warmup_rounds=3, iterations=1
            )
