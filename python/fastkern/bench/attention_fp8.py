# SPDX-License-Identifier: Apache-2.0
"""The row of the benchmark for attention of 8-bit operands.

It is in no table of tests, whose checks do arithmetic that torch does not have for float8: tests/test_attention_fp8.py
has those of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fastkern
from fastkern.specs import Dims, Inputs, OpSpec
from fastkern.specs import _attention_formula as formula

F8 = torch.float8_e4m3fn


def _make(*, B: int, S: int, H: int, D: int, dtype: torch.dtype, device: Any, causal: bool = False) -> Inputs:
    """Normal numbers, quantised by the largest magnitude of each entry and head; dtype does not matter."""
    inputs: Inputs = {}
    scales: Inputs = {}
    for name in "qkv":
        x = torch.randn(B, S, H, D, device=device, dtype=torch.bfloat16)
        scale = x.abs().amax((1, 3)).float() / 448
        inputs[name] = (x / scale[:, None, :, None]).clamp(-448, 448).to(F8)
        scales[f"{name}_scale"] = scale
    return {**inputs, **scales, "causal": causal}


def _numbers(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) * scale[:, None, :, None].to(dtype)


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, causal: bool
) -> Tensor:
    """What the operands stand for, in the dtype of the scales."""
    dtype = q_scale.dtype
    q, k, v = (_numbers(t, s, dtype) for t, s in ((q, q_scale), (k, k_scale), (v, v_scale)))
    return formula.attention(q, k, v, causal=causal)[0]


def baseline(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, causal: bool
) -> Tensor:
    """Torch's attention in bfloat16; the conversion is part of it."""
    q, k, v = (_numbers(t, s, torch.bfloat16) for t, s in ((q, q_scale), (k, k_scale), (v, v_scale)))
    return formula.torch_attention(q, k, v, causal=causal)


def yardstick(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, causal: bool
) -> Tensor:
    """With weights in 8 bits, the largest of a row 2^8, as FlashAttention-3 has them."""
    q, k, v = (_numbers(t, s, torch.float32) for t, s in ((q, q_scale), (k, k_scale), (v, v_scale)))
    scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(~formula.visible(q, k, causal=True), -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * 256
    out = torch.einsum("bhst,bthd->bshd", weights.to(F8).float(), v)
    return (out / weights.sum(-1).transpose(1, 2)[..., None]).bfloat16()


def _flops(inputs: Inputs, backward: bool) -> int:
    B, S, H, D = inputs["q"].shape
    return 4 * B * H * S * S * D // (2 if inputs["causal"] else 1)


def _traffic(inputs: Inputs, backward: bool) -> int:
    q = inputs["q"]
    return sum(inputs[name].numel() for name in "qkv") + 2 * q.numel() + 4 * q.shape[:-1].numel()


def _sizes(*sizes: tuple[int, ...]) -> tuple[Dims, ...]:
    return tuple(dict(zip("BSHD", size, strict=True)) for size in sizes)


FLASH_ATTN_FP8 = OpSpec(
    name="flash_attn_fp8",
    family="attention",
    function=fastkern.flash_attn_fp8,
    reference=reference,
    baseline=baseline,
    yardstick=yardstick,
    make=_make,
    dims=(),
    variants=({},),
    differentiable=(),
    strided=(),
    batched=(),
    traffic=_traffic,
    flops=_flops,
    bench_dims=_sizes(
        (1, 64, 4, 64),
        (8, 2048, 16, 128),
        (1, 16384, 32, 64),
        (1, 16384, 16, 128),
        (1, 16384, 8, 256),
    ),
    cpu_bench_dims=_sizes((2, 1024, 8, 64)),
    dtypes=(torch.bfloat16,),
)

SPECS = (FLASH_ATTN_FP8,)
