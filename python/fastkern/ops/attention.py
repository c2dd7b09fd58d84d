# SPDX-License-Identifier: Apache-2.0
"""Exact attention in memory linear in the lengths: the functions. Their shapes and gradients: _attention.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastkern.ops import _attention, _attention_merge, _check, _gradient, _philox

_flash_attn_fwd = torch.ops.fastkern.flash_attn_fwd.default
_flash_attn_varlen_fwd = torch.ops.fastkern.flash_attn_varlen_fwd.default
_merge_attention_fwd = torch.ops.fastkern.merge_attention_fwd.default
_attn_dropout_mask = torch.ops.fastkern.attn_dropout_mask.default

_TENSORS = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
_PACKED_TENSORS = ("q", "k", "v", "alibi_slopes", "sinks")

Window = tuple["int | None", "int | None"]


def _sides(op: str, window: Any) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"fastkern::{op}: window must be a pair of numbers or None, got {window!r}")
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


def _is_top_left(op: str, causal_align: str) -> bool:
    if causal_align not in ("bottom_right", "top_left"):
        raise RuntimeError(f'fastkern::{op}: causal_align must be "bottom_right" or "top_left", got {causal_align!r}')
    return causal_align == "top_left"


@overload
def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: Window = ..., scale: float | None = ...,
    bias: Tensor | None = ..., alibi_slopes: Tensor | None = ..., softcap: float = ..., sinks: Tensor | None = ...,
    dropout_p: float = ..., seed: Tensor | None = ..., offset: Tensor | None = ..., causal_align: str = ...,
    prefix: Tensor | None = ..., block_mask: Tensor | None = ..., block_size: int = ...,
    seqused_q: Tensor | None = ..., seqused_k: Tensor | None = ..., return_lse: Literal[False] = ...,
    deterministic: bool = ...
) -> Tensor: ...  # fmt: skip


@overload
def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: Window = ..., scale: float | None = ...,
    bias: Tensor | None = ..., alibi_slopes: Tensor | None = ..., softcap: float = ..., sinks: Tensor | None = ...,
    dropout_p: float = ..., seed: Tensor | None = ..., offset: Tensor | None = ..., causal_align: str = ...,
    prefix: Tensor | None = ..., block_mask: Tensor | None = ..., block_size: int = ...,
    seqused_q: Tensor | None = ..., seqused_k: Tensor | None = ..., return_lse: Literal[True],
    deterministic: bool = ...
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: Window = ..., scale: float | None = ...,
    bias: Tensor | None = ..., alibi_slopes: Tensor | None = ..., softcap: float = ..., sinks: Tensor | None = ...,
    dropout_p: float = ..., seed: Tensor | None = ..., offset: Tensor | None = ..., causal_align: str = ...,
    prefix: Tensor | None = ..., block_mask: Tensor | None = ..., block_size: int = ...,
    seqused_q: Tensor | None = ..., seqused_k: Tensor | None = ..., return_lse: bool = ..., deterministic: bool = ...
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = (-1, -1),
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    causal_align: str = "bottom_right",
    prefix: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: int = 128,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention: ``softmax(scale * q @ k.T + bias) @ v`` for each entry of the batch and each head.

    Exact, in one pass over the keys, without the S x T matrix in memory: Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018; Dao, Fu, Ermon, Rudra and Ré, "FlashAttention: Fast and Memory-Efficient Exact
    Attention with IO-Awareness", 2022; Dao, "FlashAttention-2", 2023. In full::

        s[i, j] = cap(scale * q[i] . k[j]) + bias[i, j] - alibi_slopes * |position(i) - j|
        lse[i]  = log(sum over visible j of exp(s[i, j]) + exp(sinks))
        out[i]  = sum over visible j of dropout(exp(s[i, j] - lse[i])) * v[j]

    with ``cap(x) = softcap * tanh(x / softcap)`` and ``position(i) = i + T - S`` (the last query stands beside the last
    key) or, with ``causal_align="top_left"``, i (the first beside the first). Query i sees key j if
    ``position(i) - window[0] <= j <= position(i) + window[1]`` or ``j < prefix``, and where ``block_mask`` and a bool
    ``bias`` have True. The same operator is ``torch.ops.fastkern.flash_attn``, which draws no seed.

    Args:
        q: (B, S, H, D), float32, float16 or bfloat16, on the CPU or a CUDA device. Any strides where the last dimension
            is dense, those of expanded tensors too; else a dense copy is made first.
        k: (B, T, G, D), dtype and device of ``q``. G divides H: query head h reads key head ``h // (H // G)``
            (multi-query and grouped-query attention).
        v: (B, T, G, Dv), dtype and device of ``q``.
        causal: query i sees no key after its position: a ``window[1]`` of 0.
        window: how many keys before and after its position a query sees, itself not counted; None or -1: all.
        scale: finite in float32; None: ``1 / sqrt(D)``.
        bias: (B, H, S, T), of which the first three may be 1. float32, float16 or bfloat16 is added to the scores;
            of bool, True makes visible. Any strides; an expanded tensor is not copied.
        alibi_slopes: (H,) or (B, H), float32: a penalty that grows with the distance. Press, Smith and Lewis, "Train
            Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation", 2021. No gradient.
        softcap: a positive float32; 0: none. As in Gemma 2, 2024; 30 to 50 there.
        sinks: (H,), float32, float16 or bfloat16: the score of a key that every query sees and that has no value, as in
            GPT-OSS, 2025; Xiao, Tian, Chen, Han and Lewis, "Efficient Streaming Language Models with Attention Sinks",
            2023.
        dropout_p: probability, at least 0 and below 1, that a weight is dropped; kept ones are multiplied by
            ``1 / (1 - dropout_p)``. 0 for evaluation: there is no ``training`` flag.
        seed: one int64 on the device of ``q``. None with ``dropout_p > 0``: seed and offset are drawn by
            ``torch.randint`` from torch's generator of that device, so ``torch.manual_seed`` repeats a run and
            ``torch.utils.checkpoint`` repeats a forward.
        offset: one int64 on the device of ``q``, a second part of the seed, e.g. a step; None: 0.
        causal_align: ``"bottom_right"`` or ``"top_left"``; says what a position is, so it matters to ``window`` and
            ``alibi_slopes`` as well, where S and T differ.
        prefix: (B,) int32: keys before it are visible to every query of the entry, whatever ``causal`` and ``window``
            say.
        block_mask: (H or 1, ceil(S / block_size), ceil(T / block_size)) bool: blocks of the score matrix that are
            computed at all.
        block_size: 64 or 128.
        seqused_q: (B,) int32: how many queries of an entry there are. Rows beyond: out 0, lse -inf.
        seqused_k: (B,) int32: how many keys of an entry there are; S and T above are these. Rows beyond are never read.
        return_lse: also give ``lse``.
        deterministic: True asks for gradients that are the same bits every time. They are in any case.

    Returns:
        ``out`` (B, S, H, Dv), contiguous, of the dtype of ``q``; with ``return_lse`` ``(out, lse)``, lse (B, H, S)
        float32. A query that sees nothing gives 0 and -inf (with a sink: the sink), and no gradients.

    Raises:
        RuntimeError: a dtype, shape, device or number other than the above; the message names the argument. Also
            ``alibi_slopes`` that require grad, a second derivative, and forward mode (the operator itself then gives no
            tangent).
        TypeError: an operand is no tensor; ``window`` is no pair.

    Notes:
        * Differentiable once in ``q``, ``k``, ``v``, a float ``bias`` and ``sinks``, through out and through lse. The
          gradient of a broadcast bias is summed. Backward computes the scores again; it saves the operands, out and
          lse.
        * Scores, softmax and sums are float32, whatever the dtype; autocast changes nothing.
        * Deterministic, forward and backward, and batch-invariant: an entry's result does not depend on the others.
        * NaN or infinities in keys and values that no query may see because of ``seqused_k`` change nothing; those in
          what a mask alone hides may.
        * Whether a weight is dropped depends on seed, offset, entry, head, query and key alone;
          :func:`attn_dropout_mask` gives the mask. Backward draws it again, and nothing of it is stored.
        * Works under ``torch.compile``, ``torch.export`` and ``torch.func`` (``vmap``, ``grad``). ``vmap`` over q, k
          and v is one call; over anything else, and with dropout, one call for each entry, with the same mask.
        * ``torch.utils.flop_counter`` counts the matrix products, masks not discounted.
        * S, T, B and H may be 0.
    """
    op = "flash_attn"
    if dropout_p and seed is None:
        seed, offset = _philox.draw(op, offset, q=q)
    left, right = _sides(op, window)
    options = (
        causal, left, right, scale, bias, alibi_slopes, softcap, sinks, dropout_p, seed, offset,
        _is_top_left(op, causal_align), prefix, block_mask, block_size, seqused_q, seqused_k, deterministic,
    )  # fmt: skip
    if _gradient.wanted(op, _TENSORS, q, k, v, bias, alibi_slopes, sinks):
        out, lse = _with_gradient(q, k, v, *options)
    else:
        out, lse = _flash_attn_fwd(q, k, v, *options)
    return (out, lse) if return_lse else out


@overload
def flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., causal: bool = ..., window: Window = ..., scale: float | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: Tensor | None = ..., offset: Tensor | None = ..., causal_align: str = ..., prefix: Tensor | None = ...,
    seqused_q: Tensor | None = ..., seqused_k: Tensor | None = ..., return_lse: Literal[False] = ...,
    deterministic: bool = ...
) -> Tensor: ...  # fmt: skip


@overload
def flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., causal: bool = ..., window: Window = ..., scale: float | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: Tensor | None = ..., offset: Tensor | None = ..., causal_align: str = ..., prefix: Tensor | None = ...,
    seqused_q: Tensor | None = ..., seqused_k: Tensor | None = ..., return_lse: Literal[True],
    deterministic: bool = ...
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., causal: bool = ..., window: Window = ..., scale: float | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: Tensor | None = ..., offset: Tensor | None = ..., causal_align: str = ..., prefix: Tensor | None = ...,
    seqused_q: Tensor | None = ..., seqused_k: Tensor | None = ..., return_lse: bool = ..., deterministic: bool = ...
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def flash_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: Window = (-1, -1),
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    causal_align: str = "bottom_right",
    prefix: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`flash_attn` on sequences of different lengths, one behind the other without padding.

    Args:
        q: (total, H, D): the queries of B sequences.
        k: (total, G, D): their keys; another total, if need be.
        v: (total, G, Dv).
        cu_seqlens_q: (B + 1,) int32: sequence b has rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of ``q``. Read
            on the device. Wrong numbers never lead out of a tensor. Queries in no sequence: out 0, lse -inf.
        cu_seqlens_k: (B + 1,) int32: the same for ``k`` and ``v``. Sequences may be empty.
        max_seqlen_q: an int or None; not needed, for callers of other libraries.
        max_seqlen_k: the same.
        causal: as in :func:`flash_attn`.
        window: as in :func:`flash_attn`.
        scale: as in :func:`flash_attn`.
        alibi_slopes: as in :func:`flash_attn`.
        softcap: as in :func:`flash_attn`.
        sinks: as in :func:`flash_attn`.
        dropout_p: as in :func:`flash_attn`.
        seed: as in :func:`flash_attn`.
        offset: as in :func:`flash_attn`.
        causal_align: as in :func:`flash_attn`, within each sequence.
        prefix: as in :func:`flash_attn`.
        seqused_q: (B,) int32: how many of its queries a sequence uses.
        seqused_k: (B,) int32: how many of its keys a sequence uses.
        return_lse: as in :func:`flash_attn`.
        deterministic: as in :func:`flash_attn`.

    Returns:
        ``out`` (total, H, Dv); with ``return_lse`` ``(out, lse)``, lse (H, total) float32.

    Raises:
        RuntimeError: as in :func:`flash_attn`.
        TypeError: as in :func:`flash_attn`; also a ``max_seqlen`` that is no int.

    Notes:
        What is said of :func:`flash_attn` holds here. A sequence gives the same as :func:`flash_attn` gives for it
        alone; dropout takes b for the entry of the batch. ``vmap`` is one call for each entry.
    """
    op = "flash_attn_varlen"
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length is not None and not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"fastkern::{op}: {name} must be an int or None, got {type(length).__name__}")
    if dropout_p and seed is None:
        seed, offset = _philox.draw(op, offset, q=q)
    left, right = _sides(op, window)
    options = (
        causal, left, right, scale, None, alibi_slopes, softcap, sinks, dropout_p, seed, offset,
        _is_top_left(op, causal_align), prefix, None, 128, seqused_q, seqused_k, deterministic,
    )  # fmt: skip
    if _gradient.wanted(op, _PACKED_TENSORS, q, k, v, alibi_slopes, sinks):
        out, lse = _varlen_with_gradient(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    else:
        out, lse = _flash_attn_varlen_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    return (out, lse) if return_lse else out


def _stacked(name: str, parts: Any) -> Any:
    """The tensors of a sequence as one; anything else as it is."""
    if not isinstance(parts, (list, tuple)):
        return parts
    op = "merge_attention"
    if not parts:
        raise RuntimeError(f"fastkern::{op}: {name} must have at least one tensor, got none")
    for i, part in enumerate(parts):
        if not isinstance(part, Tensor):
            raise _check.not_a_tensor(op, **{f"{name}[{i}]": part})
        for what in ("shape", "dtype", "device"):
            got, first = getattr(part, what), getattr(parts[0], what)
            if got != first:
                shown = tuple(got) if what == "shape" else got
                like = tuple(first) if what == "shape" else first
                raise RuntimeError(f"fastkern::{op}: {name}[{i}] must have {what} {like} like {name}[0], got {shown}")
    return torch.stack(list(parts))


def merge_attention(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attentions over parts of them: split keys, context parallelism, a shared prefix.

    ``lse = log(sum of exp(lses))``, ``out = sum of outs * exp(lses - lse)``: what :func:`flash_attn` with
    ``return_lse=True`` gives for the same queries and disjoint sets of keys becomes what it gives for all of them. At
    most one part may have ``sinks``. For :func:`flash_attn_varlen`, whose results have no batch: ``out[None]``,
    ``lse[None]``.

    Args:
        outs: (K, B, S, H, Dv), float32, float16 or bfloat16, or K tensors, which are stacked; K at least 1.
        lses: (K, B, H, S) float32, or K tensors.

    Returns:
        ``(out, lse)``: (B, S, H, Dv) of the dtype of ``outs``, computed in float32, and (B, H, S). A part whose lse is
        -inf has no weight; where all are, out is 0 and lse -inf.

    Raises:
        RuntimeError: a dtype, shape or device other than the above; the message names the argument.
        TypeError: an operand is no tensor.

    Notes:
        Differentiable in both, any number of times; deterministic. Forward mode and second derivatives are made of
        torch's operators.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    if _gradient.wanted("merge_attention", ("outs", "lses"), outs, lses):
        return _attention_merge.merge_with_gradient(outs, lses)
    return _merge_attention_fwd(outs, lses)


def attn_dropout_mask(
    B: int, H: int, S: int, T: int, dropout_p: float, seed: Tensor, offset: Tensor | None = None
) -> Tensor:
    """Which weights :func:`flash_attn` keeps with these numbers: for tests and for other implementations.

    A weight depends on (seed, offset, entry, head, query, key) alone, by Philox 4x32-10 (Salmon, Moraes, Dror and Shaw,
    "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): not on lengths, device or launch.

    Args:
        B: entries of the batch.
        H: heads of the queries.
        S: queries.
        T: keys.
        dropout_p: probability, at least 0 and below 1, that a weight is dropped.
        seed: one int64; the mask is made on its device.
        offset: one int64 on the device of ``seed``, or None for 0.

    Returns:
        (B, H, S, T) bool, True where a weight is kept.

    Raises:
        RuntimeError: a negative size, another probability, seed or offset; the message names the argument.
    """
    return _attn_dropout_mask(B, H, S, T, dropout_p, seed, offset)


_with_gradient = _attention.register("flash_attn", packed=False)
_varlen_with_gradient = _attention.register("flash_attn_varlen", packed=True)
