# SPDX-License-Identifier: Apache-2.0
"""fastkern.optim.Adafactor against torch.optim.Adafactor and float64; the paper's options; torch.optim's ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fastkern import optim
from fastkern.optim import _direct, adafactor
from harness.optim import (
    assert_close,
    assert_same,
    bits,
    check_scale_overflow_and_clipping,
    doubled,
    replayed,
    set_gradients,
)
from torch import Tensor

STEPS = 8
# The fifth and the seventh have no gradients at some steps or at all.
SHAPES = [(20, 30), (7,), (20, 30), (), (3, 4, 5), (7,), (2, 2), (1, 65), (64, 1), (0, 4), (1023,)]


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    data += [torch.randn(30, 20, generator=generator).to(device, dtype).t()]
    data += [torch.randn(20, 50, generator=generator).to(device, dtype)[:, 3:33]]
    return [torch.nn.Parameter(t) for t in data]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"lr": 0.1, "beta2_decay": -0.5, "eps": (1e-10, 1e-2), "d": 1.5, "maximize": True}),
        (torch.bfloat16, {"lr": 0.05, "weight_decay": 0.3}),
    ],
)
def test_torch(dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    """Errors against float64 at most twice torch's; the same states."""
    ours, theirs = parameters(device, dtype), parameters(device, dtype)
    truth = doubled(theirs)
    if "eps" not in options:  # None is the epsilon of the type
        options = {**options, "eps": (torch.finfo(dtype).eps, 1e-3)}
    default = {**options, "eps": (None, options["eps"][1])} if options["eps"][0] != 1e-10 else options
    a, b, c = (
        optim.Adafactor(ours, **default),
        torch.optim.Adafactor([p for p in theirs if p.numel()], **default),
        torch.optim.Adafactor([p for p in truth if p.numel()], **options),
    )
    for step in range(STEPS):
        set_gradients(step, ours, theirs)
        for p, q in zip(theirs, truth, strict=True):
            q.grad = None if p.grad is None else p.grad.cpu().double()
        for optimizer in (a, b, c):
            optimizer.step()
    assert_close(ours, theirs, truth)
    for p, q in zip(ours, theirs, strict=True):
        if q not in b.state:
            continue
        assert set(a.state[p]) == set(b.state[q])
        for key, value in b.state[q].items():
            assert a.state[p][key].shape == value.shape
            tolerance = 1e-4 if dtype == torch.float32 else 5e-2
            torch.testing.assert_close(
                a.state[p][key].cpu().float(), value.cpu().float(), rtol=tolerance, atol=tolerance
            )


def reference_step(p: Tensor, state: dict[str, Tensor], g: Tensor, t: int, o: dict[str, Any]) -> None:
    """The options that torch has not, in float64."""
    weight, lr = t**-0.8, o["lr"]
    if p.ndim > 1:
        row = state.setdefault("row", torch.zeros_like(p.sum(-1, keepdim=True)))
        column = state.setdefault("column", torch.zeros_like(p.sum(-2, keepdim=True)))
        row.lerp_(g.square().mean(-1, keepdim=True), weight)
        column.lerp_(g.square().mean(-2, keepdim=True), weight)
        moments = row * column / row.mean(-2, keepdim=True)
    else:
        moments = state.setdefault("moments", torch.zeros_like(p)).lerp_(g.square(), weight)
    u = g / moments.sqrt()
    u = u / max(1.0, u.square().mean().sqrt().item())
    rate = lr
    if o.get("relative_step", True):
        rate = min(1e-6 * t if o.get("warmup_init") else lr, t**-0.5)
    if o.get("scale_parameter", True):
        rate *= max(1e-3, p.square().mean().sqrt().item())
    u = u * rate
    if o.get("beta1") is not None:
        u = state.setdefault("average", torch.zeros_like(p)).lerp_(u, 1 - o["beta1"])
    p.mul_(1 - lr * o.get("weight_decay", 0.0)).sub_(u)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1},
        {"lr": 0.02, "relative_step": False, "scale_parameter": False},
        {"lr": 0.02, "warmup_init": True, "beta1": 0.5},
    ],
)
def test_options_of_the_paper(options: dict[str, Any], device: str) -> None:
    ours = parameters(device)
    truth = [p.detach().cpu().double() for p in ours]
    states: list[dict[str, Tensor]] = [{} for _ in ours]
    optimizer = optim.Adafactor(ours, **options)
    for step in range(5):
        set_gradients(step, ours, skip=False)
        optimizer.step()
        for p, q, state in zip(ours, truth, states, strict=True):
            if p.numel():
                reference_step(q, state, p.grad.cpu().double(), step + 1, options)
    for p, q in zip(ours, truth, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q, rtol=2e-5, atol=2e-6)


def test_slices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks of as many as fit are the same as all of them at once."""
    results = []
    for most in (1 << 24, 700):
        monkeypatch.setattr(adafactor, "_STACK", {"cpu": most, "cuda": most})
        those = parameters(device)
        optimizer = optim.Adafactor(those)
        for step in range(3):
            set_gradients(step, those)
            optimizer.step()
        results.append(those)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_roundings(device: str) -> None:
    """Each repeats, and 16 bits beside a parameter are as good as 32."""

    def run(rounding: str, beta1: float | None) -> tuple[list[Tensor], optim.Adafactor]:
        those = parameters(device, torch.bfloat16)
        optimizer = optim.Adafactor(those, rounding=rounding, seed=7, beta1=beta1)
        for step in range(3):
            set_gradients(step, those)
            optimizer.step()
        return those, optimizer

    plain = run("nearest", 0.9)[0]
    for rounding in ("stochastic", "kahan"):
        those = run(rounding, 0.9)[0]
        assert_same(those, run(rounding, 0.9)[0])
        assert not torch.equal(those[0], plain[0])
    (first, a), (second, b) = run("master", None), run("remainder", None)
    assert_same(first, second)
    master, low = a.state[first[0]]["master"], b.state[second[0]]["remainder"].to(torch.int32)
    assert torch.equal(bits(master), (bits(second[0]).to(torch.int32) << 16) + low)
    assert {a.state[first[0]][name].dtype for name in ("row_var", "col_var")} == {torch.float32}


def test_checkpoints(device: str) -> None:
    """torch's, ours from its checkpoint, torch's from ours: as torch's all the way; ours with an average of its own."""
    through, alone = ([p for p in parameters(device) if p.numel()] for _ in range(2))
    expected = torch.optim.Adafactor(alone, weight_decay=0.1)
    optimizer: torch.optim.Optimizer = torch.optim.Adafactor(through, weight_decay=0.1)
    for step in range(6):
        if step in (2, 4):
            following = (optim.Adafactor if step == 2 else torch.optim.Adafactor)(through)
            following.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = following
        set_gradients(step, through, alone)
        optimizer.step()
        expected.step()
    for p, q in zip(through, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    whole, parts = parameters(device), parameters(device)
    a, b = optim.Adafactor(whole, beta1=0.9), optim.Adafactor(parts, beta1=0.9)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(b.state_dict())
            b = optim.Adafactor(parts)
            b.load_state_dict(state)
        set_gradients(step, whole, parts)
        a.step()
        b.step()
    assert_same(parts, whole)


def test_scale_overflow_and_clipping(device: str) -> None:
    """Inside the step: as before it, with gradients left alone; after an overflow nothing changes."""
    first, second = parameters(device), parameters(device)
    made = (optim.Adafactor(those, beta1=0.5) for those in (first, second))
    check_scale_overflow_and_clipping(*made, first, second, rtol=1e-5, atol=1e-6)


def test_rate_in_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that only the device knows, with weight decay; on the CPU too, where rates are read as a rule."""
    first, second = parameters(device), parameters(device)
    a = optim.Adafactor(first, lr=torch.tensor(0.02, device=device), weight_decay=0.1)
    b = optim.Adafactor(second, lr=0.02, weight_decay=0.1)
    for module in (_direct, adafactor):
        monkeypatch.setattr(module, "rate_of", lambda lr, device: (0.0, lr) if isinstance(lr, Tensor) else (lr, None))
    for step in range(3):
        set_gradients(step, first, second)
        a.step()
        b.step()
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2_decay": 0.1}, r"Adafactor: beta2_decay must be <= 0, got 0.1"),
        ({"eps": (-1.0, 1e-3)}, r"Adafactor: eps\[0\] must be >= 0, got -1.0"),
        ({"eps": (None, -1e-3)}, r"Adafactor: eps\[1\] must be >= 0, got -0.001"),
        ({"d": 0.5}, r"Adafactor: d must be >= 1, got 0.5"),
        ({"beta1": 1.0}, r"Adafactor: beta1 must be in \[0, 1\) or None, got 1.0"),
        ({"warmup_init": True, "relative_step": False}, r"Adafactor: warmup_init must be False without"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Adafactor([torch.nn.Parameter(torch.ones(3, 3))], **options)


def test_zero_and_tiny_gradients(device: str) -> None:
    """Nothing to divide by is no NaN, with an epsilon that float32 cannot square either."""
    those = parameters(device)
    before = [p.detach().clone() for p in those]
    optimizer = optim.Adafactor(those, eps=(1e-30, 1e-3))
    for p in those:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(those, before)
    for p in those:
        p.grad = torch.full_like(p, 1e-18)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in those)


@pytest.mark.cuda
def test_graph(cuda: None) -> None:
    """A captured step with clipping and a rate in memory waits for nothing and replays the same bits."""

    def make() -> tuple[list[Tensor], optim.Adafactor]:
        those = parameters("cuda", torch.bfloat16)
        options = {"weight_decay": 0.1, "beta1": 0.9, "rounding": "stochastic"}
        return those, optim.Adafactor(those, lr=torch.tensor(0.02, device="cuda"), **options)

    assert_same(*replayed(make))
