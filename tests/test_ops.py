# SPDX-License-Identifier: Apache-2.0
"""Every check of the harness on every row of the operator table."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from fastkern.specs import SPECS, BadCall, OpSpec
from harness import gpu, layouts, numerics, runtime, special, transforms
from harness.cases import Variant, pick_dims, variant_text

Rows = Callable[[Any], Any]


def _dtype_id(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


def _rows(cases: Iterable[tuple[OpSpec, torch.dtype, Variant]]) -> Rows:
    params = [pytest.param(s, d, v, id=f"{s.name}-{_dtype_id(d)}-{variant_text(v)}") for s, d, v in cases]
    return pytest.mark.parametrize(("spec", "dtype", "variant"), params)


# Every dtype with every variant; every dtype and every variant at least once; one of both at a time.
all_rows = _rows((s, d, v) for s in SPECS for d in s.dtypes for v in s.variants)
core_rows = _rows(
    (s, d, v) for s in SPECS for i, d in enumerate(s.dtypes) for j, v in enumerate(s.variants)
    if j == 0 or (i + j) % len(s.dtypes) == 0
)  # fmt: skip
dtype_rows = _rows((s, d, s.variants[0]) for s in SPECS for d in s.dtypes)
variant_rows = _rows((s, s.dtypes[0], v) for s in SPECS for v in s.variants)
one_row = _rows((s, s.dtypes[-1], s.variants[0]) for s in SPECS)
bad_calls = pytest.mark.parametrize(
    ("spec", "bad"), [pytest.param(s, b, id=f"{s.name}-{b.name.replace(' ', '_')}") for s in SPECS for b in s.bad_calls]
)


# ---- values ----------------------------------------------------------------------------------------------------------


@all_rows
def test_forward_accuracy(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_forward_accuracy(spec, device, dtype, variant)


@all_rows
def test_backward_accuracy(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_backward_accuracy(spec, device, dtype, variant)


@core_rows
def test_value_ranges(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_value_ranges(spec, device, dtype, variant)


@core_rows
def test_unwanted_gradients(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_unwanted_gradients(spec, device, dtype, variant)


@core_rows
def test_unused_outputs(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_unused_outputs(spec, device, dtype, variant)


@core_rows
def test_double_backward(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_double_backward(spec, device, dtype, variant)


@core_rows
def test_special_values(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    special.check_special_values(spec, device, dtype, variant)


@all_rows
def test_empty(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_empty(spec, device, dtype, variant)


@core_rows
def test_size_one(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_size_one(spec, device, dtype, variant)


@core_rows
def test_wide_accumulation(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_wide_accumulation(spec, device, dtype, variant)


@core_rows
def test_batch_invariance(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_batch_invariance(spec, device, dtype, variant)


# ---- memory layout ---------------------------------------------------------------------------------------------------


@core_rows
def test_layouts(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    layouts.check_layouts(spec, device, dtype, variant)


@core_rows
def test_storage_offsets(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    layouts.check_offsets(spec, device, dtype, variant)


@pytest.mark.large
@dtype_rows
def test_far_strides(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    layouts.check_far_strides(spec, device, dtype, variant)


# ---- repeats, threads, memory, errors --------------------------------------------------------------------------------


@dtype_rows
def test_determinism(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    dims = pick_dims(spec, 3, limit=1 << 17)[2]
    runtime.check_determinism(spec, device, dtype, variant, 1000 if device == "cuda" else 50, dims)


@core_rows
def test_thread_counts(spec: OpSpec, dtype: torch.dtype, variant: Variant) -> None:
    runtime.check_thread_counts(spec, dtype, variant)


@dtype_rows
def test_concurrent_calls(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    runtime.check_concurrent_calls(spec, device, dtype, variant)


@core_rows
def test_poisoned_memory(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    runtime.check_poisoned_memory(spec, device, dtype, variant)


@core_rows
def test_canaries(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    runtime.check_canaries(spec, device, dtype, variant)


@bad_calls
def test_bad_call(spec: OpSpec, device: str, bad: BadCall) -> None:
    runtime.check_bad_call(spec, device, bad)


# ---- torch's transforms ----------------------------------------------------------------------------------------------


@variant_rows
def test_opcheck(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_opcheck(spec, device, dtype, variant)


@core_rows
def test_direct_op(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_direct_op(spec, device, dtype, variant)


@variant_rows
def test_compile(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_compile(spec, device, dtype, variant)


@pytest.mark.slow
@one_row
def test_compile_inductor(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    if device == "cuda":
        pytest.importorskip("triton")
    transforms.check_compile(spec, device, dtype, variant, backend="inductor")


@variant_rows
def test_export(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_export(spec, device, dtype, variant)


@variant_rows
def test_vmap(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_vmap(spec, device, dtype, variant)


@variant_rows
def test_per_sample_gradients(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_per_sample_gradients(spec, device, dtype, variant)


@variant_rows
def test_batched_gradients(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_batched_gradients(spec, device, dtype, variant)


@dtype_rows
def test_autocast(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_autocast(spec, device, dtype, variant)


@dtype_rows
def test_checkpoint(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_checkpoint(spec, device, dtype, variant)


# ---- CUDA only -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@core_rows
def test_side_stream(spec: OpSpec, cuda: None, dtype: torch.dtype, variant: Variant) -> None:
    gpu.check_side_stream(spec, dtype, variant)


@pytest.mark.cuda
@core_rows
def test_cuda_graph(spec: OpSpec, cuda: None, dtype: torch.dtype, variant: Variant) -> None:
    gpu.check_cuda_graph(spec, dtype, variant)


@pytest.mark.cuda
@core_rows
def test_no_synchronisation(spec: OpSpec, cuda: None, dtype: torch.dtype, variant: Variant) -> None:
    gpu.check_no_synchronisation(spec, dtype, variant)


@pytest.mark.cuda
@core_rows
def test_peak_memory(spec: OpSpec, cuda: None, dtype: torch.dtype, variant: Variant) -> None:
    gpu.check_peak_memory(spec, dtype, variant)


@pytest.mark.cuda
@variant_rows
def test_no_leak(spec: OpSpec, cuda: None, dtype: torch.dtype, variant: Variant) -> None:
    gpu.check_no_leak(spec, dtype, variant)


@pytest.mark.cuda
@dtype_rows
def test_second_device(spec: OpSpec, cuda: None, dtype: torch.dtype, variant: Variant) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    gpu.check_second_device(spec, dtype, variant)


def test_lowering_as_inductor_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.13 fakes make the lowering, so that Inductor does not describe all that leads to the operator."""
    from fastkern.ops import _schema
    from torch._inductor import lowering

    target = torch.ops.fastkern.add_rms_norm.default
    monkeypatch.delitem(lowering.lowerings, target, raising=False)
    _schema.make_lowering(lowering, "add_rms_norm")
    assert target in lowering.lowerings
    made = lowering.lowerings[target]
    _schema.make_lowering(lowering, "add_rms_norm")
    assert lowering.lowerings[target] is made
    assert lowering.maybe_layout_constraints(target) is not None
    monkeypatch.setattr(lowering, "lowerings", {})
    monkeypatch.delattr(lowering, "make_fallback")
    _schema.make_lowering(lowering, "add_rms_norm")  # another torch: as if it were not there
