# SPDX-License-Identifier: Apache-2.0
"""What a user's type checker sees of fastkern: right calls pass, and each wrong one is an error that is named here.

Read by mypy alone. An ``ignore`` that is not needed is an error too, so a signature that lost its types is found.
"""

from __future__ import annotations

import fastkern
import torch
from fastkern import optim, torch_ops
from torch import Tensor


class Block(torch.nn.Module):
    """A part of a model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, h = fastkern.add_rms_norm(x, residual, self.weight, eps=1e-6)
        return fastkern.swiglu(y), h


def train(model: Block, x: Tensor, target: Tensor) -> float:
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    with fastkern.profile("out") as prof:
        fastkern.cross_entropy(model(x, x)[0], target).backward()
        optimizer.step()
    times: list[float] = [row.us for row in prof.rows]
    return float(sum(times, 0.0))


def attention(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, asked: bool) -> Tensor:
    q, k = fastkern.rope(q, k, cos, sin)
    alone: Tensor = fastkern.rope(q, None, cos, sin)
    out: Tensor = fastkern.flash_attn(alone, k, k, causal=True)
    out, lse = fastkern.flash_attn(q, k, k, causal=True, return_lse=True)
    either = fastkern.flash_attn(q, k, k, return_lse=asked)
    loss, lse = fastkern.cross_entropy(out, lse, return_lse=True)
    return loss + (either if isinstance(either, Tensor) else either[0])


def operators(x: Tensor) -> Tensor:
    y: Tensor = torch_ops.rms_norm(x, None, 1e-6)
    pair: tuple[Tensor, Tensor, Tensor] = torch_ops.rms_norm_bwd(y, x, None, None, 1e-6, 0.0, True, False, False)
    z: Tensor = torch_ops.add(pair[0], 2)
    torch_ops.add(x, 2.5, out=z)
    torch_ops.triu_(z)
    return z


def wrong(x: Tensor) -> None:
    fastkern.rms_norm(x, eps="small")  # type: ignore[arg-type]
    fastkern.rms_norm(x, epsilon=1e-6)  # type: ignore[call-arg]
    fastkern.rmsnorm(x)  # type: ignore[attr-defined]
    torch_ops.rms_norm(x, eps="small")  # type: ignore[arg-type]
    torch_ops.rms_norms(x)  # type: ignore[attr-defined]
    torch_ops.attn_dropout_mask("1", 1, 2, 2, 0.5, x)  # type: ignore[arg-type]
    torch_ops.triu(x, diagonal=0.5)  # type: ignore[call-overload]
