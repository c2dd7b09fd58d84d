# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings, alone, in place, and behind a norm of each head."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fastkern.ops import _check, _gradient, _rope

_rope_fwd = torch.ops.fastkern.rope_fwd.default
_rope_inplace = torch.ops.fastkern.rope_.default
_qk_norm_rope_fwd = torch.ops.fastkern.qk_norm_rope_fwd.default

_TENSORS = ("q", "k", "cos", "sin")
_NORM_TENSORS = ("q", "k", "q_weight", "k_weight", "cos", "sin")


@overload
def rope(
    q: Tensor, k: None, cos: Tensor, sin: Tensor, positions: Tensor | None = ..., interleaved: bool = ...,
    rotary_dim: int | None = ..., cu_seqlens: Tensor | None = ..., inverse: bool = ...
) -> Tensor: ...  # fmt: skip


@overload
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = ..., interleaved: bool = ...,
    rotary_dim: int | None = ..., cu_seqlens: Tensor | None = ..., inverse: bool = ...
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def rope(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None = ..., interleaved: bool = ...,
    rotary_dim: int | None = ..., cu_seqlens: Tensor | None = ..., inverse: bool = ...
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotary position embeddings: turns pairs of each head's columns by an angle that the token's position gives.

    Su, Lu, Pan, Murtadha, Wen and Liu, "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    ``(a, b)`` becomes ``(a * cos - b * sin, b * cos + a * sin)``, where a and b are columns i and ``rotary_dim / 2 +
    i`` (halves, as in GPT-NeoX, Llama and Hugging Face's models) or, ``interleaved``, columns 2i and 2i + 1 (as in
    GPT-J and the first Llama). Columns from ``rotary_dim`` on stay as they are. The same operator is
    ``torch.ops.fastkern.rope``, which gives two results always.

    Args:
        q: (B, S, H, D) or, packed, (total, H, D); float32, float16 or bfloat16, on the CPU or a CUDA device. Any
            strides where the last dimension is dense, so also a slice of a fused projection or ``x.transpose(1, 2)`` of
            a (B, H, S, D); else a dense copy is made first.
        k: (B, S, G, D) or (total, G, D), G of its own, dtype and device of ``q``; or None.
        cos: (T, W): row p is for position p. Or (B, S, W) or (1, S, W): a row for each token. W is ``rotary_dim / 2``,
            or ``rotary_dim`` with each number twice, where the two columns of its pair are: the first of both is read.
            float32, float16 or bfloat16, whatever ``q`` is; float32 is best. :func:`rope_table` makes such tables.
        sin: like ``cos``.
        positions: (S,), (B, S) or (1, S), packed (total,); int64 or int32, for tables of (T, W). None: 0 to S - 1.
            Outside of the table: an error on the CPU, NaN in the columns that are turned on CUDA.
        interleaved: pairs lie side by side.
        rotary_dim: even, at most D; None: D.
        cu_seqlens: (sequences + 1,) int32, for packed tensors: sequence i has tokens ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]``, and its positions begin at 0. Read on the device; wrong numbers never lead out of a
            table. Tokens of no sequence stay as they are.
        inverse: turns by the negative angle, which undoes the rotation.

    Returns:
        ``(q, k)`` turned, or q alone where ``k`` is None: contiguous, of the dtype of ``q``. Computed in float32 and
        rounded once, whatever the dtype of the tables.

    Raises:
        RuntimeError: a dtype, shape or device other than the above, or a table that requires grad; the message names
            the argument. On the CPU also a position outside of the table.
        TypeError: ``q``, ``k``, ``cos`` or ``sin`` is no tensor.

    Notes:
        * Deterministic, and the same bits for any strides: every pair is computed by itself.
        * Backward turns the gradients by the negative angle and saves the tables and positions alone. Any order of
          derivatives; the tables have no gradient.
        * Under autocast the dtypes given are kept.
        * Works under ``torch.compile``, ``torch.export``, ``torch.func`` (``vmap``, ``grad``, ``jvp``) and CUDA graph
          capture. ``vmap`` over q and k is one call where positions are the same for all entries.
    """
    options = positions, interleaved, rotary_dim, cu_seqlens, inverse
    if _gradient.wanted("rope", _TENSORS, q, k, cos, sin):
        out = _rope.with_gradient(q, k, cos, sin, *options)
    else:
        out = _rope_fwd(q, k, cos, sin, *options)
    return out[0] if k is None else out


@overload
def rope_(
    q: Tensor, k: None, cos: Tensor, sin: Tensor, positions: Tensor | None = ..., interleaved: bool = ...,
    rotary_dim: int | None = ..., cu_seqlens: Tensor | None = ..., inverse: bool = ...
) -> Tensor: ...  # fmt: skip


@overload
def rope_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = ..., interleaved: bool = ...,
    rotary_dim: int | None = ..., cu_seqlens: Tensor | None = ..., inverse: bool = ...
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def rope_(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None = ..., interleaved: bool = ...,
    rotary_dim: int | None = ..., cu_seqlens: Tensor | None = ..., inverse: bool = ...
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def rope_(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`rope` in place, for inference: ``q`` and ``k`` are overwritten. No gradient.

    Args:
        q: as in :func:`rope`; overwritten. Any strides that put each element at an address of its own, with a dense
            last dimension. Others are refused, not copied.
        k: as ``q``, and not the memory of ``q``; or None.
        cos: as in :func:`rope`.
        sin: as in :func:`rope`.
        positions: as in :func:`rope`.
        interleaved: as in :func:`rope`.
        rotary_dim: as in :func:`rope`. Columns from there on are not touched.
        cu_seqlens: as in :func:`rope`.
        inverse: as in :func:`rope`.

    Returns:
        ``(q, k)``, or q alone where ``k`` is None: the tensors given, with the bits that :func:`rope` gives.

    Raises:
        RuntimeError: as in :func:`rope`; also if an operand requires grad and gradients are on. Nothing is written
            then.
        TypeError: as in :func:`rope`.
    """
    _check.no_gradient("rope_", q=q, k=k, cos=cos, sin=sin)
    _rope_inplace(q, k, cos, sin, positions, interleaved, rotary_dim, cu_seqlens, inverse)
    for t in (q, k):
        if t is not None and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(t)  # what autograd may have saved is no longer what it was
    return q if k is None else (q, k)


@overload
def qk_norm_rope(
    q: Tensor, k: None, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float = ...,
    weight_offset: float = ..., positions: Tensor | None = ..., interleaved: bool = ..., rotary_dim: int | None = ...,
    cu_seqlens: Tensor | None = ...
) -> Tensor: ...  # fmt: skip


@overload
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    eps: float = ..., weight_offset: float = ..., positions: Tensor | None = ..., interleaved: bool = ...,
    rotary_dim: int | None = ..., cu_seqlens: Tensor | None = ...
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def qk_norm_rope(
    q: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    eps: float = ..., weight_offset: float = ..., positions: Tensor | None = ..., interleaved: bool = ...,
    rotary_dim: int | None = ..., cu_seqlens: Tensor | None = ...
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    positions: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """An RMS norm of each head of ``q`` and ``k``, then :func:`rope`, in one pass, as in Qwen3, Gemma 3 or OLMo 2.

    ``rope(rms_norm(q, q_weight, eps, weight_offset=weight_offset), rms_norm(k, k_weight, ...), cos, sin, ...)`` without
    the rounding in between. The same operator is ``torch.ops.fastkern.qk_norm_rope``, which gives two results always.

    Args:
        q: as in :func:`rope`; D at most 512.
        k: as in :func:`rope`.
        q_weight: (D,), float32, float16 or bfloat16 (not necessarily the dtype of ``q``); None for ones.
        k_weight: the same for ``k``.
        cos: as in :func:`rope`.
        sin: as in :func:`rope`.
        eps: added to the mean of squares, inside the root; finite and >= 0.
        weight_offset: added to the weights in float32, where they are given: 1.0 for Gemma.
        positions: as in :func:`rope`.
        interleaved: as in :func:`rope`.
        rotary_dim: as in :func:`rope`; a multiple of 16 where D is above 496. The norm is over all of D.
        cu_seqlens: as in :func:`rope`.

    Returns:
        ``(q, k)``, or q alone where ``k`` is None: contiguous, of the dtype of ``q``. Computed in float32 and rounded
        once.

    Raises:
        RuntimeError: as in :func:`rope`; also other weights, ``eps`` or ``weight_offset``, or a larger D.
        TypeError: an operand is no tensor.

    Notes:
        * Deterministic, forward and backward. Batch-invariant: a head's result does not depend on other heads or
          tokens.
        * Backward saves the inputs alone and takes one pass over them and the gradients; gradients of the weights are
          summed in float32 over parts of the tokens, then over the parts.
        * Second derivatives and forward mode take plain PyTorch formulas; the tables have no gradient.
        * Works under ``torch.compile``, ``torch.export``, ``torch.func`` and CUDA graph capture.
    """
    options = cos, sin, eps, weight_offset, positions, interleaved, rotary_dim, cu_seqlens
    if _gradient.wanted("qk_norm_rope", _NORM_TENSORS, q, k, q_weight, k_weight, cos, sin):
        out = _rope.norm_with_gradient(q, k, q_weight, k_weight, *options)
    else:
        out = _qk_norm_rope_fwd(q, k, q_weight, k_weight, *options)
    return out[0] if k is None else out
