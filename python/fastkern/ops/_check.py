# SPDX-License-Identifier: Apache-2.0
"""The argument checks of the C++ operators for the fakes: tracing refuses what a kernel would, in the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLOATS_TEXT = "torch.float32, torch.float16 or torch.bfloat16"


def not_a_tensor(op: str, **arguments: object) -> TypeError:
    """The error for the first of ``arguments`` that is neither a tensor nor, but for the first of all, None."""
    names = list(arguments)
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and (value is not None or name == names[0]):
            return TypeError(f"fastkern::{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    return TypeError(f"fastkern::{op}: {', '.join(names)} must be tensors")


def no_gradient(op: str, **arguments: Any) -> None:
    """For operators without a gradient: refuse what would silently get none."""
    try:
        wanted = [name for name, t in arguments.items() if t is not None and t.requires_grad]
    except AttributeError:
        raise not_a_tensor(op, **arguments) from None
    if wanted and torch.is_grad_enabled():
        raise RuntimeError(
            f"fastkern::{op}: {wanted[0]} must not require grad, the operator has no gradient; "
            "detach it or call under torch.no_grad()"
        )


def defined(op: str, name: str, t: Tensor | None) -> None:
    """For what the schema says is a tensor: torch lets None through."""
    if t is None:
        raise RuntimeError(f"fastkern::{op}: {name} must be a tensor, got None")


def float_tensor(op: str, name: str, t: Tensor) -> None:
    defined(op, name, t)
    if t.dtype not in _FLOATS:
        raise RuntimeError(f"fastkern::{op}: {name} must be {_FLOATS_TEXT}, got {t.dtype}")


def real_tensor(op: str, name: str, t: Tensor) -> None:
    """For operators that take float64 on the CPU."""
    defined(op, name, t)
    if t.dtype != torch.float64 or t.device.type == "cuda":
        float_tensor(op, name, t)


def real_dtype(op: str, name: str, dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    if dtype == torch.float64 and x.device.type != "cuda":
        return dtype
    return float_dtype(op, name, dtype, x.dtype)


def same_dtype(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise RuntimeError(f"fastkern::{op}: {name} must be {x.dtype} like x, got {t.dtype}")


def float_dtype(op: str, name: str, dtype: torch.dtype | None, otherwise: torch.dtype) -> torch.dtype:
    if dtype is not None and dtype not in _FLOATS:
        raise RuntimeError(f"fastkern::{op}: {name} must be {_FLOATS_TEXT}, got {dtype}")
    return otherwise if dtype is None else dtype


def quant_dtype(op: str, name: str, dtype: torch.dtype | None) -> torch.dtype:
    if dtype not in (None, torch.float8_e4m3fn, torch.int8):
        raise RuntimeError(f"fastkern::{op}: {name} must be torch.float8_e4m3fn or torch.int8, got {dtype}")
    return torch.float8_e4m3fn if dtype is None else dtype


def one_element(op: str, name: str, t: Tensor, dtype: torch.dtype, x: Tensor, like: str = "x") -> None:
    defined(op, name, t)
    if t.dtype != dtype:
        raise RuntimeError(f"fastkern::{op}: {name} must be {dtype}, got {t.dtype}")
    if t.numel() != 1:
        raise RuntimeError(f"fastkern::{op}: {name} must have one element, got {t.numel()}")
    device(op, name, t, x, like)


def at_least_one_dimension(op: str, name: str, rank: int) -> None:
    if rank < 1:
        raise RuntimeError(f"fastkern::{op}: {name} must have at least one dimension, got a scalar of shape ()")


def same_shape(t: Tensor, expected: Sequence[int]) -> bool:
    return t.dim() == len(expected) and all(got == want for got, want in zip(t.shape, expected, strict=True))


def shape(op: str, name: str, t: Tensor, expected: Sequence[int]) -> None:
    if not same_shape(t, expected):
        raise RuntimeError(f"fastkern::{op}: {name} must have shape {tuple(expected)}, got {tuple(t.shape)}")


def device(op: str, name: str, t: Tensor, x: Tensor, like: str = "x") -> None:
    if t.device != x.device:
        raise RuntimeError(f"fastkern::{op}: {name} must be on {x.device} like {like}, got {t.device}")


def eps(op: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise RuntimeError(f"fastkern::{op}: eps must be finite and >= 0, got {value}")


def finite(op: str, name: str, value: float) -> None:
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise RuntimeError(f"fastkern::{op}: {name} must be finite in float32, got {value}")


def softcap(op: str, value: float) -> None:
    limits = torch.finfo(torch.float32)
    if not (value == 0 or limits.tiny <= value <= limits.max):
        raise RuntimeError(f"fastkern::{op}: softcap must be 0 or a positive normal float32, got {value}")
