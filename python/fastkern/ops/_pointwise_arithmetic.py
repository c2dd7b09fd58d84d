# SPDX-License-Identifier: Apache-2.0
"""add, sub, div, pow: pointwise functions of two operands with an argument, or a number in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastkern.ops._pointwise import Number, Route, inplace, into
from fastkern.ops._pointwise_functions import Operand, finish_in_place, number, number_first, refuse

Rounding = Literal["trunc", "floor"]


def _routes(name: str, torch_function: Callable[..., Tensor], *kinds: str) -> dict[str, Route]:
    return {kind: Route(name, kind, ("input", "other"), torch_function, gradient=True) for kind in ("", *kinds)}


def _torch_add(input: Tensor, other: Any, alpha: float) -> Tensor:
    return torch.add(input, other) if alpha == 1 else torch.add(input, other, alpha=_whole(alpha))


def _torch_sub(input: Tensor, other: Any, alpha: float) -> Tensor:
    return torch.sub(input, other) if alpha == 1 else torch.sub(input, other, alpha=_whole(alpha))


def _whole(alpha: float) -> float:
    """Torch takes no floating-point alpha for integers, and no integer beyond 64 bits."""
    return int(alpha) if abs(alpha) < 2**63 and alpha == int(alpha) else alpha


def _torch_div(input: Tensor, other: Any, rounding_mode: str | None) -> Tensor:
    return torch.div(input, other, rounding_mode=rounding_mode)


def _torch_pow(input: Any, exponent: Any) -> Tensor:
    if isinstance(input, Tensor) and isinstance(exponent, Tensor) and input.dtype == exponent.dtype == torch.bool:
        return torch.pow(input.to(torch.int64), exponent)
    return torch.pow(input, exponent)


_add = _routes("add", _torch_add, "int", "float")
_sub = _routes("sub", _torch_sub, "int", "float")
_div = _routes("div", _torch_div, "int", "float")
_pow = _routes("pow", _torch_pow, "int", "float", "int_base", "float_base")
_run_add, _run_sub, _run_div, _run_pow = ({k: r.run for k, r in of.items()} for of in (_add, _sub, _div, _pow))


def _operand(name: str, input: Tensor, other: Any, argument: str = "other") -> tuple[str, Any]:
    if not isinstance(input, Tensor):
        raise refuse(name, input=input)
    return ("", other) if isinstance(other, Tensor) else number(name, argument, input, other)


def _result_type(name: str, input: Any, other: Any) -> torch.dtype:
    """Of the operands; torch's refusal of float8 names no operator."""
    try:
        return torch.result_type(input, other)
    except RuntimeError as error:
        types = [str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in (input, other)]
        raise RuntimeError(
            f"fastkern::{name}: other must have a type that input's promotes with, got {types}"
        ) from error


def _scaled(name: str, input: Tensor, other: Any, alpha: Any) -> tuple[Any, float]:
    """The second operand and the number it is multiplied with."""
    if type(alpha) is int:
        return other, float(alpha)
    if isinstance(alpha, complex):
        if not (input.is_complex() or (isinstance(other, Tensor) and other.is_complex())):
            raise RuntimeError(f"fastkern::{name}: alpha must be real where the operands are, got {alpha}")
        return other * alpha if not isinstance(other, Tensor) else torch.ops.fastkern.mul(
            other, torch.tensor(alpha, dtype=_result_type(name, other, alpha))
        ), 1.0  # fmt: skip
    if not isinstance(alpha, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"fastkern::{name}: alpha must be a number, got {type(alpha).__name__}")
    result = _result_type(name, input, other)
    if isinstance(alpha, bool) and result != torch.bool:
        raise RuntimeError(f"fastkern::{name}: alpha must not be bool for results of {result}")
    if isinstance(alpha, float) and not (result.is_floating_point or result.is_complex):
        raise RuntimeError(f"fastkern::{name}: alpha must be an integer where the operands are, got {alpha}")
    return other, float(alpha)


def add(input: Operand, other: Operand, *, alpha: Number = 1, out: Tensor | None = None) -> Tensor:
    """``input + alpha * other``; of bool, or.

    The same operator is ``torch.ops.fastkern.add``; in torch: ``torch.add``.

    Args:
        input: bool, integers, floating-point and complex types; any strides.
        other: the same; the two broadcast. One of them may be a number.
        alpha: a number; an integer where the operands are.
        out: as of :func:`mul`.

    Returns:
        The promoted type of the operands.

    Raises:
        RuntimeError: as of :func:`mul`; also for an ``alpha`` that the operands' type does not allow.
        TypeError: as of :func:`mul`.

    Notes:
        What is said of :func:`mul` holds here. Integers wrap around.
    """
    if not isinstance(input, Tensor):
        input = number_first("add", input, other)
    kind, value = _operand("add", input, other)
    factor = 1.0
    if alpha != 1 or type(alpha) is not int:
        value, factor = _scaled("add", input, value, alpha)
    if out is not None:
        return into("add", kind, out, input, value, factor)
    return _run_add[kind](input, value, factor)


def sub(input: Operand, other: Operand, *, alpha: Number = 1, out: Tensor | None = None) -> Tensor:
    """``input - alpha * other``.

    The same operator is ``torch.ops.fastkern.sub``; in torch: ``torch.sub``. Arguments, result and errors are those of
    :func:`add`, but bool is refused: what is meant there is mostly ``bitwise_not`` or ``ne``.
    """
    if not isinstance(input, Tensor):
        input = number_first("sub", input, other)
    kind, value = _operand("sub", input, other)
    factor = 1.0
    if alpha != 1 or type(alpha) is not int:
        value, factor = _scaled("sub", input, value, alpha)
    if out is not None:
        return into("sub", kind, out, input, value, factor)
    return _run_sub[kind](input, value, factor)


def div(input: Operand, other: Operand, *, rounding_mode: Rounding | None = None, out: Tensor | None = None) -> Tensor:
    """``input / other``, exactly or rounded to an integer.

    The same operator is ``torch.ops.fastkern.div``; in torch: ``torch.div``.

    Args:
        input: bool, integers and floating-point types; any strides.
        other: the same; the two broadcast. One of them may be a number.
        rounding_mode: None: the quotient. "trunc": rounded towards 0. "floor": rounded down, as Python's ``//``.
        out: as of :func:`mul`.

    Returns:
        The promoted type of the operands; of bool and integers, without a rounding mode, float32.

    Raises:
        RuntimeError: as of :func:`mul`. With a rounding mode also, on the CPU, for an integer divided by 0; on CUDA
            that gives any number.
        TypeError: as of :func:`mul`.

    Notes:
        What is said of :func:`mul` holds here. With a rounding mode the gradient is 0.
    """
    if not isinstance(input, Tensor):
        input = number_first("div", input, other)
    kind, value = _operand("div", input, other)
    if out is not None:
        return into("div", kind, out, input, value, rounding_mode)
    return _run_div[kind](input, value, rounding_mode)


def pow(input: Operand, exponent: Operand, *, out: Tensor | None = None) -> Tensor:
    """``input ** exponent``.

    The same operator is ``torch.ops.fastkern.pow``; in torch: ``torch.pow``.

    Args:
        input: bool, integers and floating-point types, or a number where ``exponent`` is a tensor; any strides.
        exponent: the same, or a number where ``input`` is a tensor; the two broadcast. A number below 0 is refused
            where the result is of integers.
        out: as of :func:`mul`.

    Returns:
        The promoted type of the operands; of bool int64. ``0 ** 0`` is 1; a base below 0 with an exponent that is no
        integer gives NaN.

    Raises:
        RuntimeError: as of :func:`mul`; also for the exponent above.
        TypeError: as of :func:`mul`.

    Notes:
        What is said of :func:`mul` holds here. Integers wrap around. As in torch, where the exponent is 0 the gradient
        of the base is 0, and where the base is 0 and the exponent at least that, the gradient of the exponent is 0.
    """
    if isinstance(input, Tensor):
        kind, value = _operand("pow", input, exponent, "exponent")
        base: Any = input
    else:
        if not isinstance(exponent, Tensor):
            raise refuse("pow", input=input)
        kind, base = number("pow", "input", exponent, input)
        value, kind = exponent, f"{kind}_base" if kind else ""
    if out is not None:
        return into("pow", kind, out, base, value)
    return _run_pow[kind](base, value)


def add_(input: Tensor, other: Operand, *, alpha: Number = 1) -> Tensor:
    kind, value = _operand("add_", input, other)
    value, factor = _scaled("add_", input, value, alpha)
    return inplace("add", kind, _run_add[kind], input, value, factor)


def sub_(input: Tensor, other: Operand, *, alpha: Number = 1) -> Tensor:
    kind, value = _operand("sub_", input, other)
    value, factor = _scaled("sub_", input, value, alpha)
    return inplace("sub", kind, _run_sub[kind], input, value, factor)


def div_(input: Tensor, other: Operand, *, rounding_mode: Rounding | None = None) -> Tensor:
    kind, value = _operand("div_", input, other)
    return inplace("div", kind, _run_div[kind], input, value, rounding_mode)


def pow_(input: Tensor, exponent: Operand) -> Tensor:
    kind, value = _operand("pow_", input, exponent, "exponent")
    return inplace("pow", kind, _run_pow[kind], input, value)


for _function in (add_, sub_, div_, pow_):
    finish_in_place(_function, _function.__name__[:-1])
