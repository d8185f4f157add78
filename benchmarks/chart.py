"""The ratios of a run as one chart: how many times better than what, and where the target lies.

The axis is logarithmic, since twice as good and half as good are equally far from equal, and ends at 100 x; a bar
that would be longer says its number. Labels are text, so that a browser can search them.

The rule: rows that did not run are not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Missing
from benchmarks.report import Row

MET, MISSED, TOLD, INK, PALE = "#2a7f5f", "#c2452d", "#9aa5b1", "#1f2933", "#e4e7eb"
MOST = 100.0
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "shoal", "font.family": "sans-serif", "font.size": 8}


def write(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw the rows that have ratios, in the format that `path` ends with.

    Raises:
        Missing: matplotlib is not installed, or nothing ran.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise Missing("matplotlib is not installed") from None

    drawn = [row for row in sorted(rows, key=lambda row: row.claim) if row.ratio]
    # iperf3 runs in several ways; beside the judged one the others are for the table.
    if any(row.is_met is not None for row in drawn):
        drawn = [row for row in drawn if row.is_met is not None or not row.peer.startswith("iperf3")]
    if not drawn:
        raise Missing("no row has a ratio")
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.5 + 0.27 * len(drawn)), layout="constrained")
        _draw(figure.add_subplot(), drawn, title)
        # No date: the same figures give the same file.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axes: Any, rows: Sequence[Row], title: str) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, NullFormatter

    colours = {True: MET, False: MISSED, None: TOLD}
    for place, row in enumerate(rows):
        ratio = row.ratio or 1.0
        shown = min(ratio, MOST)
        axes.barh(place, shown - 1, left=1, color=colours[row.is_met], height=0.62)
        if row.target is not None:
            axes.plot([row.target] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=2)
        # Beside the bar, and beyond the mark where that lies on the same side.
        beyond = max(shown, row.target or 0) if ratio >= 1 else shown
        axes.annotate(
            f"{ratio:.2f} x" if ratio < 10 else f"{ratio:,.0f} x",
            (beyond, place),
            (5 if ratio >= 1 else -5, 0),
            textcoords="offset points",
            ha="left" if ratio >= 1 else "right",
            va="center",
            color=INK,
        )
        if place and row.claim != rows[place - 1].claim:
            axes.axhline(place - 0.5, color=PALE, linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row.claim}   {row.what}  |  {row.peer}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(min([*(row.ratio or 1.0 for row in rows), 0.5]) / 2.2, MOST * 2.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="right", color=INK)
    axes.set_xlabel("Shoal compared with the other: right of 1 x Shoal is better; the dark mark is the target")
    keys = [Patch(color=MET, label="met"), Patch(color=MISSED, label="missed"), Patch(color=TOLD, label="not judged")]
    axes.legend(handles=keys, loc="lower right", frameon=False)
