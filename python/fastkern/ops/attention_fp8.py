# SPDX-License-Identifier: Apache-2.0
"""Attention of operands in 8 bits, forward only."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastkern.ops import _attention_check, _batching, _check, _schema
from fastkern.ops._attention_check import Options
from fastkern.ops.attention import Window, _is_top_left, _sides

_OP = "flash_attn_fp8"
_flash_attn_fp8 = torch.ops.fastkern.flash_attn_fp8.default


@overload
def flash_attn_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None = ..., k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ..., *, causal: bool = ..., window: Window = ..., scale: float | None = ...,
    sinks: Tensor | None = ..., causal_align: str = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., seqused_q: Tensor | None = ..., seqused_k: Tensor | None = ...,
    return_lse: Literal[False] = ...
) -> Tensor: ...  # fmt: skip


@overload
def flash_attn_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None = ..., k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ..., *, causal: bool = ..., window: Window = ..., scale: float | None = ...,
    sinks: Tensor | None = ..., causal_align: str = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., seqused_q: Tensor | None = ..., seqused_k: Tensor | None = ...,
    return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def flash_attn_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None = ..., k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ..., *, causal: bool = ..., window: Window = ..., scale: float | None = ...,
    sinks: Tensor | None = ..., causal_align: str = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., seqused_q: Tensor | None = ..., seqused_k: Tensor | None = ...,
    return_lse: bool = ...
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def flash_attn_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    causal: bool = False,
    window: Window = (-1, -1),
    scale: float | None = None,
    sinks: Tensor | None = None,
    causal_align: str = "bottom_right",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of operands in 8 bits, which stand for ``q * q_scale``, ``k * k_scale``, ``v * v_scale``; forward only.

    Else :func:`flash_attn` or, with ``cu_seqlens_q``, :func:`flash_attn_varlen`. As FlashAttention-3 has it: Shah,
    Bikshandi, Zhang, Thakkar, Ramani and Dao, "FlashAttention-3: Fast and Accurate Attention with Asynchrony and
    Low-precision", 2024. Sums over keys are float32 after every 128 of them, as the tensor cores' own are not. On CUDA
    it needs compute capability 9.0.

    Args:
        q: (B, S, H, D) or, with ``cu_seqlens_q``, (total, H, D); float8_e4m3fn, on the CPU or a CUDA device. Any
            strides. On CUDA D and Dv are multiples of 16, at most 256.
        k: (B, T, G, D) or (total, G, D), float8_e4m3fn. G divides H.
        v: (B, T, G, Dv) or (total, G, Dv), float8_e4m3fn.
        q_scale: float32 of shape (B, G), (G,) or (): what q of the query heads that read a key head is multiplied with;
            None: 1. B is the number of sequences where tensors are packed.
        k_scale: the same for k.
        v_scale: the same for v.
        causal: as in :func:`flash_attn`.
        window: as in :func:`flash_attn`.
        scale: as in :func:`flash_attn`; on CUDA above 0.
        sinks: as in :func:`flash_attn`.
        causal_align: as in :func:`flash_attn`.
        cu_seqlens_q: as in :func:`flash_attn_varlen`; None: the tensors are not packed.
        cu_seqlens_k: as in :func:`flash_attn_varlen`; with ``cu_seqlens_q``.
        seqused_q: as in :func:`flash_attn`.
        seqused_k: as in :func:`flash_attn`.
        return_lse: also give ``lse``.

    Returns:
        ``out`` (B, S, H, Dv) or (total, H, Dv), bfloat16, contiguous; with ``return_lse`` ``(out, lse)``, lse (B, H, S)
        or (H, total), float32. A query that sees nothing gives 0 and -inf.

    Raises:
        RuntimeError: a dtype, shape, device or number other than the above; the message names the argument. A CUDA
            device of another capability.
        TypeError: an operand is no tensor; ``window`` is no pair.

    Notes:
        * No gradient: float8 tensors have none, and ``sinks`` and scales that require one are refused.
        * The CPU computes in float32. On CUDA weights are rounded to float8_e4m3fn, the largest of a row between 2^6
          and 2^8.8: 3 bits, down to 2^-12 of it. The sum they are divided by is of weights that are not rounded.
        * Deterministic and batch-invariant, on CUDA with more than 128 columns among packed calls, and among others
          with T at most 16384 or above; NaN in rows beyond a sequence change nothing.
        * On CUDA v is transposed first, into memory of its size.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise _check.not_a_tensor(_OP, **{name: t})
    _check.no_gradient(_OP, q=q, k=k, v=v, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, sinks=sinks)
    left, right = _sides(_OP, window)
    out, lse = _flash_attn_fp8(
        q, k, v, q_scale, k_scale, v_scale, causal, left, right, scale, sinks, _is_top_left(_OP, causal_align),
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    )  # fmt: skip
    return (out, lse) if return_lse else out


# ---- shapes for tracing, batching ------------------------------------------------------------------------------------


def _check_scale(name: str, t: Tensor | None, batch: Any, heads: Any, q: Tensor) -> None:
    if t is None:
        return
    if t.dtype != torch.float32:
        raise RuntimeError(f"fastkern::{_OP}: {name} must be torch.float32, got {t.dtype}")
    if not any(_check.same_shape(t, shape) for shape in ((batch, heads), (heads,), ())):
        shapes = f"({batch}, {heads}), ({heads},) or ()"
        raise RuntimeError(f"fastkern::{_OP}: {name} must have shape {shapes}, got {tuple(t.shape)}")
    _check.device(_OP, name, t, q, "q")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float | None,
    sinks: Tensor | None,
    top_left: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        got = "None" if cu_seqlens_k is None else "a tensor"
        raise RuntimeError(f"fastkern::{_OP}: cu_seqlens_k must be given if and only if cu_seqlens_q is, got {got}")
    starts = () if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k)
    options = Options(
        causal=causal, window_left=window_left, window_right=window_right, scale=scale, sinks=sinks,
        top_left=top_left, seqused_q=seqused_q, seqused_k=seqused_k,
    )  # fmt: skip
    shapes = _attention_check.call(_OP, q, k, v, starts, options, dtype=torch.float8_e4m3fn)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    for name, t in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        _check_scale(name, t, batch, k.shape[-2], q)
    return q.new_empty(shapes.out, dtype=torch.bfloat16), q.new_empty(shapes.lse, dtype=torch.float32)


_schema.register_fake(_OP, _fake)
_batching.register(_OP, check=_fake)
