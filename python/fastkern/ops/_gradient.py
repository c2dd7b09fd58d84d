# SPDX-License-Identifier: Apache-2.0
"""The ways into an operator's gradient; the formula itself is the family's.

Calls of ``torch.ops.fastkern.<op>``, and traced ones, find the formula through ``register_autograd``. The Python
function goes through an ``autograd.Function`` in eager mode, at half the host time; under ``torch.func`` through one
with a ``setup_context``, which ``torch.func`` asks for and which costs more. ``<op>_fwd`` and ``<op>_bwd`` have no
formula: letting the autograd keys fall through spares them torch's boxed fallback on every call. Forward mode is
composed of torch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from fastkern.ops import _check

_functorch_active = torch._C._are_functorch_transforms_active
_fallthrough = torch.library.Library("fastkern", "IMPL")


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward mode is active: ``requires_grad`` tells nothing then."""
    return _functorch_active() or forward_ad._current_level >= 0


def wanted(op: str, names: Sequence[str], *tensors: Any) -> bool:
    """Whether a call with these tensors (the first one must be there) takes the way with a gradient."""
    try:
        if torch.is_grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return True
    except AttributeError:
        raise _check.not_a_tensor(op, **dict(zip(names, tensors, strict=True))) from None
    return transformed()


def register(
    name: str,
    *,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    grad: Callable[..., Any],
    composite: Callable[..., Any],
) -> Callable[..., Any]:
    """Give ``fastkern::<name>`` its gradient and return the function that computes with it.

    Args:
        name: of the operator; ``<name>_fwd`` exists beside it and, as a rule, ``<name>_bwd``.
        save: ``setup_context(ctx, inputs, output)``.
        grad: ``backward(ctx, *grad_outs)``. With grad mode on (``create_graph=True``) its result is differentiable.
        composite: the operator in differentiable torch operations.
    """
    op = getattr(torch.ops.fastkern, name).default
    fwd = getattr(torch.ops.fastkern, f"{name}_fwd").default
    torch.library.register_autograd(f"fastkern::{name}", grad, setup_context=save)
    for helper in (f"{name}_fwd", f"{name}_bwd"):
        if hasattr(torch.ops.fastkern, helper):  # a gradient may be made of torch's operators
            _fallthrough.impl(helper, torch.library.fallthrough_kernel, "Autograd")

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = fwd(*inputs)
        save(ctx, inputs, output)
        return output

    def forward_alone(*inputs: Any) -> Any:
        return fwd(*inputs)

    backward = staticmethod(grad)
    eager = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": backward})
    functional = type(
        name,
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(forward_alone),
            "setup_context": staticmethod(save),
            "backward": backward,
        },
    )

    def with_gradient(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        if forward_ad._current_level >= 0:
            return composite(*inputs)
        return (functional if _functorch_active() else eager).apply(*inputs)  # type: ignore[attr-defined]

    return with_gradient
