"""Accelerates models of public libraries, checks them, and shows what was gained.

    python examples/demo [PART ...] [--output FOLDER]

Every module beside this one whose name has no leading underscore is a part, with a function
``run(output: Path) -> Outcome``. The exit status is 1 if a check of any part fails.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
import time
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent


def main() -> int:
    known = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    parser = argparse.ArgumentParser(
        prog="python examples/demo", description="What genperf gains, on real models."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(known)} (default: all)")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="where to write the pictures")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(known):
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    warnings.filterwarnings("ignore", module="pythae|diffusers|pydantic")
    warnings.filterwarnings("ignore", message="torch.lu is deprecated")
    given.output.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    torch.set_num_threads(1)  # the models are small, and the timings do not suffer from what else runs here
    conditions = (
        f"genperf {importlib.metadata.version('genperf')}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, float32, one thread; medians of CPU time, runs interleaved"
    )
    print(conditions)
    outcomes = []
    for name in given.parts or known:
        module = importlib.import_module(name)
        print(f"\n== {module.TITLE}\n")
        torch.manual_seed(0)
        outcomes.append(module.run(given.output))

    from _common import race_header, save_chart

    chart = given.output / "speedups.png"
    save_chart(chart, outcomes, conditions)
    print("\n== What was gained\n")
    race_header()
    for outcome in outcomes:
        print(outcome.title)
        for timing in outcome.timings:
            print(timing.line())
    print(
        "\nSampling is a small part of a model: next to convolutions or large matrix products the whole gains"
    )
    print(
        "little. With few latent variables the fixed cost of a call is what counts, and own noise can lose."
    )
    print("\nPictures:")
    for path in (*(outcome.picture for outcome in outcomes), chart):
        print(f"  {path}")
    problems = [f"{outcome.title}: {problem}" for outcome in outcomes for problem in outcome.problems]
    for problem in problems:
        print(f"FAILED: {problem}")
    print(f"\n{'FAILED' if problems else 'All checks passed'} in {time.perf_counter() - start:.0f} s.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
