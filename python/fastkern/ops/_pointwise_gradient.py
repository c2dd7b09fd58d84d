# SPDX-License-Identifier: Apache-2.0
"""The gradients of the pointwise operators, made of pointwise operators: they have gradients themselves.

A formula gets the gradient ``dy``, the arguments (those tensors that it keeps; None for the others), the output if it
keeps that, and which arguments want a gradient. What it gives may have the shape of ``dy``: the caller sums where an
operand was broadcast, and converts. Where torch's choice is one of many (ties, edges, zeros), it is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkern.ops import elementwise as F

Needs = Sequence[bool]
Grads = tuple[Tensor | None, ...]

OUTPUT = -1  # the position that stands for the output


@dataclass(frozen=True)
class Formula:
    """A gradient and what it needs.

    Attributes:
        grads: ``grads(dy, arguments, output, needs)``.
        keeps: positions of the tensors it needs: ``keeps(needs, arguments)``.
    """

    grads: Callable[[Tensor, Sequence[Any], Any, Needs], Grads]
    keeps: Callable[[Needs, Sequence[Any]], tuple[int, ...]]


def _of_input(formula: Callable[..., Tensor]) -> Formula:
    """``formula(dy, x, *attributes)``."""
    return Formula(lambda dy, a, y, needs: (formula(dy, *a),), lambda needs, a: (0,))


def _of_output(formula: Callable[[Tensor, Tensor], Tensor]) -> Formula:
    """``formula(dy, y)``."""
    return Formula(lambda dy, a, y, needs: (formula(dy, y),), lambda needs, a: (OUTPUT,))


def _conj(t: Any) -> Any:
    return t.conj() if isinstance(t, Tensor) and t.is_complex() else t


# ---- one operand -----------------------------------------------------------------------------------------------------


def _abs(dy: Tensor, x: Tensor) -> Tensor:
    if x.is_complex():
        return torch.sgn(x) * dy
    return F.where(F.gt(x, 0), dy, F.where(F.lt(x, 0), F.neg(dy), 0.0))


def _gelu(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.fastkern.gelu_bwd(dy, x, approximate)
    return torch.ops.aten.gelu_backward(dy, x, approximate=approximate)


def _silu(dy: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.fastkern.silu_bwd(dy, x)
    s = F.sigmoid(x)
    return F.mul(dy, F.mul(s, F.add(F.sub(x, F.mul(x, s)), 1.0)))


def _sigmoid(dy: Tensor, y: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.fastkern.sigmoid_bwd(dy, y)
    return F.mul(dy, F.sub(y, F.mul(y, y)))


def _tanh(dy: Tensor, y: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.fastkern.tanh_bwd(dy, y)
    return F.sub(dy, F.mul(dy, F.mul(y, y)))


def _relu(dy: Tensor, y: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.fastkern.relu_bwd(dy, y)
    return F.where(F.le(y, 0), 0.0, dy)


def _rsqrt(dy: Tensor, y: Tensor) -> Tensor:
    return F.mul(F.mul(dy, -0.5), F.mul(F.mul(y, y), y))


def _triu() -> Formula:
    return Formula(lambda dy, a, y, needs: (F.triu(dy, a[1]),), lambda needs, a: ())


# ---- two operands ----------------------------------------------------------------------------------------------------


def _add(sign: float) -> Formula:
    def grads(dy: Tensor, a: Sequence[Any], y: Any, needs: Needs) -> Grads:
        factor = sign * a[2]
        return dy, (dy if factor == 1 else F.mul(dy, factor)) if needs[1] else None

    return Formula(grads, lambda needs, a: ())


def _mul(dy: Tensor, a: Sequence[Any], y: Any, needs: Needs) -> Grads:
    return (
        F.mul(dy, _conj(a[1])) if needs[0] else None,
        F.mul(dy, _conj(a[0])) if needs[1] else None,
    )


def _mul_keeps(needs: Needs, a: Sequence[Any]) -> tuple[int, ...]:
    return (*((1,) if needs[0] else ()), *((0,) if needs[1] else ()))


def _div(dy: Tensor, a: Sequence[Any], y: Any, needs: Needs) -> Grads:
    x, other, rounding = a
    if rounding is not None:
        zero = torch.zeros_like(dy)
        return zero, zero
    return (
        F.div(dy, other) if needs[0] else None,
        F.mul(F.neg(dy), F.div(F.div(x, other), other)) if needs[1] else None,
    )


def _div_keeps(needs: Needs, a: Sequence[Any]) -> tuple[int, ...]:
    if a[2] is not None:
        return ()
    return (0, 1) if needs[1] else (1,)


def _pow(dy: Tensor, a: Sequence[Any], y: Any, needs: Needs) -> Grads:
    x, exponent = a
    dx = de = None
    if needs[0]:
        if isinstance(exponent, Tensor):
            slope = F.mul(exponent, F.pow(x, F.sub(exponent, 1)))
            dx = F.where(F.eq(exponent, 0), 0.0, F.mul(dy, slope))
        elif exponent == 0:
            dx = torch.zeros_like(dy)
        else:
            dx = F.mul(dy, F.mul(F.pow(x, exponent - 1), exponent))
    if needs[1]:
        if isinstance(x, Tensor):
            slope = F.mul(dy, F.mul(y, torch.log(x.to(y.dtype))))
            de = F.where(F.logical_and(F.eq(x, 0), F.ge(exponent, 0)), 0.0, slope)
        else:
            slope = F.mul(y, torch.log(torch.tensor(float(x), dtype=y.dtype)))
            de = F.mul(dy, F.where(F.ge(exponent, 0), 0.0, slope) if x == 0 else slope)
    return dx, de


def _pow_keeps(needs: Needs, a: Sequence[Any]) -> tuple[int, ...]:
    return (0, 1, OUTPUT) if needs[1] else (0, 1)


def _extreme(is_other: Callable[..., Tensor]) -> Formula:
    """Maximum and minimum: on a tie each operand gets half."""

    def grads(dy: Tensor, a: Sequence[Any], y: Any, needs: Needs) -> Grads:
        x, other = a
        shared = F.where(F.eq(x, other), F.mul(dy, 0.5), dy)
        return (
            F.where(is_other(x, other), 0.0, shared) if needs[0] else None,
            F.where(is_other(other, x), 0.0, shared) if needs[1] else None,
        )

    return Formula(grads, lambda needs, a: (0, 1))


# ---- three operands --------------------------------------------------------------------------------------------------


def _where(dy: Tensor, a: Sequence[Any], y: Any, needs: Needs) -> Grads:
    return (
        None,
        F.where(a[0], dy, 0.0) if needs[1] else None,
        F.where(a[0], 0.0, dy) if needs[2] else None,
    )


def _clamp(dy: Tensor, a: Sequence[Any], y: Any, needs: Needs) -> Grads:
    x, low, high = a
    dx = dlow = dhigh = None
    if needs[0]:
        inside = None if low is None else F.ge(x, low)
        below = None if high is None else F.le(x, high)
        if inside is not None and below is not None:
            inside = F.logical_and(inside, below)
        dx = F.where(below if inside is None else inside, dy, 0.0)  # type: ignore[arg-type]
    if needs[1]:
        hits = F.lt(x, low)
        hits = hits if high is None else F.logical_and(hits, F.lt(low, high))
        dlow = F.where(hits, dy, 0.0)
    if needs[2]:
        hits = F.gt(x, high)
        hits = hits if low is None else F.logical_or(hits, F.lt(high, low))
        dhigh = F.where(hits, dy, 0.0)
    return dx, dlow, dhigh


def _clamp_keeps(needs: Needs, a: Sequence[Any]) -> tuple[int, ...]:
    return (0, 1, 2)


FORMULAS: dict[str, Formula] = {
    "abs": _of_input(_abs),
    "neg": Formula(lambda dy, a, y, needs: (F.neg(dy),), lambda needs, a: ()),
    "exp": _of_output(lambda dy, y: F.mul(dy, _conj(y))),
    "reciprocal": _of_output(lambda dy, y: F.mul(F.neg(dy), F.mul(y, y))),
    "rsqrt": _of_output(_rsqrt),
    "sqrt": _of_output(lambda dy, y: F.div(dy, F.mul(y, 2.0))),
    "cos": _of_input(lambda dy, x: F.mul(F.neg(dy), F.sin(x))),
    "sin": _of_input(lambda dy, x: F.mul(dy, F.cos(x))),
    "tanh": _of_output(_tanh),
    "sigmoid": _of_output(_sigmoid),
    "relu": _of_output(_relu),
    "gelu": _of_input(_gelu),
    "silu": _of_input(_silu),
    "triu": _triu(),
    "add": _add(1.0),
    "sub": _add(-1.0),
    "mul": Formula(_mul, _mul_keeps),
    "div": Formula(_div, _div_keeps),
    "pow": Formula(_pow, _pow_keeps),
    "maximum": _extreme(F.lt),
    "minimum": _extreme(F.gt),
    "where": Formula(_where, lambda needs, a: (0,)),
    "clamp": Formula(_clamp, _clamp_keeps),
}
