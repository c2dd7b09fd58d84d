# SPDX-License-Identifier: Apache-2.0
"""The checks of cpp/torch/attention_call.cpp, in the same order and words, for the fakes of the attentions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkern.ops import _check


class Options(NamedTuple):
    """What is said of an attention beside q, k and v, in the order of the schema."""

    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    scale: float | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    offset: Tensor | None = None
    top_left: bool = False
    prefix: Tensor | None = None
    block_mask: Tensor | None = None
    block_size: int = 128
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    deterministic: bool = True


class Shapes(NamedTuple):
    """Of what a call gives."""

    out: tuple[Any, ...]
    lse: tuple[Any, ...]


Starts = Sequence["Tensor | None"]  # cu_seqlens_q and cu_seqlens_k of packed tensors, else nothing


def _fail(op: str, name: str, must: str, got: object) -> RuntimeError:
    return RuntimeError(f"fastkern::{op}: {name} must {must}, got {got}")


def _operand(op: str, name: str, t: Tensor, dtype: torch.dtype | None) -> None:
    """Of this dtype or, without one, of those that are computed with."""
    if dtype is None:
        _check.float_tensor(op, name, t)
        return
    _check.defined(op, name, t)
    if t.dtype != dtype:
        raise _fail(op, name, f"be {dtype}", t.dtype)


def _like_q(op: str, name: str, t: Tensor, q: Tensor, dtype: torch.dtype | None) -> None:
    _operand(op, name, t, dtype)
    if t.dtype != q.dtype:
        raise _fail(op, name, f"be {q.dtype} like q", t.dtype)


def _positive(op: str, name: str, t: Tensor) -> None:
    if t.shape[-1] < 1:
        raise _fail(op, name, "have a last dimension of at least 1", f"shape {tuple(t.shape)}")


def _broadcast(op: str, name: str, t: Tensor, sizes: Sequence[Any], broadcast: int) -> None:
    """The first ``broadcast`` sizes may be 1."""
    fits = t.dim() == len(sizes) and all(
        got == want or (d < broadcast and got == 1) for d, (got, want) in enumerate(zip(t.shape, sizes, strict=True))
    )
    if not fits:
        either = (f"{n} or 1" if d < broadcast and n != 1 else f"{n}" for d, n in enumerate(sizes))
        raise _fail(op, name, f"have shape ({', '.join(either)})", tuple(t.shape))


def _ints(op: str, name: str, t: Tensor | None, count: Any, q: Tensor) -> None:
    if t is not None:
        if t.dtype != torch.int32:
            raise _fail(op, name, "be torch.int32", t.dtype)
        _check.shape(op, name, t, (count,))
        _check.device(op, name, t, q, "q")


def _operands(
    op: str, q: Tensor, k: Tensor, v: Tensor, starts: Starts, dtype: torch.dtype | None
) -> tuple[Shapes, Any]:
    """Shapes of the results and how many entries the batch has."""
    _operand(op, "q", q, dtype)
    if q.dim() != (3 if starts else 4):
        wanted = "three dimensions (total, H, D)" if starts else "four dimensions (B, S, H, D)"
        raise _fail(op, "q", f"have {wanted}", f"shape {tuple(q.shape)}")
    _positive(op, "q", q)
    batch = "" if starts else f"{q.shape[0]}, "
    heads = q.shape[-2]

    _like_q(op, "k", k, q, dtype)
    if k.dim() != q.dim() or (not starts and k.shape[0] != q.shape[0]) or k.shape[-1] != q.shape[-1]:
        rows = "total" if starts else "T"
        raise _fail(op, "k", f"have shape ({batch}{rows}, G, {q.shape[-1]})", tuple(k.shape))
    groups = k.shape[-2]
    if heads % groups != 0 if groups > 0 else heads != 0:
        raise _fail(op, "k", f"have a number of heads that divides the {heads} heads of q", groups)
    _check.device(op, "k", k, q, "q")

    _like_q(op, "v", v, q, dtype)
    if v.dim() != q.dim() or any(got != want for got, want in zip(v.shape[:-1], k.shape[:-1], strict=True)):
        raise _fail(op, "v", f"have shape ({batch}{k.shape[-3]}, {groups}, Dv)", tuple(v.shape))
    _positive(op, "v", v)
    _check.device(op, "v", v, q, "q")

    out = (*q.shape[:-1], v.shape[-1])
    if not starts:
        return Shapes(out, (q.shape[0], heads, q.shape[1])), q.shape[0]
    first, second = starts
    _check.defined(op, "cu_seqlens_q", first)
    assert first is not None
    if first.dim() != 1 or first.shape[0] < 1:
        raise _fail(op, "cu_seqlens_q", "have shape (B + 1,)", tuple(first.shape))
    _ints(op, "cu_seqlens_q", first, first.shape[0], q)
    _check.defined(op, "cu_seqlens_k", second)
    _ints(op, "cu_seqlens_k", second, first.shape[0], q)
    return Shapes(out, (heads, q.shape[0])), first.shape[0] - 1


def _numbers(op: str, o: Options) -> None:
    if o.window_left < -1:
        raise _fail(op, "window_left", "be at least -1", o.window_left)
    if o.window_right < -1:
        raise _fail(op, "window_right", "be at least -1", o.window_right)
    if o.scale is not None:
        _check.finite(op, "scale", o.scale)
    _check.softcap(op, o.softcap)
    if o.block_size not in (64, 128):
        raise _fail(op, "block_size", "be 64 or 128", o.block_size)


def dropout(op: str, p: float, seed: Tensor | None, offset: Tensor | None, like: Tensor, name: str = "q") -> None:
    """A probability below 1, and one int64 each for seed and offset."""
    if not 0 <= p < 1:
        raise _fail(op, "dropout_p", "be at least 0 and below 1", p)
    for argument, t in (("seed", seed), ("offset", offset)):
        if t is not None:
            _check.one_element(op, argument, t, torch.int64, like, name)
    if seed is None and p > 0:
        raise _fail(op, "seed", "be given with dropout_p > 0", None)


def _options(op: str, q: Tensor, k: Tensor, starts: Starts, batch: Any, o: Options) -> None:
    heads = q.shape[-2]
    for name, t in (("bias", o.bias), ("block_mask", o.block_mask)):
        if starts and t is not None:
            raise _fail(op, name, "be None, packed sequences take none", f"a tensor of shape {tuple(t.shape)}")
    if o.bias is not None:
        if o.bias.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.bool):
            raise _fail(op, "bias", "be torch.float32, torch.float16, torch.bfloat16 or torch.bool", o.bias.dtype)
        _broadcast(op, "bias", o.bias, (batch, heads, q.shape[1], k.shape[1]), 3)
        _check.device(op, "bias", o.bias, q, "q")
    if o.alibi_slopes is not None:
        slopes = o.alibi_slopes
        if slopes.dtype != torch.float32:
            raise _fail(op, "alibi_slopes", "be torch.float32", slopes.dtype)
        if not (_check.same_shape(slopes, (batch, heads)) or _check.same_shape(slopes, (heads,))):
            raise _fail(op, "alibi_slopes", f"have shape ({heads},) or ({batch}, {heads})", tuple(slopes.shape))
        _check.device(op, "alibi_slopes", slopes, q, "q")
    if o.sinks is not None:
        _check.float_tensor(op, "sinks", o.sinks)
        _check.shape(op, "sinks", o.sinks, (heads,))
        _check.device(op, "sinks", o.sinks, q, "q")
    dropout(op, o.dropout_p, o.seed, o.offset, q)
    _ints(op, "prefix", o.prefix, batch, q)
    if o.block_mask is not None:
        if o.block_mask.dtype != torch.bool:
            raise _fail(op, "block_mask", "be torch.bool", o.block_mask.dtype)
        blocks = [(n + o.block_size - 1) // o.block_size for n in (q.shape[1], k.shape[1])]
        _broadcast(op, "block_mask", o.block_mask, (heads, *blocks), 1)
        _check.device(op, "block_mask", o.block_mask, q, "q")
    _ints(op, "seqused_q", o.seqused_q, batch, q)
    _ints(op, "seqused_k", o.seqused_k, batch, q)


def call(
    op: str, q: Tensor, k: Tensor, v: Tensor, starts: Starts, options: Options, dtype: torch.dtype | None = None
) -> Shapes:
    """Everything that forward and backward are both called with. ``dtype``: which one q, k and v must have."""
    shapes, batch = _operands(op, q, k, v, starts, dtype)
    _numbers(op, options)
    _options(op, q, k, starts, batch, options)
    return shapes


def same(op: str, name: str, t: Tensor, shape: Sequence[Any], dtype: torch.dtype, q: Tensor, like: str = "q") -> None:
    """What backward gets beside: of this shape and dtype, on the device of q, which the operator calls ``like``."""
    _check.float_tensor(op, name, t)
    if t.dtype != dtype:
        raise _fail(op, name, f"be {dtype}", t.dtype)
    _check.shape(op, name, t, shape)
    _check.device(op, name, t, q, like)


def needed(op: str, options: Options, need_dbias: bool, need_dsinks: bool) -> None:
    """No gradient of what has none."""
    if need_dbias and options.bias is None:
        raise _fail(op, "need_dbias", "be False without bias", True)
    if need_dbias and options.bias is not None and options.bias.dtype == torch.bool:
        raise _fail(op, "need_dbias", "be False with a bias of torch.bool", True)
    if need_dsinks and options.sinks is None:
        raise _fail(op, "need_dsinks", "be False without sinks", True)
