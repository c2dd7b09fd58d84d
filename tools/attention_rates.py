# SPDX-License-Identifier: Apache-2.0
"""Rates of attention beside torch's kernels, of calls that skip beside those that do not, and memory.

    python tools/attention_rates.py [docs/attention.md]

Prints tables and, with a path, puts them between their marks there. Rates count the pairs of a query and a key that the
mask leaves, for causal masks half of all. Needs a CUDA device.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fastkern import info
from fastkern.specs import attention as rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

BEGIN, END = "<!-- rates: written by tools/attention_rates.py -->", "<!-- end of rates -->"
BF16 = torch.bfloat16
TOKENS, WIDTH = 16384, 2048  # B x S, H x D

Attention = Callable[..., Tensor]


def rates(attention: Attention, inputs: dict[str, Any], pairs: int) -> tuple[float, float]:
    """TFLOP/s of forward and of backward."""
    D = inputs["q"].shape[-1]
    leaves = {n: t.detach().requires_grad_() if n in "qkv" else t for n, t in inputs.items()}
    out = attention(**leaves)
    dout, operands = torch.randn_like(out), [leaves[n] for n in "qkv"]
    with torch.no_grad():
        forward = do_bench(lambda: attention(**inputs), return_mode="median")
    backward = do_bench(lambda: torch.autograd.grad(out, operands, dout, retain_graph=True), return_mode="median")
    return 4 * D * pairs / forward / 1e9, 10 * D * pairs / backward / 1e9


def ours(**inputs: Any) -> Tensor:
    """Of (B, S, H, D) or packed tensors."""
    return (rows.flash_attn_varlen if "cu_seqlens_q" in inputs else rows.flash_attn)(**inputs)[0]


def torchs(backend: SDPBackend) -> Attention:
    """The operator of torch, made to take these kernels."""

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal)
        return out.transpose(1, 2)

    return attention


def peer_table() -> list[str]:
    """Ours, and ours over those of torch's FlashAttention 2 and cuDNN."""
    peers = (torchs(SDPBackend.FLASH_ATTENTION), torchs(SDPBackend.CUDNN_ATTENTION))
    lines = [
        "| head dimension | mask | S | forward | of FA2 | of cuDNN | backward | of FA2 | of cuDNN |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for D, causal in ((64, False), (64, True), (128, False), (128, True), (256, True)):
        for S in (512, 1024, 2048, 4096, 8192, 16384):
            B, H = TOKENS // S, WIDTH // D
            inputs: dict[str, Any] = {n: torch.randn(B, S, H, D, device="cuda", dtype=BF16) for n in "qkv"}
            inputs["causal"] = causal
            pairs = B * H * S * S // (2 if causal else 1)
            mine = rates(ours, inputs, pairs)
            theirs = [rates(peer, inputs, pairs) for peer in peers]
            cells = [f"{mine[i]:.0f} | " + " | ".join(f"{mine[i] / t[i]:.2f}" for t in theirs) for i in range(2)]
            lines.append(f"| {D} | {'causal' if causal else 'full'} | {S} | {' | '.join(cells)} |")
    return lines


def windowed(S: int, left: int) -> int:
    """Pairs under a causal window of ``left`` keys before a query."""
    return sum(min(i, left) + 1 for i in range(S))


def lengths(total: int) -> list[int]:
    """Documents from 64 to 8,192 tokens, as a training batch packs them."""
    pattern = (8192, 64, 1024, 512, 4096, 128, 2048, 256, 64)
    return [n for _ in range(total // sum(pattern)) for n in pattern]


def skipping_calls() -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """What, head dimension, pairs, arguments; the dense call of each head dimension first."""
    S = TOKENS
    for D in (64, 128):
        H = WIDTH // D
        dense: dict[str, Any] = {n: torch.randn(1, S, H, D, device="cuda", dtype=BF16) for n in "qkv"}
        dense["causal"] = True
        yield f"causal, S {S}", D, H * S * (S + 1) // 2, dense
        for left in (1024, 4096):
            yield f"causal, window {left}", D, H * windowed(S, left), dense | {"window_left": left}
        many = lengths(2 * S)
        edges = torch.tensor([0, *many]).cumsum(0).int().cuda()
        packed: dict[str, Any] = {n: torch.randn(sum(many), H, D, device="cuda", dtype=BF16) for n in "qkv"}
        packed |= {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "causal": True}
        pairs = H * sum(n * (n + 1) // 2 for n in many)
        yield f"causal, {len(many)} packed sequences of 64 to 8192", D, pairs, packed


def skipping_table() -> list[str]:
    """TFLOP/s of what the mask leaves, and the share of the dense call's rate."""
    lines = ["| call | head dimension | forward | of dense | backward | of dense |", "|---|---|---|---|---|---|"]
    dense = (1.0, 1.0)
    for what, D, pairs, inputs in skipping_calls():
        mine = rates(ours, inputs, pairs)
        dense = mine if what == f"causal, S {TOKENS}" else dense
        cells = [f"{r:.0f} | {r / d:.0%}" for r, d in zip(mine, dense, strict=True)]
        lines.append(f"| {what} | {D} | {' | '.join(cells)} |")
    return lines


def memory_table() -> list[str]:
    """Most memory beside inputs, of forward and of both."""
    lines = ["| S (4 heads of 128, causal) | results MiB | forward MiB | both MiB |", "|---|---|---|---|"]
    for S in (4096, 16384, 65536):
        q, k, v = (torch.randn(1, S, 4, 128, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3))
        dout = torch.randn_like(q)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out, _ = rows.flash_attn(q, k, v, causal=True)
        forward = torch.cuda.max_memory_allocated() - before
        grads = torch.autograd.grad(out, (q, k, v), dout)
        both = torch.cuda.max_memory_allocated() - before
        results = sum(t.nbytes for t in (out, *grads))
        lines.append(f"| {S} | {' | '.join(f'{n / 2**20:.1f}' for n in (results, forward, both))} |")
    return lines


def main() -> None:
    """All tables."""
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}"
    head = (
        f"{where}, commit {info.environment()['commit'][:8]}, bf16, {TOKENS} tokens, heads x head dimension {WIDTH}. "
        "TFLOP/s, and ours over torch's:"
    )
    skipping = f"Of calls that skip, S {TOKENS}, TFLOP/s of what the mask leaves:"
    tables = [head, "", *peer_table(), "", skipping, "", *skipping_table(), ""]
    text = "\n".join([*tables, "Memory beside the inputs:", "", *memory_table()])
    print(text)
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        before, rest = path.read_text().split(BEGIN)
        path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
