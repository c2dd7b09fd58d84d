# SPDX-License-Identifier: Apache-2.0
"""The residual add and the norm behind it with h written over the residual, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkern.ops import _add_norm, _check

_add_rms_norm_inplace = torch.ops.fastkern.add_rms_norm_.default
_add_layer_norm_inplace = torch.ops.fastkern.add_layer_norm_.default


def add_rms_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`add_rms_norm` for inference: h is written over ``residual``, y is returned. No gradient, no dropout.

    Args:
        x: as in :func:`add_rms_norm`; not the memory of ``residual``.
        residual: (..., N), overwritten with ``residual + x`` in its own dtype. Any strides that put each element at an
            address of its own and let rows be found: a dense last dimension, leading ones that merge into at most two
            strides. Others are refused, not copied.
        weight: as in :func:`rms_norm`.
        eps: as in :func:`rms_norm`.
        bias: as in :func:`rms_norm`.
        weight_offset: as in :func:`rms_norm`.
        out_dtype: of y; None: that of ``x``.

    Returns:
        y, with the bits of that of :func:`add_rms_norm`.

    Raises:
        RuntimeError: as in :func:`add_rms_norm`; also if an operand requires grad and gradients are on.
        TypeError: as in :func:`add_rms_norm`.
    """
    _check.no_gradient("add_rms_norm_", x=x, residual=residual, weight=weight, bias=bias)
    y = _add_rms_norm_inplace(x, residual, weight, eps, bias, weight_offset, out_dtype)
    _written(residual)
    return y


def add_layer_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`add_layer_norm` for inference: h is written over ``residual``, y is returned. No gradient, no dropout.

    Args:
        x: as in :func:`add_rms_norm_`.
        residual: as in :func:`add_rms_norm_`.
        weight: as in :func:`layer_norm`.
        bias: as in :func:`layer_norm`.
        eps: as in :func:`layer_norm`.
        weight_offset: as in :func:`layer_norm`.
        out_dtype: of y; None: that of ``x``.

    Returns:
        y, with the bits of that of :func:`add_layer_norm`.

    Raises:
        RuntimeError: as in :func:`add_rms_norm_`.
        TypeError: as in :func:`add_rms_norm_`.
    """
    _check.no_gradient("add_layer_norm_", x=x, residual=residual, weight=weight, bias=bias)
    y = _add_layer_norm_inplace(x, residual, weight, bias, eps, weight_offset, out_dtype)
    _written(residual)
    return y


def _written(residual: Tensor) -> None:
    """Autograd learns that what it may have saved is no longer what it was."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(residual)


_add_norm.register_in_place("add_rms_norm_")
_add_norm.register_in_place("add_layer_norm_")
