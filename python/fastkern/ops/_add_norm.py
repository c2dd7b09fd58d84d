# SPDX-License-Identifier: Apache-2.0
"""Shapes, gradients and batching of the add_*_norm operators, both kinds of norm, one output or two.

What has one output is treated as what has two with the second left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkern.ops import _batching, _check, _gradient, _norm_check, _norm_formula, _schema

_BRANCH = ("dropout_p", "seed", "offset", "rowscale", "residual_dtype", "out_dtype")
_ONE = ("x", "residual", "weight", "bias", "eps", "weight_offset", *_BRANCH)
_TWO = ("x", "residual", "weight", "bias", "weight2", "bias2", "eps", "weight_offset", *_BRANCH)
_ROWS = ("x", "residual", "rowscale")


class Call(NamedTuple):
    """The arguments of a forward, whatever their order in the schema."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None
    eps: float
    weight_offset: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    offset: Tensor | None = None
    rowscale: Tensor | None = None
    residual_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None


def check_stream(op: str, call: Call, scale: Tensor | None = None) -> torch.dtype:
    """Everything but what concerns y; the dtype of h. ``scale``: of a quantised y, if it is given."""
    x = call.x
    _norm_check.begin(op, x, call.eps, call.weight_offset)
    _norm_check.rows(op, x, residual=call.residual)
    _norm_check.affine(op, x, weight=call.weight, bias=call.bias, weight2=call.weight2, bias2=call.bias2)
    _norm_check.rowscale(op, x, call.rowscale)
    _norm_check.dropout(op, x, call.dropout_p, call.seed, call.offset)
    if scale is not None:
        _check.one_element(op, "scale", scale, torch.float32, x)
    otherwise = x.dtype if call.residual is None else call.residual.dtype
    return _check.float_dtype(op, "residual_dtype", call.residual_dtype, otherwise)


def _check_call(op: str, call: Call) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of y and h."""
    stream = check_stream(op, call)
    return _check.float_dtype(op, "out_dtype", call.out_dtype, call.x.dtype), stream


def _affine(call: Any, parallel: bool) -> list[_norm_formula.Affine]:
    return [(call.weight, call.bias), (call.weight2, call.bias2)][: 1 + parallel]


# ---- forward ---------------------------------------------------------------------------------------------------------


def _fake(op: str, call: Call, parallel: bool) -> tuple[Tensor, ...]:
    out, stream = _check_call(op, call)
    empty = _norm_check.empty_rows
    return (*(empty(call.x, out) for _ in range(1 + parallel)), empty(call.x, stream))


def _composite(op: str, kind: str, call: Call, parallel: bool) -> tuple[Tensor, ...]:
    out, stream = _check_call(op, call)
    branch = _norm_formula.branch(call.x, call.dropout_p, call.seed, call.offset, call.rowscale)
    h = (branch if call.residual is None else call.residual.float() + branch).to(stream)
    affine = _affine(call, parallel)
    return (*_norm_formula.norm(kind, h, affine, call.eps, call.weight_offset, out), h)


# ---- backward --------------------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What backward needs of a forward, and the arguments of the backward operators after the gradients."""

    h: Tensor
    weight: Tensor | None
    bias: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None
    eps: float
    weight_offset: float
    dropout_p: float
    seed: Tensor | None
    offset: Tensor | None
    rowscale: Tensor | None
    x_dtype: torch.dtype | None
    residual_dtype: torch.dtype | None


def _save(ctx: Any, op: str, call: Call, outputs: tuple[Tensor, ...], rowscale_wanted: bool) -> None:
    if rowscale_wanted:
        raise RuntimeError(f"fastkern::{op}: rowscale must not require grad, it is not differentiable; detach it")
    ctx.set_materialize_grads(False)  # an output that is not used must not cost a tensor of zeros
    ctx.save_for_backward(
        outputs[-1], call.weight, call.bias, call.weight2, call.bias2, call.seed, call.offset, call.rowscale
    )
    residual_dtype = None if call.residual is None else call.residual.dtype
    ctx.numbers = call.eps, call.weight_offset, call.dropout_p, call.x.dtype, residual_dtype


def _saved(ctx: Any) -> _Saved:
    h, weight, bias, weight2, bias2, seed, offset, rowscale = ctx.saved_tensors
    eps, weight_offset, dropout_p, x_dtype, residual_dtype = ctx.numbers
    return _Saved(
        h, weight, bias, weight2, bias2, eps, weight_offset, dropout_p, seed, offset, rowscale, x_dtype, residual_dtype
    )


Needs = tuple[bool, ...]  # of x, residual, weight, bias, weight2, bias2
Grads = tuple["Tensor | None", ...]


def _grads(bwd: Any, s: _Saved, dys: list[Tensor], dh: Tensor | None, needs: Needs) -> Grads:
    need_x, need_residual, *need_parameters = needs
    same = s.dropout_p == 0 and s.rowscale is None and s.x_dtype == s.residual_dtype
    if same:  # one tensor, written once
        needs = (need_x or need_residual, False, *need_parameters)
    stream = s[5:]
    if len(dys) == 2:
        found = bwd(*dys, dh, s.h, s.weight, s.bias, s.weight2, s.bias2, *stream, *needs)
    else:
        found = bwd(*dys, dh, s.h, s.weight, s.bias, *stream, *needs[:4])
    return (found[0], found[0], *found[2:]) if same else found


def _grads_differentiable(kind: str, s: _Saved, dys: list[Tensor], dh: Tensor | None) -> Grads:
    affine = _affine(s, len(dys) == 2)
    d, parameters = _norm_formula.norm_gradients(kind, dys, s.h, affine, s.eps, s.weight_offset)
    if dh is not None:
        d = d + dh.float()
    dx = _norm_formula.branch(d, s.dropout_p, s.seed, s.offset, s.rowscale).to(s.x_dtype)
    dresidual = None if s.residual_dtype is None else d.to(s.residual_dtype)
    return (dx, dresidual, *(grad for pair in parameters for grad in pair))


def _fake_bwd(op: str, kinds: int, *arguments: Any) -> tuple[Tensor, ...]:
    """``kinds``: how many outputs the forward has beside h."""
    dys, dh, h = arguments[:kinds], arguments[kinds], arguments[kinds + 1]
    parameters, rest = arguments[kinds + 2 :][: 2 * kinds], arguments[3 * kinds + 2 :]
    eps, weight_offset, dropout_p, seed, offset, rowscale, x_dtype, residual_dtype, need_dx, need_dresidual = rest[:10]
    names = ("weight", "bias", "weight2", "bias2")[: 2 * kinds]
    _norm_check.begin(op, h, eps, weight_offset, "h")
    _norm_check.rows(op, h, "h", **dict(zip(("dy", "dy2"), dys, strict=False)), dh=dh)
    _norm_check.affine(op, h, "h", **dict(zip(names, parameters, strict=True)))
    _norm_check.rowscale(op, h, rowscale, "h")
    _norm_check.dropout(op, h, dropout_p, seed, offset, "h")
    x_dtype = _check.float_dtype(op, "x_dtype", x_dtype, h.dtype)
    residual_dtype = _check.float_dtype(op, "residual_dtype", residual_dtype, h.dtype)
    pairs = tuple(zip(rest[10:], parameters, strict=True))
    _norm_check.needed(op, **dict(zip(names, pairs, strict=True)))

    def rows(need: bool, dtype: torch.dtype) -> Tensor:
        return _norm_check.empty_rows(h, dtype) if need else h.new_empty(0, dtype=dtype)

    return (
        rows(need_dx, x_dtype),
        rows(need_dresidual, residual_dtype),
        *(_norm_check.empty_gradient(need, operand, h) for need, operand in pairs),
    )


# ---- registration ----------------------------------------------------------------------------------------------------


def _same_for_all_rows(arguments: dict[str, Any]) -> bool:
    """A mask counts elements from the start of the tensor."""
    return not arguments.get("dropout_p")


def register(op: str, kind: str, parallel: bool) -> Any:
    """Fakes, gradient and batching of an operator; returns the function with a gradient."""
    order = _schema.Order(op, _TWO if parallel else _ONE)
    bwd = getattr(torch.ops.fastkern, f"{op}_bwd").default
    no_second = () if parallel else (None, None)
    grads_of_rest = (None,) * (len(_TWO) - 6)
    rowscale = (_TWO if parallel else _ONE).index("rowscale")

    def call_of(arguments: tuple[Any, ...]) -> Call:
        ordered = order.family(arguments)
        return Call(*ordered[:4], *no_second, *ordered[4:])

    def check(*arguments: Any) -> None:
        _check_call(op, call_of(arguments))

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        return _fake(op, call_of(arguments), parallel)

    def composite(*arguments: Any) -> tuple[Tensor, ...]:
        return _composite(op, kind, call_of(arguments), parallel)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, op, call_of(inputs), output, order.needs(ctx)[rowscale])

    def grad(ctx: Any, *grad_outs: Tensor | None) -> Grads:
        *given, dh = grad_outs
        saved = _saved(ctx)
        dys = [saved.h.new_zeros(saved.h.shape[-1:]).expand(saved.h.shape) if dy is None else dy for dy in given]
        needs = order.needs(ctx)[: 4 + 2 * parallel]
        if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
            grads = _grads_differentiable(kind, saved, dys, dh)
        else:
            grads = _grads(bwd, saved, dys, dh, needs)
        found = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        return order.operator((*found, *grads_of_rest))

    for name in (op, f"{op}_fwd"):
        _schema.register_fake(name, fake)
        _batching.register(name, rows=_ROWS, check=check, merges=_same_for_all_rows)
    _schema.register_fake(f"{op}_bwd", partial(_fake_bwd, f"{op}_bwd", 1 + parallel))
    _batching.register(f"{op}_bwd")
    return _gradient.register(op, save=save, grad=grad, composite=composite)


def register_in_place(op: str) -> None:
    """Fake and batching of an operator that writes h over residual."""
    order = _schema.Order(op, ("x", "residual", "weight", "bias", "eps", "weight_offset", "out_dtype"))

    def check(*arguments: Any) -> torch.dtype:
        x, residual, weight, bias, eps, weight_offset, out_dtype = order.family(arguments)
        call = Call(x, residual, weight, bias, None, None, eps, weight_offset, out_dtype=out_dtype)
        return _check_call(op, call)[0]

    def fake(*arguments: Any) -> Tensor:
        return _norm_check.empty_rows(arguments[0], check(*arguments))

    _schema.register_fake(op, fake)
    _batching.register(op, rows=("x", "residual"), check=check, mutates="residual")
