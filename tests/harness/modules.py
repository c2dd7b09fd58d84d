# SPDX-License-Identifier: Apache-2.0
"""A module beside one of torch's: outputs, the gradients of inputs and of every parameter, by the accuracy rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from fastkern import nn
from fastkern.specs import assert_accurate
from torch import Tensor

from harness.cases import as_tuple


def run(module: torch.nn.Module, inputs: tuple[Any, ...], **more: Any) -> dict[str, Tensor]:
    """Outputs and gradients by name; inputs of floating point get a gradient."""
    module.zero_grad()
    leaves = [t.detach().clone().requires_grad_() if torch.is_floating_point(t) else t for t in inputs]
    outputs = [torch.atleast_1d(o) for o in as_tuple(module(*leaves, **more))]
    loss = sum((o * torch.linspace(-1, 1.5, o.shape[-1], device=o.device).to(o.dtype)).sum() for o in outputs)
    loss.backward()
    found = {f"output {i}": o for i, o in enumerate(outputs)}
    found |= {f"input {i}": t.grad for i, t in enumerate(leaves) if t.requires_grad and t.grad is not None}
    return found | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def unpacked(module: torch.nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of packed parameters as those of their parts."""
    found = dict(found)
    for name, child in module.named_modules():
        if hasattr(child, "export_unpacked"):
            child.export_unpacked(found, f"{name}." if name else "")
    return found


def turned(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Llama's formula, in the type of x."""
    half = x.shape[-1] // 2
    angles = positions[..., None].double() * theta ** (-torch.arange(half).double() / half)
    cos, sin = (torch.cat([t(angles)] * 2, -1)[..., None, :].to(x) for t in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def assert_like(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    *inputs: Any,
    names: Callable[[str], str] = lambda name: name,
    more: dict[str, Any] | None = None,
    slack: float = 2.0,
) -> None:
    """``more``: what only ``ours`` is called with. ``slack``: ulps, more for the noise of long chains of 16 bits."""
    got = unpacked(ours, run(ours, inputs, **(more or {})))
    baseline = run(theirs, inputs)
    wide = [t.double() if torch.is_floating_point(t) else t for t in inputs]
    truth = run(copy.deepcopy(theirs).double(), tuple(wide))
    outer = ("output", "input")
    renamed = {name if name.startswith(outer) else names(name): value for name, value in got.items()}
    assert renamed.keys() == truth.keys(), sorted(renamed.keys() ^ truth.keys())
    largest = max(float(t.detach().abs().max()) for t in truth.values())
    for name, exact in truth.items():
        assert not renamed[name].isnan().any(), f"{name}: NaN"
        # zero by the formula, as of a bias of keys: both have noise
        if float(exact.detach().abs().max()) < 1e-12 * largest:
            assert float(renamed[name].abs().max()) <= 16 * torch.finfo(renamed[name].dtype).eps * largest, name
            continue
        factor = 2.0 if name.startswith("output") else 3.0
        assert_accurate(renamed[name], baseline[name], exact, factor, slack, name)


def assert_loads_both_ways(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Ours takes their checkpoint, and they take what we write of it."""
    state = theirs.state_dict()
    ours.load_state_dict(state)
    written = nn.unpacked_state_dict(ours)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())
    theirs.load_state_dict(written)
