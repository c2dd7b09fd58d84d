# SPDX-License-Identifier: Apache-2.0
"""Pointwise functions: arithmetic, comparisons, logic, activations. torch's names, arguments and results.

The simple ones are lines of a table, made into functions by _pointwise_functions.py; those with arguments of their own
are written out. ``abs`` and ``pow`` shadow the builtins here, as in torch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkern.ops._pointwise import Route, inplace, into
from fastkern.ops._pointwise_arithmetic import add, add_, div, div_, pow_, sub, sub_
from fastkern.ops._pointwise_arithmetic import pow as pow
from fastkern.ops._pointwise_functions import (
    ANY,
    FLOAT,
    INTEGER,
    REAL,
    Operand,
    binary,
    binary_in_place,
    binary_of_tensors,
    finish_in_place,
    number,
    refuse,
    two_numbers,
    unary,
    unary_in_place,
)

# Without abs and pow: `from fastkern import *` leaves the builtins alone.
__all__ = [
    "abs_",
    "add",
    "add_",
    "bitwise_and",
    "bitwise_and_",
    "bitwise_not",
    "bitwise_not_",
    "bitwise_or",
    "bitwise_or_",
    "clamp",
    "clamp_",
    "cos",
    "cos_",
    "div",
    "div_",
    "eq",
    "eq_",
    "exp",
    "exp_",
    "ge",
    "ge_",
    "gelu",
    "gelu_",
    "gt",
    "gt_",
    "isinf",
    "isnan",
    "le",
    "le_",
    "logical_and",
    "logical_not",
    "logical_not_",
    "logical_or",
    "lt",
    "lt_",
    "maximum",
    "minimum",
    "mul",
    "mul_",
    "ne",
    "ne_",
    "neg",
    "neg_",
    "pow_",
    "reciprocal",
    "reciprocal_",
    "relu",
    "relu_",
    "rsqrt",
    "rsqrt_",
    "sigmoid",
    "sigmoid_",
    "silu",
    "silu_",
    "sin",
    "sin_",
    "sqrt",
    "sqrt_",
    "sub",
    "sub_",
    "tanh",
    "tanh_",
    "triu",
    "triu_",
    "where",
]

_SAME = "The type of ``input``."
_FLOATS = "The type of ``input``; float32 for bool and integers."
_BOOL = "bool."
_COMMON = "The promoted type of the operands."

# ---- one operand -----------------------------------------------------------------------------------------------------

abs, _abs = unary("abs", "The absolute value.", ANY, torch.abs, "The type of ``input``; of complex types the real one.")
neg, _neg = unary("neg", "``-input``.", "integers, floating-point and complex types", torch.neg, _SAME)
reciprocal, _reciprocal = unary("reciprocal", "``1 / input``.", REAL, torch.reciprocal, _FLOATS)
sqrt, _sqrt = unary("sqrt", "The square root.", REAL, torch.sqrt, _FLOATS)
rsqrt, _rsqrt = unary("rsqrt", "``1 / sqrt(input)``.", REAL, torch.rsqrt, _FLOATS)
exp, _exp = unary("exp", "The exponential.", REAL, torch.exp, _FLOATS)
sin, _sin = unary("sin", "The sine.", REAL, torch.sin, _FLOATS)
cos, _cos = unary("cos", "The cosine.", REAL, torch.cos, _FLOATS)
tanh, _tanh = unary("tanh", "The hyperbolic tangent.", REAL, torch.tanh, _FLOATS)
sigmoid, _sigmoid = unary("sigmoid", "``1 / (1 + exp(-input))``.", REAL, torch.sigmoid, _FLOATS)
silu, _silu = unary("silu", "``input * sigmoid(input)``.", FLOAT, F.silu, _SAME)
relu, _relu = unary("relu", "``input`` where it is above 0, else 0.", "integers and floating-point types",
                    torch.relu, _SAME)  # fmt: skip
bitwise_not, _bitwise_not = unary("bitwise_not", "``~input``; of bool the negation.", INTEGER, torch.bitwise_not,
                                  _SAME, gradient=False)  # fmt: skip
logical_not, _logical_not = unary("logical_not", "``input == 0``.", ANY, torch.logical_not, _BOOL, gradient=False)
isnan, _ = unary("isnan", "Whether an element is NaN.", REAL, torch.isnan, _BOOL, gradient=False)
isinf, _ = unary("isinf", "Whether an element is infinite.", REAL, torch.isinf, _BOOL, gradient=False)

abs_ = unary_in_place(_abs)
neg_ = unary_in_place(_neg)
reciprocal_ = unary_in_place(_reciprocal)
sqrt_ = unary_in_place(_sqrt)
rsqrt_ = unary_in_place(_rsqrt)
exp_ = unary_in_place(_exp)
sin_ = unary_in_place(_sin)
cos_ = unary_in_place(_cos)
tanh_ = unary_in_place(_tanh)
sigmoid_ = unary_in_place(_sigmoid)
silu_ = unary_in_place(_silu)
relu_ = unary_in_place(_relu)
bitwise_not_ = unary_in_place(_bitwise_not)
logical_not_ = unary_in_place(_logical_not)

# ---- two operands ----------------------------------------------------------------------------------------------------

mul, _mul = binary("mul", "``input * other``; of bool, and.", ANY, torch.mul, _COMMON, either=True)
eq, _eq = binary("eq", "``input == other``.", ANY, torch.eq, _BOOL, gradient=False)
ne, _ne = binary("ne", "``input != other``.", ANY, torch.ne, _BOOL, gradient=False)
lt, _lt = binary("lt", "``input < other``.", REAL, torch.lt, _BOOL, gradient=False)
le, _le = binary("le", "``input <= other``.", REAL, torch.le, _BOOL, gradient=False)
gt, _gt = binary("gt", "``input > other``.", REAL, torch.gt, _BOOL, gradient=False)
ge, _ge = binary("ge", "``input >= other``.", REAL, torch.ge, _BOOL, gradient=False)
bitwise_and, _bitwise_and = binary("bitwise_and", "``input & other``.", INTEGER, torch.bitwise_and, _COMMON,
                                   gradient=False, numbers=("int",), either=True)  # fmt: skip
bitwise_or, _bitwise_or = binary("bitwise_or", "``input | other``.", INTEGER, torch.bitwise_or, _COMMON,
                                 gradient=False, numbers=("int",), either=True)  # fmt: skip
logical_and = binary_of_tensors("logical_and", "Whether both operands are other than 0.", ANY, torch.logical_and,
                                _BOOL, gradient=False)  # fmt: skip
logical_or = binary_of_tensors("logical_or", "Whether an operand is other than 0.", ANY, torch.logical_or,
                               _BOOL, gradient=False)  # fmt: skip
maximum = binary_of_tensors("maximum", "The larger operand, NaN if one is. On a tie the gradient is shared.", REAL,
                            torch.maximum, _COMMON)  # fmt: skip
minimum = binary_of_tensors("minimum", "The smaller operand, NaN if one is. On a tie the gradient is shared.", REAL,
                            torch.minimum, _COMMON)  # fmt: skip

mul_ = binary_in_place(_mul)
eq_ = binary_in_place(_eq)
ne_ = binary_in_place(_ne)
lt_ = binary_in_place(_lt)
le_ = binary_in_place(_le)
gt_ = binary_in_place(_gt)
ge_ = binary_in_place(_ge)
bitwise_and_ = binary_in_place(_bitwise_and)
bitwise_or_ = binary_in_place(_bitwise_or)

# ---- with arguments of their own -------------------------------------------------------------------------------------


def _torch_gelu(input: Tensor, approximate: str) -> Tensor:
    return F.gelu(input, approximate=approximate)


_gelu = Route("gelu", "", ("input",), _torch_gelu, gradient=True).run


def gelu(input: Tensor, approximate: Literal["none", "tanh"] = "none", *, out: Tensor | None = None) -> Tensor:
    """``input`` times the standard normal distribution function of it.

    The same operator is ``torch.ops.fastkern.gelu``; in torch: ``torch.nn.functional.gelu``.

    Args:
        input: floating-point types; any strides.
        approximate: "none": by the error function. "tanh": by
            ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``.
        out: as of :func:`silu`.

    Returns:
        The type of ``input``.

    Raises:
        RuntimeError: as of :func:`silu`; also for another ``approximate``.
        TypeError: ``input`` is no tensor.

    Notes:
        What is said of :func:`silu` holds here.
    """
    if not isinstance(input, Tensor):
        raise refuse("gelu", input=input)
    return _gelu(input, approximate) if out is None else into("gelu", "", out, input, approximate)


def gelu_(input: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:  # noqa: D103
    if not isinstance(input, Tensor):
        raise refuse("gelu_", input=input)
    return inplace("gelu", "", _gelu, input, approximate)


def _torch_clamp(input: Tensor, min: Any, max: Any) -> Tensor:
    return torch.clamp(input, min, max)


_clamp = {kind: Route("clamp", kind, ("input", "min", "max"), _torch_clamp, True).run for kind in ("", "int", "float")}


def _limits(name: str, input: Tensor, low: Any, high: Any) -> tuple[str, Any, Any]:
    """The overload for these limits, and the limits for it."""
    if not isinstance(input, Tensor):
        raise refuse(name, input=input)
    given = [v for v in (low, high) if v is not None]
    if any(isinstance(v, Tensor) for v in given):
        if not all(isinstance(v, Tensor) for v in given):
            raise TypeError(f"fastkern::{name}: min and max must both be tensors, or both numbers")
        return "", low, high
    kinds = [number(name, argument, input, v)[0] if v is not None else "" for argument, v in
             (("min", low), ("max", high))]  # fmt: skip
    if any(isinstance(v, complex) for v in given):
        raise TypeError(f"fastkern::{name}: min must be real, and max")
    convert = float if "float" in kinds else int
    low, high = (v if v is None or isinstance(v, (torch.SymInt, torch.SymFloat)) else convert(v) for v in (low, high))
    return "float" if convert is float else "int", low, high


def clamp(
    input: Tensor,
    min: Operand | None = None,
    max: Operand | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``input`` between ``min`` and ``max``: ``minimum(maximum(input, min), max)``, NaN if one of them is.

    The same operator is ``torch.ops.fastkern.clamp``; in torch: ``torch.clamp``.

    Args:
        input: bool, integers and floating-point types; any strides.
        min: a tensor that broadcasts with ``input``, or a number. None: no limit.
        max: the same, as ``min``; at least one of them is given. Where ``min`` is above it, it is the result.
        out: as of :func:`mul`.

    Returns:
        The promoted type of the operands.

    Raises:
        RuntimeError: as of :func:`mul`; also without a limit.
        TypeError: as of :func:`mul`; also for a tensor and a number as limits.

    Notes:
        What is said of :func:`mul` holds here. At a limit the gradient goes to ``input``.
    """
    kind, low, high = _limits("clamp", input, min, max)
    return _clamp[kind](input, low, high) if out is None else into("clamp", kind, out, input, low, high)


def clamp_(input: Tensor, min: Operand | None = None, max: Operand | None = None) -> Tensor:  # noqa: D103
    kind, low, high = _limits("clamp_", input, min, max)
    return inplace("clamp", kind, _clamp[kind], input, low, high)


_where = {
    kind: Route("where", kind, ("condition", "input", "other"), torch.where, gradient=True).run
    for kind in ("", "int_other", "float_other", "int_input", "float_input")
}


def where(condition: Tensor, input: Operand, other: Operand, *, out: Tensor | None = None) -> Tensor:
    """``input`` where ``condition`` is True, else ``other``.

    The same operator is ``torch.ops.fastkern.where``; in torch: ``torch.where``.

    Args:
        condition: bool; the three broadcast.
        input: bool, integers, floating-point and complex types, any strides; or a number.
        other: the same, as ``input``.
        out: as of :func:`mul`.

    Returns:
        The promoted type of ``input`` and ``other``.

    Raises:
        RuntimeError: as of :func:`mul`.
        TypeError: as of :func:`mul`.

    Notes:
        What is said of :func:`mul` holds here. What is not chosen does not matter, be it NaN; its gradient is 0.
    """
    if not isinstance(condition, Tensor):
        raise refuse("where", condition=condition)
    kind, first, second = "", input, other
    if not isinstance(input, Tensor):
        if not isinstance(other, Tensor):
            first, second = two_numbers("where", input=input, other=other)
        else:
            kind, first = number("where", "input", other, input)
            kind = f"{kind}_input" if kind else ""
    elif not isinstance(other, Tensor):
        kind, second = number("where", "other", input, other)
        kind = f"{kind}_other" if kind else ""
    return _where[kind](condition, first, second) if out is None else into("where", kind, out, condition, first, second)


_triu = Route("triu", "", ("input",), torch.triu, gradient=True).run


def triu(input: Tensor, diagonal: int = 0, *, out: Tensor | None = None) -> Tensor:
    """The upper triangle of each matrix, 0 below it.

    The same operator is ``torch.ops.fastkern.triu``; in torch: ``torch.triu``.

    Args:
        input: at least two dimensions; any type but float8; any strides.
        diagonal: the lowest that is kept: 0 the main one, above it those to the right, below it those to the left.
        out: of the type of ``input``; else as of :func:`mul`.

    Returns:
        The shape and type of ``input``.

    Raises:
        RuntimeError: as of :func:`mul`; also for less than two dimensions.
        TypeError: ``input`` is no tensor.

    Notes:
        What is said of :func:`mul` holds here.
    """
    if not isinstance(input, Tensor):
        raise refuse("triu", input=input)
    return _triu(input, diagonal) if out is None else into("triu", "", out, input, diagonal)


def triu_(input: Tensor, diagonal: int = 0) -> Tensor:  # noqa: D103
    if not isinstance(input, Tensor):
        raise refuse("triu_", input=input)
    return inplace("triu", "", _triu, input, diagonal)


for _function in (gelu_, clamp_, triu_):
    finish_in_place(_function, _function.__name__[:-1])


def _like_dy(dy: Tensor, x: Tensor, *more: Any) -> Tensor:
    return torch.mul(dy, x)


for _name in ("gelu_bwd", "silu_bwd", "sigmoid_bwd", "tanh_bwd", "relu_bwd"):
    Route(_name, "", ("dy", "x"), _like_dy, gradient=False)
