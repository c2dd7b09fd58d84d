# SPDX-License-Identifier: Apache-2.0
"""fastkern.optim as a torch.optim: checkpoints, schedulers, GradScaler; clipping, refusals, graphs, the operators."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import fastkern
import pytest
import torch
from fastkern import optim
from harness.optim import CASES, assert_same, doubled, model, parameters, replayed, set_gradients, train
from torch import Tensor

Make = Callable[..., torch.optim.Optimizer]


# ---- torch.optim's ways ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["adamw amsgrad", "adam", "sgd momentum", "adagrad", "rmsprop centered", "nadam",
                                  "radam"])  # fmt: skip
@pytest.mark.parametrize("saved", [False, True])
def test_checkpoints(case: str, saved: bool, device: str) -> None:
    """torch's optimizer, ours from its checkpoint, torch's from ours: as torch's all the way."""
    name, options = CASES[case]
    through, alone = model(device), model(device)
    expected = getattr(torch.optim, name)(alone.parameters(), **options)
    train(alone, expected, range(15), device)

    def moved(state: dict[str, Any]) -> dict[str, Any]:
        if not saved:
            return copy.deepcopy(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    first = getattr(torch.optim, name)(through.parameters(), **options)
    train(through, first, range(5), device)
    second = getattr(optim, name)(through.parameters())
    second.load_state_dict(moved(first.state_dict()))
    train(through, second, range(5, 10), device)
    third = getattr(torch.optim, name)(through.parameters())
    third.load_state_dict(moved(second.state_dict()))
    train(through, third, range(10, 15), device)
    for p, q in zip(through.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master", "remainder"])
def test_own_checkpoints(rounding: str, device: str) -> None:
    """Types of states and roundings come through, and a run goes on with the same bits."""

    def make(net: torch.nn.Module) -> torch.optim.Optimizer:
        return optim.AdamW(net.parameters(), lr=1e-2, rounding=rounding, state_dtype=torch.float32, seed=9)

    def net_of() -> torch.nn.Module:
        return model(device).bfloat16()

    def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
        for i in which:
            set_gradients(i, list(net.parameters()), skip=False)
            optimizer.step()

    whole, parts = net_of(), net_of()
    steps(whole, make(whole), range(8))
    first = make(parts)
    steps(parts, first, range(4))
    second = optim.AdamW(parts.parameters())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(parts, second, range(4, 8))
    assert_same(list(parts.parameters()), list(whole.parameters()))


def test_deep_copy(device: str) -> None:
    net = model(device)
    optimizer = optim.AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer, range(3), device)
    both = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(3, 6), device)
    train(*both, range(3, 6), device)
    assert_same(list(net.parameters()), list(both[0].parameters()))


def test_schedulers(device: str) -> None:
    nets = [model(device) for _ in range(3)]
    makes: list[Make] = [torch.optim.AdamW, optim.AdamW, optim.AdamW]
    rates = [0.01, 0.01, torch.tensor(0.01, device=device)]
    for net, make, lr in zip(nets, makes, rates, strict=True):
        optimizer = make(net.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for i in range(10):
            train(net, optimizer, range(i, i + 1), device)
            schedule.step()
    for net in nets[1:]:
        for p, q in zip(net.parameters(), nets[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_closures_and_hooks(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(5, device=device))
    optimizer = optim.SGD([p], lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert calls == ["before", "after"]
    torch.testing.assert_close(p.detach(), torch.full((5,), 0.8, device=device))
    loss, norm = optimizer.step(closure, max_norm=1.0)
    torch.testing.assert_close(loss.item(), 3.2)
    torch.testing.assert_close(norm.item(), 1.6 * 5**0.5)


def test_found_inf_skips(device: str) -> None:
    """Nothing changes: no parameter, no state, no count."""
    those = parameters(device, sizes=(1, 100, 9000))
    optimizer = optim.NAdam(those, lr=1e-2)
    set_gradients(0, those, skip=False)
    optimizer.step()
    before = copy.deepcopy((those, optimizer.state_dict()["state"]))
    optimizer.grad_scale = torch.tensor(4.0, device=device)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    set_gradients(1, those, skip=False)
    optimizer.step()
    assert_same(those, before[0])
    for i, state in before[1].items():
        for key, value in state.items():
            assert torch.equal(optimizer.state_dict()["state"][i][key], value), key
    optimizer.found_inf.zero_()
    optimizer.step()
    assert not torch.equal(those[1], before[0][1])


def test_grad_scaler(device: str) -> None:
    """As without one, and a step with an overflow is left out."""
    nets = [model(device) for _ in range(2)]
    optimizers = [optim.AdamW(net.parameters(), lr=1e-2) for net in nets]
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=3)
    for i in range(6):
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(i)).to(device)
        for k, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            if k == 0:
                if i != 4:
                    loss.backward()
                    optimizer.step()
                continue
            scaler.scale(loss * (float("inf") if i == 4 else 1.0)).backward()
            if i == 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizers[1].state[next(iter(nets[1].parameters()))]["step"].item() == 5


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm(norm_type: float, max_norm: float, device: str) -> None:
    ours, theirs = ([*parameters(device), *parameters(device, torch.bfloat16, sizes=(100, 9001))] for _ in range(2))
    set_gradients(0, ours, theirs)
    found = optim.clip_grad_norm_(ours, max_norm, norm_type)
    wanted = torch.nn.utils.clip_grad_norm_(doubled_gradients(theirs), max_norm, norm_type)
    assert found.dtype == torch.float32
    assert found.shape == ()
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-6, atol=0)
    factor = min(1.0, max_norm / (wanted.item() + 1e-6))
    for p, q in zip(ours, theirs, strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, (q.grad * factor).to(p.dtype), rtol=1e-2 if p.dtype != torch.float32
                                       else 1e-6, atol=1e-7)  # fmt: skip


def doubled_gradients(those: Sequence[Tensor]) -> list[Tensor]:
    made = doubled([p for p in those if p.numel() > 0])
    for p, q in zip([p for p in those if p.numel() > 0], made, strict=True):
        q.grad = None if p.grad is None else p.grad.cpu().double()
    return made


def test_clip_grad_norm_edges(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(5, device=device))
    assert optim.clip_grad_norm_([p], 1.0).item() == 0.0
    assert optim.clip_grad_norm_([], 1.0).item() == 0.0
    p.grad = torch.full((5,), float("nan"), device=device)
    assert torch.isnan(optim.clip_grad_norm_(p, 1.0))
    with pytest.raises(RuntimeError, match="the norm must be finite"):
        optim.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="norm_type must be 2 or inf, got 3"):
        optim.clip_grad_norm_(p, 1.0, 3.0)
    p.grad = torch.ones(5, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        optim.clip_grad_norm_(p, 1.0)


def test_clipping_in_the_step(device: str) -> None:
    """As clip_grad_norm_ and then a step, with gradients left alone."""
    first, second = parameters(device), parameters(device)
    a, b = optim.SGD(first, lr=0.1), optim.SGD(second, lr=0.1)
    for step in range(3):
        set_gradients(step, first, second)
        kept = [None if p.grad is None else p.grad.clone() for p in first]
        norm = a.step(max_norm=1.0)
        torch.testing.assert_close(norm, optim.clip_grad_norm_(second, 1.0))
        b.step()
        for p, g in zip(first, kept, strict=True):
            assert g is None or torch.equal(p.grad, g)
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"AdamW: lr must be >= 0, got -1.0"),
        ({"lr": torch.ones(2)}, r"AdamW: lr must have one element, got 2"),
        ({"betas": (1.0, 0.9)}, r"AdamW: betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"eps": -1e-8}, r"AdamW: eps must be >= 0, got -1e-08"),
        ({"weight_decay": -1.0}, r"AdamW: weight_decay must be >= 0"),
        ({"rounding": "up"}, r"AdamW: rounding must be one of .*, got 'up'"),
        ({"state_dtype": torch.int8}, r"AdamW: state_dtype must be one of .*, got torch.int8"),
        ({"differentiable": True}, r"AdamW: differentiable must be False, got True"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.AdamW([torch.nn.Parameter(torch.ones(3))], **options)


def test_bad_parameters(device: str) -> None:
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(ValueError, match="parameters must be float32, float16 or bfloat16, got"):
            optim.AdamW([torch.nn.Parameter(torch.ones(3, dtype=dtype, device=device))])
    with pytest.raises(ValueError, match="'stochastic' must have no float16 parameters"):
        optim.AdamW([torch.nn.Parameter(torch.ones(3, device=device).half())], rounding="stochastic")
    with pytest.raises(ValueError, match="nesterov must have a momentum"):
        optim.SGD([torch.nn.Parameter(torch.ones(3, device=device))], nesterov=True)
    p = torch.nn.Parameter(torch.ones(4, 3, device=device))
    optimizer = optim.AdamW([p])
    p.grad = torch.ones(4, 3, device=device).to_sparse()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"AdamW: gradients must be dense, got torch.sparse_coo"):
            optimizer.step()
    p.grad = torch.ones(4, 3, device=device)
    optimizer.step()
    p.grad = torch.ones(4, 3, device=device).to_sparse()
    with pytest.raises(RuntimeError, match=r"AdamW: gradients must be dense, got torch.sparse_coo"):
        optimizer.step()
    p.grad = torch.ones(4, 3, device=device)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 2


# ---- the operators ---------------------------------------------------------------------------------------------------


def operands(device: str, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    shapes = [(3,), (4, 5), (9000,)]
    lists = {name: [torch.rand(s, device=device, dtype=dtype) for s in shapes] for name in ("p", "g", "m", "v")}
    lists["t"] = [torch.zeros((), device=device) for _ in shapes]
    return lists


def test_operator(device: str) -> None:
    o = operands(device)
    those = [torch.nn.Parameter(p.clone()) for p in o["p"]]
    optimizer = torch.optim.AdamW(those, lr=1e-2)
    for p, g, m, v in zip(those, o["g"], o["m"], o["v"], strict=True):
        p.grad = g
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    fastkern.adamw_(o["p"], o["g"], o["m"], o["v"], o["t"], lr=1e-2)
    optimizer.step()
    for p, q in zip(o["p"], those, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)
    assert all(t.item() == 1.0 for t in o["t"])
    fastkern.adamw_([], [], [], [], [], lr=1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB"])
def test_graph(name: str, cuda: None) -> None:
    """100 replays of a captured step with clipping are 100 steps."""
    options = {"lr": torch.tensor(1e-2, device="cuda"), "rounding": "stochastic", "state_dtype": torch.float32}
    if name == "SGD":
        options["momentum"] = 0.9

    def make() -> tuple[list[Tensor], torch.optim.Optimizer]:
        those = parameters("cuda", torch.bfloat16)
        return those, getattr(optim, name)(those, **options)

    assert_same(*replayed(make, turns=100))


@pytest.mark.cuda
def test_launches(cuda: None) -> None:
    """One kernel a step, two with clipping, and nothing that waits."""
    those = [torch.nn.Parameter(torch.randn(1000 + i, device="cuda")) for i in range(100)]
    optimizer = optim.AdamW(those)
    set_gradients(0, those, skip=False)
    optimizer.step(max_norm=1.0)
    for max_norm, kernels in ((None, 1), (1.0, 2)):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            set_gradients(1, those, skip=False)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step(max_norm=max_norm)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if "optim_" in e.name]
        assert len(names) == kernels, names


@pytest.mark.cuda
def test_first_step_in_a_capture_is_refused(cuda: None) -> None:
    p = torch.nn.Parameter(torch.ones(4, device="cuda"))
    p.grad = torch.ones(4, device="cuda")
    optimizer = optim.AdamW([p])
    with pytest.raises(RuntimeError, match="first step must come before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    optimizer.step()


@pytest.mark.cuda
@pytest.mark.large
def test_beyond_32_bits(cuda: None) -> None:
    """2^32 + 1 elements in one tensor."""
    n = (1 << 32) + 1
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 20 GB")
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    optim.SGD([p], lr=0.5).step()
    assert bool((p == 0.5).all())
