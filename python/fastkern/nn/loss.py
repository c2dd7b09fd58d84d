# SPDX-License-Identifier: Apache-2.0
"""Losses as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _loss_check
from fastkern.ops.linear_cross_entropy import linear_cross_entropy
from fastkern.ops.loss import cross_entropy


class _Loss(torch.nn.Module):
    weight: Tensor | None

    def __init__(self, name: str, weight: Tensor | None, options: dict[str, Any]) -> None:
        super().__init__()
        known = {key: options[key] for key in _loss_check.Options._fields}
        known["reduction"] = _loss_check.reduction_number(name, options["reduction"])
        _loss_check.numbers(name, _loss_check.Options(**known))
        self.register_buffer("weight", weight)
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())


class CrossEntropyLoss(_Loss):
    """:func:`fastkern.cross_entropy` with its options; ``torch.nn.CrossEntropyLoss`` with the classes last.

    Args:
        weight: (V,), one for each class, a buffer of the module; None: ones.
        ignore_index: as in :func:`fastkern.cross_entropy`, and so are the others.
        label_smoothing: between 0 and 1.
        lse_square_scale: factor of the z-loss.
        softcap: bound of the logits; 0: none.
        logit_scale: multiplies the logits first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        return_lse: return a tuple with lse.
        return_z_loss: return a tuple with zloss, last.
        inplace_backward: write the gradient over the logits.

    Raises:
        RuntimeError: a number out of its range.

    Shapes: ``module(logits, target)`` with (..., V) and (...), or (..., V) for probabilities.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
        reduction: str = "mean",
        return_lse: bool = False,
        return_z_loss: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "weight", "__class__")}
        super().__init__("cross_entropy", weight, options)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The loss of these logits."""
        return cross_entropy(logits, target, self.weight, **self.options)


class LinearCrossEntropyLoss(_Loss):
    """:func:`fastkern.linear_cross_entropy` with its options.

    Args:
        weight: (V,), one for each class, a buffer of the module; None: ones. Not the weight of the linear layer.
        ignore_index: as in :func:`fastkern.linear_cross_entropy`, and so are the others.
        label_smoothing: between 0 and 1.
        lse_square_scale: factor of the z-loss.
        softcap: bound of the logits; 0: none.
        logit_scale: multiplies the logits first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        chunk_rows: rows of a chunk of logits; None: chosen by size.
        return_lse: return a tuple with lse.
        return_z_loss: return a tuple with zloss, last.

    Raises:
        RuntimeError: a number out of its range.

    Shapes: ``module(hidden, lm_head.weight, target, lm_head.bias)`` with (..., H), (V, H), (...) and (V,).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
        reduction: str = "mean",
        chunk_rows: int | None = None,
        return_lse: bool = False,
        return_z_loss: bool = False,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "weight", "__class__")}
        super().__init__("linear_cross_entropy", weight, options)

    def forward(
        self, hidden: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The loss of ``hidden @ linear_weight.T + bias``."""
        return linear_cross_entropy(hidden, linear_weight, target, bias, self.weight, **self.options)
