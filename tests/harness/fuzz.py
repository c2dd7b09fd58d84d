# SPDX-License-Identifier: Apache-2.0
"""Arguments made from an operator's schema: right ones, nearly right ones and nonsense."""

from __future__ import annotations

import inspect
import re
from typing import Any

import fastkern
import torch
from fastkern.specs import OpSpec, assert_accurate, in_float64
from hypothesis import strategies as st
from torch import Tensor

from harness.cases import (
    Variant,
    as_tuple,
    assert_same,
    is_float,
    make_inputs,
    run_forward,
    strided_names,
    volume,
    with_batch,
)
from harness.layouts import LAYOUTS, offset_by
from harness.transforms import helper_calls

ALLOWED_ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError)

DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip

Arguments = dict[str, Any]


def _names(op: Any) -> set[str]:
    return {argument.name for argument in op._schema.arguments}


def _parameters(spec: OpSpec) -> set[str]:
    """Of the public function: its words for some arguments may be others."""
    return set(inspect.signature(getattr(fastkern, spec.name)).parameters)


def operator_names(spec: OpSpec) -> list[str]:
    """The public operator and its helpers, as registered."""
    registered = {n.removeprefix("fastkern::") for n in torch._C._dispatch_get_all_op_names() if "fastkern::" in n}
    return [n for n in (spec.name, f"{spec.name}_fwd", f"{spec.name}_bwd") if n in registered]


# ---- single values ---------------------------------------------------------------------------------------------------


def _as_sparse(t: Tensor) -> Tensor:
    return t.to_sparse() if t.dim() else t


def _as_csr(t: Tensor) -> Tensor:
    return t.to_sparse_csr() if t.dim() == 2 and t.numel() else t


_FORMS = {
    "dense": lambda t: t,
    "dense again": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() >= 2 else t,
    "flipped": lambda t: t.permute(tuple(range(t.dim()))[::-1]),
    "step": lambda t: torch.cat([t, t], -1)[..., ::2] if t.dim() else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "offset": lambda t: offset_by(3, t) if t.is_floating_point() and t.element_size() > 1 else t,
    "sparse": _as_sparse,
    "csr": _as_csr,
    "meta": lambda t: t.to("meta"),
    "negative view": lambda t: torch._neg_view(t) if is_float(t) and t.element_size() > 1 else t,
    "subclass": lambda t: torch.nn.Parameter(t, requires_grad=False) if is_float(t) else t,
}


@st.composite
def tensors(draw: st.DrawFn, device: str) -> Tensor:
    shape = draw(st.lists(st.integers(0, 9), max_size=5))
    while volume(dict(enumerate(shape))) > 4096:
        shape.pop()
    dtype = draw(st.sampled_from(DTYPES))
    t = (3 * torch.randn(shape, device=device)).to(dtype)
    form = draw(st.sampled_from(sorted(_FORMS)))
    t = _FORMS[form](t) if "float8" not in str(dtype) else t  # torch itself can do little with these
    if t.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) and draw(st.booleans()):
        t = t.detach().requires_grad_()
    return t


_NUMBERS = (3, -1, 2.5, True, 1j)
_NO_NUMBERS = (None, "text", b"bytes", (1, 2), [0.5], {}, object, ...)
WRONG_TYPES = st.sampled_from([*_NUMBERS, *_NO_NUMBERS])
FLOATS = st.one_of(
    st.floats(), st.sampled_from([0.0, -0.0, -1e-6, 1e-300, 1e30, 1e300, float("nan"), float("inf"), float("-inf")])
)
INTEGERS = st.one_of(st.integers(-9, 9), st.integers(-(2**63), 2**63 - 1))


def values_for(type_text: str, device: str) -> st.SearchStrategy[Any]:
    """Values of a schema type, and of wrong types."""
    by_type = {
        "Tensor": tensors(device),
        "Optional[Tensor]": st.one_of(st.none(), tensors(device)),
        "float": FLOATS,
        "Optional[float]": st.one_of(st.none(), FLOATS),
        "bool": st.booleans(),
        "int": INTEGERS,
        "SymInt": INTEGERS,
        "Optional[int]": st.one_of(st.none(), INTEGERS),
        "ScalarType": st.sampled_from(DTYPES),
        "Optional[ScalarType]": st.one_of(st.none(), st.sampled_from(DTYPES)),
        "List[int]": st.lists(INTEGERS, max_size=4),
        "List[Tensor]": st.lists(tensors(device), max_size=3),
    }
    right = by_type.get(type_text, WRONG_TYPES)
    # torch takes any integer for a dtype, and refuses those that are none without naming the operator.
    wrong = st.sampled_from(_NO_NUMBERS) if "ScalarType" in type_text else WRONG_TYPES
    return st.one_of(right, right, right, wrong)


# ---- calls -----------------------------------------------------------------------------------------------------------


@st.composite
def good_inputs(draw: st.DrawFn, spec: OpSpec, device: str) -> Arguments:
    """Inputs of the spec's own making, at random sizes, strides and grad flags."""
    small = [d for d in spec.dims if volume(d) <= 1 << 12]
    dims = draw(st.sampled_from(small))
    dims = with_batch(dims, draw(st.integers(0 if next(iter(dims)) in spec.empty_dims else 1, 5)))
    variant: Variant = draw(st.sampled_from(spec.variants))
    inputs = make_inputs(spec, device, draw(st.sampled_from(spec.dtypes)), dims, variant)
    for name in strided_names(spec, inputs):
        label = draw(st.sampled_from(["dense", *LAYOUTS]))
        if label != "dense" and inputs[name].numel():
            view = LAYOUTS[label](inputs[name])
            inputs[name] = inputs[name] if view is None else view
    return inputs


def arguments_of(spec: OpSpec, op_name: str, inputs: Arguments) -> Arguments | None:
    """Arguments of the operator or helper for these inputs, None where this helper is not taken."""
    if op_name == spec.name:
        return dict(inputs)
    call = helper_calls(spec, inputs).get(op_name)
    if call is None:
        return None
    op, args, kwargs = call
    return {**{a.name: v for a, v in zip(op._schema.arguments, args, strict=False)}, **kwargs}


@st.composite
def calls(draw: st.DrawFn, spec: OpSpec, op_name: str, device: str) -> Arguments:
    schema = getattr(torch.ops.fastkern, op_name).default._schema
    kind = draw(st.sampled_from(["good", "one wrong", "one wrong", "two wrong", "random", "missing", "unknown"]))
    arguments = None if kind == "random" else arguments_of(spec, op_name, draw(good_inputs(spec, device)))
    if arguments is None:
        return {a.name: draw(values_for(str(a.real_type), device)) for a in schema.arguments}
    for k, v in arguments.items():
        if k in spec.differentiable and is_float(v) and draw(st.booleans()):
            arguments[k] = v.detach().requires_grad_()
    for _ in range({"one wrong": 1, "two wrong": 2}.get(kind, 0)):
        argument = draw(st.sampled_from(schema.arguments))
        arguments[argument.name] = draw(values_for(str(argument.real_type), device))
    if kind == "missing":
        arguments.pop(draw(st.sampled_from(sorted(arguments))))
    if kind == "unknown":
        arguments["no_such_argument"] = 1
    return arguments


# ---- verdict ---------------------------------------------------------------------------------------------------------


def _assert_words(spec: OpSpec, op_name: str, error: Exception) -> None:
    """The text names the operator; our own errors also name an argument and carry no path."""
    text = str(error)
    assert spec.name in text, f"{op_name}: {type(error).__name__} does not name the operator: {text!r}"
    own = re.match(r"fastkern::\w+: (\w+)", text)
    if own:
        names = _names(getattr(torch.ops.fastkern, op_name).default) | _parameters(spec)
        assert own[1] in names, f"{op_name}: the message starts with no argument of {sorted(names)}: {text!r}"


def _by_function(type_text: str, value: object) -> bool:
    """Whether an operator's argument of this type does not take the value, which the function in front of it does."""
    if value is None:
        return "Optional" not in type_text
    return type_text in ("Tensor", "Optional[Tensor]") and not isinstance(value, Tensor)


def _assert_right(spec: OpSpec, op_name: str, function: Any, arguments: Arguments, result: tuple[Tensor, ...]) -> None:
    """An accepted call gives what the same call on dense copies gives, and forward ops what the reference gives."""
    parameters = inspect.signature(getattr(fastkern, spec.name)).parameters
    for name in {"dropout_p", "p"} & set(parameters):
        if arguments.get(name, parameters[name].default) and arguments.get("seed") is None:
            return  # it drew one
    given = [v for v in arguments.values() if isinstance(v, Tensor)]
    if any(t.device.type == "meta" for t in given):
        # A tensor without dimensions on the CPU goes with any device, as in torch.
        stray = [t for t in given if t.device.type != "meta" and (t.dim() or t.device.type != "cpu")]
        assert not stray, f"{op_name}: took a mix of meta and real tensors"
        return
    for value in result:
        assert value.device == given[0].device, f"{op_name}: result on {value.device}"
    copies = {k: spec.dense(v.detach().resolve_neg()) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    op = getattr(torch.ops.fastkern, op_name).default
    for argument in op._schema.arguments:  # True stands for 1 in a call of ours, not in torch's functions
        if isinstance(copies.get(argument.name), bool) and "int" in str(argument.real_type).lower():
            copies[argument.name] = int(copies[argument.name])
    # A number in place of a tensor, None in place of a number are the function's to place.
    placed = any(_by_function(str(a.real_type), copies[a.name]) for a in op._schema.arguments if a.name in copies)
    with torch.no_grad():
        again = as_tuple((function if placed else op)(**copies))[
            : len(result)
        ]  # a function may keep what is for backward alone
        for i, (ours, dense) in enumerate(zip(result, again, strict=True)):
            assert_same(spec, ours, dense, f"{op_name}: result {i} against dense copies")
    if set(arguments) <= set(inspect.signature(spec.reference).parameters) and given[0].numel():
        if "quant_dtype" in _names(op):
            copies["quant_dtype"] = copies.get("quant_dtype") or torch.float8_e4m3fn
        truth = run_forward(spec.reference, in_float64(copies))
        ours = spec.decoded(copies, result)
        theirs = spec.decoded(copies, run_forward(spec.measure, copies))
        for got, base, exact, slack in zip(ours, theirs, truth, spec.slack(copies, truth), strict=True):
            what = f"{op_name}: accepted call"
            assert_accurate(got, base, exact, 2 * spec.forward_factor, ulps=8, what=what, slack=slack)


def judge(spec: OpSpec, op_name: str, function: Any, arguments: Arguments) -> bool:
    """Make the call; True if it was accepted. AssertionError unless it is right or refused in the right words."""
    try:
        result = as_tuple(function(**arguments))
        differentiable = bool(spec.differentiable) and op_name == spec.name
        if differentiable and any(r.requires_grad for r in result) and result[0].device.type != "meta":
            wanted = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
            outputs = [r for r in result if r.requires_grad]
            grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(r) for r in outputs], allow_unused=True)
            for grad, tensor in zip(grads, wanted, strict=True):
                assert grad is not None, f"{op_name}: an input that requires grad got none"
                assert (grad.shape, grad.dtype) == (tensor.shape, tensor.dtype), f"{op_name}: gradient's shape or dtype"
    except ALLOWED_ERRORS as error:
        _assert_words(spec, op_name, error)
        return False
    _assert_right(spec, op_name, function, arguments, tuple(r.detach() for r in result))
    return True
