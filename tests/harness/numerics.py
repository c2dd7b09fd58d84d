# SPDX-License-Identifier: Apache-2.0
"""Accuracy, gradients, empty inputs, accumulation, batch invariance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fastkern.specs import Dims, Inputs, OpSpec, assert_accurate, in_float64
from torch import Tensor

from harness.cases import (
    Variant,
    as_tuple,
    assert_bitwise,
    batched_names,
    case_text,
    differentiable,
    is_float,
    leaves_of,
    make_grad_outs,
    make_inputs,
    pick_dims,
    run_all,
    run_backward,
    run_forward,
    subsets,
    volume,
    with_batch,
)


def _map_batched(spec: OpSpec, inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs whose values may be changed passed through ``change`` in float32."""
    return {k: change(v.float()).to(v.dtype) if k in spec.changeable and is_float(v) else v for k, v in inputs.items()}


# An error rule over three values is luck: small cases are drawn again until they make this many values together, each
# draw with neighbours of nearly the same value, so that where one input dominates, torch's error is not luck either.
# So are sums over many rows of few columns: those are drawn until there are some tens of them.
_ENOUGH = 512
_ENOUGH_COLUMNS = 24
_MOST_DRAWS = 32
_NEIGHBOURS = 8


def draws(spec: OpSpec, device: str, dtype: torch.dtype, dims: Dims, variant: Variant, salt: Any = "") -> list[Inputs]:
    columns = list(dims.values())[-1]
    enough = max(-(-_ENOUGH // max(volume(dims), 1)), -(-_ENOUGH_COLUMNS // max(columns, 1)))
    count = min(_MOST_DRAWS, enough) if volume(dims) else 1
    cases = []
    for i in range(count):
        inputs = make_inputs(spec, device, dtype, dims, variant, salt=f"{salt}{i // _NEIGHBOURS}")
        nudge = 1 + i % _NEIGHBOURS * max(2 * torch.finfo(dtype).eps, 1 / 500)
        cases.append(_map_batched(spec, inputs, lambda t, nudge=nudge: t * nudge) if nudge != 1 else inputs)
    return cases


def _assert_pooled(
    results: Sequence[tuple[Tensor, ...]], factor: float, what: str, ulps: float = 2, share: float = 0.0
) -> None:
    """specs.assert_accurate on (ours, baseline's, truth) or (..., slack) of several draws together."""
    for ours, _, exact, *_ in results:
        assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    ours, theirs, exact, *slack = (torch.stack(part) for part in zip(*results, strict=True))
    assert_accurate(ours, theirs, exact, factor, ulps=ulps, what=what, slack=slack[0] if slack else None, share=share)


def with_slack(spec: OpSpec, inputs: Inputs, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
    """(ours, baseline's, truth) of each output, with what it may be off by where the spec says so."""
    slack = spec.slack(inputs, tuple(exact for _, _, exact in rows))
    return [(*row, s) if s is not None else row for row, s in zip(rows, slack, strict=True)]


def assert_forward_accurate(spec: OpSpec, cases: Sequence[Inputs], what: str, stressed: bool = False) -> None:
    results = []
    for inputs in cases:
        got, theirs = run_forward(spec.function, inputs), run_forward(spec.measure, inputs)
        assert not any(o.requires_grad for o in got), f"{what}: an output requires grad although no input does"
        assert [o.dtype for o in got] == [o.dtype for o in theirs], f"{what}: dtypes {[o.dtype for o in got]}"
        truth = run_forward(spec.reference, in_float64(inputs))
        rows = list(zip(spec.decoded(inputs, got), spec.decoded(inputs, theirs), truth, strict=True))
        results.append(with_slack(spec, inputs, rows))
    for i, pooled in enumerate(zip(*results, strict=True)):
        wide = all(v.dtype == torch.float32 for v in cases[0].values() if is_float(v))
        share = spec.allowance(cases[0], stressed) if wide else 0.0
        _assert_pooled(pooled, spec.forward_factor, f"{what}: output {i}", share=share)


def assert_backward_accurate(
    spec: OpSpec,
    cases: Sequence[Inputs],
    what: str,
    positive: bool = False,
    all_subsets: bool = False,
    stressed: bool = False,
) -> None:
    """Gradients for random grad_outs (of one sign if ``positive``), with every differentiable input wanting one; with
    ``all_subsets`` for the subsets too."""
    results: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for inputs in cases:
        names = differentiable(spec, inputs)
        if not names or spec.vanishing(inputs):
            return
        grad_outs = make_grad_outs(spec, inputs)
        if positive:
            grad_outs = [(1 + g.float().abs() / 8).to(g.dtype) for g in grad_outs]
        _, theirs = run_backward(spec.baseline, inputs, names, grad_outs)
        _, truth = run_backward(spec.reference, in_float64(inputs), names, [g.double() for g in grad_outs])
        for subset in subsets(names) if all_subsets else [tuple(names)]:
            _, got = run_backward(spec.function, inputs, subset, grad_outs)
            for name in subset:
                where = f"{what}: grad of {name} when {', '.join(subset)} require grad"
                assert got[name].dtype == inputs[name].dtype, f"{where}: dtype {got[name].dtype}"
                results.setdefault(where, []).append((got[name], theirs[name], truth[name]))
    for where, pooled in results.items():
        _assert_pooled(pooled, spec.backward_factor, where, share=spec.allowance(cases[0], stressed))


def check_forward_accuracy(
    spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant, sizes: Sequence[Dims] | None = None
) -> None:
    for dims in spec.dims if sizes is None else sizes:
        cases = draws(spec, device, dtype, dims, variant)
        assert_forward_accurate(spec, cases, case_text(spec, dims, dtype, variant))


def check_backward_accuracy(
    spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant, sizes: Sequence[Dims] | None = None
) -> None:
    small = pick_dims(spec, 4, limit=1 << 15)
    for dims in spec.dims if sizes is None else sizes:
        cases = draws(spec, device, dtype, dims, variant)
        assert_backward_accurate(spec, cases, case_text(spec, dims, dtype, variant), all_subsets=dims in small)


def check_value_ranges(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """Large, small and far-from-zero-mean inputs: where squares, sums and differences lose digits."""
    for dims in pick_dims(spec, 5, limit=1 << 17):
        for name, change in spec.values.items():
            cases = [_map_batched(spec, c, change) for c in draws(spec, device, dtype, dims, variant, salt=name)]
            what = case_text(spec, dims, dtype, variant, name)
            assert_forward_accurate(spec, cases, what, stressed=True)
            assert_backward_accurate(spec, cases, what, stressed=True)


def check_unwanted_gradients(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """An input that does not require grad gets none, and one that does gets its own shape, dtype and device."""
    for dims in pick_dims(spec, 3):
        inputs = make_inputs(spec, device, dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        for subset in subsets(differentiable(spec, inputs)):
            leaves = leaves_of(inputs, subset)
            outputs = [o for o in as_tuple(spec.function(**leaves)) if is_float(o)]
            assert all(o.requires_grad for o in outputs), f"{spec.name}: output does not require grad for {subset}"
            torch.autograd.backward(outputs, grad_outs)
            for name, value in leaves.items():
                if not isinstance(value, Tensor):
                    continue
                if name in subset:
                    found = (value.grad.shape, value.grad.dtype, value.grad.device)
                    assert found == (value.shape, value.dtype, value.device), f"{spec.name}: grad of {name}: {found}"
                else:
                    assert value.grad is None, f"{spec.name}: {name} got a gradient but does not require one"


def check_unused_outputs(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """An output that nothing was made of counts as one whose gradient is zero.

    To the last bit on the CPU. A kernel that reads one gradient less may add up in another order: on CUDA each result
    may differ by a rounding, and by what float32 sums differ by.
    """
    for dims in pick_dims(spec, 2, limit=1 << 12):
        inputs = make_inputs(spec, device, dtype, dims, variant)
        names = differentiable(spec, inputs)
        grad_outs = make_grad_outs(spec, inputs)
        for used in subsets([str(i) for i in range(len(grad_outs))]):
            kept = [g if str(i) in used else torch.zeros_like(g) for i, g in enumerate(grad_outs)]
            _, expected = run_backward(spec.function, inputs, names, kept)
            leaves = leaves_of(inputs, names)
            outputs = [o for o in as_tuple(spec.function(**leaves)) if is_float(o)]
            some = [(outputs[int(i)], grad_outs[int(i)]) for i in used]
            wrt = [leaves[n] for n in names]
            got = torch.autograd.grad([o for o, _ in some], wrt, [g for _, g in some], materialize_grads=True)
            for name, ours in zip(names, got, strict=True):
                what = f"{case_text(spec, dims, dtype, variant)}: grad of {name} from outputs {', '.join(used)}"
                if device == "cpu":
                    assert torch.equal(ours, expected[name]), what
                else:
                    size = float(expected[name].abs().max()) if ours.numel() else 0.0
                    torch.testing.assert_close(
                        ours,
                        expected[name],
                        rtol=torch.finfo(ours.dtype).eps,
                        atol=4e-6 * size,
                        msg=lambda m, w=what: f"{w}: {m}",
                    )


def check_double_backward(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """Gradients of the gradients, by inputs and by grad_outs, against the reference's in float64.

    Of an operator without any the error says so.
    """

    def second(function: Any, inputs: Inputs, grad_outs: list[Tensor], along: list[Tensor]) -> list[Tensor]:
        names = differentiable(spec, inputs)
        leaves = leaves_of(inputs, names)
        seeds = [g.detach().requires_grad_() for g in grad_outs]
        outputs = [o for o in as_tuple(function(**leaves)) if is_float(o)]
        wrt = [leaves[n] for n in names]
        first = torch.autograd.grad(outputs, wrt, seeds, create_graph=True)
        along = [a for f, a in zip(first, along, strict=True) if f.requires_grad]
        found = torch.autograd.grad([f for f in first if f.requires_grad], [*wrt, *seeds], along, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, [*wrt, *seeds], strict=True)]

    for dims in pick_dims(spec, 4, limit=1 << 13) if spec.differentiable else []:
        if not spec.second_order:
            _assert_no_second_gradient(spec, device, dtype, dims, variant, second)
            continue
        results = []
        for inputs in draws(spec, device, dtype, dims, variant):
            grad_outs = make_grad_outs(spec, inputs)
            along = [torch.randn_like(inputs[n]) for n in differentiable(spec, inputs)]
            got = second(spec.function, inputs, grad_outs, along)
            theirs = second(spec.baseline, inputs, grad_outs, along)
            wide = [g.double() for g in grad_outs], [a.double() for a in along]
            results.append(list(zip(got, theirs, second(spec.reference, in_float64(inputs), *wide), strict=True)))
        for i, pooled in enumerate(zip(*results, strict=True)):
            what = f"{case_text(spec, dims, dtype, variant)}: second gradient {i}"
            # Two roundings to 16 bit lie between the inputs and a second gradient.
            _assert_pooled(pooled, 2 * spec.backward_factor, what, ulps=8)


def _assert_no_second_gradient(
    spec: OpSpec, device: str, dtype: torch.dtype, dims: Dims, variant: Variant, second: Callable[..., Any]
) -> None:
    inputs = make_inputs(spec, device, dtype, dims, variant)
    along = [torch.randn_like(inputs[n]) for n in differentiable(spec, inputs)]
    with pytest.raises(RuntimeError, match=f"fastkern::{spec.name}: the gradient is not differentiable"):
        second(spec.function, inputs, make_grad_outs(spec, inputs), along)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def check_empty(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """Every dimension 0, alone and together: right shapes, zero gradients for shared operands, nothing raised."""
    kinds = {tuple(dims): dims for dims in spec.dims}
    for dims in kinds.values():
        for zeros in subsets([key for key in dims if key in spec.empty_dims]):
            cases = draws(spec, device, dtype, {**dims, **dict.fromkeys(zeros, 0)}, variant)
            what = case_text(spec, dims, "with 0 for", zeros)
            assert_forward_accurate(spec, cases, what)
            assert_backward_accurate(spec, cases, what, all_subsets=True)


def check_size_one(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    kinds = {tuple(dims): dims for dims in spec.dims}
    for dims in kinds.values():
        for ones in dict.fromkeys([*((key,) for key in dims), tuple(dims)[:-1], tuple(dims)]):
            cases = draws(spec, device, dtype, {**dims, **dict.fromkeys(ones, 1)}, variant)
            what = case_text(spec, dims, "with 1 for", ones)
            assert_forward_accurate(spec, cases, what)
            assert_backward_accurate(spec, cases, what)


# ---- accumulation and batch ------------------------------------------------------------------------------------------


def check_wide_accumulation(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """Long sums of one sign: a 16-bit accumulator stops growing after 256 (bf16) or 2048 (f16) equal terms."""
    for dims in sorted(spec.dims, key=lambda d: max(d.values()))[-6:]:
        inputs = make_inputs(spec, device, dtype, dims, variant)
        # Several, as in draws(): one rounding of a mean far from zero is in every gradient.
        shifts = range(4 if volume(dims) <= 1 << 17 else 1)
        cases = [_map_batched(spec, inputs, lambda t, i=i: 1 + i / 64 + t.abs() / 8) for i in shifts]
        what = case_text(spec, dims, dtype, variant, "of one sign")
        assert_forward_accurate(spec, cases, what, stressed=True)
        assert_backward_accurate(spec, cases, what, positive=True, stressed=True)


def check_batch_invariance(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """A batch entry's output and gradient are bitwise those it has alone, whatever the batch and its place in it."""
    if not spec.batched:
        return
    for base in pick_dims(spec, 6, limit=1 << (16 if device == "cuda" else 13)):
        dims = with_batch(base, 1024)
        inputs = make_inputs(spec, device, dtype, dims, variant)
        batched = batched_names(spec, inputs)
        grad_outs = make_grad_outs(spec, inputs)
        whole = run_all(spec, inputs, grad_outs)
        shared = {f"grad of {n}" for n in differentiable(spec, inputs) if n not in batched}
        for size in (1, 2, 3, 17, 511):
            for start in (0,) if spec.placed(inputs) else (0, 1, 500, 1024 - size):
                part = slice(start, start + size)
                got = run_all(spec, {k: v[part] if k in batched else v for k, v in inputs.items()},
                              [g[part] for g in grad_outs])  # fmt: skip
                for key in whole.keys() - shared:
                    what = f"{case_text(spec, dims, dtype, variant)}: {key} of entries {start}..{start + size - 1}"
                    assert_bitwise(got[key], whole[key][part], what)
