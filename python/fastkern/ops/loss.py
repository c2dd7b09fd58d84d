# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over the last dimension."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkern.ops import _batching, _check, _gradient, _loss_check, _loss_formula, _schema
from fastkern.ops._loss_check import Options

_fwd = torch.ops.fastkern.cross_entropy_fwd.default
_bwd = torch.ops.fastkern.cross_entropy_bwd.default
_grad_inplace = torch.ops.fastkern.cross_entropy_grad_.default
scale_unless_one = torch.ops.fastkern.scale_unless_one_.default


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = ..., ignore_index: int = ...,
    label_smoothing: float = ..., lse_square_scale: float = ..., softcap: float = ..., logit_scale: float = ...,
    reduction: str = ..., return_lse: Literal[False] = ..., return_z_loss: Literal[False] = ...,
    inplace_backward: bool = ...
) -> Tensor: ...  # fmt: skip


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = ..., ignore_index: int = ...,
    label_smoothing: float = ..., lse_square_scale: float = ..., softcap: float = ..., logit_scale: float = ...,
    reduction: str = ..., *, return_lse: Literal[True], return_z_loss: bool = ..., inplace_backward: bool = ...
) -> tuple[Tensor, ...]: ...  # fmt: skip


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = ..., ignore_index: int = ...,
    label_smoothing: float = ..., lse_square_scale: float = ..., softcap: float = ..., logit_scale: float = ...,
    reduction: str = ..., *, return_lse: bool = ..., return_z_loss: Literal[True], inplace_backward: bool = ...
) -> tuple[Tensor, ...]: ...  # fmt: skip


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = ..., ignore_index: int = ...,
    label_smoothing: float = ..., lse_square_scale: float = ..., softcap: float = ..., logit_scale: float = ...,
    reduction: str = ..., return_lse: bool = ..., return_z_loss: bool = ..., inplace_backward: bool = ...
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    return_lse: bool = False,
    return_z_loss: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Cross entropy of rows of logits, in float32 whatever the dtype of the logits.

    Of a row ``x`` with class weights ``w``::

        z     = softcap * tanh(logit_scale * x / softcap)      or logit_scale * x without a softcap
        lse   = log(sum(exp(z)))
        q     = (1 - label_smoothing) * one_hot(target) + label_smoothing / V
        loss  = sum(w * q * (lse - z)) + zloss,                zloss = lse_square_scale * lse**2

    ``"mean"`` divides the cross entropy by the sum of the weights of the targets, as torch does, and zloss by the
    number of rows that count; with probabilities both by the number of rows. The same operator is
    ``torch.ops.fastkern.cross_entropy``, which always returns the loss, lse, zloss and what backward needs.

    Args:
        logits: (..., V), float32, float16 or bfloat16, on the CPU or a CUDA device. Any strides and storage offset:
            rows are read in place when the last dimension is dense and the leading ones merge into at most two strides;
            otherwise a dense copy is made first.
        target: classes, (...) in int64 or int32; or probabilities, (..., V) in float32, float16 or bfloat16 (not
            necessarily the dtype of ``logits``).
        weight: (V,), one for each class, float32, float16 or bfloat16; None: ones. As little differentiable as
            ``target``.
        ignore_index: the class of rows that do not count. The loss, lse and gradient of such a row are 0, whatever its
            logits. Of no meaning with probabilities.
        label_smoothing: between 0 and 1, as in :func:`torch.nn.functional.cross_entropy`.
        lse_square_scale: factor of the z-loss; 0: none.
        softcap: bound of the logits, a positive float32, as in Gemma 2; 0: none.
        logit_scale: multiplies the logits first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        return_lse: return also lse, (...), differentiable.
        return_z_loss: return also zloss, reduced like the loss, of which it is a part; differentiable.
        inplace_backward: compute the gradient in forward and **write it over the logits**: one read and one write of
            them for both passes, and no memory for a gradient. For ``"mean"`` and ``"sum"``; contiguous logits that
            nobody else uses. Only the loss is differentiable then, and backward may run once. Where no gradient is
            wanted, and under ``torch.compile`` and ``torch.func``, it changes nothing and the logits stay.

    Returns:
        The loss in float32, () or (...); with ``return_lse`` or ``return_z_loss`` a tuple of it and what was asked for.
        The mean over no rows is NaN, as in torch.

    Raises:
        RuntimeError: a dtype, shape, device or number other than the above; on the CPU also a class outside of 0 to
            V - 1 other than ``ignore_index``. On CUDA such a row's loss and gradient are NaN, and no memory outside of
            the operands is touched.
        TypeError: an operand is no tensor.

    Notes:
        * Deterministic, forward and backward. Batch-invariant: a row's loss and lse do not depend on other rows.
        * Backward reads the logits once and writes their gradient, in their dtype, rounded once.
        * Works under ``torch.compile``, ``torch.export``, ``torch.func`` (``vmap``, ``grad``, ``jvp``) and CUDA graph
          capture. Forward mode and second derivatives take plain PyTorch formulas.
        * Infinities and NaN give what torch gives; lse is NaN where ``log_softmax`` is, so for rows with +inf.
    """
    number = _loss_check.reduction_number("cross_entropy", reduction)
    arguments = (logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, number)
    if _gradient.wanted("cross_entropy", ("logits", "target", "weight"), logits, target, weight):
        if inplace_backward and not torch.compiler.is_compiling() and not _gradient.transformed():
            _check_inplace(*arguments)
            results = _InPlace.apply(*arguments)
        else:
            results = _with_gradient(*arguments)
    else:
        if inplace_backward and number == 0:
            _refuse_none()
        results = _fwd(*arguments)
    if not (return_lse or return_z_loss):
        return results[0]
    return (results[0], *([results[1]] if return_lse else []), *([results[2]] if return_z_loss else []))


# ---- shapes and gradient ---------------------------------------------------------------------------------------------


def _fake(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    return _empty_outputs("cross_entropy", logits, target, weight, Options(*options))


def _empty_outputs(op: str, logits: Tensor, target: Tensor, weight: Tensor | None, o: Options) -> tuple[Tensor, ...]:
    _check.float_tensor(op, "logits", logits)
    _loss_check.call(op, logits.shape, logits, "logits", target, weight, o)
    rows = logits.shape[:-1]
    of_loss = () if o.reduction else rows
    empty = [logits.new_empty(shape, dtype=torch.float32) for shape in (of_loss, rows, of_loss)]
    return (*empty, logits.new_empty(_loss_check.state_size(logits.shape), dtype=torch.int32))


def _fake_grad_inplace(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    op, o = "cross_entropy_grad_", Options(*options)
    outputs = _empty_outputs(op, logits, target, weight, o)
    if o.reduction == 0:
        raise RuntimeError(f"fastkern::{op}: reduction must be 1 (mean) or 2 (sum), got {o.reduction}")
    return outputs[:3]


def _fake_bwd(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dzloss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    state: Tensor,
    *options: Any,
) -> Tensor:
    op, o = "cross_entropy_bwd", Options(*options)
    _check.float_tensor(op, "logits", logits)
    _loss_check.call(op, logits.shape, logits, "logits", target, weight, o)
    _check.defined(op, "state", state)
    if state.dtype != torch.int32:
        raise RuntimeError(f"fastkern::{op}: state must be torch.int32, got {state.dtype}")
    _check.shape(op, "state", state, (_loss_check.state_size(logits.shape),))
    _check.device(op, "state", state, logits, "logits")
    rows = logits.shape[:-1]
    of_loss = () if o.reduction else rows
    for name, t, shape in (("dloss", dloss, of_loss), ("dlse", dlse, rows), ("dzloss", dzloss, of_loss)):
        _loss_check.gradient(op, name, t, shape, logits, "logits")
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _loss_check.not_differentiable("cross_entropy", ctx.needs_input_grad, target=1, weight=2)
    logits, target, *rest = inputs
    rest += _DEFAULTS[len(rest) :]
    ctx.set_materialize_grads(False)  # an output that is not used must not cost a tensor of zeros
    ctx.mark_non_differentiable(output[3])
    ctx.options = Options(*rest[1:])
    ctx.save_for_backward(logits, target, rest[0], output[3])


def _grad(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, dzloss: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    logits, target, weight, state = ctx.saved_tensors
    none = (None,) * (2 + len(Options._fields))
    if dloss is None and dlse is None and dzloss is None:
        return None, *none
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        wide = _loss_formula.gradient(dloss, dlse, dzloss, logits, target, weight, ctx.options)
        return wide.to(logits.dtype), *none
    return _bwd(dloss, dlse, dzloss, logits, target, weight, state, *ctx.options), *none


def _composite(logits: Tensor, target: Tensor, weight: Tensor | None = None, *options: Any) -> tuple[Tensor, ...]:
    _empty_outputs("cross_entropy", logits, target, weight, Options(*options))
    return _loss_formula.cross_entropy(logits, target, weight, Options(*options))


_DEFAULTS = (None, *Options())
for _name in ("cross_entropy", "cross_entropy_fwd"):
    _schema.register_fake(_name, _fake)
    _batching.register(_name)
_schema.register_fake("cross_entropy_bwd", _fake_bwd)
_batching.register("cross_entropy_bwd")
_schema.register_fake("cross_entropy_grad_", _fake_grad_inplace)
_schema.register_fake("scale_unless_one_", lambda x, factor: None)
_with_gradient = _gradient.register("cross_entropy", save=_save, grad=_grad, composite=_composite)


# ---- the gradient in forward, over the logits ------------------------------------------------------------------------


def _refuse_none() -> None:
    raise RuntimeError(
        "fastkern::cross_entropy: inplace_backward must be False with reduction='none', whose gradient is not known "
        "before backward, got True"
    )


def _check_inplace(logits: Tensor, *arguments: Any) -> None:
    if arguments[-1] == 0:
        _refuse_none()
    wanted = [isinstance(t, Tensor) and t.requires_grad for t in arguments[:2]]
    _loss_check.not_differentiable("cross_entropy", wanted, target=0, weight=1)
    base = logits._base if logits._is_view() else None
    whole = logits if base is None else base
    problem = (
        "a leaf that requires grad" if whole.is_leaf and whole.requires_grad
        else "a part of another tensor" if whole.numel() != logits.numel()
        else "a tensor that is not contiguous" if not logits.is_contiguous()
        else None
    )  # fmt: skip
    if problem is not None:
        raise RuntimeError(
            "fastkern::cross_entropy: logits must be a contiguous tensor of their own, and the result of an operation, "
            f"to be overwritten with inplace_backward=True; got {problem}"
        )


class _InPlace(torch.autograd.Function):
    """Overwrites the logits with their gradient; backward multiplies it with the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        loss, lse, zloss = _grad_inplace(logits, *arguments)
        torch.autograd.graph.increment_version(logits)
        ctx.mark_non_differentiable(lse, zloss)
        ctx.save_for_backward(logits)
        ctx.given = False
        return loss, lse, zloss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.given:
            raise RuntimeError(
                "fastkern::cross_entropy: logits held the gradient with inplace_backward=True, which was used already; "
                "use inplace_backward=False to run backward more than once"
            )
        (logits,) = ctx.saved_tensors
        ctx.given = True
        grad = logits.detach()
        scale_unless_one(grad, dloss)
        torch.autograd.graph.increment_version(grad)
        return grad, *(None,) * (2 + len(Options._fields))
