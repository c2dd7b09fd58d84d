# SPDX-License-Identifier: Apache-2.0
"""The residual add and the norm behind it, with one output and with two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastkern
from fastkern.ops import _philox
from fastkern.specs._refusals import branch_bad_calls, norm_bad_calls, out_dtype_bad_calls, stream_bad_calls
from fastkern.specs._spec import Inputs, OpSpec
from fastkern.specs.norm import (
    CPU_BENCH_DIMS,
    EPS,
    affine,
    affine_shape,
    affine_workspace,
    norm_reference,
    norm_torch,
    rows,
    rows_size,
    single_column,
    size,
)

# ---- inputs ----------------------------------------------------------------------------------------------------------


def add_inputs(
    *,
    N: int,
    dtype: torch.dtype,
    device: Any,
    residual: Any = "same",
    weight: Any = "same",
    bias: Any = None,
    weight2: Any = None,
    bias2: Any = None,
    heads: bool = False,
    weight_offset: float = 0.0,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Any = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    **leading: int,
) -> Inputs:
    """An x, residual, the dtype of h, and what is asked for besides; other arguments at their default are left out."""
    shape = affine_shape(N, heads, leading)
    centre = 1.0 - weight_offset
    inputs: Inputs = {
        "x": torch.randn(*leading.values(), N, device=device, dtype=torch.float32).to(dtype),
        "residual": affine(residual, (*leading.values(), N), dtype, device, spread=1.0),
        "weight": affine(weight, shape, dtype, device, centre),
        "eps": eps,
    }
    optional = {
        "bias": affine(bias, shape, dtype, device),
        "weight2": affine(weight2, shape, dtype, device, centre),
        "bias2": affine(bias2, shape, dtype, device),
        "weight_offset": weight_offset or None,
        "rowscale": affine(rowscale, tuple(leading.values()), dtype, device, 1.0),
        "residual_dtype": residual_dtype or (dtype if residual in (None, "same") else residual),  # for the reference
        "out_dtype": out_dtype,
    }
    inputs |= {name: value for name, value in optional.items() if value is not None}
    if dropout_p:
        drawn = torch.randint(2**63 - 1, (2,), device=device)
        inputs |= {"dropout_p": dropout_p, "seed": drawn[:1].clone(), "offset": drawn[1].clone()}
    return inputs


# ---- the same in torch -----------------------------------------------------------------------------------------------


def stream(
    x: Tensor,
    residual: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    rowscale: Tensor | None = None,
) -> Tensor:
    """The sum residual + dropout(x) * rowscale, each step in the dtypes given; the mask is that of the operator."""
    if dropout_p:
        assert seed is not None
        keep = _philox.keep_mask(x.shape, dropout_p, seed, offset)
        x = torch.where(keep, x * _philox.keep_scale(dropout_p), 0.0)
    if rowscale is not None:
        x = x * rowscale.unsqueeze(-1).to(x.dtype)
    return x if residual is None else residual + x


def as_rounded(h: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The value of h rounded to the dtype; the gradient goes past that."""
    if dtype is None:
        return h
    step = (h.to(dtype).to(h.dtype) - h).detach()
    return h + torch.where(torch.isfinite(step), step, 0.0)  # infinities stay: their difference would be NaN


def add_reference(
    kind: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The formula, in the dtype of x; y is made of h as it is rounded to ``residual_dtype``."""
    h = stream(x, residual, dropout_p, seed, offset, rowscale)
    return norm_reference(kind, as_rounded(h, residual_dtype), weight, eps, bias, weight_offset), h


def _torch_stream(
    x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype | None, *branch: Any
) -> tuple[Tensor, torch.dtype]:
    dtype = residual_dtype or (x.dtype if residual is None else residual.dtype)
    if dtype == torch.float32:
        x = x.float()  # else 16-bit steps of the branch would be all the accuracy there is
    return stream(x, residual, *branch).to(dtype), dtype


def add_torch(
    kind: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The chain of torch operators."""
    h, _ = _torch_stream(x, residual, residual_dtype, dropout_p, seed, offset, rowscale)
    return norm_torch(kind, h, weight, eps, bias, weight_offset, out_dtype or x.dtype), h


def _parallel(one: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Two outputs from the same stream, in terms of the function with one."""

    def two(
        kind: str,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None = None,
        weight2: Tensor | None = None,
        eps: float = 1e-6,
        bias: Tensor | None = None,
        bias2: Tensor | None = None,
        weight_offset: float = 0.0,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        offset: Tensor | None = None,
        rowscale: Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        branch = (dropout_p, seed, offset, rowscale, residual_dtype)
        y, h = one(kind, x, residual, weight, eps, bias, weight_offset, *branch, out_dtype)
        again = (0.0, None, None, None, residual_dtype)
        y2, _ = one(kind, h, None, weight2, eps, bias2, weight_offset, *again, out_dtype or x.dtype)
        return y, y2, h

    return two


# ---- costs -----------------------------------------------------------------------------------------------------------

_PARAMETERS = ("weight", "bias", "weight2", "bias2")


def add_traffic(outputs: int, inputs: Inputs, backward: bool) -> int:
    """Forward: x and residual read, h and the outputs written.

    Backward: each dy, dh, h read; dx and, where it is another tensor, dresidual written. Weights are read, gradients of
    weights and biases written.
    """
    x, residual = inputs["x"], inputs["residual"]
    h_dtype = inputs.get("residual_dtype") or (x.dtype if residual is None else residual.dtype)
    h = rows_size(x, h_dtype)
    total = h + outputs * rows_size(x, inputs.get("out_dtype")) + size(inputs.get("rowscale"))
    parameters = size(*(inputs.get(name) for name in _PARAMETERS))
    if not backward:
        return total + size(x, residual) + parameters
    total += h + size(x) + parameters + size(inputs["weight"], inputs.get("weight2"))
    apart = residual is not None and (
        bool(inputs.get("dropout_p")) or inputs.get("rowscale") is not None or residual.dtype != x.dtype
    )
    return total + (size(residual) if apart else 0)


def _workspace(inputs: Inputs, backward: bool) -> int:
    return affine_workspace(inputs["x"], sum(inputs.get(k) is not None for k in _PARAMETERS) if backward else 0)


# ---- peers -----------------------------------------------------------------------------------------------------------


def _liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, residual_dtype: torch.dtype) -> Any:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


def _quack_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, residual_dtype: torch.dtype) -> Any:
    from quack import rmsnorm

    return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)


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
_BENCH_DIMS = (
    *rows(1, 4096),
    *rows(64, 8192),
    *rows(32768, 1024),
    *rows(16384, 4096),
    *rows(8192, 8192),
    *rows(4096, 32768),
)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _spec(name: str, kind: str, parallel: bool, variants: tuple[dict[str, Any], ...], **more: Any) -> OpSpec:
    reference, baseline = (_parallel(f) if parallel else f for f in (add_reference, add_torch))
    parameters = _PARAMETERS[: 4 if parallel else 2]
    work = 14 if kind == "layer" else 10
    return OpSpec(
        name=name,
        family="norm",
        function=getattr(fastkern, name),
        reference=partial(reference, kind, eps=EPS[kind]),
        baseline=partial(baseline, kind, eps=EPS[kind]),
        make=partial(add_inputs, eps=EPS[kind]),
        dims=_DIMS,
        variants=variants,
        differentiable=("x", "residual", *parameters),
        strided=("x", "residual", *parameters, "rowscale"),
        batched=("x", "residual", "rowscale"),
        data=("x", "residual"),
        placed=lambda inputs: bool(inputs.get("dropout_p")),
        traffic=partial(add_traffic, 1 + parallel),
        flops=lambda inputs, backward: (2 * work if backward else work) * inputs["x"].numel(),
        bench_dims=_BENCH_DIMS,
        cpu_bench_dims=CPU_BENCH_DIMS,
        bench_variant=variants[0],
        bad_calls=(
            *norm_bad_calls(name),
            *stream_bad_calls(name),
            *branch_bad_calls(name),
            *out_dtype_bad_calls(name),
        ),
        workspace=_workspace,
        signed_zeros=False,
        vanishing=single_column if kind == "layer" else lambda inputs: False,
        **more,
    )


ADD_RMS_NORM = _spec(
    "add_rms_norm",
    "rms",
    False,
    (
        {"weight": "same"},
        {"residual": F32, "weight": F32, "eps": 1e-5},
        {"residual": None, "weight": None, "residual_dtype": F32},
        {"weight": BF16, "bias": F16, "dropout_p": 0.1, "out_dtype": F32},
        {"weight": "same", "weight_offset": 1.0, "heads": True, "rowscale": "same"},
        {"residual": F16, "weight": "same", "dropout_p": 0.5, "rowscale": F32, "residual_dtype": BF16},
    ),
    peers={"liger": _liger_add_rms_norm, "quack": _quack_add_rms_norm},
)
ADD_LAYER_NORM = _spec(
    "add_layer_norm",
    "layer",
    False,
    (
        {"weight": "same", "bias": "same"},
        {"residual": F32, "weight": F32, "bias": F32, "dropout_p": 0.1},
        {"residual": None, "weight": "same", "rowscale": F32},
        {"weight": BF16, "bias": F16, "heads": True, "weight_offset": 1.0, "residual_dtype": F32},
        {"residual": BF16, "weight": None, "bias": None, "dropout_p": 0.3, "rowscale": "same", "out_dtype": BF16},
    ),
)
ADD_RMS_NORM_PARALLEL = _spec(
    "add_rms_norm_parallel",
    "rms",
    True,
    (
        {"weight": "same", "weight2": "same"},
        {"residual": F32, "weight": F32, "weight2": BF16, "dropout_p": 0.1},
        {"residual": None, "weight": None, "weight2": "same", "bias2": F32, "rowscale": "same", "heads": True},
    ),
)
ADD_LAYER_NORM_PARALLEL = _spec(
    "add_layer_norm_parallel",
    "layer",
    True,
    (
        {"weight": "same", "bias": "same", "weight2": "same", "bias2": "same"},
        {"residual": F32, "weight": F16, "bias": None, "weight2": None, "bias2": F32, "dropout_p": 0.1,
         "out_dtype": F32},
    ),
)  # fmt: skip

SPECS = (ADD_RMS_NORM, ADD_LAYER_NORM, ADD_RMS_NORM_PARALLEL, ADD_LAYER_NORM_PARALLEL)
