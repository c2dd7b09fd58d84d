# SPDX-License-Identifier: Apache-2.0
"""Pointwise operators with results in given places, in place, at sizes beyond 32 bits, and their host time."""

from __future__ import annotations

import time
from typing import Any

import fastkern
import pytest
import torch
from harness.layouts import LAYOUTS
from torch import Tensor

UNARY = ["abs", "neg", "reciprocal", "sqrt", "rsqrt", "exp", "sin", "cos", "tanh", "sigmoid", "relu", "silu", "gelu",
         "logical_not"]  # fmt: skip
BINARY = ["add", "sub", "mul", "div", "pow", "eq", "ne", "lt", "le", "gt", "ge"]


def arguments_of(name: str, device: str) -> tuple[Any, ...]:
    x, y = torch.rand(5, 7, device=device) + 0.5, torch.rand(7, device=device) + 0.5
    other: dict[str, tuple[Any, ...]] = {"clamp": (x, y, y + 0.5), "where": (x > 1, x, y), "triu": (x,)}
    return other.get(name, (x,) if name in [*UNARY, "isnan", "isinf"] else (x, y))


@pytest.mark.parametrize("name", [*UNARY, *BINARY, "maximum", "minimum", "clamp", "where", "triu", "isnan", "isinf",
                                  "logical_and", "logical_or"])  # fmt: skip
def test_out(name: str, device: str) -> None:
    """Into every layout, without writing beside it; into nothing, which takes the shape."""
    function, arguments = getattr(fastkern, name), arguments_of(name, device)
    expected = function(*arguments)
    for layout in LAYOUTS.values():
        out = layout(torch.zeros_like(expected))
        if out is None or 0 in out.stride():
            continue
        whole = out._base if out._base is not None else out
        around = whole.clone()
        assert function(*arguments, out=out) is out
        assert torch.equal(out, expected)
        out.copy_(torch.zeros_like(expected))
        view = around.as_strided(out.size(), out.stride(), out.storage_offset()) if whole is not out else around
        view.copy_(torch.zeros_like(expected))
        assert torch.equal(whole.nan_to_num(7), around.nan_to_num(7)), f"{name}: wrote beside the result"
    nothing = torch.empty(0, device=device, dtype=expected.dtype)
    assert torch.equal(function(*arguments, out=nothing), expected)


def test_out_types(device: str) -> None:
    """What torch converts is converted, after it was rounded or wrapped in its own type; what it refuses is refused."""
    h, i = torch.randn(9, device=device).bfloat16(), torch.arange(100, 109, device=device, dtype=torch.uint8)
    for x, dtype in ((h, torch.float32), (h, torch.float64), (h, torch.float16), (i, torch.int64), (i, torch.float32)):
        out, expected = (torch.empty(9, device=device, dtype=dtype) for _ in range(2))
        for name in ("add", "mul", "gt"):
            getattr(fastkern, name)(x, x, out=out)
            getattr(torch, name)(x, x, out=expected)
            assert torch.equal(out, expected), (name, x.dtype, dtype)
    for name, x, dtype in (("add", h, torch.int32), ("add", i, torch.bool), ("exp", i, torch.int64)):
        out = torch.empty(9, device=device, dtype=dtype)
        with pytest.raises(RuntimeError, match=rf"fastkern::{name}: out must be able to hold torch\.\w+, got {dtype}"):
            getattr(fastkern, name)(*(x, x)[: 2 if name == "add" else 1], out=out)


def test_out_refusals(device: str) -> None:
    x = torch.rand(5, 7, device=device)
    for shape in ((7, 5), (5,), (1, 5, 7)):
        with pytest.raises(RuntimeError, match=r"fastkern::exp: out must have the shape of the result, \(5, 7\), got"):
            fastkern.exp(x, out=torch.empty(shape, device=device))
    with pytest.raises(RuntimeError, match="fastkern::mul: "):  # an element twice
        fastkern.mul(x, 2, out=torch.empty(7, device=device).expand(5, 7))
    row = torch.rand(40, device=device)
    with pytest.raises(RuntimeError, match="fastkern::neg: "):  # part of the operand
        fastkern.neg(row[:35], out=row[1:36])
    assert torch.equal(fastkern.neg(row[:20], out=row[20:]), -row[:20])
    with pytest.raises(RuntimeError, match="fastkern::exp: out must be None where an argument requires grad"):
        fastkern.exp(x.clone().requires_grad_(), out=torch.empty_like(x))
    with pytest.raises(TypeError, match=r"fastkern::exp: out must be a torch\.Tensor, got list"):
        fastkern.exp(x, out=[])  # type: ignore[arg-type]
    with torch.no_grad():
        fastkern.exp(x.clone().requires_grad_(), out=torch.empty_like(x))


@pytest.mark.parametrize("name", [*UNARY, *BINARY, "clamp", "triu"])
def test_in_place(name: str, device: str) -> None:
    """Over the first operand: the same values, autograd is told, nothing is returned but the operand."""
    function, arguments = getattr(fastkern, f"{name}_"), arguments_of(name, device)
    expected = getattr(fastkern, name)(*arguments).float()
    for strided in (False, True):
        x = arguments[0].clone()
        x = torch.cat([x, x], -1)[:, ::2].copy_(x) if strided else x
        version = x._version
        assert function(x, *arguments[1:]) is x
        assert x._version > version
        assert torch.equal(x, expected)
    if name not in ("gelu", "triu"):
        reference = arguments[0].clone()
        getattr(reference, f"{name}_", lambda *a: None)(*arguments[1:])


def test_in_place_of_itself(device: str) -> None:
    x = torch.rand(5, 5, device=device)
    for change in (lambda t: fastkern.mul_(t, t), lambda t: fastkern.add_(t, t, alpha=3)):
        once = x.clone()
        change(once)
        assert bool(((once == x * x) | (once == x + 3 * x)).all())
    with pytest.raises(RuntimeError, match="fastkern::mul_: "):
        fastkern.mul_(x, x.t())


def test_in_place_refusals(device: str) -> None:
    """A smaller operand, and types that cannot hold the result."""
    x, big, i = torch.rand(7, device=device), torch.rand(5, 7, device=device), torch.arange(7, device=device)
    with pytest.raises(
        RuntimeError, match=r"fastkern::add_: input must have the shape of the result, \(5, 7\), got \(7,\)"
    ):
        fastkern.add_(x, big)
    for change in (lambda: fastkern.add_(i, x), lambda: fastkern.exp_(i), lambda: fastkern.div_(i, i + 1),
                   lambda: fastkern.mul_(i, 2.5)):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"_: input must be able to hold torch.float32, got torch.int64"):
            change()
    with pytest.raises(RuntimeError, match=r"mul_: input must be able to hold torch\.int64, got torch\.bool"):
        fastkern.mul_(i > 3, i)
    with pytest.raises(TypeError, match=r"fastkern::neg_: input must be a torch\.Tensor, got float"):
        fastkern.neg_(2.0)  # type: ignore[arg-type]
    assert torch.equal(fastkern.eq_(i.clone(), i), torch.ones_like(i))


def test_in_place_with_a_gradient(device: str) -> None:
    """As torch's: through the new value; a leaf is refused."""
    x, y = (torch.rand(5, 7, device=device, dtype=torch.float64).requires_grad_() for _ in range(2))
    grads = []
    for change in (fastkern.add_, lambda t, o: t.add_(o)):
        h = fastkern.sin(x)
        change(h, y)
        grads.append(torch.autograd.grad(h.square().sum(), (x, y)))
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(RuntimeError, match="leaf"):
        fastkern.add_(x, y)
    with torch.no_grad():
        fastkern.mul_(x, 2)


def test_vmap_in_place(device: str) -> None:
    x, y = torch.rand(3, 5, device=device), torch.rand(5, device=device)
    torch.func.vmap(fastkern.mul_, (0, None))(x, y)
    before = x.clone()
    torch.func.vmap(fastkern.add_)(x, before)
    assert torch.equal(x, 2 * before)


# ---- wrong calls -----------------------------------------------------------------------------------------------------


def test_refusals(device: str) -> None:
    x, i, c = torch.rand(3, 5, device=device), torch.arange(5, device=device), torch.rand(5, device=device) + 1j
    refused: list[tuple[Any, str]] = [
        (lambda: fastkern.add(x, x[:, :4]), r"add: other must broadcast with shape \(3, 5\), got \(3, 4\)"),
        (lambda: fastkern.where(x > 0, x, x[:2]), r"where: other must broadcast with shape \(3, 5\), got \(2, 5\)"),
        (lambda: fastkern.where(x > 0, 3, None), r"where: other must be a tensor or a number, got NoneType"),
        (lambda: fastkern.where(x > 0, "a", 2.5), r"where: input must be a tensor or a number, got str"),
        (lambda: fastkern.where(x > 0, 1, 2**64), r"where: other must fit 64 bits, got 18446744073709551616"),
        (lambda: fastkern.where(x, x, x), r"where: condition must be bool, got torch\.float32"),
        (lambda: fastkern.exp(c), r"exp: input must be of a real type, got torch\.complex64|exp: input must be of"),
        (lambda: fastkern.silu(i), r"silu: input must be of a floating-point type, got torch\.int64"),
        (lambda: fastkern.bitwise_not(x), r"bitwise_not: input must be of an integer type or bool, got torch\.float32"),
        (lambda: fastkern.bitwise_and(i, x[0]), r"bitwise_and: other must be of an integer type or bool, got"),
        (lambda: fastkern.lt(c, 1), r"lt: input must be of a real type, got torch\.complex64"),
        (lambda: fastkern.neg(i > 2), r"neg: input must be other than bool, got torch\.bool"),
        (lambda: fastkern.sub(i > 2, i > 3), r"sub: input must be other than bool, got torch\.bool"),
        (lambda: fastkern.pow(i, -1), r"pow: exponent must be at least 0 where input is an integer, got -1"),
        (lambda: fastkern.gelu(x, "exact"), r'gelu: approximate must be "none" or "tanh", got "exact"'),
        (lambda: fastkern.div(x, x, rounding_mode="up"), r'div: rounding_mode must be None, "trunc" or "floor", got'),
        (lambda: fastkern.clamp(x), r"clamp: min must be given, or max"),
        (lambda: fastkern.clamp(x, 1, x), r"clamp: min and max must both be tensors, or both numbers"),
        (lambda: fastkern.triu(i), r"triu: input must have at least two dimensions, got 1"),
        (lambda: fastkern.add(x, "2"), r"add: other must be a tensor or a number, got str"),
        (lambda: fastkern.add(None, x), r"add: input must be a torch\.Tensor, got NoneType"),
        (lambda: fastkern.maximum(x, 2), r"maximum: other must be a torch\.Tensor, got int"),
        (lambda: fastkern.bitwise_or(i, 2.5), r"bitwise_or: other must be a tensor or an integer, got float"),
        (lambda: fastkern.mul(x, x.to(torch.float8_e4m3fn)), r"mul: other must be bool, .*, got torch\.float8_e4m3fn"),
        (lambda: fastkern.mul(x, x.to("meta")), "mul"),
    ]  # fmt: skip
    for call, message in refused:
        with pytest.raises((RuntimeError, TypeError), match=f"fastkern::{message}" if message != "mul" else message):
            call()
        assert torch.equal(fastkern.mul(x, x), x * x)


# ---- sizes and times -------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.large
def test_many_elements(cuda: None) -> None:
    """2**31 + 512 elements: dense, of two types, broadcast, strided, transposed; compared in parts."""
    rows, columns = (2**31 + 512) // 4096 + 1, 4096
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * columns:
        pytest.skip("too little memory")
    x = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16).normal_()
    bias = torch.randn(columns, device="cuda")
    column = torch.randn(rows, 1, device="cuda", dtype=torch.bfloat16)
    parts = (slice(0, 3), slice(2**31 // 4096 - 2, 2**31 // 4096 + 1), slice(rows - 3, rows))

    def check(result: Tensor, part_of: Any) -> None:
        for part in parts:
            assert torch.equal(result[part], part_of(part))

    check(fastkern.add(x, x), lambda p: x[p] + x[p])
    check(fastkern.gt(x, bias), lambda p: x[p] > bias)
    check(fastkern.mul(x, column), lambda p: x[p] * column[p])
    check(fastkern.neg(x[:, ::2]), lambda p: -x[p, ::2])
    check(fastkern.relu(x.t()).t(), lambda p: torch.relu(x[p]))
    check(fastkern.triu(x, -rows), lambda p: x[p])
    fastkern.mul_(x, 2)
    check(fastkern.mul(x, 0.5), lambda p: x[p] * 0.5)


def test_host_time() -> None:
    """A call without a gradient costs a few microseconds beside torch's: far less than ten times as much."""
    x = torch.rand(1)

    def fastest(function: Any) -> float:
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(200):
                function(x, x)
            best = min(best, (time.perf_counter() - start) / 200)
        return best

    with torch.no_grad():
        ours, theirs = fastest(fastkern.add), fastest(torch.add)
    assert ours < 10 * theirs + 2e-6, f"{1e6 * ours:.1f} us, torch {1e6 * theirs:.1f} us"


@pytest.mark.parametrize("alpha", [2.0**64, float("inf"), 0.5, 3.0])
def test_alpha_of_meta_tensors(alpha: float) -> None:
    """Where torch says what becomes of a call, any alpha may be given; a tensor elsewhere is refused by name."""
    x = torch.ones(3, device="meta")
    assert fastkern.add(x, x, alpha=alpha).shape == (3,)
    with pytest.raises(RuntimeError, match="fastkern::add"):
        fastkern.add(x, torch.ones(3), alpha=alpha)
