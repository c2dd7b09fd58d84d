# SPDX-License-Identifier: Apache-2.0
"""rms_norm and layer_norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkern
from fastkern.specs._peers import apex_layer_norm, apex_rms_norm, flag_gems_rms_norm
from fastkern.specs._refusals import norm_bad_calls, out_dtype_bad_calls
from fastkern.specs._spec import Dims, Inputs, OpSpec

EPS = {"rms": 1e-6, "layer": 1e-5}


def rows(m: int, *lengths: int) -> tuple[Dims, ...]:
    """M = m rows of each of the lengths N."""
    return tuple({"M": m, "N": n} for n in lengths)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def affine(
    kind: Any, shape: tuple[int, ...], dtype: torch.dtype, device: Any, centre: float = 0.0, spread: float = 0.3
) -> Tensor | None:
    """A weight or bias: ``kind`` is None, "same" (the dtype of x) or a dtype."""
    if kind is None:
        return None
    return (centre + spread * torch.randn(shape, device=device)).to(dtype if kind == "same" else kind)


def affine_shape(N: int, heads: bool, leading: dict[str, int]) -> tuple[int, ...]:
    """(H, N) where that is asked for and there are heads."""
    return (leading["H"], N) if heads and "H" in leading else (N,)


def norm_inputs(
    *,
    N: int,
    dtype: torch.dtype,
    device: Any,
    weight: Any = "same",
    bias: Any = None,
    heads: bool = False,
    weight_offset: float = 0.0,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    **leading: int,
) -> Inputs:
    """An x and what is asked for besides; what equals its default and nobody asked for is left out."""
    x = torch.randn(*leading.values(), N, device=device, dtype=torch.float32).to(dtype)
    shape = affine_shape(N, heads, leading)
    inputs: Inputs = {"x": x, "weight": affine(weight, shape, dtype, device, 1.0 - weight_offset), "eps": eps}
    if bias is not None:
        inputs["bias"] = affine(bias, shape, dtype, device)
    if weight_offset:
        inputs["weight_offset"] = weight_offset
    if out_dtype is not None:
        inputs["out_dtype"] = out_dtype
    return inputs


# ---- the same in torch -----------------------------------------------------------------------------------------------


def norm_reference(
    kind: str,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula, in the dtype of x."""
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * (weight + weight_offset)
    return y if bias is None else y + bias


def norm_torch(
    kind: str,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch.nn.functional, in the wider of the dtypes of x and of the result, with what it lacks around it."""
    dtype = x.dtype if out_dtype is None else out_dtype
    x = x.to(torch.promote_types(x.dtype, dtype))
    weight = None if weight is None else ((weight.float() + weight_offset) if weight_offset else weight).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    shape = x.shape[-1:]
    fused = all(t is None or t.dim() == 1 for t in (weight, bias))
    if kind == "layer":
        fused = fused and weight is not None  # torch has no second derivative of a bias without a weight
        y = F.layer_norm(x, shape, weight if fused else None, bias if fused else None, eps)
    else:
        y = F.rms_norm(x, shape, weight if fused else None, eps)
    if weight is not None and not fused:
        y = y * weight
    if bias is not None and (kind == "rms" or not fused):
        y = y + bias
    return y.to(dtype)


# ---- costs -----------------------------------------------------------------------------------------------------------


def size(*tensors: Tensor | None) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def rows_size(x: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of a result of the shape of x."""
    return x.numel() * (x.dtype if dtype is None else dtype).itemsize


def norm_traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: x, weight, bias read, y written. Backward: dy, x, weight read; dx, dweight, dbias written."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
    y = rows_size(x, inputs.get("out_dtype"))
    if not backward:
        return size(x, weight, bias) + y
    return y + 2 * size(x) + 2 * size(weight) + size(bias)


def affine_workspace(x: Tensor, parameters: int) -> int:
    """Partial gradients of so many weights and biases in float32, at most one row for each row of x."""
    count, sums = x.shape[:-1].numel(), {0: 0, 1: 2, 2: 4}.get(parameters, 4)  # kernels keep 1, 2 or 4 sums
    return 4 * sums * (-(-count // 4) * 4 + x.shape[-1] * min(count, 16896)) + 64


def norm_workspace(inputs: Inputs, backward: bool) -> int:
    """What the gradients of weight and bias are summed up in."""
    return affine_workspace(inputs["x"], sum(inputs.get(k) is not None for k in ("weight", "bias")) if backward else 0)


def single_column(inputs: Inputs) -> bool:
    """Rows of one element, which a layer norm makes 0 whatever it is."""
    return inputs["x"].shape[-1] == 1


# ---- peers -----------------------------------------------------------------------------------------------------------


def _liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _quack_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from quack import rmsnorm

    return rmsnorm(x, weight, eps=eps)


def _liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, eps)


# ---- the rows --------------------------------------------------------------------------------------------------------

_DIMS = (
    *rows(3, 1, 2, 7, 8, 9, 31, 64, 65, 96, 127, 128, 129, 192, 256, 257, 384, 760, 768, 1000, 1023, 1024, 1025),
    *rows(2, 2047, 3000, 4096, 4099, 5120, 8191, 8192, 8193, 9007, 12288, 12296, 16384, 16392),
    *rows(2, 24571, 32768, 32776, 65536, 65544),
    *rows(1, 4096, 131072, 262144, 1048576),
    *(dims for m in (1, 16, 17, 199, 1031) for dims in rows(m, 64)),
    *rows(131, 1536),
    *(dims for m in (65535, 65536, 65537) for dims in rows(m, 3)),
    {"B": 2, "S": 5, "N": 96},
    {"B": 3, "S": 5, "H": 2, "N": 64},
    {"B": 2, "S": 3, "H": 4, "N": 129},
)
_BENCH_DIMS = (
    *rows(1, 4096),
    *rows(64, 8192),
    *rows(131072, 128),
    *rows(1048576, 128),
    *rows(32768, 1024),
    *rows(16384, 4096),
    *rows(8192, 8192),
    *rows(4096, 32768),
    *rows(512, 262144),
)
CPU_BENCH_DIMS = (*rows(1024, 1024), *rows(4096, 1024), *rows(2048, 4096))

RMS_NORM = OpSpec(
    name="rms_norm",
    family="norm",
    function=fastkern.rms_norm,
    reference=partial(norm_reference, "rms"),
    baseline=partial(norm_torch, "rms"),
    make=norm_inputs,
    dims=_DIMS,
    variants=(
        {"weight": "same"},
        {"weight": None},
        {"weight": torch.float32, "eps": 1e-5},
        {"weight": torch.bfloat16, "eps": 0.0},
        {"weight": "same", "weight_offset": 1.0, "heads": True},
        {"weight": torch.float16, "bias": torch.float32, "out_dtype": torch.float32},
        {"weight": None, "bias": "same", "out_dtype": torch.bfloat16},
    ),
    differentiable=("x", "weight", "bias"),
    strided=("x", "weight", "bias"),
    batched=("x",),
    traffic=norm_traffic,
    flops=lambda inputs, backward: (9 if backward else 4) * inputs["x"].numel(),
    bench_dims=_BENCH_DIMS,
    cpu_bench_dims=CPU_BENCH_DIMS,
    bench_variant={"weight": "same"},
    peers={
        "liger": _liger_rms_norm,
        "quack": _quack_rms_norm,
        "flag_gems": flag_gems_rms_norm,
        "apex": apex_rms_norm,
    },
    bad_calls=(*norm_bad_calls("rms_norm"), *out_dtype_bad_calls("rms_norm")),
    workspace=norm_workspace,
)

LAYER_NORM = OpSpec(
    name="layer_norm",
    family="norm",
    function=fastkern.layer_norm,
    reference=partial(norm_reference, "layer", eps=EPS["layer"]),
    baseline=partial(norm_torch, "layer", eps=EPS["layer"]),
    make=partial(norm_inputs, eps=EPS["layer"]),
    dims=_DIMS,
    variants=(
        {"weight": "same", "bias": "same"},
        {"weight": None},
        {"weight": torch.float32, "bias": torch.float32, "eps": 1e-6},
        {"weight": torch.bfloat16, "bias": None},
        {"weight": "same", "bias": torch.float32, "weight_offset": 1.0, "heads": True},
        {"weight": torch.float16, "bias": torch.bfloat16, "out_dtype": torch.float32},
        {"weight": None, "bias": "same", "out_dtype": torch.bfloat16},
    ),
    differentiable=("x", "weight", "bias"),
    strided=("x", "weight", "bias"),
    batched=("x",),
    traffic=norm_traffic,
    flops=lambda inputs, backward: (12 if backward else 7) * inputs["x"].numel(),
    bench_dims=_BENCH_DIMS,
    cpu_bench_dims=CPU_BENCH_DIMS,
    bench_variant={"weight": "same", "bias": "same"},
    signed_zeros=False,  # a difference from the mean has its own
    vanishing=single_column,
    peers={"liger": _liger_layer_norm, "apex": apex_layer_norm},
    bad_calls=(*norm_bad_calls("layer_norm"), *out_dtype_bad_calls("layer_norm")),
    workspace=norm_workspace,
)

SPECS = (RMS_NORM, LAYER_NORM)
