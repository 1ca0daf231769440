"""The tables and charts of the documentation, made from a result file."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from .results import BASELINES, Results, Row, speedup
from .table import markdown, measures_overhead, need, ratio, title

# Okabe and Ito's palette, which stays apart for colour-blind readers.
_COLOURS = {
    "genperf/cpu": "#0072B2",
    "genperf/triton": "#56B4E9",
    "genperf/cuda": "#009E73",
    "compile": "#E69F00",
    "cached": "#E69F00",
}
_PEER_COLOURS = ("#CC79A7", "#D55E00", "#F0E442")
_NOT_CHARTED = (*BASELINES, "native")
_GAP = 0.55  # between cases, in bars


def markers(region: str = "") -> tuple[str, str]:
    """The lines before and after a generated table; a file can have several, by name."""
    name = f" {region}" if region else ""
    return f"<!-- bench:begin{name} -->", f"<!-- bench:end{name} -->"


def write_markdown(results: Results, path: str | Path, region: str = "") -> None:
    """Writes the table between the markers of the file at ``path``, or a new file that is just that.

    Raises ValueError for a file that exists and does not have the two markers once, in order.
    """
    path = Path(path)
    begin, end = markers(region)
    table = f"{begin}\n{markdown(results)}\n{end}"
    if not path.exists():
        path.write_text(table + "\n")
        return
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"{path}: expected one {begin} and, after it, one {end}")
    path.write_text(text[: text.index(begin)] + table + text[text.index(end) + len(end) :])


def chart_rows(results: Results) -> dict[str, dict[str, dict[str, Row]]]:
    """op -> case label -> provider -> row, with each case in the fullest mode it was measured in."""
    order = ("fwd", "bwd", "fwd+bwd", "sample", "train_step")
    best: dict[tuple[str, str, str], str] = {}
    for op, shape, dtype, mode in results.cases():
        known = best.get((op, shape, dtype), mode)
        best[op, shape, dtype] = max(known, mode, key=order.index)
    panels: dict[str, dict[str, dict[str, Row]]] = {}
    for (op, shape, dtype, mode), rows in results.cases().items():
        shown = {row.provider: row for row in rows if row.provider not in _NOT_CHARTED}
        with_base = any(row.provider in BASELINES for row in rows)
        if best[op, shape, dtype] == mode and shown and with_base and not measures_overhead(rows):
            label = shape.replace("x", "\u00d7") + f"\n{dtype}, {mode}"
            panels.setdefault(op, {})[label] = shown
    return panels


def write_chart(results: Results, path: str | Path) -> list[Path]:
    """Draws speed-ups, one panel an op, as an SVG and a PNG file; returns their paths."""
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    panels = chart_rows(results)
    if not panels:
        raise ValueError("no case has both a baseline and another provider: nothing to chart")
    colours = _colours(results)
    bars = {op: sum(len(rows) for rows in cases.values()) + _GAP * len(cases) for op, cases in panels.items()}
    style = {"font.size": 10, "font.family": "sans-serif", "svg.fonttype": "path", "svg.hashsalt": "genperf"}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            len(panels),
            figsize=(9, 1.9 + sum(0.24 * count + 0.75 for count in bars.values())),
            height_ratios=list(bars.values()),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (op, cases) in zip(axes[:, 0], panels.items(), strict=True):
            _draw(axis, op, cases, results, colours)
        _scale(axes[:, 0], results, panels)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
        figure.legend(handles, list(colours), loc="outside upper left", ncols=len(colours), frameon=False)
        axes[-1, 0].set_xlabel(f"times as fast as {_baseline(results)}")
        figure.supxlabel(_caption(results), fontsize=8, color="#555555", x=0.01, ha="left")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = [path.with_suffix(".svg"), path.with_suffix(".png")]
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=160)
        pyplot.close(figure)
    return written


def _baseline(results: Results) -> str:
    naive = any(row.provider == "naive" for row in results.rows)
    return "a loop that calls the model once a pixel" if naive else "eager torch"


def _caption(results: Results) -> str:
    return "\n".join(textwrap.wrap(title(results), 120))


def _colours(results: Results) -> dict[str, str]:
    """Provider -> colour, in the order of the bars."""
    providers = dict.fromkeys(row.provider for row in results.rows if row.provider not in _NOT_CHARTED)
    peers = iter(_PEER_COLOURS * len(providers))
    ordered = [name for name in _COLOURS if name in providers]
    ordered += sorted(name for name in providers if name not in _COLOURS)
    return {name: _COLOURS.get(name) or next(peers) for name in ordered}


def _draw(
    axis: Any, op: str, cases: dict[str, dict[str, Row]], results: Results, colours: dict[str, str]
) -> None:
    grouped = results.cases()
    ticks, position = [], 0.0
    for rows in cases.values():
        shown = [rows[name] for name in colours if name in rows]
        ticks.append(position + (len(shown) - 1) / 2)
        for row in shown:
            gain = speedup(row, grouped[row.case])
            if gain is None:
                axis.text(1, position, "  check failed", va="center", fontsize=9, color="#B00020")
            else:
                axis.barh(position, gain - 1, left=1, height=0.86, color=colours[row.provider])
                text, side = ratio(gain).replace("x", "\u00d7"), "left" if gain >= 1 else "right"
                axis.text(gain, position, f" {text} ", va="center", ha=side, fontsize=9)
            position += 1
        position += _GAP
    axis.set_yticks(ticks, list(cases))
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(position - _GAP - 0.3, -0.7)
    axis.set_title(op, loc="left", fontweight="bold", fontsize=11)
    axis.axvline(1, color="#444444", linewidth=1)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _scale(axes: Any, results: Results, panels: dict[str, dict[str, dict[str, Row]]]) -> None:
    """One logarithmic axis for all panels, so that a loss is as long as a gain."""
    ticker = need("matplotlib.ticker")
    grouped = results.cases()
    gains = [1.0]
    for cases in panels.values():
        for rows in cases.values():
            gains += [speedup(row, grouped[row.case]) or 1.0 for row in rows.values()]
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlim(min(gains) / 1.4, max(gains) * 1.4)
        axis.xaxis.set_major_locator(ticker.LogLocator(10, subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}\u00d7"))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
