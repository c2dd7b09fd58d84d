# SPDX-License-Identifier: Apache-2.0
"""The document that a benchmark run makes: self-describing, one flat record per measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from fastkern.bench.cases import BASELINE, OURS
from fastkern.bench.timing import Ceiling

SCHEMA = "fastkern-bench/1"
FORWARD, BACKWARD = "forward", "backward"


@dataclass
class Record:
    """Device time of one provider at one size, in one direction. ``us`` is None where it could not be measured."""

    op: str
    family: str
    dims: dict[str, int]
    size: str
    dtype: str
    direction: str
    provider: str
    bytes: int
    flops: int
    us: float | None = None
    gbps: float | None = None
    percent_of_copy: float | None = None
    tflops: float | None = None
    ceiling: str | None = None  # what bounds the job: "copy" or "matmul"
    percent_of_ceiling: float | None = None
    method: str | None = None
    correct: bool | None = None
    error: str | None = None

    def timed(self, us: float, method: str, ceiling: Ceiling) -> None:
        """Enter a measurement and what follows from it."""
        self.us, self.method = us, method
        self.gbps = self.bytes / us / 1e3
        self.percent_of_copy = 100 * self.gbps / ceiling.gbps
        self.tflops = self.flops / us / 1e6
        self.ceiling, floor = ceiling.floor(self.bytes, self.flops, self.dtype)
        self.percent_of_ceiling = 100 * floor / us


@dataclass
class MemoryRecord:
    """Peak bytes above the inputs; None where it could not be measured."""

    op: str
    size: str
    dtype: str
    provider: str
    forward_bytes: int | None = None
    forward_backward_bytes: int | None = None


@dataclass
class HostRecord:
    """Host microseconds of one call on the smallest size, without gradients and recording them."""

    op: str
    size: str
    dtype: str
    provider: str
    no_grad_us: float | None = None
    with_grad_us: float | None = None


@dataclass
class Results:
    """One run."""

    environment: dict[str, Any]
    ceiling: Ceiling
    records: list[Record] = field(default_factory=list)
    memory: list[MemoryRecord] = field(default_factory=list)
    host: list[HostRecord] = field(default_factory=list)
    selected: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    not_installed: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "ceiling": {
                "copy_gbps": self.ceiling.gbps,
                "copy_bytes": self.ceiling.bytes,
                "matmul_tflops": dict(self.ceiling.tflops),
            },
            "selected": self.selected,
            "skipped": self.skipped,
            "not_installed": self.not_installed,
            "failures": self.failures,
            "records": [asdict(r) for r in self.records],
            "memory": [asdict(r) for r in self.memory],
            "host": [asdict(r) for r in self.host],
        }


Row = dict[str, Record]  # provider -> record, of one size


def groups(records: Iterable[Record]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Records by (op, dtype, direction), then by size, then by provider, each in the order measured."""
    grouped: dict[tuple[str, str, str], dict[str, Row]] = {}
    for r in records:
        grouped.setdefault((r.op, r.dtype, r.direction), {}).setdefault(r.size, {})[r.provider] = r
    return grouped


def best_peer(row: Row) -> Record | None:
    """The fastest provider that is not ours; less accurate ones count as well, so that no comparison flatters us.

    A row is compared within one method, the one ours was timed with, where a peer has it.
    """
    ours = row.get(OURS)
    timed = [r for r in row.values() if r.provider != OURS and r.us is not None]
    alike = [r for r in timed if ours is not None and r.method == ours.method]
    return min(alike or timed, key=lambda r: r.us or 0.0, default=None)


def speedup(row: Row) -> tuple[float, str] | None:
    """How many times the best peer's time ours is shorter by, and that peer."""
    ours, best = row.get(OURS), best_peer(row)
    if ours is None or ours.us is None or best is None or best.us is None:
        return None
    return best.us / ours.us, best.provider


def column_order(providers: Iterable[str]) -> list[str]:
    """Ours first, torch second, the rest as they come."""
    names = list(dict.fromkeys(providers))
    return [n for n in (OURS, BASELINE) if n in names] + [n for n in names if n not in (OURS, BASELINE)]
