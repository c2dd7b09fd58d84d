# SPDX-License-Identifier: Apache-2.0
"""nn.MultiheadAttention beside torch's and beside the plain formula; the cache beside the whole sequence."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastkern import nn
from harness.modules import assert_like, assert_loads_both_ways, run, turned
from torch import Tensor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


class Plain(torch.nn.Module):
    """Attention as models of Hugging Face write it: projections apart, scores in memory."""

    def __init__(self, E: int, H: int, G: int, D: int, *, bias: bool = True, out_bias: bool = True,
                 rotary: bool = False, qk_norm: bool = False, sinks: bool = False, causal: bool = False,
                 window: int | None = None, softcap: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(E, heads * D, bias) for heads in (H, G, G))
        self.o_proj = torch.nn.Linear(H * D, E, out_bias)
        if qk_norm:
            self.q_norm, self.k_norm = (torch.nn.RMSNorm(D, 1e-6) for _ in range(2))
        if sinks:
            self.sinks = torch.nn.Parameter(torch.randn(H))
        self.D, self.rotary, self.causal, self.window, self.softcap = D, rotary, causal, window, softcap

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (p(t).unflatten(-1, (-1, self.D)) for p, t in zip((self.q_proj, self.k_proj, self.v_proj),
                                                                    (x, source, source), strict=True))  # fmt: skip
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = (turned(t, torch.arange(x.shape[1])) for t in (q, k))
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", q, k).to(torch.float32 if x.dtype != torch.float64 else x.dtype)
        scores = scores / self.D**0.5
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        S, T = scores.shape[-2:]
        distance = torch.arange(S)[:, None] + T - S - torch.arange(T)
        if self.causal:
            scores = scores.masked_fill(distance < 0, float("-inf"))
        if self.window is not None:
            scores = scores.masked_fill(distance > self.window, float("-inf"))
        if hasattr(self, "sinks"):
            column = self.sinks[None, :, None, None].expand(*scores.shape[:3], 1).to(scores.dtype)
            scores = torch.cat([scores, column], -1)
        weights = torch.softmax(scores, -1)[..., :T].to(x.dtype)
        return self.o_proj(torch.einsum("bhst,bthd->bshd", weights, v).flatten(-2))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen2": {"out_bias": False, "rotary": True, "causal": True},
    "qwen3": {"bias": False, "out_bias": False, "rotary": True, "qk_norm": True, "causal": True, "window": 3},
    "gpt-oss": {"rotary": True, "sinks": True, "causal": True, "softcap": 5.0},
    "norms": {"qk_norm": True},
}


def ours_like(theirs: Plain, variant: dict[str, Any], *sizes: int) -> nn.MultiheadAttention:
    E, H, G, D = sizes
    options = {**variant, "rotary": nn.RotaryEmbedding(D, max_length=4) if variant.get("rotary") else None}
    window = options.pop("window", None)
    like = theirs.o_proj.weight
    return nn.MultiheadAttention(
        E, H, G, head_dim=D, window=(window, None), device=like.device, dtype=like.dtype, **options
    )


@DTYPES
@pytest.mark.parametrize("name", VARIANTS)
def test_self_attention(name: str, dtype: torch.dtype) -> None:
    sizes = (20, 4, 2, 16)
    theirs = Plain(*sizes, **VARIANTS[name]).to(dtype)
    ours = ours_like(theirs, VARIANTS[name], *sizes)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(2)
    assert_loads_both_ways(ours, theirs)
    # torch rounds where these kernels do not, so its error bounds ours; but q and k are rounded behind the rotation
    assert_like(ours, theirs, torch.randn(2, 9, 20, dtype=dtype), slack=4.0)


@DTYPES
@pytest.mark.parametrize("sources", ["same", "packed", "apart"])
def test_torchs_checkpoints(sources: str, dtype: torch.dtype, device: str) -> None:
    kdim, vdim = (9, 7) if sources == "apart" else (None, None)
    made: dict[str, Any] = {"kdim": kdim, "vdim": vdim, "device": device, "dtype": dtype}
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, **made)
    ours = nn.MultiheadAttention(12, 3, **made)
    torch.nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12, device=device, dtype=dtype)
    inputs = [x]
    if sources != "same":
        inputs += [torch.randn(2, 7, kdim or 12, device=device, dtype=dtype)]
        inputs += [torch.randn(2, 7, vdim or 12, device=device, dtype=dtype)]

    class Torchs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = theirs

        def forward(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
            k, v = (x if k is None else k), (v if v is not None else x)
            return self.mha(x, k, v, need_weights=False)[0]

    class Ours(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = ours

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.mha(*inputs)

    ours_there = Ours()
    ours.export_unpacked = lambda *_: None  # type: ignore[method-assign]  # the parameters are torch's as they are
    assert_like(ours_there, Torchs(), *inputs, slack=4.0)


def test_cross_attention_shares_a_product() -> None:
    theirs = Plain(12, 3, 1, 8)
    ours = ours_like(theirs, {}, 12, 3, 1, 8)
    assert_loads_both_ways(ours, theirs)
    assert_like(ours, theirs, torch.randn(2, 5, 12), torch.randn(2, 7, 12))


def test_masks_lengths_and_packing() -> None:
    attention = nn.MultiheadAttention(16, 4, 2, causal=True, rotary=nn.RotaryEmbedding(4, max_length=16))
    x, lengths = torch.randn(3, 6, 16), torch.tensor([6, 2, 4], dtype=torch.int32)
    alone = [attention(row[None, :n])[0] for row, n in zip(x, lengths.tolist(), strict=True)]
    padded = attention(x, seqused_k=lengths)
    packed = torch.cat([row[:n] for row, n in zip(x, lengths.tolist(), strict=True)])
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    for i, row in enumerate(alone):
        torch.testing.assert_close(padded[i, : len(row)], row)
    torch.testing.assert_close(attention(packed, cu_seqlens=starts), torch.cat(alone))
    hidden = torch.ones(3, 1, 6, 6, dtype=torch.bool)
    hidden[:, :, :, 0] = False  # not seen, but by the query that sees nothing else
    float_mask = torch.zeros(3, 1, 6, 6).masked_fill(~hidden, float("-inf"))
    masked = attention(x, bias=hidden)
    torch.testing.assert_close(masked, attention(x, bias=float_mask))
    torch.testing.assert_close(masked[:, 0], attention.out_proj.bias.expand(3, 16))
    for name, wrong in (
        ("key", {"key": x[:, :3]}),
        ("cu_seqlens", {"cu_seqlens": starts, "bias": hidden}),
        ("seqused_k", {"cache": nn.KVCache(1, 3, 8, 2, 4), "seqused_k": lengths}),
    ):
        with pytest.raises(RuntimeError, match=f"MultiheadAttention: {name} must be None with"):
            attention(x, **wrong)
    with pytest.raises(RuntimeError, match="num_kv_heads must divide the 4 heads, got 3"):
        nn.MultiheadAttention(16, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_cache(dtype: torch.dtype) -> None:
    """Prompts of different lengths, then steps: what the whole sequences give."""
    rotary = nn.RotaryEmbedding(8, max_length=4)
    attention = nn.MultiheadAttention(
        16, 4, 2, head_dim=8, causal=True, rotary=rotary, qk_norm=True, window=(5, 0), sinks=True, dtype=dtype
    )
    x, lengths = torch.randn(3, 10, 16, dtype=dtype), torch.tensor([5, 2, 4], dtype=torch.int32)
    cache = nn.KVCache(2, 3, 12, 2, 8, dtype=dtype)
    cache.k.fill_(float("nan"))  # rows that are not written are not read
    cache.v.fill_(float("nan"))
    exact = dtype == torch.float32
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if exact else {"rtol": 2e-2, "atol": 1e-2}
    with torch.no_grad():
        whole = attention(x)
        first = attention(x[:, :5], cache=cache, layer=1, seqused_q=lengths)
        cache.advance(lengths)
        for i, n in enumerate(lengths.tolist()):
            torch.testing.assert_close(first[i, :n], whole[i, :n], **tolerance)
        for size in (1, 3, 1):
            step = torch.stack([row[n : n + size] for row, n in zip(x, cache.lengths.tolist(), strict=True)])
            out = attention(step, cache=cache, layer=1)
            for i, n in enumerate(cache.lengths.tolist()):
                torch.testing.assert_close(out[i], whole[i, n : n + size], **tolerance)
            cache.advance(size)
        assert cache.lengths.tolist() == [10, 7, 9]
        with pytest.raises(IndexError):
            attention(x[:, :3], cache=cache)
        cache.reorder(torch.tensor([2, 2, 0]))
        assert cache.lengths.tolist() == [9, 9, 10]
        assert torch.equal(cache.k[1, 0, :9], cache.k[1, 1, :9])
    with pytest.raises(RuntimeError, match="KVCache: k must not require grad"):
        attention(x[:, :1], cache=cache)
    with pytest.raises(RuntimeError, match="KVCache: layer must be below 2, got 2"), torch.no_grad():
        attention(x[:, :1], cache=cache, layer=2)
    cache.reset()
    assert not cache.lengths.any()


def test_dropout_autocast_and_copies() -> None:
    attention = nn.MultiheadAttention(16, 2, dropout=0.5, qk_norm=True, rotary=nn.RotaryEmbedding(8, max_length=8))
    x = torch.randn(2, 5, 16)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(x), rtol=0.1, atol=0.05)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(x), attention(x))
        other.load_state_dict(nn.unpacked_state_dict(attention))
    empty = nn.MultiheadAttention(16, 2, device="meta", sinks=True).to_empty(device="cpu")
    empty.reset_parameters()
    assert empty(x).isfinite().all()
    assert "num_kv_heads=2" in repr(empty)


def test_compiles_whole() -> None:
    rotary = nn.RotaryEmbedding(8, max_length=8)
    attention = nn.MultiheadAttention(16, 2, 1, head_dim=8, causal=True, qk_norm=True, rotary=rotary)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 16)
    for (name, ours), theirs in zip(run(compiled, (x,)).items(), run(attention, (x,)).values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    caches = [nn.KVCache(1, 2, 8, 1, 8) for _ in range(2)]
    with torch.no_grad():
        for step in range(3):
            for cache, function in zip(caches, (attention, compiled), strict=True):
                out = function(x[:, step : step + 1], cache=cache)
                cache.advance(1)
                torch.testing.assert_close(out, attention(x[:, : step + 1])[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("option", [{"qk_norm_eps": 0.5}, {"qk_norm_offset": 1.0}], ids=str)
def test_numbers_of_the_head_norms(option: dict[str, float], rotary: bool, device: str) -> None:
    """The same weights under another number give something else, by either kernel."""

    def made(**more: float) -> nn.MultiheadAttention:
        turns = nn.RotaryEmbedding(8, device=device) if rotary else None
        return nn.MultiheadAttention(16, 2, qk_norm=True, rotary=turns, device=device, **more)

    plain, other = made(), made(**option)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3)).to(device)
    assert (plain(x) - other(x)).abs().max() > 1e-4
