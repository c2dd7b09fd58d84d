# SPDX-License-Identifier: Apache-2.0
"""Gated activations, the same with an 8-bit result, and the bias in front of an activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastkern
from fastkern.specs._peers import flag_gems_geglu, flag_gems_swiglu
from fastkern.specs._refusals import set_to
from fastkern.specs._spec import VALUES, BadCall, Inputs, OpSpec, Outputs
from fastkern.specs.norm import rows, size
from fastkern.specs.norm_quant import F8, I8, LARGEST, decoded, half_step, quantised

# ---- inputs ----------------------------------------------------------------------------------------------------------


def _random(sizes: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    return torch.randn(sizes, device=device, dtype=torch.float32).to(dtype)


def _inputs(
    *,
    N: int,
    dtype: torch.dtype,
    device: Any,
    packed: str | None = None,
    quant_dtype: torch.dtype | None = None,
    approximate: str | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    up_offset: float | None = None,
    **leading: int,
) -> Inputs:
    """An a and a b or, ``packed`` as "halves" or "pairs", both in one."""
    lead = tuple(leading.values())
    if packed is None:
        inputs: Inputs = {"a": _random((*lead, N), dtype, device), "b": _random((*lead, N), dtype, device)}
    else:
        inputs = {"a": _random((*lead, 2 * N), dtype, device)}
    if quant_dtype is not None:
        inputs.setdefault("b", None)
        inputs["scale"] = torch.tensor({F8: 0.005, I8: 0.02}[quant_dtype], device=device)
    options = {"approximate": approximate, "alpha": alpha, "limit": limit, "up_offset": up_offset}
    inputs |= {name: value for name, value in options.items() if value is not None}
    if packed == "pairs":
        inputs["interleaved"] = True
    if quant_dtype is not None:
        inputs["quant_dtype"] = quant_dtype
    return inputs


def _both(a: Tensor, b: Tensor | None, interleaved: bool) -> tuple[Tensor, ...]:
    if b is not None:
        return a, b
    return (a[..., 0::2], a[..., 1::2]) if interleaved else a.chunk(2, -1)


# ---- the same in torch -----------------------------------------------------------------------------------------------


def _clamped(a: Tensor, b: Tensor, alpha: float = 1.702, limit: float = 7.0, up_offset: float = 1.0) -> Tensor:
    g, u = a.clamp(max=limit), b.clamp(-limit, limit)
    return g * torch.sigmoid(alpha * g) * (u + up_offset)


_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda a, b: functional.silu(a) * b,
    "geglu": lambda a, b, approximate="none": functional.gelu(a, approximate=approximate) * b,
    "reglu": lambda a, b: functional.relu(a) * b,
    "glu": lambda a, b: a * torch.sigmoid(b),
    "clamped_swiglu": _clamped,
}


def _torch(op: str, a: Tensor, b: Tensor | None = None, interleaved: bool = False, **options: Any) -> Tensor:
    """The formula, in the dtype of the inputs."""
    return _FORMULAS[op](*_both(a, b, interleaved), **options)


def _float32(op: str, a: Tensor, b: Tensor | None = None, **options: Any) -> Tensor:
    """The formula in float32, rounded once."""
    return _torch(op, a.float(), None if b is None else b.float(), **options).to(a.dtype)


def _quant_reference(
    op: str, a: Tensor, b: Tensor | None, scale: Tensor, quant_dtype: torch.dtype = F8, **options: Any
) -> Tensor:
    """The numbers, not quantised but saturated."""
    largest = LARGEST[quant_dtype] * scale
    return _torch(op, a, b, **options).clamp(-largest, largest)


def _quant_torch(
    op: str, a: Tensor, b: Tensor | None, scale: Tensor, quant_dtype: torch.dtype = F8, *, wide: bool, **options: Any
) -> Tensor:
    """The operators of torch; ``wide``: with nothing rounded before it is quantised."""
    if wide:
        a, b = a.float(), None if b is None else b.float()
    return quantised(_torch(op, a, b, **options).float(), scale, quant_dtype)


# ---- peers -----------------------------------------------------------------------------------------------------------


def _liger_swiglu(a: Tensor, b: Tensor, **more: Any) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(a, b)


def _liger_geglu(a: Tensor, b: Tensor, **more: Any) -> Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(a, b)


# ---- costs, refusals -------------------------------------------------------------------------------------------------


def _traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: both inputs read, y written. Backward: they and dy read, both gradients written."""
    both = size(inputs["a"], inputs.get("b"))
    if "quant_dtype" in inputs:
        return both + both // (2 * inputs["a"].element_size())
    return 2 * both + both // 2 if backward else both + both // 2


def _flops(inputs: Inputs, backward: bool) -> int:
    return 12 * inputs["a"].numel()


def _bad_calls(op: str) -> tuple[BadCall, ...]:
    """What all of them refuse; the first variant has a ``b``."""
    floats = rf"{op}: (\w) must be torch\.float32, torch\.float16 or torch\.bfloat16, got "
    return (
        BadCall("a integer", set_to(a=lambda x: x["a"].long()), floats + r"torch\.int64"),
        BadCall("a float64", set_to(a=lambda x: x["a"].double()), floats + r"torch\.float64"),
        BadCall("a scalar", set_to(a=lambda x: x["a"].flatten()[0]), rf"{op}: a must have at least one dimension"),
        BadCall("b bool", set_to(b=lambda x: x["b"] > 0), floats + r"torch\.bool"),
        BadCall(
            "b of another dtype",
            set_to(b=lambda x: x["b"].to(torch.float16 if x["a"].dtype != torch.float16 else torch.float32)),
            rf"{op}: b must be torch\.\w+ like a, got torch\.\w+",
        ),
        BadCall("b too short", set_to(b=lambda x: x["b"][..., :-1]), rf"{op}: b must have shape \(.*\), got \(.*\)"),
        BadCall(
            "odd without b",
            set_to(a=lambda x: x["a"].new_ones(3, 7), b=lambda x: None),
            rf"{op}: a must have an even last dimension without b, got shape \(3, 7\)",
        ),
    )


def _interleaved_bad_calls(op: str) -> tuple[BadCall, ...]:
    return (
        BadCall("interleaved with b", set_to(interleaved=lambda x: True), rf"{op}: interleaved must be False with b"),
    )


def _limit_bad_calls(op: str) -> tuple[BadCall, ...]:
    return (
        BadCall("limit 0", set_to(limit=lambda x: 0.0), rf"{op}: limit must be above 0, got 0"),
        BadCall("limit NaN", set_to(limit=lambda x: float("nan")), rf"{op}: limit must be above 0, got -?nan"),
        BadCall("alpha infinite", set_to(alpha=lambda x: float("inf")), rf"{op}: alpha must be finite in float32, got"),
        BadCall("up_offset NaN", set_to(up_offset=lambda x: float("nan")), rf"{op}: up_offset must be finite in float"),
    )


def _approximate_bad_calls(op: str) -> tuple[BadCall, ...]:
    message = rf'{op}: approximate must be "none" or "tanh", got "erf"'
    return (BadCall("approximate erf", set_to(approximate=lambda x: "erf"), message),)


def _quant_bad_calls(op: str) -> tuple[BadCall, ...]:
    message = rf"{op}: quant_dtype must be torch\.float8_e4m3fn or torch\.int8, got torch\.bfloat16"
    return (
        BadCall("quant_dtype bfloat16", set_to(quant_dtype=lambda x: torch.bfloat16), message),
        BadCall("scale float64", set_to(scale=lambda x: x["scale"].double()), f"{op}: scale must be torch.float32"),
        BadCall("scale of two", set_to(scale=lambda x: x["scale"].expand(2)), f"{op}: scale must have one element"),
    )


# ---- gated -----------------------------------------------------------------------------------------------------------

_DIMS = (
    *rows(3, 2, 7, 17, 64, 129, 1000),
    *rows(2, 1, 8, 2049, 4104),
    *rows(65, 33),
    *rows(1, 9001, 65544),
    {"B": 2, "S": 3, "H": 2, "N": 65},
)
_FEW_DIMS = (*rows(3, 7, 64, 129), *rows(2, 1, 8, 1000, 4104), *rows(65, 33), {"B": 2, "S": 3, "H": 2, "N": 65})
_BENCH_DIMS = (*rows(1, 4096), *rows(64, 8192), *rows(4096, 4096), *rows(16384, 11008), *rows(8192, 14336))
_CPU_BENCH_DIMS = (*rows(256, 4096), *rows(1024, 16384))

_COMMON: dict[str, Any] = {
    "family": "activation",
    "make": _inputs,
    "strided": ("a", "b"),
    "batched": ("a", "b"),
    "traffic": _traffic,
    "flops": _flops,
    "bench_dims": _BENCH_DIMS,
    "cpu_bench_dims": _CPU_BENCH_DIMS,
}


def _spec(op: str, variants: tuple[dict[str, Any], ...], bad_calls: tuple[BadCall, ...], **more: Any) -> OpSpec:
    return OpSpec(
        name=op,
        function=getattr(fastkern, op),
        reference=partial(_torch, op),
        baseline=partial(_torch, op),
        yardstick=partial(_float32, op),
        differentiable=("a", "b"),
        variants=variants,
        bad_calls=(*_bad_calls(op), *bad_calls),
        **{"dims": _FEW_DIMS, **_COMMON, **more},
    )


def _quant_spec(op: str, variants: tuple[dict[str, Any], ...], bad_calls: tuple[BadCall, ...]) -> OpSpec:
    name = f"{op}_static_quant"
    function: Callable[..., Outputs] = getattr(fastkern, name)
    return OpSpec(
        name=name,
        function=function,
        reference=partial(_quant_reference, op),
        baseline=partial(_quant_torch, op, wide=False),
        yardstick=partial(_quant_torch, op, wide=True),
        differentiable=(),
        dims=_FEW_DIMS,
        variants=variants,
        bench_variant={"quant_dtype": F8},
        decoded=decoded,
        slack=half_step,
        bad_calls=(*_bad_calls(name), *_quant_bad_calls(name), *bad_calls),
        **_COMMON,
    )


SWIGLU = _spec(
    "swiglu",
    ({}, {"packed": "halves"}, {"packed": "pairs"}),
    _interleaved_bad_calls("swiglu"),
    dims=_DIMS,
    peers={"liger": _liger_swiglu, "flag_gems": flag_gems_swiglu},
)
GEGLU = _spec(
    "geglu",
    ({"approximate": "tanh"}, {"approximate": "none", "packed": "pairs"}),
    (*_interleaved_bad_calls("geglu"), *_approximate_bad_calls("geglu")),
    bench_variant={"approximate": "tanh"},
    peers={"liger": _liger_geglu, "flag_gems": flag_gems_geglu},
)
REGLU = _spec("reglu", ({},), _interleaved_bad_calls("reglu"), signed_zeros=False)
# Beyond 87 the sigmoid's slope is denormal in float32; the kernels of all types share a reciprocal that
# makes it 0.
GLU = _spec("glu", ({},), (), values={k: v for k, v in VALUES.items() if k != "mean 100"})
CLAMPED_SWIGLU = _spec(
    "clamped_swiglu",
    ({"limit": 1.0}, {"packed": "pairs", "alpha": 1.0, "limit": 2.0, "up_offset": 0.0}),
    (*_interleaved_bad_calls("clamped_swiglu"), *_limit_bad_calls("clamped_swiglu")),
)

# ---- bias and activation ---------------------------------------------------------------------------------------------


def _bias_inputs(
    *, N: int, dtype: torch.dtype, device: Any, bias: Any = "same", act: str = "gelu", **leading: int
) -> Inputs:
    inputs: Inputs = {"x": _random((*leading.values(), N), dtype, device), "bias": None, "act": act}
    if bias is not None:
        inputs["bias"] = _random((N,), dtype if bias == "same" else bias, device)
    return inputs


_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def _bias_torch(x: Tensor, bias: Tensor | None = None, act: str = "gelu") -> Tensor:
    return _ACTS[act](x if bias is None else x + bias.to(x.dtype))


def _bias_float32(x: Tensor, bias: Tensor | None = None, act: str = "gelu") -> Tensor:
    return _bias_torch(x.float(), None if bias is None else bias.float(), act).to(x.dtype)


def _bias_traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: x read, y written. Backward: dy and x read, dx written."""
    return size(inputs["x"]) * (3 if backward else 2) + size(inputs["bias"])


def column_sums_workspace(x: Tensor) -> int:
    """The sums of slices of rows: of at most 512 slices, or 6,144 blocks of columns, or of 32 rows each."""
    n = max(x.shape[-1], 1)
    m = x.numel() // n
    return 4 * n * min(m // 8 + 1, max(1024, 6144 * 256 // n))


BIAS_ACT = OpSpec(
    name="bias_act",
    family="activation",
    function=fastkern.bias_act,
    reference=_bias_torch,
    baseline=_bias_torch,
    yardstick=_bias_float32,
    make=_bias_inputs,
    dims=(
        *rows(3, 2, 7, 17, 64, 129, 1000),
        *rows(2, 1, 8, 2049, 4104),
        *rows(77, 33),
        *rows(1031, 72),
        *rows(1, 9001),
        {"B": 3, "S": 33, "H": 2, "N": 65},
    ),
    variants=(
        {"act": "gelu"},
        {"act": "gelu_tanh", "bias": torch.float32},
        {"act": "silu", "bias": None},
    ),
    differentiable=("x", "bias"),
    strided=("x", "bias"),
    batched=("x",),
    traffic=_bias_traffic,
    flops=lambda inputs, backward: 20 * inputs["x"].numel(),
    workspace=lambda inputs, backward: column_sums_workspace(inputs["x"]) if backward else 0,
    bench_dims=(*rows(1, 4096), *rows(4096, 4096), *rows(16384, 11008), *rows(8192, 14336)),
    cpu_bench_dims=(*rows(256, 4096), *rows(1024, 16384)),
    bench_variant={"act": "gelu_tanh"},
    signed_zeros=False,
    bad_calls=(
        BadCall("x integer", set_to(x=lambda a: a["x"].long()), r"bias_act: x must be .*, got torch\.int64"),
        BadCall("x scalar", set_to(x=lambda a: a["x"].flatten()[0]), "bias_act: x must have at least one dimension"),
        BadCall(
            "bias too short", set_to(bias=lambda a: a["bias"][:-1]), r"bias_act: bias must have shape \(\d+,\), got"
        ),
        BadCall("bias float64", set_to(bias=lambda a: a["bias"].double()), r"bias_act: bias must be .*torch\.float64"),
        BadCall("act tanh", set_to(act=lambda a: "tanh"), r'bias_act: act must be "gelu", .*, got "tanh"'),
    ),
)

SPECS = (
    SWIGLU,
    GEGLU,
    REGLU,
    GLU,
    CLAMPED_SWIGLU,
    _quant_spec(
        "swiglu",
        ({"quant_dtype": F8}, {"packed": "pairs", "quant_dtype": I8}),
        _interleaved_bad_calls("swiglu_static_quant"),
    ),
    _quant_spec(
        "geglu", ({"quant_dtype": I8}, {"packed": "halves", "quant_dtype": F8}),
        _approximate_bad_calls("geglu_static_quant"),
    ),
    _quant_spec(
        "clamped_swiglu", ({"quant_dtype": F8}, {"packed": "pairs", "quant_dtype": F8}),
        _limit_bad_calls("clamped_swiglu_static_quant"),
    ),
    BIAS_ACT,
)  # fmt: skip
