# SPDX-License-Identifier: Apache-2.0
"""The attention biases of xFormers, said in the words of flash_attn and flash_attn_varlen.

Each case has what xFormers calls the bias, our arguments, and which key each query sees, spelled out as a matrix. The
table is also what to look up when moving from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastkern.specs import _attention_formula as formula
from fastkern.specs import attention as rows
from harness.attention import assert_close, made, results_of
from torch import Tensor

pytestmark = pytest.mark.operator(rows.FLASH_ATTN)

S, T = 37, 70
WINDOW = 9  # of xFormers: how many keys a query sees, itself included
LEFT, RIGHT = 5, 3

Sees = Callable[[Tensor, Tensor, int, int], Tensor]  # (i, j, queries, keys) of one sequence -> bool


def everything(i: Tensor, j: Tensor, queries: int, keys: int) -> Tensor:
    return (i >= 0) & (j >= 0)


def top_left(i: Tensor, j: Tensor, queries: int, keys: int) -> Tensor:
    return j <= i


def bottom_right(i: Tensor, j: Tensor, queries: int, keys: int) -> Tensor:
    return j <= i + keys - queries


def banded_top_left(i: Tensor, j: Tensor, queries: int, keys: int) -> Tensor:
    return (j <= i) & (j > i - WINDOW)


def banded_bottom_right(i: Tensor, j: Tensor, queries: int, keys: int) -> Tensor:
    return (j <= i + keys - queries) & (j > i + keys - queries - WINDOW)


def both_sides(i: Tensor, j: Tensor, queries: int, keys: int) -> Tensor:
    return (j >= i + keys - queries - LEFT) & (j <= i + keys - queries + RIGHT)


# ---- one sequence an entry: fastkern.flash_attn ----------------------------------------------------------------------

TOP_LEFT: dict[str, Any] = {"causal": True, "top_left": True}  # causal_align="top_left"
LOCAL: dict[str, Any] = {"causal": True, "window_left": WINDOW - 1}  # window=(WINDOW - 1, 0)
WINDOWED: dict[str, Any] = {"window_left": LEFT, "window_right": RIGHT}  # window=(LEFT, RIGHT)

DENSE: dict[str, tuple[dict[str, Any], Sees]] = {
    "None": ({}, everything),
    "LowerTriangularMask": (TOP_LEFT, top_left),
    "LowerTriangularFromBottomRightMask": ({"causal": True}, bottom_right),
    "LowerTriangularFromBottomRightLocalAttentionMask": (LOCAL, banded_bottom_right),
    "LocalAttentionFromBottomRightMask": (WINDOWED, both_sides),
}


def _places(queries: int, keys: int, device: str) -> tuple[Tensor, Tensor]:
    return torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None]


def _compare(got: dict[str, Tensor], inputs: dict[str, Tensor], seen: Tensor, bias: Tensor | None = None) -> None:
    """With the plain formula in float64 under a mask that is spelled out."""
    wide: dict[str, Any] = {name: inputs[name].double() for name in "qkv"}
    added = torch.zeros(seen.shape, dtype=torch.float64, device=seen.device) if bias is None else bias.double()
    mask = added.masked_fill(~seen, -torch.inf)
    exact = results_of(lambda q, k, v: formula.attention(q, k, v, bias=mask), wide)
    assert_close(got, exact, 1e-5)


@pytest.mark.parametrize("lengths", [(S, T), (T, S), (T, T)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, lengths: tuple[int, int], device: str) -> None:
    options, sees = DENSE[name]
    inputs = made(device, torch.float32, 2, *lengths, 4, 16, group=2)
    seen = sees(*_places(*lengths, device), *lengths).expand(1, 1, *lengths)
    _compare(results_of(rows.flash_attn, inputs | options), inputs, seen)


@pytest.mark.parametrize("name", ["Tensor", "LowerTriangularMaskWithTensorBias"])
def test_tensor_bias(name: str, device: str) -> None:
    """bias=(B, H, S, T), with a gradient, with and without a causal mask."""
    options, sees = ({}, everything) if name == "Tensor" else (TOP_LEFT, top_left)
    inputs = made(device, torch.float32, 2, S, T, 4, 16, group=2)
    bias = torch.randn(2, 4, S, T, device=device)
    got = results_of(rows.flash_attn, inputs | options | {"bias": bias})
    dbias = got.pop("dbias")
    seen = sees(*_places(S, T, device), S, T).expand(1, 1, S, T)
    _compare(got, inputs, seen, bias)
    assert not dbias.masked_fill(seen, 0).any()
    assert dbias.any()


# ---- sequences one after the other: fastkern.flash_attn_varlen -------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """``queries[b]`` rows of q, one sequence after the other; the keys of sequence b are ``keys[b]`` rows from
    ``starts[b]`` on."""

    queries: Sequence[int]
    keys: Sequence[int]
    starts: Sequence[int]
    total: int  # rows of k

    def matrix(self, sees: Sees, device: str) -> Tensor:
        seen = torch.zeros(sum(self.queries), self.total, dtype=torch.bool, device=device)
        first = 0
        for queries, keys, start in zip(self.queries, self.keys, self.starts, strict=True):
            block = sees(*_places(queries, keys, device), queries, keys)
            seen[first : first + queries, start : start + keys] = block
            first += queries
        return seen

    def arguments(self, device: str, used: bool) -> dict[str, Tensor]:
        def edges(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        given = {
            "cu_seqlens_q": edges([0, *self.queries]).cumsum(0, dtype=torch.int32),
            "cu_seqlens_k": edges([*self.starts, self.total]),
        }
        return given | ({"seqused_k": edges(self.keys)} if used else {})


DENSE_KEYS = Blocks((20, 1, 33, 0, 7), (31, 64, 20, 5, 0), (0, 31, 95, 115, 120), 120)
PADDED_KEYS = Blocks((1, 1, 20, 3), (31, 64, 20, 0), (0, 64, 128, 192), 256)  # 64 rows for each
GAPPY_KEYS = Blocks((1, 5, 20), (31, 40, 7), (3, 50, 101), 120)

PACKED: dict[str, tuple[dict[str, Any], Sees, Blocks]] = {
    "BlockDiagonalMask": ({}, everything, DENSE_KEYS),
    "BlockDiagonalCausalMask": (TOP_LEFT, top_left, DENSE_KEYS),
    "BlockDiagonalCausalFromBottomRightMask": ({"causal": True}, bottom_right, DENSE_KEYS),
    "BlockDiagonalCausalLocalAttentionMask": (TOP_LEFT | LOCAL, banded_top_left, DENSE_KEYS),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (LOCAL, banded_bottom_right, DENSE_KEYS),
    "BlockDiagonalPaddedKeysMask": ({}, everything, PADDED_KEYS),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": ({"causal": True}, bottom_right, PADDED_KEYS),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (WINDOWED, both_sides, PADDED_KEYS),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (LOCAL, banded_bottom_right, PADDED_KEYS),
    "BlockDiagonalGappyKeysMask": ({}, everything, GAPPY_KEYS),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": ({"causal": True}, bottom_right, GAPPY_KEYS),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed(name: str, device: str) -> None:
    options, sees, blocks = PACKED[name]
    flat = made(device, torch.float32, 1, sum(blocks.queries), blocks.total, 4, 16, group=2)
    seen = blocks.matrix(sees, device)
    given = blocks.arguments(device, used=blocks is not DENSE_KEYS)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = rows.flash_attn_varlen(q[0], k[0], v[0], **given, **options)
        return out[None], lse[None]

    _compare(results_of(ours, flat), flat, seen[None, None])
    if blocks is not DENSE_KEYS:
        unused = torch.ones(blocks.total, dtype=torch.bool, device=device)
        for start, keys in zip(blocks.starts, blocks.keys, strict=True):
            unused[start : start + keys] = False
        poisoned = {n: flat[n].masked_fill(unused[:, None, None], torch.nan) for n in "kv"}
        out, _ = ours(flat["q"], **poisoned)
        assert not bool(out.isnan().any()), "keys of no sequence were read"
