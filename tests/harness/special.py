# SPDX-License-Identifier: Apache-2.0
"""NaN, infinities, zeros, denormals and the largest numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastkern.specs import Inputs, OpSpec, assert_accurate, in_float64
from fastkern.specs._accuracy import on_host
from torch import Tensor

from harness.cases import (
    Variant,
    assert_bitwise,
    batched_names,
    case_text,
    decoded,
    differentiable,
    is_float,
    make_grad_outs,
    make_inputs,
    pick_dims,
    run_all,
    run_backward,
    run_forward,
    with_batch,
)
from harness.numerics import with_slack


def special_rows(dtype: torch.dtype) -> dict[str, tuple[float, ...]]:
    """Name -> values repeated along a row."""
    info = torch.finfo(dtype)
    denormal = info.smallest_normal * info.eps
    return {
        "one NaN": (float("nan"), *[1.0] * 1000),
        "one +inf": (float("inf"), *[1.0] * 1000),
        "one -inf": (float("-inf"), *[1.0] * 1000),
        "both inf": (float("inf"), 1.0, float("-inf")),
        "zeros": (0.0,),
        "negative zeros": (-0.0,),
        "denormals": (denormal, -3 * denormal),
        "smallest normal": (info.smallest_normal,),
        "max finite": (info.max, -info.max),
        "large": (info.max**0.5 / 256,),  # a row's sum of squares still fits
    }


def _planted(inputs: Inputs, name: str, index: int, values: tuple[float, ...]) -> Inputs:
    changed = inputs[name].clone()
    row = changed[index]
    repeated = torch.tensor(values, dtype=torch.float64).repeat(row.numel() // len(values) + 1)
    row.copy_(repeated[: row.numel()].reshape(row.shape))
    return {**inputs, name: changed}


def check_special_values(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """NaN, infinities, zeros, denormals and overflow do what they do in torch, and stay in their batch entry."""
    for dims in (with_batch(d, 3) for d in pick_dims(spec, 5, limit=1 << 15)):
        clean = make_inputs(spec, device, dtype, dims, variant)
        grad_outs = make_grad_outs(spec, clean)
        before = {key: on_host(t) for key, t in run_all(spec, clean, grad_outs).items()}
        batched = batched_names(spec, clean)
        for name in (n for n in spec.changeable if is_float(clean.get(n))):
            for label, values in special_rows(dtype).items():
                if label in spec.unspecial(clean):
                    continue
                inputs = _planted(clean, name, 1, values)
                what = f"{case_text(spec, dims, dtype, variant)}: {label} in {name}"
                _compare_special(spec, inputs, grad_outs, what)
                if not batched:
                    continue
                after = {key: on_host(t) for key, t in run_all(spec, inputs, grad_outs).items()}
                for key in before:
                    if key.startswith("grad of") and key.removeprefix("grad of ") not in batched:
                        continue  # a shared operand's gradient sums over the batch
                    for index in (0, 2):
                        assert_bitwise(after[key][index], before[key][index], f"{what}: {key}[{index}]")


def _compare_special(spec: OpSpec, inputs: Inputs, grad_outs: Sequence[Tensor], what: str) -> None:
    got, theirs = decoded(spec, inputs, spec.function), decoded(spec, inputs, spec.measure)
    truth = run_forward(spec.reference, in_float64(inputs))
    rows = with_slack(spec, inputs, list(zip(got, theirs, truth, strict=True)))
    rows = [tuple(torch.atleast_1d(on_host(t)) for t in row) for row in rows]  # a sum is one row
    share = spec.allowance(inputs, False) if got[0].dtype == torch.float32 else 0.0
    for i, (ours, base, exact, *slack) in enumerate(rows):
        if not spec.contained:  # 0 times NaN is NaN, unless nobody multiplies
            ours = torch.where(ours.isfinite() & base.isnan() & exact.isnan(), base, ours)
        for row in range(ours.shape[0]):  # row by row: an overflowing row must not widen another row's tolerance
            assert_accurate(ours[row], base[row], exact[row], spec.forward_factor, what=f"{what}: output {i}[{row}]",
                            slack=slack[0][row] if slack else None, share=share)  # fmt: skip
        zero = (base == 0) & (ours == 0) & spec.signed_zeros
        assert bool((ours.signbit() == base.signbit())[zero].all()), f"{what}: output {i}: sign of zero"
    names = differentiable(spec, inputs)
    if not names or not spec.contained:
        return
    _, grads = run_backward(spec.function, inputs, names, grad_outs)
    _, theirs_grads = run_backward(spec.baseline, inputs, names, grad_outs)
    _, exact_grads = run_backward(spec.reference, in_float64(inputs), names, [g.double() for g in grad_outs])
    for name in names:
        ours, base, exact = (on_host(of[name]) for of in (grads, theirs_grads, exact_grads))
        base, exact = base.isfinite(), exact.isfinite()
        # Where torch overflows and the truth does not, either is right.
        assert bool(ours.isfinite()[base & exact].all()), f"{what}: grad of {name} is NaN or infinite, torch's is not"
        assert not bool(ours.isfinite()[~base & ~exact].any()), f"{what}: grad of {name} is finite, torch's is not"
