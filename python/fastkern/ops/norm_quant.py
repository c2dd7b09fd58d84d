# SPDX-License-Identifier: Apache-2.0
"""RMS norms whose result is quantised to 8 bits in the same pass, for the matrix product behind them. Forward only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _add_norm, _batching, _check, _norm_check, _schema

_dynamic = torch.ops.fastkern.rms_norm_dynamic_quant.default
_static = torch.ops.fastkern.rms_norm_static_quant.default
_add_dynamic = torch.ops.fastkern.add_rms_norm_dynamic_quant.default
_add_static = torch.ops.fastkern.add_rms_norm_static_quant.default


def rms_norm_dynamic_quant(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm`, quantised with a scale for each row: ``q * scale`` is the norm, within half a step.

    Args:
        x: as in :func:`rms_norm`.
        weight: as in :func:`rms_norm`.
        eps: as in :func:`rms_norm`.
        bias: as in :func:`rms_norm`.
        weight_offset: as in :func:`rms_norm`.
        quant_dtype: torch.float8_e4m3fn or torch.int8.

    Returns:
        ``(q, scale)``: q (..., N) of ``quant_dtype``, contiguous; scale (..., 1), float32, the largest magnitude of the
        row divided by 448 (float8) or 127 (int8). The norm is computed in float32, divided by the scale and rounded
        once, to nearest even. A row of zeros has scale 0.

    Raises:
        RuntimeError: as in :func:`rms_norm`; also if an operand requires grad and gradients are on.
        TypeError: as in :func:`rms_norm`.
    """
    _check.no_gradient("rms_norm_dynamic_quant", x=x, weight=weight, bias=bias)
    return _dynamic(x, weight, eps, bias, weight_offset, quant_dtype)


def rms_norm_static_quant(
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Tensor:
    """:func:`rms_norm`, quantised with a given scale: ``q * scale`` is the norm, within half a step.

    Args:
        x: as in :func:`rms_norm`.
        scale: one float32 on the device of ``x``, above 0. It is read on the device: no synchronisation.
        weight: as in :func:`rms_norm`.
        eps: as in :func:`rms_norm`.
        bias: as in :func:`rms_norm`.
        weight_offset: as in :func:`rms_norm`.
        quant_dtype: torch.float8_e4m3fn or torch.int8.

    Returns:
        q (..., N) of ``quant_dtype``, contiguous. What does not fit saturates, to 448 (float8) or 127 (int8) and their
        negatives.

    Raises:
        RuntimeError: as in :func:`rms_norm_dynamic_quant`.
        TypeError: as in :func:`rms_norm`.
    """
    _check.no_gradient("rms_norm_static_quant", x=x, scale=scale, weight=weight, bias=bias)
    return _static(x, scale, weight, eps, bias, weight_offset, quant_dtype)


def add_rms_norm_dynamic_quant(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm` without dropout, quantised as in :func:`rms_norm_dynamic_quant`.

    Args:
        x: as in :func:`add_rms_norm`.
        residual: as in :func:`add_rms_norm`.
        weight: as in :func:`rms_norm`.
        eps: as in :func:`rms_norm`.
        bias: as in :func:`rms_norm`.
        weight_offset: as in :func:`rms_norm`.
        residual_dtype: as in :func:`add_rms_norm`.
        quant_dtype: torch.float8_e4m3fn or torch.int8.

    Returns:
        ``(q, scale, h)``: q and scale as in :func:`rms_norm_dynamic_quant`, h as in :func:`add_rms_norm`.

    Raises:
        RuntimeError: as in :func:`rms_norm_dynamic_quant`.
        TypeError: as in :func:`add_rms_norm`.
    """
    _check.no_gradient("add_rms_norm_dynamic_quant", x=x, residual=residual, weight=weight, bias=bias)
    return _add_dynamic(x, residual, weight, eps, bias, weight_offset, residual_dtype, quant_dtype)


def add_rms_norm_static_quant(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:
    """:func:`add_rms_norm` without dropout, quantised as in :func:`rms_norm_static_quant`.

    Args:
        x: as in :func:`add_rms_norm`.
        residual: as in :func:`add_rms_norm`.
        scale: as in :func:`rms_norm_static_quant`.
        weight: as in :func:`rms_norm`.
        eps: as in :func:`rms_norm`.
        bias: as in :func:`rms_norm`.
        weight_offset: as in :func:`rms_norm`.
        residual_dtype: as in :func:`add_rms_norm`.
        quant_dtype: torch.float8_e4m3fn or torch.int8.

    Returns:
        ``(q, h)``: q as in :func:`rms_norm_static_quant`, h as in :func:`add_rms_norm`.

    Raises:
        RuntimeError: as in :func:`rms_norm_dynamic_quant`.
        TypeError: as in :func:`add_rms_norm`.
    """
    _check.no_gradient("add_rms_norm_static_quant", x=x, residual=residual, scale=scale, weight=weight, bias=bias)
    return _add_static(x, residual, scale, weight, eps, bias, weight_offset, residual_dtype, quant_dtype)


# ---- shapes for tracing, batching ------------------------------------------------------------------------------------


def _register(op: str) -> None:
    names = [argument.name for argument in _schema.arguments(op)]
    with_stream, given_scale = "residual" in names, "scale" in names

    def check(*arguments: Any) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of q and h."""
        a = dict(zip(names, arguments, strict=True))
        x = a["x"]
        call = _add_norm.Call(
            x, a.get("residual"), a["weight"], a["bias"], None, None, a["eps"], a["weight_offset"],
            residual_dtype=a.get("residual_dtype"),
        )  # fmt: skip
        stream = _add_norm.check_stream(op, call, a.get("scale"))
        return _check.quant_dtype(op, "quant_dtype", a["quant_dtype"]), stream

    def fake(*arguments: Any) -> Any:
        quant, stream = check(*arguments)
        x = arguments[0]
        results = [_norm_check.empty_rows(x, quant)]
        if not given_scale:
            results.append(x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        if with_stream:
            results.append(_norm_check.empty_rows(x, stream))
        return tuple(results) if len(results) > 1 else results[0]

    _schema.register_fake(op, fake)
    _batching.register(op, rows=("x", "residual"), check=check)


for _op in (
    "rms_norm_dynamic_quant",
    "rms_norm_static_quant",
    "add_rms_norm_dynamic_quant",
    "add_rms_norm_static_quant",
):
    _register(_op)
