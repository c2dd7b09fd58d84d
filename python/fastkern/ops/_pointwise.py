# SPDX-License-Identifier: Apache-2.0
"""What the pointwise operators share on this side: the ways of a call, fakes, gradients, batching.

An operator has one overload for tensors, the default one, and one for each type of number that stands for an operand:
the stable ABI has no type for "a number of any type". Each is a `Route`. Some seventy of them are registered at import,
so nothing is made before it is needed: the operator's handle, its formula, the classes that carry the formula.

Registration is by dispatch key instead of ``torch.library.register_*``, which takes half a millisecond an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkern.ops import _check

Number = int | float | bool | complex

_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active
_library = torch.library.Library("fastkern", "IMPL")


class Route:
    """One overload of a pointwise operator.

    Attributes:
        name: of the operator.
        overload: "" for tensors alone; else the type of the number and which operand it is.
        op: the operator itself.
    """

    def __init__(
        self, name: str, overload: str, operands: Sequence[str], torch_function: Callable[..., Tensor], gradient: bool
    ) -> None:
        self.name = name
        self._overload = overload
        self._operands = operands
        self._torch_function = torch_function
        qualified = f"{name}.{overload}" if overload else name
        _library.impl(qualified, self._fake, "Meta")
        _library.impl(qualified, self._batched, "FuncTorchBatched", with_keyset=True)
        if gradient:
            _library.impl(qualified, self._below, "Autograd", with_keyset=True)
            self.run = self._run_with_gradient
        else:
            _library.impl(qualified, torch.library.fallthrough_kernel, "Autograd")
            self.run = self._run_without_gradient

    @cached_property
    def op(self) -> Any:
        """``torch.ops.fastkern.<name>.<overload>``."""
        return getattr(getattr(torch.ops.fastkern, self.name), self._overload or "default")

    # ---- calls -------------------------------------------------------------------------------------------------------

    def _run_without_gradient(self, *arguments: Any) -> Tensor:
        return self.op(*arguments)

    def _run_with_gradient(self, *arguments: Any) -> Tensor:
        """The call, with a gradient where one is wanted."""
        if torch.compiler.is_compiling():
            return self.op(*arguments)
        if forward_ad._current_level >= 0:
            return self._torch_function(*arguments)
        if _functorch_active():
            return self._functional.apply(*arguments)
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self._eager.apply(None, *arguments)
        with _below_autograd():
            return self.op(*arguments)

    # ---- gradients ---------------------------------------------------------------------------------------------------

    def _below(self, keyset: Any, *arguments: Any) -> Tensor:
        """The operator called through the dispatcher: its kernel for autograd."""
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self._eager.apply(keyset, *arguments, *self._defaults[len(arguments) :])
        with _below_autograd():
            return self.op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    @cached_property
    def _defaults(self) -> tuple[Any, ...]:
        return tuple(a.default_value for a in self.op._schema.arguments)

    @cached_property
    def _formula(self) -> Any:
        from fastkern.ops import _pointwise_gradient

        return _pointwise_gradient.FORMULAS[self.name]

    @cached_property
    def _eager(self) -> Any:
        """An autograd.Function whose first argument is the dispatcher's keyset, or None."""

        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Tensor:
            with _below_autograd():
                if keyset is None:
                    output = self.op(*arguments)
                else:
                    output = self.op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
            self._save(ctx, arguments, output, ctx.needs_input_grad[1:])
            return output

        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            return None, *self._grads(ctx, dy, ctx.needs_input_grad[1:])

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self.name, (torch.autograd.Function,), members)

    @cached_property
    def _functional(self) -> Any:
        """The same in the form that ``torch.func`` asks for."""

        def forward(*arguments: Any) -> Tensor:
            return self.op(*arguments)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            self._save(ctx, inputs, output, ctx.needs_input_grad)

        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            return tuple(self._grads(ctx, dy, ctx.needs_input_grad))

        members = {
            "generate_vmap_rule": True,
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup),
            "backward": staticmethod(backward),
        }
        return type(self.name, (torch.autograd.Function,), members)

    def _save(self, ctx: Any, arguments: tuple[Any, ...], output: Tensor, needs: Sequence[bool]) -> None:
        if not (output.is_floating_point() or output.is_complex()):
            ctx.mark_non_differentiable(output)
        kept = self._formula.keeps(needs, arguments)
        tensors = [a if isinstance(a, Tensor) and i in kept else None for i, a in enumerate(arguments)]
        ctx.save_for_backward(*tensors, output if -1 in kept else None)
        ctx.numbers = [None if isinstance(a, Tensor) else a for a in arguments]
        ctx.like = [(a.shape, a.dtype) if isinstance(a, Tensor) else None for a in arguments]

    def _grads(self, ctx: Any, dy: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        *tensors, output = ctx.saved_tensors
        arguments = [n if t is None else t for t, n in zip(tensors, ctx.numbers, strict=True)]
        grads = self._formula.grads(dy, arguments, output, needs)
        results: list[Tensor | None] = [None] * len(arguments)
        for i, grad in enumerate(grads):
            if needs[i] and grad is not None:
                results[i] = _shaped(grad, *ctx.like[i])
        return results

    # ---- shapes without values ---------------------------------------------------------------------------------------

    def _fake(self, *arguments: Any, **named: Any) -> Tensor:
        schema = self.op._schema.arguments
        rest = schema[len(arguments) :]
        filled = (*arguments, *(named.get(a.name, a.default_value) for a in rest))
        tensors = [(a.name, v) for a, v in zip(schema, filled, strict=True) if isinstance(v, Tensor)]
        if self.name == "triu":
            check_rank(self.name, tensors[0][1].dim())
        check_broadcast(self.name, tensors)
        try:
            return self._torch_function(*filled)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise RuntimeError(f"fastkern::{self.name}: {tensors[0][0]} is refused: {error}") from None

    # ---- batches -----------------------------------------------------------------------------------------------------

    def _batched(self, keyset: Any, *arguments: Any, **named: Any) -> Any:
        from torch._functorch.autograd_function import custom_function_call_vmap_helper
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        interpreter = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(
            interpreter,  # type: ignore[arg-type]
            self._batching_rule,
            self.op,
            *arguments,
            **named,
        )

    def _batching_rule(self, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        """The batch in front of the dimensions of each entry; an entry without dimensions keeps its say in types."""
        dims = [*in_dims, *([None] * (len(arguments) - len(in_dims)))]
        entries = [
            a if dim is None else a.select(dim, 0) if info.batch_size else a.new_empty(_without(a.shape, dim))
            for a, dim in zip(arguments, dims, strict=True)
        ]
        rank = max(e.dim() for e in entries if isinstance(e, Tensor))
        values = list(arguments)
        common = None
        for i, (value, dim) in enumerate(zip(arguments, dims, strict=True)):
            if dim is None:
                continue
            front = value.movedim(dim, 0)
            values[i] = front.reshape(front.shape[0], *[1] * (rank + 1 - front.dim()), *front.shape[1:])
            if entries[i].dim() == 0 and self._promotes(i):
                common = common or self._common(entries)
                values[i] = values[i].to(common)
        if self.name == "triu" and rank < 2:
            check_rank(self.name, rank)
        return self.op(*values), 0

    def _promotes(self, position: int) -> bool:
        return self.name != "where" or position > 0

    def _common(self, entries: Sequence[Any]) -> torch.dtype:
        """The type that torch finds for operands without a batch."""
        found = [e for i, e in enumerate(entries) if self._promotes(i) and i < len(self._operands) and e is not None]
        if len(found) == 1:
            return found[0].dtype
        result = torch.result_type(found[0], found[1])
        for more in found[2:]:
            result = torch.promote_types(result, torch.result_type(found[0], more))
        return result


def _without(shape: Sequence[int], dim: int) -> list[int]:
    sizes = list(shape)
    del sizes[dim]
    return sizes


def _shaped(grad: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A gradient as its operand is: summed where that was broadcast, in its type."""
    if grad.is_complex() and not dtype.is_complex:
        grad = grad.real
    if grad.shape != shape:
        grad = grad.contiguous().sum_to_size(shape)  # torch adds in an order that depends on strides
    return grad if grad.dtype == dtype else grad.to(dtype)


def check_broadcast(name: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """The check of cpp/torch/pointwise_call.cpp, in the same words."""
    sizes: list[Any] = []
    for argument, t in tensors:
        shape = list(t.shape)
        ahead = len(shape) - len(sizes)
        if ahead > 0:
            sizes = [*shape[:ahead], *sizes]
        offset = len(sizes) - len(shape)
        for d, size in enumerate(shape):
            if size == 1 or size == sizes[offset + d]:
                continue
            if sizes[offset + d] != 1:
                raise RuntimeError(
                    f"fastkern::{name}: {argument} must broadcast with shape {tuple(sizes)}, got {tuple(shape)}"
                )
            sizes[offset + d] = size


def check_rank(name: str, rank: int) -> None:
    """Triangles need rows and columns."""
    if rank < 2:
        raise RuntimeError(f"fastkern::{name}: input must have at least two dimensions, got {rank}")


# ---- results in given places -----------------------------------------------------------------------------------------


def _written(t: Tensor) -> None:
    """Autograd learns that what it may have saved is no longer what it was."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(t)


def _wants_gradient(*arguments: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def into(name: str, overload: str, out: Tensor, *arguments: Any) -> Tensor:
    """``out=``: the overload for it, called with the functional one's arguments."""
    if not isinstance(out, Tensor):
        raise _check.not_a_tensor(name, out=out)
    if _wants_gradient(*arguments, out):
        raise RuntimeError(f"fastkern::{name}: out must be None where an argument requires grad: it has no gradient")
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if out.numel() == 0:  # as torch: a place for results that has no elements takes their shape
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        if out.shape != shape:
            out.resize_(shape)
    # torch's way around such views is for results that are new.
    if not torch.compiler.is_compiling() and (out.is_conj() or out.is_neg()):
        plain = torch.empty_like(out, memory_format=torch.preserve_format)
        return out.copy_(into(name, overload, plain, *arguments))
    ending = f"{overload}_out" if overload else "out"
    getattr(getattr(torch.ops.fastkern, name), ending)(*arguments, out=out)
    _written(out)
    return out


def inplace(name: str, overload: str, run: Callable[..., Tensor], input: Tensor, *arguments: Any) -> Tensor:
    """``<name>_``: over ``input``. Where a gradient is wanted, the result of the functional way is copied there."""
    if _wants_gradient(input, *arguments) or (
        not torch.compiler.is_compiling()
        and (_functorch_active() or forward_ad._current_level >= 0 or input.is_conj() or input.is_neg())
    ):
        result = run(input, *arguments)
        if result.shape != input.shape:
            raise RuntimeError(
                f"fastkern::{name}_: input must have the shape of the result, {tuple(result.shape)}, "
                f"got {tuple(input.shape)}"
            )
        if not torch.can_cast(result.dtype, input.dtype):
            raise RuntimeError(f"fastkern::{name}_: input must be able to hold {result.dtype}, got {input.dtype}")
        return input.copy_(result)
    getattr(getattr(torch.ops.fastkern, f"{name}_"), overload or "default")(input, *arguments)
    _written(input)
    return input
