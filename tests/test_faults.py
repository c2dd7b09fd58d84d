# SPDX-License-Identifier: Apache-2.0
"""The suite proves itself: classic faults planted into rms_norm must be caught, each by the checks named here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fastkern.specs import RMS_NORM, SPECS
from harness import faults, gpu, layouts, numerics, runtime, special
from harness.cases import assert_all_bitwise, make_grad_outs, make_inputs, run_all
from harness.faults import planted

assert RMS_NORM in SPECS

# Few sizes, so that each fault is a matter of seconds: short and long rows, vector-sized and not, one odd batch.
SPEC = replace(
    RMS_NORM,
    dims=({"M": 3, "N": 64}, {"M": 3, "N": 1001}, {"M": 35, "N": 257}, {"M": 2, "N": 8192}, {"B": 2, "S": 3, "N": 40}),
)
VARIANT = SPEC.variants[0]
F32, BF16 = torch.float32, torch.bfloat16

Check = Callable[[str], None]

CHECKS: dict[str, Check] = {
    "forward accuracy": lambda d: numerics.check_forward_accuracy(SPEC, d, F32, VARIANT),
    "backward accuracy": lambda d: numerics.check_backward_accuracy(SPEC, d, F32, VARIANT),
    "value ranges": lambda d: numerics.check_value_ranges(SPEC, d, F32, VARIANT),
    "special values": lambda d: special.check_special_values(SPEC, d, F32, VARIANT),
    "wide accumulation": lambda d: numerics.check_wide_accumulation(SPEC, d, BF16, VARIANT),
    "batch invariance": lambda d: numerics.check_batch_invariance(SPEC, d, F32, VARIANT),
    "layouts": lambda d: layouts.check_layouts(SPEC, d, F32, VARIANT),
    "far strides": lambda d: layouts.check_far_strides(SPEC, d, BF16, VARIANT),
    "determinism": lambda d: runtime.check_determinism(SPEC, d, F32, VARIANT, 20, SPEC.dims[2]),
    "poisoned memory": lambda d: runtime.check_poisoned_memory(SPEC, d, F32, VARIANT),
    "canaries": lambda d: runtime.check_canaries(SPEC, d, F32, VARIANT),
}
CUDA_CHECKS: dict[str, Check] = {
    "side stream": lambda d: gpu.check_side_stream(SPEC, BF16, VARIANT),
    "no synchronisation": lambda d: gpu.check_no_synchronisation(SPEC, BF16, VARIANT),
}
# The plain-PyTorch kernels take memory of their own, so this check is shown on the fault and not on the honest ones.
PEAK_MEMORY: Check = lambda d: gpu.check_peak_memory(SPEC, BF16, VARIANT)  # noqa: E731

# Every check named must catch its fault, not just one of them.
FAULTS: dict[type[faults.Honest], tuple[str, ...]] = {
    faults.OffByOneTail: ("forward accuracy", "value ranges"),
    faults.UnwrittenTail: ("poisoned memory",),
    faults.IgnoredStrideOfX: ("layouts",),
    faults.IgnoredStrideOfGradOut: ("layouts",),
    faults.OffsetsOf32Bits: ("far strides",),
    faults.MissingEps: ("value ranges", "special values"),
    faults.StatisticIn16Bits: ("wide accumulation",),
    faults.WeightGradientWithoutLastRows: ("backward accuracy",),
    faults.StatisticOfFirstRow: ("forward accuracy", "backward accuracy", "batch invariance", "special values"),
    faults.MissingTermOfDx: ("backward accuracy",),
    faults.DifferentEveryTime: ("determinism",),
    faults.WritesItsInput: ("canaries",),
}
CUDA_FAULTS: dict[type[faults.Honest], tuple[str, ...]] = {
    faults.WrongStream: ("side stream",),
    faults.WrongStreamOfBackward: ("side stream",),
    faults.HiddenSynchronisation: ("no synchronisation",),
}


def _cases(table: dict[type[faults.Honest], tuple[str, ...]]) -> list[object]:
    return [
        pytest.param(fault, check, id=f"{fault.__name__}-{check.replace(' ', '_')}")
        for fault, checks in table.items()
        for check in checks
    ]


def _assert_caught(fault: type[faults.Honest], check: Check, device: str) -> None:
    with planted(fault(), device), pytest.raises(AssertionError, match="rms_norm"):
        check(device)


@pytest.mark.parametrize(("fault", "check"), _cases(FAULTS))
def test_fault_is_caught(fault: type[faults.Honest], check: str, device: str) -> None:
    _assert_caught(fault, CHECKS[check], device)


@pytest.mark.cuda
@pytest.mark.parametrize(("fault", "check"), _cases(CUDA_FAULTS))
def test_cuda_fault_is_caught(fault: type[faults.Honest], check: str, cuda: None) -> None:
    _assert_caught(fault, CUDA_CHECKS[check], "cuda")


@pytest.mark.cuda
def test_extra_memory_is_caught(cuda: None) -> None:
    _assert_caught(faults.ExtraMemory, PEAK_MEMORY, "cuda")


@pytest.mark.parametrize("check", CHECKS)
def test_honest_kernels_pass(check: str, device: str) -> None:
    """The same seam without a fault: it is the fault that the checks see, not the seam."""
    with planted(faults.Honest(), device):
        CHECKS[check](device)


@pytest.mark.cuda
@pytest.mark.parametrize("check", CUDA_CHECKS)
def test_honest_kernels_pass_on_cuda(check: str, cuda: None) -> None:
    with planted(faults.Honest(), "cuda"):
        CUDA_CHECKS[check]("cuda")


@pytest.mark.parametrize("check", CHECKS)
def test_real_kernels_pass(check: str, device: str) -> None:
    CHECKS[check](device)


def test_faults_are_taken_away(device: str) -> None:
    inputs = make_inputs(SPEC, device, F32, SPEC.dims[1], VARIANT)
    grad_outs = make_grad_outs(SPEC, inputs)
    before = run_all(SPEC, inputs, grad_outs)
    with planted(faults.StatisticOfFirstRow(), device), pytest.raises(AssertionError):
        assert_all_bitwise(run_all(SPEC, inputs, grad_outs), before, "under the fault")
    assert_all_bitwise(run_all(SPEC, inputs, grad_outs), before, "afterwards")
