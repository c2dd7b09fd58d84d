# SPDX-License-Identifier: Apache-2.0
"""The norms, the residual stream and their gradients in differentiable torch operations, computed in float32.

Forward mode and second derivatives take these; so do the operators of this family alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkern.ops import _philox

Affine = tuple[Tensor | None, Tensor | None]  # weight, bias


def _normalised(kind: str, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The pair (xhat, rstd)."""
    centred = x.float()
    if kind == "layer":
        centred = centred - centred.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def _scale(weight: Tensor, weight_offset: float) -> Tensor:
    return weight.float() + weight_offset


def norm(
    kind: str, x: Tensor, affine: Sequence[Affine], eps: float, weight_offset: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """One output for each weight and bias."""
    xhat, _ = _normalised(kind, x, eps)
    outputs = []
    for weight, bias in affine:
        y = xhat if weight is None else xhat * _scale(weight, weight_offset)
        outputs.append((y if bias is None else y + bias.float()).to(dtype))
    return tuple(outputs)


def norm_gradients(
    kind: str, dys: Sequence[Tensor], x: Tensor, affine: Sequence[Affine], eps: float, weight_offset: float
) -> tuple[Tensor, list[Affine]]:
    """The gradient of x in float32, and those of each weight and bias in their dtypes."""
    xhat, rstd = _normalised(kind, x, eps)
    g = torch.zeros_like(xhat)
    parameters = []
    for dy32, (weight, bias) in zip((dy.float() for dy in dys), affine, strict=True):
        dweight = None if weight is None else _sum_to(dy32 * xhat, weight)
        parameters.append((dweight, None if bias is None else _sum_to(dy32, bias)))
        g = g + (dy32 if weight is None else dy32 * _scale(weight, weight_offset))
    mean = g.mean(-1, keepdim=True) if kind == "layer" else 0.0
    return rstd * (g - mean - xhat * (g * xhat).mean(-1, keepdim=True)), parameters


def _sum_to(t: Tensor, like: Tensor) -> Tensor:
    """Over all leading dimensions that ``like`` lacks."""
    lead = t.dim() - like.dim()
    return t.reshape(t.shape[:lead].numel(), *t.shape[lead:]).sum(0).to(like.dtype)


def branch(x: Tensor, p: float, seed: Tensor | None, offset: Tensor | None, rowscale: Tensor | None) -> Tensor:
    """dropout(x) * rowscale in float32: linear in x, so also what takes a gradient back."""
    out = x.float()
    if p > 0:
        assert seed is not None
        out = torch.where(_philox.keep_mask(x.shape, p, seed, offset), out * _philox.keep_scale(p), 0.0)
    return out if rowscale is None else out * rowscale.float().unsqueeze(-1)
