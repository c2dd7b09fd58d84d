# SPDX-License-Identifier: Apache-2.0
"""The argument checks of the C++ operators for the fakes: tracing refuses what a kernel would, in the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def not_a_tensor(op: str, **arguments: object) -> TypeError:
    """The error for the first of ``arguments`` that is neither a tensor nor, but for the first of all, None."""
    names = list(arguments)
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and (value is not None or name == names[0]):
            return TypeError(f"fastkern::{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    return TypeError(f"fastkern::{op}: {', '.join(names)} must be tensors")


def float_tensor(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in _FLOATS:
        expected = "torch.float32, torch.float16 or torch.bfloat16"
        raise RuntimeError(f"fastkern::{op}: {name} must be {expected}, got {t.dtype}")


def same_dtype(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise RuntimeError(f"fastkern::{op}: {name} must be {x.dtype} like x, got {t.dtype}")


def at_least_one_dimension(op: str, name: str, rank: int) -> None:
    if rank < 1:
        raise RuntimeError(f"fastkern::{op}: {name} must have at least one dimension, got a scalar of shape ()")


def shape(op: str, name: str, t: Tensor, expected: Sequence[int]) -> None:
    if t.dim() != len(expected) or any(got != want for got, want in zip(t.shape, expected, strict=True)):
        raise RuntimeError(f"fastkern::{op}: {name} must have shape {tuple(expected)}, got {tuple(t.shape)}")


def device(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise RuntimeError(f"fastkern::{op}: {name} must be on {x.device} like x, got {t.device}")


def eps(op: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise RuntimeError(f"fastkern::{op}: eps must be finite and >= 0, got {value}")
