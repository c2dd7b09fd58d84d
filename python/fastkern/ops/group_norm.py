# SPDX-License-Identifier: Apache-2.0
"""Group normalisation, with an optional SiLU behind it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _check, _gradient, _schema

_group_norm = torch.ops.fastkern.group_norm.default
_group_norm_fwd = torch.ops.fastkern.group_norm_fwd.default
_group_norm_fwd_stats = torch.ops.fastkern.group_norm_fwd_stats.default
_group_norm_bwd = torch.ops.fastkern.group_norm_bwd.default


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Group normalisation: each sample's channels in ``num_groups`` groups, each group to mean 0 and variance 1.

    ``z = (x - mean) * rsqrt(var + eps) * weight[c] + bias[c]``, then ``z`` or ``silu(z) = z * sigmoid(z)``. Wu and He,
    "Group Normalization", 2018. The same operator is ``torch.ops.fastkern.group_norm``; this function leaves out the
    autograd wrapper when no gradient is needed. ``num_groups=1`` normalises each sample as a whole, ``num_groups=C``
    each channel of each sample (instance normalisation).

    Args:
        x: (N, C, *), float32, float16 or bfloat16, on the CPU or a CUDA device. Row-major and channels-last tensors
            (any storage offset) are read in place; channels-last means that the channels are innermost and the rest
            row-major, for any rank from 3, so also (N, L, C) transposed to (N, C, L). Other strides: a row-major copy
            is made first.
        num_groups: at least 1, divides C.
        weight: (C,), float32, float16 or bfloat16 (not necessarily the dtype of ``x``), or None for ones.
        bias: (C,), float32, float16 or bfloat16, or None for zeros.
        eps: added to the variance, inside the root; finite and >= 0.
        activation: ``"none"`` or ``"silu"``.

    Returns:
        (N, C, *), the dtype of ``x``, channels-last if ``x`` is, else contiguous. Statistics, affine and activation
        are computed in float32 and rounded once.

    Raises:
        RuntimeError: a dtype, shape, device, ``num_groups``, ``eps`` or ``activation`` other than the above; the
            message names the argument.
        TypeError: ``x``, ``weight`` or ``bias`` is no tensor.

    Notes:
        * Deterministic, forward and backward. Batch-invariant: a sample's output does not depend on other samples. The
          two layouts sum in different orders: their results may differ in the last bit.
        * The variance is the mean of squared distances from the mean, not a difference of squares.
        * Backward saves ``x``, ``weight``, ``bias`` and two float32 for each group. ``torch.ops.fastkern.group_norm``
          itself, and calls under ``torch.func``, save the first three only and find the statistics again.
        * The gradient of ``x`` has the layout of ``x``, whatever that of the incoming gradient, which is copied if it
          has another.
        * Under autocast the dtypes given are kept: the statistics are float32 in any case.
        * Works under ``torch.compile``, ``torch.export``, ``torch.func`` (``vmap``, ``grad``, ``jvp``) and CUDA graph
          capture. Forward mode and second derivatives take plain PyTorch formulas; ``torch.ops.fastkern.group_norm``
          itself has no forward mode.
        * Empty inputs give empty outputs; NaN and infinities stay in their groups. Sums are float32: where the sum of
          a group's elements or of their squared distances from the mean is beyond 3.4e38, results are 0 or NaN.
    """
    try:
        grad = (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        ) and torch.is_grad_enabled()
    except AttributeError:
        raise _check.not_a_tensor("group_norm", x=x, weight=weight, bias=bias) from None
    if grad or _gradient.transformed():
        return _group_norm_with_gradient(x, num_groups, weight, bias, eps, activation)
    return _group_norm_fwd(x, num_groups, weight, bias, eps, activation)


# ---- shapes for tracing ----------------------------------------------------------------------------------------------


def _check_rank(rank: int, shape: Any, op: str = "group_norm") -> None:
    if rank < 2:
        raise RuntimeError(f"fastkern::{op}: x must have at least two dimensions, got shape {tuple(shape)}")


def _check_call(
    op: str, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> None:
    _check.float_tensor(op, "x", x)
    _check_rank(x.dim(), x.shape, op)
    if num_groups < 1 or x.shape[1] % num_groups != 0:
        raise RuntimeError(
            f"fastkern::{op}: num_groups must be at least 1 and divide the {x.shape[1]} channels of x, got {num_groups}"
        )
    _check.eps(op, eps)
    if activation not in ("none", "silu"):
        raise RuntimeError(f'fastkern::{op}: activation must be "none" or "silu", got "{activation}"')
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _check.float_tensor(op, name, t)
            _check.shape(op, name, t, x.shape[1:2])
            _check.device(op, name, t, x)


def _empty_like(x: Tensor) -> Tensor:
    """What the operators allocate: channels-last where x is that and not row-major as well, else row-major."""
    if x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _group_norm_fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    _check_call("group_norm", x, num_groups, weight, bias, eps, activation)
    return _empty_like(x)


def _group_norm_fwd_stats_fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    y = _group_norm_fake(x, num_groups, weight, bias, eps, activation)
    return y, x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float32)


def _group_norm_bwd_fake(
    dy: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    stats: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "group_norm_bwd"
    _check_call(op, x, num_groups, weight, bias, eps, activation)
    _check.float_tensor(op, "dy", dy)
    if dy.dtype != x.dtype:
        raise RuntimeError(f"fastkern::{op}: dy must be {x.dtype} like x, got {dy.dtype}")
    _check.shape(op, "dy", dy, x.shape)
    _check.device(op, "dy", dy, x)
    if stats is not None:
        _check.float_tensor(op, "stats", stats)
        if stats.dtype != torch.float32:
            raise RuntimeError(f"fastkern::{op}: stats must be torch.float32, got {stats.dtype}")
        _check.shape(op, "stats", stats, (x.shape[0], num_groups, 2))
        _check.device(op, "stats", stats, x)
    gradients = []
    for name, needed, operand, t in (("need_dweight", need_dweight, "weight", weight),
                                     ("need_dbias", need_dbias, "bias", bias)):  # fmt: skip
        if needed and t is None:
            raise RuntimeError(f"fastkern::{op}: {name} must be False without a {operand}, got True")
        like = x if t is None else t
        gradients.append(like.new_empty(like.shape if needed else 0))
    return _empty_like(x) if need_dx else x.new_empty(0), gradients[0], gradients[1]


_schema.register_fake("group_norm", _group_norm_fake)
_schema.register_fake("group_norm_fwd", _group_norm_fake)
_schema.register_fake("group_norm_fwd_stats", _group_norm_fwd_stats_fake)
_schema.register_fake("group_norm_bwd", _group_norm_bwd_fake)


# ---- gradient --------------------------------------------------------------------------------------------------------

Grads = tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]


def _save(ctx: Any, inputs: tuple[Any, ...], stats: Tensor | None) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, stats)


def _group_norm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, None)


def _group_norm_fwd_stats_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output[1])


def _group_norm_grad(ctx: Any, dy: Tensor, dstats: Tensor | None = None) -> Grads:
    x, weight, bias, stats = ctx.saved_tensors
    # torch leaves out arguments that equal their default
    need_dx, _, need_dweight, need_dbias = (*ctx.needs_input_grad, False, False, False)[:4]
    call = ctx.num_groups, weight, bias
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        dx, dweight, dbias = _group_norm_grad_differentiable(dy, x, *call, ctx.eps, ctx.activation)
    else:
        needs = need_dx, need_dweight, need_dbias
        dx, dweight, dbias = _group_norm_bwd(dy, x, *call, stats, ctx.eps, ctx.activation, *needs)
    return (
        dx if need_dx else None,
        None,
        dweight if need_dweight else None,
        dbias if need_dbias else None,
        None,
        None,
    )


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.float().reshape(-1, *[1] * (x.dim() - 2))


def _normalised(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Xhat and rstd, as (N, G, elements of a group) and (N, G, 1) in float32."""
    rows = x.float().reshape(x.shape[0], num_groups, x.shape[1] // num_groups * x.shape[2:].numel())
    centred = rows - rows.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def _group_norm_composite(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> Tensor:
    _check_call("group_norm", x, num_groups, weight, bias, eps, activation)
    z = _normalised(x, num_groups, eps)[0].reshape(x.shape)
    z = z if weight is None else z * _per_channel(weight, x)
    z = z if bias is None else z + _per_channel(bias, x)
    return (z * torch.sigmoid(z) if activation == "silu" else z).to(x.dtype)


def _group_norm_grad_differentiable(
    dy: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, rstd = _normalised(x, num_groups, eps)
    xhat, dz = rows.reshape(x.shape), dy.float()
    if activation == "silu":
        z = xhat if weight is None else xhat * _per_channel(weight, x)
        z = z if bias is None else z + _per_channel(bias, x)
        s = torch.sigmoid(z)
        dz = dz * (s * (1 + z * (1 - s)))
    over = [d for d in range(x.dim()) if d != 1]
    dweight = None if weight is None else (dz * xhat).sum(over).to(weight.dtype)
    dbias = None if bias is None else dz.sum(over).to(bias.dtype)
    g = (dz if weight is None else dz * _per_channel(weight, x)).reshape(rows.shape)
    dx = rstd * (g - g.mean(-1, keepdim=True) - rows * (g * rows).mean(-1, keepdim=True))
    return dx.reshape(x.shape).to(x.dtype), dweight, dbias


class _GroupNorm(torch.autograd.Function):
    """The eager way: keeps the statistics, and skips the formula of the operator it calls."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, stats = _group_norm_fwd_stats(*inputs)
        _save(ctx, inputs, stats)
        return y

    backward = staticmethod(_group_norm_grad)


_group_norm_recomputing = _gradient.register(
    "group_norm", save=_group_norm_save, grad=_group_norm_grad, composite=_group_norm_composite
)
torch.library.register_autograd(
    "fastkern::group_norm_fwd_stats", _group_norm_grad, setup_context=_group_norm_fwd_stats_save
)


def _group_norm_with_gradient(*inputs: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return _group_norm_fwd_stats(*inputs)[0]
    if _gradient.transformed():
        return _group_norm_recomputing(*inputs)
    return _GroupNorm.apply(*inputs)


# ---- batching --------------------------------------------------------------------------------------------------------


def _entries(info: Any, t: Tensor | None, dim: int | None) -> list[Tensor | None]:
    """A tensor for each entry of the batch; of an empty batch one to get the shape of a result from."""
    if t is None or dim is None:
        return [t] * max(info.batch_size, 1)
    return list(t.unbind(dim)) or [t.sum(dim)]  # a sum of nothing: zeros, of the right shape and in the graph


def _group_norm_vmap(
    op: Any,
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *options: Any,
) -> tuple[Any, Any]:
    x_dim, _, weight_dim, bias_dim = (*in_dims, None, None)[:4]
    logical = [size for d, size in enumerate(x.shape) if d != x_dim]
    _check_rank(len(logical), logical)
    several = op is _group_norm_fwd_stats
    out_dims = (0, 0) if several else 0
    if weight_dim is None and bias_dim is None:  # samples do not see each other: one larger batch
        x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        batch = x.shape[:2]
        result = op(x.flatten(0, 1), num_groups, weight, bias, *options)
        parts = tuple(r.unflatten(0, batch) for r in (result if several else (result,)))
        return parts if several else parts[0], out_dims
    entries = zip(
        _entries(info, x, x_dim), _entries(info, weight, weight_dim), _entries(info, bias, bias_dim), strict=True
    )
    results = [op(row, num_groups, w, b, *options) for row, w, b in entries]
    if several:
        return tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True)), out_dims
    return torch.stack(results)[: info.batch_size], out_dims


def _group_norm_bwd_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    dy: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    stats: Tensor | None = None,
    *options: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    dy_dim, x_dim, _, weight_dim, bias_dim, stats_dim = (*in_dims, None, None, None)[:6]
    tensors = ((dy, dy_dim), (x, x_dim), (weight, weight_dim), (bias, bias_dim), (stats, stats_dim))
    entries = zip(*(_entries(info, t, dim) for t, dim in tensors), strict=True)
    grads = [_group_norm_bwd(g, row, num_groups, w, b, s, *options) for g, row, w, b, s in entries]
    return tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*grads, strict=True)), (0, 0, 0)


torch.library.register_vmap("fastkern::group_norm", partial(_group_norm_vmap, _group_norm))
torch.library.register_vmap("fastkern::group_norm_fwd", partial(_group_norm_vmap, _group_norm_fwd))
torch.library.register_vmap("fastkern::group_norm_fwd_stats", partial(_group_norm_vmap, _group_norm_fwd_stats))
torch.library.register_vmap("fastkern::group_norm_bwd", _group_norm_bwd_vmap)
