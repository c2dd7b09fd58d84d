# SPDX-License-Identifier: Apache-2.0
"""How long a call takes on the device and on the host, and how much memory it needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.utils.benchmark import Timer

from fastkern.bench.cases import Call

Prepare = Callable[[], Call]  # makes a call ready and returns it

REPLAY, EVENTS, GRAPH, TIMER = "replay", "events", "graph", "timer"
METHODS = {
    REPLAY: "median between CUDA events around one replay of a CUDA graph of one call, so without the host's time, L2 "
    "cache flushed before each (triton.testing.do_bench)",
    EVENTS: "median between CUDA events around one call, L2 cache flushed before each (triton.testing.do_bench)",
    GRAPH: "median per call of a replayed CUDA graph of back-to-back calls, inputs warm in L2",
    TIMER: "median of repeated calls (torch.utils.benchmark, all torch threads), all columns by turns, in memory of "
    "earlier calls",
}

# Under about 20 us, events around one call measure launch gaps and host time more than the kernel.
GRAPH_BELOW_US = 20.0
# Autograd's host time can hide how short a backward is. A row whose bytes take less than the first of these is short
# all the same, unless its fastest column takes longer than the second and so does more than move bytes.
TINY_TRAFFIC_US = 5.0
GRAPH_NEVER_ABOVE_US = 200.0
LONG_CALL = 1e-3  # seconds


@dataclass(frozen=True)
class Measurement:
    """Median time of one call, and how it was taken."""

    us: float
    method: str


COPY, MATMUL = "copy", "matmul"


@dataclass(frozen=True)
class Ceiling:
    """What the device reaches in this run: bytes read and written by a copy, torch's matrix product of each dtype."""

    gbps: float
    bytes: int
    tflops: Mapping[str, float] = field(default_factory=dict)

    def us(self, traffic: int) -> float:
        """The time that ``traffic`` bytes take at this bandwidth."""
        return traffic / self.gbps / 1e3

    def floor(self, traffic: int, flops: int, dtype: str) -> tuple[str, float]:
        """Which of the two bounds a job, ``"copy"`` or ``"matmul"``, and the microseconds it takes at least."""
        moved = self.us(traffic)
        computed = flops / self.tflops[dtype] / 1e6 if self.tflops.get(dtype) else 0.0
        return (MATMUL, computed) if computed > moved else (COPY, moved)


def _keep_freed_memory() -> None:
    """Make the C library keep what is freed, for results to lie in pages that are there already.

    It returns large blocks to the system otherwise, and the first touch of a new page takes longer than most kernels
    need for it, on some calls and not on others. No libc but glibc knows ``mallopt``.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


class Clock:
    """Measures calls on one device. ``quick`` trades precision for time; ``keep_memory`` sets malloc to keep it."""

    def __init__(self, device: torch.device, quick: bool = False, keep_memory: bool = True) -> None:
        self.device, self.quick = device, quick
        self.cuda = device.type == "cuda"
        # A shared machine's memory is faster in one second than in the next: there all columns are timed by turns.
        self.turns = 1 if self.cuda or quick else 7
        if not self.cuda and keep_memory:
            _keep_freed_memory()

    def time(self, prepare: Prepare, quick: bool | None = None, capture: bool = True) -> Measurement:
        """Time the call that ``prepare`` returns; what ``prepare`` itself does is not timed."""
        quick = self.quick if quick is None else quick
        if not self.cuda:
            call = prepare()
            call()
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            return Measurement(timer.blocked_autorange(min_run_time=0.01 if quick else 0.1).median * 1e6, TIMER)
        from triton.testing import do_bench

        self._make_room()
        replay = self._captured(prepare) if capture else None
        call = replay or prepare()
        milliseconds = do_bench(call, warmup=5 if quick else 25, rep=10 if quick else 80, return_mode="median")
        return Measurement(milliseconds * 1e3, REPLAY if replay else EVENTS)

    def _make_room(self) -> None:
        """Give back what torch's allocator keeps, for other streams than the next one's, if that is much.

        While a graph is captured it cannot do so itself, and fails.
        """
        free, total = torch.cuda.mem_get_info(self.device)
        if free < total // 2:
            gc.collect()
            torch.cuda.empty_cache()

    def _captured(self, prepare: Prepare) -> Call | None:
        """The replay of a graph of the call; None of a call that cannot be captured.

        The host's part of a backward can take longer than its kernels do.
        """
        current, stream = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            call = prepare()
            call()
            stream.synchronize()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    call()
            except Exception:
                self._heal_after_failed_capture(stream)
                return None
        current.wait_stream(stream)

        def replay(_inputs: Call = call) -> None:  # which the graph reads
            graph.replay()

        return replay

    def short(self, traffic_us: float, fastest_us: float) -> bool:
        """Whether a row is to be timed again by CUDA graph, given its floor and its fastest column by events."""
        if not self.cuda:
            return False
        return fastest_us < GRAPH_BELOW_US or (traffic_us < TINY_TRAFFIC_US and fastest_us < GRAPH_NEVER_ABOVE_US)

    def time_graph(self, prepare: Prepare) -> Measurement:
        """Time the call by CUDA graph. Raises what the capture raises, for example on a synchronising call.

        ``prepare`` runs on the capturing stream too: autograd runs a backward on the stream of its forward.
        """
        current, stream = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                times = self._replay_times(prepare(), stream)
        finally:
            current.wait_stream(stream)
        return Measurement(statistics.median(times) * 1e3, GRAPH)

    def _replay_times(self, call: Call, stream: torch.cuda.Stream) -> list[float]:
        def elapsed(work: Call) -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            work()
            end.record(stream)
            end.synchronize()
            return float(start.elapsed_time(end))

        call()
        stream.synchronize()
        estimate = elapsed(lambda: [call() for _ in range(5)]) / 5
        count = max(10, min(200, int((2 if self.quick else 8) / max(estimate, 1e-4))))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(count):
                    call()
        except Exception:
            self._heal_after_failed_capture(stream)
            raise
        graph.replay()
        stream.synchronize()
        return [elapsed(graph.replay) / count for _ in range(5 if self.quick else 15)]

    def _heal_after_failed_capture(self, stream: torch.cuda.Stream) -> None:
        # A broken capture leaves torch's random generator believing that it is still being captured; a complete one,
        # of anything, ends that.
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.zeros(1, device=self.device)

    def host(self, call: Call) -> float:
        """Microseconds of host time per call: wall time of many calls, none of them waited for.

        The fastest of many batches, as in timeit: whatever else the machine does only adds. A batch stays far below
        the depth of the launch queue, so the host never waits for the device inside it.
        """
        batch, batches = (20, 5) if self.quick else (200, 50)
        call()
        start = time.perf_counter()
        call()
        self._synchronize()
        if time.perf_counter() - start > LONG_CALL:  # on the CPU, where the host computes
            batch, batches = 1, 5
        for _ in range(batch):
            call()
        times = []
        for _ in range(batches):
            self._synchronize()
            start = time.perf_counter()
            for _ in range(batch):
                call()
            times.append((time.perf_counter() - start) / batch)
        self._synchronize()
        return min(times) * 1e6

    def peak(self, call: Call) -> int | None:
        """Peak bytes allocated during the call above what was allocated before it; None where torch does not tell."""
        if not self.cuda:
            return None
        call()  # workspaces that live on are not the call's
        self._synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        kept = call()
        self._synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del kept
        return int(peak)

    def copy_bandwidth(self) -> Ceiling:
        """Copy a large buffer (1 GiB on CUDA) within the device."""
        size = 2**30 if self.cuda and not self.quick else 2**28 if self.cuda or not self.quick else 2**26
        source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        # Not captured: a copy in a graph is left to the copy engines, which reach two thirds of this.
        self.time(lambda: lambda: target.copy_(source), quick=True, capture=False)  # brings clocks up
        measured = self.time(lambda: lambda: target.copy_(source), capture=False)
        assert torch.equal(source, target), "the copy is not a copy"
        return Ceiling(gbps=2 * size / measured.us / 1e3, bytes=size)

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """TFLOP/s of torch's product of two square matrices (8192 on CUDA, 1024 on the CPU; ``quick`` half of that)."""
        n = (8192 if self.cuda else 1024) // (2 if self.quick else 1)
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * n**3 / self.time(lambda: lambda: torch.mm(a, b, out=out), capture=False).us / 1e6

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
