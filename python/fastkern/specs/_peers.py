# SPDX-License-Identifier: Apache-2.0
"""Columns of the benchmark that several families share: apex, FlashAttention, xFormers, FlagGems.

Each takes the inputs of its row by keyword, imports its package at the call, and raises ImportError where that is not
installed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# ---- norms -----------------------------------------------------------------------------------------------------------


def apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apex's fused RMS norm."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, weight.shape, eps)


def apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Apex's fused layer norm."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x, weight, bias, weight.shape, eps)


def flag_gems_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """FlagGems's RMS norm."""
    import flag_gems

    return flag_gems.rms_norm(x, tuple(weight.shape), weight, eps)


# ---- attention -------------------------------------------------------------------------------------------------------


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **options: Any) -> Tensor:
    """FlashAttention 2's function, whose causal mask is aligned at the bottom right as ours is."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=causal, **options)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **options: Any) -> Tensor:
    """XFormers's operator, the causal mask aligned at the bottom right."""
    from xformers.ops import fmha, memory_efficient_attention

    bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if causal else None
    return memory_efficient_attention(q, k, v, attn_bias=bias, **options)


# ---- activations, losses ---------------------------------------------------------------------------------------------


def flag_gems_swiglu(a: Tensor, b: Tensor, **_: Any) -> Tensor:
    """FlagGems's SiLU and product."""
    import flag_gems

    return flag_gems.silu_and_mul(a, b)


def flag_gems_geglu(a: Tensor, b: Tensor, approximate: str = "none", **_: Any) -> Tensor:
    """FlagGems's GELU and product."""
    import flag_gems

    return flag_gems.gelu_and_mul(a, b, approximate)


def flag_gems_cross_entropy(logits: Tensor, target: Tensor, **_: Any) -> Tensor:
    """FlagGems's cross entropy, the mean over the rows; in float32 as the others."""
    import flag_gems

    return flag_gems.cross_entropy_loss(logits, target).float()
