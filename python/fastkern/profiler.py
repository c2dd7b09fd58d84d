# SPDX-License-Identifier: Apache-2.0
"""``fastkern.profile``: which operators a piece of code calls, how long they take, what share of the device that is."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from fastkern.bench.timing import Ceiling

_LOG = logging.getLogger("fastkern")

FORMULA, ARGUMENTS = "formula", "arguments"


@dataclass
class OpRow:
    """All calls of one operator.

    Attributes:
        op: its name, as in ``torch.ops.fastkern``; ``AdamW.step`` and so on for optimizers.
        calls: how many.
        us: time of all of them together, on the device where it is one of CUDA, else on the CPU.
        bytes: that a perfect kernel moves.
        flops: of the job; None where no formula tells.
        counted: what ``bytes`` comes from: "formula", that of the operator's row in ``fastkern.specs``, or "arguments",
            the sizes of what goes in and comes out.
        gbps, tflops: achieved.
        ceiling: what bounds the job, "copy" or "matmul"; None where ceilings were not measured.
        percent: share of that ceiling.
    """

    op: str
    calls: int
    us: float
    bytes: int
    flops: int | None
    counted: str
    gbps: float | None = None
    tflops: float | None = None
    ceiling: str | None = None
    percent: float | None = None


@dataclass(frozen=True)
class _Call:
    op: str
    bytes: int
    flops: int | None
    counted: str
    dtype: str
    device: torch.device


# ---- what is called --------------------------------------------------------------------------------------------------


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, each once."""
    distinct = {(t.data_ptr(), t.shape, t.dtype): t.numel() * t.element_size() for t in tensors}
    return sum(distinct.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


@cache
def _rows() -> Mapping[str, Any]:
    from fastkern.specs import SPECS

    return {spec.name: spec for spec in SPECS}


def _cost(name: str, inputs: dict[str, Any], result: Any) -> tuple[int, int | None, str]:
    """Bytes, flops and where they come from."""
    base = name.removesuffix("_bwd").removesuffix("_fwd")
    directions: tuple[bool, ...] = (name.endswith("_bwd"),)
    if base.endswith("_grads"):  # forward that makes the gradients as well
        base, directions = base.removesuffix("_grads"), (False, True)
    spec = _rows().get(base)
    if spec is not None:
        try:
            moved = sum(int(spec.traffic(inputs, backward)) for backward in directions)
            return moved, sum(int(spec.flops(inputs, backward)) for backward in directions), FORMULA
        except (AttributeError, KeyError, TypeError):  # a call of another form than the row's
            _LOG.debug("profile: the formula of %s does not fit this call", name)
    return _size(_tensors(inputs)) + _size(_tensors(result)), None, ARGUMENTS


class _Calls(TorchDispatchMode):
    """Notes the calls of our operators, below autograd, those of backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fastkern":
            self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        names = [a.name for a in func._schema.arguments]
        inputs = dict(zip(names, args, strict=False)) | kwargs
        name = func._schema.name.split("::")[1]
        tensors = _tensors(inputs)
        if not tensors:
            return
        floats = [t.dtype for t in tensors if t.is_floating_point()] or [tensors[0].dtype]
        dtype = str(floats[0]).removeprefix("torch.")
        self.found.append(_Call(name, *_cost(name, inputs, result), dtype, tensors[0].device))

    def note_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A step of one of our optimizers: parameters and states read and written, gradients read."""
        if not type(optimizer).__module__.startswith("fastkern."):
            return
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        states = [t for p in params for t in _tensors(optimizer.state.get(p, {})) if t.numel() > 1]
        grads = [p.grad for p in params if p.grad is not None]
        if params:
            moved = 2 * _size(params) + 2 * _size(states) + _size(grads)
            dtype = str(params[0].dtype).removeprefix("torch.")
            name = f"{type(optimizer).__name__}.step"
            self.found.append(_Call(name, moved, None, ARGUMENTS, dtype, params[0].device))


# ---- how long it takes -----------------------------------------------------------------------------------------------


def _label(event_name: str) -> str:
    """The operator of an event of torch's profiler."""
    return event_name.removeprefix("fastkern::").removeprefix("Optimizer.step#")


def _times(events: Iterable[Any], cuda: set[str]) -> dict[str, float]:
    """Microseconds by operator. Of events with one of the same name inside, noted calls, the one inside counts."""
    total: dict[str, float] = {}
    for event in events:
        name = _label(event.name)
        if name == event.name or any(child.name == event.name for child in _inside(event)):
            continue
        us = event.device_time_total if name in cuda else event.cpu_time_total
        total[name] = total.get(name, 0.0) + us
    return total


def _inside(event: Any) -> Iterable[Any]:
    for child in event.cpu_children:
        yield child
        yield from _inside(child)


@cache
def _ceiling(device: torch.device, dtypes: tuple[str, ...]) -> Ceiling:
    from dataclasses import replace

    from fastkern.bench.timing import Clock

    clock = Clock(device, quick=True, keep_memory=False)
    rates = {name: clock.matmul_rate(getattr(torch, name)) for name in dtypes}
    return replace(clock.copy_bandwidth(), tflops=rates)


# ---- the context -----------------------------------------------------------------------------------------------------


class profile:  # noqa: N801 - a context manager, named as torch.profiler.profile
    """Profile what runs inside: ``with fastkern.profile("out") as prof: step()``, then ``print(prof)``.

    Calls of fastkern's operators and steps of its optimizers are noted with the bytes and flops they stand for and
    timed by torch's profiler. The table sets what they achieve against a copy and a matrix product measured on the same
    device when the block has ended. Calls inside a graph that ``torch.compile`` made or that CUDA replays are in the
    trace alone.

    Args:
        directory: where to write ``trace.json`` (for chrome://tracing or Perfetto), ``ops.json`` (the table as data)
            and, on CUDA, ``memory.pickle`` (a snapshot for pytorch.org/memory_viz). None: no files.
        memory: whether to record the snapshot. Without CUDA there is none, which is logged.
        ceilings: whether to measure the ceilings, in about a second the first time.

    Attributes:
        rows: one ``OpRow`` an operator, the one that takes longest first.
        torch: the ``torch.profiler.profile`` that ran.
        files: what was written: name -> path.

    Raises:
        RuntimeError: entered twice.
    """

    def __init__(self, directory: str | Path | None = None, *, memory: bool = True, ceilings: bool = True) -> None:
        self.directory = None if directory is None else Path(directory)
        self.rows: list[OpRow] = []
        self.files: dict[str, Path] = {}
        self._ceilings = ceilings
        self._memory = memory and self.directory is not None
        self._calls: _Calls | None = None
        self._unhook: Callable[[], None] = lambda: None
        cuda = torch.cuda.is_available()
        if self._memory and not cuda:
            _LOG.info("profile: no memory snapshot, torch records one on CUDA alone")
            self._memory = False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self.torch = torch.profiler.profile(activities=activities, record_shapes=True)

    def __enter__(self) -> profile:
        if self._calls is not None:
            raise RuntimeError("profile: entered before; make a new one for each block")
        self._calls = _Calls()
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        hook = register_optimizer_step_post_hook(self._calls.note_step)
        self._unhook = hook.remove
        self.torch.__enter__()
        self._calls.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._calls is not None
        self._calls.__exit__(kind, error, trace)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.torch.__exit__(kind, error, trace)
        self._unhook()
        if self._memory:
            self._snapshot()
        if kind is None:
            self.rows = self._table(self._calls.found)
            self._write()

    def _snapshot(self) -> None:
        assert self.directory is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        self.files["memory"] = self.directory / "memory.pickle"
        torch.cuda.memory._dump_snapshot(str(self.files["memory"]))
        torch.cuda.memory._record_memory_history(enabled=None)

    def _table(self, calls: Sequence[_Call]) -> list[OpRow]:
        cuda = {c.op for c in calls if c.device.type == "cuda"}
        events = self.torch.events() or ()
        times = _times(events, cuda)
        ceilings = self._measured(calls) if self._ceilings else {}
        rows = [
            _row(op, [c for c in calls if c.op == op], times.get(op, 0.0), ceilings)
            for op in dict.fromkeys(c.op for c in calls)
        ]
        return sorted(rows, key=lambda row: -row.us)

    @staticmethod
    def _measured(calls: Sequence[_Call]) -> dict[torch.device, Ceiling]:
        if any(c.device.type == "cuda" for c in calls) and importlib.util.find_spec("triton") is None:
            _LOG.warning("profile: no ceilings, measuring them on CUDA needs triton")
            return {}
        known = {"float32", "float16", "bfloat16"}
        dtypes: dict[torch.device, set[str]] = {}
        for call in calls:
            dtypes.setdefault(call.device, set()).update({call.dtype} & known)
        return {device: _ceiling(device, tuple(sorted(names))) for device, names in dtypes.items()}

    def _write(self) -> None:
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self.files["trace"] = self.directory / "trace.json"
        self.files["ops"] = self.directory / "ops.json"
        self.torch.export_chrome_trace(str(self.files["trace"]))
        self.files["ops"].write_text(json.dumps(self.data(), indent=2) + "\n", encoding="utf-8")

    def data(self) -> list[dict[str, Any]]:
        """The table as data: one dictionary a row."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        return table(self.rows)


def _row(op: str, calls: Sequence[_Call], us: float, ceilings: Mapping[torch.device, Ceiling]) -> OpRow:
    flops = [c.flops for c in calls if c.flops is not None]
    counted = FORMULA if all(c.counted == FORMULA for c in calls) else ARGUMENTS
    whole = sum(flops) if len(flops) == len(calls) else None
    row = OpRow(op, len(calls), us, sum(c.bytes for c in calls), whole, counted)
    if us <= 0:
        return row
    row.gbps = row.bytes / us / 1e3
    row.tflops = None if whole is None else whole / us / 1e6
    floors = [ceilings[c.device].floor(c.bytes, c.flops or 0, c.dtype) for c in calls if c.device in ceilings]
    if floors:
        row.ceiling = max(floors, key=lambda f: f[1])[0]
        row.percent = 100 * sum(f[1] for f in floors) / us
    return row


def table(rows: Sequence[OpRow]) -> str:
    """The rows for people."""
    if not rows:
        return "no fastkern operator was called"
    head = ("operator", "calls", "us a call", "% time", "GB/s", "TFLOP/s", "% ceiling", "bound by", "bytes from")
    whole = sum(row.us for row in rows) or 1.0

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.{digits}g}"

    cells = [
        (row.op, str(row.calls), number(row.us / row.calls, 4), number(100 * row.us / whole), number(row.gbps),
         number(row.tflops), number(row.percent), row.ceiling or "-", row.counted)
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in (head, *cells)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
