# SPDX-License-Identifier: Apache-2.0
"""Charts of the HTML report: plain SVG whose colours are the page's, so that they follow light and dark."""

from __future__ import annotations

import math
from html import escape

from fastkern.bench.cases import OURS
from fastkern.bench.results import Record, Results, Row, column_order
from fastkern.bench.tables import bandwidth, compute_bound, microseconds, teraflops

SERIES = 10  # colours that the page's style sheet has
MARKS = ("circle", "square", "triangle", "diamond")

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 56, 20, 28, 46, 240
_NARROWEST, _WIDEST, _WIDTH = 92, 180, 460  # from one size to the next; of few sizes together


def rate(record: Record | None, computes: bool) -> float | None:
    """What is drawn: TFLOP/s or GB/s."""
    if record is None or record.us is None:
        return None
    return record.tflops if computes else record.gbps


def ceiling_of(rows: dict[str, Row], results: Results, computes: bool) -> tuple[str, float | None]:
    """The dashed line: what it is called, and its height."""
    dtype = next(r.dtype for row in rows.values() for r in row.values())
    if computes:
        tflops = results.ceiling.tflops.get(dtype)
        return f"matrix product, {teraflops(tflops)} TFLOP/s", tflops
    return f"copy, {bandwidth(results.ceiling.gbps)} GB/s", results.ceiling.gbps


def ticks(top: float) -> list[float]:
    """Four to eight round numbers from 0 to beyond ``top``."""
    raw = max(top, 1e-9) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def series(rows: dict[str, Row]) -> dict[str, int]:
    """The colour and mark of each column, the same in every chart of an operator."""
    return {name: i for i, name in enumerate(column_order(name for row in rows.values() for name in row))}


def mark(kind: int, x: float, y: float, title: str) -> str:
    """A point, whose value is told where the pointer rests."""
    colour, shape = f"s{kind % SERIES}", MARKS[kind % len(MARKS)]
    if shape == "circle":
        drawn = f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
        return f"{drawn}<title>{escape(title)}</title></circle>"
    corners = {
        "square": ((-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)),
        "triangle": ((0, -4.5), (4.3, 3.4), (-4.3, 3.4)),
        "diamond": ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="{colour}" points="{points}"><title>{escape(title)}</title></polygon>'


def chart(title: str, rows: dict[str, Row], results: Results) -> str:
    """Speed against size, one line a column, the ceiling of the run dashed."""
    computes = compute_bound(rows)
    unit = "TFLOP/s" if computes else "GB/s"
    ceiling = ceiling_of(rows, results, computes)[1]
    values = {provider: [rate(row.get(provider), computes) for row in rows.values()] for provider in series(rows)}
    top = max([v for line in values.values() for v in line if v is not None] + [ceiling or 0.0])
    scale = ticks(top)
    step = min(max(_NARROWEST, _WIDTH / len(rows)), _WIDEST)
    width = _LEFT + _RIGHT + round(step * len(rows))

    def y_of(value: float) -> float:
        return _TOP + _HEIGHT * (1 - value / scale[-1])

    xs = [_LEFT + step * (i + 0.5) for i in range(len(rows))]
    parts = [
        f'<svg viewBox="0 0 {width} {_TOP + _HEIGHT + _BOTTOM}" width="{width}" role="img" '
        f'aria-label="{escape(title)}">',
        f'<text class="unit" x="{_LEFT - 8}" y="13" text-anchor="end">{unit}</text>',
    ]
    for value in scale:
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for x, size in zip(xs, rows, strict=True):
        parts += _size_label(x, size)
    if ceiling:
        y = y_of(ceiling)
        parts.append(f'<line class="ceiling" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    drawn = sorted(series(rows).items(), key=lambda item: item[0] == OURS)  # ours last, on top
    for provider, kind in drawn:
        points = [(x, v, size) for x, v, size in zip(xs, values[provider], rows, strict=True) if v is not None]
        path = " ".join(f"{x:.1f},{y_of(v):.1f}" for x, v, _ in points)
        weight = " ours" if provider == OURS else ""
        parts.append(f'<polyline class="s{kind % SERIES}{weight}" points="{path}"/>')
        for x, v, size in points:
            us = microseconds(rows[size][provider].us)
            parts.append(mark(kind, x, y_of(v), f"{provider}, {size}: {us} us, {v:.4g} {unit}"))
    return "\n".join([*parts, "</svg>"])


def _size_label(x: float, size: str) -> list[str]:
    """``2x320x64x64`` in two lines of at most half of it."""
    numbers = size.split("x")
    half = math.ceil(len(numbers) / 2) if len(size) > 9 else len(numbers)
    lines = ["&times;".join(numbers[:half]) + ("&times;" if numbers[half:] else ""), "&times;".join(numbers[half:])]
    return [
        f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 18 + 14 * i}" text-anchor="middle">{line}</text>'
        for i, line in enumerate(lines)
        if line
    ]


def legend(rows: dict[str, Row], results: Results) -> str:
    """The marks and their names; the dashed line's."""
    items = [
        f'<span><svg width="26" height="12" viewBox="0 0 26 12"><line class="s{kind % SERIES}" x1="1" x2="25" y1="6" '
        f'y2="6"/>{mark(kind, 13, 6, name)}</svg>{escape(name)}</span>'
        for name, kind in series(rows).items()
    ]
    computes = compute_bound(rows)
    name, ceiling = ceiling_of(rows, results, computes)
    if ceiling:
        line = (
            '<svg width="26" height="12" viewBox="0 0 26 12"><line class="ceiling" x1="1" x2="25" y1="6" y2="6"/></svg>'
        )
        items.append(f"<span>{line}{name}</span>")
    return f'<p class="legend">{"".join(items)}</p>'
