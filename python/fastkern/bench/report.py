# SPDX-License-Identifier: Apache-2.0
"""Results on the terminal and in files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from fastkern.bench.results import Results
from fastkern.bench.tables import Table, all_tables, summary

# Logs have no width of their own; tables must not be cut in them.
LOG_WIDTH = 180


def console() -> Console:
    """The terminal, or a wide plain page when the output is a file or a pipe."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=LOG_WIDTH, no_color=True)


class ConsoleReporter:
    """Says what the runner does: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, verbose: bool = False) -> None:
        self.console, self.verbose = console, verbose
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._done = self._steps = 0
        self._op = ""

    def line(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Print a line with ``--verbose``."""
        if self.verbose:
            self.line(text)

    def start(self, op: str, steps: int) -> None:
        """Announce an operator's number of steps."""
        self._done, self._steps = 0, steps
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(escape(op), total=steps)
        self._op = op

    def step(self, text: str) -> None:
        """Begin a step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, description=escape(f"{self._op}: {text}"))
        else:
            self.line(f"  step {self._done + 1} of {self._steps}: {text}")
        self._done += 1

    def finish(self) -> None:
        """Take the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def print_environment(console: Console, environment: dict[str, Any]) -> None:
    """Print the head of the output: what is measured, where."""
    parts = [f"fastkern {environment['fastkern']} (commit {environment['commit']})", f"torch {environment['torch']}"]
    if environment["driver"]:
        parts.append(f"driver {environment['driver']}")
    versions = {**environment["packages"], **environment["peers"]}
    parts += [f"{name} {version}" for name, version in versions.items()]
    console.print(f"{environment['device']}: {', '.join(parts)}", markup=False, soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Print a table; the fastest column of each row is bold on a terminal."""
    if table.columns:
        console.print(f"\n{table.title}", markup=False, style="bold", soft_wrap=True)  # a narrow table would fold it
        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(table.columns):
            drawn.add_column(escape(name), justify="left" if i == 0 else "right", no_wrap=True)
        best = table.best or [None] * len(table.rows)
        for row, bold in zip(table.rows, best, strict=True):
            drawn.add_row(*(f"[bold]{escape(c)}[/bold]" if i == bold else escape(c) for i, c in enumerate(row)))
        console.print(drawn)
    for note in table.notes:
        console.print(f"  {note}", markup=False, style="dim", soft_wrap=True)


def print_results(console: Console, results: Results) -> None:
    """Print every table, the summary last: logs are cut from the front."""
    said: set[str] = set()
    for op in results.selected:
        for table in all_tables(results, op):
            print_table(console, Table(table.title, table.columns, table.rows, _unsaid(table.notes, said), table.best))
    print_table(console, summary(results))
    for op, text in results.failures.items():
        console.print(f"FAILED: {op}: {text}", markup=False, style="bold red", soft_wrap=True)


def _unsaid(notes: Iterable[str], said: set[str]) -> list[str]:
    fresh = [n for n in notes if n not in said]
    said.update(fresh)
    return fresh


def write_json(path: Path, results: Results) -> None:
    """Write the whole document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results.document(), indent=2) + "\n", encoding="utf-8")


def write_csv(path: Path, results: Results) -> None:
    """Write the records, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = results.document()["records"]
    names = list(records[0]) if records else []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for record in records:
            dims = " ".join(f"{k}={v}" for k, v in record["dims"].items())
            writer.writerow({**record, "dims": dims})
