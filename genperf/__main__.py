"""``python -m genperf``: what is built and usable here. ``python -m genperf bench``: what it gains here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "bench":
        from .bench.cli import main as bench

        return bench(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m genperf",
        description="Without a command: versions, what is built, what is usable, and why not.",
    )
    parser.add_argument("command", nargs="?", choices=("bench",), help="measure (bench --help tells more)")
    parser.parse_args(arguments)

    from ._backend import doctor

    print(doctor())
    return 0


if __name__ == "__main__":
    sys.exit(main())
