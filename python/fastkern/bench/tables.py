# SPDX-License-Identifier: Apache-2.0
"""What is read in the results: tables of strings, without a word on how they are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastkern.bench.cases import OURS
from fastkern.bench.results import BACKWARD, FORWARD, Record, Results, Row, column_order, groups, speedup
from fastkern.bench.timing import MATMUL, METHODS, TIMER

NONE = "-"
SHORT = {FORWARD: "fwd", BACKWARD: "bwd"}
INACCURATE, OTHER_METHOD = "!", "*"
SHARE = "% ceiling: of the copy bandwidth or of torch's matrix product in this run, whichever bounds the job"


@dataclass
class Table:
    """A table of strings. The first column names the row; ``best`` gives each row's column to be set in bold."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    best: list[int | None] = field(default_factory=list)


def microseconds(us: float | None) -> str:
    """Three digits or so."""
    if us is None:
        return NONE
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def mebibytes(size: int | None) -> str:
    """A size in MiB."""
    return NONE if size is None else f"{size / 2**20:.2f}" if size < 2**24 else f"{size / 2**20:.1f}"


def bandwidth(gbps: float | None) -> str:
    """GB/s."""
    return NONE if gbps is None else f"{gbps:.0f}" if gbps >= 100 else f"{gbps:.1f}"


def teraflops(tflops: float | None) -> str:
    """TFLOP/s."""
    return NONE if tflops is None else f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.3g}"


def percent(value: float | None) -> str:
    """A percentage."""
    return NONE if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def against_best(row: Row) -> str:
    """``1.08x quack``: the best peer's time over ours."""
    found = speedup(row)
    return NONE if found is None else f"{found[0]:.2f}x {found[1]}"


def _row_method(row: Row) -> str | None:
    ours = row.get(OURS)
    if ours is not None and ours.method is not None:
        return ours.method
    return next((m for m, _ in Counter(r.method for r in row.values() if r.method).most_common(1)), None)


def _cell(record: Record | None, method: str | None) -> str:
    if record is None or record.us is None:
        return NONE
    marks = INACCURATE if record.correct is False else ""
    return microseconds(record.us) + marks + (OTHER_METHOD if record.method != method else "")


def latency(results: Results, op: str) -> list[Table]:
    """One table per dtype and direction."""
    return [_latency(op, dtype, direction, rows) for (name, dtype, direction), rows in _of(results, op)]


def _of(results: Results, op: str) -> list[tuple[tuple[str, str, str], dict[str, Row]]]:
    # An operator that failed its check has records, but nothing in them to tabulate.
    found = groups(r for r in results.records if r.op == op)
    return [(key, rows) for key, rows in found.items() if any(r.us for row in rows.values() for r in row.values())]


def _latency(op: str, dtype: str, direction: str, rows: dict[str, Row]) -> Table:
    providers = column_order(name for row in rows.values() for name in row)
    computes = compute_bound(rows)
    rates = ["GB/s", "TFLOP/s", "% ceiling"] if computes else ["GB/s", "% copy"]
    table = Table(f"{op} {direction}, {dtype}: microseconds", ["size", *providers, *rates, "vs best", "method"])
    for size, row in rows.items():
        method = _row_method(row)
        ours = row.get(OURS)
        cells = [_cell(row.get(name), method) for name in providers]
        table.rows.append([size, *cells, *_rates(ours, computes), against_best(row), method or NONE])
        times = [
            (r.us, i) for i, name in enumerate(providers, 1) if (r := row.get(name)) and r.us and r.method == method
        ]
        table.best.append(min(times)[1] if times else None)
    used = {r.method for row in rows.values() for r in row.values() if r.method}
    table.notes = [f"{name}: {text}." for name, text in METHODS.items() if name in used]
    share = f"TFLOP/s: flops of the job, over our time; {SHARE}" if computes else "% copy: of this run's copy bandwidth"
    table.notes.append(
        f"GB/s: bytes a perfect kernel moves, over our time; {share}; "
        "vs best: the fastest other column's time over ours."
    )
    if any(r.percent_of_ceiling and r.percent_of_ceiling > 105 for row in rows.values() for r in row.values()):
        table.notes.append("Above 100 %: operands that stay in a cache; the ceiling is that of memory.")
    marks = "".join(cell for row in table.rows for cell in row[1 : 1 + len(providers)])
    if INACCURATE in marks:
        table.notes.append(f"{INACCURATE} less accurate than the rule allows (still counted in vs best).")
    if OTHER_METHOD in marks:
        table.notes.append(f"{OTHER_METHOD} not capturable in a CUDA graph, timed by events.")
    return table


def compute_bound(rows: dict[str, Row]) -> bool:
    """Whether arithmetic bounds any of these sizes, so that TFLOP/s say more than GB/s."""
    return any(r.ceiling == MATMUL for row in rows.values() for r in row.values())


def _rates(ours: Record | None, computes: bool) -> list[str]:
    gbps = bandwidth(ours.gbps if ours else None)
    if not computes:
        return [gbps, percent(ours.percent_of_copy if ours else None)]
    return [gbps, teraflops(ours.tflops if ours else None), percent(ours.percent_of_ceiling if ours else None)]


def memory(results: Results, op: str) -> Table | None:
    """Peak memory of every provider at every size."""
    entries = [m for m in results.memory if m.op == op]
    if not entries:
        return None
    if all(m.forward_bytes is None for m in entries):
        return Table(f"{op}: memory", [], notes=["Peak memory: not available, torch reports it on CUDA alone."])
    providers = column_order(m.provider for m in entries)
    backward = any(m.forward_backward_bytes is not None for m in entries)
    both = " / forward + backward" if backward else ""
    table = Table(f"{op}: peak memory above inputs in MiB, forward{both}", ["size", *providers])
    rows: dict[str, dict[str, str]] = {}
    several = len({m.dtype for m in entries}) > 1
    for m in entries:
        cell = mebibytes(m.forward_bytes)
        if backward:
            cell += f" / {mebibytes(m.forward_backward_bytes)}"
        rows.setdefault(f"{m.size} {m.dtype}" if several else m.size, {})[m.provider] = cell
    table.rows = [[size, *(row.get(name, NONE) for name in providers)] for size, row in rows.items()]
    table.best = [None] * len(table.rows)
    table.notes = [
        "Peak above inputs: torch.cuda.max_memory_allocated during the call minus what was allocated before it "
        "(inputs, and the gradient given to backward); outputs and gradients count."
    ]
    return table


def host(results: Results, op: str) -> Table | None:
    """Host time of one small call."""
    entries = [h for h in results.host if h.op == op]
    if not entries:
        return None
    providers = column_order(h.provider for h in entries)
    table = Table(f"{op}: host microseconds of one small call", ["call", *providers])
    for dtype in dict.fromkeys(h.dtype for h in entries):
        found = {h.provider: h for h in entries if h.dtype == dtype}
        size = next(iter(found.values())).size
        for kind, attribute in (("no grad", "no_grad_us"), ("with grad", "with_grad_us")):
            times = [getattr(found.get(name), attribute, None) for name in providers]
            if all(t is None for t in times):
                continue
            table.rows.append([f"{size} {dtype} {kind}", *map(microseconds, times)])
            known = [(t, i) for i, t in enumerate(times, 1) if t is not None]
            table.best.append(min(known)[1] if known else None)
    waits = "the kernel included, as it runs on the host" if _on_cpu(results) else "none of them waited for"
    table.notes = [f"Wall time of many calls in a loop, {waits}; with grad: a forward that records the graph."]
    return table


def _on_cpu(results: Results) -> bool:
    return any(r.method == TIMER for r in results.records)


def summary(results: Results) -> Table:
    """One line per row of every latency table."""
    table = Table(
        "Summary", ["op", "dtype", "size", "dir", "us", "GB/s", "TFLOP/s", "% ceiling", "vs best"], notes=[f"{SHARE}."]
    )
    for (op, dtype, direction), rows in groups(results.records).items():
        for size, row in rows.items():
            ours = row.get(OURS)
            if ours is None:
                continue
            if ours.us is None:
                cells = ["FAILED" if ours.error else NONE, NONE, NONE, NONE, NONE]
            else:
                cells = [
                    microseconds(ours.us),
                    *_rates(ours, computes=True),
                    against_best(row),
                ]
            table.rows.append([op, dtype, size, SHORT[direction], *cells])
            table.best.append(None)
    return table


def all_tables(results: Results, op: str) -> Iterable[Table]:
    """An operator's tables in reading order."""
    yield from latency(results, op)
    for table in (memory(results, op), host(results, op)):
        if table is not None:
            yield table
