# SPDX-License-Identifier: Apache-2.0
"""Streams, graphs, synchronisation and peak memory: what only a CUDA device can show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from fastkern.specs import Dims, Inputs, OpSpec
from torch import Tensor

from harness.cases import (
    Variant,
    as_tuple,
    assert_all_bitwise,
    assert_bitwise,
    case_text,
    differentiable,
    is_float,
    leaves_of,
    make_grad_outs,
    make_inputs,
    pick_dims,
    run_all,
    run_backward,
    run_both,
    run_forward,
)

_DELAY_CYCLES = 50_000_000  # about 30 ms: longer than all launches of a check take


def check_side_stream(spec: OpSpec, dtype: torch.dtype, variant: Variant, sizes: Sequence[Dims] | None = None) -> None:
    """Inputs become right only after a long kernel on the current stream: work put on another stream sees NaN."""
    for dims in pick_dims(spec, 3, limit=1 << 20) if sizes is None else sizes:
        good = make_inputs(spec, "cuda", dtype, dims, variant)
        grad_outs = make_grad_outs(spec, good)
        expected = run_all(spec, good, grad_outs)
        late = {k: torch.full_like(v, float("nan")) if is_float(v) else v for k, v in good.items()}
        late_grads = [torch.full_like(g, float("nan")) for g in grad_outs]
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(_DELAY_CYCLES)
            for name, value in good.items():
                if is_float(value):
                    late[name].copy_(value)
            for late_grad, grad in zip(late_grads, grad_outs, strict=True):
                late_grad.copy_(grad)
            got = run_all(spec, late, late_grads)
        torch.cuda.synchronize()
        assert_all_bitwise(got, expected, f"{case_text(spec, dims, dtype, variant)}: on a side stream after a delay")


class _Static:
    """Static inputs, grad_outs and results of a captured forward and backward."""

    def __init__(self, spec: OpSpec, inputs: Inputs, grad_outs: list[Tensor]) -> None:
        self.spec, self.names = spec, differentiable(spec, inputs)
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        self.leaves = leaves_of(copies, self.names)
        self.grad_outs = [g.clone() for g in grad_outs]
        self.results: dict[str, Tensor] = {}

    def run(self) -> None:
        with torch.no_grad():
            plain = as_tuple(self.spec.function(**self.leaves))
        self.results = {f"output {i}": o for i, o in enumerate(plain)}
        if not self.names:
            return
        outputs = [o for o in as_tuple(self.spec.function(**self.leaves)) if is_float(o)]
        grads = torch.autograd.grad(outputs, [self.leaves[n] for n in self.names], self.grad_outs)
        self.results |= {f"output {i} (grad mode)": o.detach() for i, o in enumerate(outputs)}
        self.results |= {f"grad of {n}": g for n, g in zip(self.names, grads, strict=True)}

    def load(self, inputs: Inputs, grad_outs: list[Tensor]) -> None:
        with torch.no_grad():
            for name, value in inputs.items():
                if isinstance(value, Tensor):
                    self.leaves[name].copy_(value)
            for static, value in zip(self.grad_outs, grad_outs, strict=True):
                static.copy_(value)


def check_cuda_graph(spec: OpSpec, dtype: torch.dtype, variant: Variant, replays: int = 20) -> None:
    """Forward and backward captured once and replayed with changed inputs give the eager results."""
    for dims in pick_dims(spec, 3, limit=1 << 20):
        inputs = make_inputs(spec, "cuda", dtype, dims, variant)
        static = _Static(spec, inputs, make_grad_outs(spec, inputs))
        warmup = torch.cuda.Stream()
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):
            for _ in range(3):
                static.run()
        torch.cuda.current_stream().wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static.run()
        for replay in range(replays):
            inputs = make_inputs(spec, "cuda", dtype, dims, variant, salt=replay)
            grad_outs = make_grad_outs(spec, inputs)
            expected = run_all(spec, inputs, grad_outs)
            static.load(inputs, grad_outs)
            graph.replay()
            torch.cuda.synchronize()
            what = f"{case_text(spec, dims, dtype, variant)}: graph replay {replay}"
            assert_all_bitwise(static.results, expected, what)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_no_synchronisation(spec: OpSpec, dtype: torch.dtype, variant: Variant) -> None:
    """Calls return while the device is still busy, and torch sees no synchronising operation."""
    for dims in pick_dims(spec, 3, limit=1 << 20):
        inputs = make_inputs(spec, "cuda", dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        run_all(spec, inputs, grad_outs)
        torch.cuda.synchronize()
        done = torch.cuda.Event()
        what = case_text(spec, dims, dtype, variant)
        try:
            with no_synchronisation():
                torch.cuda._sleep(4 * _DELAY_CYCLES)
                run_all(spec, inputs, grad_outs)
                done.record()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            raise AssertionError(f"{what}: {error}") from error
        still_busy = not done.query()
        torch.cuda.synchronize()
        assert still_busy, f"{what}: the call waited for the device"


# ---- memory ----------------------------------------------------------------------------------------------------------


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _peak_of(call: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes asked of torch's allocator at a time during the call (before its rounding), and the result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, result


def check_peak_memory(spec: OpSpec, dtype: torch.dtype, variant: Variant) -> None:
    """A call takes its outputs and the workspace that the spec declares, nothing else."""
    for dims in pick_dims(spec, 6):
        inputs = make_inputs(spec, "cuda", dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        names = differentiable(spec, inputs)
        run_both(spec.function, inputs, names, grad_outs)
        what = case_text(spec, dims, dtype, variant)

        peak, outputs = _peak_of(partial(run_forward, spec.function, inputs))
        allowed = _bytes(outputs) + spec.workspace(inputs, False)
        assert peak <= allowed, f"{what}: forward takes {peak} bytes, outputs and workspace are {allowed}"

        if not names:
            continue
        peak, (outputs, grads) = _peak_of(partial(run_backward, spec.function, inputs, names, grad_outs))
        allowed = _bytes([*outputs, *grads.values()]) + spec.workspace(inputs, True)
        assert peak <= allowed, f"{what}: backward takes {peak} bytes, results and workspace are {allowed}"


def check_no_leak(spec: OpSpec, dtype: torch.dtype, variant: Variant) -> None:
    """Memory after many calls is what it was before."""
    dims = pick_dims(spec, 3, limit=1 << 18)[1]
    inputs = make_inputs(spec, "cuda", dtype, dims, variant)
    grad_outs = make_grad_outs(spec, inputs)
    run_all(spec, inputs, grad_outs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        run_all(spec, inputs, grad_outs)
    for _ in range(20):  # autograd's thread may still hold what the last backward took
        torch.cuda.synchronize()
        grown = torch.cuda.memory_allocated() - before
        if grown <= 0:
            break
        time.sleep(0.05)
    assert grown <= 0, f"{spec.name}: memory grew by {grown} bytes in 50 calls"


def check_second_device(spec: OpSpec, dtype: torch.dtype, variant: Variant) -> None:
    """Tensors on cuda:1 while cuda:0 is current: same bits, results on cuda:1."""
    for dims in pick_dims(spec, 2, limit=1 << 18):
        inputs = make_inputs(spec, "cuda", dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        expected = run_all(spec, inputs, grad_outs)
        there = {k: v.to("cuda:1") if isinstance(v, Tensor) else v for k, v in inputs.items()}
        got = run_all(spec, there, [g.to("cuda:1") for g in grad_outs])
        for name, value in got.items():
            assert value.device == torch.device("cuda:1"), f"{spec.name}: {name} is on {value.device}"
            assert_bitwise(value.to("cuda:0"), expected[name], f"{case_text(spec, dims, dtype)}: {name} on cuda:1")
