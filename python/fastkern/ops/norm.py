# SPDX-License-Identifier: Apache-2.0
"""Normalisations over the last dimension."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _batching, _check, _gradient, _norm_check, _norm_formula, _schema

_rms_norm_fwd = torch.ops.fastkern.rms_norm_fwd.default
_layer_norm_fwd = torch.ops.fastkern.layer_norm_fwd.default


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Root-mean-square normalisation: ``x * rsqrt(mean(x**2, -1) + eps) * (weight_offset + weight) + bias``.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. The same operator is
    ``torch.ops.fastkern.rms_norm``; this function leaves out the autograd wrapper when no gradient is needed.

    Args:
        x: (..., N), float32, float16 or bfloat16, on the CPU or a CUDA device. Any strides and storage offset:
            rows are read in place when the last dimension is dense and the leading ones merge into at most two
            strides (so also a slice of a fused projection); otherwise a dense copy is made first.
        weight: (N,), or (H, N) where x is (..., H, N): a weight for each head. float32, float16 or bfloat16 (not
            necessarily the dtype of ``x``), or None for ones.
        eps: added inside the root; finite and >= 0.
        bias: like ``weight``, of the same shape if both are given, or None for zeros.
        weight_offset: added to ``weight`` in float32, if that is given: 1.0 for models that store a weight around
            zero, such as Gemma.
        out_dtype: float32, float16 or bfloat16; None: the dtype of ``x``.

    Returns:
        (..., N), contiguous, of ``out_dtype``. Everything is computed in float32 and rounded once.

    Raises:
        RuntimeError: a dtype, shape, device or number other than the above; the message names the argument.
        TypeError: ``x``, ``weight`` or ``bias`` is no tensor.

    Notes:
        * Deterministic, forward and backward. Batch-invariant: a row's output does not depend on other rows.
        * Under autocast the dtypes given are kept: the statistics are float32 in any case.
        * Backward saves only the inputs. Gradients have the dtype of their input.
        * Works under ``torch.compile``, ``torch.export``, ``torch.func`` (``vmap``, ``grad``, ``jvp``) and CUDA graph
          capture. Forward mode and second derivatives take plain PyTorch formulas; ``torch.ops.fastkern.rms_norm``
          itself has no forward mode.
        * Empty inputs give empty outputs; NaN and infinities stay in their rows. The sum of squares of a row is a
          float32: beyond 3.4e38 (all elements above 1.8e19 / sqrt(N), say) the row becomes 0.
    """
    try:
        grad = (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        ) and torch.is_grad_enabled()
    except AttributeError:
        raise _check.not_a_tensor("rms_norm", x=x, weight=weight, bias=bias) from None
    if grad or _gradient.transformed():
        return _rms_norm_with_gradient(x, weight, eps, bias, weight_offset, out_dtype)
    return _rms_norm_fwd(x, weight, eps, bias, weight_offset, out_dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Layer normalisation: ``(x - mean(x, -1)) * rsqrt(var(x, -1) + eps) * (weight_offset + weight) + bias``.

    Ba, Kiros and Hinton, "Layer Normalization", 2016. The variance is that of the N elements themselves (divided by N,
    not N - 1), taken around the mean or elements of the row, so rows far from zero keep their digits. The same operator
    is ``torch.ops.fastkern.layer_norm``; this function leaves out the autograd wrapper when no gradient is needed.

    Args:
        x: as in :func:`rms_norm`.
        weight: as in :func:`rms_norm`.
        bias: as in :func:`rms_norm`.
        eps: as in :func:`rms_norm`.
        weight_offset: as in :func:`rms_norm`.
        out_dtype: as in :func:`rms_norm`.

    Returns:
        (..., N), contiguous, of ``out_dtype``. Everything is computed in float32 and rounded once.

    Raises:
        RuntimeError: as in :func:`rms_norm`.
        TypeError: as in :func:`rms_norm`.

    Notes:
        What is said of :func:`rms_norm` holds here; where the sum of squares (of deviations from the mean) overflows,
        the row becomes 0.
    """
    try:
        grad = (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        ) and torch.is_grad_enabled()
    except AttributeError:
        raise _check.not_a_tensor("layer_norm", x=x, weight=weight, bias=bias) from None
    if grad or _gradient.transformed():
        return _layer_norm_with_gradient(x, weight, bias, eps, weight_offset, out_dtype)
    return _layer_norm_fwd(x, weight, bias, eps, weight_offset, out_dtype)


# ---- both kinds, their arguments in one order ------------------------------------------------------------------------

_ARGUMENTS = ("x", "weight", "bias", "eps", "weight_offset", "out_dtype")


def _check_norm(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """The dtype of the result."""
    _norm_check.begin(op, x, eps, weight_offset)
    _norm_check.affine(op, x, weight=weight, bias=bias)
    return _check.float_dtype(op, "out_dtype", out_dtype, x.dtype)


def _fake_bwd(
    op: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _norm_check.begin(op, x, eps, weight_offset)
    _norm_check.rows(op, x, dy=dy)
    _norm_check.affine(op, x, weight=weight, bias=bias)
    _norm_check.needed(op, weight=(need_dweight, weight), bias=(need_dbias, bias))
    empty = _norm_check.empty_gradient
    return empty(need_dx, x, x), empty(need_dweight, weight, x), empty(need_dbias, bias, x)


def _register(op: str, kind: str) -> Any:
    """Fakes, gradient and batching of one kind; returns the function with a gradient."""
    order = _schema.Order(op, _ARGUMENTS)
    bwd = getattr(torch.ops.fastkern, f"{op}_bwd").default

    def check(*arguments: Any) -> torch.dtype:
        return _check_norm(op, *order.family(arguments))

    def fake(*arguments: Any) -> Tensor:
        return _norm_check.empty_rows(arguments[0], check(*arguments))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.eps, ctx.weight_offset, _ = order.family(inputs)
        ctx.save_for_backward(x, weight, bias)

    def grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, *_ = order.needs(ctx)
        if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
            dx32, [(dweight, dbias)] = _norm_formula.norm_gradients(
                kind, [dy], x, [(weight, bias)], ctx.eps, ctx.weight_offset
            )
            dx = dx32.to(x.dtype)
        else:
            dx, dweight, dbias = bwd(dy, x, weight, bias, ctx.eps, ctx.weight_offset, need_dx, need_dweight, need_dbias)
        grads = zip((dx, dweight, dbias), (need_dx, need_dweight, need_dbias), strict=True)
        return order.operator((*(g if need else None for g, need in grads), None, None, None))

    def composite(*arguments: Any) -> Tensor:
        dtype = check(*arguments)
        x, weight, bias, eps, weight_offset, _ = order.family(arguments)
        return _norm_formula.norm(kind, x, [(weight, bias)], eps, weight_offset, dtype)[0]

    for name in (op, f"{op}_fwd"):
        _schema.register_fake(name, fake)
        _batching.register(name, rows=("x",), check=check)
    _schema.register_fake(f"{op}_bwd", partial(_fake_bwd, f"{op}_bwd"))
    _batching.register(f"{op}_bwd")
    return _gradient.register(op, save=save, grad=grad, composite=composite)


_rms_norm_with_gradient = _register("rms_norm", "rms")
_layer_norm_with_gradient = _register("layer_norm", "layer")
