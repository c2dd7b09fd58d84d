# SPDX-License-Identifier: Apache-2.0
"""Classes that stand in for a module's own, with the same parameters and another forward.

A module is patched by giving it another class, derived from its own: nothing else of it changes, so ``isinstance``,
``state_dict``, hooks and names stay what they were, and giving back the old class undoes it without a trace.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fastkern.ops._gated_linear import GATED, gated_linear
from fastkern.ops.norm import layer_norm, rms_norm

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_said: set[str] = set()


def say_once(message: str) -> None:
    """A warning of the logger ``fastkern``, the first time."""
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logging.getLogger("fastkern").warning(message)


class Patched:
    """The mark of a patched class, and how its instances are pickled and copied: by their own class and a recipe."""

    _fastkern_base: Any
    _fastkern_recipe: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        get_state = getattr(self, "__getstate__", None)  # Python 3.10 has none of object's
        state = get_state() if get_state is not None else dict(self.__dict__)
        return _rebuild, (self._fastkern_base, self._fastkern_recipe), state

    def _fastkern_own(self, why: str, *args: Any, **kwargs: Any) -> Any:
        """The forward that was there before."""
        say_once(f"{self._fastkern_base.__name__}: its own forward is taken for {why}")
        return self._fastkern_base.forward(self, *args, **kwargs)


def _rebuild(base: Any, recipe: Any) -> Any:
    made = patched_class(base, recipe)
    return made.__new__(made)


@cache
def patched_class(base: Any, recipe: Any) -> Any:
    """The class derived from ``base`` that does what ``recipe`` says, under the name of ``base``.

    The name goes into saved configurations, and others look for modules by it.
    """
    make = getattr(recipe, "forward_for", None)
    facts = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_fastkern_base": base,
        "_fastkern_recipe": recipe,
        "forward": make(base) if make else _looking_like(recipe.forward.forward, base.forward),
    }
    return type(base.__name__, (recipe.forward, base), facts)


def _looking_like(function: Any, other: Callable[..., Any]) -> Any:
    """The function under the signature of another one: generation and trainers look which inputs a model takes."""
    made: Any = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    made.__doc__, made.__signature__ = function.__doc__, inspect.signature(other)
    return made


def _odd_call(x: Any, args: Any, kwargs: Any) -> str | None:
    """Why a call is not the one that a forward of one tensor was replaced for."""
    if not isinstance(x, Tensor) or args or kwargs:
        return "a call with other arguments than one tensor"
    return None if x.dtype in FLOATS else f"{x.dtype}"


def _given(x: Any, args: Any) -> tuple[Any, ...]:
    return args if x is None else (x, *args)


# ---- norms -----------------------------------------------------------------------------------------------------------


class NormForward(Patched):
    """``forward`` of a norm over the last dimension."""

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The norm of x; everything else goes to the forward that was there before."""
        odd = _odd_call(x, args, kwargs)
        if odd is not None:
            return self._fastkern_own(odd, *_given(x, args), **kwargs)
        return self._fastkern_recipe(self, x)


@dataclass(frozen=True)
class Norm:
    """How a norm computes."""

    kind: str  # rms or layer
    eps: str  # the attribute
    weight_offset: float
    promote: bool  # the result has the wider type of input and weight, not that of the input
    torch_autocast: bool  # one of torch's functions, which autocast runs in float32 on CUDA
    forward = NormForward

    @property
    def by(self) -> str:
        return f"fastkern.{self.kind}_norm"

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        weight, bias, eps = module._parameters.get("weight"), module._parameters.get("bias"), getattr(module, self.eps)
        if eps is None:
            eps = torch.finfo(torch.float32).eps  # as torch.nn.RMSNorm, whatever the type
        dtype = x.dtype
        if self.torch_autocast and x.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.float32
        elif self.promote and weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
        if self.kind == "rms":
            return rms_norm(x, weight, eps, bias, self.weight_offset, dtype)
        return layer_norm(x, weight, bias, eps, self.weight_offset, dtype)


# ---- gated MLPs ------------------------------------------------------------------------------------------------------


class MlpForward(Patched):
    """``forward`` of a gated MLP: two projections (or one of both halves), an activation, a projection."""

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The MLP of x; everything else goes to the forward that was there before."""
        odd = _odd_call(x, args, kwargs)
        if odd is not None:
            return self._fastkern_own(odd, *_given(x, args), **kwargs)
        return self._fastkern_recipe(self, x)


@dataclass(frozen=True)
class Mlp:
    """The names of the projections, which are called as the modules that they are, and the activation."""

    gate: str  # or the packed projection
    up: str | None
    down: str
    act: str
    forward = MlpForward

    @property
    def kind(self) -> str:
        """Among those of ``gated_linear``."""
        return {"silu": "swiglu", "relu": "reglu", "gelu_tanh": "geglu_tanh"}.get(self.act, "geglu")

    @property
    def by(self) -> str:
        return f"fastkern.{GATED[self.kind][0]}"

    def __call__(self, module: Any, x: Tensor) -> Any:
        gate = getattr(module, self.gate)(x)
        up = None if self.up is None else getattr(module, self.up)(x)
        return gated_linear(self.kind, gate, up, getattr(module, self.down))
