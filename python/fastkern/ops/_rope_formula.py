# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings in differentiable torch operations, in float32, for forward mode and second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkern.ops._rope_check import Options


def _rows(q: Tensor, cos: Tensor, o: Options) -> Tensor | None:
    """The row of the table for each token; None: the first ones, or a row for each token."""
    if o.positions is not None:
        return o.positions
    if o.cu_seqlens is None:
        return None
    token = torch.arange(q.shape[0], device=q.device)
    if o.cu_seqlens.numel() < 2:
        return torch.full_like(token, -1)
    bounds = o.cu_seqlens.long()
    sequence = torch.searchsorted(bounds, token, right=True) - 1
    inside = (sequence >= 0) & (sequence < bounds.numel() - 1)
    return torch.where(inside, token - bounds[sequence.clamp(0, bounds.numel() - 1)], -1)


def angles(q: Tensor, cos: Tensor, sin: Tensor, o: Options, inverse: bool) -> tuple[Tensor, Tensor]:
    """The pair (cos, sin) of every token, (..., S, 1, R/2) in float32.

    Positions that the table has no row for give NaN, tokens of no sequence 1 and 0.
    """
    n = q.shape[-1] if o.rotary_dim is None else o.rotary_dim
    half, rows = n // 2, _rows(q, cos, o)
    found = []
    for table, other in ((cos, 1.0), (sin, 0.0)):
        t = table if table.shape[-1] == half else table[..., ::2] if o.interleaved else table[..., :half]
        if rows is not None:
            inside = (rows >= 0) & (rows < t.shape[0])
            picked = t[rows.clamp(0, max(t.shape[0] - 1, 0)).long()] if t.shape[0] else t.new_zeros(*rows.shape, half)
            missing = float("nan") if o.positions is not None else torch.where(rows < 0, other, float("nan"))[..., None]
            t = torch.where(inside[..., None], picked.float(), missing)
        elif table.dim() == 2:
            t = t[: q.shape[-3]]
        found.append(t.float().unsqueeze(-2))
    return found[0], -found[1] if inverse else found[1]


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The pairs of the first columns turned, in float32."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :].float()
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        pairs = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((pairs, rest), -1)
