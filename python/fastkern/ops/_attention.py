# SPDX-License-Identifier: Apache-2.0
"""Shapes, gradients and batching of flash_attn and flash_attn_varlen, which differ in two more arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkern.ops import _attention_check, _attention_flops, _batching, _gradient, _schema
from fastkern.ops._attention_check import Options

_OPERANDS = ("q", "k", "v")
_STARTS = ("cu_seqlens_q", "cu_seqlens_k")
_SAVED = ("dout", "dlse", "q", "k", "v", "out", "lse")
_TENSORS = ("bias", "alibi_slopes", "sinks", "seed", "offset", "prefix", "block_mask", "seqused_q", "seqused_k")
_IS_TENSOR = [name in _TENSORS for name in Options._fields]
_DIFFERENTIABLE = (*_OPERANDS, "bias", "sinks")


# ---- the second derivative, which there is not -----------------------------------------------------------------------


class _DifferentiableOnce(torch.autograd.Function):
    """The gradients as they are, made to depend on what they were made of; an error once they are differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count] if t is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"fastkern::{ctx.op}: the gradient is not differentiable, attention has no second derivative; take "
            "torch.nn.functional.scaled_dot_product_attention with its math backend where you need one"
        )


def _differentiable_once(
    op: str, grads: list[Tensor | None], sources: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    given = [g for g in grads if g is not None]
    marked = iter(_DifferentiableOnce.apply(op, len(given), *given, *sources))
    return [None if g is None else next(marked) for g in grads]


def _has_tangent(t: object) -> bool:
    return isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None


# ---- fakes -----------------------------------------------------------------------------------------------------------


def _empty(like: Tensor, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _fake(op: str, starts: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``starts``: how many arguments come between v and the options."""
    shapes = _attention_check.call(op, q, k, v, rest[:starts], Options(*rest[starts:]))
    return _empty(q, shapes.out), _empty(q, shapes.lse, torch.float32)


def _fake_bwd(
    op: str,
    starts: int,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    options, needs = Options(*rest[starts:-5]), rest[-5:]
    shapes = _attention_check.call(op, q, k, v, rest[:starts], options)
    same = partial(_attention_check.same, op, q=q)
    same("dout", dout, shapes.out, q.dtype)
    if dlse is not None:
        same("dlse", dlse, shapes.lse, torch.float32)
    same("out", out, shapes.out, q.dtype)
    same("lse", lse, shapes.lse, torch.float32)
    _attention_check.needed(op, options, *needs[3:])
    bias = options.bias if options.bias is not None and options.bias.dtype != torch.bool else None
    operands = (q, k, v, bias, options.sinks)
    return tuple(
        _empty(q if t is None else t, t.shape if need and t is not None else 0)
        for t, need in zip(operands, needs, strict=True)
    )


# ---- gradient --------------------------------------------------------------------------------------------------------


def register(op: str, packed: bool) -> Any:
    """Fakes, gradient and batching of an operator; returns the function with a gradient."""
    starts = 2 if packed else 0
    names = (*_OPERANDS, *_STARTS[:starts], *Options._fields)
    slopes = names.index("alibi_slopes")
    differentiable = [names.index(name) for name in _DIFFERENTIABLE]
    missing = (False,) * len(names)
    plain = getattr(torch.ops.fastkern, op).default
    bwd = getattr(torch.ops.fastkern, f"{op}_bwd").default

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        if slopes < len(ctx.needs_input_grad) and ctx.needs_input_grad[slopes]:
            raise RuntimeError(
                f"fastkern::{op}: alibi_slopes must not require grad, it is not differentiable; detach it"
            )
        q, k, v, *rest = inputs
        options = rest[starts:]
        ctx.set_materialize_grads(False)  # an output that is not used must not cost a tensor of zeros
        tensors = [t for t, is_tensor in zip(options, _IS_TENSOR, strict=True) if is_tensor]
        ctx.numbers = [t for t, is_tensor in zip(options, _IS_TENSOR, strict=True) if not is_tensor]
        ctx.save_for_backward(q, k, v, *output, *rest[:starts], *tensors)

    def grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        tensors, numbers = iter(rest[starts:]), iter(ctx.numbers)
        options = Options(*(next(tensors if is_tensor else numbers) for is_tensor in _IS_TENSOR))
        found = (*ctx.needs_input_grad, *missing)  # torch leaves out arguments that equal their default
        needs = [found[place] for place in differentiable]
        grads: list[Tensor | None] = [None] * len(needs)
        if any(needs) and not (dout is None and dlse is None):
            arguments = (torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, out, lse)
            results = bwd(*arguments, *rest[:starts], *options, *needs)
            grads = [g if need else None for g, need in zip(results, needs, strict=True)]
            if torch.is_grad_enabled():  # create_graph=True
                grads = _differentiable_once(op, grads, (dout, dlse, q, k, v, options.bias, options.sinks))
        result: list[Tensor | None] = [None] * len(names)
        for place, g in zip(differentiable, grads, strict=True):
            result[place] = g
        return tuple(result)

    def forward_mode(*inputs: Any) -> Any:
        if any(map(_has_tangent, inputs)):
            raise RuntimeError(
                f"fastkern::{op}: forward-mode differentiation (jvp) is not supported, use backward mode"
            )
        return plain(*inputs)

    fake = partial(_fake, op, starts)
    for name in (op, f"{op}_fwd"):
        _schema.register_fake(name, fake)
        _batching.register(name, rows=() if packed else _OPERANDS, check=fake, merges=_entries_are_alike, folds=True)
    fake_bwd = partial(_fake_bwd, f"{op}_bwd", starts)
    _schema.register_fake(f"{op}_bwd", fake_bwd)
    _batching.register(
        f"{op}_bwd", rows=() if packed else _SAVED, check=fake_bwd, merges=_entries_are_alike, folds=True
    )
    return _gradient.register(op, save=save, grad=grad, composite=forward_mode)


# ---- batching --------------------------------------------------------------------------------------------------------


def _entries_are_alike(arguments: dict[str, Any]) -> bool:
    """Whether nothing depends on the place of an entry in the batch, and nothing is summed over it."""
    slopes, bias = arguments["alibi_slopes"], arguments["bias"]
    return (
        not arguments["dropout_p"]
        and all(arguments[name] is None for name in ("prefix", "seqused_q", "seqused_k"))
        and (slopes is None or slopes.dim() == 1)
        and (bias is None or bias.shape[0] == 1)
        and not arguments.get("need_dbias")
        and not arguments.get("need_dsinks")
    )


_attention_flops.register_when_imported()
