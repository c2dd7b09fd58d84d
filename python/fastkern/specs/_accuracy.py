# SPDX-License-Identifier: Apache-2.0
"""The rule that every result is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkern.specs._spec import Inputs


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs, floating-point tensors widened to float64 (values unchanged)."""
    return {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


_FEW = 1 << 20  # elements that are compared on the CPU: on a GPU each of the steps would be a kernel and a wait


def on_host(t: Tensor) -> Tensor:
    """A copy on the CPU, of a tensor that is not too large."""
    return t.cpu() if t.numel() <= _FEW else t


def _same_kind(a: Tensor, b: Tensor) -> Tensor:
    """Both NaN, the same infinity, or both finite."""
    return (torch.isnan(a) & torch.isnan(b)) | (torch.isinf(a) & (a == b)) | (torch.isfinite(a) & torch.isfinite(b))


def assert_accurate(
    got: Tensor,
    baseline: Tensor,
    truth: Tensor,
    factor: float,
    ulps: float = 2.0,
    what: str = "output",
    slack: Tensor | None = None,
    share: float = 0.0,
) -> None:
    """Raise AssertionError unless ``got`` is as close to ``truth`` as the rule asks.

    The rule, for the largest error and for the root-mean-square error alike:
    ``error(got) <= factor * error(baseline) + ulps * eps(dtype) * size(truth)``. NaN and infinities must stand where
    they stand in ``truth``, as float64 or rounded to the dtype, or, as torch's formula may be another, in ``baseline``.
    ``slack`` is what each element may be off by before that counts as an error, of either; ``share``, of the size of
    ``truth``, is allowed besides.
    """
    assert got.dtype == baseline.dtype, f"{what}: dtype {got.dtype}, expected {baseline.dtype}"
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if got.numel() == 0:
        return
    got, baseline, truth = on_host(got), on_host(baseline), on_host(truth)
    if not got.dtype.is_floating_point:  # integers are exact, or wrap around as torch's
        assert torch.allclose(got, baseline, equal_nan=True), f"{what}: {got}, torch gives {baseline}"
        return
    slack = None if slack is None else slack.to(got.device)
    ours, theirs, exact = got.detach().double(), baseline.detach().double(), truth.detach().double()
    allowance = torch.zeros_like(exact) if slack is None else slack.detach().double().expand_as(exact)
    overflows = torch.isinf(exact.to(got.dtype)) & (ours == exact.to(got.dtype).double())
    finite = torch.isfinite(exact) & torch.isfinite(theirs) & ~overflows
    same = _same_kind(ours, theirs) | _same_kind(ours, exact) | overflows
    assert bool(same[~finite].all()), f"{what}: NaN or infinity differ from torch at {int((~same).sum())} places"
    assert bool(torch.isfinite(ours[finite]).all()), f"{what}: NaN or infinity where torch has none"
    ours, theirs, exact, allowance = ours[finite], theirs[finite], exact[finite], allowance[finite]
    if exact.numel() == 0:
        return
    our_error, their_error = ((t - exact).abs().sub(allowance).clamp_min(0) for t in (ours, theirs))
    eps = torch.finfo(got.dtype).eps
    tiny = torch.finfo(got.dtype).smallest_normal * eps
    for name, size in (("largest", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
        error, allowed = size(our_error), factor * size(their_error) + (ulps * eps + share) * size(exact) + tiny
        assert error <= allowed, (
            f"{what}: {name} error {error:.3e} > {allowed:.3e} = {factor} x torch's {size(their_error):.3e} "
            f"+ {ulps} ulp of {size(exact):.3e}"
        )
