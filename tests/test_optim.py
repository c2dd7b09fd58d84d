# SPDX-License-Identifier: Apache-2.0
"""fastkern.optim against torch.optim and float64: formulas, roundings, types, layouts, groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fastkern import optim
from harness.optim import CASES, STEPS, assert_close, assert_same, bits, doubled, parameters, set_gradients
from torch import Tensor

cases = pytest.mark.parametrize("case", CASES)


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
    sizes = [278011, *range(1, 40), 8191, 8193, 16383, 16384, 16385, 1 << 20]
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


def test_subclasses(device: str) -> None:
    """Parameters and gradients that are not torch's own classes, first new in each step, then the same."""

    class Weight(torch.nn.Parameter):
        pass

    class Gradient(torch.Tensor):
        pass

    p, q = Weight(torch.ones(50, device=device)), torch.nn.Parameter(torch.ones(50, device=device))
    a, b = optim.SGD([p], lr=0.1, momentum=0.9), torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for step in range(12):
        if step < 6:
            g = torch.full((50,), float(step), device=device)
            p.grad = g.as_subclass(Gradient) if step % 2 else g
            q.grad = g.clone()
        else:
            for those in (p, q):
                those.grad += 1.0
        a.step()
        b.step()
    torch.testing.assert_close(p.detach().as_subclass(torch.Tensor), q.detach())


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
