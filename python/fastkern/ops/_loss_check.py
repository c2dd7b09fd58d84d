# SPDX-License-Identifier: Apache-2.0
"""The checks of cpp/torch/loss_call.cpp, in the same order and words, for the fakes of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkern.ops import _check

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_LARGEST = torch.finfo(torch.float32).max
_CLASSES = (torch.int64, torch.int32)
_PROBABILITIES = (torch.float32, torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """What the operators take beside tensors."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    reduction: int = 1


def call(
    op: str,
    shape: Sequence[Any],
    x: Tensor,
    like: str,
    target: Tensor,
    class_weight: Tensor | None,
    options: Options,
    weight: str = "weight",
) -> None:
    """Raise unless target, weight and numbers fit logits of this shape, on the device of ``x``.

    ``weight``: what the operator calls the weights of classes.
    """
    _check.at_least_one_dimension(op, like, len(shape))
    if shape[-1] < 1:
        raise RuntimeError(f"fastkern::{op}: {like} must have at least one class, got shape {tuple(shape)}")
    _check.defined(op, "target", target)
    if target.dtype in _CLASSES:
        _check.shape(op, "target", target, shape[:-1])
    elif target.dtype in _PROBABILITIES:
        _check.shape(op, "target", target, shape)
    else:
        raise RuntimeError(
            f"fastkern::{op}: target must hold classes in torch.int64 or torch.int32, or probabilities in "
            f"torch.float32, torch.float16 or torch.bfloat16, got {target.dtype}"
        )
    _check.device(op, "target", target, x, like)
    if class_weight is not None:
        _check.float_tensor(op, weight, class_weight)
        _check.shape(op, weight, class_weight, shape[-1:])
        _check.device(op, weight, class_weight, x, like)
    numbers(op, options)


def numbers(op: str, o: Options) -> None:
    """Raise unless the numbers are in their range."""
    if not 0 <= o.label_smoothing <= 1:
        raise RuntimeError(f"fastkern::{op}: label_smoothing must be between 0 and 1, got {o.label_smoothing}")
    if not 0 <= o.lse_square_scale <= _LARGEST:
        raise RuntimeError(
            f"fastkern::{op}: lse_square_scale must be finite in float32 and >= 0, got {o.lse_square_scale}"
        )
    _check.softcap(op, o.softcap)
    _check.finite(op, "logit_scale", o.logit_scale)
    if not 0 <= o.reduction <= 2:
        raise RuntimeError(f"fastkern::{op}: reduction must be 0 (none), 1 (mean) or 2 (sum), got {o.reduction}")


def not_differentiable(op: str, needs: Sequence[bool], **places: int) -> None:
    """Refuse what would silently get no gradient: operands by name, and where ``needs`` says that they want one."""
    for name, place in places.items():
        if place < len(needs) and needs[place]:
            raise RuntimeError(f"fastkern::{op}: {name} must not require grad, it is not differentiable; detach it")


def state_size(shape: Sequence[Any]) -> Any:
    """Elements of what forward saves for backward."""
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    return 3 * rows + 2


def gradient(op: str, name: str, t: Tensor | None, shape: Sequence[Any], x: Tensor, like: str) -> None:
    """Raise unless ``t`` is a float32 gradient of this shape."""
    if t is None:
        return
    _check.float_tensor(op, name, t)
    if t.dtype != torch.float32:
        raise RuntimeError(f"fastkern::{op}: {name} must be torch.float32, got {t.dtype}")
    _check.shape(op, name, t, shape)
    _check.device(op, name, t, x, like)


def reduction_number(op: str, reduction: Any) -> int:
    """The number of the word, or an error that names the words."""
    try:
        return REDUCTIONS[reduction]
    except (KeyError, TypeError):
        raise RuntimeError(f"fastkern::{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}") from None
