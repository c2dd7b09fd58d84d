# SPDX-License-Identifier: Apache-2.0
"""Which measurements are made, in which order: check ours everywhere, then check and time every provider per size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch._functorch import config as functorch_config

from fastkern.bench import cases
from fastkern.bench.accuracy import Verdict, check, reason
from fastkern.bench.cases import COMPILED, OURS, Case, Function
from fastkern.bench.results import BACKWARD, FORWARD, HostRecord, MemoryRecord, Record, Results
from fastkern.bench.scope import Options, environment, name_of, sizes
from fastkern.bench.timing import Ceiling, Clock, Measurement, Prepare
from fastkern.specs import Dims, OpSpec


class Reporter(Protocol):
    """Who hears about a run's progress."""

    def line(self, text: str) -> None:
        """Something to be read."""

    def detail(self, text: str) -> None:
        """Something to be read with ``--verbose``."""

    def step(self, text: str) -> None:
        """One step of the announced number begins."""

    def start(self, op: str, steps: int) -> None:
        """The steps of an operator begin."""

    def finish(self) -> None:
        """They have ended."""


def run(specs: Sequence[OpSpec], options: Options, reporter: Reporter) -> Results:
    """Measure ``specs``."""
    clock = Clock(options.device, options.quick)
    ceiling = replace(clock.copy_bandwidth(), tflops={name_of(d): clock.matmul_rate(d) for d in options.dtypes})
    results = Results(environment(options, specs), ceiling, selected=[s.name for s in specs])
    rates = ", ".join(
        f"{rate:{'.0f' if rate >= 10 else '.2g'}} TFLOP/s {name}" for name, rate in ceiling.tflops.items()
    )
    reporter.line(
        f"Ceilings of this run: copy {ceiling.gbps:.0f} GB/s "
        f"({ceiling.bytes / 2**20:.0f} MiB, bytes read + bytes written), matrix product {rates}"
    )
    for index, spec in enumerate(specs, 1):
        reporter.line(f"[{index}/{len(specs)}] benchmarking {spec.name}")
        # Backward is timed with retain_graph, which a compiled function that reuses its saved tensors refuses.
        with functorch_config.patch(donated_buffer=False):
            _OpRun(spec.benchmarked, options, clock, results, reporter).run()
    return results


class _OpRun:
    """One operator's part of a run."""

    def __init__(self, spec: OpSpec, options: Options, clock: Clock, results: Results, reporter: Reporter) -> None:
        self.spec, self.options, self.clock = spec, options, clock
        self.results, self.reporter = results, reporter
        self.sizes = sizes(spec, options)
        self.directions = options.directions if spec.differentiable else (FORWARD,)
        self.providers: list[str] = []

    @property
    def ceiling(self) -> Ceiling:
        return self.results.ceiling

    def run(self) -> None:
        spec, options = self.spec, self.options
        self.providers = self._providers()
        dtypes = [d for d in options.dtypes if d in spec.dtypes]
        for dtype in options.dtypes:
            if dtype not in spec.dtypes:
                self._skip(f"{spec.name} {name_of(dtype)}", "the operator does not take this dtype")
        left_out = [cases.label(d) for d in spec.bench_dims if d not in self.sizes]
        if left_out and self.sizes != spec.cpu_bench_dims:
            why = "larger than --quick takes" if options.quick else "too large for a CPU"
            self._skip(f"{spec.name} {', '.join(left_out)}", why)
        self.reporter.start(spec.name, len(dtypes) * (2 * len(self.sizes) + 1))
        try:
            for dtype in dtypes:
                if self._ours_is_right(dtype):
                    for dims in self.sizes:
                        self.reporter.step(f"time {cases.label(dims)} {name_of(dtype)}")
                        self._size(dims, dtype)
                    self.reporter.step(f"host time {name_of(dtype)}")
                    self._host(dtype)
        finally:
            self.reporter.finish()

    def _skip(self, what: str, why: str) -> None:
        self.results.skipped[what] = why
        self.reporter.line(f"Skipped: {what} ({why})")

    def _providers(self) -> list[str]:
        names, chosen = [], self.options.providers
        for name in cases.provider_names(self.spec):
            if chosen and name not in chosen and name != OURS:
                continue
            if name == COMPILED and self.options.quick and name not in chosen:
                self._skip(f"{self.spec.name} {name}", "compiling takes longer than --quick")
                continue
            absent = cases.missing(self.spec, name, self.options.device)
            if absent is None:
                names.append(name)
            elif name not in self.results.not_installed:
                self.results.not_installed[name] = absent
        absent_here = [n for n in self.spec.peers if n in self.results.not_installed]
        if absent_here:
            self.reporter.line(f"Not installed: {', '.join(absent_here)}")
            for name in absent_here:
                self.reporter.detail(f"  {name}: {self.results.not_installed[name]}")
        return names

    # ---- ours, before anything is timed ------------------------------------------------------------------------------

    def _ours_is_right(self, dtype: torch.dtype) -> bool:
        """Check our operator at every size; a wrong one is recorded as failed and not timed."""
        for dims in self.sizes:
            self.reporter.step(f"check {cases.label(dims)} {name_of(dtype)}")
            case = Case(self.spec, dims, dtype, self.options.device)
            verdicts = check(case, {OURS: self.spec.function}, self.directions)[OURS]
            wrong = [(d, v.error) for d, v in verdicts.items() if v.correct is False or v.raised]
            if wrong:
                direction, text = wrong[0]
                where = f"{direction} at {cases.label(dims)} {name_of(dtype)}"
                self.results.failures[f"{self.spec.name} {name_of(dtype)}"] = f"{where}: {text}"
                self.results.records += [self._record(case, dtype, d, OURS, v) for d, v in verdicts.items()]
                self.reporter.line(f"FAILED: {self.spec.name}, {where}: {text}")
                return False
            case.release()
        return True

    def _record(self, case: Case, dtype: torch.dtype, direction: str, name: str, verdict: Verdict) -> Record:
        backward = direction == BACKWARD
        return Record(
            op=self.spec.name,
            family=self.spec.family,
            dims=dict(case.dims),
            size=cases.label(case.dims),
            dtype=name_of(dtype),
            direction=direction,
            provider=name,
            bytes=case.traffic(backward),
            flops=case.flops(backward),
            correct=verdict.correct,
            error=verdict.error,
        )

    # ---- every provider at one size ----------------------------------------------------------------------------------

    def _size(self, dims: Dims, dtype: torch.dtype) -> None:
        self._forget_compiled()
        case = Case(self.spec, dims, dtype, self.options.device)
        functions = {name: cases.provider(self.spec, name) for name in self.providers}
        verdicts = check(case, functions, self.directions)
        for name, by_direction in verdicts.items():
            for direction, verdict in by_direction.items():
                if verdict.correct is not True:
                    self.reporter.detail(f"  {name}, {direction} at {cases.label(dims)}: {verdict.error}")
        for direction in self.directions:
            rows = [self._record(case, dtype, direction, n, verdicts[n][direction]) for n in functions]
            self._time_row(case, direction, rows, functions)
            self.results.records += rows
            ours = rows[0]
            if ours.us is None:
                where = f"{direction} at {ours.size} {ours.dtype}"
                self.results.failures[f"{ours.op} {ours.dtype}"] = f"{where}: not timed, {ours.error}"
        self._memory(case, dtype, functions)
        case.release()

    def _forget_compiled(self) -> None:
        if COMPILED in self.providers:
            torch.compiler.reset()  # sizes before this one must not make this one's kernels general

    def _time_row(self, case: Case, direction: str, rows: list[Record], functions: dict[str, Function]) -> None:
        prepare = case.forward if direction == FORWARD else case.backward
        calls = {name: partial(prepare, function) for name, function in functions.items()}
        turns: dict[str, list[Measurement]] = {name: [] for name in functions}
        for _ in range(self.clock.turns):
            for record in rows:
                if measured := self._attempt(record, self.clock.time, calls[record.provider]):
                    turns[record.provider].append(measured)
        for record in rows:
            if measurements := turns[record.provider]:
                record.timed(statistics.median(m.us for m in measurements), measurements[0].method, self.ceiling)
        times = [r.us for r in rows if r.us is not None]
        if times and self.clock.short(self.ceiling.us(rows[0].bytes), min(times)):
            for record in (r for r in rows if r.us is not None):
                self._attempt(record, self.clock.time_graph, calls[record.provider])

    def _attempt(
        self, record: Record, measure: Callable[[Prepare], Measurement], prepare: Prepare
    ) -> Measurement | None:
        try:
            measured = measure(prepare)
            record.timed(measured.us, measured.method, self.ceiling)
            return measured
        except Exception as error:  # a provider that raises is an empty cell, not the end of the run
            record.error = record.error or reason(error)
            kept = " (event timing kept)" if record.us is not None else ""
            self.reporter.detail(
                f"  {record.provider}, {record.op} {record.direction} {record.size}{kept}: {reason(error)}"
            )
            return None

    def _memory(self, case: Case, dtype: torch.dtype, functions: dict[str, Function]) -> None:
        for name, function in functions.items():
            entry = MemoryRecord(self.spec.name, cases.label(case.dims), name_of(dtype), name)
            try:
                entry.forward_bytes = self.clock.peak(case.forward(function))
                if BACKWARD in self.directions:
                    entry.forward_backward_bytes = self.clock.peak(case.both(function))
            except Exception as error:  # as for times
                self.reporter.detail(f"  {name}, memory at {entry.size}: {reason(error)}")
            self.results.memory.append(entry)

    def _host(self, dtype: torch.dtype) -> None:
        self._forget_compiled()
        case = Case(self.spec, cases.smallest(self.spec, self.options.device), dtype, self.options.device)
        for name in self.providers:
            entry = HostRecord(self.spec.name, cases.label(case.dims), name_of(dtype), name)
            try:
                function = cases.provider(self.spec, name)
                entry.no_grad_us = self.clock.host(case.forward(function))
                if BACKWARD in self.directions:
                    entry.with_grad_us = self.clock.host(case.forward_with_grad(function))
            except Exception as error:  # as for times
                self.reporter.detail(f"  {name}, host time: {reason(error)}")
            self.results.host.append(entry)
