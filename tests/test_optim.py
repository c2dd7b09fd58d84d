# SPDX-License-Identifier: Apache-2.0
"""fastkern.optim against torch.optim and float64; states, checkpoints, roundings, clipping."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import fastkern
import pytest
import torch
from fastkern import optim
from torch import Tensor

SIZES = (0, 1, 7, 63, 64, 65, 1023, 65537)
STEPS = 20

Make = Callable[..., torch.optim.Optimizer]

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
cases = pytest.mark.parametrize("case", CASES)


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


# ---- formulas --------------------------------------------------------------------------------------------------------


@cases
def test_float32(case: str, device: str) -> None:
    name, options = CASES[case]
    ours, theirs = parameters(device), parameters(device)
    truth = doubled(theirs)
    a = getattr(optim, name)(ours, **options)
    b, c = (getattr(torch.optim, name)(those, **options) for those in (theirs, truth))
    for step in range(STEPS):
        set_gradients(step, ours, theirs, truth)
        for optimizer in (a, b, c):
            optimizer.step()
    assert_close(ours, theirs, truth)
    for p, q in zip(ours, theirs, strict=True):
        if p not in a.state:  # torch's Adagrad has states of what never had a gradient
            continue
        assert set(b.state[q]) <= set(a.state[p])
        for key, value in b.state[q].items():
            assert a.state[p][key].shape == value.shape
            torch.testing.assert_close(a.state[p][key].cpu(), value.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["adamw", "adam", "sgd nesterov", "rmsprop centered", "nadam", "radam"])
def test_16_bits(case: str, dtype: torch.dtype, device: str) -> None:
    name, options = CASES[case]
    if dtype == torch.float16 and name != "SGD":  # torch's eps becomes 0
        options = {**options, "eps": 1e-3}
    ours, theirs = parameters(device, dtype), parameters(device, dtype)
    truth = doubled(theirs)
    a = getattr(optim, name)(ours, **options)
    b, c = (getattr(torch.optim, name)(those, **options) for those in (theirs, truth))
    for step in range(STEPS):
        set_gradients(step, ours, theirs)
        for p, q in zip(theirs, truth, strict=True):
            q.grad = None if p.grad is None else p.grad.cpu().double()
        for optimizer in (a, b, c):
            optimizer.step()
    assert_close(ours, theirs, truth)


def lion_reference(p: Tensor, g: Tensor, m: Tensor, lr: float, betas: tuple[float, float], decay: float) -> None:
    update = (m * betas[0] + g * (1 - betas[0])).sign()
    p.mul_(1 - lr * decay).sub_(lr * update)
    m.mul_(betas[1]).add_(g, alpha=1 - betas[1])


def lamb_reference(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, decay: float) -> None:
    m.mul_(0.9).add_(g, alpha=0.1)
    v.mul_(0.999).add_(g * g, alpha=0.001)
    u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + decay * p
    a, b = p.norm(), u.norm()
    p.sub_(lr * (a / b if a > 0 and b > 0 else 1.0) * u)


@pytest.mark.parametrize("maximize", [False, True])
def test_lion(maximize: bool, device: str) -> None:
    ours = parameters(device)
    truth, single = ([p.detach().cpu().to(dtype) for p in ours] for dtype in (torch.float64, torch.float32))
    averages = [torch.zeros_like(p) for p in (*truth, *single)]
    optimizer = optim.Lion(ours, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98), maximize=maximize)
    for step in range(STEPS):
        set_gradients(step, ours)
        optimizer.step()
        for p, q, m in zip((*ours, *ours), (*truth, *single), averages, strict=True):
            if p.grad is not None:
                lion_reference(q, p.grad.cpu().to(q.dtype) * (-1 if maximize else 1), m, 1e-2, (0.9, 0.98), 0.1)
    assert_close(ours, single, truth)
    p = torch.nn.Parameter(torch.ones(9, device=device))
    p.grad = torch.zeros(9, device=device)
    optim.Lion([p], lr=0.5).step()
    assert torch.equal(p, torch.ones(9, device=device))  # sign(0) = 0


def test_lamb(device: str) -> None:
    ours = parameters(device)
    truth = [p.detach().cpu().double() for p in ours]
    states = [(torch.zeros_like(p), torch.zeros_like(p)) for p in truth]
    optimizer = optim.LAMB(ours, lr=1e-2, weight_decay=0.05)
    for step in range(STEPS):
        set_gradients(step, ours, skip=False)
        optimizer.step()
        for p, q, (m, v) in zip(ours, truth, states, strict=True):
            lamb_reference(q, p.grad.cpu().double(), m, v, step + 1, 1e-2, 0.05)
    for p, q in zip(ours, truth, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q, rtol=2e-5, atol=2e-5)


def test_large_tensor(device: str) -> None:
    """More chunks than blocks run at a time, many lengths at once, against torch."""
    generator = torch.Generator().manual_seed(3)
    sizes = [278011, *range(1, 40), 8191, 8192, 8193, 1 << 20]
    ours = [torch.nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in sizes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = optim.AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(3):
        set_gradients(step, ours, theirs, skip=False)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_many_tensors(device: str) -> None:
    """More gradients than fit the arguments of a launch, in one place and then in others."""
    ours = [torch.nn.Parameter(torch.randn(5, device=device)) for _ in range(700)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = optim.AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    kept = []
    for step in range(4):
        set_gradients(step, ours, theirs)
        if step == 1:
            kept = [p.grad for p in ours]  # so that the next ones lie elsewhere
        a.step()
        b.step()
    assert len(kept) == 700
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "master", "remainder"])
def test_repeatable(rounding: str, device: str) -> None:
    """Also in parts of another order and with other neighbours: a parameter's bits are its own."""
    results = []
    for turn in range(2):
        those = parameters(device, torch.bfloat16)
        optimizer = optim.AdamW(those, lr=1e-2, rounding=rounding, seed=3)
        for step in range(4):
            set_gradients(step, those)
            if turn == 1:  # not aligned
                for p in those:
                    if p.grad is not None and p.grad.is_contiguous():
                        memory = torch.empty(p.numel() + 1, dtype=p.dtype, device=device)
                        p.grad = memory[1:].view(p.shape).copy_(p.grad)
            optimizer.step()
        results.append([p.detach().clone() for p in those])
    assert_same(*results)


def test_remainder_is_master(device: str) -> None:
    """16 bits beside the parameter are as good as 32."""
    first, second = parameters(device, torch.bfloat16), parameters(device, torch.bfloat16)
    a = optim.AdamW(first, lr=1e-2, state_dtype=torch.float32, rounding="master")
    b = optim.AdamW(second, lr=1e-2, state_dtype=torch.float32, rounding="remainder")
    for step in range(STEPS):
        set_gradients(step, first, second)
        a.step()
        b.step()
    assert_same(first, second)
    for p, q in zip(first, second, strict=True):
        if "master" not in a.state.get(p, {}):
            continue
        high, low = bits(q).to(torch.int32) << 16, b.state[q]["remainder"].contiguous().to(torch.int32)
        assert torch.equal(bits(a.state[p]["master"]), high + low)
    exact = [torch.nn.Parameter(p.detach().float()) for p in parameters(device, torch.bfloat16)]
    c = optim.AdamW(exact, lr=1e-2)
    for step in range(STEPS):
        set_gradients(step, first, exact)
        for p, q in zip(first, exact, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        c.step()
    those = [i for i, p in enumerate(first) if "master" in a.state.get(p, {})]
    assert_same([a.state[first[i]]["master"] for i in those], [exact[i] for i in those])


def test_kahan_keeps_small_steps(device: str) -> None:
    """Steps below a unit in the last place add up."""
    plain, kahan = (torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device)) for _ in range(2))
    a, b = optim.SGD([plain], lr=1e-4), optim.SGD([kahan], lr=1e-4, rounding="kahan")
    for _ in range(100):
        for p in (plain, kahan):
            p.grad = torch.ones_like(p)
        a.step()
        b.step()
    assert torch.equal(plain.float(), torch.ones(1000, device=device))
    total = kahan.float() + b.state[kahan]["compensation"].float()
    torch.testing.assert_close(total, torch.full((1000,), 0.99, device=device), rtol=2e-4, atol=0)


def test_stochastic_rounding_is_unbiased(device: str) -> None:
    """The mean over 4096 repetitions is the value that is rounded."""
    repetitions, values = 4096, torch.linspace(0.5, 2.0, 64, device=device)
    p = torch.nn.Parameter(torch.ones(repetitions, 64, dtype=torch.bfloat16, device=device))
    start = p.detach().float().mean(0)
    p.grad = (start - values).expand(repetitions, 64).contiguous().to(torch.bfloat16)
    exact = start - p.grad[0].float() * 0.001
    optim.SGD([p], lr=0.001, rounding="stochastic", seed=5).step()
    mean = p.detach().float().mean(0)
    assert not torch.equal(p.detach().float().std(0), torch.zeros(64, device=device))
    # Of 64 columns of a deviation of at most half a unit (2^-8) each.
    assert (mean - exact).abs().max().item() < 4 * 2**-9 / repetitions**0.5
    assert abs((mean - exact).mean().item()) < 3e-5


def test_stochastic_rounding_depends_on_the_element_alone(device: str) -> None:
    """Not on the memory, nor on the tensors beside it; on seed, step and number."""

    def run(offset: int, others: int, seed: int) -> Tensor:
        memory = torch.ones(20000 + offset, dtype=torch.bfloat16, device=device)
        p = torch.nn.Parameter(memory[offset:])
        rest = [torch.nn.Parameter(torch.ones(100 + i, dtype=torch.bfloat16, device=device)) for i in range(others)]
        for q in (p, *rest):
            q.grad = torch.full_like(q, 0.3)
        optim.SGD([p, *rest], lr=1e-3, rounding="stochastic", seed=seed).step()
        return p.detach()

    first = run(0, 0, 1)
    assert_same([first, first], [run(1, 0, 1), run(0, 5, 1)])
    assert not torch.equal(first, run(0, 0, 2))


@pytest.mark.cuda
def test_cuda_is_cpu(cuda: None) -> None:
    """The formulas are the same, and every operation rounds to nearest."""
    for name in ("AdamW", "SGD", "Lion", "Adagrad", "RMSprop", "NAdam", "RAdam"):
        for dtype, rounding in ((torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "kahan")):
            results = []
            for device in ("cpu", "cuda"):
                those = parameters(device, dtype)
                optimizer = getattr(optim, name)(those, lr=1e-2, weight_decay=0.1, rounding=rounding)
                for step in range(3):
                    set_gradients(step, those)
                    optimizer.step()
                results.append([p.detach().cpu() for p in those])
            assert_same(*results)


# ---- types, layouts, groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_mixed_types(state_dtype: torch.dtype, grad_dtype: torch.dtype, device: str) -> None:
    """Gradients and states in types of their own, against float32 with the operands rounded."""
    p = torch.nn.Parameter(torch.randn(3001, device=device).bfloat16())
    p.grad_dtype = grad_dtype if hasattr(p, "grad_dtype") else None
    if not hasattr(p, "grad_dtype") and grad_dtype != p.dtype:
        pytest.skip("this torch has gradients of the parameter's type only")
    q = torch.nn.Parameter(p.detach().float())
    a = optim.AdamW([p], lr=1e-2, state_dtype=state_dtype, rounding="master")
    b = torch.optim.AdamW([q], lr=1e-2)
    for _ in range(5):
        p.grad = torch.randn(3001, device=device).to(grad_dtype)
        q.grad = p.grad.float()
        a.step()
        b.step()
    assert a.state[p]["exp_avg"].dtype == state_dtype
    tolerance = 1e-5 if state_dtype == torch.float32 else 2e-3
    torch.testing.assert_close(a.state[p]["master"], q.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(p.detach(), a.state[p]["master"].bfloat16(), rtol=1e-2, atol=0)


def test_groups(device: str) -> None:
    """Each group's own numbers, more groups than one launch takes, and one that comes later."""

    def groups(those: Sequence[Tensor]) -> list[dict[str, Any]]:
        return [{"params": [p], "lr": 1e-3 * (i + 1), "weight_decay": 0.01 * i, "betas": (0.9, 0.99 - 0.001 * i)}
                for i, p in enumerate(those)]  # fmt: skip

    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, 100 + i, device=device)) for i in range(40)]
                    for _ in range(2))  # fmt: skip
    a, b = optim.AdamW(groups(ours[:39])), torch.optim.AdamW(groups(theirs[:39]))
    for step in range(6):
        if step == 3:
            for optimizer, those in ((a, ours), (b, theirs)):
                optimizer.add_param_group({"params": [those[39]], "lr": 0.1})
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_odd_gradients(device: str) -> None:
    """Expanded, transposed and strided gradients; channels-last parameters."""
    images = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    ours = [torch.nn.Parameter(torch.randn(8, 6, device=device)), torch.nn.Parameter(images)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = optim.AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    forms = [
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], -1)[..., ::2],
        lambda t: t[..., :1].expand(t.shape),
        lambda t: t,
    ]
    for form in (*forms, *forms):
        for p, q in zip(ours, theirs, strict=True):
            g = torch.randn(p.shape, device=device)
            p.grad, q.grad = form(g), form(g).clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_parameters_that_move(device: str) -> None:
    """`p.data` of another place, and of another type."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 50, device=device)) for _ in range(2))
    a, b = optim.SGD([p], lr=0.1, momentum=0.9), torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for step in range(4):
        if step == 2:
            p.data = p.data.clone()
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        a.step()
        b.step()
    torch.testing.assert_close(p, q)
    p.grad = None
    p.data = p.data.bfloat16()
    p.grad = torch.ones_like(p)
    a.step()
    assert p.dtype == torch.bfloat16


def test_version_counters(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(4, device=device))
    frozen = torch.nn.Parameter(torch.ones(4, device=device))
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    before = frozen._version
    optim.SGD([p, frozen], lr=0.1).step()
    assert frozen._version == before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- torch.optim's ways ----------------------------------------------------------------------------------------------


def model(device: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)).to(device)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, device: str) -> None:
    for i in steps:
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(i)).to(device)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


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
    results = []
    for captured in (False, True):
        those = parameters("cuda", torch.bfloat16)
        optimizer = getattr(optim, name)(those, **options)
        set_gradients(0, those, skip=False)
        optimizer.step(max_norm=1.0)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step(max_norm=1.0)
            for _ in range(100):
                graph.replay()
        else:
            for _ in range(100):
                optimizer.step(max_norm=1.0)
        results.append([p.detach().clone() for p in those])
    assert_same(*results)


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
