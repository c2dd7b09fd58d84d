# SPDX-License-Identifier: Apache-2.0
"""What the tests of attention share: calls with gradients, and the rule that FlashAttention-3 is tested with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastkern.specs import _attention_formula as formula
from fastkern.specs import attention as rows
from torch import Tensor

from harness.cases import is_float, run_backward

Results = dict[str, Tensor]

DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


def made(device: str, dtype: torch.dtype, *sizes: int, group: int = 1, V: int | None = None, seed: int = 0) -> Results:
    """q, k and v for B, S, T, H, D, each query head with a key head of its own or with ``group - 1`` others."""
    B, S, T, H, D = sizes
    torch.manual_seed(seed)
    shapes = {"q": (B, S, H, D), "k": (B, T, H // group, D), "v": (B, T, H // group, D if V is None else V)}
    return {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}


def int32(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def results_of(function: Any, inputs: Mapping[str, Any], use_lse: bool = True, seed: int = 1) -> Results:
    """out, lse and the gradients of all inputs that have one, for a random dout and, with ``use_lse``, dlse."""
    names = [name for name in DIFFERENTIABLE if is_float(inputs.get(name))]
    generator = torch.Generator().manual_seed(seed)

    def called(**leaves: Any) -> tuple[Tensor, ...]:
        out, lse = function(**leaves)
        return (out, lse) if use_lse else (out,)

    with torch.no_grad():
        shapes = [(t.shape, t.dtype) for t in function(**inputs)][: 2 if use_lse else 1]
    device = inputs["q"].device
    grad_outs = [torch.randn(shape, generator=generator).to(device, dtype) for shape, dtype in shapes]
    outputs, grads = run_backward(called, dict(inputs), names, grad_outs)
    return {**dict(zip(("out", "lse"), outputs, strict=False)), **{f"d{name}": grads[name] for name in names}}


def ours(inputs: Mapping[str, Any], use_lse: bool = True, seed: int = 1) -> Results:
    function = rows.flash_attn_varlen if "cu_seqlens_q" in inputs else rows.flash_attn
    return results_of(function, inputs, use_lse, seed)


def truth(inputs: Mapping[str, Any], use_lse: bool = True, seed: int = 1, dtype: Any = torch.float64) -> Results:
    """The formula in float64 for the same dout and dlse."""
    function = formula.varlen if "cu_seqlens_q" in inputs else formula.attention
    wide = {k: v.to(dtype) if is_float(v) else v for k, v in inputs.items()}

    def called(**leaves: Any) -> tuple[Tensor, Tensor]:
        out, lse = function(**leaves)
        return Rounded.apply(out, inputs["q"].dtype), lse

    return results_of(called, wide, use_lse, seed)


class Rounded(torch.autograd.Function):
    """The same numbers; gradients are rounded to the dtype, so that a dout of that dtype stays what it is."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


def assert_no_nan(results: Mapping[str, Tensor], what: str = "") -> None:
    for name, t in results.items():
        assert not bool(t.isnan().any()), f"{what}: {name} has {int(t.isnan().sum())} NaN"
        if name != "lse":
            assert bool(t.isfinite().all()), f"{what}: {name} is infinite"


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, what: str = "") -> None:
    """No NaN, -inf where expected, and errors of at most ``tolerance`` of the largest value (at least of 1)."""
    assert got.keys() == expected.keys(), f"{what}: {sorted(got)} against {sorted(expected)}"
    assert_no_nan(got, what)
    for name, t in got.items():
        ours, exact = t.double(), expected[name].double()
        assert ours.shape == exact.shape, f"{what}: {name} has shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
        assert torch.equal(ours == -math.inf, exact == -math.inf), f"{what}: {name} is -inf elsewhere"
        finite = exact > -math.inf
        if not bool(finite.any()):
            continue
        error = float((ours - exact)[finite].abs().max())
        allowed = tolerance * max(float(exact[finite].abs().max()), 1.0)
        assert error <= allowed, f"{what}: {name} is off by {error:.3e}, allowed are {allowed:.3e}"


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(inputs: Mapping[str, Any], what: str = "", use_lse: bool = True, tolerance: float | None = None) -> Results:
    """Ours against float64; what is ours."""
    got = ours(inputs, use_lse)
    assert_close(got, truth(inputs, use_lse), tolerance or TOLERANCE[inputs["q"].dtype], what)
    return got


def assert_same_bits(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "") -> None:
    assert_no_nan(got, what)
    assert got.keys() == expected.keys(), what
    for name in expected:
        assert torch.equal(got[name], expected[name]), f"{what}: {name} has other bits"


def assert_as_fa3(
    got: Mapping[str, Tensor], exact: Mapping[str, Tensor], torchs: Mapping[str, Tensor], softcap: float, what: str
) -> None:
    """Errors are at most twice those of the formula in the same dtype (with softcap 3 times), and an absolute bound.

    The bound is twice what adding 0.3 and taking it away does to the exact result, or 5e-5 of q where that is 0 and
    nothing else: of a single key torch's gradient is exact, as a difference of the same two sums, ours a sum over all
    queries of what two float32 sums differ by.
    """
    factor = 3 if softcap else 2
    assert_no_nan(got, what)
    for name in (n for n in got if n != "lse"):
        reference = exact[name].to(got[name].dtype)
        of_zeros = 5e-5 * max(softcap / 4, 1)  # q is as many times as large
        bound = float(2 * (reference + 0.3 - 0.3 - reference).abs().max()) if reference.any() else of_zeros
        bound += 3e-4 if softcap and name != "out" else 0
        error, theirs = (
            float((t[name].float() - reference.float()).abs().max()) if reference.numel() else 0 for t in (got, torchs)
        )
        assert error <= factor * theirs + bound, (
            f"{what}: {name} is off by {error:.3e}, more than {factor} x {theirs:.3e} + {bound:.3e}"
        )


def packed(entries: Sequence[Mapping[str, Tensor]], tail: int = 0, poison: float | None = None) -> dict[str, Tensor]:
    """Entries of (S, H, D), (T, G, D) and (T, G, V) one after the other, and ``tail`` rows of ``poison``."""
    inputs: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        parts = [entry[name] for entry in entries]
        if tail:
            parts.append(parts[0].new_full((tail, *parts[0].shape[1:]), 1.0 if poison is None else poison))
        inputs[name] = torch.cat(parts)
    for name, of in (("cu_seqlens_q", "q"), ("cu_seqlens_k", "k")):
        lengths = [0, *(entry[of].shape[0] for entry in entries)]
        inputs[name] = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(inputs["q"].device)
    return inputs
