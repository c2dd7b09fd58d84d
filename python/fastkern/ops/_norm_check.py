# SPDX-License-Identifier: Apache-2.0
"""The checks of cpp/torch/norm_call.cpp, in the same order and words, for the fakes of the norms."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkern.ops import _check


def begin(op: str, x: Tensor, eps: float, weight_offset: float, name: str = "x") -> None:
    """What every norm begins with; ``name`` is what the operator calls the tensor it normalises."""
    _check.float_tensor(op, name, x)
    _check.at_least_one_dimension(op, name, x.dim())
    _check.eps(op, eps)
    _check.finite(op, "weight_offset", weight_offset)


def rows(op: str, x: Tensor, like: str = "x", **operands: Tensor | None) -> None:
    """(..., N), each given one of the shape of x and on its device."""
    for name, t in operands.items():
        if t is not None:
            _check.float_tensor(op, name, t)
            _check.shape(op, name, t, x.shape)
            _check.device(op, name, t, x, like)


def affine(op: str, x: Tensor, like: str = "x", **operands: Tensor | None) -> None:
    """(N) or (H, N), all that are given of one shape."""
    first: tuple[str, Tensor] | None = None
    for name, t in operands.items():
        if t is None:
            continue
        _check.float_tensor(op, name, t)
        if first is not None:
            if not _check.same_shape(t, first[1].shape):
                expected = f"{tuple(first[1].shape)} like {first[0]}"
                raise RuntimeError(f"fastkern::{op}: {name} must have shape {expected}, got {tuple(t.shape)}")
        elif t.dim() not in (1, 2) or t.dim() > x.dim() or not _check.same_shape(t, x.shape[x.dim() - t.dim() :]):
            expected = str(tuple(x.shape[-1:])) + (f" or {tuple(x.shape[-2:])}" if x.dim() > 1 else "")
            raise RuntimeError(f"fastkern::{op}: {name} must have shape {expected}, got {tuple(t.shape)}")
        _check.device(op, name, t, x, like)
        first = first or (name, t)


def rowscale(op: str, x: Tensor, t: Tensor | None, like: str = "x") -> None:
    """(...), one for each row."""
    if t is not None:
        _check.float_tensor(op, "rowscale", t)
        _check.shape(op, "rowscale", t, x.shape[:-1])
        _check.device(op, "rowscale", t, x, like)


def dropout(op: str, x: Tensor, p: float, seed: Tensor | None, offset: Tensor | None, like: str = "x") -> None:
    """A probability, and one int64 each for seed and offset."""
    if not 0 <= p <= 1:
        raise RuntimeError(f"fastkern::{op}: dropout_p must be between 0 and 1, got {p}")
    for name, t in (("seed", seed), ("offset", offset)):
        if t is not None:
            _check.one_element(op, name, t, torch.int64, x, like)
    if seed is None and p > 0:
        raise RuntimeError(f"fastkern::{op}: seed must be given with dropout_p > 0, got None")


def needed(op: str, **operands: tuple[bool, Tensor | None]) -> None:
    """``weight=(need_dweight, weight)``: no gradient of what is not there."""
    for name, (need, t) in operands.items():
        if need and t is None:
            raise RuntimeError(f"fastkern::{op}: need_d{name} must be False without {name}, got True")


def empty_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A result of the shape of x, contiguous."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_gradient(need: bool, operand: Tensor | None, x: Tensor) -> Tensor:
    """A gradient as the kernels return it: without elements where it is not needed."""
    like = x if operand is None else operand
    return empty_rows(like) if need else like.new_empty(0)
