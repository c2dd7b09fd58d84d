# SPDX-License-Identifier: Apache-2.0
"""A linear layer and the cross entropy of its results, which are never there all at once."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkern.ops import _batching, _check, _gradient, _loss_check, _loss_formula, _schema
from fastkern.ops.loss import scale_unless_one

_part = torch.ops.fastkern.cross_entropy_part_.default
_sums = torch.ops.fastkern.cross_entropy_sums_.default
_OP = "linear_cross_entropy"


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., lse_square_scale: float = ..., softcap: float = ...,
    logit_scale: float = ..., reduction: str = ..., chunk_rows: int | None = ..., return_lse: Literal[False] = ...,
    return_z_loss: Literal[False] = ...
) -> Tensor: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., lse_square_scale: float = ..., softcap: float = ...,
    logit_scale: float = ..., reduction: str = ..., chunk_rows: int | None = ..., *, return_lse: Literal[True],
    return_z_loss: bool = ...
) -> tuple[Tensor, ...]: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., lse_square_scale: float = ..., softcap: float = ...,
    logit_scale: float = ..., reduction: str = ..., chunk_rows: int | None = ..., *, return_lse: bool = ...,
    return_z_loss: Literal[True]
) -> tuple[Tensor, ...]: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., lse_square_scale: float = ..., softcap: float = ...,
    logit_scale: float = ..., reduction: str = ..., chunk_rows: int | None = ..., return_lse: bool = ...,
    return_z_loss: bool = ...
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    return_lse: bool = False,
    return_z_loss: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``cross_entropy(hidden @ weight.T + bias, target, ...)`` without the logits of more than a chunk of rows.

    Chunks of rows go through torch's matrix product; the cross entropy writes their gradient over the logits; two more
    products take it to ``hidden`` and ``weight``. So forward computes the gradients as well, of those operands that
    want one, and backward multiplies them with the gradient of the loss. ``torch.ops.fastkern.linear_cross_entropy`` is
    the same and returns the loss.

    Args:
        hidden: (..., H), float32, float16 or bfloat16. Any strides; what is not contiguous is copied.
        weight: (V, H), in the dtype of ``hidden``; likewise.
        target: classes (...) in int64 or int32, or probabilities (..., V), as in :func:`cross_entropy`.
        bias: (V,), in the dtype of ``hidden``, or None.
        class_weight: the ``weight`` of :func:`cross_entropy`.
        ignore_index: as in :func:`cross_entropy`.
        label_smoothing: as in :func:`cross_entropy`.
        lse_square_scale: as in :func:`cross_entropy`.
        softcap: as in :func:`cross_entropy`.
        logit_scale: as in :func:`cross_entropy`.
        reduction: as in :func:`cross_entropy`. With ``"none"`` the gradient is known in backward only, which then
            computes the logits once more.
        chunk_rows: rows of a chunk; None: as many as make 1,004 MiB of logits, in chunks of one size. The result
            depends on it by rounding alone.
        return_lse: return also lse, (...); not differentiable.
        return_z_loss: return also zloss, a part of the loss; not differentiable.

    Returns:
        The loss in float32, () or (...); with ``return_lse`` or ``return_z_loss`` a tuple.

    Raises:
        RuntimeError: as in :func:`cross_entropy`.
        TypeError: an operand is no tensor.

    Notes:
        * Memory beside the gradients: one chunk of logits and some bytes a row.
        * Logits are rounded to the dtype of ``hidden``, as those of a linear layer are, and so is their gradient. That
          of the weight is added up over the chunks in its own dtype.
        * The gradient is made for a loss whose own gradient is 1. In float16 small gradients of the logits are lost
          then (below 6e-8): use bfloat16, or ``"sum"``.
        * Deterministic. Not batch-invariant: torch picks a matrix product by the number of rows.
        * A second backward through one graph computes the gradients again.
    """
    number = _loss_check.reduction_number(_OP, reduction)
    options = (ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, number, chunk_rows or 0)
    arguments = (hidden, weight, target, bias, class_weight, *options)
    names = ("hidden", "weight", "target", "bias", "class_weight")
    if _gradient.wanted(_OP, names, hidden, weight, target, bias, class_weight):
        results = _with_gradient(*arguments)
    else:
        results = _fwd(*arguments)
    if not (return_lse or return_z_loss):
        return results[0]
    return (results[0], *([results[1]] if return_lse else []), *([results[2]] if return_z_loss else []))


class _Arguments(NamedTuple):
    """Of the operators that compute gradients."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    class_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    reduction: int = 1
    chunk_rows: int = 0
    dloss: Tensor | None = None
    need_dhidden: bool = False
    need_dweight: bool = False
    need_dbias: bool = False

    @property
    def options(self) -> _loss_check.Options:
        return _loss_check.Options(*self[5:11])


# ---- shapes and checks -----------------------------------------------------------------------------------------------


def _checked(a: _Arguments) -> tuple[Any, ...]:
    """The shape that the logits would have; raises unless everything fits."""
    hidden, weight = a.hidden, a.weight
    _check.float_tensor(_OP, "hidden", hidden)
    _check.at_least_one_dimension(_OP, "hidden", hidden.dim())
    _check.float_tensor(_OP, "weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise RuntimeError(
            f"fastkern::{_OP}: weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}"
        )
    shape = (*hidden.shape[:-1], weight.shape[0])
    for name, t in (("weight", weight), ("bias", a.bias)):
        if t is None:
            continue
        _check.float_tensor(_OP, name, t)
        if t.dtype != hidden.dtype:
            raise RuntimeError(f"fastkern::{_OP}: {name} must be {hidden.dtype} like hidden, got {t.dtype}")
        _check.device(_OP, name, t, hidden, "hidden")
    if a.bias is not None:
        _check.shape(_OP, "bias", a.bias, shape[-1:])
    _loss_check.call(_OP, shape, hidden, "hidden", a.target, a.class_weight, a.options, weight="class_weight")
    if a.chunk_rows < 0:
        raise RuntimeError(f"fastkern::{_OP}: chunk_rows must be >= 0, got {a.chunk_rows}")
    if a.need_dbias and a.bias is None:
        raise RuntimeError(f"fastkern::{_OP}: need_dbias must be False without bias, got True")
    _loss_check.gradient(_OP, "dloss", a.dloss, shape[:-1], hidden, "hidden")
    if a.dloss is not None and a.reduction:
        raise RuntimeError(f"fastkern::{_OP}: dloss must be None with reduction 1 (mean) or 2 (sum), got a tensor")
    return shape


def _empty_gradients(a: _Arguments) -> list[Tensor]:
    """Contiguous; without elements where they are not needed."""
    operands = (a.hidden, a.weight, a.weight if a.bias is None else a.bias)
    needs = (a.need_dhidden, a.need_dweight, a.need_dbias)
    return [t.new_empty(t.shape if need else 0) for t, need in zip(operands, needs, strict=True)]


def _fake(*given: Any) -> tuple[Tensor, ...]:
    a = _Arguments(*given)
    shape = _checked(a)
    rows = shape[:-1]
    of_loss = () if a.reduction else rows
    empty = [a.hidden.new_empty(s, dtype=torch.float32) for s in (of_loss, rows, of_loss)]
    return (*empty, *_empty_gradients(a))


# ---- the operator ----------------------------------------------------------------------------------------------------

_TILE = 128  # rows
_CHUNK_BYTES = 1004 << 20


def rows_in(memory: int, classes: int, itemsize: int) -> int:
    """Rows of logits that so many bytes hold: a multiple of 128, no fewer."""
    return max(memory // (classes * itemsize) // _TILE * _TILE, _TILE)


def chunk_of(rows: int, classes: int, itemsize: int) -> int:
    """Rows of a chunk: as many as make 1,004 MiB of logits, no fewer than 128, in parts of one size but the last."""
    most = rows_in(_CHUNK_BYTES, classes, itemsize)
    if rows <= most:
        return max(rows, 1)
    per_part = math.ceil(rows / math.ceil(rows / most))
    return math.ceil(per_part / _TILE) * _TILE


def _compute(*given: Any) -> tuple[Tensor, ...]:
    """The operator on the CPU and on CUDA."""
    a = _Arguments(*given)
    shape = _checked(a)
    if a.reduction == 0 and a.dloss is None and (a.need_dhidden or a.need_dweight or a.need_dbias):
        raise RuntimeError(
            f"fastkern::{_OP}: dloss must be given with reduction 0 (none) where a gradient is needed, got None"
        )
    with torch.no_grad():
        return _compute_chunks(a, shape)


def _compute_chunks(a: _Arguments, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    classes, width = a.weight.shape
    count = torch.Size(shape[:-1]).numel()
    hidden, weight = a.hidden.contiguous().view(count, width), a.weight.contiguous()
    bias = None if a.bias is None else a.bias.contiguous()
    soft = a.target.is_floating_point()
    target = a.target.contiguous().view((count, classes) if soft else count)
    dloss = None if a.dloss is None else a.dloss.contiguous().view(count)
    gradients = dhidden, dweight, dbias = _empty_gradients(a)
    wanted = a.need_dhidden or a.need_dweight or a.need_dbias
    rows = hidden.new_empty((3, count), dtype=torch.float32)
    totals = hidden.new_empty(2, dtype=torch.float32)
    of_sums = (classes, a.ignore_index, a.reduction)
    _sums(target, a.class_weight, totals, None, *of_sums)
    chunk = min(a.chunk_rows or chunk_of(count, classes, weight.element_size()), max(count, 1))
    buffer = weight.new_empty((chunk, classes))
    columns = weight.t()
    ones = weight.new_ones((1, chunk)) if a.need_dbias else None
    for first in range(0, count, chunk):
        size = min(chunk, count - first)
        logits, part = buffer[:size], hidden[first : first + size]
        if bias is None:
            torch.mm(part, columns, out=logits)
        else:
            torch.addmm(bias, part, columns, out=logits)
        _part(logits, target, a.class_weight, totals, rows, dloss, first, wanted, *a.options)
        if a.need_dhidden:
            torch.mm(logits, weight, out=dhidden.view(count, width)[first : first + size])
        if a.need_dweight:
            _product(logits.t(), part, dweight, first > 0)
        if ones is not None:
            _product(ones[:, :size], logits, dbias.view(1, classes), first > 0)
    if count == 0:
        dweight.zero_()
        dbias.zero_()
    if a.reduction:
        loss, zloss = _sums(target, a.class_weight, totals, rows, *of_sums)
        return loss, rows[2].view(shape[:-1]).clone(), zloss, *gradients
    loss, zloss, lse = (row.view(shape[:-1]).clone() for row in (rows[0], rows[1], rows[2]))
    return loss, lse, zloss, *gradients


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    if add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


_library = torch.library.Library("fastkern", "IMPL")
_GRADS = "linear_cross_entropy_grads"
for _name in (_GRADS, f"{_GRADS}_fwd"):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _schema.complete(_name, _compute), _key)
    _schema.register_fake(_name, _fake)
    _batching.register(_name)
_schema.register_fake("cross_entropy_part_", lambda *arguments: None)
_fwd = getattr(torch.ops.fastkern, f"{_GRADS}_fwd").default


# ---- gradient --------------------------------------------------------------------------------------------------------


_NONE = (None,) * (len(_Arguments._fields) - 4)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _loss_check.not_differentiable(_OP, ctx.needs_input_grad, target=2, class_weight=4)
    a = _Arguments(*inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.numbers = a[5:12]
    ctx.save_for_backward(*a[:5], *output[3:])


def _grad(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *operands, dhidden, dweight, dbias = ctx.saved_tensors
    return _gradients(ctx, _Arguments(*operands, *ctx.numbers), (dhidden, dweight, dbias), dloss, in_place=False)


def _gradients(
    ctx: Any, a: _Arguments, made: tuple[Tensor, ...] | None, dloss: Tensor | None, in_place: bool
) -> tuple[Tensor | None, ...]:
    """What backward returns; ``made``: the gradients that forward has made, if they are still there."""
    if dloss is None:
        return None, None, None, None, *_NONE
    found = (*ctx.needs_input_grad, *_NONE)
    needs = (bool(found[0]), bool(found[1]), bool(found[3]) and a.bias is not None)
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        grads = _differentiable_gradients(a, dloss)
    elif a.reduction == 0:
        grads = list(_fwd(*a[:12], dloss, *needs)[3:])
    else:
        made = made or _fwd(*a[:12], None, *needs)[3:]
        grads = [_scaled(g, dloss, in_place) if need else g for g, need in zip(made, needs, strict=True)]
    of_hidden, of_weight, of_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return of_hidden, of_weight, None, of_bias, *_NONE


def _scaled(g: Tensor, dloss: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return (g.float() * dloss).to(g.dtype)
    scale_unless_one(g, dloss)
    return g


def _differentiable_gradients(a: _Arguments, dloss: Tensor) -> list[Tensor]:
    hidden, weight = a.hidden.float(), a.weight.float()
    logits = F.linear(hidden, weight, None if a.bias is None else a.bias.float())
    dlogits = _loss_formula.gradient(dloss, None, None, logits, a.target, a.class_weight, a.options)
    flat = dlogits.reshape(-1, weight.shape[0])
    dweight = flat.t() @ hidden.reshape(-1, weight.shape[1])
    return [t.to(a.hidden.dtype) for t in (dlogits @ weight, dweight, flat.sum(0))]


def _composite(*inputs: Any) -> tuple[Tensor, ...]:
    a = _Arguments(*inputs)
    _checked(a)
    logits = F.linear(a.hidden, a.weight, a.bias)
    results = _loss_formula.cross_entropy(logits, a.target, a.class_weight, a.options)
    return *results[:3], *_empty_gradients(a)


_through_operators = _gradient.register(_GRADS, save=_save, grad=_grad, composite=_composite)


class _Eager(torch.autograd.Function):
    """Backward hands out the gradients that forward made, multiplied in place; once, then they are made anew."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _fwd(*inputs)
        _save(ctx, inputs, output)
        a = _Arguments(*inputs)
        ctx.save_for_backward(*a[:5])
        ctx.made = output[3:]
        return output

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        a, made = _Arguments(*ctx.saved_tensors, *ctx.numbers), ctx.made
        batched = dloss is not None and torch._C._functorch.is_legacy_batchedtensor(dloss)  # is_grads_batched
        in_place = not (batched or _gradient.transformed() or torch.is_grad_enabled())
        if in_place and dloss is not None:
            ctx.made = None
        return _gradients(ctx, a, made, dloss, in_place)


def _with_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    a = _Arguments(*arguments)
    every = _gradient.transformed()
    needs = [isinstance(t, Tensor) and (every or t.requires_grad) for t in (a.hidden, a.weight, a.bias)]
    if a.reduction == 0:
        needs = [False] * 3  # known in backward
    inputs = (*a[:12], None, *needs)
    if torch.compiler.is_compiling() or every:
        return _through_operators(*inputs)
    return _Eager.apply(*inputs)


def _loss_alone(*given: Any) -> Tensor:
    """``torch.ops.fastkern.linear_cross_entropy``: differentiable, as it is made of operators that are."""
    a = _Arguments(*given)
    _checked(a)
    tensors = (a.hidden, a.weight, a.target, a.bias, a.class_weight)
    names = ("hidden", "weight", "target", "bias", "class_weight")
    if _gradient.wanted(_OP, names, *tensors):
        return _with_gradient(*a[:12])[0]
    return _fwd(*a[:12])[0]


_library.impl(_OP, _schema.complete(_OP, _loss_alone), "CompositeImplicitAutograd")
