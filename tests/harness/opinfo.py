# SPDX-License-Identifier: Apache-2.0
"""torch's own samples (OpInfo) for the operators that torch has too, and the comparison with torch's results."""

from __future__ import annotations

import functools
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import fastkern
import torch
from torch import Tensor

# Other names in torch's table, and how a sample becomes a call: sample.input is torch's `self`.
_TABLE_NAMES = {f"{n}": f"nn.functional.{n}" for n in ("relu", "gelu", "silu")}
_REORDERED: dict[str, Callable[..., Any]] = {
    "where": lambda self, condition, other, **more: fastkern.where(condition, self, other, **more),
}


@functools.cache
def _table() -> dict[str, list[Any]]:
    try:
        import expecttest  # noqa: F401
    except ImportError:  # torch's test classes derive from it; the table needs none of them
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stub
    from torch.testing._internal import common_methods_invocations

    found: dict[str, list[Any]] = {}
    for info in common_methods_invocations.op_db:
        found.setdefault(info.name, []).append(info)
    return found


def entries(name: str) -> list[Any]:
    """torch's table entries for ``fastkern.<name>``: an operator without one is an error, not a skip."""
    found = _table().get(_TABLE_NAMES.get(name, name), [])
    assert found, f"torch's table of operators has no {name}"
    return [info for info in found if info.variant_test_name != "complex"]


def call_of(name: str) -> Callable[..., Any]:
    """``fastkern.<name>`` with the arguments in the order of torch's samples."""
    return _REORDERED.get(name, getattr(fastkern, name))


def _small(sample: Any) -> bool:
    tensors = [t for t in (sample.input, *sample.args) if isinstance(t, Tensor)]
    return all(t.numel() <= 1 << 14 for t in tensors)


def _has_complex32(sample: Any) -> bool:
    return any(isinstance(t, Tensor) and t.dtype == torch.complex32 for t in (sample.input, *sample.args))


def samples(info: Any, device: str, dtype: torch.dtype, references: int = 8, **more: Any) -> Iterator[Any]:
    """All of torch's samples, and some of the first of its reference ones, which take long to make: small ones."""
    torch.manual_seed(0)
    yield from (s for s in info.sample_inputs(device, dtype, **more) if not _has_complex32(s))
    if references and dtype in (torch.float32, torch.bfloat16, torch.int32):
        torch.manual_seed(0)
        some = islice(info.reference_inputs(device, dtype, **more), 0, 4 * references, 4)
        yield from (s for s in some if _small(s) and not _has_complex32(s))


def error_samples(info: Any, device: str) -> list[Any]:
    return list(info.error_inputs(device)) if info.error_inputs_func is not None else []


# ---- comparison ------------------------------------------------------------------------------------------------------


def _ordered(t: Tensor) -> Tensor:
    """Floating-point numbers as integers that count representable numbers."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    bits = t.contiguous().view(width).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(width).min - bits, bits)


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Between two tensors of one type; 0 between NaNs, and between zeros."""
    distance = (_ordered(a) - _ordered(b)).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    far = a.isnan() != b.isnan()
    return torch.where(same, 0, torch.where(far, 1 << 40, distance))


def assert_like_torch(
    got: Tensor,
    expected: Tensor,
    what: str,
    most_ulps: int = 0,
    truth: Tensor | None = None,
    strides: bool = True,
    zeros: bool = True,
    near: bool = False,
) -> None:
    """Type, shape, strides; values bitwise but for NaN's bits, or within some ulps of torch's or of the truth's.

    ``near``: or as far from the truth as torch's farthest, for formulas in which torch loses digits.
    """
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, torch gives {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)}, torch gives {tuple(expected.shape)}"
    assert got.device == expected.device, f"{what}: on {got.device}"
    if got.numel() == 0:
        return
    assert not strides or got.stride() == expected.stride(), (
        f"{what}: strides {got.stride()}, torch gives {expected.stride()}"
    )
    if got.is_complex() and most_ulps:
        close = (got - expected).abs() <= most_ulps * torch.finfo(got.dtype).eps * expected.abs()
        assert bool((close | (got == expected) | ~expected.abs().isfinite()).all()), f"{what}: {got} against {expected}"
        return
    if got.is_complex():
        got, expected = (torch.view_as_real(t.resolve_conj()) for t in (got, expected))
    if not got.is_floating_point():
        assert torch.equal(got, expected), f"{what}: {got.flatten()[:8]}, torch gives {expected.flatten()[:8]}"
        return
    distance = ulps(got, expected)
    if most_ulps and truth is not None:
        distance = torch.minimum(distance, ulps(got, truth.to(got.dtype)))
    if near:
        exact = expected.double() if truth is None else truth
        lost = (expected.double() - exact).nan_to_num(0, 0, 0).abs().max() + 4 * torch.finfo(got.dtype).tiny
        lost += 4 * torch.finfo(got.dtype).eps if truth is None else 0
        distance = torch.where((got.double() - exact).abs() <= lost, 0, distance)
    if most_ulps == 0 and zeros:
        other = (got == 0) & (expected == 0) & (got.signbit() != expected.signbit())
        assert not bool(other.any()), f"{what}: sign of zero"
    worst = int(distance.max())
    if worst > most_ulps:
        at = int(distance.flatten().argmax())
        pair = got.flatten()[at].item(), expected.flatten()[at].item()
        raise AssertionError(f"{what}: {worst} ulps from torch's, at {at}: {pair[0]} against {pair[1]}")
