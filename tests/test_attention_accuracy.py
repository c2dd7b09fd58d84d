# SPDX-License-Identifier: Apache-2.0
"""The rule, the lengths and the head dims that FlashAttention-3 is accepted by, and float32 against float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from fastkern.specs import _attention_formula as formula
from fastkern.specs import attention as rows
from harness.attention import assert_as_fa3, assert_close, made, ours, results_of, truth

pytestmark = pytest.mark.operator(rows.FLASH_ATTN)

LENGTHS = (
    (1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128), (128, 217), (113, 211),
    (108, 256), (256, 512), (384, 256), (640, 128), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
    (4096, 4096), (4224, 4224),
)  # fmt: skip
HEAD_DIMS = (32, 40, 64, 80, 96, 128, 160, 192, 256, (192, 128), (64, 256))
GROUPS = {"mha": 1, "gqa": 2, "mqa": 6}
MASKS: dict[str, Any] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_left": 37, "window_right": 11},
    "causal window": {"causal": True, "window_left": 96},
}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
SOFTCAPS = (0.0, 50.0)


def _case(lengths: int, dim: int, use: int) -> tuple[Any, ...]:
    """Of all other choices one, another one each time that a head dim is used."""
    number = 5 * use + dim
    return (
        LENGTHS[lengths],
        HEAD_DIMS[dim],
        list(GROUPS)[number // 4 % 3],
        list(MASKS)[number % 4],
        list(DTYPES)[number // 12 % 2],
        SOFTCAPS[number // 24 % 2],
    )


def _few() -> list[tuple[Any, ...]]:
    """Short ones with every head dim, those of some hundred with every third, the longest with one or two."""
    chosen: list[tuple[Any, ...]] = []
    used = [0] * len(HEAD_DIMS)
    for i, (S, T) in enumerate(LENGTHS):
        step = 1 if S * T <= 1 << 15 else 4 if S * T <= 1 << 18 else 5 if S * T <= 1 << 20 else 10
        for d in range(i % step % 3, len(HEAD_DIMS), step):
            chosen.append(_case(i, d, used[d]))
            used[d] += 1
    return chosen


FEW = _few()


def _check_as_fa3(
    device: str, lengths: tuple[int, int], dims: Any, groups: str, mask: str, dtype: str, softcap: float
) -> None:
    (S, T), (D, V) = lengths, dims if isinstance(dims, tuple) else (dims, dims)
    large = S * T > 1 << 18
    B, H = (1, 6) if large and device == "cpu" else (2, 6)
    if S * T > 1 << 21 and device == "cpu":
        H = 2
    group = {"mha": 1, "gqa": min(2, H), "mqa": H}[groups]
    inputs: dict[str, Any] = made(device, DTYPES[dtype], B, S, T, H, D, group=group, V=V)
    if softcap:  # as large as those that a cap is for
        inputs["q"] = inputs["q"] * softcap / 4
        inputs["softcap"] = softcap
    inputs |= MASKS[mask]
    wide = torch.float32 if large else torch.float64
    exact = truth(inputs, use_lse=False, dtype=wide)
    torchs = results_of(formula.attention, inputs, use_lse=False)
    what = f"{lengths}, {dims}, {groups}, {mask}, {dtype}, softcap {softcap}"
    assert_as_fa3(ours(inputs, use_lse=False), exact, torchs, softcap, what)


def _name(case: tuple[Any, ...]) -> str:
    return "-".join(str(part).replace(" ", "") for part in case)


@pytest.mark.parametrize("case", FEW, ids=_name)
def test_as_accurate_as_fa3_asks(case: tuple[Any, ...], device: str) -> None:
    _check_as_fa3(device, *case)


def test_every_pair_of_choices_is_there() -> None:
    """But for lengths with head dims, masks and so on, of which long ones have few."""
    columns = list(zip(*FEW, strict=True))
    for a in range(1, 6):
        for b in range(a + 1, 6):
            seen, wanted = set(zip(columns[a], columns[b], strict=True)), len(set(columns[a])) * len(set(columns[b]))
            assert len(seen) == wanted, f"{wanted - len(seen)} pairs of columns {a} and {b} are missing"
    assert set(columns[0]) == set(LENGTHS)
    assert set(columns[1]) == set(HEAD_DIMS)


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_everything_is_as_accurate_as_fa3_asks(lengths: tuple[int, int], dims: Any, device: str) -> None:
    if device == "cpu":
        pytest.skip("hours on a CPU")
    for groups, mask, dtype, softcap in product(GROUPS, MASKS, DTYPES, SOFTCAPS):
        _check_as_fa3(device, lengths, dims, groups, mask, dtype, softcap)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(64, 128), (113, 203), (239, 1), (108, 256), (384, 256)], ids=str)
def test_float32_is_close_to_float64(lengths: tuple[int, int], mask: str, device: str) -> None:
    for number, dims in enumerate(HEAD_DIMS):
        D, V = dims if isinstance(dims, tuple) else (dims, dims)
        if device == "cpu" and number % 3 != lengths[0] % 3:
            continue
        inputs = made(device, torch.float32, 2, *lengths, 6, D, group=(1, 2, 6)[number % 3], V=V) | MASKS[mask]
        assert_close(ours(inputs), truth(inputs), 1e-5, f"{lengths}, {dims}, {mask}")
