# SPDX-License-Identifier: Apache-2.0
"""Dropout, alone and between a bias and a residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastkern
from fastkern.ops import _philox
from fastkern.specs._refusals import set_to
from fastkern.specs._spec import BadCall, Inputs, OpSpec
from fastkern.specs.activation import column_sums_workspace
from fastkern.specs.norm import rows, size

F32 = torch.float32


def _random(sizes: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    return torch.randn(sizes, device=device, dtype=torch.float32).to(dtype)


def _mask(p: float, device: Any) -> Inputs:
    drawn = torch.randint(2**63 - 1, (2,), device=device)
    return {"p": p, "seed": drawn[:1].clone(), "offset": drawn[1].clone()} if p else {"p": p}


def _inputs(*, N: int, dtype: torch.dtype, device: Any, p: float = 0.3, **leading: int) -> Inputs:
    return {"x": _random((*leading.values(), N), dtype, device), **_mask(p, device)}


def _add_inputs(
    *, N: int, dtype: torch.dtype, device: Any, bias: Any = "same", residual: Any = "same", p: float = 0.3,
    **leading: int,
) -> Inputs:  # fmt: skip
    shape = (*leading.values(), N)
    return {
        "x": _random(shape, dtype, device),
        "bias": None if bias is None else _random((N,), dtype if bias == "same" else bias, device),
        "residual": _random(shape, dtype if residual == "same" else residual, device),
        **_mask(p, device),
    }


def _dropped(x: Tensor, p: float = 0.5, seed: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """The formula, in the dtype of x; the mask is that of the operator."""
    if seed is None:
        return x * 1
    return torch.where(_philox.keep_mask(x.shape, p, seed, offset), x * _philox.keep_scale(p), 0.0)


def _float32(x: Tensor, p: float = 0.5, seed: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    return _dropped(x.float(), p, seed, offset).to(x.dtype)


def _add(
    x: Tensor, bias: Tensor | None, residual: Tensor, p: float = 0.0, seed: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    dtype = residual.dtype
    if dtype != x.dtype:
        x = x.to(torch.promote_types(dtype, x.dtype))
    z = x if bias is None else x + bias.to(x.dtype)
    return (residual + _dropped(z, p, seed, offset)).to(dtype)


def _add_float32(x: Tensor, bias: Tensor | None, residual: Tensor, *more: Any, **mask: Any) -> Tensor:
    bias = None if bias is None else bias.float()
    return _add(x.float(), bias, residual.float(), *more, **mask).to(residual.dtype)


def _mask_bad_calls(op: str) -> tuple[BadCall, ...]:
    one = torch.ones((), dtype=torch.int64)
    number = rf"{op}: p must be between 0 and 1, got "
    return (
        BadCall("p above 1", set_to(p=lambda a: 1.5), number + r"1\.5"),
        BadCall("p below 0", set_to(p=lambda a: -0.5), number + r"-0\.5"),
        BadCall("p NaN", set_to(p=lambda a: float("nan")), number + "-?nan"),
        BadCall("seed int32", set_to(seed=lambda a: one.int().to(a["x"].device)), rf"{op}: seed must be torch\.int64"),
        BadCall(
            "seed of two", set_to(seed=lambda a: one.to(a["x"].device).expand(2)), rf"{op}: seed must have one element"
        ),
        BadCall("offset float", set_to(offset=lambda a: one.to(a["x"].device).float()), rf"{op}: offset must be torch"),
    )


_DIMS = (
    *rows(3, 2, 7, 17, 64, 129, 1000),
    *rows(2, 1, 8, 2049, 4104),
    *rows(77, 33),
    *rows(1, 9001),
    {"B": 2, "S": 3, "H": 2, "N": 65},
)
_BENCH_DIMS = (*rows(1, 4096), *rows(4096, 4096), *rows(16384, 11008), *rows(8192, 14336))

_COMMON: dict[str, Any] = {
    "family": "activation",
    "dims": _DIMS,
    "flops": lambda inputs, backward: 12 * inputs["x"].numel(),
    "bench_dims": _BENCH_DIMS,
    "cpu_bench_dims": (*rows(256, 4096), *rows(1024, 16384)),
    "placed": lambda inputs: bool(inputs["p"]),
    "bench_variant": {"p": 0.1},
}

DROPOUT = OpSpec(
    name="dropout",
    function=fastkern.dropout,
    reference=_dropped,
    baseline=_dropped,
    yardstick=_float32,
    make=_inputs,
    variants=({"p": 0.3}, {"p": 0.0}),
    differentiable=("x",),
    strided=("x",),
    batched=("x",),
    traffic=lambda inputs, backward: 2 * size(inputs["x"]),
    benchmark={"baseline": lambda x, p, **mask: torch.nn.functional.dropout(x, p)},
    bad_calls=(
        BadCall("x integer", set_to(x=lambda a: a["x"].long()), r"dropout: x must be .*, got torch\.int64"),
        *_mask_bad_calls("dropout"),
    ),
    **_COMMON,
)

BIAS_DROPOUT_ADD = OpSpec(
    name="bias_dropout_add",
    function=fastkern.bias_dropout_add,
    reference=_add,
    baseline=_add,
    yardstick=_add_float32,
    make=_add_inputs,
    variants=(
        {"p": 0.3},
        {"p": 0.1, "bias": None, "residual": F32},
    ),
    differentiable=("x", "bias", "residual"),
    strided=("x", "bias", "residual"),
    batched=("x", "residual"),
    traffic=lambda inputs, backward: 2 * size(inputs["x"]) + (0 if backward else size(inputs["residual"])),
    workspace=lambda inputs, backward: column_sums_workspace(inputs["x"]) if backward else 0,
    benchmark={"baseline": lambda x, bias, residual, p, **mask: residual + torch.nn.functional.dropout(x + bias, p)},
    bad_calls=(
        BadCall("x integer", set_to(x=lambda a: a["x"].long()), r"bias_dropout_add: x must be .*, got torch\.int64"),
        BadCall(
            "bias too short", set_to(bias=lambda a: a["bias"][:-1]), r"bias_dropout_add: bias must have shape \(\d+,\)"
        ),
        BadCall(
            "residual of another shape",
            set_to(residual=lambda a: a["residual"][..., :-1]),
            r"bias_dropout_add: residual must have shape \(.*\), got \(.*\)",
        ),
        *_mask_bad_calls("bias_dropout_add"),
    ),
    **_COMMON,
)

SPECS = (DROPOUT, BIAS_DROPOUT_ADD)
