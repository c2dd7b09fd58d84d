# SPDX-License-Identifier: Apache-2.0
"""fastkern.optim.Muon against torch.optim.Muon and float64; AdamW in the same object; torch.optim's ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fastkern import optim
from fastkern.optim import muon
from harness.optim import assert_close, assert_same, bits, check_scale_overflow_and_clipping, replayed, set_gradients
from torch import Tensor

SHAPES = [(20, 30), (30, 20), (20, 30), (64, 64), (1, 7), (33, 5), (20, 30), (0, 4)]
STEPS = 8


def matrices(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Several of one shape, tall and wide ones, one transposed and one with gaps."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    data += [torch.randn(30, 20, generator=generator).to(device, dtype).t()]
    data += [torch.randn(20, 50, generator=generator).to(device, dtype)[:, 3:33]]
    return [torch.nn.Parameter(t) for t in data]


def truth_step(p: Tensor, m: Tensor, g: Tensor, o: dict[str, Any]) -> None:
    """All of it in float64."""
    momentum, lr = o.get("momentum", 0.95), o["lr"]
    m.mul_(momentum).add_(g, alpha=1 - momentum)
    u = g * (1 - momentum) + m * momentum if o.get("nesterov", True) else m.clone()
    u = u / u.norm().clamp(min=1e-7)
    for _ in range(o.get("ns_steps", 5)):
        a = u @ u.T
        u = 3.4445 * u + (-4.7750 * a + 2.0315 * a @ a) @ u
    rows, columns = p.shape
    match = o.get("adjust_lr_fn") == "match_rms_adamw"
    scale = 0.2 * max(rows, columns) ** 0.5 if match else max(1.0, rows / max(columns, 1)) ** 0.5
    p.mul_(1 - lr * o.get("weight_decay", 0.1)).sub_(lr * scale * u)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"lr": 0.02}),
        (torch.float32, {"lr": 0.02, "nesterov": False, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}),
        (torch.bfloat16, {"lr": 0.02, "momentum": 0.9, "ns_steps": 3, "adjust_lr_fn": "original"}),
    ],
)
def test_torch(dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    """Errors against float64 at most twice torch's; the same states."""
    ours, theirs = matrices(device, dtype), matrices(device, dtype)
    truth = [p.detach().cpu().double() for p in ours]
    averages = [torch.zeros_like(p) for p in truth]
    a, b = optim.Muon(ours, **options), torch.optim.Muon([p for p in theirs if p.numel()], **options)
    for step in range(STEPS):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
        for p, m, q in zip(truth, averages, ours, strict=True):
            if q.grad is not None and q.numel():
                truth_step(p, m, q.grad.cpu().double(), options)
    # Of all of them at once: what 16 bits do to a small matrix is chance.
    assert_close(*([torch.cat([p.detach().cpu().flatten() for p in those])] for those in (ours, theirs, truth)))
    for p, q in zip(ours, theirs, strict=True):
        if q in b.state:
            assert set(a.state[p]) == set(b.state[q]) == {"momentum_buffer"}
            torch.testing.assert_close(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])


def test_float32_iteration(device: str) -> None:
    ours = matrices(device)
    truth = [p.detach().cpu().double() for p in ours]
    averages = [torch.zeros_like(p) for p in truth]
    optimizer = optim.Muon(ours, lr=0.02, maximize=True, ns_dtype=torch.float32)
    for step in range(3):
        set_gradients(step, ours, skip=False)
        optimizer.step()
        for p, m, q in zip(truth, averages, ours, strict=True):
            truth_step(p, m, -q.grad.cpu().double(), {"lr": 0.02})
    for p, q in zip(ours, truth, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q, rtol=1e-4, atol=1e-4)


def test_newton_schulz(device: str) -> None:
    """Singular values near 1, the transpose of the transpose, a scale, and no NaN of nothing."""
    x = torch.randn(3, 17, 40, device=device)
    x[2] = 0.0
    wide = muon.newton_schulz(x.clone(), (3.4445, -4.7750, 2.0315), 1e-7, 5)
    values = torch.linalg.svdvals(wide[:2].cpu())
    assert values.min().item() > 0.6
    assert values.max().item() < 1.3
    assert torch.equal(wide[2], torch.zeros_like(wide[2]))
    tall = muon.newton_schulz(x.mT.contiguous(), (3.4445, -4.7750, 2.0315), 1e-7, 5, scale=3.0)
    torch.testing.assert_close(tall, 3.0 * wide.mT, rtol=1e-3, atol=1e-3)


# ---- AdamW in the same object ----------------------------------------------------------------------------------------


def test_adamw_for_the_rest(device: str) -> None:
    """A bias and a group marked so are updated as by AdamW alone, matrices as by Muon alone; rates have a schedule."""

    def make() -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device))
                for s in ((9, 5), (9,), (5, 9), (4, 3, 2), (50, 8))]  # fmt: skip

    ours, theirs = make(), make()
    groups = [{"params": ours[:4], "lr": 0.02, "adamw_weight_decay": 0.3}]
    groups += [{"params": [ours[4]], "use_muon": False, "lr": 0.01, "betas": (0.8, 0.9)}]
    a = optim.Muon(groups, adamw_lr=3e-3)
    assert [len(g["params"]) for g in a.param_groups] == [2, 2, 1]
    assert [g["use_muon"] for g in a.param_groups] == [True, False, False]
    assert [g["lr"] for g in a.param_groups] == [0.02, 3e-3, 0.01]
    matrix = optim.Muon([theirs[0], theirs[2]], lr=0.02)
    others = optim.AdamW(
        [
            {"params": [theirs[1], theirs[3]], "lr": 3e-3, "weight_decay": 0.3},
            {"params": [theirs[4]], "lr": 0.01, "betas": (0.8, 0.9)},
        ]
    )
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 6) for o in (a, matrix, others)]
    for step in range(6):
        set_gradients(step, ours, theirs)
        for optimizer, schedule in zip((a, matrix, others), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert_same(ours, theirs)
    before = len(a.param_groups)
    with pytest.raises(ValueError, match=r"Muon: betas\[0\] must be in"):
        a.add_param_group({"params": make()[:2], "adamw_betas": (1.0, 0.9)})
    assert len(a.param_groups) == before


def test_named_parameters(device: str) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)).to(device)
    optimizer = optim.Muon(net.named_parameters(), lr=0.1)
    assert [g["param_names"] for g in optimizer.param_groups] == [["0.weight", "1.weight"], ["0.bias", "1.bias"]]
    with pytest.raises(TypeError, match="ordered"):
        optim.Muon([{"params": set(net.parameters())}])


def test_flatten(device: str) -> None:
    """Convolutions as matrices: the bits of the flattened ones."""
    generator = torch.Generator().manual_seed(3)
    data = [
        torch.randn(8, 3, 3, 3, generator=generator).to(device),
        torch.randn(6, 4, 5, generator=generator).to(device),
    ]
    ours = [torch.nn.Parameter(t.clone()) for t in data]
    ours[0].data = ours[0].data.contiguous(memory_format=torch.channels_last)
    theirs = [torch.nn.Parameter(t.clone().flatten(1)) for t in data]
    a, b = optim.Muon(ours, lr=0.1, flatten=True), optim.Muon(theirs, lr=0.1)
    assert len(a.param_groups) == 1
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(device)
            p.grad = torch.empty_like(p).copy_(q.grad.view(p.shape))
        a.step()
        b.step()
    assert_same([p.detach().flatten(1) for p in ours], theirs)


# ---- numbers of 16 bits ----------------------------------------------------------------------------------------------


def run(rounding: str, device: str, skip: Sequence[int] = (), steps: int = 3) -> tuple[list[Tensor], optim.Muon]:
    those = matrices(device, torch.bfloat16)
    optimizer = optim.Muon(those, lr=0.02, rounding=rounding, seed=7)
    for step in range(steps):
        set_gradients(step, those, skip=False)
        for i in skip:
            those[i].grad = None
        optimizer.step()
    return those, optimizer


def test_roundings(device: str) -> None:
    """Each repeats; a parameter's bits are its own; 16 bits beside it are as good as 32."""
    plain = run("nearest", device)[0]
    for rounding in ("stochastic", "kahan"):
        those = run(rounding, device)[0]
        assert_same(those, run(rounding, device)[0])
        assert not torch.equal(those[3], plain[3])
    alone = run("stochastic", device, skip=(1, 4))[0]
    stochastic = run("stochastic", device)[0]
    assert_same([alone[3], alone[5]], [stochastic[3], stochastic[5]])
    (first, a), (second, b) = run("master", device), run("remainder", device)
    assert_same(first, second)
    master, low = a.state[first[3]]["master"], b.state[second[3]]["remainder"].to(torch.int32)
    assert torch.equal(bits(master), (bits(second[3]).to(torch.int32) << 16) + low)


# ---- torch.optim's ways ----------------------------------------------------------------------------------------------


def test_checkpoints(device: str) -> None:
    """torch's, ours from its checkpoint, torch's from ours: as torch's all the way."""
    through, alone = ([p for p in matrices(device) if p.numel()] for _ in range(2))
    expected = torch.optim.Muon(alone, lr=0.02, nesterov=False)
    optimizer: torch.optim.Optimizer = torch.optim.Muon(through, lr=0.02, nesterov=False)
    for step in range(6):
        if step in (2, 4):
            following = (optim.Muon if step == 2 else torch.optim.Muon)(through)
            following.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = following
        set_gradients(step, through, alone, skip=False)
        optimizer.step()
        expected.step()
    for p, q in zip(through, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2e-3)


def test_own_checkpoints_and_copies(device: str) -> None:
    """With AdamW's part and stochastic rounding, a run goes on with the same bits."""

    def make() -> list[Tensor]:
        return [*matrices(device, torch.bfloat16), torch.nn.Parameter(torch.ones(40, device=device).bfloat16())]

    whole, parts = make(), make()
    a = optim.Muon(whole, lr=0.02, rounding="stochastic", seed=3)
    b = optim.Muon(parts, lr=0.02, rounding="stochastic", seed=3)
    for step in range(5):
        if step == 2:
            state = copy.deepcopy(b.state_dict())
            b = optim.Muon(parts)
            b.load_state_dict(state)
        if step == 4:
            parts, b = copy.deepcopy((parts, b))
        set_gradients(step, whole, parts, skip=False)
        a.step()
        b.step()
    assert_same(parts, whole)


def test_scale_overflow_and_clipping(device: str) -> None:
    """Inside the step: as before it, with gradients left alone; after an overflow nothing changes."""
    first, second = ([*matrices(device), torch.nn.Parameter(torch.ones(9, device=device))] for _ in range(2))
    made = (optim.Muon(those, lr=0.02, ns_dtype=torch.float32) for those in (first, second))
    check_scale_overflow_and_clipping(*made, first, second, rtol=1e-4, atol=1e-5)


def test_rates_as_tensors_and_closures(device: str) -> None:
    first, second = matrices(device), matrices(device)
    a, b = optim.Muon(first, lr=torch.tensor(0.02, device=device)), optim.Muon(second, lr=0.02)
    set_gradients(0, first, second, skip=False)
    assert a.step(lambda: 3) == 3
    b.step()
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_steps": 0}, r"Muon: ns_steps must be in \[1, 100\), got 0"),
        ({"ns_coefficients": (1.0, 2.0)}, r"Muon: ns_coefficients must be three numbers, got 2"),
        ({"adjust_lr_fn": "none"}, r"Muon: adjust_lr_fn must be one of .*, got 'none'"),
        ({"ns_dtype": torch.float64}, r"Muon: ns_dtype must be .*, got torch.float64"),
        ({"momentum": -0.1}, r"Muon: momentum must be >= 0, got -0.1"),
        ({"eps": -1.0}, r"Muon: eps must be >= 0, got -1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Muon([torch.nn.Parameter(torch.ones(3, 3))], **options)


def test_epsilon_of_adamw(device: str) -> None:
    """Of the parameters that are no matrices: as AdamW's own."""
    first, second = ([torch.nn.Parameter(torch.ones(9, device=device))] for _ in range(2))
    a = optim.Muon(first, adamw_lr=0.02, adamw_betas=(0.9, 0.99), adamw_eps=0.5, adamw_weight_decay=0.0)
    b = optim.AdamW(second, lr=0.02, betas=(0.9, 0.99), eps=0.5, weight_decay=0.0)
    set_gradients(0, first, second, skip=False)
    a.step()
    b.step()
    assert_same(first, second)


def test_bad_gradients(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(4, 3, device=device))
    optimizer = optim.Muon([p])
    p.grad = torch.ones(4, 3, device=device).to_sparse()
    with pytest.raises(RuntimeError, match=r"Muon: gradients must be dense, got torch.sparse_coo"):
        optimizer.step()
    p.grad = torch.ones(4, 3, device=device)
    optimizer.step()
    assert bool(p.isfinite().all())


@pytest.mark.cuda
def test_graph(cuda: None) -> None:
    """A captured step with clipping, AdamW's part and a rate in memory waits for nothing and replays the same bits."""

    def make() -> tuple[list[Tensor], optim.Muon]:
        those = [*matrices("cuda", torch.bfloat16), torch.nn.Parameter(torch.ones(40, device="cuda").bfloat16())]
        return those, optim.Muon(those, lr=torch.tensor(0.02, device="cuda"), rounding="stochastic")

    assert_same(*replayed(make))
