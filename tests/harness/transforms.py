# SPDX-License-Identifier: Apache-2.0
"""torch.library.opcheck, torch.compile, export, vmap, autocast, checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastkern.specs import Dims, Inputs, OpSpec, assert_accurate, in_float64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.cases import (
    Variant,
    as_tuple,
    assert_all_bitwise,
    assert_bitwise,
    assert_same,
    batched_names,
    case_text,
    differentiable,
    is_float,
    largest_dims,
    leaves_of,
    make_grad_outs,
    make_inputs,
    pick_dims,
    run_all,
    run_backward,
    run_both,
    run_forward,
    strided_names,
)
from harness.layouts import column_slice, step_slice

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class RecordCalls(TorchDispatchMode):
    """Keeps every call of a fastkern operator below autograd: the public one and its helpers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastkern":
            self.calls.append((func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def helper_calls(spec: OpSpec, inputs: Inputs) -> dict[str, Call]:
    """One call of each operator that the public function takes on its ways: op name -> (op, args, kwargs)."""
    grad_outs = make_grad_outs(spec, inputs)
    recorder = RecordCalls()
    with recorder:
        run_forward(spec.function, inputs)
        for subset in [[n] for n in differentiable(spec, inputs)] + [differentiable(spec, inputs)]:
            if subset:
                run_backward(spec.function, inputs, subset, grad_outs)
    detached = {}
    for op, args, kwargs in recorder.calls:
        plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        detached[op._schema.name.removeprefix("fastkern::")] = (op, plain, kwargs)
    return detached


def check_opcheck(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """Schema, autograd registration, fake kernel and AOT dispatch, for samples with and without grad and strides."""
    sizes = pick_dims(spec, 2, limit=1 << 12)
    for dims, strided in ((sizes[0], False), (sizes[-1], True)):
        inputs = make_inputs(spec, device, dtype, dims, variant)
        for name in strided_names(spec, inputs) if strided else []:
            inputs[name] = column_slice(inputs[name]) if inputs[name].dim() > 1 else step_slice(inputs[name])
        for names in {(), tuple(differentiable(spec, inputs))}:
            torch.library.opcheck(spec.op, (), leaves_of(inputs, names))
        for name, (op, args, kwargs) in helper_calls(spec, inputs).items():
            if name != spec.name:
                torch.library.opcheck(op, args, kwargs)


def check_direct_op(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """``torch.ops.fastkern.<op>`` itself: the same results and gradients as the Python function."""
    for dims in pick_dims(spec, 2):
        inputs = make_inputs(spec, device, dtype, dims, variant)
        what = case_text(spec, dims, dtype, variant, "through torch.ops")
        grad_outs = make_grad_outs(spec, inputs)
        names = differentiable(spec, inputs)
        expected, expected_grads = run_both(spec.function, inputs, names, grad_outs)
        got, grads = run_both(spec.op, inputs, names, grad_outs)
        assert_all_bitwise(grads, expected_grads, what)
        for ours, theirs in zip(got, expected, strict=True):
            assert_bitwise(ours, theirs, what)


# ---- compile and export ----------------------------------------------------------------------------------------------


def compile_sizes(spec: OpSpec) -> list[Dims]:
    """Four sizes of one kind without 0, 1 or two equal numbers, which torch would specialise on."""
    kind = tuple(spec.dims[0])
    good = [d for d in spec.dims if tuple(d) == kind and min(d.values()) > 1 and len(set(d.values())) == len(d)]
    good = [d for d in good if max(d.values()) <= 4096]
    return good[:: max(1, len(good) // 4)][:4]


def check_compile(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant, backend: str = "aot_eager") -> None:
    """fullgraph, dynamic: one graph for four sizes, forward and backward, with the values of the eager op."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    sizes = compile_sizes(spec)
    assert len(sizes) == 4, f"{spec.name}: dims holds no four sizes of one kind to compile for"
    _, constants = _tensors_and_constants(make_inputs(spec, device, dtype, sizes[0], variant))
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(**tensors: Tensor) -> Any:
        return spec.function(**tensors, **constants)

    for dims in sizes:
        inputs, _ = _tensors_and_constants(make_inputs(spec, device, dtype, dims, variant))
        grad_outs = make_grad_outs(spec, {**inputs, **constants})
        names = differentiable(spec, inputs)
        expected, expected_grads = run_both(spec.function, {**inputs, **constants}, names, grad_outs)
        # Else dynamo traces a float first as a symbol and then again as the constant it turns out to be.
        with torch._dynamo.config.patch(specialize_float=True):
            got, grads = run_both(compiled, inputs, names, grad_outs)
        what = case_text(spec, dims, dtype, variant, f"compiled by {backend}")
        for ours, theirs in zip(got, expected, strict=True):
            assert_bitwise(ours, theirs, what)
        assert_all_bitwise(grads, expected_grads, what)
    assert counter.frame_count == 1, f"{spec.name}: {counter.frame_count} graphs for {len(sizes)} sizes"


def _tensors_and_constants(inputs: Inputs) -> tuple[dict[str, Tensor], Inputs]:
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    return tensors, {k: v for k, v in inputs.items() if k not in tensors}


class _Caller(torch.nn.Module):
    """The op as a module whose only inputs are its tensors; the rest is constant."""

    def __init__(self, function: Callable[..., Any], names: list[str], constants: Inputs) -> None:
        super().__init__()
        self.function, self.names, self.constants = function, names, constants

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(**dict(zip(self.names, tensors, strict=True)), **self.constants)


def check_export(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """torch.export with a dynamic batch holds the op as a node and runs at another batch size."""
    sizes = compile_sizes(spec)[1]
    tensors, constants = _tensors_and_constants(make_inputs(spec, device, dtype, sizes, variant))
    names = list(tensors)
    batch = torch.export.Dim("batch", min=2)
    batched = batched_names(spec, tensors)
    shapes = (tuple({0: batch} if name in batched else None for name in names),)
    module = _Caller(spec.function, names, constants)
    with torch.no_grad():
        program = torch.export.export(module, tuple(tensors.values()), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(t.startswith(f"fastkern.{spec.name}") for t in targets), f"{spec.name}: exported as {targets}"
    first = next(iter(sizes))
    more = 3 * sizes[first] + 1 if batched else sizes[first]
    other = make_inputs(spec, device, dtype, {**sizes, first: more}, variant)
    got = as_tuple(program.module()(*(other[name] for name in names)))
    for ours, theirs in zip(got, run_forward(spec.function, other), strict=True):
        assert_bitwise(ours, theirs, f"{spec.name}: exported")


# ---- function transforms ---------------------------------------------------------------------------------------------


def check_vmap(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """vmap over each floating-point input alone and all together, at dim 0 and at the last, equals a loop."""
    for dims in largest_dims(spec, limit=1 << 10):
        copies = [make_inputs(spec, device, dtype, dims, variant, salt=i) for i in range(3)]
        tensors = [k for k, v in copies[0].items() if is_float(v)]
        for mapped in [[name] for name in tensors] + [tensors]:
            for dim in (0, -1):
                rows = [{**copies[0], **{k: c[k] for k in mapped}} for c in copies]
                stacked = {k: torch.stack([c[k] for c in copies], dim) for k in mapped}
                fixed = {k: v for k, v in copies[0].items() if k not in mapped}
                with torch.no_grad():
                    got = torch.func.vmap(lambda s, fixed=fixed: spec.function(**s, **fixed), in_dims=dim)(stacked)
                for i, ours in enumerate(as_tuple(got)):
                    expected = torch.stack([run_forward(spec.function, row)[i] for row in rows])
                    what = f"{case_text(spec, dims, dtype)}: vmap over {mapped} at dim {dim}"
                    assert_same(spec, ours, expected, what)


def _weighted_squares(output: Tensor) -> Tensor:
    """A loss with a gradient to speak of: the plain sum of squares of a normalised row hardly depends on it."""
    weights = torch.linspace(0.5, 1.5, output.shape[-1], device=output.device, dtype=output.dtype)
    return (output * weights).square().sum()


def check_per_sample_gradients(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """vmap(grad(...)): the gradient of every sample on its own, as the reference in float64 gives it."""
    for dims in largest_dims(spec, limit=1 << 10) if spec.differentiable and spec.batched else []:
        copies = [make_inputs(spec, device, dtype, dims, variant, salt=i) for i in range(3)]
        names = differentiable(spec, copies[0])
        batched = {k: torch.stack([c[k] for c in copies]) for k in batched_names(spec, copies[0]) if k in names}
        shared = {k: copies[0][k] for k in names if k not in batched}
        fixed = {k: v for k, v in copies[0].items() if k not in batched and k not in shared}

        def per_sample(function: Any, batched: Inputs, shared: Inputs, fixed: Inputs) -> Inputs:
            def loss(one: Inputs, common: Inputs) -> Tensor:
                outputs = as_tuple(function(**one, **common, **fixed))
                return sum(_weighted_squares(o if o.dtype == torch.float64 else o.float()) for o in outputs)

            one_grad, common_grad = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(
                batched, shared
            )
            return {**one_grad, **common_grad}

        got = per_sample(spec.function, batched, shared, fixed)
        theirs = per_sample(spec.measure, batched, shared, fixed)
        truth = per_sample(spec.reference, in_float64(batched), in_float64(shared), in_float64(fixed))
        for name in got:
            what = f"{case_text(spec, dims, dtype, variant)}: per-sample grad of {name}"
            # The loss is made of rounded outputs, which the float64 truth does not have: a few more ulps.
            assert_accurate(got[name], theirs[name], truth[name], spec.backward_factor, ulps=16, what=what,
                            share=spec.allowance(copies[0], False))  # fmt: skip


def check_batched_gradients(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """A backward under vmap (is_grads_batched, as in Jacobians) equals one backward after the other."""
    for dims in largest_dims(spec, limit=1 << 10) if spec.differentiable else []:
        inputs = make_inputs(spec, device, dtype, dims, variant)
        names = differentiable(spec, inputs)
        leaves = leaves_of(inputs, names)
        outputs = [o for o in as_tuple(spec.function(**leaves)) if is_float(o)]
        several = [make_grad_outs(spec, inputs) for _ in range(3)]
        stacked = [torch.stack(g) for g in zip(*several, strict=True)]
        wrt = [leaves[name] for name in names]
        got = torch.autograd.grad(outputs, wrt, stacked, is_grads_batched=True, retain_graph=True)
        for i, grad_outs in enumerate(several):
            expected = torch.autograd.grad(outputs, wrt, grad_outs, retain_graph=True)
            for name, ours, theirs in zip(names, got, expected, strict=True):
                assert_same(spec, ours[i], theirs, f"{case_text(spec, dims, dtype)}: batched grad {i} of {name}")


def check_autocast(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """Autocast changes neither dtypes nor values."""
    for dims in pick_dims(spec, 2):
        inputs = make_inputs(spec, device, dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        expected = run_all(spec, inputs, grad_outs)
        with torch.autocast(device, dtype=torch.bfloat16):
            got = run_all(spec, inputs, grad_outs)
        assert_all_bitwise(got, expected, f"{case_text(spec, dims, dtype, variant)}: under autocast")


def check_checkpoint(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """torch.utils.checkpoint recomputes the same values."""
    from torch.utils.checkpoint import checkpoint

    def checkpointed(**inputs: Any) -> Any:
        return checkpoint(spec.function, use_reentrant=False, **inputs)

    for dims in pick_dims(spec, 2):
        inputs = make_inputs(spec, device, dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        names = differentiable(spec, inputs)
        _, expected = run_both(spec.function, inputs, names, grad_outs)
        _, got = run_both(checkpointed, inputs, names, grad_outs)
        assert_all_bitwise(got, expected, f"{case_text(spec, dims, dtype, variant)}: checkpointed")
