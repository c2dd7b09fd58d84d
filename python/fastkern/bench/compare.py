# SPDX-License-Identifier: Apache-2.0
"""A run beside an earlier one: what became slower, what is no longer measured.

Times are compared relative to the ceiling that bounds the job, copy bandwidth or matrix product, each of its own run,
so that the clocks of the day matter less.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkern.bench.cases import OURS
from fastkern.bench.results import SCHEMA
from fastkern.bench.tables import Table, microseconds
from fastkern.bench.timing import MATMUL

Key = tuple[str, str, str, str]  # operator, dtype, size, direction


@dataclass(frozen=True)
class Change:
    """One of our operators at one size: then and now, and by how many percent it became slower (negative: faster)."""

    key: Key
    then_us: float
    now_us: float
    percent: float


@dataclass
class Comparison:
    """What two runs have in common. ``lost``: measured then, and tried in vain or left out now."""

    baseline: str
    threshold: float
    changes: list[Change] = field(default_factory=list)
    lost: list[Key] = field(default_factory=list)

    @property
    def slower(self) -> list[Change]:
        """By more than the threshold."""
        return [c for c in self.changes if c.percent > self.threshold]

    @property
    def faster(self) -> list[Change]:
        """By more than the threshold."""
        return [c for c in self.changes if c.percent < -self.threshold]

    @property
    def failed(self) -> bool:
        """Whether anything became slower or was lost, or nothing could be compared."""
        return bool(self.slower or self.lost or not self.changes)

    @property
    def verdict(self) -> str:
        """One sentence."""
        return (
            f"{len(self.changes)} measurements compared with {self.baseline}: {len(self.slower)} slower and "
            f"{len(self.faster)} faster by more than {self.threshold:g} %, {len(self.lost)} no longer measured"
        )

    def table(self) -> Table:
        """Everything beyond the threshold, the worst first."""
        table = Table(f"Against {self.baseline}", ["op", "dtype", "size", "direction", "then us", "now us", "change"])
        for c in sorted(self.slower + self.faster, key=lambda c: -c.percent):
            word = "slower" if c.percent > 0 else "faster"
            cells = [microseconds(c.then_us), microseconds(c.now_us), f"{abs(c.percent):.1f} % {word}"]
            table.rows.append([*c.key, *cells])
        table.rows += [[*key, "", "", "no longer measured"] for key in self.lost]
        table.notes = [f"{self.verdict}. Times relative to the ceiling of their own run."]
        table.best = [None] * len(table.rows)
        if not table.rows:
            table.columns = []
        return table


def load(path: Path) -> dict[str, Any]:
    """A document that ``--json`` wrote. Raises ValueError, naming the file, on anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: expected a document of schema {SCHEMA}, got {found!r}")
    return dict(document)


def _key(record: dict[str, Any]) -> Key:
    return record["op"], record["dtype"], record["size"], record["direction"]


def _ours(document: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {_key(r): r for r in document["records"] if r["provider"] == OURS and r["us"] is not None}


def _change(key: Key, old: dict[str, Any], then: dict[str, Any], new: dict[str, Any], now: dict[str, Any]) -> Change:
    """Percent, with each time in units of its own run's ceiling."""
    if then.get("ceiling") == now.get("ceiling") == MATMUL:
        before, after = (ceiling["matmul_tflops"][now["dtype"]] for ceiling in (old["ceiling"], new["ceiling"]))
    else:
        before, after = old["ceiling"]["copy_gbps"], new["ceiling"]["copy_gbps"]
    return Change(key, then["us"], now["us"], 100 * ((now["us"] * after) / (then["us"] * before) - 1))


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float, baseline: str, whole: bool) -> Comparison:
    """Compare two documents.

    Args:
        old: the stored document.
        new: that of this run.
        threshold: percent.
        baseline: what to call the old one.
        whole: whether the new run was to measure all of the old one; if not, only what it tried in vain is lost.
    """
    then, now = _ours(old), _ours(new)
    tried = {_key(r) for r in new["records"] if r["provider"] == OURS}
    comparison = Comparison(baseline, threshold)
    for key in sorted(then):
        if key in now:
            comparison.changes.append(_change(key, old, then[key], new, now[key]))
        elif whole or key in tried:
            comparison.lost.append(key)
    return comparison
