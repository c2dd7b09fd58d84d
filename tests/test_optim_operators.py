# SPDX-License-Identifier: Apache-2.0
"""The operators of optimizers against plain PyTorch, their contract with torch, and bad arguments in words."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import fastkern
import pytest
import torch
from fastkern import optim
from fastkern.specs._accuracy import assert_accurate
from fastkern.specs.optim import OPTIM_SPECS, OptimSpec
from harness.optim import assert_same, model, train
from torch import Tensor

Arguments = dict[str, Any]

rows = pytest.mark.parametrize("row", [pytest.param(s, id=s.name) for s in OPTIM_SPECS])
SHAPES = ((), (1,), (0, 3), (63,), (4, 5), (8193,))
STEP = 4  # that is done
TAIL = {"maximize": False, "rounding": 0, "seed": 0, "lr_tensor": None, "grad_scale": None, "found_inf": None,
        "grad_factor": None}  # fmt: skip


def arguments(
    spec: OptimSpec, device: str, dtype: torch.dtype = torch.float32, variant: int = 0, shapes: Any = SHAPES
) -> Arguments:
    """All of the operator's, in its order."""
    numbers = {**spec.numbers, **spec.variants[variant]}
    without = numbers.pop("without", frozenset())
    generator = torch.Generator().manual_seed(5)

    def made(name: str) -> list[Tensor]:
        if name in without:
            return []
        if name in spec.scalars:
            return [torch.full((), 0.5, device=device) for _ in shapes]
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        if name in spec.squares:
            values = [v.square() + 1.0 for v in values]  # of gradients larger than their average
        elif name == "grad_avgs":
            values = [0.1 * v.tanh() for v in values]
        return [v.to(device, dtype) for v in values]

    steps = [torch.full((), float(STEP), device=device) for _ in shapes]
    lists = {"params": made("p"), "grads": made("g"), "steps": steps, "extras": [], "scales": []}
    return {**lists, **{name: made(name) for name in spec.states}, "lr": 0.05, **numbers, **TAIL}


def by_reference(spec: OptimSpec, given: Arguments, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """What the lists are after a step in plain PyTorch."""
    lists = {n: [t.detach().to("cpu", dtype, copy=True) for t in given[n]] for n in ("params", "grads", *spec.states)}
    numbers = {name: given[name] for name in ("lr", *spec.numbers)}
    for i, (p, g) in enumerate(zip(lists["params"], lists["grads"], strict=True)):
        states = [lists[name][i] if lists[name] else None for name in spec.states]
        spec.reference(p, -g if given["maximize"] else g, STEP + 1, *states, **numbers)
    return lists


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "variant"), [pytest.param(s, i, id=f"{s.name}-{i}") for s in OPTIM_SPECS for i in range(len(s.variants))]
)
def test_values(row: OptimSpec, variant: int, device: str) -> None:
    """Parameters and states after a step; the error at most twice that of plain PyTorch in the same type."""
    for dtype in (torch.float32, torch.bfloat16):
        given = arguments(row, device, dtype, variant)
        given["maximize"] = dtype == torch.bfloat16
        truth, plain = by_reference(row, given, torch.float64), by_reference(row, given, dtype)
        row.op(**given)
        for name in ("params", *row.states):
            for i, (ours, base, exact) in enumerate(zip(given[name], plain[name], truth[name], strict=True)):
                if name not in row.scalars and ours.numel():
                    assert_accurate(ours.cpu(), base, exact, 2.0, ulps=4, what=f"{row.name}: {name}[{i}] {dtype}")
        assert [t.item() for t in given["steps"]] == [STEP + 1.0] * len(SHAPES)


# ---- torch's contract ------------------------------------------------------------------------------------------------


@rows
def test_opcheck(row: OptimSpec, device: str) -> None:
    """What is written and nothing else, a fake, no gradient; traced as well."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if row.name == "adamw_":  # seconds
        tests += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(row.op, (), arguments(row, device, shapes=((3,), (4, 5))), test_utils=tests)


def test_compiled_operators(device: str) -> None:
    """All of them in one graph, which says what they write: the bits of eager calls."""
    given = [arguments(spec, device, shapes=((3,), (4, 5))) for spec in OPTIM_SPECS]
    expected = copy.deepcopy(given)

    def call(calls: list[Arguments]) -> list[Tensor]:
        for spec, each in zip(OPTIM_SPECS, calls, strict=True):
            spec.op(**each)
        return [each["params"][0] + 1 for each in calls]

    sums = torch.compile(call, fullgraph=True, backend="aot_eager")(given)
    for ours, plain in zip(sums, call(expected), strict=True):
        assert torch.equal(ours, plain)
    for ours, plain in zip(given, expected, strict=True):
        for name, value in plain.items():
            if isinstance(value, list):
                assert_same(ours[name], value)


def test_compiled_function(device: str) -> None:
    given = arguments(OPTIM_SPECS[0], device, shapes=((3,), (4, 5)))
    lists = [given[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")]
    expected = copy.deepcopy(lists)
    torch.compile(lambda *those: fastkern.adamw_(*those, lr=0.1), fullgraph=True, backend="aot_eager")(*lists)
    fastkern.adamw_(*expected, lr=0.1)
    for ours, plain in zip(lists, expected, strict=True):
        assert_same(ours, plain)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_compiled_steps(name: str, device: str) -> None:
    """A step inside of a compiled function runs as it does outside."""
    nets = [model(device) for _ in range(2)]
    optimizers = [getattr(optim, name)(net.parameters(), lr=1e-2) for net in nets]
    steps = [torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step]
    for net, optimizer, step in zip(nets, optimizers, steps, strict=True):
        optimizer.step = step
        train(net, optimizer, range(3), device)
    assert_same(*(list(net.parameters()) for net in nets))


def test_version_counters(device: str) -> None:
    """What autograd keeps of a parameter is known to be gone."""
    p = torch.nn.Parameter(torch.ones(4, device=device))
    loss = (p * p).sum()
    fastkern.sgd_([p], [torch.ones(4, device=device)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- bad arguments ---------------------------------------------------------------------------------------------------


def both(t: Tensor) -> list[Tensor]:
    return [t.clone(), t.clone()]


# What is changed of a good call, and what the error says after the operator's name.
BAD: dict[str, tuple[Callable[[str], Arguments], str]] = {
    "none": (lambda d: {"params": None}, r"'params'.*NoneType"),
    "a list of none": (lambda d: {"grads": [None, None]}, r"'grads'"),
    "a number": (lambda d: {"params": 3}, r"'params'.*int"),
    "a list of numbers": (lambda d: {"steps": [0, 0]}, r"'steps'"),
    "one tensor": (lambda d: {"params": torch.ones(2, 4, 3, device=d)}, r"'params'.*Tensor"),
    "a short list": (lambda d: {"grads": [torch.ones(4, 3, device=d)]}, r"grads must have 2 tensors.*got 1"),
    "a long list": (lambda d: {"steps": [torch.zeros((), device=d)] * 3}, r"steps must have 2 tensors.*got 3"),
    "extras of nothing": (lambda d: {"extras": both(torch.ones(4, 3, device=d))}, r"extras must have 0 tensors"),
    "no extras": (lambda d: {"rounding": 2}, r"extras must have 2 tensors.*got 0"),
    "another shape": (lambda d: {"grads": both(torch.ones(3, 4, device=d))}, r"grads\[0\] must have shape \(4, 3\)"),
    "another device": (
        lambda d: {"grads": [torch.ones(4, 3, device=d), torch.ones(4, 3, device="meta")]},
        r"grads\[1\] must be on the same device as params\[0\]",
    ),
    "float64": (lambda d: {"params": both(torch.ones(4, 3, device=d).double())}, r"params\[0\] must be torch.float32"),
    "integers": (lambda d: {"grads": both(torch.ones(4, 3, device=d).int())}, r"grads\[0\] must be torch.float32"),
    "complex": (lambda d: {"grads": both(torch.ones(4, 3, device=d).cfloat())}, r"grads\[0\] must be torch.float32"),
    "two types": (
        lambda d: {"params": [torch.ones(4, 3, device=d), torch.ones(4, 3, device=d).half()]},
        r"params\[1\] must be torch.float32 like params\[0\], got torch.float16",
    ),
    "sparse": (lambda d: {"grads": both(torch.ones(4, 3, device=d).to_sparse())}, r"Sparse"),
    "gaps": (
        lambda d: {"params": [torch.ones(4, 3, device=d), torch.ones(4, 6, device=d)[:, ::2]]},
        r"params\[1\] must be dense",
    ),
    "an expanded parameter": (
        lambda d: {"params": [torch.ones(4, 3, device=d), torch.ones(1, 3, device=d).expand(4, 3)]},
        r"params\[1\] must be dense",
    ),
    "an expanded gradient": (
        lambda d: {"grads": [torch.ones(1, 3, device=d).expand(4, 3), torch.ones(4, 3, device=d)]},
        r"grads\[0\] must have the strides of params\[0\]",
    ),
    "overlapping parameters": (
        lambda d: {"params": list(torch.ones(21, device=d).as_strided((2, 4, 3), (9, 3, 1)))},
        r"params\[1\] must have memory of its own, got some of params\[0\]",
    ),
    "one parameter twice": (
        lambda d: {"params": [torch.ones(4, 3, device=d)] * 2},
        r"params\[\d\] must have memory of its own, got some of params\[\d\]",
    ),
    "one step for two": (
        lambda d: {"steps": [torch.ones((), device=d)] * 2},
        r"steps\[\d\] must have memory of its own, got some of steps\[\d\]",
    ),
    "steps of float64": (
        lambda d: {"steps": both(torch.zeros((), device=d).double())},
        r"steps\[0\] must be torch.float32",
    ),
    "steps of two elements": (lambda d: {"steps": both(torch.zeros(2, device=d))}, r"steps\[0\] must have one element"),
    "a word as a rate": (lambda d: {"lr": "fast"}, r"'lr'"),
    "no rate": (lambda d: {"lr": None}, r"'lr'"),
    "a rate of two elements": (lambda d: {"lr_tensor": torch.ones(2, device=d)}, r"lr_tensor must have one element"),
    "a number as found_inf": (lambda d: {"found_inf": 1.0}, r"'found_inf'"),
    "grad_scale of integers": (
        lambda d: {"grad_scale": torch.ones((), device=d, dtype=torch.int64)},
        r"grad_scale must be torch.float32",
    ),
    "another rounding": (lambda d: {"rounding": 5}, r"rounding must be in \[0, 5\), got 5"),
    "chance in float32": (lambda d: {"rounding": 1}, r"rounding stochastic must have parameters in torch.bfloat16"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str, device: str) -> None:
    """Every operator refuses, says which argument, changes nothing, and takes the next call."""
    change, message = BAD[what]
    for spec in OPTIM_SPECS:
        good = arguments(spec, device, shapes=((4, 3), (4, 3)))
        before = copy.deepcopy(good)
        with pytest.raises((RuntimeError, NotImplementedError)) as error:
            spec.op(**{**good, **change(device)})
        text = str(error.value)
        assert re.search(message, text, re.DOTALL), f"{spec.name}: {text!r}"
        assert f"fastkern::{spec.name}" in text
        for name, value in before.items():
            if isinstance(value, list):
                assert_same(good[name], value)
        spec.op(**good)
        assert not torch.equal(good["params"][0], before["params"][0])


@rows
def test_bad_states(row: OptimSpec, device: str) -> None:
    """Each list of states by its name: missing, of another shape, in two types, overlapping a parameter."""
    for name in row.states:
        good = arguments(row, device, variant=min(1, len(row.variants) - 1), shapes=((4, 3), (4, 3)))
        lists: list[tuple[list[Tensor], str]] = []
        if name not in row.optional:
            lists.append(([], rf"{name} must"))
        if name not in row.scalars:
            lists.append(
                (both(torch.ones(3, 4, device=device)), rf"{name}\[0\] must have shape \(4, 3\), got \(3, 4\)")
            )
            two = [torch.ones(4, 3, device=device), torch.ones(4, 3, device=device).half()]
            lists.append((two, rf"{name}\[1\] must be torch.float32 like {name}\[0\], got torch.float16"))
            lists.append(([good["params"][0], two[0]], r"must have memory of its own, got some of"))
        for those, message in lists:
            with pytest.raises(RuntimeError, match=rf"fastkern::{row.name}: .*{message}"):
                row.op(**{**good, name: those})


def test_bad_options_of_functions(device: str) -> None:
    p, g = ([torch.ones(3, device=device)] for _ in range(2))
    with pytest.raises(TypeError, match="fastkern::sgd_: there is no argument 'moment'"):
        fastkern.sgd_(p, g, moment=0.9)
    with pytest.raises(RuntimeError, match=r"fastkern::sgd_: rounding must be one of .*, got 'up'"):
        fastkern.sgd_(p, g, rounding="up")
    with pytest.raises(RuntimeError, match="fastkern::sgd_: momentum_buffers must be given with a momentum"):
        fastkern.sgd_(p, g, momentum=0.9)
