# SPDX-License-Identifier: Apache-2.0
"""The residual stream and the norm behind it in one pass: the functions. Their shapes and gradients: _add_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkern.ops import _add_norm, _gradient, _philox

_add_rms_norm_fwd = torch.ops.fastkern.add_rms_norm_fwd.default
_add_layer_norm_fwd = torch.ops.fastkern.add_layer_norm_fwd.default
_add_rms_norm_parallel_fwd = torch.ops.fastkern.add_rms_norm_parallel_fwd.default
_add_layer_norm_parallel_fwd = torch.ops.fastkern.add_layer_norm_parallel_fwd.default

_TENSORS = ("x", "residual", "weight", "bias", "rowscale", "seed", "offset")
_PARALLEL_TENSORS = ("x", "residual", "weight", "bias", "weight2", "bias2", "rowscale", "seed", "offset")


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add and RMS norm: ``h = residual + dropout(x) * rowscale``, ``y = rms_norm(h, weight, ...)``.

    The seam between two blocks of a pre-norm transformer, in one pass over memory. The norm is that of
    :func:`rms_norm`, of the rounded h: y is ``rms_norm(h, weight, eps, bias, weight_offset, out_dtype)``, on CUDA with
    the same bits where all operands have one type and N is at most 16,384 (float32: 8,192). The same operator is
    ``torch.ops.fastkern.add_rms_norm``, which draws no seed.

    Args:
        x: (..., N), float32, float16 or bfloat16, on the CPU or a CUDA device; any strides, as in :func:`rms_norm`.
            What the block gives.
        residual: (..., N), float32, float16 or bfloat16, any strides; None at the first block: nothing is added.
        weight: (N,) or (H, N), as in :func:`rms_norm`.
        eps: as in :func:`rms_norm`.
        bias: (N,) or (H, N), as in :func:`rms_norm`.
        weight_offset: as in :func:`rms_norm`.
        dropout_p: probability, 0 to 1, that an element of ``x`` is dropped; kept ones are multiplied by
            ``1 / (1 - dropout_p)``. 0 for evaluation: there is no ``training`` flag.
        seed: one int64 on the device of ``x``. None with ``dropout_p > 0``: seed and offset are drawn by
            ``torch.randint`` from torch's generator of that device, so ``torch.manual_seed`` repeats a run and
            ``torch.utils.checkpoint`` repeats a forward.
        offset: one int64 on the device of ``x``, a second part of the seed, e.g. a step; None: 0, at the price of a
            small kernel if ``seed`` is given.
        rowscale: ``x.shape[:-1]``, float32, float16 or bfloat16, multiplied to the rows of ``x``: stochastic depth
            with ``0`` or ``1 / (1 - p)`` in each. Not differentiable.
        residual_dtype: of h, float32, float16 or bfloat16; None: that of ``residual``, or of ``x`` without one.
        out_dtype: of y, float32, float16 or bfloat16; None: that of ``x``.

    Returns:
        ``(y, h)``, both (..., N) and contiguous. h, the new residual stream, is rounded once to ``residual_dtype``, y
        once to ``out_dtype``.

    Raises:
        RuntimeError: a dtype, shape, device or number other than the above; the message names the argument. Also a
            ``rowscale`` that requires grad.
        TypeError: an operand is no tensor.

    Notes:
        * Whether an element is dropped depends on (seed, offset, its index) alone, by Philox 4x32-10 (Salmon, Moraes,
          Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): not on device, strides or launch.
          Backward draws the same mask again, and nothing of it is stored.
        * Deterministic, forward and backward, and, without dropout, batch-invariant.
        * Gradients flow through both outputs. Backward saves h, not ``x`` or ``residual``. Where neither dropout nor
          rowscale nor dtypes tell the gradients of ``x`` and ``residual`` apart, they are one tensor.
        * What is said of :func:`rms_norm` on autocast, transforms, empty inputs and special values holds here.
    """
    op = "add_rms_norm"
    if dropout_p and seed is None:
        seed, offset = _philox.draw(op, offset, x=x)
    if _gradient.wanted(op, _TENSORS, x, residual, weight, bias, rowscale, seed, offset):
        return _with_gradient(
            x, residual, weight, eps, bias, weight_offset, dropout_p, seed, offset, rowscale, residual_dtype, out_dtype
        )
    return _add_rms_norm_fwd(
        x, residual, weight, eps, bias, weight_offset, dropout_p, seed, offset, rowscale, residual_dtype, out_dtype
    )


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add and layer norm: ``h = residual + dropout(x) * rowscale``, ``y = layer_norm(h, ...)``.

    :func:`add_rms_norm` with the norm of :func:`layer_norm`.

    Args:
        x: as in :func:`add_rms_norm`.
        residual: as in :func:`add_rms_norm`.
        weight: as in :func:`layer_norm`.
        bias: as in :func:`layer_norm`.
        eps: as in :func:`layer_norm`.
        weight_offset: as in :func:`layer_norm`.
        dropout_p: as in :func:`add_rms_norm`.
        seed: as in :func:`add_rms_norm`.
        offset: as in :func:`add_rms_norm`.
        rowscale: as in :func:`add_rms_norm`.
        residual_dtype: as in :func:`add_rms_norm`.
        out_dtype: as in :func:`add_rms_norm`.

    Returns:
        ``(y, h)``, as in :func:`add_rms_norm`.

    Raises:
        RuntimeError: as in :func:`add_rms_norm`.
        TypeError: as in :func:`add_rms_norm`.
    """
    op = "add_layer_norm"
    if dropout_p and seed is None:
        seed, offset = _philox.draw(op, offset, x=x)
    if _gradient.wanted(op, _TENSORS, x, residual, weight, bias, rowscale, seed, offset):
        return _layer_with_gradient(
            x, residual, weight, bias, eps, weight_offset, dropout_p, seed, offset, rowscale, residual_dtype, out_dtype
        )
    return _add_layer_norm_fwd(
        x, residual, weight, bias, eps, weight_offset, dropout_p, seed, offset, rowscale, residual_dtype, out_dtype
    )


# ---- two outputs -----------------------------------------------------------------------------------------------------


def add_rms_norm_parallel(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    weight2: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    bias2: Tensor | None = None,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm` with two outputs, for attention and MLP that run in parallel, each behind its own norm.

    The same h is normalised once: ``y = norm(h) * (weight_offset + weight) + bias``,
    ``y2 = norm(h) * (weight_offset + weight2) + bias2``.

    Args:
        x: as in :func:`add_rms_norm`.
        residual: as in :func:`add_rms_norm`.
        weight: as in :func:`rms_norm`.
        weight2: of the second output; of the shape of ``weight`` and ``bias``, or None for ones.
        eps: as in :func:`rms_norm`.
        bias: as in :func:`rms_norm`.
        bias2: of the second output; of the shape of the others, or None for zeros.
        weight_offset: as in :func:`rms_norm`; added to both weights.
        dropout_p: as in :func:`add_rms_norm`.
        seed: as in :func:`add_rms_norm`.
        offset: as in :func:`add_rms_norm`.
        rowscale: as in :func:`add_rms_norm`.
        residual_dtype: as in :func:`add_rms_norm`.
        out_dtype: of y and y2.

    Returns:
        ``(y, y2, h)``.

    Raises:
        RuntimeError: as in :func:`add_rms_norm`.
        TypeError: as in :func:`add_rms_norm`.
    """
    op = "add_rms_norm_parallel"
    if dropout_p and seed is None:
        seed, offset = _philox.draw(op, offset, x=x)
    if _gradient.wanted(op, _PARALLEL_TENSORS, x, residual, weight, bias, weight2, bias2, rowscale, seed, offset):
        return _parallel_with_gradient(
            x, residual, weight, weight2, eps, bias, bias2, weight_offset, dropout_p, seed, offset, rowscale,
            residual_dtype, out_dtype,
        )  # fmt: skip
    return _add_rms_norm_parallel_fwd(
        x, residual, weight, weight2, eps, bias, bias2, weight_offset, dropout_p, seed, offset, rowscale,
        residual_dtype, out_dtype,
    )  # fmt: skip


def add_layer_norm_parallel(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm_parallel` with the norm of :func:`layer_norm`.

    Args:
        x: as in :func:`add_rms_norm`.
        residual: as in :func:`add_rms_norm`.
        weight: as in :func:`layer_norm`.
        bias: as in :func:`layer_norm`.
        weight2: as in :func:`add_rms_norm_parallel`.
        bias2: as in :func:`add_rms_norm_parallel`.
        eps: as in :func:`layer_norm`.
        weight_offset: as in :func:`add_rms_norm_parallel`.
        dropout_p: as in :func:`add_rms_norm`.
        seed: as in :func:`add_rms_norm`.
        offset: as in :func:`add_rms_norm`.
        rowscale: as in :func:`add_rms_norm`.
        residual_dtype: as in :func:`add_rms_norm`.
        out_dtype: of y and y2.

    Returns:
        ``(y, y2, h)``.

    Raises:
        RuntimeError: as in :func:`add_rms_norm`.
        TypeError: as in :func:`add_rms_norm`.
    """
    op = "add_layer_norm_parallel"
    if dropout_p and seed is None:
        seed, offset = _philox.draw(op, offset, x=x)
    if _gradient.wanted(op, _PARALLEL_TENSORS, x, residual, weight, bias, weight2, bias2, rowscale, seed, offset):
        return _parallel_layer_with_gradient(
            x, residual, weight, bias, weight2, bias2, eps, weight_offset, dropout_p, seed, offset, rowscale,
            residual_dtype, out_dtype,
        )  # fmt: skip
    return _add_layer_norm_parallel_fwd(
        x, residual, weight, bias, weight2, bias2, eps, weight_offset, dropout_p, seed, offset, rowscale,
        residual_dtype, out_dtype,
    )  # fmt: skip


_with_gradient = _add_norm.register("add_rms_norm", "rms", parallel=False)
_layer_with_gradient = _add_norm.register("add_layer_norm", "layer", parallel=False)
_parallel_with_gradient = _add_norm.register("add_rms_norm_parallel", "rms", parallel=True)
_parallel_layer_with_gradient = _add_norm.register("add_layer_norm_parallel", "layer", parallel=True)
