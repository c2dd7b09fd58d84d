# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of attention modules whose forward calls a function of its file for them.

``apply_rotary_pos_emb`` is a global of the file, and a module can not be given another one without changing it for
every model. So a patched attention has the very code of its own forward, in which that one name is another function:
projections, caches, masks and the attention that the configuration names are called as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastkern.integrations._patched import FLOATS, Patched, say_once
from fastkern.integrations._probe import agree, numbers, quietly, stand_in
from fastkern.ops.rope import rope

_NAME = "apply_rotary_pos_emb"


class RotaryForward(Patched):
    """The mark of a patched attention; its ``forward`` is made of the one that was there."""


@dataclass(frozen=True)
class Rotary:
    """How the function turns the halves of a head."""

    once: bool  # the tables have each angle once, not twice
    partial: bool  # tables narrower than a head turn its first columns
    forward = RotaryForward
    by = "fastkern.rope"

    def forward_for(self, base: Any) -> Any:
        """The forward of ``base``, with these kernels in place of the function of its file."""
        inner: Any = _calling(base.forward)
        return _with_name(base.forward, inner, self.function(inner.__globals__[_NAME]))

    def function(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """What takes the place of ``own``, which is called for everything that is not known to be the same."""

        def turn(*given: Any, **options: Any) -> Any:
            odd = self._odd(given, options)
            if odd is not None:
                say_once(f"{own.__module__}.{_NAME}: it is called itself for {odd}")
                return own(*given, **options)
            q, k, cos, sin = given
            rotary_dim = cos.shape[-1] * (2 if self.once else 1)
            if options.get("unsqueeze_dim", 1) == 2:
                return rope(q, k, cos, sin, rotary_dim=rotary_dim)
            q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, rotary_dim=rotary_dim)
            return q.transpose(1, 2), k.transpose(1, 2)

        return turn

    def _odd(self, given: tuple[Any, ...], options: dict[str, Any]) -> str | None:
        axis = options.get("unsqueeze_dim", 1)
        tensors = len(given) == 4 and all(isinstance(x, Tensor) for x in given)
        if not tensors or axis not in (1, 2) or set(options) - {"unsqueeze_dim"}:
            return "other arguments than the tensors q, k, cos, sin and unsqueeze_dim"
        q, k, cos, sin = given
        if any(x.dtype not in FLOATS for x in given) or q.dtype != k.dtype or cos.dtype != sin.dtype:
            return f"{q.dtype}, {k.dtype}, {cos.dtype} and {sin.dtype}"
        # Under autocast what follows converts them anyway; else the function would give the wider type.
        wider = torch.promote_types(q.dtype, cos.dtype) != q.dtype
        if wider and not torch.is_autocast_enabled(q.device.type):
            return f"{q.dtype} with tables of {cos.dtype}"
        if len({x.device for x in given}) > 1 or cos.requires_grad or sin.requires_grad:
            return "tables on another device, or with a gradient"
        if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
            return "tensors of other shapes"
        rows = q.shape[0], q.shape[3 - axis]
        if rows != (k.shape[0], k.shape[3 - axis]) or cos.shape[0] not in (1, rows[0]) or cos.shape[1] != rows[1]:
            return "tables of other tokens"
        turned = cos.shape[-1] * (2 if self.once else 1)
        if k.shape[-1] != q.shape[-1] or turned > q.shape[-1] or turned % 2:
            return "tables of another width than a head"
        return "tables narrower than a head" if turned < q.shape[-1] and not self.partial else None


# ---- the forward with another function -------------------------------------------------------------------------------


def _calling(function: Any) -> FunctionType | None:
    """The function, or the one that its decorators wrap, if that calls the global."""
    while isinstance(function, FunctionType):
        if _NAME in function.__code__.co_names and isinstance(function.__globals__.get(_NAME), FunctionType):
            return function
        function = _wrapped(function)
    return None


def _wrapped(function: FunctionType) -> Any:
    """What a decorator with ``functools.wraps`` wraps, if its closure is where it calls it."""
    inner = function.__dict__.get("__wrapped__")
    return inner if any(_holds(cell, inner) for cell in function.__closure__ or ()) else None


def _holds(cell: CellType, inner: Any) -> bool:
    try:
        return cell.cell_contents is inner
    except ValueError:  # empty
        return False


def _with_name(function: FunctionType, inner: FunctionType, new: Callable[..., Any]) -> FunctionType:
    """A copy of ``function`` in which ``inner``, itself or wrapped by it, finds ``new`` under the name."""
    names, closure, attributes = function.__globals__, function.__closure__, dict(function.__dict__)
    if function is inner:
        # Without its name, so that torch.compile looks into this dictionary, not into the module called that.
        names = {k: v for k, v in names.items() if k != "__name__"}
        names[_NAME] = new
    else:
        wrapped = _wrapped(function)
        attributes["__wrapped__"] = replaced = _with_name(wrapped, inner, new)
        cells = closure or ()
        closure = tuple(CellType(replaced) if _holds(cell, wrapped) else cell for cell in cells)
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__dict__.update(attributes)
    return made


# ---- finding it ------------------------------------------------------------------------------------------------------


def rotary(module: nn.Module, around: Iterable[nn.Module]) -> Rotary | str | None:
    """The recipe of an attention module; None if it does not call such a function.

    ``around``: the modules of its model, among them those that make its tables.
    """
    kind = type(module)
    inner = _calling(kind.forward)
    if inner is None or not module._modules:
        return None
    if "forward" in module.__dict__:
        return "its forward was replaced on the object already"
    recipe = _recipe(inner.__globals__[_NAME])
    if isinstance(recipe, str):
        return recipe
    makers = [m for m in around if type(m).__module__ == kind.__module__ and "Rotary" in type(m).__name__]
    if not makers:
        return "what makes its tables of angles is not in its file"
    for maker in makers:
        wrong = None if recipe.once else _not_twice(maker)
        if wrong is not None:
            return wrong
    return recipe


def _recipe(own: Any) -> Rotary | str:
    q, k = numbers(2, 4, 3, 8), numbers(2, 2, 3, 8, seed=1)
    half = numbers(2, 2, 3, 4, seed=2)  # cos and sin of 4 angles, as far as the formula cares
    once, twice, narrow = half, torch.cat((half, half), -1), half[..., :2].repeat(1, 1, 1, 2)

    def same(recipe: Rotary, tables: Tensor, dtype: torch.dtype) -> bool:
        given = [x.to(dtype) for x in (q, k, *tables)]
        try:
            with torch.no_grad():
                want, got = own(*given), recipe.function(own)(*given)
        except Exception:  # the function of any file: what it does not take it does not compute
            return False
        return len(want) == 2 and all(agree(a, b, dtype) for a, b in zip(got, want, strict=True))

    types = (torch.float32, torch.bfloat16)
    for recipe, tables in ((Rotary(False, False), twice), (Rotary(True, False), once)):
        if all(same(recipe, tables, dtype) for dtype in types):
            wide = Rotary(False, True)
            return wide if not recipe.once and all(same(wide, narrow, dtype) for dtype in types) else recipe
    return "its rotary function computes something else"


def _not_twice(maker: nn.Module) -> str | None:
    """Why the tables of a module may not be those of pairs of columns i and W/2 + i with one angle."""
    takes = inspect.signature(type(maker).forward).parameters
    options: list[dict[str, Any]] = [{}]
    if "layer_type" in takes:
        kinds = getattr(getattr(maker, "config", None), "layer_types", None) or ()
        options = [{"layer_type": kind} for kind in dict.fromkeys(kinds)]
    try:
        buffers = {k: None if b is None else b.detach().cpu() for k, b in maker._buffers.items()}
        made = stand_in(maker, _buffers=buffers)
        for extra in options:
            for table in quietly(made, torch.zeros(1, 3, 8), torch.arange(3)[None], **extra):
                first, second = table.chunk(2, -1)
                if table.dim() != 3 or not torch.equal(first, second):
                    return "its tables are not of an angle for each pair"
    except Exception as error:  # the forward of any class: whatever it raises is the reason
        return f"its tables can not be tried: {type(error).__name__}"
    return None
