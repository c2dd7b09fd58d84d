# SPDX-License-Identifier: Apache-2.0
"""Normalisations over the last dimension."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _check, _gradient

_rms_norm = torch.ops.fastkern.rms_norm.default
_rms_norm_fwd = torch.ops.fastkern.rms_norm_fwd.default
_rms_norm_bwd = torch.ops.fastkern.rms_norm_bwd.default


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalisation: ``x * rsqrt(mean(x**2, -1) + eps) * weight``.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. The same operator is
    ``torch.ops.fastkern.rms_norm``; this function leaves out the autograd wrapper when no gradient is needed.

    Args:
        x: (..., N), float32, float16 or bfloat16, on the CPU or a CUDA device. Any strides and storage offset:
            rows are read in place when the last dimension is dense and the leading ones merge into at most two
            strides (so also a slice of a fused projection); otherwise a dense copy is made first.
        weight: (N,), float32, float16 or bfloat16 (not necessarily the dtype of ``x``), or None for ones.
        eps: added inside the root; finite and >= 0.

    Returns:
        (..., N), contiguous, the dtype of ``x``. Mean and scaling are computed in float32 and rounded once.

    Raises:
        RuntimeError: a dtype, shape, device or ``eps`` other than the above; the message names the argument.
        TypeError: ``x`` or ``weight`` is no tensor.

    Notes:
        * Deterministic, forward and backward. Batch-invariant: a row's output does not depend on other rows.
        * Under autocast the dtypes given are kept: the statistics are float32 in any case.
        * Backward saves only ``x`` and ``weight``.
        * Works under ``torch.compile``, ``torch.export``, ``torch.func`` (``vmap``, ``grad``, ``jvp``) and CUDA graph
          capture. Forward mode and second derivatives take plain PyTorch formulas; ``torch.ops.fastkern.rms_norm``
          itself has no forward mode.
        * Empty inputs give empty outputs; NaN and infinities stay in their rows. The sum of squares of a row is a
          float32: beyond 3.4e38 (all elements above 1.8e19 / sqrt(N), say) the row becomes 0.
    """
    try:
        grad = (x.requires_grad or (weight is not None and weight.requires_grad)) and torch.is_grad_enabled()
    except AttributeError:
        raise _check.not_a_tensor("rms_norm", x=x, weight=weight) from None
    if grad or _gradient.transformed():
        return _rms_norm_with_gradient(x, weight, eps)
    return _rms_norm_fwd(x, weight, eps)


# ---- shapes for tracing ----------------------------------------------------------------------------------------------


def _check_norm(op: str, x: Tensor, weight: Tensor | None, eps: float) -> None:
    _check.float_tensor(op, "x", x)
    _check.at_least_one_dimension(op, "x", x.dim())
    _check.eps(op, eps)
    if weight is not None:
        _check.float_tensor(op, "weight", weight)
        _check.shape(op, "weight", weight, x.shape[-1:])
        _check.device(op, "weight", weight, x)


@torch.library.register_fake("fastkern::rms_norm")
def _rms_norm_fake(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    _check_norm("rms_norm", x, weight, eps)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_fake("fastkern::rms_norm_fwd")(_rms_norm_fake)


@torch.library.register_fake("fastkern::rms_norm_bwd")
def _rms_norm_bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    need_dx: bool = True,
    need_dweight: bool = True,
) -> tuple[Tensor, Tensor]:
    op = "rms_norm_bwd"
    _check_norm(op, x, weight, eps)
    _check.same_dtype(op, "dy", dy, x)
    _check.shape(op, "dy", dy, x.shape)
    _check.device(op, "dy", dy, x)
    if need_dweight and weight is None:
        raise RuntimeError(f"fastkern::{op}: need_dweight must be False without a weight, got True")
    like = x if weight is None else weight
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    return dx, torch.empty_like(like, memory_format=torch.contiguous_format) if need_dweight else like.new_empty(0)


# ---- gradient --------------------------------------------------------------------------------------------------------


def _rms_norm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    need_dx, need_dweight = (*ctx.needs_input_grad, False)[:2]  # torch leaves out arguments that equal their default
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        dx, dweight = _rms_norm_grad_differentiable(dy, x, weight, ctx.eps)
    else:
        dx, dweight = _rms_norm_bwd(dy, x, weight, ctx.eps, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None


def _rms_norm_composite(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    _check_norm("rms_norm", x, weight, eps)
    x32 = x.float()
    y = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(x.dtype)


def _rms_norm_grad_differentiable(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    x32, g = x.float(), dy.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    xhat = x32 * rstd
    dweight = None
    if weight is not None:
        dweight = (g * xhat).reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0).to(weight.dtype)
        g = g * weight.float()
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight


_rms_norm_with_gradient = _gradient.register(
    "rms_norm", save=_rms_norm_save, grad=_rms_norm_grad, composite=_rms_norm_composite
)


# ---- batching --------------------------------------------------------------------------------------------------------


def _entries(info: Any, t: Tensor | None, dim: int | None) -> list[Tensor | None]:
    """A tensor for each entry of the batch; of an empty batch one to get the shape of a result from."""
    if t is None or dim is None:
        return [t] * max(info.batch_size, 1)
    return list(t.unbind(dim)) or [t.sum(dim)]  # a sum of nothing: zeros, of the right shape and in the graph


def _rms_norm_vmap(
    op: Any,
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, int]:
    x_dim, weight_dim = (*in_dims, None)[:2]
    _check.at_least_one_dimension("rms_norm", "x", x.dim() - (x_dim is not None))  # the batch is none of x's own
    if weight is None or weight_dim is None:
        x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        return op(x, weight, eps), 0
    entries = zip(_entries(info, x, x_dim), _entries(info, weight, weight_dim), strict=True)
    return torch.stack([op(row, w, eps) for row, w in entries])[: info.batch_size], 0


def _rms_norm_bwd_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    need_dx: bool = True,
    need_dweight: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    tensors = zip((dy, x, weight), (*in_dims, None)[:3], strict=True)
    entries = zip(*(_entries(info, t, dim) for t, dim in tensors), strict=True)
    grads = [_rms_norm_bwd(*entry, eps, need_dx, need_dweight) for entry in entries]
    dx, dweight = (torch.stack(parts)[: info.batch_size] for parts in zip(*grads, strict=True))
    return (dx, dweight), (0, 0)


torch.library.register_vmap("fastkern::rms_norm", partial(_rms_norm_vmap, _rms_norm))
torch.library.register_vmap("fastkern::rms_norm_fwd", partial(_rms_norm_vmap, _rms_norm_fwd))
torch.library.register_vmap("fastkern::rms_norm_bwd", _rms_norm_bwd_vmap)
