# SPDX-License-Identifier: Apache-2.0
"""RMS norms with an 8-bit result. Their outputs are compared as the numbers that q and scale stand for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastkern
from fastkern.specs._refusals import norm_bad_calls, set_to, stream_bad_calls
from fastkern.specs._spec import BadCall, Inputs, OpSpec
from fastkern.specs.add_norm import BF16, F32, add_inputs, as_rounded, stream
from fastkern.specs.norm import norm_inputs, norm_reference, norm_torch, rows, rows_size, size

F8, I8 = torch.float8_e4m3fn, torch.int8
LARGEST = {F8: 448.0, I8: 127.0}
_STATIC = {F8: 0.01, I8: 0.03}  # scales at which a few values of a normalised row saturate, and most do not


def _inputs(static: bool, add: bool, *, quant_dtype: torch.dtype = F8, device: Any, **more: Any) -> Inputs:
    inputs = (add_inputs if add else norm_inputs)(device=device, **more)
    if static:
        inputs["scale"] = torch.tensor(_STATIC[quant_dtype], device=device)
    inputs["quant_dtype"] = quant_dtype
    return inputs


def _scale_of(value: Tensor, quant_dtype: torch.dtype) -> Tensor:
    largest = value.abs().amax(-1, keepdim=True) if value.shape[-1] else value.new_zeros(*value.shape[:-1], 1)
    return largest / LARGEST[quant_dtype]


def quantised(value: Tensor, scale: Tensor, quant_dtype: torch.dtype) -> Tensor:
    """Divided by the scale, saturated, rounded."""
    scaled = value / torch.where(scale == 0, 1.0, scale)
    scaled = scaled.clamp(-LARGEST[quant_dtype], LARGEST[quant_dtype])
    return (scaled.round() if quant_dtype == I8 else scaled).to(quant_dtype)


def _results(first: Tensor, scale: Tensor | None, h: Tensor | None) -> Any:
    found = tuple(t for t in (first, scale, h) if t is not None)
    return found if len(found) > 1 else found[0]


# ---- the three computations ------------------------------------------------------------------------------------------


def _reference(
    x: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    quant_dtype: torch.dtype = F8,
    *,
    add: bool,
) -> Any:
    """The numbers, not quantised but saturated."""
    h = stream(x, residual) if add else x
    value = norm_reference("rms", as_rounded(h, residual_dtype), weight, eps, bias, weight_offset)
    if scale is not None:
        value = value.clamp(-LARGEST[quant_dtype] * scale, LARGEST[quant_dtype] * scale)
    return _results(value, None if scale is not None else _scale_of(value, quant_dtype), h if add else None)


def _chain(
    x: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    quant_dtype: torch.dtype = F8,
    *,
    add: bool,
    wide: bool,
) -> Any:
    """The operators of torch; ``wide``: with nothing rounded before it is quantised, else as one would write it."""
    h = x
    if add:
        dtype = residual_dtype or (x.dtype if residual is None else residual.dtype)
        h = stream(x.float() if dtype == torch.float32 else x, residual).to(dtype)
    y = norm_torch("rms", h, weight, eps, bias, weight_offset, torch.float32 if wide else x.dtype).float()
    step = _scale_of(y, quant_dtype) if scale is None else scale
    return _results(quantised(y, step, quant_dtype), step if scale is None else None, h if add else None)


# ---- as numbers ------------------------------------------------------------------------------------------------------


def decoded(inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The product q * scale in place of q."""
    scale = inputs["scale"] if "scale" in inputs else outputs[1]
    return (outputs[0].float() * scale, *outputs[1:])


def half_step(inputs: Inputs, truth: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Half the distance between neighbours of q * scale: of int8 the scale, of float8 the last of its 3 bits.

    And what a scale below the smallest normal float32 may lose.
    """
    scale = inputs["scale"].double() if "scale" in inputs else truth[1]
    if inputs["quant_dtype"] == I8:
        half = scale / 2
    else:
        units = (truth[0] / torch.where(scale == 0, 1.0, scale)).abs().clamp_min(2.0**-6)  # denormals are as wide
        half = torch.exp2(torch.floor(torch.log2(units)) - 4) * scale
    half = (half + LARGEST[inputs["quant_dtype"]] * torch.finfo(torch.float32).smallest_normal).expand_as(truth[0])
    return (half, *(None for _ in truth[1:]))


# ---- costs, refusals -------------------------------------------------------------------------------------------------


def _traffic(inputs: Inputs, backward: bool) -> int:
    """Read: x and residual; written: q, the scales and h."""
    x = inputs["x"]
    h = 0
    if "residual" in inputs:
        residual = inputs["residual"]
        h = rows_size(x, inputs.get("residual_dtype") or (x.dtype if residual is None else residual.dtype))
    scales = 4 if "scale" in inputs else 4 * x.shape[:-1].numel()
    read = size(x, inputs.get("residual"), inputs["weight"], inputs.get("bias"))
    return read + x.numel() + scales + h


def _bad_calls(op: str, static: bool, add: bool) -> tuple[BadCall, ...]:
    calls = [
        *norm_bad_calls(op),
        BadCall(
            "quant_dtype bfloat16",
            set_to(quant_dtype=lambda a: BF16),
            rf"{op}: quant_dtype must be torch\.float8_e4m3fn or torch\.int8, got torch\.bfloat16",
        ),
        BadCall(
            "quant_dtype float8_e5m2",
            set_to(quant_dtype=lambda a: torch.float8_e5m2),
            rf"{op}: quant_dtype must be torch\.float8_e4m3fn or torch\.int8, got torch\.float8_e5m2",
        ),
    ]
    if static:
        calls += [
            BadCall("scale float64", set_to(scale=lambda a: a["scale"].double()), f"{op}: scale must be torch.float32"),
            BadCall("scale of two", set_to(scale=lambda a: a["scale"].expand(2)), f"{op}: scale must have one element"),
        ]
    return (*calls, *(stream_bad_calls(op) if add else ()))


# ---- the rows --------------------------------------------------------------------------------------------------------

_DIMS = (
    *rows(3, 1, 7, 64, 96, 127, 129, 760, 768, 1024),
    *rows(2, 3000, 5120, 8191, 9007, 16384, 24571, 32768, 65536),
    *rows(1, 4096, 262144),
    *rows(199, 64),
    *rows(17, 192),
    *rows(65537, 2),
    {"B": 2, "S": 5, "N": 96},
    {"B": 2, "S": 3, "H": 4, "N": 65},
)


def _spec(name: str, static: bool, add: bool, variants: tuple[dict[str, Any], ...]) -> OpSpec:
    tensors = ("x", *(("residual",) if add else ()), "weight", "bias")
    return OpSpec(
        name=name,
        family="norm",
        function=getattr(fastkern, name),
        reference=partial(_reference, add=add),
        baseline=partial(_chain, add=add, wide=False),
        yardstick=partial(_chain, add=add, wide=True),
        make=partial(_inputs, static, add),
        dims=_DIMS,
        variants=variants,
        differentiable=(),
        strided=tensors,
        batched=tensors[: 1 + add],
        decoded=decoded,
        slack=half_step,
        traffic=_traffic,
        flops=lambda inputs, backward: 6 * inputs["x"].numel(),
        bench_dims=(*rows(1, 4096), *rows(16384, 4096), *rows(8192, 8192)),
        bench_variant=variants[0],
        bad_calls=_bad_calls(name, static, add),
    )


_VARIANTS = (
    {"weight": "same"},
    {"weight": None, "bias": F32, "quant_dtype": I8},
    {"weight": F32, "weight_offset": 1.0, "heads": True},
)
_ADD_VARIANTS = (
    {"weight": "same"},
    {"residual": F32, "weight": BF16, "quant_dtype": I8},
    {"residual": None, "weight": F32, "bias": "same", "residual_dtype": F32},
)

SPECS = (
    _spec("rms_norm_dynamic_quant", static=False, add=False, variants=_VARIANTS),
    _spec("rms_norm_static_quant", static=True, add=False, variants=_VARIANTS),
    _spec("add_rms_norm_dynamic_quant", static=False, add=True, variants=_ADD_VARIANTS),
    _spec("add_rms_norm_static_quant", static=True, add=True, variants=_ADD_VARIANTS),
)
