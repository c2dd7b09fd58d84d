# SPDX-License-Identifier: Apache-2.0
"""Repeats, threads, memory, errors: what must hold on every device."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fastkern.specs import BadCall, Dims, OpSpec
from torch import Tensor

from harness.cases import (
    Variant,
    assert_all_bitwise,
    assert_all_same,
    bits,
    case_text,
    is_float,
    make_grad_outs,
    make_inputs,
    pick_dims,
    run_all,
)


def check_determinism(
    spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant, repeats: int, dims: Dims
) -> None:
    """Forward and backward give the same bits every time; counted on the device so that calls follow each other."""
    inputs = make_inputs(spec, device, dtype, dims, variant)
    grad_outs = make_grad_outs(spec, inputs)
    first = {name: bits(value) for name, value in run_all(spec, inputs, grad_outs).items()}
    differing = {name: torch.zeros((), dtype=torch.int64, device=device) for name in first}
    for _ in range(repeats):
        for name, value in run_all(spec, inputs, grad_outs).items():
            differing[name] += (bits(value) != first[name]).any()
    for name, count in differing.items():
        what = case_text(spec, dims, dtype, variant)
        assert int(count) == 0, f"{what}: {name} differs in {int(count)} of {repeats} runs"


def check_thread_counts(spec: OpSpec, dtype: torch.dtype, variant: Variant) -> None:
    """On the CPU the result does not depend on how many threads share the work."""
    threads = torch.get_num_threads()
    try:
        for dims in pick_dims(spec, 16, limit=1 << 18):
            inputs = make_inputs(spec, "cpu", dtype, dims, variant)
            grad_outs = make_grad_outs(spec, inputs)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(run_all(spec, inputs, grad_outs))
            for count, result in zip((2, 3), results[1:], strict=True):
                what = f"{case_text(spec, dims, dtype, variant)}: {count} threads against 1"
                assert_all_same(spec, result, results[0], what)
    finally:
        torch.set_num_threads(threads)


def check_concurrent_calls(
    spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant, threads: int = 8, calls: int = 20
) -> None:
    """Python threads, each on its own stream, get what one thread gets."""
    sizes = pick_dims(spec, 4, limit=1 << 18)
    cases = []
    for dims in sizes:
        inputs = make_inputs(spec, device, dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        cases.append((dims, inputs, grad_outs, run_all(spec, inputs, grad_outs)))
    if device == "cuda":
        torch.cuda.synchronize()
    failures: list[str] = []

    def work(index: int) -> None:
        try:
            for call in range(calls):
                dims, inputs, grad_outs, expected = cases[(index + call) % len(cases)]
                got = run_all(spec, inputs, grad_outs)
                assert_all_same(spec, got, expected, f"{case_text(spec, dims, dtype)}: thread {index} call {call}")
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")

    def on_own_stream(index: int) -> None:
        if device == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):
                work(index)
        else:
            work(index)

    workers = [threading.Thread(target=on_own_stream, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, f"{len(failures)} of {threads} threads failed, first: {failures[0]}"


# ---- memory ----------------------------------------------------------------------------------------------------------

_M_PERTURB = -6  # mallopt: fill what malloc hands out with ~value and what is freed with value (glibc)


@contextmanager
def poisoned_memory(device: str) -> Iterator[None]:
    """Uninitialised memory holds NaN (or huge values) instead of what happens to lie there.

    On CUDA torch fills its own ``empty`` tensors; blocks that are freed full of NaN cover allocations that bypass that.
    On the CPU the allocator below torch fills small blocks; large ones come zeroed from the kernel.
    """
    libc = ctypes.CDLL(None)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    perturb = device == "cpu" and hasattr(libc, "mallopt")
    try:
        if perturb:
            libc.mallopt(_M_PERTURB, 1)
        if device == "cuda":
            torch.cuda.empty_cache()
            blocks = [
                torch.full((size,), float("nan"), device="cuda")
                for size in (1 << k for k in range(7, 21))
                for _ in range(3)
            ]
            torch.cuda.synchronize()
            del blocks
        yield
    finally:
        if perturb:
            libc.mallopt(_M_PERTURB, 0)
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def check_poisoned_memory(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """Nothing uninitialised is read and no output element stays unwritten."""
    for dims in pick_dims(spec, 12, limit=1 << 18):
        inputs = make_inputs(spec, device, dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        expected = run_all(spec, inputs, grad_outs)
        with poisoned_memory(device):
            got = run_all(spec, inputs, grad_outs)
        what = f"{case_text(spec, dims, dtype, variant)}: on poisoned memory"
        for name, value in got.items():  # the poison is NaN; reused blocks may have held it in the first run too
            assert not bool(value.isnan().any()), f"{what}: {name} is NaN"
        assert_all_bitwise(got, expected, what)


def _canaries(like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Blocks of the tensor's size, full of a pattern; every second one is given back, so that what is allocated next
    tends to lie between two that stay."""
    blocks = [torch.full((like.numel(),), -7.0, dtype=like.dtype, device=like.device) for _ in range(16)]
    kept, holes = blocks[::2], blocks[1::2]
    return kept, holes


def check_canaries(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """Inputs, grad_outs and neighbours of the outputs keep their bits.

    The op allocates its outputs itself, so guards cannot be put around them for certain: neighbours are blocks of the
    same size next to freed ones. Out-of-bounds accesses are the business of compute-sanitizer.
    """
    for dims in pick_dims(spec, 8, limit=1 << 16):
        inputs = make_inputs(spec, device, dtype, dims, variant)
        watched = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        copies = {name: value.clone() for name, value in watched.items()}
        grad_outs = make_grad_outs(spec, inputs)
        for i, grad_out in enumerate(grad_outs):
            watched[f"grad_out {i}"], copies[f"grad_out {i}"] = grad_out, grad_out.clone()
        kept, holes = _canaries(next(v for v in watched.values() if is_float(v)))
        del holes
        run_all(spec, inputs, grad_outs)
        what = case_text(spec, dims, dtype, variant)
        assert_all_bitwise(watched, copies, f"{what}: inputs changed")
        for block in kept:
            assert bool((block == -7.0).all()), f"{what}: memory beside the outputs changed"


# ---- errors ----------------------------------------------------------------------------------------------------------


def check_bad_call(spec: OpSpec, device: str, bad: BadCall) -> None:
    """The call raises in the words promised, through the function and through torch.ops, and the next call works."""
    dims = pick_dims(spec, 3, limit=1 << 12)[1]
    variant = spec.variants[0]
    inputs = make_inputs(spec, device, torch.float32, dims, variant)
    grad_outs = make_grad_outs(spec, inputs)
    expected = run_all(spec, inputs, grad_outs)
    for label, call in ((f"fastkern.{spec.name}", spec.function), (f"torch.ops.fastkern.{spec.name}", spec.op)):
        for grad in (False, True):
            wrong = dict(inputs)
            if grad:
                wrong = {k: v.detach().requires_grad_(k in spec.differentiable) if isinstance(v, Tensor) else v
                         for k, v in wrong.items()}  # fmt: skip
            bad.change(wrong)
            what = f"{label}, {bad.name}"
            try:
                call(**wrong)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                text = str(error)
                assert re.search(bad.message, text), f"{what}: message {text!r} does not match {bad.message!r}"
                assert not re.search(r"\.(cpp|cu|h):\d+|/tmp/|/work/|/home/", text.split("\n")[0]), f"{what}: {text!r}"
            else:
                raise AssertionError(f"{what}: no error")
            assert_all_bitwise(run_all(spec, inputs, grad_outs), expected, f"{spec.name}: good call after {bad.name}")
