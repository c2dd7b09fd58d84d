# SPDX-License-Identifier: Apache-2.0
"""What the tests of optimizers share: parameters of many sizes and layouts, gradients, comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastkern import optim
from torch import Tensor

SIZES = (0, 1, 7, 63, 64, 65, 1023, 65537)
STEPS = 20

# Ours, torch's (None: there is none), options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw maximize": ("AdamW", {"lr": 1e-2, "maximize": True, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adamw amsgrad": ("AdamW", {"lr": 1e-2, "amsgrad": True}),
    "adam": ("Adam", {"lr": 1e-2, "weight_decay": 0.1}),
    "adam amsgrad": ("Adam", {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.01, "maximize": True}),
    "sgd": ("SGD", {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd momentum": ("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1}),
    "sgd nesterov": ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    "adagrad": ("Adagrad", {"lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    "adagrad plain": ("Adagrad", {"lr": 1e-2, "maximize": True}),
    "rmsprop": ("RMSprop", {"lr": 1e-2}),
    "rmsprop momentum": ("RMSprop", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    "rmsprop centered": ("RMSprop", {"lr": 1e-3, "centered": True, "momentum": 0.5, "maximize": True, "eps": 1e-3}),
    "nadam": ("NAdam", {"lr": 1e-2}),
    "nadam decoupled": ("NAdam", {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "nadam l2": ("NAdam", {"lr": 1e-2, "weight_decay": 0.1, "momentum_decay": 0.01, "maximize": True}),
    "radam": ("RAdam", {"lr": 1e-2}),
    "radam decoupled": ("RAdam", {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam l2": ("RAdam", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True, "betas": (0.9, 0.95)}),
}


def parameters(device: str, dtype: torch.dtype = torch.float32, sizes: Sequence[int] = SIZES) -> list[Tensor]:
    """Of all sizes, and with strides: a matrix, its transpose, one of a larger one, one off alignment."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(n, generator=generator) for n in sizes]
    data += [torch.randn(30, 50, generator=generator), torch.randn(50, 30, generator=generator).t()]
    data += [torch.randn(20, 70, generator=generator)[:, 3:60], torch.randn(5001, generator=generator)[1:]]

    def moved(t: Tensor) -> Tensor:
        base = t if t._base is None else t._base
        whole = base.to(device=device, dtype=dtype)
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    return [torch.nn.Parameter(moved(t)) for t in data]


def set_gradients(step: int, *lists: Sequence[Tensor], skip: bool = True) -> None:
    """The same ones in each list, in its type; none for some parameters at some steps."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, those in enumerate(zip(*lists, strict=True)):
        g = torch.randn(those[0].shape, generator=generator)
        missing = skip and ((step in (2, 3) and i % 3 == 1) or (step < 5 and i == 4) or i == 6)
        for p in those:
            p.grad = None if missing else g.to(device=p.device, dtype=p.dtype, copy=True)


def doubled(those: Sequence[Tensor]) -> list[Tensor]:
    return [torch.nn.Parameter(p.detach().to("cpu", torch.float64)) for p in those]


def error(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest, and the root of the mean square."""
    difference = (found.detach().cpu().double() - truth.detach()).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def assert_close(ours: Sequence[Tensor], torchs: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Error at most twice torch's, and two units in the last place."""
    for i, (a, b, c) in enumerate(zip(ours, torchs, truth, strict=True)):
        if a.numel() == 0:
            continue
        assert bool(a.isfinite().all())
        unit = torch.finfo(a.dtype).eps * c.detach().abs().max().item()
        for mine, theirs in zip(error(a, c), error(b, c), strict=True):
            assert mine <= 2 * theirs + 2 * unit, f"parameter {i}: error {mine}, torch's {theirs}"


def bits(t: Tensor) -> Tensor:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]
    return t.detach().contiguous().view(width)


def assert_same(ours: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(ours, others, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"tensor {i} has other bits"


def model(device: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)).to(device)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, device: str) -> None:
    for i in steps:
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(i)).to(device)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def check_scale_overflow_and_clipping(
    a: optim.Adafactor | optim.Muon,
    b: optim.Adafactor | optim.Muon,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    rtol: float,
    atol: float,
) -> None:
    """``a`` steps ``first``, with scaled gradients; ``b`` steps ``second``, clipped before."""
    for step in range(3):
        set_gradients(step, first, second)
        for p in first:
            p.grad = None if p.grad is None else p.grad * 4.0
        a.grad_scale = torch.tensor(4.0, device=first[0].device)
        norm = a.step(max_norm=0.5)
        torch.testing.assert_close(norm, optim.clip_grad_norm_(second, 0.5))
        b.step()
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
    before = copy.deepcopy((first, a.state_dict()["state"]))
    a.found_inf = torch.tensor(1.0, device=first[0].device)
    first[0].grad.fill_(float("inf"))
    a.step()
    assert_same(first, before[0])
    for i, state in before[1].items():
        for key, value in state.items():
            assert torch.equal(a.state_dict()["state"][i][key], value), key


def replayed(make: Callable[[], tuple[list[Tensor], Any]], turns: int = 10) -> list[list[Tensor]]:
    """Parameters after `turns` steps with clipping behind a first one, without one wait; and after as many replays."""
    results = []
    for captured in (False, True):
        those, optimizer = make()
        set_gradients(0, those, skip=False)
        optimizer.step(max_norm=1.0)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step(max_norm=1.0)
            for _ in range(turns):
                graph.replay()
        else:
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(turns):
                    optimizer.step(max_norm=1.0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append([p.detach().clone() for p in those])
    return results
