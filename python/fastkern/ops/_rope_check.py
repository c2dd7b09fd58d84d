# SPDX-License-Identifier: Apache-2.0
"""The checks of cpp/torch/rope_call.cpp, in the same order and words, for the fakes of the rotary operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkern.ops import _check

MOST_OF_A_NORM = 512  # kQkNormMost


class Options(NamedTuple):
    """What follows the tables, in the order of the schemas."""

    positions: Tensor | None = None
    interleaved: bool = False
    rotary_dim: int | None = None
    cu_seqlens: Tensor | None = None


def _fail(op: str, name: str, must: str, got: object) -> RuntimeError:
    return RuntimeError(f"fastkern::{op}: {name} must {must}, got {got}")


def _or_one(size: Any) -> str:
    return "1" if size == 1 else f"{size} or 1"


def heads(op: str, q: Tensor, k: Tensor | None) -> None:
    """(B, S, H, D) or (total, H, D), k but for the number of heads."""
    _check.float_tensor(op, "q", q)
    if q.dim() not in (3, 4):
        raise _fail(op, "q", "have four dimensions (B, S, H, D) or three (total, H, D)", f"shape {tuple(q.shape)}")
    if k is None:
        return
    _check.float_tensor(op, "k", k)
    _like_q(op, "k", k, q)
    fits = k.dim() == q.dim() and all(
        d == q.dim() - 2 or got == want for d, (got, want) in enumerate(zip(k.shape, q.shape, strict=True))
    )
    if not fits:
        batch = f"{q.shape[0]}, " if q.dim() == 4 else ""
        raise _fail(op, "k", f"have shape ({batch}{q.shape[-3]}, G, {q.shape[-1]})", tuple(k.shape))
    _check.device(op, "k", k, q, "q")


def _like_q(op: str, name: str, t: Tensor, q: Tensor) -> None:
    if t.dtype != q.dtype:
        raise _fail(op, name, f"be {q.dtype} like q", t.dtype)


def norm(op: str, q: Tensor, eps: float, weight_offset: float, **weights: Tensor | None) -> None:
    """Heads that a norm takes, its numbers and weights."""
    if q.shape[-1] > MOST_OF_A_NORM:
        raise _fail(op, "q", f"have a head dimension of at most {MOST_OF_A_NORM}", f"shape {tuple(q.shape)}")
    _check.eps(op, eps)
    _check.finite(op, "weight_offset", weight_offset)
    for name, t in weights.items():
        if t is not None:
            _check.float_tensor(op, name, t)
            _check.shape(op, name, t, q.shape[-1:])
            _check.device(op, name, t, q, "q")


def like_heads(op: str, name: str, t: Tensor, like: Tensor, q: Tensor) -> None:
    """The gradient of a result."""
    _check.float_tensor(op, name, t)
    _like_q(op, name, t, q)
    _check.shape(op, name, t, like.shape)
    _check.device(op, name, t, q, "q")


def tables(op: str, q: Tensor, cos: Tensor, sin: Tensor, o: Options, normed: bool = False) -> None:
    """Tables that have a row for every token, or for some positions."""
    n, tokens = q.shape[-1], q.shape[-3]
    rotary_dim = n if o.rotary_dim is None else o.rotary_dim
    if not (2 <= rotary_dim <= n and rotary_dim % 2 == 0):
        raise _fail(op, "rotary_dim", f"be even, at least 2 and at most the head dimension of q, {n}", rotary_dim)
    if normed and n > MOST_OF_A_NORM - 16 and rotary_dim % 16 != 0:
        raise _fail(op, "rotary_dim", f"be a multiple of 16 in heads of {n} columns", rotary_dim)
    _check.float_tensor(op, "cos", cos)
    per_token = cos.dim() == 3 and q.dim() == 4
    fits = cos.dim() == 2 or per_token
    fits = fits and (cos.shape[-1] == rotary_dim or 2 * cos.shape[-1] == rotary_dim)
    if per_token:
        fits = fits and (cos.shape[0] == q.shape[0] or cos.shape[0] == 1) and cos.shape[1] == tokens
    if not fits:
        shapes = "(T, W)" + (f" or ({_or_one(q.shape[0])}, {tokens}, W)" if q.dim() == 4 else "")
        raise _fail(op, "cos", f"have shape {shapes} with W {rotary_dim // 2} or {rotary_dim}", tuple(cos.shape))
    _check.device(op, "cos", cos, q, "q")
    _check.float_tensor(op, "sin", sin)
    if sin.dtype != cos.dtype:
        raise _fail(op, "sin", f"be {cos.dtype} like cos", sin.dtype)
    _check.shape(op, "sin", sin, cos.shape)
    _check.device(op, "sin", sin, q, "q")
    if o.positions is not None:
        _positions(op, q, cos, o.positions)
    if o.cu_seqlens is not None:
        _cu_seqlens(op, q, o.cu_seqlens, o.positions is not None)
    if not per_token and o.positions is None and o.cu_seqlens is None and cos.shape[0] < tokens:
        raise _fail(op, "cos", f"have a row for each of {tokens} positions", f"shape {tuple(cos.shape)}")


def _positions(op: str, q: Tensor, cos: Tensor, t: Tensor) -> None:
    tokens = q.shape[-3]
    if t.dtype not in (torch.int64, torch.int32):
        raise _fail(op, "positions", "be torch.int64 or torch.int32", t.dtype)
    if cos.dim() != 2:
        raise _fail(op, "positions", "be None where cos has a row for each token", f"shape {tuple(t.shape)}")
    fits = t.dim() == 1 and t.shape[0] == tokens
    if t.dim() == 2 and q.dim() == 4:
        fits = (t.shape[0] == q.shape[0] or t.shape[0] == 1) and t.shape[1] == tokens
    if not fits:
        shapes = f"({tokens},)" + (f" or ({_or_one(q.shape[0])}, {tokens})" if q.dim() == 4 else "")
        raise _fail(op, "positions", f"have shape {shapes}", tuple(t.shape))
    _check.device(op, "positions", t, q, "q")


def _cu_seqlens(op: str, q: Tensor, t: Tensor, with_positions: bool) -> None:
    if t.dtype != torch.int32:
        raise _fail(op, "cu_seqlens", "be torch.int32", t.dtype)
    if q.dim() != 3 or with_positions:
        why = "beside positions" if with_positions else "unless q is (total, H, D)"
        raise _fail(op, "cu_seqlens", f"be None {why}", f"shape {tuple(t.shape)}")
    if t.dim() != 1 or t.shape[0] < 1:
        raise _fail(op, "cu_seqlens", "have shape (B + 1,)", tuple(t.shape))
    _check.device(op, "cu_seqlens", t, q, "q")


def needed(op: str, need: bool, name: str, operand: str, t: Tensor | None) -> None:
    """No gradient of what is not there."""
    if need and t is None:
        raise _fail(op, name, f"be False without a {operand}", True)


def table_gradient(op: str, name: str) -> RuntimeError:
    """There is none."""
    return RuntimeError(f"fastkern::{op}: {name} must not require grad, it has no gradient here; detach it")


def no_table_gradient(op: str, **tables: Any) -> None:
    """Refuse what would silently get no gradient."""
    for name, t in tables.items():
        if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
            raise table_gradient(op, name)
