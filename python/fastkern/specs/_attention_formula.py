# SPDX-License-Identifier: Apache-2.0
"""Attention in plain differentiable PyTorch: in float64 the truth, in the dtype of the inputs what a user would write.

The arguments are those of the operators, the semantics those of cpp/include/fastkern/attention.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkern.ops import _philox

# ---- what sees what --------------------------------------------------------------------------------------------------


def _lengths(used: Tensor | None, most: int) -> Tensor | int:
    """(B, 1, 1, 1), or one number for all entries."""
    return most if used is None else used.clamp(0, most).long().reshape(-1, 1, 1, 1)


def _places(
    q: Tensor, k: Tensor, top_left: bool, seqused_q: Tensor | None, seqused_k: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | int, Tensor | int]:
    """Positions of the queries and of the keys, that broadcast to (B, 1, S, T), and the lengths."""
    S, T = q.shape[1], k.shape[1]
    queries, keys = _lengths(seqused_q, S), _lengths(seqused_k, T)
    i = torch.arange(S, device=q.device).reshape(1, 1, S, 1)
    j = torch.arange(T, device=q.device).reshape(1, 1, 1, T)
    return (i if top_left else i + (keys - queries)), j, queries, keys


def visible(
    q: Tensor,
    k: Tensor,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    top_left: bool = False,
    prefix: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: int = 128,
    mask: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: bool, broadcasts to (B, H, S, T)."""
    S, T = q.shape[1], k.shape[1]
    position, j, queries, keys = _places(q, k, top_left, seqused_q, seqused_k)
    window_right = 0 if causal else window_right
    seen = torch.ones(1, 1, S, T, dtype=torch.bool, device=q.device)
    if window_left >= 0:
        seen = seen & (j >= position - window_left)
    if window_right >= 0:
        seen = seen & (j <= position + window_right)
    if prefix is not None:
        seen = seen | (j < prefix.reshape(-1, 1, 1, 1))
    if block_mask is not None:
        blocks = block_mask.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)
        seen = seen & blocks[None, :, :S, :T]
    if mask is not None:
        seen = seen & mask
    return seen & (j < keys) & within(q, queries)


def within(q: Tensor, queries: Tensor | int) -> Tensor:
    """The query rows that are in their sequence, (B or 1, 1, S, 1)."""
    return torch.arange(q.shape[1], device=q.device).reshape(1, 1, -1, 1) < queries


def dropout_mask(
    B: int, H: int, S: int, T: int, dropout_p: float, seed: Tensor, offset: Tensor | None = None, first: int = 0
) -> Tensor:
    """What dropout keeps of the probabilities of entries ``first``, ``first + 1``, ...: bool (B, H, S, T)."""
    device = seed.device
    b = torch.arange(first, first + B, device=device).reshape(B, 1, 1, 1)
    h = torch.arange(H, device=device).reshape(1, H, 1, 1)
    i = torch.arange(S, device=device).reshape(1, 1, S, 1)
    block = torch.arange((T + 3) // 4, device=device).reshape(1, 1, 1, -1)
    start = torch.zeros_like(seed) if offset is None else offset
    index, entry = (i << 30) + block, start.reshape(()) + ((b * H + h) << 32)
    random = torch.stack(_philox.words(seed.reshape(()), entry, index), -1).flatten(-2)[..., :T]
    return random >= min(int(dropout_p * 2**32), 2**32 - 1)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    top_left: bool = False,
    prefix: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: int = 128,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    deterministic: bool = True,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse). Products are in the dtype of the inputs, the softmax is in float32 or, of float64, in float64.

    ``first`` is the number that dropout gives the first entry of the batch.
    """
    H, group = q.shape[2], q.shape[2] // max(k.shape[2], 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = bias if bias is not None and bias.dtype == torch.bool else None
    seen = visible(q, k, causal, window_left, window_right, top_left, prefix, block_mask, block_size, mask,
                   seqused_q, seqused_k)  # fmt: skip
    position, j, queries, _ = _places(q, k, top_left, seqused_q, seqused_k)

    keys, values = (t.repeat_interleave(group, 2) if group > 1 else t for t in (k, v))
    if seqused_k is not None:  # what is beyond has no say, NaN included
        beyond = (torch.arange(k.shape[1], device=k.device) >= seqused_k.reshape(-1, 1))[:, :, None, None]
        keys, values = keys.masked_fill(beyond, 0), values.masked_fill(beyond, 0)
    scores = torch.einsum("bshd,bthd->bhst", q * scale, keys)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(wide)
    if bias is not None and mask is None:
        scores = scores + bias.to(wide)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(wide).reshape(-1, H, 1, 1)
        scores = scores - slopes * (position - j).abs()
    scores = scores.masked_fill(~seen, -math.inf)

    # A row that sees nothing is made of zeros and -inf without an inf - inf, so that it has no NaN gradient.
    sink = None if sinks is None else sinks.to(wide).reshape(1, H, 1)
    shape = scores.shape[:-1]
    top = scores.detach().amax(-1) if scores.shape[-1] else scores.new_full(shape, -math.inf)
    top = top if sink is None else torch.maximum(top, sink.detach())
    top = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp(scores - top[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = torch.where(within(q, queries)[..., 0], total + torch.exp(sink - top), total)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, top + torch.log(total))
    weights = weights / total[..., None]
    if dropout_p > 0:
        assert seed is not None
        B, _, S, T = weights.shape
        keep = dropout_mask(B, H, S, T, dropout_p, seed, offset, first)
        weights = weights * keep / (1 - dropout_p)
    out = torch.einsum("bhst,bthd->bshd", weights.to(v.dtype), values)
    return out, lse


def _as_said(q: Tensor, k: Tensor, causal: bool, top_left: bool, options: dict[str, Any]) -> bool:
    """Whether torch's operator can say the same: no mask but a causal one at the top left, no option but a bias."""
    bias = options.get("bias")
    unsaid = [
        name for name, value in options.items()
        if name not in ("scale", "bias", "deterministic", "block_size")
        and (isinstance(value, Tensor) or value not in (None, -1, 0.0))
    ]  # fmt: skip
    unsaid += [name for name in ("window_left", "window_right") if options.get(name) == 0]
    aligned = not causal or ((q.shape[1] == k.shape[1] or top_left) and bias is None)
    return not unsaid and aligned and q.numel() > 0 and k.numel() > 0 and (bias is None or bias.is_floating_point())


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, top_left: bool = False, **options: Any
) -> Tensor:
    """The output as torch gives it: its operator where that can say the same, else the formula."""
    if not _as_said(q, k, causal, top_left, options):
        return attention(q, k, v, causal=causal, top_left=top_left, **options)[0]
    bias = options.get("bias")
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if bias is None else bias.to(q.dtype),
        is_causal=causal,
        scale=options.get("scale"),
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def attention_torch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse): torch's operator, which gives no differentiable lse, with that of the formula."""
    out, lse = attention(q, k, v, **options)
    causal, top_left = options.pop("causal", False), options.pop("top_left", False)
    if _as_said(q, k, causal, top_left, options):
        out = torch_attention(q, k, v, causal=causal, top_left=top_left, **options)
    return out, lse


# ---- packed sequences ------------------------------------------------------------------------------------------------


def spans(cu_seqlens: Tensor, total: int) -> list[tuple[int, int]]:
    """The rows of each sequence, cut to the tensor."""
    edges = cu_seqlens.tolist()
    starts = [min(max(edge, 0), total) for edge in edges[:-1]]
    return [(start, max(min(end, total), start)) for start, end in zip(starts, edges[1:], strict=True)]


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    prefix: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    *,
    function: Callable[..., tuple[Tensor, Tensor | None]] = attention,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed sequences, one after the other, each by ``function``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    operands = [t for t in (q, k, v, options.get("sinks")) if t is not None]
    nothing = torch.stack([t[:0].sum().to(wide) for t in operands]).sum()  # 0, and in the graph of every result
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[-1]) + nothing.to(q.dtype)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=wide) + nothing
    used_q, used_k = (None if used is None else used.tolist() for used in (seqused_q, seqused_k))
    places = zip(spans(cu_seqlens_q, q.shape[0]), spans(cu_seqlens_k, k.shape[0]), strict=True)
    for b, ((begin_q, end_q), (begin_k, end_k)) in enumerate(places):
        end_q = end_q if used_q is None else min(end_q, begin_q + max(used_q[b], 0))
        end_k = end_k if used_k is None else min(end_k, begin_k + max(used_k[b], 0))
        one = slice(b, b + 1)
        own_out, own_lse = function(
            q[None, begin_q:end_q],
            k[None, begin_k:end_k],
            v[None, begin_k:end_k],
            alibi_slopes=alibi_slopes[one] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes,
            prefix=None if prefix is None else prefix[one],
            **({"first": b} if options.get("dropout_p") else {}),
            **options,
        )
        out[begin_q:end_q] = own_out[0]
        if own_lse is not None:
            lse[:, begin_q:end_q] = own_lse[0]
    return out, lse


def varlen_torch(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The same by torch's operator where that can say the same."""
    return varlen(*args, function=attention_torch, **options)


def torch_varlen(*args: Tensor, **options: Any) -> Tensor:
    """The output alone."""
    return varlen(*args, function=lambda *qkv, **asked: (torch_attention(*qkv, **asked), None), **options)[0]


# ---- parts of one attention ------------------------------------------------------------------------------------------


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of the parts, in float32 or, of float64, in float64; the output in the dtype of the parts."""
    wide = torch.promote_types(outs.dtype, torch.float32)
    lses = lses.to(wide)
    top = lses.detach().amax(0)
    top = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, top + torch.log(total))
    shares = (weights / total).transpose(-1, -2)[..., None]
    parts = outs.to(wide).masked_fill(shares == 0, 0)  # whatever its output is
    out = (parts * shares).sum(0)
    return out.to(outs.dtype), lse
