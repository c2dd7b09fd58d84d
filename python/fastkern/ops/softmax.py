# SPDX-License-Identifier: Apache-2.0
"""Softmax, its logarithm, logsumexp, and softmax under a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _check, _gradient, _schema
from fastkern.ops import _softmax_check as _own

_ops = torch.ops.fastkern
_softmax_fwd = _ops.softmax_fwd.default
_log_softmax_fwd = _ops.log_softmax_fwd.default
_logsumexp_fwd = _ops.logsumexp_fwd.default
_masked_softmax_fwd = _ops.masked_softmax_fwd.default
_causal_softmax_fwd = _ops.causal_softmax_fwd.default


def softmax(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax over one dimension: ``exp(x - max(x)) / sum(exp(x - max(x)))``.

    What ``torch.softmax`` computes. The same operator is ``torch.ops.fastkern.softmax``; this function leaves out the
    autograd wrapper when no gradient is needed.

    Args:
        x: at least one dimension, float32, float16 or bfloat16, on the CPU or a CUDA device; on the CPU float64 too, by
            plain loops. Any strides and storage offset. Over the last dimension rows are read in place when that is
            dense and the leading ones merge into at most two strides; over another one a row-major tensor is read in
            place. Otherwise a dense copy is made.
        dim: the dimension; negative ones count from the end.
        dtype: float32, float16 or bfloat16 (on the CPU float64), the dtype that ``x`` is converted to first, in the
            same kernel; None: its own. So ``dtype=torch.float32`` on a 16-bit ``x`` costs no conversion.

    Returns:
        The shape of ``x``, contiguous, of ``dtype``. Computed in float32, with float64 in float64, and rounded once.

    Raises:
        RuntimeError: a dtype, shape or ``dim`` other than the above; the message names the argument.
        TypeError: ``x`` is no tensor.

    Notes:
        * Deterministic, forward and backward. Batch-invariant: a row's output does not depend on other rows.
        * As in torch, a row with a NaN, with +inf or of nothing but -inf becomes NaN.
        * Backward saves the result alone: ``dx = y * (dy - sum(dy * y))``.
        * Under autocast the dtypes given are kept.
        * Works under ``torch.compile``, ``torch.export``, ``torch.func`` (``vmap``, ``grad``, ``jvp``) and CUDA graph
          capture. Forward mode and second derivatives take plain PyTorch formulas; ``torch.ops.fastkern.softmax``
          itself has no forward mode.
    """
    if _gradient.wanted("softmax", ("x",), x):
        return _softmax_with_gradient(x, dim, dtype)
    return _softmax_fwd(x, dim, dtype)


def log_softmax(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """The logarithm of softmax over one dimension: ``x - max(x) - log(sum(exp(x - max(x))))``.

    What ``torch.log_softmax`` computes; arguments, result and errors are those of :func:`softmax`.

    Notes:
        What is said of :func:`softmax` holds here. Backward saves the result alone:
        ``dx = dy - exp(y) * sum(dy)``.
    """
    if _gradient.wanted("log_softmax", ("x",), x):
        return _log_softmax_with_gradient(x, dim, dtype)
    return _log_softmax_fwd(x, dim, dtype)


def logsumexp(x: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    """The logarithm of the sum of exponentials over one dimension: ``max(x) + log(sum(exp(x - max(x))))``.

    What ``torch.logsumexp`` computes, over one dimension.

    Args:
        x: as in :func:`softmax`.
        dim: the dimension; negative ones count from the end.
        keepdim: whether the result keeps the dimension, with size 1.

    Returns:
        The shape of ``x`` without ``dim``, or with 1 for it; the dtype of ``x``. -inf for a row of nothing but -inf and
        for an empty one, inf for one with +inf in it.

    Raises:
        RuntimeError: a dtype, shape or ``dim`` other than the above; the message names the argument.
        TypeError: ``x`` is no tensor.

    Notes:
        What is said of :func:`softmax` holds here. Backward saves ``x`` and the result: ``dx = dy * exp(x - lse)``.
    """
    if _gradient.wanted("logsumexp", ("x",), x):
        return _logsumexp_with_gradient(x, dim, keepdim)
    return _logsumexp_fwd(x, dim, keepdim)


def masked_softmax(x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Softmax over the last dimension of ``x * scale + mask``, or of ``x * scale`` where a bool mask is True.

    Megatron's and EPOI's scale, mask and softmax in one pass. The same operator is
    ``torch.ops.fastkern.masked_softmax``.

    Args:
        x: (..., N), float32, float16 or bfloat16; strides as in :func:`softmax`.
        mask: broadcasts to the shape of ``x`` (sizes of 1 and missing leading dimensions are read with a stride of 0,
            never written out, where the leading ones merge into three strides). bool: True where ``x`` takes part, as
            in ``torch.nn.functional.scaled_dot_product_attention``; Megatron's masks say the opposite: ``~mask``.
            float32, float16 or bfloat16: added. None: none.
        scale: what ``x`` is multiplied with first; finite.

    Returns:
        (..., N), contiguous, the dtype of ``x``. Computed in float32 and rounded once. A row that is masked as a whole,
        or is -inf as a whole, is 0, and has a gradient of 0.

    Raises:
        RuntimeError: a dtype, shape, device or scale other than the above, or a ``mask`` that requires grad: it has no
            gradient here. The message names the argument.
        TypeError: ``x`` or ``mask`` is no tensor.

    Notes:
        Values of ``x`` under a bool mask are not looked at, be they NaN. Else what is said of :func:`softmax` holds
        here. Backward saves the result alone: ``dx = scale * y * (dy - sum(dy * y))``.
    """
    if _gradient.wanted("masked_softmax", ("x", "mask"), x, mask):
        _own.no_mask_gradient("masked_softmax", mask)
        return _masked_softmax_with_gradient(x, mask, scale)
    return _masked_softmax_fwd(x, mask, scale)


def causal_softmax(x: Tensor, scale: float = 1.0) -> Tensor:
    """Softmax over the last dimension of ``x * scale`` under a causal mask: Megatron's upper triangular one.

    Of (..., S, N), row ``i`` sees the first ``N - S + i + 1`` columns: the mask is aligned at the bottom right. What it
    hides is neither read nor looked at. The same operator is ``torch.ops.fastkern.causal_softmax``.

    Args:
        x: (..., S, N), float32, float16 or bfloat16; strides as in :func:`softmax`.
        scale: what ``x`` is multiplied with first; finite.

    Returns:
        (..., S, N), contiguous, the dtype of ``x``: 0 where the mask hides, and in rows that see nothing.

    Raises:
        RuntimeError: a dtype, shape or scale other than the above; the message names the argument.
        TypeError: ``x`` is no tensor.

    Notes:
        What is said of :func:`masked_softmax` holds here.
    """
    if _gradient.wanted("causal_softmax", ("x",), x):
        return _causal_softmax_with_gradient(x, scale)
    return _causal_softmax_fwd(x, scale)


# ---- softmax, log_softmax --------------------------------------------------------------------------------------------


def _wide(t: Tensor) -> Tensor:
    """In the type that is computed in."""
    return t if t.dtype == torch.float64 else t.float()


def _softmax_grad(kind: str, dy: Tensor, y: Tensor, dim: int) -> Tensor:
    """In differentiable torch operations, in float32 or float64."""
    dy, y = _wide(dy), _wide(y)
    if kind == "softmax":
        return y * (dy - (dy * y).sum(dim, keepdim=True))
    return dy - y.exp() * dy.sum(dim, keepdim=True)


def _register(op: str, torch_function: Callable[..., Tensor]) -> Any:
    """Fakes, gradient and batching of softmax or log_softmax; returns the function with a gradient."""
    bwd = getattr(_ops, f"{op}_bwd").default

    def fake(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        _own.begin(op, x, dim)
        return _own.empty(x, _check.real_dtype(op, "dtype", dtype, x))

    def fake_bwd(dy: Tensor, y: Tensor, dim: int, x_dtype: torch.dtype | None) -> Tensor:
        _own.begin(f"{op}_bwd", y, dim, "y")
        _own.like(f"{op}_bwd", y, dy)
        return _own.empty(y, _check.real_dtype(f"{op}_bwd", "x_dtype", x_dtype, y))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dim, ctx.x_dtype = inputs[1], inputs[0].dtype
        ctx.save_for_backward(output)

    def grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
            return _softmax_grad(op, dy, y, ctx.dim).to(ctx.x_dtype), None, None
        return bwd(dy, y, ctx.dim, ctx.x_dtype), None, None

    def composite(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        fake(x, dim, dtype)
        return torch_function(x, dim, dtype)

    for name in (op, f"{op}_fwd"):
        _schema.register_fake(name, fake)
        _own.register_vmap(name, rows=("x",), check=fake)
    _schema.register_fake(f"{op}_bwd", fake_bwd)
    _own.register_vmap(f"{op}_bwd", rows=("dy", "y"), check=fake_bwd)
    return _gradient.register(op, save=save, grad=grad, composite=composite)


_softmax_with_gradient = _register("softmax", torch.softmax)
_log_softmax_with_gradient = _register("log_softmax", torch.log_softmax)


# ---- logsumexp -------------------------------------------------------------------------------------------------------


def _logsumexp_fake(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    _own.begin("logsumexp", x, dim)
    return _own.empty_rows(x, dim, keepdim)


def _logsumexp_bwd_fake(dy: Tensor, x: Tensor, lse: Tensor, dim: int) -> Tensor:
    op = "logsumexp_bwd"
    _own.begin(op, x, dim)
    expected = _own.without(x, dim, keepdim=False)
    for name, t in (("dy", dy), ("lse", lse)):
        _check.real_tensor(op, name, t)
        _check.shape(op, name, t, expected)
        _check.device(op, name, t, x)
    return _own.empty(x, x.dtype)


def _logsumexp_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, ctx.keepdim = inputs
    ctx.save_for_backward(x, output)


def _logsumexp_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, lse = ctx.saved_tensors
    if ctx.keepdim:
        dy, lse = dy.squeeze(ctx.dim), lse.squeeze(ctx.dim)
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        dy, lse = _wide(dy).unsqueeze(ctx.dim), _wide(lse).unsqueeze(ctx.dim)
        return (dy * (_wide(x) - lse).exp()).to(x.dtype), None, None
    return _ops.logsumexp_bwd(dy, x, lse, ctx.dim), None, None


def _logsumexp_composite(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    _logsumexp_fake(x, dim, keepdim)
    return torch.logsumexp(_wide(x), dim, keepdim).to(x.dtype)


for _name in ("logsumexp", "logsumexp_fwd"):
    _schema.register_fake(_name, _logsumexp_fake)
    _own.register_vmap(_name, rows=("x",), check=_logsumexp_fake)
_schema.register_fake("logsumexp_bwd", _logsumexp_bwd_fake)
_own.register_vmap("logsumexp_bwd", rows=("x",), numbers=("dy", "lse"), check=_logsumexp_bwd_fake)
_logsumexp_with_gradient = _gradient.register(
    "logsumexp", save=_logsumexp_save, grad=_logsumexp_grad, composite=_logsumexp_composite
)


# ---- under a mask ----------------------------------------------------------------------------------------------------


def _masked_formula(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax of z, with 0 where a row is all -inf."""
    hidden = (z == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(z.masked_fill(hidden, 0.0), -1).masked_fill(hidden, 0.0).to(dtype)


def _masked(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    z = x.float() * scale
    if mask is not None:
        z = z.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else z + mask
    return _masked_formula(z, x.dtype)


def _causal(x: Tensor, scale: float) -> Tensor:
    queries, n = x.shape[-2:]
    seen = torch.ones(queries, n, dtype=torch.bool, device=x.device).tril(n - queries)
    return _masked_formula((x.float() * scale).masked_fill(~seen, float("-inf")), x.dtype)


def _register_masked(op: str, formula: Callable[..., Tensor]) -> Any:
    """Fakes, gradient and batching of masked_softmax or causal_softmax; returns the function with a gradient."""
    bwd = getattr(_ops, f"{op}_bwd").default
    masked = op == "masked_softmax"

    def fake(x: Tensor, *more: Any) -> Tensor:
        _own.begin_masked(op, x, more[0] if masked else None, more[-1], causal=not masked)
        return _own.empty(x, x.dtype)

    def fake_bwd(dy: Tensor, y: Tensor, scale: float) -> Tensor:
        _own.begin_masked(f"{op}_bwd", y, None, scale, causal=not masked, name="y", dy=dy)
        return _own.empty(y, y.dtype)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if masked and tuple(ctx.needs_input_grad[1:2]) == (True,):
            raise _own.mask_gradient(op)
        ctx.count, ctx.scale = len(inputs), inputs[-1]
        ctx.save_for_backward(output)

    def grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
            dx = (ctx.scale * _softmax_grad("softmax", dy, y, -1)).to(y.dtype)
        else:
            dx = bwd(dy, y, ctx.scale)
        return dx, *(None,) * (ctx.count - 1)

    def composite(*inputs: Any) -> Tensor:
        fake(*inputs)
        return formula(*inputs)

    for name in (op, f"{op}_fwd"):
        _schema.register_fake(name, fake)
        _own.register_vmap(name, rows=("x",), broadcast="mask", check=fake)
    _schema.register_fake(f"{op}_bwd", fake_bwd)
    _own.register_vmap(f"{op}_bwd", rows=("dy", "y"), check=fake_bwd)
    return _gradient.register(op, save=save, grad=grad, composite=composite)


_masked_softmax_with_gradient = _register_masked("masked_softmax", _masked)
_causal_softmax_with_gradient = _register_masked("causal_softmax", _causal)
