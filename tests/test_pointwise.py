# SPDX-License-Identifier: Apache-2.0
"""The pointwise operators beside torch's: torch's own samples, promotion, layouts, places for results, errors."""

from __future__ import annotations

import itertools
from typing import Any

import fastkern
import pytest
import torch
from harness.layouts import LAYOUTS, offset_by
from harness.opinfo import assert_like_torch, call_of, entries, error_samples, samples
from torch import Tensor

UNARY = ["abs", "neg", "reciprocal", "sqrt", "rsqrt", "exp", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu",
         "bitwise_not", "logical_not", "isnan", "isinf", "triu"]  # fmt: skip
BINARY = ["add", "sub", "mul", "div", "pow", "eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or",
          "logical_and", "logical_or", "maximum", "minimum"]  # fmt: skip
NAMES = [*UNARY, *BINARY, "clamp", "where"]

COMPLEX = {"abs", "neg", "add", "sub", "mul", "eq", "ne", "logical_and", "logical_or", "logical_not", "where", "triu"}
# Formulas of several roundings: 1 ulp from torch's result or from the truth, 2 in float64, whose truth is torch's.
ROUNDED = {"sqrt", "rsqrt", "exp", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "pow"}
UNSIGNED_ZEROS = {"maximum", "minimum", "clamp"}  # of two zeros torch gives either
TYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
         torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]  # fmt: skip
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

names = pytest.mark.parametrize("name", NAMES)


def supported(name: str, info: Any, device: str) -> list[torch.dtype]:
    return [t for t in TYPES if t in info.supported_dtypes(device) and (not t.is_complex or name in COMPLEX)]


def tolerance(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> int:
    scaled = kwargs.get("alpha", 1) != 1 and dtype in FLOATS + TYPES[-2:]
    if name in ROUNDED or scaled or (dtype.is_complex and name in ("abs", "mul", "add", "sub")):
        return 1 if name in ROUNDED - {"silu", "sigmoid"} and dtype != torch.float64 and not scaled else 2
    return 0


def wide(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() else value.to(torch.complex128) if value.is_complex() else value


def torchs(function: Any, *arguments: Any, **more: Any) -> Tensor:
    """torch's result; where it rounds a 16-bit quotient before it cuts that off, without the first rounding."""
    result = function(*arguments, **more)
    if more.get("rounding_mode") is None or result.dtype not in FLOATS[:2]:
        return result
    return function(*(a.float() if isinstance(a, Tensor) else a for a in arguments), **more).to(result.dtype)


def truth_of(info: Any, sample: Any) -> Tensor | None:
    """torch's result in float64."""
    if not isinstance(sample.input, Tensor) or sample.input.dtype not in [*FLOATS[:3], torch.complex64]:
        return None
    return info.op(wide(sample.input), *(wide(a) for a in sample.args), **sample.kwargs)


# ---- torch's samples -------------------------------------------------------------------------------------------------


@names
def test_samples(name: str, device: str) -> None:
    """Values, types, shapes and strides as torch's for each of its samples."""
    for info in entries(name):
        for dtype in supported(name, info, device):
            for i, sample in enumerate(samples(info, device, dtype)):
                what = f"{name}.{info.variant_test_name} of {dtype}, sample {i}"
                expected = torchs(info.op, sample.input, *sample.args, **sample.kwargs)
                got = call_of(name)(sample.input, *sample.args, **sample.kwargs)
                most = tolerance(name, sample.kwargs, dtype)
                truth = truth_of(info, sample) if most else None
                assert_like_torch(
                    got, expected, what, most, truth, zeros=name not in UNSIGNED_ZEROS, near=name == "gelu"
                )


@names
def test_error_samples(name: str, device: str) -> None:
    """What torch refuses is refused, and the message names the operator."""
    for info in entries(name):
        for error in error_samples(info, device):
            sample = error.sample_input
            if isinstance(sample.input, Tensor) and torch.is_complex(sample.input) and name not in COMPLEX:
                continue
            with pytest.raises((RuntimeError, TypeError, ValueError), match=name):
                call_of(name)(sample.input, *sample.args, **sample.kwargs)


# ---- promotion -------------------------------------------------------------------------------------------------------


def operand(dtype: torch.dtype, kind: str, device: str) -> Any:
    if kind == "number":
        return {torch.bool: True, torch.int64: 2, torch.float32: 1.5, torch.complex64: 1.5 - 2j}[dtype]
    value = torch.tensor([1, 0, 3], device=device).to(dtype)
    return value if kind == "tensor" else value[2].clone()


KINDS = {"tensor": TYPES, "zero_dim": TYPES, "number": [torch.bool, torch.int64, torch.float32, torch.complex64]}


@pytest.mark.parametrize("kinds", [(a, b) for a in ("tensor", "zero_dim") for b in KINDS], ids="-".join)
def test_promotion(kinds: tuple[str, str], device: str) -> None:
    """All pairs of types in all kinds: the type of torch.result_type and the values of torch."""
    for a, b in itertools.product(KINDS[kinds[0]], KINDS[kinds[1]]):
        x, y = operand(a, kinds[0], device), operand(b, kinds[1], device)
        common = torch.result_type(x, y)
        what = f"{kinds[0]} of {a} and {kinds[1]} of {b}"
        for first, second in ((x, y), (y, x)) if isinstance(y, Tensor) else ((x, y),):
            if common == torch.complex32:
                with pytest.raises(RuntimeError, match=r"fastkern::mul: other must not be complex where .*complex32"):
                    fastkern.mul(first, second)
                continue
            got = fastkern.mul(first, second)
            assert got.dtype == common, f"{what}: {got.dtype}, expected {common}"
            assert_like_torch(got, torch.mul(first, second), what, 1 if common.is_complex else 0)
            assert_like_torch(fastkern.eq(first, second), torch.eq(first, second), f"eq: {what}")
            if not common.is_complex:
                assert_like_torch(fastkern.div(first, second), torch.div(first, second), f"div: {what}")
                compare("clamp", (first, None, second))


def test_promotion_of_three(device: str) -> None:
    condition = torch.tensor([True, False, True], device=device)
    for a, b in itertools.product(TYPES, TYPES):
        x, y = operand(a, "tensor", device), operand(b, "zero_dim", device)
        if torch.result_type(x, y) != torch.complex32:
            assert_like_torch(fastkern.where(condition, x, y), torch.where(condition, x, y), f"where: {a} and {b}")


# ---- numbers of the host ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers(dtype: torch.dtype, device: str) -> None:
    """Every operator that takes a number, on either side where torch does."""
    x = torch.tensor([[1, 0, 3], [2, 5, 7]], device=device).to(dtype)
    condition = x != 0
    # 0.1 is no bfloat16: comparisons round it first. 2**53 + 1 is no float64.
    values = [2, 2.5, True, 0, -1, 0.1, 2**53 + 1] + ([1 - 2j] if dtype != torch.float16 else [])
    for value in values:
        for name in ("add", "sub", "mul", "div", "pow", "eq", "ne", "lt", "le", "gt", "ge", "bitwise_and"):
            compare(name, (x, value))
        compare("pow", (value, x))
        compare("where", (condition, x, value))
        compare("where", (condition, value, x))
        compare("clamp", (x, value))
        compare("clamp", (x, None, value))
    compare("clamp", (x, 1, 2.5))
    for pair in ((1, 0), (1.0, 0), (True, False)):
        compare("where", (condition, *pair))


def compare(name: str, arguments: tuple[Any, ...], **more: Any) -> None:
    """With torch; what torch refuses may be refused. Complex numbers are served where the engine has them."""
    what = f"{name}{arguments}"
    if name == "pow" and all(getattr(a, "dtype", type(a)) in (torch.bool, bool) for a in arguments):
        return  # int64 here
    try:
        expected = torchs(getattr(torch, name), *arguments, **more)
    except (RuntimeError, TypeError, ZeroDivisionError):
        return
    common = [a for a in arguments if a is not None]
    is_complex = any(isinstance(a, complex) or (isinstance(a, Tensor) and a.is_complex()) for a in common)
    if is_complex and name not in COMPLEX:
        with pytest.raises((RuntimeError, TypeError), match=name):
            getattr(fastkern, name)(*arguments, **more)
        return
    got = getattr(fastkern, name)(*arguments, **more)
    zero_dim = any(isinstance(a, Tensor) and a.dim() == 0 and a.dtype != expected.dtype for a in common)
    # torch on CUDA multiplies with the reciprocal of a number.
    by_number = name == "div" and expected.is_cuda and not (isinstance(arguments[1], Tensor) and arguments[1].is_cuda)
    near = by_number or (zero_dim and expected.dtype in FLOATS[:2])
    most = tolerance(name, more, expected.dtype) or int(near)
    assert_like_torch(got, expected, what, most, zeros=name not in UNSIGNED_ZEROS)


def test_numbers_stay_on_the_host(device: str) -> None:
    """CPU tensors without dimensions beside others, in any position."""
    x, zero = torch.randn(3, 5, device=device), torch.tensor(2.5)
    for a, b in ((x, zero), (zero, x)):
        compare("add", (a, b))
        compare("div", (a, b))
        compare("where", (x > 0, a, b))
    assert fastkern.add(zero, zero).device.type == "cpu"
    compare("clamp", (x, zero, torch.tensor(3.0)))


def test_alpha(device: str) -> None:
    x, y = torch.randn(7, device=device), torch.randn(7, device=device)
    i, b = torch.arange(7, device=device), torch.ones(7, dtype=torch.bool, device=device)
    for name in ("add", "sub"):
        for alpha in (2, -0.5, 0):
            compare(name, (x, y), alpha=alpha)
            compare(name, (x, 3), alpha=alpha)
        compare(name, (i, i), alpha=3)
        compare(name, (x + 1j, y), alpha=2 - 1j)
        with pytest.raises(RuntimeError, match=f"{name}: alpha must be an integer where the operands are, got 0.5"):
            getattr(fastkern, name)(i, i, alpha=0.5)
        with pytest.raises(RuntimeError, match=f"{name}: alpha must be an integer where the operands are, got 0.5"):
            getattr(torch.ops.fastkern, name)(i, i, alpha=0.5)
        with pytest.raises(RuntimeError, match=f"{name}: alpha must not be bool"):
            getattr(fastkern, name)(i, i, alpha=True)
        with pytest.raises(RuntimeError, match=f"{name}: alpha must be real"):
            getattr(fastkern, name)(x, y, alpha=1j)
        with pytest.raises(TypeError, match=f"{name}: alpha must be a number, got str"):
            getattr(fastkern, name)(x, y, alpha="2")
    assert torch.equal(fastkern.add(b, b), torch.add(b, b))


@pytest.mark.parametrize("rounding", ["trunc", "floor"])
def test_integer_division(rounding: str, device: str) -> None:
    values = torch.tensor([-7, -6, -1, 0, 1, 6, 7], device=device)
    for dtype in TYPES[1:6]:
        x = values.to(dtype)
        for y in (3, -2, x.roll(1).masked_fill(x.roll(1) == 0, 1)):
            if dtype != torch.uint8 or isinstance(y, Tensor) or y > 0:
                compare("div", (x, y), rounding_mode=rounding)
    for x in (values.float(), values.double(), values.half()):
        for y in (0.0, float("inf"), float("nan"), -1.5, x.roll(2)):
            compare("div", (x, y), rounding_mode=rounding)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="fastkern::div: "):
            fastkern.div(values, 0, rounding_mode=rounding)  # type: ignore[arg-type]
    fastkern.div(values, values, rounding_mode=None)


SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -2.5, 1e-40, 3e38, -3e38]


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values(dtype: torch.dtype, device: str) -> None:
    """NaN, infinities, zeros of both signs, subnormal and huge numbers, in every pair."""
    x = torch.tensor(SPECIAL, device=device, dtype=torch.float64).to(dtype)
    for name in UNARY:
        if name not in ("bitwise_not", "triu", "gelu", "silu", "relu"):
            compare(name, (x,))
    for name in ("gelu", "silu", "relu"):
        expected = getattr(torch.nn.functional, name)(x)
        truth = getattr(torch.nn.functional, name)(x.double())
        zeros = name != "relu" or device == "cpu"  # torch's relu of -0.0 is 0.0 on CUDA, -0.0 on the CPU
        most = tolerance(name, {}, dtype)
        assert_like_torch(getattr(fastkern, name)(x), expected, name, most, truth, zeros=zeros, near=True)
    for name in BINARY:
        if not name.startswith("bitwise"):
            compare(name, (x[:, None], x))
    compare("clamp", (x[:, None], x))
    compare("clamp", (x[:, None, None], x[:, None], x))
    for rounding in ("trunc", "floor"):
        compare("div", (x[:, None], x), rounding_mode=rounding)


# ---- layouts ---------------------------------------------------------------------------------------------------------

SHAPES = [((5, 7, 3), (5, 7, 3)), ((5, 7, 3), (3,)), ((5, 7, 3), (7, 1)), ((5, 1, 3), (7, 1)), ((129,), (1,)),
          ((2, 3, 4, 5), (1, 3, 1, 1)), ((31, 33), (33,)), ((0, 3), (1, 3)), ((1, 1), (1,)), ((), (3,))]  # fmt: skip


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_layouts(shapes: tuple[tuple[int, ...], tuple[int, ...]], device: str) -> None:
    """Strided, transposed, expanded and shifted operands of unlike types: torch's values and strides."""
    views = {
        "dense": lambda t: t,
        **LAYOUTS,
        "offset 1": lambda t: offset_by(1, t),
        "offset 7": lambda t: offset_by(7, t),
    }
    base = [torch.randn(shape, device=device) for shape in shapes]
    for i, (first, second) in enumerate(itertools.product(views, views)):
        types = (FLOATS[i % 4], FLOATS[(i // 4) % 4])
        x, y = (v.to(t) for v, t in zip(base, types, strict=True))
        x = views[first](x) if x.dim() and x.numel() else x
        y = views[second](y) if y.dim() and y.numel() else y
        if x is None or y is None:
            continue
        what = f"{shapes}: {first} of {types[0]} and {second} of {types[1]}"
        # On the CPU torch converts operands to one type first, and an expanded one is expanded no more.
        strides = types[0] == types[1] or not (first.startswith("expanded") or second.startswith("expanded"))
        if () not in shapes or types[0] == types[1]:  # torch rounds what has no dimensions to the other's type first
            assert_like_torch(fastkern.add(x, y), torch.add(x, y), what, strides=strides)
        assert_like_torch(fastkern.gt(x, y), torch.gt(x, y), what, strides=strides)
        if second == "dense":
            assert_like_torch(fastkern.neg(x), torch.neg(x), what)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats(memory_format: torch.memory_format, device: str) -> None:
    x = torch.randn(2, 3, 5, 7, device=device).to(memory_format=memory_format)
    for other in (
        x,
        x.contiguous(),
        x[:1],
        x.new_ones(3, 1, 1),
        x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
    ):
        for a, b in ((x, other), (other, x)):
            assert_like_torch(fastkern.mul(a, b), torch.mul(a, b), f"strides {a.stride()} and {b.stride()}")
    assert_like_torch(fastkern.triu(x), torch.triu(x), "triu")


def test_storage_offsets(device: str) -> None:
    """Every pair of misalignments of three types, at odd sizes."""
    for size in (1, 3, 17, 255, 1025):
        for k in range(16):
            for a, b in zip(TYPES[8:9] + TYPES[7:8] + TYPES[1:2], TYPES[8:9] + TYPES[8:9] + TYPES[5:6], strict=True):
                x = torch.randn(size + k, device=device).mul(50).to(a)[k:]
                y = torch.randn(size + 16, device=device).mul(50).to(b)[15 - k : 15 - k + size]
                assert torch.equal(fastkern.add(x, y), torch.add(x, y)), (size, k, a, b)
        z = torch.empty(size + 7, device=device)[7:]
        x = torch.randn(size, device=device)
        fastkern.neg(x, out=z)
        assert torch.equal(z, -x)


def test_conjugate_and_negative_views(device: str) -> None:
    x = torch.randn(5, 3, device=device) + 1j * torch.randn(5, 3, device=device)
    y = torch.randn(5, 3, device=device) + 1j
    for a in (x.conj(), x.conj().imag, torch._neg_view(x.real)):
        compare("mul", (a, y))
        compare("add", (y, a))
        compare("neg", (a,))
    z = x.clone()
    fastkern.mul_(z.conj(), y)
    assert torch.allclose(z.conj(), x.conj() * y)


def test_wrap_around(device: str) -> None:
    """Integers of every width wrap around as torch's."""
    for dtype in TYPES[1:6]:
        limits = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max, 3], dtype=dtype, device=device)
        for name in ("add", "sub", "mul", "maximum"):
            compare(name, (limits[:, None], limits))
        compare("neg", (limits,))
        compare("abs", (limits,))
        compare("pow", (limits, 3))


@pytest.mark.parametrize("dtype", FLOATS)
def test_places_in_a_vector(dtype: torch.dtype, device: str) -> None:
    """An element's result is the same bits wherever it lies: in a vector of the loop, in its rest, or alone."""
    x, y = (torch.randn(333, device=device) * 2).to(dtype), (torch.rand(333, device=device) + 0.5).to(dtype)
    ops = torch.ops.fastkern
    calls = [*((getattr(fastkern, n), (x,)) for n in UNARY if n not in ("bitwise_not", "triu")),
             *((getattr(fastkern, n), (x, y)) for n in BINARY if not n.startswith("bitwise")),
             *((getattr(ops, f"{n}_bwd"), (y, x)) for n in ("gelu", "silu", "sigmoid", "tanh", "relu")),
             (lambda a: fastkern.gelu(a, "tanh"), (x,)), (lambda a, b: ops.gelu_bwd(b, a, "tanh"), (x, y)),
             (lambda a, b: fastkern.add(a, b, alpha=0.3), (x, y)),
             (lambda a, b: fastkern.div(a, b, rounding_mode="floor"), (x, y))]  # fmt: skip
    for function, arguments in calls:
        whole = function(*arguments)
        for step in (1, 7):
            parts = [function(*(a[i : i + step] for a in arguments)) for i in range(0, 333, step)]
            assert torch.equal(torch.cat(parts).nan_to_num(7), whole.nan_to_num(7)), (function, step)
