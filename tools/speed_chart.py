# SPDX-License-Identifier: Apache-2.0
"""Draws docs/speed.svg, the chart of README.md, from the tables of docs/benchmarks.md.

python tools/speed_chart.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "docs" / "benchmarks.md"
CHART = ROOT / "docs" / "speed.svg"

# One size of each operator: the square one of the norms and of softmax, a large vocabulary.
SIZES = {
    "rms_norm": "8192x8192",
    "layer_norm": "8192x8192",
    "add_rms_norm": "8192x8192",
    "softmax": "8192x8192",
    "cross_entropy": "4096x128256",
}
# Bars: the columns that one stands for, of which it is the fastest; its colour.
BARS = {
    "torch": (("torch",), "#a9b8cc"),
    "torch.compile": (("torch.compile",), "#5c7da8"),
    "Liger or quack, the faster": (("liger", "quack"), "#e5a823"),
    "fastkern": (("fastkern",), "#d1495b"),
}

WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 860, 150, 60, 64, 13, 16


def section(op: str) -> str:
    """What the benchmark page says of an operator on a GPU."""
    found = re.search(
        rf"<!-- fastkern-bench: {op} on cuda -->(.*?)<!-- /", TABLES.read_text(encoding="utf-8"), re.DOTALL
    )
    if found is None:
        raise SystemExit(f"{TABLES.name} has no table of {op} on a GPU")
    return found[1]


def times(op: str, direction: str) -> dict[str, float]:
    """Microseconds of each column for the size of the chart; what has no figure is left out."""
    table = section(op).partition(f"**{op} {direction}, bfloat16: microseconds**\n\n")[2].partition("\n\n")[0]
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    row = next(row for row in rows if row[0] == SIZES[op])
    figures = {name: re.match(r"[\d.]+", cell) for name, cell in zip(rows[0], row, strict=True)}
    return {name: float(figure[0]) for name, figure in figures.items() if figure}


def speeds(op: str) -> dict[str, float]:
    """Forward and backward together, in units of torch's speed."""
    forward, backward = times(op, "forward"), times(op, "backward")
    total = {name: forward[name] + backward[name] for name in forward if name in backward}
    best = {bar: min((total[c] for c in columns if c in total), default=None) for bar, (columns, _) in BARS.items()}
    return {bar: total["torch"] / time for bar, time in best.items() if time is not None}


def chart() -> str:
    """The picture as SVG."""
    values = {op: speeds(op) for op in SIZES}
    scale = (WIDTH - LEFT - RIGHT) / max(max(bars.values()) for bars in values.values())
    height = TOP + sum(len(bars) * BAR + GAP for bars in values.values()) + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" '
        'font-size="12">',
        "<title>Speed of forward and backward, bfloat16, in units of PyTorch's</title>",
        "<style>text { fill: #24292f } .small { fill: #6e7781 } @media (prefers-color-scheme: dark) "
        "{ text { fill: #e6edf3 } .small { fill: #8d96a0 } }</style>",
        f'<text x="{LEFT}" y="18" font-size="15" font-weight="600">Speed of forward and backward, PyTorch = 1</text>',
    ]
    x = LEFT
    for name, (_, colour) in BARS.items():
        out.append(f'<rect x="{x}" y="33" width="11" height="11" rx="2" fill="{colour}"/>')
        out.append(f'<text x="{x + 16}" y="43">{name}</text>')
        x += 40 + 7 * len(name)
    y = TOP
    for op, bars in values.items():
        middle = y + len(bars) * BAR / 2
        out.append(f'<text x="{LEFT - 10}" y="{middle:.0f}" text-anchor="end" font-weight="600">{op}</text>')
        size = SIZES[op].replace("x", " x ")
        out.append(f'<text class="small" x="{LEFT - 10}" y="{middle + 14:.0f}" text-anchor="end">{size}</text>')
        for name, value in bars.items():
            colour = BARS[name][1]
            out.append(
                f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR - 2}" rx="2" fill="{colour}"/>'
            )
            weight = ' font-weight="600"' if name == "fastkern" else ""
            out.append(
                f'<text x="{LEFT + value * scale + 5:.1f}" y="{y + 10}" font-size="11"{weight}>{value:.1f}</text>'
            )
            y += BAR
        y += GAP
    out.append(f'<text class="small" x="{LEFT}" y="{y + 12}">One NVIDIA H200, bfloat16, from docs/benchmarks.md</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    CHART.write_text(chart(), encoding="utf-8")
