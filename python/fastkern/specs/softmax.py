# SPDX-License-Identifier: Apache-2.0
"""softmax, log_softmax, logsumexp, masked_softmax and causal_softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastkern
from fastkern.specs._refusals import set_to
from fastkern.specs._spec import VALUES, BadCall, Dims, Inputs, OpSpec
from fastkern.specs.norm import rows

# ---- inputs ----------------------------------------------------------------------------------------------------------


def _x(dtype: torch.dtype, device: Any, sizes: tuple[int, ...]) -> Tensor:
    return (2 * torch.randn(sizes, device=device, dtype=torch.float32)).to(dtype)


def _inputs(
    *,
    N: int,
    dtype: torch.dtype,
    device: Any,
    behind: int | None = None,
    out: torch.dtype | None = None,
    keepdim: bool = False,
    **leading: int,
) -> Inputs:
    """An x with its N columns last or, with something ``behind`` them, second to last."""
    sizes = (*leading.values(), N)
    inputs: Inputs = {"x": _x(dtype, device, sizes if behind is None else (*sizes, behind))}
    if behind is not None:
        inputs["dim"] = -2
    if out is not None:
        inputs["dtype"] = out
    if keepdim:
        inputs["keepdim"] = True
    return inputs


def _masked_inputs(
    *, N: int, dtype: torch.dtype, device: Any, mask: Any = None, over: str = "MBHS", scale: float = 1.0, **leading: int
) -> Inputs:
    """A mask over those leading dimensions that ``over`` names, the first one at least, 1 for the others.

    Every row keeps something; the last row of all is masked as a whole.
    """
    inputs: Inputs = {"x": _x(dtype, device, (*leading.values(), N))}
    if mask is not None:
        sizes = tuple(n if key in over else 1 for key, n in leading.items())
        keep = torch.rand(*sizes, N, device=device) < 0.7
        if keep.numel():
            keep[..., 0] = True
            keep.view(-1, N)[-1] = keep.shape[:-1].numel() < 2
        bias = torch.randn(*sizes, N, device=device)
        kind = dtype if mask == "same" else mask
        inputs["mask"] = keep if kind == torch.bool else bias.masked_fill(~keep, float("-inf")).to(kind)
    if scale != 1.0:
        inputs["scale"] = scale
    return inputs


def _causal_inputs(*, N: int, dtype: torch.dtype, device: Any, scale: float = 1.0, **leading: int) -> Inputs:
    return {"x": _x(dtype, device, (*leading.values(), N)), "scale": scale}


# ---- the same in torch -----------------------------------------------------------------------------------------------


def _masked_reference(x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    z = x * scale
    if mask is not None:
        z = z.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else z + mask
    hidden = (z == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(z.masked_fill(hidden, 0.0), -1).masked_fill(hidden, 0.0)


def _masked_torch(x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The formula in the dtype of x, as models write it: its gradient is made of the rounded result, as ours."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(x.dtype)
    return _masked_reference(x, mask, scale)


def _masked_float32(x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The formula in float32, rounded once."""
    return _masked_reference(x.float(), mask, scale).to(x.dtype)


def _seen(x: Tensor) -> Tensor:
    queries, n = x.shape[-2:]
    return torch.ones(queries, n, dtype=torch.bool, device=x.device).tril(n - queries)


def _causal_reference(x: Tensor, scale: float = 1.0) -> Tensor:
    return _masked_reference(x, _seen(x), scale)


def _causal_torch(x: Tensor, scale: float = 1.0) -> Tensor:
    return _masked_torch(x, _seen(x), scale)


def _causal_float32(x: Tensor, scale: float = 1.0) -> Tensor:
    return _masked_float32(x, _seen(x), scale)


def _softmax_reference(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    return torch.softmax(x, dim)


def _log_softmax_reference(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    return torch.log_softmax(x, dim)


def _softmax_torch(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    return torch.softmax(x, dim, dtype)


def _log_softmax_torch(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    return torch.log_softmax(x, dim, dtype)


def _logsumexp_torch(x: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    return torch.logsumexp(x, dim, bool(keepdim))


# ---- costs -----------------------------------------------------------------------------------------------------------


def _size(t: Tensor | None) -> int:
    return 0 if t is None else t.numel() * t.element_size()


def _width(inputs: Inputs) -> int:
    dtype = inputs.get("dtype") or inputs["x"].dtype
    return int(dtype.itemsize)


def _traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: x read, y written. Backward: dy and y read, dx written."""
    x, width = inputs["x"], _width(inputs)
    mask = 0 if backward else _size(inputs.get("mask"))
    return x.numel() * ((2 * width if backward else width) + x.element_size()) + mask


def _logsumexp_traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: x read. Backward: x read, dx written."""
    return _size(inputs["x"]) * (2 if backward else 1)


def _flops(inputs: Inputs, backward: bool) -> int:
    return 5 * inputs["x"].numel()


def _workspace(inputs: Inputs, backward: bool) -> int:
    """Two numbers for each segment of a row that no cluster holds, and two for the row."""
    x = inputs["x"]
    n = x.shape[inputs.get("dim", -1)]
    return 16 * (x.numel() // max(n, 1)) * (n // 4096 + 2)


# ---- peers -----------------------------------------------------------------------------------------------------------


def _liger_softmax(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    return LigerSoftmaxFunction.apply(x)


def _quack_softmax(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    from quack import softmax

    return softmax(x)


# ---- what is refused -------------------------------------------------------------------------------------------------


def _common_bad_calls(op: str) -> tuple[BadCall, ...]:
    floats = rf"{op}: x must be torch\.float32, torch\.float16 or torch\.bfloat16, got "
    return (
        BadCall("x integer", set_to(x=lambda a: a["x"].long()), floats + r"torch\.int64"),
        BadCall("x bool", set_to(x=lambda a: a["x"] > 0), floats + r"torch\.bool"),
        BadCall("x complex", set_to(x=lambda a: a["x"].float() + 0j), floats + r"torch\.complex64"),
        BadCall("x scalar", set_to(x=lambda a: a["x"].flatten()[0]), rf"{op}: x must have at least one dimension"),
    )


def _wide_bad_call(op: str) -> BadCall:
    """Not on the CPU either."""
    floats = rf"{op}: x must be torch\.float32, torch\.float16 or torch\.bfloat16, got torch\.float64"
    return BadCall("x float64", set_to(x=lambda a: a["x"].double()), floats)


def _dim_bad_calls(op: str) -> tuple[BadCall, ...]:
    return (
        BadCall("dim too large", set_to(dim=lambda a: 7), rf"{op}: dim must be between -\d and \d, got 7"),
        BadCall("dim too small", set_to(dim=lambda a: -7), rf"{op}: dim must be between -\d and \d, got -7"),
    )


def _dtype_bad_calls(op: str) -> tuple[BadCall, ...]:
    message = rf"{op}: dtype must be torch\.float32, torch\.float16 or torch\.bfloat16, got "
    return (BadCall("dtype int8", set_to(dtype=lambda a: torch.int8), message + r"torch\.int8"),)


def _scale_bad_calls(op: str) -> tuple[BadCall, ...]:
    number = rf"{op}: scale must be finite in float32, got "
    return (
        BadCall("scale infinite", set_to(scale=lambda a: float("inf")), number + "inf"),
        BadCall("scale NaN", set_to(scale=lambda a: float("nan")), number + "-?nan"),
        BadCall("scale too large", set_to(scale=lambda a: 1e39), number + r"1e\+39"),
    )


_MASK_BAD_CALLS = (
    BadCall(
        "mask too short",
        set_to(mask=lambda a: a["x"][..., :-1] > 0),
        r"masked_softmax: mask must broadcast to the shape of x, \(.*\), got \(.*\)",
    ),
    BadCall(
        "mask of more dimensions",
        set_to(mask=lambda a: (a["x"] > 0)[None]),
        r"masked_softmax: mask must broadcast to the shape of x, \(.*\), got \(1, .*\)",
    ),
    BadCall(
        "mask integer",
        set_to(mask=lambda a: a["x"].int()),
        r"masked_softmax: mask must be torch\.bool, torch\.float32, .* or torch\.bfloat16, got torch\.int32",
    ),
    BadCall(
        "mask requires grad",
        set_to(mask=lambda a: a["x"].detach().clone().requires_grad_()),
        r"masked_softmax: mask must not require grad",
    ),
)

# ---- the rows --------------------------------------------------------------------------------------------------------

# Of what is a hundred times as far apart, all but one result of a row is denormal, or 0: here it is 0.
_VALUES = {name: change for name, change in VALUES.items() if name != "times 100"} | {"times 10": lambda t: 10 * t}

_DIMS = (
    *rows(3, 1, 2, 7, 8, 16, 17, 33, 64, 65, 77, 129, 255, 257, 513, 1000, 1023, 1025),
    *rows(2, 2047, 4096, 4097, 8191, 8192, 8193, 9001, 12288, 16392),
    *rows(2, 24584, 32000, 49160, 50257),
    *rows(1, 65544, 128256, 151936, 262144, 393224, 800003),
    *(dims for m in (1, 77, 289) for dims in rows(m, 77)),
    *rows(8192, 3),
    {"B": 2, "S": 5, "N": 96},
    {"B": 3, "S": 33, "N": 77},
    {"B": 3, "S": 5, "H": 2, "N": 64},
    {"B": 2, "S": 3, "H": 4, "N": 129},
)
_MASKED_DIMS = (
    *rows(3, 1, 2, 8, 17, 65, 257, 1000, 1025),
    *rows(2, 4096, 8192, 8200, 32771),
    *rows(1, 65544, 262144, 800003),
    {"B": 2, "H": 3, "S": 5, "N": 7},
    {"B": 2, "H": 3, "S": 17, "N": 64},
    {"B": 3, "H": 2, "S": 9, "N": 129},
    {"B": 1, "H": 2, "S": 65, "N": 1024},
)
_CAUSAL_DIMS = (
    *({"B": b, "S": s, "N": n} for b, s, n in ((3, 2, 5), (2, 7, 16), (3, 5, 33), (2, 9, 257), (3, 17, 8))),
    *({"B": b, "S": s, "N": n} for b, s, n in ((3, 100, 77), (2, 64, 64), (2, 5, 4097), (2, 3, 8192), (2, 3, 9001))),
    *({"B": b, "S": s, "N": n} for b, s, n in ((1, 3, 65544), (1, 2, 262144), (1, 2, 800003), (2, 129, 128))),
    {"B": 2, "H": 3, "S": 5, "N": 7},
    {"B": 3, "H": 2, "S": 9, "N": 129},
)
_BENCH_DIMS: tuple[Dims, ...] = (
    *rows(1, 4096),
    *rows(64, 8192),
    *rows(4, 102400),
    *rows(32768, 1024),
    *rows(16384, 4096),
    *rows(8192, 8192),
    *rows(4096, 32768),
    *rows(2048, 128256),
    *rows(512, 262144),
)
_CPU_BENCH_DIMS: tuple[Dims, ...] = (*rows(1024, 1024), *rows(2048, 4096), *rows(4096, 32000))

_VARIANTS: tuple[dict[str, Any], ...] = ({}, {"out": torch.float32}, {"out": torch.bfloat16}, {"behind": 5})


def _allowance(inputs: Inputs, stressed: bool) -> float:
    """Of a dy of one sign, or where y is nearly 1, a rounding of dy's mean under y is many of the difference to it."""
    return 1.2e-5 if stressed and inputs["x"].dtype == torch.float32 else 0.0


_COMMON: dict[str, Any] = {
    "family": "softmax",
    "differentiable": ("x",),
    "flops": _flops,
    "workspace": _workspace,
    "values": _VALUES,
}
_ANY_DIMENSION: dict[str, Any] = {
    "make": _inputs,
    "dims": _DIMS,
    "strided": ("x",),
    "batched": ("x",),
    "bench_dims": _BENCH_DIMS,
    "cpu_bench_dims": _CPU_BENCH_DIMS,
}

SOFTMAX = OpSpec(
    name="softmax",
    allowance=_allowance,
    function=fastkern.softmax,
    reference=_softmax_reference,
    baseline=_softmax_torch,
    variants=_VARIANTS,
    traffic=_traffic,
    peers={"liger": _liger_softmax, "quack": _quack_softmax},
    bad_calls=(*_common_bad_calls("softmax"), *_dim_bad_calls("softmax"), *_dtype_bad_calls("softmax")),
    **_COMMON,
    **_ANY_DIMENSION,
)

LOG_SOFTMAX = OpSpec(
    name="log_softmax",
    function=fastkern.log_softmax,
    reference=_log_softmax_reference,
    baseline=_log_softmax_torch,
    variants=_VARIANTS,
    traffic=_traffic,
    bad_calls=(*_common_bad_calls("log_softmax"), *_dim_bad_calls("log_softmax"), *_dtype_bad_calls("log_softmax")),
    **_COMMON,
    **_ANY_DIMENSION,
)

LOGSUMEXP = OpSpec(
    name="logsumexp",
    function=fastkern.logsumexp,
    reference=_logsumexp_torch,
    baseline=_logsumexp_torch,
    variants=({}, {"keepdim": True}, {"behind": 5}),
    traffic=_logsumexp_traffic,
    bad_calls=(*_common_bad_calls("logsumexp"), *_dim_bad_calls("logsumexp")),
    # Backward takes the exponential of a difference from the result, which is a rounding of a number around 10 off.
    allowance=lambda inputs, stressed: 1e-6,
    **_COMMON,
    **_ANY_DIMENSION,
)

MASKED_SOFTMAX = OpSpec(
    name="masked_softmax",
    allowance=_allowance,
    function=fastkern.masked_softmax,
    reference=_masked_reference,
    baseline=_masked_torch,
    yardstick=_masked_float32,
    make=_masked_inputs,
    dims=_MASKED_DIMS,
    variants=(
        {"mask": torch.bool},
        {"mask": None, "scale": 0.125},
        {"mask": "same", "over": "MBS"},
        {"mask": torch.float32, "over": "H", "scale": 0.3},
        {"mask": torch.bool, "over": "B", "scale": -2.0},
    ),
    strided=("x", "mask"),
    batched=("x", "mask"),
    data=("x",),
    traffic=_traffic,
    bench_dims=({"B": 8, "H": 16, "S": 1024, "N": 1024}, {"B": 4, "H": 16, "S": 2048, "N": 2048}),
    cpu_bench_dims=({"B": 1, "H": 8, "S": 512, "N": 512},),
    bench_variant={"mask": torch.bool, "over": "BS", "scale": 0.125},
    bad_calls=(
        *_common_bad_calls("masked_softmax"),
        _wide_bad_call("masked_softmax"),
        *_scale_bad_calls("masked_softmax"),
        *_MASK_BAD_CALLS,
    ),
    contained=False,  # backward does not see the mask: a NaN in y is one in dx, where torch's mask makes it 0
    **_COMMON,
)

CAUSAL_SOFTMAX = OpSpec(
    name="causal_softmax",
    allowance=_allowance,
    function=fastkern.causal_softmax,
    reference=_causal_reference,
    baseline=_causal_torch,
    yardstick=_causal_float32,
    make=_causal_inputs,
    dims=_CAUSAL_DIMS,
    variants=({"scale": 0.125}, {"scale": -1.0}),
    strided=("x",),
    batched=("x",),
    traffic=_traffic,
    bench_dims=({"B": 64, "S": 1024, "N": 1024}, {"B": 64, "S": 2048, "N": 2048}, {"B": 16, "S": 4096, "N": 4096}),
    cpu_bench_dims=({"B": 8, "S": 512, "N": 512},),
    bench_variant={"scale": 0.125},
    bad_calls=(
        *_common_bad_calls("causal_softmax"),
        _wide_bad_call("causal_softmax"),
        BadCall(
            "x one-dimensional",
            set_to(x=lambda a: a["x"].flatten()),
            r"causal_softmax: x must have at least two dimensions, got shape \(\d+,\)",
        ),
        *_scale_bad_calls("causal_softmax"),
    ),
    **_COMMON,
)

SPECS = (SOFTMAX, LOG_SOFTMAX, LOGSUMEXP, MASKED_SOFTMAX, CAUSAL_SOFTMAX)
