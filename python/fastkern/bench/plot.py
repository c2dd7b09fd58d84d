# SPDX-License-Identifier: Apache-2.0
"""Pictures: speed against size for every provider, with the ceiling that the same run measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastkern.bench.cases import BASELINE, COMPILED, OURS
from fastkern.bench.results import Results, Row, column_order, groups
from fastkern.bench.svg import ceiling_of, rate
from fastkern.bench.tables import compute_bound

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Distinguishable by people with colour-blindness, and by marker in print.
STYLES = {OURS: ("#d1495b", "o"), BASELINE: ("#5c677d", "s"), COMPILED: ("#2e8b9a", "^")}
PEER_STYLES = (
    ("#e5a823", "D"),
    ("#5b4b9a", "v"),
    ("#6aa84f", "P"),
    ("#a0674b", "X"),
    ("#2f4b7c", "<"),
    ("#888888", ">"),
)


def write_plots(directory: Path, results: Results) -> list[Path]:
    """Write a PNG and an SVG per operator, direction and dtype; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "fastkern", "svg.fonttype": "none", "font.size": 10})
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for (op, dtype, direction), rows in groups(results.records).items():
        if any(r.us for row in rows.values() for r in row.values()):
            written += _write(directory / f"{op}_{direction}_{dtype}", f"{op} {direction}, {dtype}", rows, results)
    return written


def _write(stem: Path, title: str, rows: dict[str, Row], results: Results) -> list[Path]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(max(6.4, 1.5 + 0.95 * len(rows)), 4.4), layout="constrained")
    computes = compute_bound(rows)
    handles = _lines(axes, rows, computes)
    name, ceiling = ceiling_of(rows, results, computes)
    if ceiling:
        dashes = (0, (4, 3))
        handles.append(axes.axhline(ceiling, color="#333333", linewidth=1, linestyle=dashes, label=name, zorder=1))
    axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
    axes.text(
        1, 1.02, results.environment["device"], transform=axes.transAxes, ha="right", va="bottom", color="#666666"
    )
    axes.set_ylabel("TFLOP/s" if computes else "GB/s")
    axes.set_ylim(bottom=0)
    dims = next(iter(next(iter(rows.values())).values())).dims
    axes.set_xlabel(f"size ({' x '.join(dims)})")
    axes.set_xticks(range(len(rows)), [size.replace("x", " x\n") for size in rows], fontsize=9)
    axes.margins(x=0.04)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    columns = min(len(handles), max(4, len(rows) - 1))  # as wide as the chart
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(files[0], dpi=160)
    figure.savefig(files[1], metadata={"Date": None})
    plt.close(figure)
    return files


def _lines(axes: Axes, rows: dict[str, Row], computes: bool) -> list[Line2D]:
    peer_styles = iter(PEER_STYLES * 4)
    drawn = []
    for rank, name in enumerate(column_order(name for row in rows.values() for name in row)):
        colour, marker = STYLES.get(name) or next(peer_styles)
        found = [rate(row.get(name), computes) for row in rows.values()]
        drawn += axes.plot(
            range(len(rows)),
            [float("nan") if y is None else y for y in found],
            color=colour,
            marker=marker,
            markersize=6 if name == OURS else 5,
            linewidth=2.6 if name == OURS else 1.4,
            label=name,
            zorder=3 - 0.01 * rank,
        )
    return drawn
