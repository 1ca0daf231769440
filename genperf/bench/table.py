"""Rows as text: units, and the tables of the terminal and of markdown."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from .results import BASELINES, Results, Row, overhead, speedup

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_MEMORY = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def need(name: str) -> ModuleType:
    """Imports what ``genperf[bench]`` installs, or says so."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this command needs {name}: pip install 'genperf[bench]'", name=error.name
        ) from None


def seconds(value: float | None) -> str:
    """Three significant digits with a unit."""
    if value is None:
        return "-"
    scale, unit = next((pair for pair in _TIMES if abs(value) >= pair[0]), _TIMES[-1])
    return f"{_significant(value / scale)} {unit}"


def memory(value: int | None) -> str:
    if value is None:
        return "-"
    scale, unit = next((pair for pair in _MEMORY if value >= pair[0]), (1, "B"))
    return f"{_significant(value / scale) if scale > 1 else value} {unit}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{_significant(value)}x"


def _significant(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def title(results: Results) -> str:
    """One paragraph on where the numbers come from."""
    header = results.header
    version = header["versions"]
    measured = {f"{row.op} at {row.commit}": None for row in results.rows if row.commit != header["commit"]}
    apart = f" ({', '.join(measured)})" if measured else ""
    ceilings = header["ceilings"]
    threads = header["cpu"]["threads"]
    where = header["device_name"]
    if header["device"] == "cpu":
        where += f" ({header['cpu']['isa']}), {threads} thread{'s' if threads != 1 else ''}"
    else:
        where += f", driver {header['driver']}"
    before, after = (header["load_average"].get(when, [float("nan")])[0] for when in ("before", "after"))
    load = f"load average {before:.1f} before and {after:.1f} after"
    return (
        f"{where}; genperf {version.get('genperf', '(not installed)')} at {header['commit']}{apart}, "
        f"torch {version['torch']}; {header['date'][:10]}. "
        f"Copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"float32 matmul {ceilings['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s; {load}."
    )


def clock_name(row: Row) -> str:
    return "CPU time" if row.device == "cpu" and row.threads == 1 else "median"


def terminal(results: Results) -> str:
    """Every measurement, cases apart."""
    tabulate = need("tabulate")
    lines: list[Any] = []
    for case, rows in results.cases().items():
        if lines:
            lines.append(tabulate.SEPARATING_LINE)
        for row in rows:
            first = row is rows[0]
            above = overhead(row, rows)
            lines.append(
                [
                    *(case if first else [""] * len(case)),
                    row.provider,
                    seconds(row.cpu_s),
                    seconds(row.median_s),
                    "-" if row.p20_s is None else f"{seconds(row.p20_s)} - {seconds(row.p80_s)}",
                    ratio(speedup(row, rows)),
                    "" if above is None else f"{above * 1e6:+.2f} us",
                    "-" if row.ceiling_fraction is None else f"{row.ceiling_fraction:.0%}",
                    memory(row.peak_bytes),
                    "-" if row.max_error is None else f"{row.max_error:.1e}",
                    row.check,
                ]
            )
    names = ["op", "shape", "dtype", "mode", "provider", "CPU", "wall", "20% - 80%", "speed-up"]
    names += ["above native", "of ceiling", "extra memory", "max error", "check"]
    if all(line is tabulate.SEPARATING_LINE or not line[9] for line in lines):
        names.pop(9)
        lines = [line if line is tabulate.SEPARATING_LINE else line[:9] + line[10:] for line in lines]
    text = [title(results), "", tabulate.tabulate(lines, names, disable_numparse=True)]
    for left_out in results.header["skipped"]:
        text.append(f"not measured: {left_out['op']} with {left_out['provider']}: {left_out['reason']}")
    return "\n".join(text)


def markdown(results: Results) -> str:
    """One line a case, one column a provider: the time, and in brackets the speed-up over eager.

    Cases that measure overhead, those with the provider ``native``, are told in a sentence each.
    """
    tabulate = need("tabulate")
    cases = {case: rows for case, rows in results.cases().items() if not measures_overhead(rows)}
    providers = sorted({row.provider for rows in cases.values() for row in rows}, key=_provider_order)
    lines = []
    for (op, shape, dtype, mode), rows in cases.items():
        by_provider = {row.provider: row for row in rows}
        cells = [_cell(by_provider.get(provider), rows) for provider in providers]
        lines.append([op, shape.replace("x", "\u00d7"), dtype, mode, *cells])
    if not results.rows:
        raise ValueError("no rows to report")
    names = ["op", "shape", "dtype", "mode", *providers]
    table = tabulate.tabulate(lines, names, tablefmt="github", disable_numparse=True)
    baseline = next((row.provider for row in results.rows if row.provider in BASELINES), "eager")
    notes = [
        f"{title(results)} Each cell: {clock_name(results.rows[0])} of a call, and in brackets the "
        f"speed-up over {baseline}.",
        *_overheads(results),
    ]
    return "\n\n".join([table, *notes] if lines else notes)


def _cell(row: Row | None, case: list[Row]) -> str:
    if row is None:
        return ""
    if not row.ok:
        return "check failed"
    gain = speedup(row, case)
    shown = "" if gain is None or row.provider in BASELINES else f" ({ratio(gain)})"
    return seconds(row.seconds) + shown


def measures_overhead(case: list[Row]) -> bool:
    return any(row.provider == "native" for row in case)


def _overheads(results: Results) -> list[str]:
    found = []
    for (op, shape, _, mode), rows in results.cases().items():
        times = ", ".join(f"{row.provider} {seconds(row.seconds)}" for row in rows if row.ok)
        for row in rows:
            above = overhead(row, rows)
            if above is not None and row.provider.startswith("genperf/"):
                case = f"`{op}` {shape} {mode}"
                cost = f"takes {above * 1e6:.1f} us more than the bare kernel"
                found.append(f"{case}: a call of {row.provider} {cost} ({times}).")
    return found


def _provider_order(name: str) -> tuple[int, str]:
    order = ("eager", "naive", "compile", "cached", "graph", "peer/", "native", "genperf/")
    return next((i for i, prefix in enumerate(order) if name.startswith(prefix)), len(order)), name
