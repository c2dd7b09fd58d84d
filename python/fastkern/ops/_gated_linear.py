# SPDX-License-Identifier: Apache-2.0
"""The second half of a gated MLP: a linear layer of a gated activation, which is not kept for the backward pass.

A linear layer keeps its input for the gradient of its weight, and a gated activation keeps its own two inputs. The
first is a function of the other two: computing it again costs one elementwise kernel, and spares a third of what an MLP
keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from fastkern.ops import _gradient, activation

_ops = torch.ops.fastkern
# Of each activation the operator, and what stands between its inputs and what is needed.
GATED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "swiglu": ("swiglu", (False,)),
    "geglu": ("geglu", ("none", False)),
    "geglu_tanh": ("geglu", ("tanh", False)),
    "reglu": ("reglu", (False,)),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def gated_linear(name: str, a: Tensor, b: Tensor | None, layer: Any, with_bias: bool = True) -> Tensor:
    """``layer(act(a, b))``; or without the bias of the layer, which must be a linear one then.

    Where the layer is a linear one and nothing looks on, neither hooks nor a trace nor a transform, the backward pass
    computes the activation once more: the same bits.

    Args:
        name: of the activation: ``"swiglu"``, ``"geglu"`` (with erf), ``"geglu_tanh"`` or ``"reglu"``.
        a: as in :func:`fastkern.swiglu`.
        b: as in :func:`fastkern.swiglu`; None: ``a`` is packed, in halves.
        layer: what is called with the activation.
        with_bias: whether the bias is added.
    """
    op, options = GATED[name]
    if _is_plain(layer, a, b) and torch.is_grad_enabled():
        device, weight, bias = a.device.type, layer.weight, layer.bias if with_bias else None
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if weight.requires_grad and a.dtype == dtype:
            bias = None if bias is None else bias.to(dtype)
            y: Tensor = _GatedLinear.apply(op, options, a, b, weight.to(dtype), bias)
            return y
    middle: Tensor = getattr(activation, op)(a, b, *options)
    return layer(middle) if with_bias else F.linear(middle, layer.weight)


def _is_plain(layer: Any, *inputs: Tensor | None) -> bool:
    """Whether to call the layer is to call ``F.linear``, in eager mode, on plain tensors."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or torch.compiler.is_compiling():
        return False
    if any(getattr(layer, name) or getattr(modules, f"_global{name}") for name in _HOOKS):
        return False
    tensors = (layer.weight, layer.bias, *inputs)
    return all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors) and not _gradient.transformed()


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: str, options: tuple[Any, ...], a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.op, ctx.options = op, options
        ctx.save_for_backward(a, b, weight, bias)
        return F.linear(getattr(_ops, f"{op}_fwd").default(a, b, *options), weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b, weight, bias = ctx.saved_tensors
        op, options, needs = ctx.op, ctx.options, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable

            def formula(a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
                return F.linear(getattr(activation, op)(a, b, *options), weight, bias)

            return None, None, *activation.differentiable(formula, (a, b, weight, bias), needs, dy)
        rows = dy.reshape(-1, dy.shape[-1])
        da = db = dweight = dbias = None
        if needs[0] or needs[1]:
            dmiddle = torch.mm(rows, weight).view(*dy.shape[:-1], weight.shape[1])
            da, db = getattr(_ops, f"{op}_bwd").default(dmiddle, a, b, *options, needs[0], needs[1])
            da, db = da if needs[0] else None, db if needs[1] else None
            del dmiddle
        if needs[2]:
            middle = getattr(_ops, f"{op}_fwd").default(a, b, *options)
            dweight = torch.mm(rows.t(), middle.reshape(-1, weight.shape[1]))
        if needs[3]:
            dbias = rows.sum(0)
        return None, None, da, db, dweight, dbias
