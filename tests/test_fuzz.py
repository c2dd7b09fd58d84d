# SPDX-License-Identifier: Apache-2.0
"""Operators called with arguments made from their schemas: right, refused in words, and usable afterwards.

``HYPOTHESIS_PROFILE`` chooses how many: ``quick`` 100, ``ci`` 1,000 (default), ``nightly`` 20,000 an operator, shared
among its function and the operators that it is registered as.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from fastkern.specs import SPECS, OpSpec
from harness import fuzz
from harness.cases import assert_bitwise, make_inputs, pick_dims, run_forward
from hypothesis import given, settings
from hypothesis import strategies as st

_CASES = [
    pytest.param(spec, name, id=f"torch.ops.fastkern.{name}") for spec in SPECS for name in fuzz.operator_names(spec)
]


def _fuzz(spec: OpSpec, op_name: str, function: object, device: str) -> None:
    good = make_inputs(spec, device, torch.float32, pick_dims(spec, 3, limit=1 << 12)[1], spec.variants[0])
    expected = run_forward(spec.function, good)
    verdicts: Counter[bool] = Counter()

    share = settings.default.max_examples // (1 + len(fuzz.operator_names(spec)))

    @settings(max_examples=max(share, 50))
    @given(st.data())
    def one_call(data: st.DataObject) -> None:
        torch.manual_seed(0)
        arguments = data.draw(fuzz.calls(spec, op_name, device))
        verdicts[fuzz.judge(spec, op_name, function, arguments)] += 1
        for ours, before in zip(run_forward(spec.function, good), expected, strict=True):
            assert_bitwise(ours, before, f"{spec.name}: the good call afterwards")

    one_call()
    total = verdicts.total()
    assert verdicts[True] > total / 50, f"{op_name}: only {verdicts[True]} of {total} calls were accepted"
    assert verdicts[False] > total / 50, f"{op_name}: only {verdicts[False]} of {total} calls were refused"


@pytest.mark.parametrize(("spec", "op_name"), _CASES)
def test_operator(spec: OpSpec, op_name: str, device: str) -> None:
    _fuzz(spec, op_name, getattr(torch.ops.fastkern, op_name).default, device)


@pytest.mark.parametrize("spec", [pytest.param(s, id=f"fastkern.{s.name}") for s in SPECS])
def test_function(spec: OpSpec, device: str) -> None:
    _fuzz(spec, spec.name, spec.function, device)
