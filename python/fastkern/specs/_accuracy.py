# SPDX-License-Identifier: Apache-2.0
"""The rule that every result is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkern.specs._spec import Inputs


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs, floating-point tensors widened to float64 (values unchanged)."""
    return {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


_BLOCK = 1 << 24  # elements
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
    slack = None if slack is None else slack.to(got.device).expand_as(truth)
    flat = [t.detach().reshape(-1) for t in (got, baseline, truth)]
    allowed_off = None if slack is None else slack.detach().reshape(-1)
    parts, count = [], 0
    for start in range(0, got.numel(), _BLOCK):  # float64 copies of all of a large tensor would need much memory
        block = slice(start, start + _BLOCK)
        part, finite = _block_sizes(
            *(t[block] for t in flat), slack=None if allowed_off is None else allowed_off[block], what=what
        )
        parts.append(part)
        count += finite
    if not count:
        return
    eps = torch.finfo(got.dtype).eps
    tiny = torch.finfo(got.dtype).smallest_normal * eps
    sizes = torch.stack(parts)
    largest, rms = sizes[:, :3].amax(0), (sizes[:, 3:].sum(0) / count).sqrt()
    for name, (error, theirs, exact) in (("largest", largest), ("rms", rms)):
        allowed = factor * theirs + (ulps * eps + share) * exact + tiny
        assert error <= allowed, (
            f"{what}: {name} error {error:.3e} > {allowed:.3e} = {factor} x torch's {theirs:.3e} "
            f"+ {ulps} ulp of {exact:.3e}"
        )


def _block_sizes(
    got: Tensor, baseline: Tensor, truth: Tensor, *, slack: Tensor | None, what: str
) -> tuple[Tensor, int]:
    """Largest and summed squares of our error, torch's and the truth, over elements that are finite; their number."""
    ours, theirs, exact = got.double(), baseline.double(), truth.double()
    rounded = exact.to(got.dtype)
    overflows = torch.isinf(rounded) & (ours == rounded.double())
    finite = torch.isfinite(exact) & torch.isfinite(theirs) & ~overflows
    same = _same_kind(ours, theirs) | _same_kind(ours, exact) | overflows
    assert bool(same[~finite].all()), f"{what}: NaN or infinity differ from torch at {int((~same).sum())} places"
    assert bool(torch.isfinite(ours[finite]).all()), f"{what}: NaN or infinity where torch has none"
    ours, theirs, exact = ours[finite], theirs[finite], exact[finite]
    if exact.numel() == 0:
        return ours.new_zeros(6), 0
    errors = [(t - exact).abs() for t in (ours, theirs)]
    if slack is not None:
        allowance = slack.double()[finite]
        errors = [error.sub(allowance).clamp_min(0) for error in errors]
    measured = [*errors, exact]
    largest, squares = [t.abs().max() for t in measured], [t.square().sum() for t in measured]
    return torch.stack([*largest, *squares]), exact.numel()
