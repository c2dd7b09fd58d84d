# SPDX-License-Identifier: Apache-2.0
"""Gradients of the pointwise operators beside torch's, first and second, and what torch's transforms make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastkern
import pytest
import torch
from harness.opinfo import call_of, entries, samples
from torch import Tensor
from torch.autograd import forward_ad

NAMES = ["abs", "neg", "reciprocal", "sqrt", "rsqrt", "exp", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu",
         "triu", "add", "sub", "mul", "div", "pow", "maximum", "minimum", "clamp", "where"]  # fmt: skip
COMPLEX = ("abs", "neg", "add", "sub", "mul", "where", "triu")
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -2.5, 3.0]

names = pytest.mark.parametrize("name", NAMES)


def assert_close(got: Tensor | None, expected: Tensor | None, what: str, ulps: float = 64) -> None:
    """None is a gradient of zeros."""
    if got is None or expected is None:
        assert got is None or not bool(got.any()), f"{what}: torch has no gradient"
        assert expected is None or not bool(expected.any()), f"{what}: no gradient"
        return
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), f"{what}: {got.dtype} {tuple(got.shape)}"
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(
        got, expected, rtol=ulps * eps, atol=ulps * eps, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def leaves(*values: Any) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad]


def both_gradients(function: Callable[..., Tensor], arguments: tuple[Any, ...], more: dict[str, Any]) -> list[Any]:
    """Of a random functional of the result, and of one of those gradients."""
    wanted = leaves(*arguments, *more.values())
    result = function(*arguments, **more)
    torch.manual_seed(1)
    dy = torch.randn_like(result).requires_grad_()
    first = torch.autograd.grad(result, wanted, dy, create_graph=True, allow_unused=True)
    graphs = [g for g in first if g is not None and g.requires_grad]
    if not graphs:
        return list(first)
    along = [torch.randn_like(g) for g in graphs]
    return [*first, *torch.autograd.grad(graphs, [*wanted, dy], along, allow_unused=True)]


@names
def test_samples(name: str, device: str) -> None:
    """For torch's samples, every operand that can wants a gradient."""
    for info in entries(name):
        for dtype in (torch.float64, torch.complex128) if name in COMPLEX else (torch.float64,):
            for i, sample in enumerate(samples(info, device, dtype, references=0, requires_grad=True)):
                arguments, what = (sample.input, *sample.args), f"{name} of {dtype}, sample {i}"
                expected = both_gradients(info.op, arguments, sample.kwargs)
                got = both_gradients(call_of(name), arguments, sample.kwargs)
                for j, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
                    assert_close(ours, theirs, f"{what}, gradient {j}", 1024 if name == "pow" else 64)


def torch_function(name: str) -> Callable[..., Tensor]:
    return getattr(torch, name, None) or getattr(torch.nn.functional, name)


def operands(name: str, device: str, dtype: torch.dtype, other: torch.dtype | None = None) -> tuple[Any, ...]:
    """Away from edges; the second one broadcast, and of another type if asked for."""
    x = (torch.rand(5, 7, device=device) + 0.25).to(dtype).requires_grad_()
    y = (torch.rand(7, device=device) + 0.3).to(other or dtype).requires_grad_()
    z = (torch.rand(5, 1, device=device) + 0.6).to(other or dtype).requires_grad_()
    if name == "where":
        return torch.rand(5, 7, device=device) > 0.5, x, y
    return (x, y, z) if name == "clamp" else (x, y) if name in NAMES[14:] else (x,)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(name: str, dtype: torch.dtype, device: str) -> None:
    """Narrow operands, of one type and of two: gradients in the type and shape of each."""
    for other in (dtype, torch.float32):
        arguments = operands(name, device, dtype, other)
        expected = both_gradients(torch_function(name), arguments, {})
        got = both_gradients(getattr(fastkern, name), arguments, {})
        for j, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            assert_close(ours, theirs, f"{name} of {dtype} and {other}, gradient {j}", ulps=16)


@names
def test_numbers_and_integers(name: str, device: str) -> None:
    """Operands that are numbers or integers have no gradient; the others have theirs."""
    for arguments in ((2,), (2.5,), (0,), (torch.arange(7, device=device),)):
        if len(operands(name, device, torch.float64)) != 2:
            continue
        x = operands(name, device, torch.float64)[0]
        if name in ("maximum", "minimum") and not isinstance(arguments[0], Tensor):
            continue
        expected = both_gradients(torch_function(name), (x, *arguments), {})
        got = both_gradients(getattr(fastkern, name), (x, *arguments), {})
        for ours, theirs in zip(got, expected, strict=True):
            assert_close(ours, theirs, f"{name}(x, {arguments[0]})")


def test_numbers_elsewhere(device: str) -> None:
    x, condition = (
        torch.rand(5, device=device, dtype=torch.float64).requires_grad_(),
        torch.arange(5, device=device) > 2,
    )
    for name, arguments in (("pow", (2, x)), ("pow", (0, x)), ("pow", (-1.5, x)), ("where", (condition, x, 2.0)),
                            ("where", (condition, 1, x)), ("clamp", (x, 0.5)), ("clamp", (x, None, 0.5)),
                            ("clamp", (x, 0, 1)), ("sub", (2, x)), ("div", (2.5, x)), ("mul", (2, x))):  # fmt: skip
        expected = both_gradients(torch_function(name), arguments, {})
        got = both_gradients(getattr(fastkern, name), arguments, {})
        for ours, theirs in zip(got, expected, strict=True):
            assert_close(ours, theirs, f"{name}{arguments}")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("triu", "where")])
def test_edges(name: str, device: str) -> None:
    """Ties, limits, zeros, infinities and NaN: torch's choice of a gradient."""
    x = torch.tensor(SPECIAL, device=device, dtype=torch.float64)
    first, second, third = (x.clone().view(s).requires_grad_() for s in ((-1, 1, 1), (-1, 1), (-1,)))
    arguments = (first, second, third) if name == "clamp" else (first, second) if name in NAMES[14:] else (first,)
    function, ours = torch_function(name), getattr(fastkern, name)
    for i in range(len(arguments)):
        whole = torch.broadcast_tensors(*arguments)
        mine = [t.detach().clone().requires_grad_(j == i) for j, t in enumerate(whole)]
        (expected,) = torch.autograd.grad(function(*mine).sum(), mine[i])
        (got,) = torch.autograd.grad(ours(*mine).sum(), mine[i])
        assert_close(got, expected, f"{name}, operand {i}")


# ---- ways in ---------------------------------------------------------------------------------------------------------


@names
def test_operator(name: str, device: str) -> None:
    """``torch.ops.fastkern.<name>`` has the same gradients, and torch's own checks pass on it."""
    arguments = operands(name, device, torch.float32)
    op = getattr(torch.ops.fastkern, name)
    more = {"gelu": ("tanh",), "triu": (1,), "add": (2.0,), "div": (None,)}.get(name, ())
    ours = getattr(fastkern, name)(*arguments, **({"alpha": 2} if name == "add" else {}),
                                   **({"approximate": "tanh"} if name == "gelu" else {}),
                                   **({"diagonal": 1} if name == "triu" else {}))  # fmt: skip
    theirs = op(*arguments, *more)
    dy = torch.randn_like(ours)
    wanted = leaves(*arguments)
    for a, b in zip(torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(theirs, wanted, dy), strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(op.default, (*arguments, *more))
    with torch.no_grad():
        assert op(*arguments, *more).grad_fn is None


def test_overloads(device: str) -> None:
    """opcheck of those for numbers, for results in given places, and of the derivative functions."""
    x, y = torch.rand(3, 5, device=device).requires_grad_(), torch.rand(5, device=device)
    plain = x.detach()
    ops = torch.ops.fastkern
    for op, arguments in ((ops.add.int, (x, 2, 3.0)), (ops.mul.float, (x, 2.5)), (ops.pow.float_base, (2.5, x)),
                          (ops.where.int_other, (plain > 0.5, x, 1)), (ops.clamp.float, (x, None, 0.5)),
                          (ops.eq.int, (x, 1)),
                          (ops.gelu_bwd.default, (plain, plain)), (ops.silu_bwd.default, (plain, plain)),
                          (ops.sigmoid_bwd.default, (plain, plain)), (ops.tanh_bwd.default, (plain, plain)),
                          (ops.relu_bwd.default, (plain, plain))):  # fmt: skip
        torch.library.opcheck(op, arguments)
    torch.library.opcheck(ops.add.out, (plain, y), {"out": torch.empty(3, 5, device=device)})
    torch.library.opcheck(ops.mul_.default, (plain.clone(), y))
    torch.library.opcheck(ops.exp_.default, (plain.clone(),))


@names
def test_functional(name: str, device: str) -> None:
    """torch.func: gradients, vmap, Jacobians; forward mode; batched backward."""
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in operands(name, device, torch.float64)]
    ours, theirs = getattr(fastkern, name), torch_function(name)
    position = 1 if name == "where" else 0

    def loss(function: Any) -> Callable[..., Tensor]:
        return lambda *a: function(*a).square().sum()

    got = torch.func.grad(loss(ours), position)(*arguments)
    assert_close(got, torch.func.grad(loss(theirs), position)(*arguments), f"grad of {name}")
    tangent = torch.randn_like(arguments[position])

    def along(function: Any) -> tuple[Tensor, Tensor]:
        def one(x: Tensor) -> Tensor:
            return function(*(x if i == position else a for i, a in enumerate(arguments)))

        return torch.func.jvp(one, (arguments[position],), (tangent,))

    for a, b in zip(along(ours), along(theirs), strict=True):
        assert_close(a, b, f"jvp of {name}")
    in_dims = tuple(0 if a.shape[:1] == (5,) else None for a in arguments)
    if name == "triu":
        arguments, in_dims = [torch.rand(3, 5, 7, device=device, dtype=torch.float64)], (1,)
    assert_close(
        torch.func.vmap(ours, in_dims)(*arguments), torch.func.vmap(theirs, in_dims)(*arguments), f"vmap of {name}"
    )
    per_sample = torch.func.vmap(torch.func.grad(loss(ours), position), in_dims)(*arguments)
    assert_close(per_sample, torch.func.vmap(torch.func.grad(loss(theirs), position), in_dims)(*arguments), name)
    leaf = arguments[position].clone().requires_grad_()
    result = ours(*(leaf if i == position else a for i, a in enumerate(arguments)))
    several = torch.randn(3, *result.shape, device=device, dtype=result.dtype)
    batched = torch.autograd.grad(result, leaf, several, is_grads_batched=True, retain_graph=True)[0]
    for dy, grad in zip(several, batched, strict=True):
        assert_close(grad, torch.autograd.grad(result, leaf, dy, retain_graph=True)[0], f"batched gradient of {name}")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[position], torch.ones_like(arguments[position]))
        assert (
            forward_ad.unpack_dual(ours(*(dual if i == position else a for i, a in enumerate(arguments)))).tangent
            is not None
        )


def test_vmap_of_scalars(device: str) -> None:
    """An entry without dimensions has the say in types that it has alone."""
    x, y = torch.arange(3, device=device), torch.tensor([1.5, 2.5, 3.5], device=device)
    h = torch.ones(4, device=device, dtype=torch.bfloat16)
    for a, b, dims in ((x, y, (0, 0)), (x.bfloat16()[:, None], y, (0, 0)), (y.double(), x.bfloat16()[:, None], (0, 0)),
                       (x, 2.5, (0, None)), (y, h, (0, None))):  # fmt: skip
        got = torch.func.vmap(fastkern.mul, dims)(a, b)
        expected = torch.func.vmap(torch.mul, dims)(a, b)
        assert got.dtype == expected.dtype, (a.dtype, b)
        assert torch.equal(got, expected)
    assert torch.func.vmap(fastkern.exp)(torch.empty(0, 3, device=device)).shape == (0, 3)
    with pytest.raises(RuntimeError, match="triu: input must have at least two dimensions"):
        torch.func.vmap(fastkern.triu)(torch.rand(3, 4, device=device))


# ---- traced ----------------------------------------------------------------------------------------------------------


def _mixture(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """Every kind of call once."""
    h = fastkern.add(x, y, alpha=2)
    h = fastkern.mul(fastkern.silu(h), 0.5)
    h = fastkern.where(fastkern.gt(h, 0), fastkern.gelu(h, "tanh"), fastkern.sub(h, 1))
    h = fastkern.clamp(fastkern.maximum(h, fastkern.neg(y)), -1, 2.5)
    h = fastkern.div(h, fastkern.add(fastkern.abs(y), 1.0))
    h = fastkern.add(h, fastkern.pow(i, 2))
    return fastkern.triu(fastkern.tanh(h))


def test_compile(device: str) -> None:
    """One graph for several sizes, forward and backward, with the values of eager calls."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_mixture, fullgraph=True, dynamic=True, backend=counter)
    for rows, columns in ((5, 7), (9, 4), (33, 65)):
        x = torch.randn(rows, columns, device=device, requires_grad=True)
        y = torch.randn(columns, device=device, requires_grad=True)
        i = torch.arange(columns, device=device)
        dy = torch.randn(rows, columns, device=device)
        expected, got = _mixture(x, y, i), compiled(x, y, i)
        assert torch.equal(got, expected)
        pairs = zip(torch.autograd.grad(got, (x, y), dy), torch.autograd.grad(expected, (x, y), dy), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert counter.frame_count == 1, f"{counter.frame_count} graphs"


def test_compile_in_place(device: str) -> None:
    """Mutation survives functionalisation."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        fastkern.mul_(x, y)
        fastkern.add_(x, 2)
        fastkern.exp(x, out=out)
        return fastkern.neg(out)

    for n in (5, 9):
        x, y, out = torch.rand(n, 3, device=device), torch.rand(3, device=device), torch.empty(n, 3, device=device)
        expected = x * y + 2
        result = compiled(x, y, out)
        assert torch.equal(x, expected)
        assert torch.equal(out, fastkern.exp(expected))
        assert torch.equal(result, -out)


def test_export(device: str) -> None:
    """Dynamic rows; the operators are nodes of the graph."""

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
            return _mixture(x, y, i)

    def arguments(rows: int) -> tuple[Tensor, ...]:
        return torch.rand(rows, 7, device=device), torch.rand(7, device=device), torch.arange(7, device=device)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), arguments(5), dynamic_shapes=({0: rows}, None, None))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"fastkern.add.default", "fastkern.where.default", "fastkern.mul.float"} <= targets, targets
    other = arguments(9)
    assert torch.equal(program.module()(*other), _mixture(*other))


def test_channels_last_traced(device: str) -> None:
    """A fake result has the strides of the real one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.rand(2, 3, 5, 7, device=device).to(memory_format=torch.channels_last)
    for a, b in ((x, x), (x, x.new_ones(3, 1, 1)), (x.permute(0, 2, 3, 1), x.new_ones(3)), (x[:, :, ::2], x[:, :, ::2]),
                 (x[:1], x[:1]), (x[:, :1], x)):  # fmt: skip
        with FakeTensorMode() as mode:
            fake = fastkern.add(mode.from_tensor(a), mode.from_tensor(b))
        real = fastkern.add(a, b)
        assert (fake.stride(), fake.dtype, fake.shape) == (real.stride(), real.dtype, real.shape)
        assert fake.device.type == device
