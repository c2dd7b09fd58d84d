# SPDX-License-Identifier: Apache-2.0
"""What the registered schemas say: arguments, their order and defaults."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

# Where Inductor has no lowering for an operator, it makes one and says so: before torch 2.13 in a text with all that
# its arguments were computed from, which is written whether it is logged or not. Deep in a model that takes hours.
_INDUCTOR_SAYS_ALL = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


def arguments(op: str) -> Sequence[Any]:
    """Of ``torch.ops.fastkern.<op>``."""
    return getattr(torch.ops.fastkern, op).default._schema.arguments


def complete(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for ``fastkern::<op>``, called with every argument: torch leaves out defaults."""
    schema = [(a.name, a.default_value) for a in arguments(op)]

    def completed(*given: Any, **named: Any) -> Any:
        return function(*given, *(named.get(name, default) for name, default in schema[len(given) :]))

    return completed


def register_fake(op: str, fake: Callable[..., Any]) -> None:
    """``fake`` for ``fastkern::<op>``, called with every argument."""
    completed = complete(op, fake)
    if not _INDUCTOR_SAYS_ALL:
        torch.library.register_fake(f"fastkern::{op}")(completed)
        return

    def announced(*given: Any, **named: Any) -> Any:
        """Inductor traces a graph, fakes included, before it lowers it."""
        lowering = sys.modules.get("torch._inductor.lowering")
        if lowering is not None:
            make_lowering(lowering, op)
        return completed(*given, **named)

    torch.library.register_fake(f"fastkern::{op}")(announced)


def make_lowering(lowering: Any, op: str) -> None:
    """What ``torch._inductor.lowering`` is about to do for ``fastkern::<op>``, without a word."""
    target = getattr(torch.ops.fastkern, op).default
    try:
        if target not in lowering.lowerings:
            tag = lowering.get_layout_constraint_tag(target, with_default=True)
            lowering.make_fallback(target, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)
    except AttributeError:  # not a public module
        return


class Order:
    """Between the order of an operator's arguments and that of its family's functions."""

    def __init__(self, op: str, names: Sequence[str]) -> None:
        schema = [argument.name for argument in arguments(op)]
        self.family = itemgetter(*(schema.index(name) for name in names))
        self.operator = itemgetter(*(names.index(name) for name in schema))
        self._missing = (False,) * len(schema)

    def needs(self, ctx: Any) -> tuple[bool, ...]:
        """``ctx.needs_input_grad`` in the family's order; torch leaves out arguments that equal their default."""
        found = ctx.needs_input_grad
        return self.family((*found, *self._missing[len(found) :]))
