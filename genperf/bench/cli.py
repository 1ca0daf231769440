"""``python -m genperf bench``, ``... bench compare`` and ``... bench report``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .case import MODES, Benchmark, discover
from .compare import compare, differences_table
from .report import write_chart, write_markdown
from .results import Results
from .run import Options, matches, plan, run
from .table import markdown, need, terminal

_EPILOG = """\
other commands:
  bench compare A.json B.json --fail-over 5%   exit with 1 where B is slower than A, or wrong
  bench report FILE.json [--markdown OUT.md] [--chart OUT.svg]
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0, 1 for a failed check or a regression, 2 for bad input."""
    commands = {"compare": _compare, "report": _report}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _bench(arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"genperf bench: {error}", file=sys.stderr)
        return 2


def _bench(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m genperf bench",
        description="Measure genperf's kernels on this machine against eager torch, torch.compile, the "
        "library in use today and the hardware's limit. Every result is checked against float64 first.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "ops to measure, or a group of them such as 'sampling' (default: all that are in no group)"
    parser.add_argument("ops", nargs="*", metavar="OP", help=what)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    several = "CPU threads (default: torch's); of several, such as 1,2, each has a table and a file"
    parser.add_argument("--threads", type=_positives, metavar="N[,N]", default=(None,), help=several)
    parser.add_argument("--quick", action="store_true", help="few runs, and no torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--shape", metavar="FILTER", help="shapes to measure, such as '64x*'")
    parser.add_argument("--dtype", metavar="FILTER", help="dtypes to measure, such as 'float32'")
    parser.add_argument("--mode", choices=MODES, help="the mode to measure (default: all)")
    parser.add_argument("--provider", metavar="FILTER", help="providers to measure, such as 'genperf/*'")
    parser.add_argument("--skip", metavar="FILTER", action="append", default=[], help="ones to leave out")
    parser.add_argument("--commit", metavar="HASH", help="commit to record (default: ask git)")
    parser.add_argument("--list", action="store_true", help="list what would be measured, and stop")
    given = parser.parse_args(arguments)

    options = Options(
        device=given.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        quick=given.quick,
        shape=given.shape,
        dtype=given.dtype,
        mode=given.mode,
        provider=given.provider,
        skip=(*given.skip, *(("compile",) if given.quick else ())),
        commit=given.commit,
    )
    benchmarks = _select(discover(), given.ops)
    planned = plan(benchmarks, options)
    if not planned:
        raise ValueError("the filters leave nothing to measure")
    if given.list:
        for benchmark, case, modes in planned:
            print(benchmark.op, case.shape_name, case.dtype_name, *modes)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    total, ok = sum(len(modes) for _, _, modes in planned), True
    for threads in given.threads:
        results = _run_with_progress(benchmarks, dataclasses.replace(options, threads=threads), total)
        if given.json:
            results.save(_file_of(Path(given.json), threads, given.threads[0]))
        print(terminal(results))
        if results.header.get("interrupted"):
            return 130
        ok &= all(row.ok for row in results.rows)
    return 0 if ok else 1


def _file_of(path: Path, threads: int | None, first: int | None) -> Path:
    """``FILE.json``, and ``FILE_2_threads.json`` for another number than the first."""
    return path if threads == first else path.with_stem(f"{path.stem}_{threads}_threads")


def _select(benchmarks: list[Benchmark], ops: list[str]) -> list[Benchmark]:
    known = {benchmark.op: [benchmark] for benchmark in benchmarks}
    for benchmark in benchmarks:
        if benchmark.group:
            known.setdefault(benchmark.group, []).append(benchmark)
    for op in ops:
        if op not in known:
            raise ValueError(f"no benchmark is named {op!r}; there are: {', '.join(known)}")
    if not ops:
        return [benchmark for benchmark in benchmarks if not benchmark.group]
    return list(dict.fromkeys(benchmark for op in ops for benchmark in known[op]))


def _run_with_progress(benchmarks: list[Benchmark], options: Options, total: int) -> Results:
    tqdm = need("tqdm")
    tqdm.tqdm.monitor_interval = 0  # its thread would be seen by the process's CPU clock
    layout = "{percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}"
    with tqdm.tqdm(total=total, bar_format=layout, disable=None) as bar:
        started = False

        def progress(name: str) -> None:
            nonlocal started
            bar.update(int(started))
            bar.set_description_str(name)
            started = True

        results = run(benchmarks, options, progress)
        if not results.header.get("interrupted"):
            bar.update(total - bar.n)
    return results


def _compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m genperf bench compare",
        description="Compare two result files by CPU time (one CPU thread) or median time (otherwise).",
    )
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.add_argument("--fail-over", type=_percent, default="5%", metavar="P%", help="default: 5%%")
    given = parser.parse_args(arguments)
    before, after = Results.load(given.before), Results.load(given.after)
    differences = compare(before, after, given.fail_over)
    if not differences:
        raise ValueError(f"{given.before} and {given.after} have no measurement in common")
    print(differences_table(differences))
    if before.header["device_name"] != after.header["device_name"]:
        print(f"warning: {before.header['device_name']} against {after.header['device_name']}")
    lost = len({row.key for row in before.rows} - {row.key for row in after.rows})
    if lost:
        print(f"{lost} measurements of {given.before} are not in {given.after}")
    regressed = sum(difference.regressed for difference in differences)
    print(f"{regressed} of {len(differences)} regressed by more than {given.fail_over:.3g}".rstrip())
    return 1 if regressed else 0


def _report(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m genperf bench report",
        description="Make a markdown table and a chart from a result file.",
    )
    parser.add_argument("results", metavar="FILE.json")
    parser.add_argument(
        "--markdown",
        metavar="OUT.md",
        help="a new file, or one whose region between <!-- bench:begin --> and <!-- bench:end --> to replace",
    )
    parser.add_argument("--region", metavar="NAME", default="", help="of <!-- bench:begin NAME -->")
    parser.add_argument("--chart", metavar="OUT.svg", help="writes OUT.svg and OUT.png")
    parser.add_argument("--dtype", metavar="FILTER", help="dtypes to show, such as 'float32'")
    parser.add_argument("--mode", metavar="FILTER", help="modes to show, such as 'fwd+bwd'")
    given = parser.parse_args(arguments)
    results = Results.load(given.results)
    results.rows = [
        row for row in results.rows if matches(row.dtype, given.dtype) and matches(row.mode, given.mode)
    ]
    if given.markdown:
        write_markdown(results, given.markdown, given.region)
    written: list[Any] = [given.markdown] if given.markdown else []
    if given.chart:
        written += write_chart(results, given.chart)
    if written:
        print("wrote", ", ".join(str(Path(path)) for path in written))
    else:
        print(markdown(results))
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _positives(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part) for part in text.split(",")))


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a percentage such as 5%, got {text!r}") from None
    if not text.endswith("%") or value < 0:
        raise argparse.ArgumentTypeError(f"expected a percentage such as 5%, got {text!r}")
    return value / 100
