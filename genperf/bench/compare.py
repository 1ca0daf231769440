"""Compares two result files, to tell whether a change made something slower or wrong."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Results, Row
from .table import need, seconds


@dataclass(frozen=True)
class Difference:
    """One measurement in both files; ``change`` is the new time over the old one, less one."""

    old: Row
    new: Row
    change: float | None
    verdict: str

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "check failed")


def compare(old: Results, new: Results, fail_over: float) -> list[Difference]:
    """The measurements that both files hold, in the new file's order.

    A measurement regressed where its time (``Row.seconds``) grew by more than the fraction ``fail_over``,
    or where it passed its check before and does not now.
    """
    before = {row.key: row for row in old.rows}
    found = []
    for row in new.rows:
        if row.key not in before:
            continue
        other = before[row.key]
        change = row.seconds / other.seconds - 1 if row.seconds and other.seconds else None
        if not row.ok:
            verdict = "check failed" if other.ok else "failed before too"
        elif change is None:
            verdict = "-"
        elif change > fail_over:
            verdict = "slower"
        else:
            verdict = "faster" if change < -fail_over else "same"
        found.append(Difference(other, row, change, verdict))
    return found


def differences_table(differences: list[Difference]) -> str:
    lines = [
        [
            *row.new.case,
            row.new.provider,
            seconds(row.old.seconds),
            seconds(row.new.seconds),
            "-" if row.change is None else f"{row.change:+.1%}",
            row.verdict,
        ]
        for row in differences
    ]
    names = ["op", "shape", "dtype", "mode", "provider", "before", "after", "change", "verdict"]
    return str(need("tabulate").tabulate(lines, names, disable_numparse=True))
