# SPDX-License-Identifier: Apache-2.0
"""The table of operators: one row drives an op's tests and its benchmark.

A row says what the op computes (a plain-PyTorch reference, evaluated in float64), what torch offers for the same job
in the same dtype, how to make inputs, which sizes matter, how many bytes and flops a call must cost, and which bad
arguments must be refused in which words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkern

Dims = Mapping[str, int]
Inputs = dict[str, Any]  # argument name -> tensor, number or None; in the op's argument order
Outputs = Tensor | tuple[Tensor, ...]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BadCall:
    """A call that must raise: ``change`` edits good inputs in place, ``message`` is a regex of the error's text."""

    name: str
    change: Callable[[Inputs], Any]
    message: str


@dataclass(frozen=True)
class OpSpec:
    """One operator.

    Attributes:
        name: of ``fastkern.<name>`` and ``torch.ops.fastkern.<name>``.
        family: the room it lives in: norm, softmax, attention, ...
        function: the public function.
        reference: the same computation in plain differentiable PyTorch; run in float64 it is the truth.
        baseline: what a torch user would call; run in the op's dtype its error sets the tolerance, its time the bar.
        make: inputs for given dimensions, dtype, device and variant (keyword arguments from ``variants``).
        dims: sizes to test: primes, tile sizes and their neighbours, 1.
        variants: which optional operands are there and of which kind.
        differentiable: arguments that may require grad.
        strided: arguments that may have any strides.
        batched: arguments whose leading dimension (the first one in ``dims``) is a batch that no output row may see
            the rest of.
        traffic: bytes a perfect kernel moves: ``traffic(inputs, backward)``.
        flops: floating-point operations: ``flops(inputs, backward)``.
        bench_dims: sizes for the benchmark.
        bench_variant: the variant that the benchmark uses.
        peers: name -> callable taking the inputs by keyword; a peer that cannot be imported raises ImportError.
        bad_calls: what must be refused.
        forward_factor, backward_factor: allowed multiple of the baseline's error.
        empty_dims: dimensions that may be 0.
        workspace: most bytes of temporary device memory a call may take beside its outputs:
            ``workspace(inputs, backward)``.
    """

    name: str
    family: str
    function: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    baseline: Callable[..., Outputs]
    make: Callable[..., Inputs]
    dims: tuple[Dims, ...]
    variants: tuple[Mapping[str, Any], ...]
    differentiable: tuple[str, ...]
    strided: tuple[str, ...]
    batched: tuple[str, ...]
    traffic: Callable[[Inputs, bool], int]
    flops: Callable[[Inputs, bool], int]
    bench_dims: tuple[Dims, ...]
    bench_variant: Mapping[str, Any] = field(default_factory=dict)
    peers: Mapping[str, Callable[..., Outputs]] = field(default_factory=dict)
    bad_calls: tuple[BadCall, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    forward_factor: float = 2.0
    backward_factor: float = 3.0
    empty_dims: tuple[str, ...] = ("B", "M", "S", "H", "N")
    workspace: Callable[[Inputs, bool], int] = lambda inputs, backward: 0

    @property
    def op(self) -> Any:
        """The operator itself, ``torch.ops.fastkern.<name>.default``."""
        return getattr(torch.ops.fastkern, self.name).default


# ---- accuracy --------------------------------------------------------------------------------------------------------


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs, floating-point tensors widened to float64 (values unchanged)."""
    return {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _same_kind(a: Tensor, b: Tensor) -> Tensor:
    """Both NaN, the same infinity, or both finite."""
    return (torch.isnan(a) & torch.isnan(b)) | (torch.isinf(a) & (a == b)) | (torch.isfinite(a) & torch.isfinite(b))


def assert_accurate(
    got: Tensor, baseline: Tensor, truth: Tensor, factor: float, ulps: float = 2.0, what: str = "output"
) -> None:
    """Raise AssertionError unless ``got`` is as close to ``truth`` as the rule asks.

    The rule, for the largest error and for the root-mean-square error alike:
    ``error(got) <= factor * error(baseline) + ulps * eps(dtype) * size(truth)``. NaN and infinities must stand where
    they stand in ``truth`` or, as float64 overflows later and torch's formula may be another, in ``baseline``.
    """
    assert got.dtype == baseline.dtype, f"{what}: dtype {got.dtype}, expected {baseline.dtype}"
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if got.numel() == 0:
        return
    ours, theirs, exact = got.detach().double(), baseline.detach().double(), truth.detach().double()
    finite = torch.isfinite(exact) & torch.isfinite(theirs)
    same = _same_kind(ours, theirs) | _same_kind(ours, exact)
    assert bool(same[~finite].all()), f"{what}: NaN or infinity differ from torch at {int((~same).sum())} places"
    assert bool(torch.isfinite(ours[finite]).all()), f"{what}: NaN or infinity where torch has none"
    ours, theirs, exact = ours[finite], theirs[finite], exact[finite]
    if exact.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps
    tiny = torch.finfo(got.dtype).smallest_normal * eps
    for name, size in (("largest", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
        error, allowed = size(ours - exact), factor * size(theirs - exact) + ulps * eps * size(exact) + tiny
        assert error <= allowed, (
            f"{what}: {name} error {error:.3e} > {allowed:.3e} = {factor} x torch's {size(theirs - exact):.3e} "
            f"+ {ulps} ulp of {size(exact):.3e}"
        )


# ---- norm ------------------------------------------------------------------------------------------------------------


def _rows(m: int, *lengths: int) -> tuple[Dims, ...]:
    """M = m rows of each of the lengths N."""
    return tuple({"M": m, "N": n} for n in lengths)


def _row_inputs(
    *, N: int, dtype: torch.dtype, device: Any, weight: Any = "same", eps: float = 1e-6, **leading: int
) -> Inputs:
    x = torch.randn(*leading.values(), N, device=device, dtype=torch.float32).to(dtype)
    w = None
    if weight is not None:
        w = (1 + 0.3 * torch.randn(N, device=device)).to(dtype if weight == "same" else weight)
    return {"x": x, "weight": w, "eps": eps}


def _rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _rms_norm_torch(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)


def _norm_traffic(inputs: Inputs, backward: bool) -> int:
    x, weight = inputs["x"], inputs["weight"]
    activations = (3 if backward else 2) * x.numel() * x.element_size()  # backward: read dy and x, write dx
    affine = 0 if weight is None else (2 if backward else 1) * weight.numel() * weight.element_size()
    return activations + affine


def _rms_norm_workspace(inputs: Inputs, backward: bool) -> int:
    """Partial weight gradients in float32, at most one row for each row of x; for long rows one statistic a row."""
    x = inputs["x"]
    if not backward or inputs["weight"] is None:
        return 0
    rows = x.shape[:-1].numel()
    return 4 * (-(-rows // 4) * 4 + x.shape[-1] * min(rows, 4096))


def _liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _quack_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from quack import rmsnorm

    return rmsnorm(x, weight, eps=eps)


_RMS_NORM_BAD_CALLS = (
    BadCall("x integer", lambda a: a.update(x=a["x"].long()), r"rms_norm: x must be .*got torch\.int64"),
    BadCall("x float64", lambda a: a.update(x=a["x"].double()), r"rms_norm: x must be .*got torch\.float64"),
    BadCall("x complex", lambda a: a.update(x=a["x"].float() + 0j), r"rms_norm: x must be .*got torch\.complex64"),
    BadCall("x scalar", lambda a: a.update(x=a["x"].flatten()[0]), r"rms_norm: x must have at least one dimension"),
    BadCall(
        "weight too long",
        lambda a: a.update(weight=a["weight"].new_ones(a["x"].shape[-1] + 1)),
        r"rms_norm: weight must have shape \(\d+,\), got \(\d+,\)",
    ),
    BadCall(
        "weight two-dimensional",
        lambda a: a.update(weight=a["weight"].new_ones(1, a["x"].shape[-1])),
        r"rms_norm: weight must have shape \(\d+,\), got \(1, \d+\)",
    ),
    BadCall("weight scalar", lambda a: a.update(weight=a["weight"][0]), r"rms_norm: weight must have shape .*got \(\)"),
    BadCall("weight integer", lambda a: a.update(weight=a["weight"].int()), r"rms_norm: weight must be .*torch\.int32"),
    BadCall("weight bool", lambda a: a.update(weight=a["weight"].bool()), r"rms_norm: weight must be .*torch\.bool"),
    BadCall("eps negative", lambda a: a.update(eps=-1e-6), r"rms_norm: eps must be finite and >= 0, got -1e-06"),
    BadCall("eps NaN", lambda a: a.update(eps=float("nan")), r"rms_norm: eps must be finite and >= 0, got -?nan"),
    BadCall("eps infinite", lambda a: a.update(eps=float("inf")), r"rms_norm: eps must be finite and >= 0, got inf"),
)

RMS_NORM = OpSpec(
    name="rms_norm",
    family="norm",
    function=fastkern.rms_norm,
    reference=_rms_norm_reference,
    baseline=_rms_norm_torch,
    make=_row_inputs,
    dims=(
        *_rows(3, 1, 2, 7, 8, 9, 31, 64, 65, 96, 127, 128, 129, 255, 257, 760, 1000, 1023, 1024, 1025),
        *_rows(2, 2047, 3000, 4096, 4099, 5120, 8191, 8192, 8193, 16384, 16392, 32768, 65536, 65544),
        *(dims for m in (1, 16, 17, 199, 1031) for dims in _rows(m, 64)),
        *_rows(1, 4096),
        *_rows(131, 1536),
        {"B": 2, "S": 5, "N": 96},
        {"B": 3, "S": 5, "H": 2, "N": 64},
        {"B": 2, "S": 3, "H": 4, "N": 129},
    ),
    variants=(
        {"weight": "same"},
        {"weight": None},
        {"weight": torch.float32, "eps": 1e-5},
        {"weight": torch.bfloat16, "eps": 0.0},
    ),
    differentiable=("x", "weight"),
    strided=("x", "weight"),
    batched=("x",),
    traffic=_norm_traffic,
    flops=lambda inputs, backward: (9 if backward else 4) * inputs["x"].numel(),
    bench_dims=(
        *_rows(1, 4096),
        *_rows(64, 8192),
        *_rows(131072, 128),
        *_rows(32768, 1024),
        *_rows(16384, 4096),
        *_rows(8192, 8192),
        *_rows(4096, 32768),
        *_rows(512, 262144),
    ),
    bench_variant={"weight": "same"},
    peers={"liger": _liger_rms_norm, "quack": _quack_rms_norm},
    bad_calls=_RMS_NORM_BAD_CALLS,
    workspace=_rms_norm_workspace,
)

SPECS: tuple[OpSpec, ...] = (RMS_NORM,)
