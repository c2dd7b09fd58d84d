# SPDX-License-Identifier: Apache-2.0
"""Dropout, alone and between a bias and a residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _activation_check as _own
from fastkern.ops import _batching, _check, _gradient, _philox, _schema

_ops = torch.ops.fastkern
_dropout_fwd = _ops.dropout_fwd.default
_bias_dropout_add_fwd = _ops.bias_dropout_add_fwd.default


def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, seed: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """Dropout: elements of ``x`` are 0 with probability ``p``, and the others multiplied by ``1 / (1 - p)``.

    What ``torch.nn.functional.dropout`` computes, with a mask that is drawn again in backward instead of stored. The
    same operator is ``torch.ops.fastkern.dropout``, which draws no seed and has no ``training``.

    Args:
        x: any shape, float32, float16 or bfloat16, on the CPU or a CUDA device; any strides.
        p: probability, 0 to 1, that an element is dropped.
        training: False: nothing is dropped, and ``x`` itself is returned.
        seed: one int64 on the device of ``x``. None: seed and offset are drawn by ``torch.randint`` from torch's
            generator of that device, so ``torch.manual_seed`` repeats a run and ``torch.utils.checkpoint`` repeats a
            forward.
        offset: one int64 on the device of ``x``, a second part of the seed, e.g. a step; None: 0, at the price of a
            small kernel if ``seed`` is given.

    Returns:
        The shape and dtype of ``x``, contiguous; ``x`` itself if not ``training``.

    Raises:
        RuntimeError: a dtype, shape, device or number other than the above; the message names the argument.
        TypeError: ``x`` is no tensor.

    Notes:
        * Whether an element is dropped depends on (seed, offset, its index) alone, by Philox 4x32-10 (Salmon, Moraes,
          Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): not on device, strides or launch.
        * Seed and offset are read on the device: a captured CUDA graph draws anew when they change.
        * A dropped element is 0 even if it was NaN or infinite.
        * Works under ``torch.compile``, ``torch.export``, ``torch.func`` and CUDA graph capture.
    """
    if not training:
        if not isinstance(x, Tensor):
            raise _check.not_a_tensor("dropout", x=x)
        return x
    if p and seed is None:
        seed, offset = _philox.draw("dropout", offset, x=x)
    if _gradient.wanted("dropout", ("x", "seed", "offset"), x, seed, offset):
        return _dropout_with_gradient(x, p, seed, offset)
    return _dropout_fwd(x, p, seed, offset)


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The end of a transformer block: ``residual + dropout(x + bias)``. Megatron's bias, dropout and add.

    The same operator is ``torch.ops.fastkern.bias_dropout_add``, which draws no seed and has no ``training``.

    Args:
        x: (..., N), float32, float16 or bfloat16, on the CPU or a CUDA device; any strides, read in place as those of
            :func:`rms_norm`.
        bias: (N,), float32, float16 or bfloat16; None: none.
        residual: (..., N), float32, float16 or bfloat16; any strides.
        p: as in :func:`dropout`.
        training: False: nothing is dropped.
        seed: as in :func:`dropout`.
        offset: as in :func:`dropout`.

    Returns:
        (..., N), contiguous, the dtype of ``residual``. Computed in float32 and rounded once.

    Raises:
        RuntimeError: a dtype, shape, device or number other than the above; the message names the argument.
        TypeError: an operand is no tensor.

    Notes:
        * What is said of :func:`dropout` on the mask holds here.
        * Deterministic, forward and backward. The gradient of ``bias`` is summed up in the pass that writes the one of
          ``x``; the gradient of ``residual`` is the one that comes in, the same tensor.
        * Backward saves ``bias``, seed and offset, and neither ``x`` nor a mask.
    """
    op = "bias_dropout_add"
    p = p if training else 0.0
    if p and seed is None:
        seed, offset = _philox.draw(op, offset, x=x)
    names = ("x", "bias", "residual", "seed", "offset")
    if _gradient.wanted(op, names, x, bias, residual, seed, offset):
        return _bias_dropout_add_with_gradient(x, bias, residual, p, seed, offset)
    return _bias_dropout_add_fwd(x, bias, residual, p, seed, offset)


def _dropped(x: Tensor, p: float, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """In differentiable torch operations, of float32."""
    if p == 0 or seed is None:
        return x
    return torch.where(_philox.keep_mask(x.shape, p, seed, offset), x * _philox.keep_scale(p), 0.0)


def _same_for_all_rows(arguments: dict[str, Any]) -> bool:
    """A mask counts elements from the start of the tensor."""
    return not arguments.get("p")


# ---- dropout ---------------------------------------------------------------------------------------------------------


def _dropout_check(op: str, name: str, x: Tensor, p: float, seed: Tensor | None, offset: Tensor | None) -> None:
    _check.float_tensor(op, name, x)
    _own.dropout(op, x, p, seed, offset, name)


def _dropout_fake(x: Tensor, p: float, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    _dropout_check("dropout", "x", x, p, seed, offset)
    return _own.empty(x)


def _dropout_bwd_fake(dy: Tensor, p: float, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    _dropout_check("dropout_bwd", "dy", dy, p, seed, offset)
    return _own.empty(dy)


def _dropout_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed, offset = inputs
    ctx.save_for_backward(seed, offset)


def _dropout_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    seed, offset = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        return _dropped(dy.float(), ctx.p, seed, offset).to(dy.dtype), None, None, None
    return _ops.dropout_bwd(dy, ctx.p, seed, offset), None, None, None


def _dropout_composite(x: Tensor, p: float, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    _dropout_check("dropout", "x", x, p, seed, offset)
    return _dropped(x.float(), p, seed, offset).to(x.dtype)


for _name, _fake in (("dropout", _dropout_fake), ("dropout_fwd", _dropout_fake), ("dropout_bwd", _dropout_bwd_fake)):
    _schema.register_fake(_name, _fake)
    _batching.register(_name, rows=("dy" if _name == "dropout_bwd" else "x",), check=_fake, merges=_same_for_all_rows)
_dropout_with_gradient = _gradient.register(
    "dropout", save=_dropout_save, grad=_dropout_grad, composite=_dropout_composite
)


# ---- bias, dropout and residual --------------------------------------------------------------------------------------


def _add_check(
    x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None, offset: Tensor | None
) -> None:
    op = "bias_dropout_add"
    _check.float_tensor(op, "x", x)
    _check.at_least_one_dimension(op, "x", x.dim())
    _own.bias(op, x, bias)
    _own.like_x(op, x, "residual", residual, same_dtype=False)
    _own.dropout(op, x, p, seed, offset)


def _add_fake(
    x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None, offset: Tensor | None
) -> Tensor:
    _add_check(x, bias, residual, p, seed, offset)
    return _own.empty(x, residual.dtype)


def _add_bwd_fake(
    dy: Tensor, bias: Tensor | None, p: float, seed: Tensor | None, offset: Tensor | None,
    x_dtype: torch.dtype | None, need_dx: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "bias_dropout_add_bwd"
    _check.float_tensor(op, "dy", dy)
    _check.at_least_one_dimension(op, "dy", dy.dim())
    _own.bias(op, dy, bias, "dy")
    _own.dropout(op, dy, p, seed, offset, "dy")
    dtype = _check.float_dtype(op, "x_dtype", x_dtype, dy.dtype)
    _own.needed(op, need_dbias, bias, "need_dbias", "bias")
    dx = _own.empty(dy, dtype) if need_dx else dy.new_empty(0, dtype=dtype)
    no_dbias = dy.new_empty(0, dtype=torch.float32 if bias is None else bias.dtype)
    return dx, _own.empty(bias) if need_dbias and bias is not None else no_dbias


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, _, ctx.p, seed, offset = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(bias, seed, offset)


def _add_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    bias, seed, offset = ctx.saved_tensors
    need_dx, need_dbias = ctx.needs_input_grad[0], bias is not None and ctx.needs_input_grad[1]
    dresidual = dy if ctx.needs_input_grad[2] else None
    dx, dbias = None, None
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        dz = _dropped(dy.float(), ctx.p, seed, offset)
        dx = dz.to(ctx.x_dtype)
        dbias = dz.flatten(0, -2).sum(0).to(bias.dtype) if need_dbias else None
    elif need_dx or need_dbias:
        dx, dbias = _ops.bias_dropout_add_bwd(dy, bias, ctx.p, seed, offset, ctx.x_dtype, need_dx, need_dbias)
    return dx if need_dx else None, dbias if need_dbias else None, dresidual, None, None, None


def _add_composite(
    x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None, offset: Tensor | None
) -> Tensor:
    _add_check(x, bias, residual, p, seed, offset)
    z = x.float() if bias is None else x.float() + bias.float()
    return (residual.float() + _dropped(z, p, seed, offset)).to(residual.dtype)


for _name in ("bias_dropout_add", "bias_dropout_add_fwd"):
    _schema.register_fake(_name, _add_fake)
    _batching.register(_name, rows=("x", "residual"), check=_add_check, merges=_same_for_all_rows)
_schema.register_fake("bias_dropout_add_bwd", _add_bwd_fake)
_batching.register("bias_dropout_add_bwd")
_bias_dropout_add_with_gradient = _gradient.register(
    "bias_dropout_add", save=_add_save, grad=_add_grad, composite=_add_composite
)
