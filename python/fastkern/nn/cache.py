# SPDX-License-Identifier: Apache-2.0
"""Keys and values of earlier tokens, in memory that is allocated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers, (layers, B, max_length, G, D) each, and how many each entry of the batch has.

    Nothing is allocated or moved while it is used: a step writes its keys and values in their places, so shapes and
    addresses stay, as torch.compile and CUDA graphs like it. Entries may have different lengths. For inference: there
    is no gradient.

    A layer's attention writes with :meth:`append` and reads all of ``max_length`` rows with ``seqused_k``; who calls
    the layers then says :meth:`advance`, once for all of them.

    Args:
        layers: how many layers share it.
        batch: B.
        max_length: rows of an entry.
        kv_heads: G.
        head_dim: D.
        device: of the memory.
        dtype: of keys and values, float32, float16 or bfloat16; None: torch's default. Others are converted to it.

    Raises:
        RuntimeError: a size below 1.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"layers": layers, "batch": batch, "max_length": max_length, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise RuntimeError(f"fastkern.nn.KVCache: {name} must be at least 1, got {size}")
        self.k = torch.zeros(tuple(sizes.values()), device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)

    @property
    def max_length(self) -> int:
        """Rows of an entry."""
        return self.k.shape[2]

    def positions(self, count: int) -> Tensor:
        """(B, count) int64: where the next ``count`` tokens of each entry stand."""
        return self.lengths.long()[:, None] + torch.arange(count, device=self.lengths.device)

    def append(self, k: Tensor, v: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values of the next tokens behind those that are there.

        Args:
            k: (B, S, G, D).
            v: (B, S, G, D).
            layer: whose.

        Returns:
            All keys and values of the layer, (B, max_length, G, D), without a copy.

        Raises:
            RuntimeError: another shape or layer, or k and v require grad.
            IndexError: there is no room, on the CPU; on CUDA torch's device-side assertion.
        """
        wanted = (self.k.shape[1], k.shape[1], *self.k.shape[3:])
        for name, t in (("k", k), ("v", v)):
            if tuple(t.shape) != wanted:
                raise RuntimeError(f"fastkern.nn.KVCache: {name} must have shape {wanted}, got {tuple(t.shape)}")
            if t.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(f"fastkern.nn.KVCache: {name} must not require grad, use torch.no_grad()")
        if not 0 <= layer < self.k.shape[0]:
            raise RuntimeError(f"fastkern.nn.KVCache: layer must be below {self.k.shape[0]}, got {layer}")
        entries = torch.arange(wanted[0], device=self.k.device)[:, None]
        places = entries, self.positions(k.shape[1])
        keys, values = self.k[layer], self.v[layer]
        keys.index_put_(places, k.to(keys.dtype))
        values.index_put_(places, v.to(values.dtype))
        return keys, values

    def seqused(self, count: int | Tensor) -> Tensor:
        """(B,) int32: the lengths when ``count`` more tokens are there, for ``seqused_k``."""
        return (self.lengths + count).to(torch.int32)

    def advance(self, count: int | Tensor) -> None:
        """So many tokens of each entry, a number or (B,) of them, were written by every layer."""
        self.lengths.add_(count)

    def reset(self) -> None:
        """Empty; the memory stays."""
        self.lengths.zero_()

    def reorder(self, entries: Tensor) -> None:
        """Entry b becomes what entry ``entries[b]`` is, (B,) int64: for beam search."""
        for t, dim in ((self.k, 1), (self.v, 1), (self.lengths, 0)):
            t.copy_(t.index_select(dim, entries))

    def __repr__(self) -> str:
        layers, batch, max_length, kv_heads, head_dim = self.k.shape
        return f"KVCache({layers=}, {batch=}, {max_length=}, {kv_heads=}, {head_dim=}, dtype={self.k.dtype})"
