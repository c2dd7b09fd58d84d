# SPDX-License-Identifier: Apache-2.0
"""States of 8 bits from and to float32, for checkpoints: what the kernels do in each step, in torch's words."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256  # elements with one scale


@cache
def numbers(signed: bool) -> Tensor:
    """The numbers that codes of 0, 1, ... stand for, in ascending order; those without the bit of the sign."""
    base, pieces = (8, 7) if signed else (16, 8)
    values = [0.0]
    for n in range(pieces):
        low = 1 / base  # of a range that ends at 1
        values += [base ** (n + 1 - pieces) * (low + (1 - low) * i / 2**n) for i in range(1, 2**n + 1)]
    return torch.tensor(values, dtype=torch.float32)


def no_scales(like: Tensor) -> Tensor:
    """Scales of a state of zeros."""
    return torch.zeros(-(-like.numel() // BLOCK), dtype=torch.float32, device=like.device)


def fit(codes: Tensor, scales: Tensor | None, like: Tensor) -> bool:
    """Whether codes are those of a parameter whose elements lie as those of ``like``."""
    return (
        scales is not None
        and scales.dtype == torch.float32
        and codes.device == like.device == scales.device
        and codes.stride() == like.stride()
    )


def _in_memory(t: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory."""
    return t.as_strided((t.numel(),), (1,))


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Float32 of codes."""
    table = numbers(signed).to(codes.device)
    flat = _in_memory(codes).long()
    values = table[flat & 127] * torch.where(flat < 128, 1.0, -1.0) if signed else table[flat]
    result = torch.empty_like(codes, dtype=torch.float32)
    spread = scales.to(codes.device).repeat_interleave(BLOCK)[: flat.numel()]
    _in_memory(result).copy_(values * spread)
    return result


def encode(t: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a dense float32 tensor."""
    scales = no_scales(t)
    flat = t.new_zeros(scales.numel() * BLOCK)
    flat[: t.numel()] = _in_memory(t)
    blocks = flat.view(-1, BLOCK)
    if scales.numel() > 0:
        torch.amax(blocks.abs(), 1, out=scales)
    table = numbers(signed).to(t.device)
    part = blocks.abs() / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(part, (table[1:] + table[:-1]) / 2)
    codes = codes + (blocks < 0) * 128 if signed else torch.where((codes == 0) & (blocks != 0), 1, codes)
    result = torch.empty_like(t, dtype=torch.uint8)
    _in_memory(result).copy_(codes.view(-1)[: t.numel()])
    return result, scales
