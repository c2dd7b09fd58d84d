# SPDX-License-Identifier: Apache-2.0
"""Optimizer states of 8 bits: against float64 and the map as it is documented, checkpoints, a small training."""

from __future__ import annotations

import copy
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import fastkern
import pytest
import torch
from fastkern import optim
from harness.optim import assert_same, set_gradients
from torch import Tensor

OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {  # options; states, and whether they have a sign
    "AdamW": ({"weight_decay": 0.1, "betas": (0.9, 0.99)}, {"exp_avg": True, "exp_avg_sq": False}),
    "Lion": ({"weight_decay": 0.1, "betas": (0.9, 0.98)}, {"exp_avg": True}),
    "SGD": ({"momentum": 0.9, "nesterov": True}, {"momentum_buffer": True}),
}


def numbers(signed: bool) -> Tensor:
    """What codes stand for: from 0 to a power of 8 (16 without a sign), from power to power, in equal parts."""
    base, ranges = (8.0, 7) if signed else (16.0, 8)
    ends = [base ** (n + 1 - ranges) for n in range(ranges)]
    values = [0.0]
    for n, end in enumerate(ends):
        values += [end / base + (end - end / base) * (i + 1) / 2**n for i in range(2**n)]
    table = torch.tensor(values, dtype=torch.float64)
    return torch.cat([table, -table]) if signed else table


def in_blocks(t: Tensor) -> Tensor:
    """Elements in the order of memory, 256 a row, zeros at the end."""
    flat = t.detach().as_strided((t.numel(),), (1,), t.storage_offset()).cpu()
    rows = -(-t.numel() // 256)
    whole = flat.new_zeros(rows * 256)
    whole[: t.numel()] = flat
    return whole.view(rows, 256)


def decoded(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """In blocks, float64."""
    return numbers(signed)[in_blocks(codes).long()] * scales.cpu().double()[:, None]


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    data = [torch.randn(n, generator=generator) for n in (4096, 5003, 20000)]
    data += [torch.randn(90, 80, generator=generator).t(), torch.randn(8193, generator=generator)[1:]]
    return [torch.nn.Parameter(t.to(dtype).to(device).as_strided(t.shape, t.stride(), t.storage_offset() and 0))
            if t._base is None or t.dim() == 2 else torch.nn.Parameter(t._base.to(dtype).to(device)[1:])
            for t in data]  # fmt: skip


def reference(name: str, step: int, p: Tensor, g: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One step in float64, lr 0.01."""
    if name == "SGD":
        m = g if step == 0 else 0.9 * states[0] + g
        return p - 0.01 * (g + 0.9 * m), [m]
    m = states[0]
    if name == "Lion":
        return p * (1 - 0.001) - 0.01 * (0.9 * m + 0.1 * g).sign(), [0.98 * m + 0.02 * g]
    m, v = 0.9 * m + 0.1 * g, 0.99 * states[1] + 0.01 * g * g
    root = (v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
    return p * (1 - 0.001) - 0.01 * (m / (1 - 0.9 ** (step + 1))) / root, [m, v]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps(name: str, device: str) -> None:
    """Each step from the states before it: the parameter to float32, states to half a distance of the map."""
    options, states = OPTIMIZERS[name]
    those = parameters(device)
    optimizer = getattr(optim, name)(those, lr=0.01, state_dtype="8bit", **options)
    for step in range(6):
        set_gradients(step, those, skip=False)
        if step == 3:
            for p in those:  # many magnitudes
                p.grad *= torch.logspace(-6, 2, p.numel(), device=device).view(p.shape)
        before = [(in_blocks(p).double(), in_blocks(torch.empty_like(p).copy_(p.grad)).double(),
                   [decoded(optimizer.state[p][k], optimizer.state[p][f"{k}_scale"], s) if step else
                    torch.zeros_like(in_blocks(p)).double() for k, s in states.items()]) for p in those]  # fmt: skip
        optimizer.step()
        for p, (value, grad, old) in zip(those, before, strict=True):
            expected, new = reference(name, step, value, grad, old)
            torch.testing.assert_close(in_blocks(p).double(), expected, rtol=1e-5, atol=2e-6)
            for (key, signed), exact in zip(states.items(), new, strict=True):
                state = optimizer.state[p]
                assert state[key].dtype == torch.uint8
                assert state[key].shape == p.shape
                scales = state[f"{key}_scale"].cpu().double()
                torch.testing.assert_close(scales, exact.abs().amax(1), rtol=2e-6, atol=1e-12)
                found = decoded(state[key], state[f"{key}_scale"], signed)
                part = (exact / scales.clamp(min=1e-300)[:, None]).abs()
                table = numbers(signed)[:128] if signed else numbers(signed)
                above = torch.searchsorted(table, part.clamp(max=1.0)).clamp(1, len(table) - 1)
                half = (table[above] - table[above - 1]) / 2
                bound = torch.where(part < table[1], table[1], half) * scales[:, None]
                assert bool(((found - exact).abs() <= bound * 1.001 + 1e-5 * exact.abs()).all()), key
                assert signed or bool(((found > 0) | (exact == 0)).all())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_encoding_again(name: str, device: str) -> None:
    """Without a gradient and without decay, codes of a momentum of 1 come back: they are numbers of the map."""
    p = torch.nn.Parameter(torch.randn(6000, device=device))
    options = {"AdamW": {"betas": (0.9, 0.99)}, "Lion": {"betas": (0.9, 0.98)}, "SGD": {"momentum": 0.9}}[name]
    optimizer = getattr(optim, name)([p], lr=0.01, state_dtype="8bit", **options)
    set_gradients(1, [p], skip=False)
    optimizer.step()
    state = copy.deepcopy(optimizer.state[p])
    for group in optimizer.param_groups:  # one and nothing: what is not added to keeps its value
        group.update({"betas": (1.0, 1.0)} if name != "SGD" else {"momentum": 1.0, "dampening": 1.0})
    optimizer.step()
    for key, value in state.items():
        if key != "step":
            assert torch.equal(optimizer.state[p][key], value), key


def test_zeros_and_sizes(device: str) -> None:
    """Zeros stay zeros; small parameters have float32 states, unless they are wanted otherwise."""
    sizes = (0, 1, 4095, 4096, 4097)
    those = [torch.nn.Parameter(torch.ones(n, device=device)) for n in sizes]
    optimizer = optim.AdamW(those, lr=0.1, weight_decay=0.0, state_dtype="8bit")
    for p in those:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(those, [torch.ones_like(p) for p in those])
    for p, n in zip(those, sizes, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][key].dtype == (torch.uint8 if n >= 4096 else torch.float32)
            assert not bool(optimizer.state[p][key].any())
        assert ("exp_avg_scale" in optimizer.state[p]) == (n >= 4096)
    every = optim.AdamW(those, state_dtype="8bit", min_8bit_size=0)
    every.step()
    assert all(every.state[p]["exp_avg"].dtype == torch.uint8 for p in those)
    assert [every.state[p]["exp_avg_sq_scale"].numel() for p in those] == [0, 1, 16, 16, 17]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "master", "remainder"])
def test_same_bits(rounding: str, device: str) -> None:
    """With other neighbours, addresses and threads; bfloat16 parameters of every rounding."""
    results = []
    for turn in range(2):
        those = parameters(device, torch.bfloat16)
        more = [torch.nn.Parameter(torch.ones(100 * i, device=device).bfloat16()) for i in range(7 * turn)]
        optimizer = optim.AdamW([*those, *more], lr=0.01, rounding=rounding, state_dtype="8bit", seed=3)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 + 2 * turn)
        for step in range(3):
            set_gradients(step, those, skip=False)
            for p in more:
                p.grad = torch.ones_like(p)
            if turn == 1:
                for p in those:
                    memory = torch.empty(p.numel() + 1, dtype=p.dtype, device=device)
                    p.grad = memory.as_strided(p.shape, p.stride(), 1).copy_(p.grad)
            optimizer.step()
        torch.set_num_threads(threads)
        states = [value for p in those for value in optimizer.state[p].values()]
        results.append([p.detach().clone() for p in those] + states)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
def test_cuda_is_cpu(cuda: None) -> None:
    for name, (options, _) in OPTIMIZERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            results = []
            for device in ("cpu", "cuda"):
                those = parameters(device, dtype)
                optimizer = getattr(optim, name)(those, lr=0.01, state_dtype="8bit", **options)
                for step in range(3):
                    set_gradients(step, those, skip=False)
                    optimizer.step(max_norm=None)
                results.append([t.cpu() for p in those for t in (p.detach(), *optimizer.state[p].values())])
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)


def test_overflow(device: str) -> None:
    """found_inf changes nothing; without it what is not finite stays in its block of 256."""
    p = torch.nn.Parameter(torch.ones(5000, device=device))
    optimizer = optim.AdamW([p], lr=0.1, state_dtype="8bit")
    p.grad = torch.randn(5000, device=device)
    optimizer.step()
    before = copy.deepcopy((p.detach(), optimizer.state[p]))
    p.grad[300], p.grad[1000] = float("nan"), float("inf")
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert torch.equal(p, before[0])
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in before[1].items())
    optimizer.found_inf.zero_()
    optimizer.step()
    optimizer.step()
    finite = p.detach().isfinite()
    blocks = torch.arange(5000, device=device) // 256
    assert bool(finite[(blocks != 1) & (blocks != 3)].all())
    assert not bool(finite[300])
    assert not bool(finite[1000])


def test_checkpoints(device: str) -> None:
    """A run goes on with the same bits; from torch's states, and back to float32."""

    def steps(those: list[Tensor], optimizer: torch.optim.Optimizer, which: range) -> None:
        for i in which:
            set_gradients(i, those, skip=False)
            optimizer.step()

    whole, parts = parameters(device), parameters(device)
    steps(whole, optim.AdamW(whole, lr=0.01, state_dtype="8bit"), range(6))
    first = optim.AdamW(parts, lr=0.01, state_dtype="8bit")
    steps(parts, first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optim.AdamW(parts)
    second.load_state_dict(torch.load(file, weights_only=True))
    steps(parts, second, range(3, 6))
    assert_same(parts, whole)

    theirs = torch.optim.AdamW(parts, lr=0.01)
    steps(parts, theirs, range(2))
    ours = optim.AdamW(parts, lr=0.01, state_dtype="8bit")
    ours.load_state_dict(theirs.state_dict())
    wanted = [theirs.state[p]["exp_avg"].clone() for p in parts]
    for p in parts:
        p.grad = None
    ours.step()
    assert all(ours.state[p]["exp_avg"].dtype == torch.uint8 for p in parts)
    for group in ours.param_groups:
        group["state_dtype"] = torch.float32
    ours.step()
    for p, average in zip(parts, wanted, strict=True):
        assert "exp_avg_scale" not in ours.state[p]
        found = ours.state[p]["exp_avg"]
        assert found.stride() == p.stride()
        assert (found - average).abs().max().item() <= average.abs().max().item() * 0.875 / 128 * 1.01
    theirs.load_state_dict(ours.state_dict())
    steps(parts, theirs, range(1))
    broken = copy.deepcopy(second.state_dict())
    del broken["state"][0]["exp_avg_scale"]
    second.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="state exp_avg of 8 bits must have exp_avg_scale beside it, got none"):
        second.step()


def test_refusals(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(5000, device=device))
    for make in (optim.Adagrad, optim.LAMB, lambda *a, **k: optim.AdamW(*a, amsgrad=True, **k)):
        with pytest.raises(ValueError, match="state_dtype must not be '8bit'"):
            make([p], state_dtype="8bit")
    with pytest.raises(ValueError, match="min_8bit_size must be >= 0, got -1"):
        optim.SGD([p], momentum=0.9, state_dtype="8bit", min_8bit_size=-1)
    assert optim.SGD([p], state_dtype="8bit").param_groups[0]["state_dtype"] == "8bit"  # no state at all


def test_operator(device: str) -> None:
    """The function on lists does what the class does, and says what is wrong."""
    p = torch.nn.Parameter(torch.randn(5000, device=device))
    p.grad = torch.randn(5000, device=device)
    q = p.detach().clone()
    codes = [torch.zeros(5000, dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.zeros(20, device=device) for _ in range(2)]
    steps = [torch.zeros((), device=device)]
    optimizer = optim.AdamW([p], lr=0.01, state_dtype="8bit")
    for _ in range(2):
        optimizer.step()
        fastkern.adamw_([q], [p.grad], [codes[0]], [codes[1]], steps, lr=0.01, scales=scales)
    state = optimizer.state[p]
    assert_same([p, *scales], [q, state["exp_avg_scale"], state["exp_avg_sq_scale"]])
    assert torch.equal(codes[0], state["exp_avg"])
    assert torch.equal(codes[1], state["exp_avg_sq"])
    lists = ([q], [p.grad], [codes[0]], [codes[1]], steps)
    with pytest.raises(RuntimeError, match=r"scales must have 2 tensors, one for each state in torch.uint8, got 1"):
        fastkern.adamw_(*lists, scales=scales[:1])
    with pytest.raises(RuntimeError, match=r"scales\[1\] must be contiguous and have shape \(20,\).*, got \(19,\)"):
        fastkern.adamw_(*lists, scales=[scales[0], scales[0][:19]])
    with pytest.raises(RuntimeError, match=r"exp_avg_sqs\[0\] must be torch.uint8 .*, got torch.float32"):
        fastkern.adamw_([q], [p.grad], [codes[0]], [q.clone()], steps, scales=scales[:1])
    with pytest.raises(RuntimeError, match=r"state_sums\[0\] must be torch.float32, .*, got torch.uint8"):
        fastkern.adagrad_([q], [p.grad], [codes[0]], steps)


def test_a_small_gpt(tmp_path: Path) -> None:
    """Trains as with float32 states, to 1 %."""
    path = Path(__file__).resolve().parent.parent / "examples" / "train_gpt.py"
    spec = importlib.util.spec_from_file_location("train_gpt_8bit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt_8bit"] = module
    spec.loader.exec_module(module)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(500)))
    size = "--device cpu --steps 40 --batch 4 --context 32 --layers 1 --width 64 --heads 2 --kv-heads 1 --lr 0.005"
    losses, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # too small for more
    for states in ("float32", "8bit"):
        options = module.parse([*size.split(), "--data", str(text), "--states", states])
        (run,) = module.train(options, module.Text(options), [module.fastkern_kernels()])
        losses.append(sum(run.losses[-10:]) / 10)
        coded = [s["exp_avg"].dtype == torch.uint8 for s in run.optimizer.state.values()]
        assert any(coded) == (states == "8bit")
    torch.set_num_threads(threads)
    assert losses[0] < 2.5
    assert abs(losses[1] - losses[0]) < 0.01 * losses[0]
    del sys.modules["train_gpt_8bit"]
