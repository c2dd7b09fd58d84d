# SPDX-License-Identifier: Apache-2.0
"""The checks of cpp/torch/softmax.cpp, in the same order and words, for the fakes; and one batching rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _check, _schema

_MASKS = (torch.bool, torch.float32, torch.float16, torch.bfloat16)


def begin(op: str, x: Tensor, dim: int, name: str = "x", real: bool = True) -> None:
    """What every operator of the family begins with; ``real``: it takes float64 on the CPU."""
    (_check.real_tensor if real else _check.float_tensor)(op, name, x)
    _check.at_least_one_dimension(op, name, x.dim())
    if not -x.dim() <= dim < x.dim():
        raise RuntimeError(f"fastkern::{op}: dim must be between {-x.dim()} and {x.dim() - 1}, got {dim}")


def like(op: str, y: Tensor, dy: Tensor, real: bool = True) -> None:
    """The gradient that comes in."""
    (_check.real_tensor if real else _check.float_tensor)(op, "dy", dy)
    _check.shape(op, "dy", dy, y.shape)
    _check.device(op, "dy", dy, y, "y")


def begin_masked(
    op: str, x: Tensor, mask: Tensor | None, scale: float, causal: bool, name: str = "x", dy: Tensor | None = None
) -> None:
    """What the masked ones begin with."""
    begin(op, x, -1, name, real=False)
    if causal and x.dim() < 2:
        raise RuntimeError(f"fastkern::{op}: {name} must have at least two dimensions, got shape {tuple(x.shape)}")
    if dy is not None:
        like(op, x, dy, real=False)
    _check.finite(op, "scale", scale)
    if mask is None:
        return
    if mask.dtype not in _MASKS:
        raise RuntimeError(
            f"fastkern::{op}: mask must be torch.bool, torch.float32, torch.float16 or torch.bfloat16, got {mask.dtype}"
        )
    own = mask.shape
    fits = mask.dim() <= x.dim() and all(
        size == 1 or size == of_x for size, of_x in zip(own, x.shape[x.dim() - mask.dim() :], strict=True)
    )
    if not fits:
        raise RuntimeError(
            f"fastkern::{op}: mask must broadcast to the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
    _check.device(op, "mask", mask, x)


def mask_gradient(op: str) -> RuntimeError:
    """There is none."""
    return RuntimeError(f"fastkern::{op}: mask must not require grad, it has no gradient here; detach it")


def no_mask_gradient(op: str, mask: Tensor | None) -> None:
    """Refuse what would silently get no gradient."""
    if isinstance(mask, Tensor) and mask.requires_grad and torch.is_grad_enabled():
        raise mask_gradient(op)


def empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A result of the shape of x, contiguous."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def without(x: Tensor, dim: int, keepdim: bool) -> list[Any]:
    """The shape of one number for each row."""
    shape = list(x.shape)
    shape[dim : dim + 1 or None] = [1] if keepdim else []
    return shape


def empty_rows(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    """One number for each row."""
    return x.new_empty(without(x, dim, keepdim))


def _entry(t: Tensor, dim: int | None) -> Tensor:
    """What the checks look at: shape and dtype of one entry of a batch."""
    return torch.empty([n for d, n in enumerate(t.shape) if d != dim], dtype=t.dtype, device="meta")


def register_vmap(
    name: str,
    *,
    rows: Sequence[str],
    check: Callable[..., Any],
    numbers: Sequence[str] = (),
    broadcast: str | None = None,
) -> None:
    """Give ``fastkern::<name>`` its batching rule: the batch is one more leading dimension.

    Args:
        name: of the operator.
        rows: its operands of the shape of x.
        check: its checks, called with the arguments of one entry.
        numbers: operands with one number for each row, which get the batch like ``rows``.
        broadcast: an operand that broadcasts against the rows: it keeps what it has, and gets a batch if batched.
    """
    op = getattr(torch.ops.fastkern, name).default
    schema = _schema.arguments(name)

    def rule(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
        values = [*given, *(a.default_value for a in schema[len(given) :])]
        dims = [*in_dims, *([None] * (len(values) - len(in_dims)))]
        entry = [_entry(v, d) if isinstance(v, Tensor) else v for v, d in zip(values, dims, strict=True)]
        check(*entry)
        rank = next(v.dim() for a, v in zip(schema, entry, strict=True) if a.name in rows)
        for i, (a, value, dim) in enumerate(zip(schema, values, dims, strict=True)):
            if a.name == broadcast and dim is not None:
                value = value.movedim(dim, 0)
                values[i] = value.reshape(value.shape[0], *[1] * (rank + 1 - value.dim()), *value.shape[1:])
            elif dim is not None:
                values[i] = value.movedim(dim, 0)
            elif a.name in rows or a.name in numbers:
                values[i] = value.expand(info.batch_size, *value.shape)
            elif a.name == "dim" and value >= 0:
                values[i] = value + 1
        return op(*values), 0

    torch.library.register_vmap(f"fastkern::{name}", rule)
