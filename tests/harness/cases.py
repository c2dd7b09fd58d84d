# SPDX-License-Identifier: Apache-2.0
"""Inputs of a spec row, calls with and without gradients, and bitwise comparison."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from fastkern.specs import Dims, Inputs, OpSpec
from torch import Tensor

Variant = Mapping[str, Any]
Grads = dict[str, Tensor]


def seed_for(*parts: Any) -> int:
    """A seed that depends on the case alone, so that one test run alone sees what the whole suite sees."""
    return zlib.crc32(repr(parts).encode())


def make_inputs(
    spec: OpSpec, device: str, dtype: torch.dtype, dims: Dims, variant: Variant, salt: Any = None
) -> Inputs:
    torch.manual_seed(seed_for(spec.name, dtype, sorted(dims.items()), str(variant), salt))
    return spec.make(**dims, **variant, dtype=dtype, device=device)


def dims_text(dims: Dims) -> str:
    return "x".join(f"{key}{value}" for key, value in dims.items())


def case_text(spec: OpSpec, dims: Dims, *more: Any) -> str:
    return " ".join([spec.name, dims_text(dims), *(str(m) for m in more)])


def variant_text(variant: Variant) -> str:
    return "-".join(f"{k}_{str(v).removeprefix('torch.')}" for k, v in variant.items()) or "default"


def volume(dims: Dims) -> int:
    total = 1
    for value in dims.values():
        total *= value
    return total


def pick_dims(spec: OpSpec, count: int, limit: int = 1 << 40) -> list[Dims]:
    """At most ``count`` sizes of each kind (set of dimension names), small to large, none above ``limit`` elements."""
    kinds: dict[tuple[str, ...], list[Dims]] = {}
    for dims in spec.dims:
        if volume(dims) <= limit:
            kinds.setdefault(tuple(dims), []).append(dims)
    picked: list[Dims] = []
    for members in kinds.values():
        members.sort(key=volume)
        steps = min(count, len(members))
        picked += [members[(i * (len(members) - 1)) // max(steps - 1, 1)] for i in range(steps)]
    return picked


def largest_dims(spec: OpSpec, limit: int) -> list[Dims]:
    """The largest size of each kind that has at most ``limit`` elements."""
    return list({tuple(dims): dims for dims in pick_dims(spec, 2, limit)}.values())


def with_batch(dims: Dims, batch: int) -> Dims:
    """The same sizes with the leading dimension, by convention the first one named, replaced."""
    first = next(iter(dims))
    return {**dims, first: batch}


# ---- calls -----------------------------------------------------------------------------------------------------------


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def differentiable(spec: OpSpec, inputs: Inputs) -> list[str]:
    """Names of the inputs that are there and may require grad."""
    return [name for name in spec.differentiable if is_float(inputs.get(name))]


def subsets(names: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """All non-empty subsets; of more than three names those of one, of all but one, and of all."""
    for size in range(1, len(names) + 1):
        if len(names) <= 3 or size in (1, len(names) - 1, len(names)):
            yield from combinations(names, size)


def batched_names(spec: OpSpec, inputs: Inputs) -> list[str]:
    """Those whose entries belong to the entries of the batch; operands that all entries share are none of them."""
    given = [name for name in spec.batched if isinstance(inputs.get(name), Tensor)]
    return [name for name in given if inputs[name].shape[:1] == inputs[given[0]].shape[:1]]


def strided_names(spec: OpSpec, inputs: Inputs) -> list[str]:
    return [name for name in spec.strided if isinstance(inputs.get(name), Tensor)]


def leaves_of(inputs: Inputs, names: Iterable[str]) -> Inputs:
    """The same tensors (memory and strides kept) as leaves; those named require grad."""
    wanted = set(names)
    return {k: v.detach().requires_grad_(k in wanted) if is_float(v) else v for k, v in inputs.items()}


def run_forward(function: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return as_tuple(function(**inputs))


def run_backward(
    function: Callable[..., Any], inputs: Inputs, names: Sequence[str], grad_outs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Grads]:
    """Outputs and the gradients of the inputs named."""
    leaves = leaves_of(inputs, names)
    outputs = [o for o in as_tuple(function(**leaves)) if o.is_floating_point()]
    grads = torch.autograd.grad(outputs, [leaves[name] for name in names], list(grad_outs))
    return tuple(o.detach() for o in outputs), dict(zip(names, grads, strict=True))


def run_both(
    function: Callable[..., Any], inputs: Inputs, names: Sequence[str], grad_outs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Grads]:
    """run_backward, or the outputs alone where nothing has a gradient."""
    return run_backward(function, inputs, names, grad_outs) if names else (run_forward(function, inputs), {})


def decoded(spec: OpSpec, inputs: Inputs, function: Callable[..., Any]) -> tuple[Tensor, ...]:
    """The function's outputs, as the numbers they stand for."""
    return spec.decoded(inputs, run_forward(function, inputs))


def make_grad_outs(spec: OpSpec, inputs: Inputs) -> list[Tensor]:
    """A random gradient for each floating-point output (shapes from the op itself, without running a backward)."""
    if not differentiable(spec, inputs):
        return []
    outputs = run_forward(spec.function, inputs)
    return [torch.randn(o.shape, device=o.device, dtype=torch.float32).to(o.dtype) for o in outputs if is_float(o)]


def run_all(spec: OpSpec, inputs: Inputs, grad_outs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Everything the op gives: outputs with no grad wanted, outputs of the differentiable route, all gradients."""
    results = {f"output {i}": o for i, o in enumerate(run_forward(spec.function, inputs))}
    names = differentiable(spec, inputs)
    if names:
        outputs, grads = run_backward(spec.function, inputs, names, grad_outs)
        results |= {f"output {i} (grad mode)": o for i, o in enumerate(outputs)}
        results |= {f"grad of {name}": g for name, g in grads.items()}
    return results


# ---- comparison ------------------------------------------------------------------------------------------------------


def bits(t: Tensor) -> Tensor:
    """The tensor's bytes, so that NaNs compare equal to themselves and -0 differs from +0."""
    return t.detach().contiguous().flatten().view(torch.uint8)


def assert_bitwise(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if torch.equal(bits(got), bits(expected)):
        return
    got, expected = (t.flatten().float() if t.element_size() == 1 else t.flatten() for t in (got, expected))
    differs = got != expected
    differs &= ~(got.isnan() & expected.isnan())
    if not differs.any():
        raise AssertionError(f"{what}: equal values, but not the same zeros or NaNs, in {got.numel()} elements")
    first = int(differs.nonzero()[0])
    where = f"first at flat index {first}: {got[first]} against {expected[first]}"
    raise AssertionError(f"{what}: {int(differs.sum())} of {got.numel()} values differ, {where}")


def assert_all_bitwise(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    assert got.keys() == expected.keys(), f"{what}: {sorted(got)} against {sorted(expected)}"
    for name in expected:
        assert_bitwise(got[name], expected[name], f"{what}: {name}")


def assert_same(spec: OpSpec, got: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise, or but for rounding where that is all the operator promises."""
    if spec.reproducible or not expected.is_floating_point():
        assert_bitwise(got, expected, what)
        return
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), f"{what}: {got.dtype} {tuple(got.shape)}"
    if expected.numel():
        wide = expected.double()
        atol = 16 * torch.finfo(got.dtype).eps * float(wide.nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(got.double(), wide, rtol=0, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}")


def assert_all_same(spec: OpSpec, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    assert got.keys() == expected.keys(), f"{what}: {sorted(got)} against {sorted(expected)}"
    for name in expected:
        assert_same(spec, got[name], expected[name], f"{what}: {name}")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
