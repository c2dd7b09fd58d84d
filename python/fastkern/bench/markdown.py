# SPDX-License-Identifier: Apache-2.0
"""The benchmark page of the documentation, written between markers so that words around them stay."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastkern.bench.results import Results
from fastkern.bench.tables import Table, all_tables

TITLE = "# Benchmarks\n\nTables between markers are written by `python -m fastkern.bench --markdown FILE`.\n"


def markers(op: str, device: str) -> tuple[str, str]:
    """The comments around an operator's block; a run replaces only the blocks of what it measured, on its device."""
    return f"<!-- fastkern-bench: {op} on {device} -->", f"<!-- /fastkern-bench: {op} on {device} -->"


def in_words(environment: dict[str, Any], ceiling_gbps: float) -> str:
    """Where and when a table was measured."""
    date = environment["date"][:10]
    cuda = environment["device_type"] == "cuda"
    where = (
        f"one {environment['device']}" if cuda else f"{environment['device']}, {environment['torch_threads']} threads"
    )
    driver = f"driver {environment['driver']}, " if cuda and environment["driver"] else ""
    versions = {"torch": environment["torch"], **environment["packages"], **environment["peers"]}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    words = (
        f"Measured {date} on {where} ({driver}{packages}) with fastkern {environment['fastkern']}, "
        f"commit {environment['commit']}. Copy bandwidth in the same run: {ceiling_gbps:.0f} GB/s."
    )
    return words + (" Quick run: few repetitions, small sizes only." if environment["options"]["quick"] else "")


def table_text(table: Table, said: Collection[str] = ()) -> str:
    """Draw a table as Markdown, without the notes already said."""
    lines = [f"**{table.title}**", ""]
    if table.columns:
        lines.append(f"| {' | '.join(table.columns)} |")
        lines.append(f"|---|{'---:|' * (len(table.columns) - 1)}")
        for row, bold in zip(table.rows, table.best or [None] * len(table.rows), strict=True):
            cells = (f"**{c}**" if i == bold else _escape(c) for i, c in enumerate(row))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [_escape(note) + "  " for note in table.notes if note not in said]
    return "\n".join(lines).rstrip()


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def block(results: Results, op: str) -> str:
    """Everything between an operator's markers, markers included."""
    environment = results.environment
    begin, end = markers(op, environment["device_type"])
    device = "GPU" if environment["device_type"] == "cuda" else "CPU"
    parts = [f"### `{op}` on {device}", in_words(environment, results.ceiling.gbps)]
    said: set[str] = set()
    for table in all_tables(results, op):
        parts.append(table_text(table, said))
        said.update(table.notes)
    return "\n\n".join([begin, *parts, end])


def update(path: Path, results: Results) -> None:
    """Write the measured operators' blocks into ``path``: in place, else under their family's heading."""
    text = path.read_text(encoding="utf-8") if path.exists() else TITLE
    families = {r.op: r.family for r in results.records if r.us is not None}
    for op, family in families.items():
        text = _put(text, op, family, block(results, op), results.environment["device_type"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _put(text: str, op: str, family: str, new: str, device: str) -> str:
    begin, end = markers(op, device)
    if begin in text and end in text[text.index(begin) :]:
        start = text.index(begin)
        return text[:start] + new + text[text.index(end, start) + len(end) :]
    heading = re.search(rf"^## {re.escape(family)}$", text, re.MULTILINE)
    if heading is None:
        return f"{text.rstrip()}\n\n## {family}\n\n{new}\n"
    following = re.search(r"^## ", text[heading.end() :], re.MULTILINE)
    cut = heading.end() + following.start() if following else len(text)
    rest = text[cut:]
    return f"{text[:cut].rstrip()}\n\n{new}\n" + (f"\n{rest}" if rest else "")
