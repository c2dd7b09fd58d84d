# SPDX-License-Identifier: Apache-2.0
"""Shapes, gradients and batching of merge_attention; attn_dropout_mask, which has neither gradient nor operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _attention_check, _batching, _check, _gradient, _schema

# ---- merge_attention -------------------------------------------------------------------------------------------------


_merge_attention_bwd = torch.ops.fastkern.merge_attention_bwd.default


def _check_merge(outs: Tensor, lses: Tensor, op: str = "merge_attention") -> None:
    _check.float_tensor(op, "outs", outs)
    _check.float_tensor(op, "lses", lses)
    if outs.dim() != 5 or outs.shape[0] < 1:
        raise RuntimeError(
            f"fastkern::{op}: outs must have shape (K, B, S, H, Dv) with K at least 1, got {tuple(outs.shape)}"
        )
    if lses.dtype != torch.float32:
        raise RuntimeError(f"fastkern::{op}: lses must be torch.float32, got {lses.dtype}")
    K, B, S, H, _ = outs.shape
    _check.shape(op, "lses", lses, (K, B, H, S))
    _check.device(op, "lses", lses, outs, "outs")


def _merge_fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    _check_merge(outs, lses)
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _weights(lses: Tensor) -> tuple[Tensor, Tensor]:
    """What the parts weigh, (K, B, H, S), and the lse of all; where no part has seen a key: 0 and -inf."""
    top = lses.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    shares = torch.exp(lses - top)
    total = shares.sum(0)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    return shares / safe, torch.where(empty, -torch.inf, top + safe.log())


def _rows(t: Tensor) -> Tensor:
    """(..., H, S) to (..., S, H, 1), to be multiplied with outs."""
    return t.transpose(-1, -2).unsqueeze(-1)


def _seen(outs: Tensor, lses: Tensor) -> Tensor:
    """In float32 and dense, for one order of sums; a part that saw nothing may be anything and is made 0."""
    return torch.where(_rows(lses) == -torch.inf, 0.0, outs.float()).contiguous()


def _merge_composite(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    _check_merge(outs, lses)
    weights, lse = _weights(lses.contiguous())
    return (_seen(outs, lses) * _rows(weights)).sum(0).to(outs.dtype), lse


def _merge_save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _merge_bwd_fake(
    dout: Tensor,
    dlse: Tensor | None,
    outs: Tensor,
    lses: Tensor,
    need_douts: bool = True,
    need_dlses: bool = True,
) -> tuple[Tensor, Tensor]:
    op = "merge_attention_bwd"
    _check_merge(outs, lses, op)
    _attention_check.same(op, "dout", dout, outs.shape[1:], outs.dtype, outs, "outs")
    if dlse is not None:
        _attention_check.same(op, "dlse", dlse, lses.shape[1:], torch.float32, outs, "outs")
    return outs.new_empty(outs.shape if need_douts else 0), lses.new_empty(lses.shape if need_dlses else 0)


def _merge_grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    outs, lses = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if dout is None and dlse is None:
        return None, None
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        return _merge_grad_differentiable(outs, lses, dout, dlse, *needs)
    dout = outs.new_zeros(outs.shape[1:]) if dout is None else dout
    douts, dlses = _merge_attention_bwd(dout, dlse, outs, lses, *needs)
    return douts if needs[0] else None, dlses if needs[1] else None


def _merge_grad_differentiable(
    outs: Tensor, lses: Tensor, dout: Tensor | None, dlse: Tensor | None, need_outs: bool, need_lses: bool
) -> tuple[Tensor | None, Tensor | None]:
    weights, lse = _weights(lses.contiguous())
    douts = dlses = None
    if dout is not None:
        wide = dout.float().contiguous()
        if need_outs:
            douts = torch.where(_rows(lses) == -torch.inf, 0.0, _rows(weights) * wide).to(outs.dtype)
        if need_lses:
            parts = (_seen(outs, lses) * wide).sum(-1).transpose(-1, -2)  # of each part: dout . out
            dlses = weights * (parts - (weights * parts).sum(0))
    if dlse is not None and need_lses:
        dlses = weights * dlse if dlses is None else dlses + weights * dlse
    if dlses is not None:
        dlses = torch.where(lse == -torch.inf, 0.0, dlses)  # whatever comes in where no part saw a key
    return douts, dlses


for _name in ("merge_attention", "merge_attention_fwd"):
    _schema.register_fake(_name, _merge_fake)
    _batching.register(_name)
_schema.register_fake("merge_attention_bwd", _merge_bwd_fake)
_batching.register("merge_attention_bwd")
merge_with_gradient = _gradient.register(
    "merge_attention", save=_merge_save, grad=_merge_grad, composite=_merge_composite
)

# ---- attn_dropout_mask -----------------------------------------------------------------------------------------------


def _dropout_mask_fake(B: int, H: int, S: int, T: int, dropout_p: float, seed: Tensor, offset: Tensor | None) -> Tensor:
    op = "attn_dropout_mask"
    for name, size in (("B", B), ("H", H), ("S", S), ("T", T)):
        if size < 0:
            raise RuntimeError(f"fastkern::{op}: {name} must be >= 0, got {size}")
    _check.defined(op, "seed", seed)
    _attention_check.dropout(op, dropout_p, seed, offset, seed, "seed")
    return seed.new_empty((B, H, S, T), dtype=torch.bool)


_schema.register_fake("attn_dropout_mask", _dropout_mask_fake)
_batching.register("attn_dropout_mask")
