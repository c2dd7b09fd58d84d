# SPDX-License-Identifier: Apache-2.0
"""Shapes, gradients and batching of the rotary operators. Their functions: rope.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _batching, _gradient, _norm_formula, _rope_check, _rope_formula, _schema
from fastkern.ops._rope_check import Options

_ops = torch.ops.fastkern
Pair = tuple[Tensor, Tensor]
Grads = tuple["Tensor | None", ...]


def _empty(q: Tensor, like: Tensor | None, wanted: bool = True) -> Tensor:
    """A result of the shape of ``like``, contiguous, or what stands for none."""
    if like is None or not wanted:
        return q.new_empty(0)
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _same_for_all_entries(arguments: dict[str, Any]) -> bool:
    """Whether vmap's batch may become part of the first dimension: that of tokens with a position each has none."""
    positions, cos = arguments.get("positions"), arguments["cos"]
    rank = max(t.dim() for t in (arguments["q"], arguments["k"]) if t is not None)
    return rank == 5 and (positions is None or positions.shape[:-1].numel() == 1) and cos.shape[:-2].numel() == 1


# ---- rope ------------------------------------------------------------------------------------------------------------


def _check(op: str, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *options: Any) -> None:
    _rope_check.heads(op, q, k)
    _rope_check.tables(op, q, cos, sin, Options(*options[:4]))


def _fake(q: Tensor, k: Tensor | None, *arguments: Any) -> Pair:
    _check("rope", q, k, *arguments)
    return _empty(q, q), _empty(q, k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    _, k, cos, sin, positions, ctx.interleaved, ctx.rotary_dim, cu_seqlens, ctx.inverse = inputs
    _no_table_gradient("rope", ctx, 2)
    ctx.set_materialize_grads(False)  # a result that is not used must not cost a tensor of zeros
    ctx.with_k = k is not None
    ctx.save_for_backward(cos, sin, positions, cu_seqlens)


def _no_table_gradient(op: str, ctx: Any, first: int) -> None:
    for name, needed in zip(("cos", "sin"), ctx.needs_input_grad[first : first + 2], strict=False):
        if needed:
            raise _rope_check.table_gradient(op, name)


def _grad(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> Grads:
    cos, sin, positions, cu_seqlens = ctx.saved_tensors
    need_q, need_k = ctx.needs_input_grad[:2]
    dq, dk = dq if need_q else None, dk if need_k and ctx.with_k else None
    options = positions, ctx.interleaved, ctx.rotary_dim, cu_seqlens, not ctx.inverse
    # create_graph=True: the gradient must itself be differentiable, and is: it is the same operator.
    turn = with_gradient if torch.is_grad_enabled() else _ops.rope_fwd.default
    if dq is not None:
        dq, turned = turn(dq, dk, cos, sin, *options)
        dk = None if dk is None else turned
    elif dk is not None:
        dk, _ = turn(dk, None, cos, sin, *options)
    return dq, dk, *(None,) * 7


def _composite(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *options: Any) -> Pair:
    _check("rope", q, k, cos, sin, *options)
    angles = _rope_formula.angles(q, cos, sin, Options(*options[:4]), options[4])

    def turn(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else _rope_formula.turn(x, *angles, options[1]).to(q.dtype)

    return turn(q), turn(k)


def _check_entry(*arguments: Any) -> None:
    _check("rope", *arguments)


for _name in ("rope", "rope_fwd"):
    _schema.register_fake(_name, _fake)
    _batching.register(_name, rows=("q", "k"), check=_check_entry, merges=_same_for_all_entries, folds=True)
with_gradient = _gradient.register("rope", save=_save, grad=_grad, composite=_composite)


# ---- in place --------------------------------------------------------------------------------------------------------


def _inplace_fake(q: Tensor, k: Tensor | None, *arguments: Any) -> None:
    _check("rope_", q, k, *arguments)


def _inplace_vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[None, None]:
    """Entry by entry."""
    for name, t, dim in zip(("q", "k"), given, in_dims, strict=False):
        if t is not None and dim is None:
            raise RuntimeError(f"fastkern::rope_: {name} must be batched by vmap too, to be written in place")
    for i in range(info.batch_size):
        entry = (t if dim is None else t.select(dim, i) for t, dim in zip(given, in_dims, strict=True))
        _ops.rope_.default(*entry)
    return None, None


_schema.register_fake("rope_", _inplace_fake)
torch.library.register_vmap("fastkern::rope_", _inplace_vmap)


# ---- behind a norm ---------------------------------------------------------------------------------------------------


def _check_norm(
    op: str,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    weight_offset: float,
    *options: Any,
) -> None:
    _rope_check.heads(op, q, k)
    _rope_check.norm(op, q, eps, weight_offset, q_weight=q_weight, k_weight=k_weight)
    _rope_check.tables(op, q, cos, sin, Options(*options), normed=True)


def _norm_fake(q: Tensor, k: Tensor | None, *arguments: Any) -> Pair:
    _check_norm("qk_norm_rope", q, k, *arguments)
    return _empty(q, q), _empty(q, k)


def _norm_bwd_fake(
    dq_out: Tensor,
    dk_out: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    op = "qk_norm_rope_bwd"
    *call, need_dq, need_dk, need_dq_weight, need_dk_weight = arguments
    _check_norm(op, q, k, q_weight, k_weight, *call)
    _rope_check.like_heads(op, "dq_out", dq_out, q, q)
    if (k is None) != (dk_out is None):
        wanted = "None without k, got a tensor" if k is None else "given with k, got None"
        raise RuntimeError(f"fastkern::{op}: dk_out must be {wanted}")
    if k is not None and dk_out is not None:
        _rope_check.like_heads(op, "dk_out", dk_out, k, q)
    _rope_check.needed(op, need_dk, "need_dk", "k", k)
    _rope_check.needed(op, need_dq_weight, "need_dq_weight", "q_weight", q_weight)
    _rope_check.needed(op, need_dk_weight, "need_dk_weight", "k_weight", k_weight)

    def of_weight(need: bool, weight: Tensor | None) -> Tensor:
        return (q if weight is None else weight).new_empty(q.shape[-1] if need else 0)

    return (
        _empty(q, q, need_dq),
        _empty(q, k, need_dk),
        of_weight(need_dq_weight, q_weight),
        of_weight(need_dk_weight, k_weight),
    )


def _norm_save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, q_weight, k_weight, cos, sin, eps, weight_offset, positions, interleaved, rotary_dim, cu_seqlens = inputs
    _no_table_gradient("qk_norm_rope", ctx, 4)
    ctx.numbers = eps, weight_offset, interleaved, rotary_dim
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens)


def _norm_grad(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> Grads:
    q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens = ctx.saved_tensors
    eps, weight_offset, interleaved, rotary_dim = ctx.numbers
    needs = ctx.needs_input_grad[:4]
    options = positions, interleaved, rotary_dim, cu_seqlens
    dys = dq_out, None if k is None else dk_out
    found: Grads
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        angles = _rope_formula.angles(q, cos, sin, Options(*options), True)
        pairs = [
            (None, None)
            if x is None or dy is None
            else _norm_gradients(dy, x, weight, angles, interleaved, eps, weight_offset)
            for dy, x, weight in zip(dys, (q, k), (q_weight, k_weight), strict=True)
        ]
        found = pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]
    else:
        call = *dys, q, k, q_weight, k_weight, cos, sin, eps, weight_offset, *options
        found = _ops.qk_norm_rope_bwd(*call, *needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 8


def _norm_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    angles: Pair,
    interleaved: bool,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor | None]:
    g = _rope_formula.turn(dy, *angles, interleaved)
    dx, [(dweight, _)] = _norm_formula.norm_gradients("rms", [g], x, [(weight, None)], eps, weight_offset)
    return dx.to(x.dtype), dweight


def _norm_composite(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    weight_offset: float,
    *options: Any,
) -> Pair:
    _check_norm("qk_norm_rope", q, k, q_weight, k_weight, cos, sin, eps, weight_offset, *options)
    angles = _rope_formula.angles(q, cos, sin, Options(*options), False)

    def one(x: Tensor | None, weight: Tensor | None) -> Tensor:
        if x is None:
            return q.new_empty(0)
        (y,) = _norm_formula.norm("rms", x, [(weight, None)], eps, weight_offset, torch.float32)
        return _rope_formula.turn(y, *angles, options[1]).to(q.dtype)

    return one(q, q_weight), one(k, k_weight)


def _check_norm_entry(*arguments: Any) -> None:
    _check_norm("qk_norm_rope", *arguments)


for _name in ("qk_norm_rope", "qk_norm_rope_fwd"):
    _schema.register_fake(_name, _norm_fake)
    _batching.register(_name, rows=("q", "k"), check=_check_norm_entry, merges=_same_for_all_entries, folds=True)
_schema.register_fake("qk_norm_rope_bwd", _norm_bwd_fake)
_batching.register("qk_norm_rope_bwd")
norm_with_gradient = _gradient.register("qk_norm_rope", save=_norm_save, grad=_norm_grad, composite=_norm_composite)
