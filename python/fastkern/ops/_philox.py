# SPDX-License-Identifier: Apache-2.0
"""Seeds, and the dropout mask of cpp/include/fastkern/philox.h in torch operations, bit for bit, on any device.

Philox 4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _check

_LOW = 0xFFFFFFFF


def words(seed: Tensor, offset: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words below 2**32, as int64, for 64-bit integers that broadcast."""

    def halves(t: Tensor) -> tuple[Tensor, Tensor]:
        return t & _LOW, (t >> 32) & _LOW  # of a product that overflowed too: int64 wraps

    (c0, c1), (c2, c3), (k0, k1) = halves(index), halves(offset), halves(seed)
    for _ in range(10):
        (low_a, high_a), (low_b, high_b) = halves(0xD2511F53 * c0), halves(0xCD9E8D57 * c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def draw(op: str, offset: Tensor | None, **like: Any) -> tuple[Tensor, Tensor]:
    """A seed and, if there is none, an offset, from torch's generator of the device of the one operand in ``like``."""
    (operand,) = like.values()
    if not isinstance(operand, Tensor):
        raise _check.not_a_tensor(op, **like)
    seed, drawn = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=operand.device).unbind()
    return seed, drawn if offset is None else offset


def keep_mask(shape: Sequence[int], p: float, seed: Tensor, offset: Tensor | None) -> Tensor:
    """What dropout with probability p keeps of a tensor of this shape: element e by word e % 4 of block e // 4."""
    count = math.prod(shape)
    blocks = torch.arange((count + 3) // 4, device=seed.device)
    start = torch.zeros_like(seed) if offset is None else offset
    random = torch.stack(words(seed.reshape(()), start.reshape(()), blocks), -1).flatten()[:count]
    return (random >= min(int(p * 2**32), _LOW)).reshape(shape)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied with."""
    return 1 / (1 - p) if p < 1 else 0.0
