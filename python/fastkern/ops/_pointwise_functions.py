# SPDX-License-Identifier: Apache-2.0
"""From a line of the table in elementwise.py a documented function, and one in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastkern.ops import _check
from fastkern.ops._pointwise import Number, Route, inplace, into

Operand = Tensor | Number


if TYPE_CHECKING:  # at run time nobody asks, and each costs a third of a millisecond

    class Unary(Protocol):
        """A function of one tensor."""

        def __call__(self, input: Tensor, *, out: Tensor | None = None) -> Tensor: ...

    class UnaryInPlace(Protocol):
        """The same over its operand."""

        def __call__(self, input: Tensor) -> Tensor: ...

    class Binary(Protocol):
        """A function of two operands."""

        def __call__(self, input: Operand, other: Operand, *, out: Tensor | None = None) -> Tensor: ...

    class BinaryOfTensors(Protocol):
        """A function of two tensors."""

        def __call__(self, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor: ...

    class BinaryInPlace(Protocol):
        """The same over the first one."""

        def __call__(self, input: Tensor, other: Operand) -> Tensor: ...


# ---- documentation ---------------------------------------------------------------------------------------------------

ANY = "bool, integers, floating-point and complex types"
REAL = "bool, integers and floating-point types"
FLOAT = "floating-point types"
INTEGER = "bool and integers"

_OUT = """    out: where the result is written, in its own strides. It has the result's shape, or no elements, and a
        type that can hold the result's; no argument may want a gradient then. None: a new tensor."""

_END = """
Raises:
    RuntimeError: an operand of another type or on another device, shapes that do not broadcast, an ``out`` other than
        the above. The message names the argument.
    TypeError: an operand is neither a tensor nor, where one is allowed, a number.

Notes:
    Types are promoted and results laid out as torch does it; numbers stay on the host, and tensors without
    dimensions may be on the CPU beside CUDA ones. float16 and bfloat16 are computed in float32 and rounded once.
    {gradient}
"""


def describe(name: str, text: str, result: str, gradient: bool, *arguments: tuple[str, str]) -> str:
    """A docstring."""
    lines = [f"    {argument}: {what}" for argument, what in arguments]
    end = _END.format(gradient="Differentiable, any number of times." if gradient else "There is no gradient.")
    own = f"The same operator is ``torch.ops.fastkern.{name}``; in torch: ``{_torch_name(name)}``."
    return "\n".join([text, "", own, "", "Args:", *lines, _OUT, "", "Returns:", f"    {result}", end])


def _torch_name(name: str) -> str:
    return f"torch.nn.functional.{name}" if name in ("gelu", "silu") else f"torch.{name}"


def finish(function: Callable[..., Tensor], name: str, doc: str) -> None:
    """Name and documentation of a function that was made here."""
    function.__name__ = function.__qualname__ = name
    function.__module__ = "fastkern.ops.elementwise"
    function.__doc__ = doc


def finish_in_place(function: Callable[..., Tensor], name: str) -> None:
    """The same of one in place."""
    finish(
        function,
        f"{name}_",
        f""":func:`{name}` in place: ``input`` is overwritten and returned.

The same operator, which returns nothing, is ``torch.ops.fastkern.{name}_``. The arguments are those of :func:`{name}`.
``input`` has the shape of the result, a type that can hold it, and no element twice in memory. Where a gradient is
wanted the result is made first and copied over ``input``, as autograd needs it.
""",
    )


# ---- numbers ---------------------------------------------------------------------------------------------------------


def number(name: str, argument: str, like: Tensor, value: Any) -> tuple[str, Any]:
    """The overload that takes this number beside the tensor ``like``, and what to give it.

    Booleans and complex numbers have no overload: they become CPU tensors without dimensions, of the result's type.
    """
    kind = type(value)
    if kind is float:
        return "float", value
    if kind is int:
        return "int", value
    if not isinstance(like, Tensor):
        raise _check.not_a_tensor(name, input=like)
    if kind is bool:
        return ("", torch.tensor(value)) if like.dtype == torch.bool else ("int", int(value))
    if isinstance(value, complex):
        return "", _complex_number(name, argument, like, value)
    if isinstance(value, (float, torch.SymFloat)):
        return "float", value
    if isinstance(value, (int, torch.SymInt)) or hasattr(kind, "__index__"):
        return "int", value if isinstance(value, torch.SymInt) else int(value)
    raise _no_number(name, argument, value)


def _no_number(name: str, argument: str, value: object) -> TypeError:
    return TypeError(f"fastkern::{name}: {argument} must be a tensor or a number, got {type(value).__name__}")


def _complex_number(name: str, argument: str, like: Tensor, value: complex) -> Tensor:
    # With float8 torch knows no common type; with float16 it is complex32, for which there are no kernels.
    alone = like.is_floating_point() and like.itemsize == 1
    dtype = None if alone else torch.result_type(like, value)
    if dtype in (None, torch.complex32):
        raise RuntimeError(
            f"fastkern::{name}: {argument} must not be complex where the other operand is {like.dtype}: "
            "there is no complex32 or smaller"
        )
    return torch.tensor(value, dtype=dtype)


def number_first(name: str, input: Any, other: Any) -> Tensor:
    """A number in front of a tensor, as a CPU tensor without dimensions that changes no type."""
    if not isinstance(other, Tensor) or not isinstance(input, (int, float, complex)):
        raise refuse(name, input=input)
    if isinstance(input, complex):
        return _complex_number(name, "input", other, input)
    return torch.tensor(input, dtype=torch.result_type(other, input))


def two_numbers(name: str, **values: Any) -> list[Tensor]:
    """Two numbers that stand where no tensor says the type, as CPU tensors without dimensions of their common type."""
    tensors = []
    for argument, value in values.items():
        if not isinstance(value, (int, float, complex)) and not hasattr(type(value), "__index__"):
            raise _no_number(name, argument, value)
        try:
            tensors.append(torch.tensor(value))
        except (RuntimeError, ValueError, OverflowError) as error:  # by the version of torch
            raise RuntimeError(f"fastkern::{name}: {argument} must fit 64 bits, got {value}") from error
    dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    return [t.to(dtype) for t in tensors]


def refuse(name: str, **arguments: object) -> TypeError:
    """The error for arguments that are no tensors."""
    for argument, value in arguments.items():
        if not isinstance(value, Tensor):
            return TypeError(f"fastkern::{name}: {argument} must be a torch.Tensor, got {type(value).__name__}")
    return TypeError(f"fastkern::{name}: arguments must be tensors")


# ---- functions -------------------------------------------------------------------------------------------------------


def unary(
    name: str, text: str, types: str, torch_function: Callable[..., Tensor], result: str, gradient: bool = True
) -> tuple[Unary, Route]:
    """A function of one tensor, and its route."""
    route = Route(name, "", ("input",), torch_function, gradient)
    run = route.run

    def function(input: Tensor, *, out: Tensor | None = None) -> Tensor:
        if not isinstance(input, Tensor):
            raise refuse(name, input=input)
        if out is not None:
            return into(name, "", out, input)
        return run(input)

    finish(function, name, describe(name, text, result, gradient, ("input", f"{types}; any strides.")))
    return function, route


def unary_in_place(route: Route) -> UnaryInPlace:
    """The same over its operand."""
    name, run = route.name, route.run

    def function(input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            raise refuse(f"{name}_", input=input)
        return inplace(name, "", run, input)

    finish_in_place(function, name)
    return function


def binary_of_tensors(
    name: str, text: str, types: str, torch_function: Callable[..., Tensor], result: str, gradient: bool = True
) -> BinaryOfTensors:
    """A function of two tensors."""
    run = Route(name, "", ("input", "other"), torch_function, gradient).run

    def function(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
        if not isinstance(input, Tensor) or not isinstance(other, Tensor):
            raise refuse(name, input=input, other=other)
        if out is not None:
            return into(name, "", out, input, other)
        return run(input, other)

    arguments = ("input", f"{types}; any strides."), ("other", "the same; the two broadcast.")
    finish(function, name, describe(name, text, result, gradient, *arguments))
    return function


def binary(
    name: str,
    text: str,
    types: str,
    torch_function: Callable[..., Tensor],
    result: str,
    gradient: bool = True,
    numbers: tuple[str, ...] = ("int", "float"),
    either: bool = False,
) -> tuple[Binary, dict[str, Route]]:
    """A function of a tensor and a tensor or number, ``either`` of which may be the number; its routes by overload."""
    routes = {kind: Route(name, kind, ("input", "other"), torch_function, gradient) for kind in ("", *numbers)}
    runs = {kind: route.run for kind, route in routes.items()}
    run = runs[""]

    def function(input: Operand, other: Operand, *, out: Tensor | None = None) -> Tensor:
        if not isinstance(input, Tensor):
            if not either:
                raise refuse(name, input=input)
            input = number_first(name, input, other)
        if isinstance(other, Tensor):
            return run(input, other) if out is None else into(name, "", out, input, other)
        kind, value = number(name, "other", input, other)
        if kind not in runs:
            raise TypeError(f"fastkern::{name}: other must be a tensor or an integer, got {type(other).__name__}")
        return runs[kind](input, value) if out is None else into(name, kind, out, input, value)

    arguments = ("input", f"{types}; any strides."), ("other", "the same, or a number; the two broadcast.")
    finish(function, name, describe(name, text, result, gradient, *arguments))
    return function, routes


def binary_in_place(routes: dict[str, Route]) -> BinaryInPlace:
    """The same over the first operand."""
    name = routes[""].name
    runs = {kind: route.run for kind, route in routes.items()}

    def function(input: Tensor, other: Operand) -> Tensor:
        if not isinstance(input, Tensor):
            raise refuse(f"{name}_", input=input)
        kind, value = ("", other) if isinstance(other, Tensor) else number(f"{name}_", "other", input, other)
        if kind not in runs:
            raise TypeError(f"fastkern::{name}_: other must be a tensor or an integer, got {type(other).__name__}")
        return inplace(name, kind, runs[kind], input, value)

    finish_in_place(function, name)
    return function
