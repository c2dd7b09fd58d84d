# SPDX-License-Identifier: Apache-2.0
"""Some of the pointwise operators, one or two of each kind; tests/test_pointwise.py has all of them beside torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkern
from fastkern.specs._refusals import set_to
from fastkern.specs._spec import VALUES, BadCall, Dims, Inputs, OpSpec
from fastkern.specs.norm import rows

# ---- inputs ----------------------------------------------------------------------------------------------------------


def _one(*, dtype: torch.dtype, device: Any, **sizes: int) -> Inputs:
    return {"input": (2 * torch.randn(*sizes.values(), device=device)).to(dtype)}


def _one_gelu(*, approximate: str, **more: Any) -> Inputs:
    return {**_one(**more), "approximate": approximate}


def _two(
    *, dtype: torch.dtype, device: Any, over: str = "all", other: torch.dtype | None = None, **sizes: int
) -> Inputs:
    """The second operand over all dimensions, or the last one ("bias"), or all but that ("column")."""
    shape = list(sizes.values())
    second = {"all": shape, "bias": shape[-1:], "column": [*shape[:-1], 1]}[over]
    away = 0.5 + torch.rand(second, device=device)  # from 0: it may be a divisor
    sign = torch.where(torch.rand(second, device=device) < 0.5, -1.0, 1.0)
    return {**_one(dtype=dtype, device=device, **sizes), "other": (away * sign).to(other or dtype)}


def _where_inputs(**more: Any) -> Inputs:
    inputs = _two(**more)
    return {"condition": torch.rand_like(inputs["input"], dtype=torch.float32) < 0.5, **inputs}


def _clamp_inputs(*, dtype: torch.dtype, device: Any, **sizes: int) -> Inputs:
    limit = torch.rand(list(sizes.values())[-1:], device=device).to(dtype)
    return {**_one(dtype=dtype, device=device, **sizes), "min": -limit, "max": limit}


# ---- costs -----------------------------------------------------------------------------------------------------------


def _bytes(t: Any) -> int:
    return t.numel() * t.element_size() if isinstance(t, Tensor) else 0


def _traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: operands read, the result written. Backward: its gradient read, what is kept, one for each operand."""
    operands = [t for t in inputs.values() if isinstance(t, Tensor)]
    floats = [t for t in operands if t.is_floating_point()]
    result = torch.empty(torch.broadcast_shapes(*(t.shape for t in operands)), device="meta",
                         dtype=torch.result_type(floats[0], floats[-1]))  # fmt: skip
    gradients = sum(_bytes(t) for t in floats)
    return _bytes(result) + sum(_bytes(t) for t in operands) + (gradients if backward else 0)


def _flops(inputs: Inputs, backward: bool) -> int:
    return int(inputs["input"].numel())


# ---- the rows --------------------------------------------------------------------------------------------------------

_DIMS: tuple[Dims, ...] = (*rows(2, 3, 17, 257), *rows(3, 8), *rows(33, 65), {"B": 2, "S": 5, "N": 37})
_BENCH_DIMS: tuple[Dims, ...] = (*rows(1024, 4096), *rows(8192, 4096), *rows(8192, 16384))
_CPU_BENCH_DIMS: tuple[Dims, ...] = (*rows(256, 1024), *rows(4096, 4096))

_COMMON: dict[str, Any] = {
    "family": "elementwise",
    "dims": _DIMS,
    "traffic": _traffic,
    "flops": _flops,
    "bench_dims": _BENCH_DIMS,
    "cpu_bench_dims": _CPU_BENCH_DIMS,
    "values": {"times 100": VALUES["times 100"]},  # an element is all that a result is made of
}


def _refusal(name: str, argument: str, dtype: torch.dtype) -> BadCall:
    return BadCall(
        f"{argument} {dtype}",
        set_to(**{argument: lambda a: a[argument].detach().to(dtype)}),
        rf"{name}: {argument} must be .*, got {dtype}",
    )


def _unary(name: str, torch_function: Callable[..., Tensor], **more: Any) -> OpSpec:
    fields = {"make": _one, "variants": ({},), "dtypes": (torch.float32, torch.bfloat16), **more}
    return OpSpec(
        name=name,
        function=getattr(fastkern, name),
        reference=torch_function,
        baseline=torch_function,
        differentiable=("input",),
        strided=("input",),
        batched=("input",),
        bad_calls=(_refusal(name, "input", torch.float8_e4m3fn), _refusal(name, "input", torch.complex64)),
        **fields,
        **_COMMON,
    )


def _binary(name: str, torch_function: Callable[..., Tensor], **more: Any) -> OpSpec:
    fields = {"make": _two, "variants": ({},), "dtypes": (torch.float32, torch.bfloat16),
              "strided": ("input", "other"), "batched": ("input", "other"), **more}  # fmt: skip
    return OpSpec(
        name=name,
        function=getattr(fastkern, name),
        reference=torch_function,
        baseline=torch_function,
        differentiable=("input", "other"),
        bad_calls=(
            _refusal(name, "other", torch.float8_e4m3fn),
            BadCall(
                "shapes that do not broadcast",
                set_to(other=lambda a: a["other"].new_ones(a["input"].shape[-1] + 1)),
                rf"{name}: other must broadcast with shape \(.*\), got \(\d+,\)",
            ),
        ),
        **fields,
        **_COMMON,
    )


# torch's functions, with arguments that have names.


def _of_one(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reference(input: Tensor) -> Tensor:  # noqa: A002
        return function(input)

    return reference


def _of_two(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reference(input: Tensor, other: Tensor) -> Tensor:  # noqa: A002
        return function(input, other)

    return reference


def _cancelled(inputs: Inputs, truth: tuple[Tensor, ...]) -> tuple[Tensor]:
    """One plus a function near -1, whose rounding torch's has as well, may be off by half a step of 1."""
    return (inputs["input"].abs() * 2.0**-24,)


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:  # noqa: A002
    return F.gelu(input, approximate=approximate)


def _where(condition: Tensor, input: Tensor, other: Tensor) -> Tensor:  # noqa: A002
    return torch.where(condition, input, other)


def _clamp(input: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:  # noqa: A002
    return torch.clamp(input, min, max)


SPECS = (
    _unary("exp", _of_one(torch.exp)),
    _unary("tanh", _of_one(torch.tanh)),
    _unary("sigmoid", _of_one(torch.sigmoid)),
    _unary("silu", _of_one(F.silu)),
    _unary("gelu", _gelu, make=_one_gelu, slack=_cancelled, variants=({"approximate": "none"}, {"approximate": "tanh"}),
           bench_variant={"approximate": "none"}),
    # Gradients of what is broadcast are torch's sums, which depend on the batch.
    _binary("add", _of_two(torch.add), data=("input",), batched=(), reproducible=False, bench_variant={"over": "bias"},
            variants=({"over": "bias"}, {"other": torch.float32, "over": "column"})),
    _binary("mul", _of_two(torch.mul)),
    _binary("div", _of_two(torch.div), data=("input",), batched=(), reproducible=False, variants=({"over": "column"},)),
    _binary("maximum", _of_two(torch.maximum), signed_zeros=False),
    _binary("where", _where, make=_where_inputs, strided=("condition", "input", "other"),
            batched=("condition", "input", "other"), data=("input", "other"), contained=False),
    OpSpec(
        name="clamp",
        function=fastkern.clamp,
        reference=_clamp,
        baseline=_clamp,
        make=_clamp_inputs,
        variants=({},),
        differentiable=("input", "min", "max"),
        strided=("input", "min", "max"),
        batched=("input",),
        reproducible=False,
        bad_calls=(_refusal("clamp", "max", torch.float8_e4m3fn), _refusal("clamp", "input", torch.complex64)),
        signed_zeros=False,
        dtypes=(torch.float32, torch.bfloat16),
        **_COMMON,
    ),
)  # fmt: skip
