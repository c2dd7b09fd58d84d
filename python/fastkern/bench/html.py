# SPDX-License-Identifier: Apache-2.0
"""The report to look at: one HTML file that needs no other, light or dark as its reader's system is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from fastkern.bench.cases import OURS
from fastkern.bench.compare import Comparison
from fastkern.bench.results import Results, groups, speedup
from fastkern.bench.svg import chart, legend
from fastkern.bench.tables import Table, host, latency, memory, summary

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --page: #f6f7f9; --card: #fff; --line: #e0e4ea;
  --accent: #c8304a; --good: #1a7f4b; --bad: #c8304a; --tint: #fdf1f3;
  --c0: #d1344f; --c1: #5c677d; --c2: #1b8a9a; --c3: #d98f00; --c4: #6a50b8; --c5: #4e9a3a; --c6: #a0563b;
  --c7: #2f5fa8; --c8: #b04f9a; --c9: #7a7a1e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #98a3b3; --page: #12161d; --card: #1a2029;
  --line: #2e3744; --accent: #ff7088; --good: #58c98c; --bad: #ff7088; --tint: #2b1f27;
  --c0: #ff6b84; --c1: #aab4c4; --c2: #46c3d4; --c3: #f3b63c; --c4: #a893f0; --c5: #86cf70; --c6: #d6906f;
  --c7: #7ba7ee; --c8: #e38fce; --c9: #c5c55a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 27px; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 0 0 4px; font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
h3 { font-size: 15px; margin: 26px 0 6px; }
p { margin: 6px 0; } .soft, .note { color: var(--soft); } .note { font-size: 13px; margin: 4px 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 22px 0; }
.fact, section, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.fact { padding: 12px 16px; } .fact b { display: block; font-size: 21px; letter-spacing: -.01em; }
.fact span { color: var(--soft); font-size: 13px; }
section { padding: 22px 24px; margin: 18px 0; } details { padding: 10px 16px; margin: 12px 0; }
summary { cursor: pointer; }
nav { display: flex; flex-wrap: wrap; gap: 6px; margin: 14px 0; }
nav a { color: inherit; text-decoration: none; border: 1px solid var(--line); border-radius: 999px; padding: 2px 11px;
  background: var(--card); font-size: 13px; } nav a:hover { border-color: var(--accent); }
.scroll { overflow-x: auto; max-width: 100%; }
.pair { display: flex; flex-wrap: wrap; gap: 12px 36px; align-items: center; } .times { flex: 1 1 540px; min-width: 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 6px 0; }
th, td { padding: 5px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 2px; }
.ours { background: var(--tint); } .best { font-weight: 700; }
.failed { color: var(--bad); font-weight: 600; } .good { color: var(--good); }
svg { max-width: 100%; height: auto; overflow: visible; } svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .ceiling { stroke: var(--ink); stroke-dasharray: 5 4; }
svg polyline, svg line { fill: none; stroke-width: 1.8; } svg polyline.ours { stroke-width: 3; background: none; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; } .legend span { display: inline-flex;
  align-items: center; gap: 6px; }
@media print { body { background: #fff; } section, .fact { break-inside: avoid; } }
"""
_COLOURS = "\n".join(
    f"svg polyline.s{i}, svg line.s{i} {{ stroke: var(--c{i}); }} "
    f"svg circle.s{i}, svg polygon.s{i} {{ fill: var(--c{i}); }}"
    for i in range(10)
)


def table_html(table: Table) -> str:
    """A table with its notes; ours tinted, the fastest column of each row bold."""
    ours = table.columns.index(OURS) if OURS in table.columns else -1
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    lines = []
    for row, best in zip(table.rows, table.best or [None] * len(table.rows), strict=True):
        cells = []
        for i, cell in enumerate(row):
            failed = cell == "FAILED" or cell.endswith(("slower", "no longer measured"))
            marks = [word for word, so in (("ours", i == ours), ("best", i == best), ("failed", failed)) if so]
            attribute = f' class="{" ".join(marks)}"' if marks else ""
            cells.append(f"<td{attribute}>{escape(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (body if table.columns else "") + notes


def write(path: Path, results: Results, comparison: Comparison | None = None) -> None:
    """Write the report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results, comparison), encoding="utf-8")


def page(results: Results, comparison: Comparison | None = None) -> str:
    """The whole file."""
    device = escape(results.environment["device"])
    sections = [_operator(results, op) for op in results.selected]
    names = "".join(f'<a href="#{escape(op)}">{escape(op)}</a>' for op in results.selected)
    names += '<a href="#summary">summary</a>'
    overview = f"<section id='summary'><h2>Summary</h2>{table_html(summary(results))}</section>"
    compared = f"<section><h2>Comparison</h2>{table_html(comparison.table())}</section>" if comparison else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastkern benchmark: {device}</title><style>{STYLE}{_COLOURS}</style></head>
<body><main>
<h1>fastkern benchmark</h1>
<p class="soft">{_where(results.environment)}</p>
{_facts(results, comparison)}
{_failures(results)}
<nav>{names}</nav>
{compared}
{"".join(sections)}
{overview}
{_left_out(results)}
</main></body></html>
"""


def _where(environment: dict[str, Any]) -> str:
    versions = {"fastkern": f"{environment['fastkern']} (commit {environment['commit']})"}
    versions |= {"torch": environment["torch"], **environment["packages"], **environment["peers"]}
    if environment["driver"]:
        versions["driver"] = environment["driver"]
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    quick = " Quick run: small sizes, few repetitions." if environment["options"]["quick"] else ""
    return escape(f"{environment['device']}, {environment['date']}: {words}.{quick}")


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logs = [math.log(v) for v in values if v > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _facts(results: Results, comparison: Comparison | None) -> str:
    rows = [row for sizes in groups(results.records).values() for row in sizes.values()]
    found = [s[0] for row in rows if (s := speedup(row))]
    facts = [(f"{results.ceiling.gbps:.0f} GB/s", "copy bandwidth of this run")]
    facts += [
        (f"{rate:.3g} TFLOP/s", f"torch's matrix product, {name}") for name, rate in results.ceiling.tflops.items()
    ]
    if (mean := geometric_mean(found)) is not None:
        facts.append(
            (f"{mean:.2f}x", f"the fastest other column's time over ours, geometric mean of {len(found)} rows")
        )
    if comparison is not None:
        facts.append(
            (f"{len(comparison.slower)} slower", f"than {comparison.baseline} by > {comparison.threshold:g} %")
        )
    right = len(results.selected) - len({name.split()[0] for name in results.failures})
    facts.append((f"{right} of {len(results.selected)}", "operators correct and timed"))
    cards = "".join(f'<div class="fact"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in facts)
    return f'<div class="facts">{cards}</div>'


def _failures(results: Results) -> str:
    lines = "".join(f'<p class="failed">FAILED: {escape(op)}: {escape(t)}</p>' for op, t in results.failures.items())
    return f"<section>{lines}</section>" if lines else ""


def _operator(results: Results, op: str) -> str:
    found = groups(r for r in results.records if r.op == op)
    drawn = {
        key: rows for key, rows in found.items() if any(r.us is not None for row in rows.values() for r in row.values())
    }
    failed = {k: t for k, t in results.failures.items() if k.split()[0] == op}
    parts = [f"<h2>{escape(op)}</h2>"]
    parts += [f'<p class="failed">FAILED: {escape(k)}: {escape(t)}</p>' for k, t in failed.items()]
    said: set[str] = set()
    for ((_, dtype, direction), rows), table in zip(drawn.items(), latency(results, op), strict=True):
        dims = " x ".join(next(iter(next(iter(rows.values())).values())).dims)
        title = f"{direction}, {dtype}"
        parts.append(f'<h3>{escape(title)} <span class="soft">({escape(dims)})</span></h3>{legend(rows, results)}')
        drawing = f'<div class="scroll">{chart(f"{op} {title}", rows, results)}</div>'
        shown = f'<div class="times"><p class="note">Microseconds:</p>{table_html(_without(table, said))}</div>'
        parts.append(f'<div class="pair">{drawing}{shown}</div>')
        said.update(table.notes)
    for extra in (memory(results, op), host(results, op)):
        if extra is not None:
            name = extra.title.removeprefix(f"{op}: ")
            parts.append(f"<h3>{escape(name[:1].upper() + name[1:])}</h3>{table_html(extra)}")
    return f'<section id="{escape(op)}">{"".join(parts)}</section>'


def _without(table: Table, said: set[str]) -> Table:
    notes = [n for n in table.notes if n not in said]
    return Table(table.title, table.columns, table.rows, notes, table.best)


def _left_out(results: Results) -> str:
    lines = [f"{name}: {why}" for name, why in results.skipped.items()]
    lines += [f"{name}, not installed: {why}" for name, why in results.not_installed.items()]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>Left out, and why ({len(lines)})</summary><ul>{items}</ul></details>"
