# SPDX-License-Identifier: Apache-2.0
"""Norms, rotary embeddings and MLPs as modules, beside torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import fastkern
import pytest
import torch
import torch.nn.functional as F
from fastkern import nn
from harness.modules import assert_like, assert_loads_both_ways, run, turned
from torch import Tensor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])

NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...]]] = {
    "rms": (lambda **k: nn.RMSNorm(37, **k), lambda **k: torch.nn.RMSNorm(37, **k), (3, 5, 37)),
    "rms-eps": (lambda **k: nn.RMSNorm((5, 8), 1e-3, **k), lambda **k: torch.nn.RMSNorm((5, 8), 1e-3, **k), (3, 5, 8)),
    "layer": (lambda **k: nn.LayerNorm(37, **k), lambda **k: torch.nn.LayerNorm(37, **k), (3, 5, 37)),
    "layer-nobias": (
        lambda **k: nn.LayerNorm([5, 8], bias=False, **k),
        lambda **k: torch.nn.LayerNorm([5, 8], bias=False, **k),
        (3, 5, 8),
    ),
    "layer-plain": (
        lambda **k: nn.LayerNorm(37, elementwise_affine=False, **k),
        lambda **k: torch.nn.LayerNorm(37, elementwise_affine=False, **k),
        (2, 37),
    ),
    "group": (lambda **k: nn.GroupNorm(2, 6, **k), lambda **k: torch.nn.GroupNorm(2, 6, **k), (2, 6, 3, 5)),
}


def randomise(*modules: torch.nn.Module) -> None:
    """The same random parameters in all of them."""
    first, *others = modules
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for other in others:
        other.load_state_dict(first.state_dict())


@DTYPES
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_torchs(name: str, dtype: torch.dtype, device: str) -> None:
    make, make_torch, shape = NORMS[name]
    ours, theirs = make(device=device, dtype=dtype), make_torch(device=device, dtype=dtype)
    assert isinstance(ours, type(theirs))
    assert {k: v.tolist() for k, v in ours.state_dict().items()} == {
        k: v.tolist() for k, v in theirs.state_dict().items()
    }
    assert repr(ours) == repr(theirs)
    randomise(theirs, ours)
    x = torch.randn(shape, device=device, dtype=dtype) + 0.5
    assert_like(ours, theirs, x)


def test_norms_with_an_offset() -> None:
    for make in (nn.RMSNorm, nn.LayerNorm, nn.FusedAddNorm):
        norm = make(8, weight_offset=1.0)
        assert not norm.weight.any()
        assert "weight_offset=1.0" in repr(norm)
    x = torch.randn(3, 8)
    torch.testing.assert_close(nn.RMSNorm(8, weight_offset=1.0)(x), torch.nn.RMSNorm(8)(x))
    silu = nn.GroupNorm(2, 4, activation="silu")
    z = torch.randn(2, 4, 3)
    torch.testing.assert_close(silu(z), F.silu(F.group_norm(z, 2)))
    with pytest.raises(RuntimeError, match=r"GroupNorm: activation must be .*got 'relu'"):
        nn.GroupNorm(2, 4, activation="relu")


@DTYPES
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_fused_add_norm(kind: str, dtype: torch.dtype, device: str) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = torch.nn.RMSNorm(33, 1e-6) if kind == "rms" else torch.nn.LayerNorm(33)
            self.norm = norm.to(device, dtype)

        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            h = x + residual
            return self.norm(h), h

    ours, theirs = nn.FusedAddNorm(33, kind, device=device, dtype=dtype), Plain()
    randomise(theirs.norm, ours)
    x, residual = (torch.randn(2, 7, 33, device=device, dtype=dtype) for _ in range(2))
    assert_like(ours, theirs, x, residual, names=lambda name: f"norm.{name}")
    y, h = ours(x)
    assert h is x
    assert torch.equal(y, theirs.norm(x)) or torch.allclose(y, theirs.norm(x), atol=1e-6, rtol=1e-2)
    with pytest.raises(RuntimeError, match=r"FusedAddNorm: kind must be .*, got 'batch'"):
        nn.FusedAddNorm(8, "batch")


def test_dropout_is_read_at_call_time() -> None:
    norm, x = nn.FusedAddNorm(64, dropout=0.5), torch.ones(4, 64)
    dropped = norm(x, torch.zeros_like(x))[1]
    assert 0 < int((dropped == 0).sum()) < dropped.numel()
    assert torch.equal(norm.eval()(x, torch.zeros_like(x))[1], x)
    assert norm.train()(x)[1] is x  # the stream itself, not what a block gives


# ---- rotary embeddings -----------------------------------------------------------------------------------------------


def test_rotary_embedding() -> None:
    rotary = nn.RotaryEmbedding(16, max_length=8)
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    for ours, plain in zip(rotary(q, k), (q, k), strict=True):
        torch.testing.assert_close(ours, turned(plain, torch.arange(5)))
    positions = torch.tensor([[7, 0, 3, 1, 2], [20, 21, 22, 23, 24]])
    torch.testing.assert_close(rotary(q, None, positions, length=25), turned(q, positions))
    assert rotary.cos.shape == (50, 8)
    long = torch.randn(1, 60, 1, 16)
    torch.testing.assert_close(rotary(long), turned(long, torch.arange(60)))
    assert not rotary.state_dict()
    with torch.inference_mode():
        rotary(torch.randn(1, 200, 1, 16))
    rotary(long.requires_grad_()).sum().backward()  # tables made under inference_mode can be saved


def test_rotary_tables_stay_float32() -> None:
    rotary = nn.RotaryEmbedding(8, max_length=4)
    before = rotary.cos
    rotary.to(torch.bfloat16)
    assert torch.equal(rotary.cos, before)
    assert rotary.cos.dtype == torch.float32
    assert rotary.to("cpu").cos is rotary.cos
    empty = nn.RotaryEmbedding(8, max_length=4, device="meta").to_empty(device="cpu")
    assert torch.equal(empty.cos, before)


def test_rotary_tables_of_other_devices() -> None:
    rotary = nn.RotaryEmbedding(8, max_length=4)
    home, elsewhere = rotary.cos, torch.randn(1, 9, 1, 8, device="meta")
    assert rotary(elsewhere).is_meta
    there = rotary.tables(9, elsewhere.device)
    assert there[0] is rotary.tables(5, elsewhere.device)[0]
    assert rotary.tables(4)[0] is home
    assert torch.equal(copy.deepcopy(rotary)(torch.ones(1, 3, 1, 8)), rotary(torch.ones(1, 3, 1, 8)))


def test_rotary_embedding_from_a_config() -> None:
    config = {
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
    }
    rotary = nn.RotaryEmbedding.from_config(config)
    for length in (16, 64, 20, 33):  # the tables are those of the length
        cos, sin = rotary.tables(length)
        for ours, table in zip((cos, sin), fastkern.rope_table_from_config(config, length), strict=True):
            assert torch.equal(ours[:length], table)


# ---- MLPs ------------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reglu": F.relu,
}


class LlamaMLP(torch.nn.Module):
    def __init__(self, dim: int, hidden: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(dim, hidden, bias)
        self.up_proj = torch.nn.Linear(dim, hidden, bias)
        self.down_proj = torch.nn.Linear(hidden, dim, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp(activation: str, dtype: torch.dtype, device: str) -> None:
    theirs = LlamaMLP(12, 20, activation, bias=activation != "swiglu").to(device, dtype)
    ours = nn.GatedMLP(12, 20, activation, bias=activation != "swiglu", device=device, dtype=dtype)
    assert_loads_both_ways(ours, theirs)
    assert_like(ours, theirs, torch.randn(3, 5, 12, device=device, dtype=dtype))
    y, bias = ours.without_bias(torch.randn(2, 12, device=device, dtype=dtype))
    assert (bias is None) == (activation == "swiglu")
    assert y.shape == (2, 12)


def test_gated_mlp_layouts() -> None:
    mlp, x = nn.SwiGLU(12, 20), torch.randn(4, 12)
    gate_up, down = torch.randn(40, 12), torch.randn(12, 20)
    wanted = F.linear(F.silu(x @ gate_up[:20].T) * (x @ gate_up[20:].T), down)
    for state in (
        {"gate_up_proj.weight": gate_up, "down_proj.weight": down},
        {"gate_proj.weight": gate_up[:20], "up_proj.weight": gate_up[20:], "down_proj.weight": down},
        {"w1.weight": gate_up[:20], "w3.weight": gate_up[20:], "w2.weight": down},
        {"w12.weight": gate_up, "w3.weight": down},
    ):
        mlp.reset_parameters()
        torch.nn.Sequential(mlp).load_state_dict({f"0.{key}": value for key, value in state.items()})
        torch.testing.assert_close(mlp(x), wanted)
    with pytest.raises(RuntimeError, match=r"gate_proj.weight must have 20 rows .*, got shape \(19, 12\)"):
        mlp.load_state_dict(
            {"gate_proj.weight": gate_up[:19], "up_proj.weight": gate_up[20:], "down_proj.weight": down}
        )
    with pytest.raises(RuntimeError, match="Missing key"):
        mlp.load_state_dict({"gate_proj.weight": gate_up[:20], "down_proj.weight": down})
    with pytest.raises(RuntimeError, match=r"GatedMLP: activation must be one of swiglu, .*, got 'gelu'"):
        nn.GatedMLP(4, 4, "gelu")
    assert nn.GEGLU(4, 8, approximate="tanh").activation == "geglu_tanh"


@DTYPES
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_mlp(activation: str, dtype: torch.dtype, device: str) -> None:
    theirs = torch.nn.Sequential(
        torch.nn.Linear(12, 20),
        torch.nn.GELU("none" if activation == "gelu" else "tanh"),
        torch.nn.Linear(20, 12),
    ).to(device, dtype)
    ours = nn.MLP(12, 20, activation, device=device, dtype=dtype)
    of_theirs = {"fc1": "0", "fc2": "2"}
    ours.load_state_dict(
        {k.replace("0.", "fc_in.").replace("2.", "fc_out."): v for k, v in theirs.state_dict().items()}
    )
    assert_like(
        ours,
        theirs,
        torch.randn(3, 5, 12, device=device, dtype=dtype),
        names=lambda name: name.replace(name[:3], of_theirs[name[:3]]),
    )
    transposed = {"c_fc.weight": theirs[0].weight.T, "c_fc.bias": theirs[0].bias}
    transposed |= {"c_proj.weight": theirs[2].weight.T, "c_proj.bias": theirs[2].bias}
    again = nn.MLP(12, 20, activation, device=device, dtype=dtype)
    again.load_state_dict(transposed)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_copies_and_devices() -> None:
    made: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    for module in (
        nn.RMSNorm(8, **made),
        nn.LayerNorm(8, **made),
        nn.GroupNorm(2, 8, **made),
        nn.FusedAddNorm(8, "layer", **made),
        nn.RotaryEmbedding(8, max_length=4, device="meta"),
        nn.SwiGLU(8, 12, bias=True, **made),
        nn.MLP(8, 12, **made),
    ):
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
        real = module.to_empty(device="cpu").float()
        real.reset_parameters()
        x = torch.randn(2, 3, 8, 8) if not isinstance(module, nn.GroupNorm) else torch.randn(2, 8, 4)
        copies = copy.deepcopy(real), pickle.loads(pickle.dumps(real))
        for other in copies:
            torch.testing.assert_close(other(x), real(x))
            other.load_state_dict(fastkern.nn.unpacked_state_dict(real))  # hooks belong to the copy
            assert repr(other) == repr(real)


def test_autocast() -> None:
    mlp, norm, add = nn.SwiGLU(8, 12), nn.RMSNorm(8), nn.FusedAddNorm(8)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
        out = mlp(y)
        z, h = add(out, x)
    assert (y.dtype, out.dtype, z.dtype, h.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
    (z.float().sum() + h.sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for m in (mlp, norm, add) for p in m.parameters())


def test_compiles_whole() -> None:
    class All(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.add, self.group = nn.LayerNorm(8), nn.FusedAddNorm(8, dropout=0.0), nn.GroupNorm(2, 6)
            self.gated, self.mlp, self.rotary = nn.SwiGLU(8, 12), nn.MLP(8, 12), nn.RotaryEmbedding(8, max_length=4)

        def forward(self, x: Tensor) -> Tensor:
            y, h = self.add(self.mlp(self.norm(x)), x)
            return self.group(self.rotary(self.gated(y)[:, :, None])[:, :, 0] + h)

    plain = All()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(2, 6, 8), torch.randn(3, 6, 8)):  # 6 rows: longer than the tables
        got, wanted = run(compiled, (x,)), run(plain, (x,))
        for (_, ours), (name, theirs) in zip(got.items(), wanted.items(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_names() -> None:
    for name in nn.__all__:
        assert getattr(nn, name).__doc__, f"fastkern.nn.{name} has no docstring"
    assert fastkern.nn is nn
    with pytest.raises(AttributeError, match="module 'fastkern' has no attribute 'no_such_name'"):
        _ = fastkern.no_such_name


@pytest.mark.parametrize("kind", ["GatedMLP", "MLP"])
def test_width_of_the_result(kind: str, device: str) -> None:
    mlp = getattr(fastkern.nn, kind)(8, 16, out_dim=5, device=device)
    assert mlp(torch.randn(3, 8, device=device)).shape == (3, 5)
