# SPDX-License-Identifier: Apache-2.0
"""What the registered schemas say: arguments, their order and defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch


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
    torch.library.register_fake(f"fastkern::{op}")(complete(op, fake))


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
