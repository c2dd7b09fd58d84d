# SPDX-License-Identifier: Apache-2.0
"""group_norm."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkern
from fastkern.specs._refusals import set_to
from fastkern.specs._spec import BadCall, Inputs, OpSpec

# ---- inputs ----------------------------------------------------------------------------------------------------------


def _affine(kind: Any, channels: int, dtype: torch.dtype, device: Any, centre: float) -> Tensor | None:
    """A weight or bias: ``kind`` is None, "same" (the dtype of x) or a dtype."""
    if kind is None:
        return None
    return (centre + 0.3 * torch.randn(channels, device=device)).to(dtype if kind == "same" else kind)


def group_norm_inputs(
    *,
    B: int,
    C: int,
    dtype: torch.dtype,
    device: Any,
    groups: int = 4,
    weight: Any = "same",
    bias: Any = "same",
    eps: float = 1e-5,
    activation: str = "none",
    channels_last: bool = False,
    **positions: int,
) -> Inputs:
    """As many groups as asked for or, where they do not divide the channels, as their common divisor."""
    x = torch.randn(B, C, *positions.values(), device=device, dtype=torch.float32).to(dtype)
    if channels_last and x.dim() > 2:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return {
        "x": x,
        "num_groups": math.gcd(C, groups),
        "weight": _affine(weight, C, dtype, device, 1.0),
        "bias": _affine(bias, C, dtype, device, 0.0),
        "eps": eps,
        "activation": activation,
    }


def keep_channels_last(t: Tensor) -> Tensor:
    """A dense copy in the layout that decides the order of sums."""
    if t.dim() > 2 and not t.is_contiguous() and t.movedim(1, -1).is_contiguous():
        return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    return t.clone(memory_format=torch.contiguous_format)


# ---- the same in torch -----------------------------------------------------------------------------------------------


def _group_norm_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    rows = x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups * x.shape[2:].numel())
    centred = rows - rows.mean(-1, keepdim=True)
    z = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
    shape = (-1, *[1] * (x.dim() - 2))
    z = z if weight is None else z * weight.reshape(shape)
    z = z if bias is None else z + bias.reshape(shape)
    return F.silu(z) if activation == "silu" else z


def _group_norm_torch(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """What torch.nn.functional.group_norm calls, which itself refuses groups of one element."""
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if x.numel() == 0:  # torch refuses some of these
        return _group_norm_reference(x, num_groups, weight, bias, eps, activation)
    alone = None if weight is None else bias  # torch has no second derivative of a bias without a weight
    z = torch.group_norm(x, num_groups, weight, alone, eps)
    z = z if bias is alone or bias is None else z + bias.reshape(-1, *[1] * (x.dim() - 2))
    return F.silu(z) if activation == "silu" else z


# ---- costs -----------------------------------------------------------------------------------------------------------


def _size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: x, weight, bias read, y written. Backward: dy, x, weight, bias read; dx, dweight, dbias written."""
    x, affine = inputs["x"], _size(inputs["weight"], inputs["bias"])
    return (3 * _size(x) + 2 * affine) if backward else 2 * _size(x) + affine


def _flops(inputs: Inputs, backward: bool) -> int:
    silu = inputs["activation"] == "silu"
    return ((24 if silu else 13) if backward else (11 if silu else 7)) * inputs["x"].numel()


def _workspace(inputs: Inputs, backward: bool) -> int:
    """Pairs of float32 for moments and sums of parts, of channels and of groups.

    Parts are chunks of a group or, channels-last, stretches of a channel; backward also the 512 bytes of a warp.
    """
    x = inputs["x"]
    if x.numel() == 0:
        return 0
    samples, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
    groups = samples * inputs["num_groups"]
    last = x.dim() > 2 and not x.is_contiguous()
    parts = -(-positions // 192) if last else -(-x.numel() // groups // 16384)
    forward = samples * channels * parts + groups if last else groups * parts
    if not backward:
        return 8 * forward
    sums = samples * channels * max(-(-positions // 128), 1)
    copied = _size(x) if last else 0  # of a dy in another layout
    return 8 * (max(forward, sums) + samples * channels + 3 * groups) + copied


def _single_element(inputs: Inputs) -> bool:
    """Groups of one element, which are made 0 whatever it is."""
    x = inputs["x"]
    return x.numel() == x.shape[0] * inputs["num_groups"]


# ---- what is refused -------------------------------------------------------------------------------------------------

_FLOATS = r"group_norm: (\w+) must be torch\.float32, torch\.float16 or torch\.bfloat16, got "
_GROUPS = r"group_norm: num_groups must be at least 1 and divide the \d+ channels of x, got "
_EPS = r"group_norm: eps must be finite and >= 0, got "
_ACTIVATION = r'group_norm: activation must be "none" or "silu", got '

_BAD_CALLS = (
    BadCall("x integer", set_to(x=lambda a: a["x"].long()), _FLOATS + r"torch\.int64"),
    BadCall("x float64", set_to(x=lambda a: a["x"].double()), _FLOATS + r"torch\.float64"),
    BadCall("x complex", set_to(x=lambda a: a["x"].float() + 0j), _FLOATS + r"torch\.complex64"),
    BadCall("x scalar", set_to(x=lambda a: a["x"].flatten()[0]), r"group_norm: x must have at least two dimensions"),
    BadCall(
        "x one-dimensional",
        set_to(x=lambda a: a["x"].flatten()),
        r"x must have at least two dimensions, got shape \(\d+,\)",
    ),
    BadCall("num_groups zero", set_to(num_groups=lambda a: 0), _GROUPS + "0"),
    BadCall("num_groups negative", set_to(num_groups=lambda a: -4), _GROUPS + "-4"),
    BadCall("num_groups no divisor", set_to(num_groups=lambda a: a["x"].shape[1] - 1), _GROUPS + r"\d+"),
    BadCall("num_groups too many", set_to(num_groups=lambda a: 2 * a["x"].shape[1]), _GROUPS + r"\d+"),
    BadCall(
        "weight too long",
        set_to(weight=lambda a: a["weight"].new_ones(a["x"].shape[1] + 1)),
        r"group_norm: weight must have shape \(\d+,\), got \(\d+,\)",
    ),
    BadCall(
        "weight two-dimensional",
        set_to(weight=lambda a: a["weight"].new_ones(a["x"].shape[1], 1)),
        r"group_norm: weight must have shape \(\d+,\), got \(\d+, 1\)",
    ),
    BadCall("weight integer", set_to(weight=lambda a: a["weight"].int()), _FLOATS + r"torch\.int32"),
    BadCall("bias scalar", set_to(bias=lambda a: a["bias"][0]), r"group_norm: bias must have shape \(\d+,\), got \(\)"),
    BadCall("bias bool", set_to(bias=lambda a: a["bias"].bool()), _FLOATS + r"torch\.bool"),
    BadCall("eps negative", set_to(eps=lambda a: -1e-5), _EPS + "-1e-05"),
    BadCall("eps NaN", set_to(eps=lambda a: float("nan")), _EPS + "-?nan"),
    BadCall("eps infinite", set_to(eps=lambda a: float("inf")), _EPS + "inf"),
    BadCall("activation unknown", set_to(activation=lambda a: "gelu"), _ACTIVATION + '"gelu"'),
    BadCall("activation empty", set_to(activation=lambda a: ""), _ACTIVATION + '""'),
)

# ---- the row ---------------------------------------------------------------------------------------------------------


def _positions(batch: int, channels: int, *positions: int) -> dict[str, int]:
    names = {0: (), 1: ("S",), 2: ("H", "W"), 3: ("D", "H", "W")}[len(positions)]
    return {"B": batch, "C": channels, **dict(zip(names, positions, strict=True))}


GROUP_NORM = OpSpec(
    name="group_norm",
    family="group_norm",
    function=fastkern.group_norm,
    reference=_group_norm_reference,
    baseline=_group_norm_torch,
    make=group_norm_inputs,
    dims=(
        # Channels that all variants cut into the same number of groups, for one compiled graph.
        *(_positions(2, c, s) for c, s in ((32, 49), (64, 61), (96, 5), (32, 1024), (64, 31), (128, 257))),
        *(_positions(b, 32, 8) for b in (1, 17, 199)),
        # Other channels.
        *({"B": 3, "C": c, "L": s} for c, s in ((4, 3), (20, 7), (28, 50), (4, 4099), (8, 8200), (128, 2))),
        *(_positions(3, c) for c in (4, 7, 10, 32, 96, 257, 1024, 4096)),
        *(_positions(2, c, h, w) for c, h, w in ((8, 5, 7), (35, 7, 7), (64, 8, 8), (320, 16, 16), (128, 28, 28))),
        *(_positions(1, c, h, w) for c, h, w in ((32, 64, 64), (6, 129, 127), (4, 256, 260), (2056, 3, 3))),
        *(_positions(2, c, d, h, w) for c, d, h, w in ((12, 3, 5, 4), (32, 4, 8, 8), (5, 2, 3, 2))),
    ),
    variants=(
        {"groups": 4},
        {"groups": 4, "activation": "silu"},
        {"groups": 32, "weight": torch.float32, "bias": torch.float32, "activation": "silu"},
        {"groups": 1, "weight": None, "bias": None},
        {"groups": 32, "weight": torch.bfloat16, "bias": None, "eps": 1e-3},
        {"groups": 7, "weight": None, "bias": torch.float16, "activation": "silu"},
    ),
    differentiable=("x", "weight", "bias"),
    strided=("x", "weight", "bias"),
    batched=("x",),
    traffic=_traffic,
    flops=_flops,
    bench_dims=(
        _positions(2, 320, 64, 64),
        _positions(2, 640, 32, 32),
        _positions(2, 1280, 16, 16),
        _positions(8, 512, 64, 64),
        _positions(4, 256, 128, 128),
        _positions(1, 128, 512, 512),
        _positions(16, 512, 64, 64),
        _positions(64, 256, 56, 56),
    ),
    bench_variant={"groups": 32, "activation": "silu"},
    bad_calls=_BAD_CALLS,
    empty_dims=("B", "C", "S", "L", "D", "H", "W"),
    workspace=_workspace,
    signed_zeros=False,  # a difference from the mean has its own
    vanishing=_single_element,
    dense=keep_channels_last,
)

SPECS = (GROUP_NORM,)
