# SPDX-License-Identifier: Apache-2.0
"""What the benchmark calls: every row is right on the CPU, and peers get their own arguments."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastkern import specs
from fastkern.bench import attention_fp8, optimizers
from fastkern.bench.accuracy import check
from fastkern.bench.cases import Case

CPU = torch.device("cpu")
ROWS = [*specs.SPECS, *attention_fp8.SPECS, *optimizers.SPECS]


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in ROWS if s.name != "linear_cross_entropy"])
def test_every_row_is_right_on_the_cpu(spec: specs.OpSpec) -> None:
    """Its benchmark inputs, reference and directions belong together; linear_cross_entropy's reference is compiled."""
    row = spec.benchmarked
    dims = {k: min(v, 64) for k, v in row.bench_dims[0].items()}
    case = Case(row, dims, torch.float32, CPU)
    directions = ["forward", "backward"] if row.differentiable else ["forward"]
    for direction, verdict in check(case, {"fastkern": row.function}, directions)["fastkern"].items():
        assert verdict.correct is True, f"{direction}: {verdict.error}"
        assert case.traffic(direction == "backward") > 0


# ---- peers that are not here -----------------------------------------------------------------------------------------


def _installed(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A package of that name, its parents with it."""
    module = types.ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            _installed(monkeypatch, parent)
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None = None) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


THIRD_PARTY = ("apex", "bitsandbytes", "flag_gems", "flash_attn", "xformers")


def _step(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int, **numbers: float) -> None:
    """torch's, of numbers under the names of others."""
    assert numbers == {
        "lr": optimizers.LR, "eps": optimizers.EPS, "decay": optimizers.DECAY,
        "beta1": optimizers.BETAS[0], "beta2": optimizers.BETAS[1],
    }  # fmt: skip
    optimizers.adamw_foreach(param=p, grad=g, exp_avg=m, exp_avg_sq=v, step=torch.tensor(step - 1.0))


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "flash_attn", "swiglu", "geglu", "cross_entropy", "adamw_"])
def test_peers_are_called_with_their_own_arguments(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Stand-ins of the packages' functions take arguments in the packages' order and names."""
    _installed(
        monkeypatch, "apex.normalization.fused_layer_norm",
        fused_rms_norm_affine=lambda x, weight, normalized_shape, eps: F.rms_norm(
            x, normalized_shape, weight, eps
        ),
        fused_layer_norm_affine=lambda x, weight, bias, normalized_shape, eps: F.layer_norm(
            x, normalized_shape, weight, bias, eps
        ),
    )  # fmt: skip
    _installed(
        monkeypatch, "flag_gems",
        rms_norm=lambda x, normalized_shape, weight, eps: F.rms_norm(x, normalized_shape, weight, eps),
        silu_and_mul=lambda A, B: F.silu(A) * B,
        gelu_and_mul=lambda A, B, approximate: F.gelu(A, approximate=approximate) * B,
        cross_entropy_loss=lambda inp, target: F.cross_entropy(inp, target),
    )  # fmt: skip
    _installed(monkeypatch, "flash_attn", flash_attn_func=lambda q, k, v, causal: _sdpa(q, k, v, causal))
    _installed(monkeypatch, "amp_C", multi_tensor_adam="adam")
    _installed(
        monkeypatch, "apex.multi_tensor_apply",
        multi_tensor_applier=lambda kernel, overflow, lists, lr, beta1, beta2, eps, step, decoupled, corrected, decay: (
            _step(lists[1][0], lists[0][0], lists[2][0], lists[3][0], step,
                  lr=lr, beta1=beta1, beta2=beta2, eps=eps, decay=decay)
        ),
    )  # fmt: skip
    _installed(
        monkeypatch, "bitsandbytes.functional",
        optimizer_update_32bit=lambda name, g, p, state1, beta1, eps, step, lr, state2, beta2, weight_decay: _step(
            p, g, state1, state2, step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, decay=weight_decay
        ),
    )  # fmt: skip
    mask = types.SimpleNamespace(LowerTriangularFromBottomRightMask=lambda: "causal")
    _installed(
        monkeypatch, "xformers.ops", fmha=types.SimpleNamespace(attn_bias=mask),
        memory_efficient_attention=lambda q, k, v, attn_bias: _sdpa(q, k, v, attn_bias == "causal"),
    )  # fmt: skip
    row = next(s for s in ROWS if s.name == op).benchmarked
    peers = {n: f for n, f in row.peers.items() if n in THIRD_PARTY}
    assert peers
    case = Case(row, {k: min(v, 16) for k, v in row.bench_dims[0].items()}, torch.float32, CPU)
    directions = ["forward", "backward"] if row.differentiable else ["forward"]
    for name, by_direction in check(case, peers, directions).items():
        for direction, verdict in by_direction.items():
            assert verdict.correct is True, f"{name} {direction}: {verdict.error}"
