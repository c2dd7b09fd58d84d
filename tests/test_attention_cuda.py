# SPDX-License-Identifier: Apache-2.0
"""Attention on CUDA alone: graphs, the order of additions, memory, the same dropout as on the CPU."""

from __future__ import annotations

from typing import Any

import fastkern
import pytest
import torch
from fastkern.specs import attention as rows
from harness.attention import assert_close, assert_no_nan, int32, made, ours, truth
from torch import Tensor

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]

BF16 = torch.bfloat16


def leaves_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_(name in "qkv") for name, t in inputs.items()}


@pytest.mark.parametrize("D", [64, 128, 256])
def test_graph_replay_with_other_lengths(D: int) -> None:
    """Lengths live on the device: one graph, forward and backward, serves any of them."""
    inputs: dict[str, Any] = made("cuda", BF16, 1, 600, 600, 4, D, group=2)
    inputs = {name: t[0] for name, t in inputs.items()}
    inputs |= {"cu_seqlens_q": int32("cuda", 0, 100, 350, 600), "cu_seqlens_k": int32("cuda", 0, 100, 350, 600)}
    leaves, dout = leaves_of(inputs), torch.randn(600, 4, D, device="cuda", dtype=BF16)

    def step() -> tuple[Tensor, ...]:
        out, lse = rows.flash_attn_varlen(**leaves, causal=True)
        return out, lse, *torch.autograd.grad(out, [leaves[n] for n in "qkv"], dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for edges in ((0, 1, 599, 600), (0, 300, 300, 600), (0, 0, 0, 64), (0, 100, 350, 600)):
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            leaves[name].copy_(int32("cuda", *edges))
        for t in captured:
            t.detach().fill_(float("nan"))
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected), f"{edges}"


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
@pytest.mark.parametrize("sizes", [(1, 4096, 10, 64), (1, 2100, 20, 128), (2, 1100, 20, 256)], ids=str)
def test_tiles_given_out(sizes: tuple[int, ...], packed: bool) -> None:
    """The bits of calls too small for a counter, of which each has half of the heads; again as often as one likes."""
    B, S, H, D = sizes
    inputs: dict[str, Any] = made("cuda", BF16, B, S, S, H, D)
    edges: dict[str, Any] = {}
    if packed:
        inputs = {name: t.flatten(0, 1) for name, t in inputs.items()}
        edges = {f"cu_seqlens_{n}": int32("cuda", 0, 1, 300, 301, 2000, B * S) for n in "qk"}

    def call(part: slice) -> tuple[Tensor, Tensor]:
        operands = {name: t[..., part, :] for name, t in inputs.items()}
        if packed:
            return rows.flash_attn_varlen(**operands, **edges, causal=True)
        return rows.flash_attn(**operands, causal=True)

    halves = [call(slice(0, H // 2)), call(slice(H // 2, H))]
    expected = (torch.cat([out for out, _ in halves], -2), torch.cat([lse for _, lse in halves], -2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(slice(0, H))
    for _ in range(3):
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        for got, again, want in zip(captured, call(slice(0, H)), expected, strict=True):
            assert torch.equal(got, want)
            assert torch.equal(again, want)


@pytest.mark.parametrize("repeats", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", [(2, 1024, 8, 64), (1, 2048, 4, 128), (1, 1024, 2, 256)], ids=str)
def test_thousands_of_repeats(sizes: tuple[int, ...], causal: bool, repeats: int) -> None:
    """dq is a sum over blocks of keys that many blocks of threads add to; its order is that of the keys."""
    B, S, H, D = sizes
    leaves = leaves_of(made("cuda", BF16, B, S, S, H, D))
    dout = torch.randn(B, S, H, D, device="cuda", dtype=BF16)

    def step() -> tuple[Tensor, ...]:
        out, lse = rows.flash_attn(**leaves, causal=causal)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, [leaves[n] for n in "qkv"], dout)

    first = step()
    assert_no_nan(dict(zip(("out", "lse", "dq", "dk", "dv"), first, strict=True)))
    different = torch.zeros(5, dtype=torch.int64, device="cuda")
    for _ in range(repeats):
        different += torch.stack([(a != b).sum() for a, b in zip(step(), first, strict=True)])
    assert different.tolist() == [0] * 5


@pytest.mark.parametrize("D", [64, 128])
def test_two_streams_at_once(D: int) -> None:
    """Blocks wait for each other within a call only, whatever else is on the device."""
    both = [made("cuda", BF16, 1, 1536, 1536, 4, D, seed=seed) for seed in (1, 2)]
    expected = [ours({**inputs, "causal": True}) for inputs in both]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    got: list[list[dict[str, Tensor]]] = [[], []]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(ours({**both[i], "causal": True}))
    torch.cuda.synchronize()
    for i, results in enumerate(got):
        for one in results:
            for name, t in expected[i].items():
                assert torch.equal(one[name], t), name


@pytest.mark.large
def test_memory_grows_with_the_length_alone() -> None:
    """Forward and backward of 65,536 tokens: beside results, 8 bytes a row and 4 an element of q, rounded up."""
    B, S, H, D = 1, 65536, 4, 128
    leaves = leaves_of(made("cuda", BF16, B, S, S, H, D))
    dout = torch.randn(B, S, H, D, device="cuda", dtype=BF16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = rows.flash_attn(**leaves, causal=True)
    forward = torch.cuda.max_memory_allocated() - before
    grads = torch.autograd.grad(out, [leaves[n] for n in "qkv"], dout)
    both = torch.cuda.max_memory_allocated() - before
    results = out.nbytes + lse.nbytes
    workspace = 4 * out.numel() + 12 * lse.numel()
    slack = 4 << 20
    assert forward <= results + slack
    assert both <= results + sum(g.nbytes for g in grads) + workspace + slack


@pytest.mark.large
def test_more_elements_than_31_bits_count() -> None:
    """1,025 sequences of 1,024: the last ones lie beyond 2^31 elements, forward and backward."""
    S, count, H, D = 1024, 1025, 16, 128
    leaves = {n: torch.randn(S * count, H, D, device="cuda", dtype=BF16, requires_grad=True) for n in "qkv"}
    dout = torch.randn(S * count, H, D, device="cuda", dtype=BF16)
    edges = torch.arange(0, S * count + 1, S, device="cuda", dtype=torch.int32)
    out, _ = rows.flash_attn_varlen(**leaves, cu_seqlens_q=edges, cu_seqlens_k=edges, causal=True)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    for i in (0, 511, 1023, 1024):
        own = slice(i * S, (i + 1) * S)
        alone = {n: t.detach()[None, own].requires_grad_() for n, t in leaves.items()}
        expected, _ = rows.flash_attn(**alone, causal=True)
        wanted = torch.autograd.grad(expected, list(alone.values()), dout[None, own])
        got = {"out": out.detach()[own], **dict(zip(("dq", "dk", "dv"), (g[own] for g in grads), strict=True))}
        for name, t in dict(zip(got, (expected, *wanted), strict=True)).items():
            assert_no_nan({name: got[name]})
            assert torch.equal(got[name], t[0].detach()), f"{name} of sequence {i}"


@pytest.mark.parametrize("sizes", [(2, 3, 70, 131), (1, 2, 5, 4)], ids=str)
def test_dropout_mask_of_the_cpu(sizes: tuple[int, ...]) -> None:
    seed, offset = torch.tensor(0x1234567890ABCDEF), torch.tensor(2**33 + 5)
    on_cpu = fastkern.attn_dropout_mask(*sizes, 0.3, seed, offset)
    on_cuda = fastkern.attn_dropout_mask(*sizes, 0.3, seed.cuda(), offset.cuda())
    assert torch.equal(on_cuda.cpu(), on_cpu)
    assert on_cpu.any()
    assert not on_cpu.all()


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_wide_heads_forward_only(dtype: torch.dtype) -> None:
    inputs = made("cuda", dtype, 1, 70, 131, 2, 512)
    out, lse = rows.flash_attn(**inputs, causal=True)
    exact = truth({**inputs, "causal": True})
    assert_close({"out": out, "lse": lse}, {name: exact[name] for name in ("out", "lse")}, 3e-2)
    leaves = leaves_of(inputs)
    with pytest.raises(RuntimeError, match=r"flash_attn: .* the gradient .* above 256, got 512"):
        rows.flash_attn(**leaves)[0].sum().backward()
    assert_no_nan({"again": rows.flash_attn(**inputs)[0]})
