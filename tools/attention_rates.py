# SPDX-License-Identifier: Apache-2.0
"""Rates of attention beside torch's kernels and FlashAttention 4's, of calls that skip, and memory.

    python tools/attention_rates.py [docs/attention_hopper.md]

Prints tables and, with a path, puts them between their marks there. Rates count the pairs of a query and a key that the
mask leaves, for causal masks half of all; a matrix product of 8192^3, timed right before, is beside each: the clock
falls by a quarter under such loads. Needs a CUDA device. FlashAttention 4 is there if the package flash-attn-4 is; it
compiles at a call, which its own cache (FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1) keeps: `--warm N of M` makes every
M-th of its calls, for processes side by side, and prints nothing.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import chain
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


@dataclass(frozen=True)
class Call:
    """Operands (B, S, H, D), or packed (total, H, D) with the edges of sequences and the longest one's length."""

    what: str
    pairs: int
    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    left: int = -1
    edges: Tensor | None = None
    most: int = 0

    @property
    def grouped(self) -> bool:
        """Whether query heads share keys."""
        return self.q.shape[-2] != self.k.shape[-2]


Attention = Callable[[Call], Tensor]

# ---- attention of each library ---------------------------------------------------------------------------------------


def ours(c: Call) -> Tensor:
    """Packed sequences need not know the longest one."""
    more: dict[str, Any] = {"causal": c.causal, "window_left": c.left}
    if c.edges is None:
        return rows.flash_attn(c.q, c.k, c.v, **more)[0]
    return rows.flash_attn_varlen(c.q, c.k, c.v, cu_seqlens_q=c.edges, cu_seqlens_k=c.edges, **more)[0]


@cache
def even_edges(batch: int, tokens: int) -> Tensor:
    """Of sequences of one length."""
    return torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device="cuda")


def torch_varlen(c: Call) -> Tensor:
    """Torch's FlashAttention 2 of packed tensors."""
    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {"enable_gqa": True} if c.grouped else {}
    if "window_size" in inspect.signature(varlen_attn).parameters:
        more["window_size"] = (c.left, 0 if c.causal else -1)
    elif c.left >= 0:
        raise NotImplementedError("windows")
    else:
        more["is_causal"] = c.causal
    out: Tensor = varlen_attn(c.q, c.k, c.v, c.edges, c.edges, c.most, c.most, **more)
    return out


def fa2(c: Call) -> Tensor:
    """Torch's FlashAttention 2."""
    if c.edges is not None:
        return torch_varlen(c)
    if c.left < 0:
        return sdpa(SDPBackend.FLASH_ATTENTION, c)
    batch, tokens = c.q.shape[:2]
    flat = {n: getattr(c, n).flatten(0, 1) for n in "qkv"}
    return torch_varlen(replace(c, **flat, edges=even_edges(batch, tokens), most=tokens)).view(c.q.shape)


def cudnn(c: Call) -> Tensor:
    """cuDNN's, through torch, which gives it neither windows nor packed tensors."""
    if c.edges is not None or c.left >= 0:
        raise NotImplementedError("windows, packed tensors")
    return sdpa(SDPBackend.CUDNN_ATTENTION, c)


def sdpa(backend: SDPBackend, c: Call) -> Tensor:
    """The operator of torch, made to take these kernels."""
    q, k, v = (t.transpose(1, 2) for t in (c.q, c.k, c.v))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=c.causal, enable_gqa=c.grouped).transpose(1, 2)


def fa4(c: Call) -> Tensor:
    """FlashAttention 4's own functions."""
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

    more: dict[str, Any] = {"causal": c.causal and c.left < 0}
    if c.left >= 0:
        more["window_size"] = (c.left, 0 if c.causal else None)
    if c.edges is not None:
        more |= {"cu_seqlens_q": c.edges, "cu_seqlens_k": c.edges, "max_seqlen_q": c.most, "max_seqlen_k": c.most}
    out = (flash_attn_func if c.edges is None else flash_attn_varlen_func)(c.q, c.k, c.v, **more)
    return out[0] if isinstance(out, tuple) else out


def peers() -> dict[str, Attention]:
    """Those that are installed."""
    those: dict[str, Attention] = {"FA2": fa2, "cuDNN": cudnn}
    if find_spec("flash_attn") and find_spec("flash_attn.cute"):
        those["FA4"] = fa4
    return those


# ---- calls -----------------------------------------------------------------------------------------------------------


def random(*shape: int) -> Tensor:
    """Of bf16, on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=BF16)


def dense_calls() -> Iterator[Call]:
    """Every head dimension, mask and length."""
    for D, causal in ((64, False), (64, True), (128, False), (128, True), (256, False), (256, True)):
        for S in (512, 1024, 2048, 4096, 8192, 16384):
            B, H = TOKENS // S, WIDTH // D
            what = f"{D} | {'causal' if causal else 'full'} | {S}"
            pairs = B * H * S * S // (2 if causal else 1)
            yield Call(what, pairs, *(random(B, S, H, D) for _ in "qkv"), causal=causal)


def windowed(S: int, left: int) -> int:
    """Pairs under a causal window of ``left`` keys before a query."""
    return sum(min(i, left) + 1 for i in range(S))


def lengths(count: int, longest: int) -> list[int]:
    """Sequences from 16 tokens to ``longest``, in equal steps of their logarithm, in no order."""
    step = math.log(longest / 16) / (count - 1)
    return [round(16 * math.exp(step * ((29 * i + 7) % count))) for i in range(count)]  # 29: no factor of count


def other_calls() -> Iterator[Call]:
    """Grouped heads, windows, packed sequences, all causal."""
    for S in (2048, 8192):
        B, H, what = TOKENS // S, 64, f"64 heads, 8 of keys, causal, S {S} | 128"
        q, k, v = (random(B, S, heads, 128) for heads in (H, 8, 8))
        yield Call(what, B * H * S * (S + 1) // 2, q, k, v, causal=True)
    for D in (64, 128):
        H = WIDTH // D
        q, k, v = (random(1, TOKENS, H, D) for _ in "qkv")
        for left in (1024, 4096):
            what = f"causal, window {left}, S {TOKENS} | {D}"
            yield Call(what, H * windowed(TOKENS, left), q, k, v, causal=True, left=left)
        many = lengths(64, 8192)
        edges = torch.tensor([0, *many]).cumsum(0).int().cuda()
        what = f"causal, 64 packed sequences of 16 to 8192 | {D}"
        pairs = H * sum(n * (n + 1) // 2 for n in many)
        q, k, v = (random(sum(many), H, D) for _ in "qkv")
        yield Call(what, pairs, q, k, v, causal=True, edges=edges, most=max(many))


# ---- measuring -------------------------------------------------------------------------------------------------------


def with_leaves(call: Call) -> Call:
    """The same, with operands that want gradients."""
    return replace(call, **{n: getattr(call, n).detach().requires_grad_() for n in "qkv"})


def rates(attention: Attention, call: Call) -> tuple[float, float]:
    """TFLOP/s of forward and of backward; nan where another library has no such call."""
    D, leaves, taken = call.q.shape[-1], with_leaves(call), [math.nan, math.nan]
    refusals = () if attention is ours else (NotImplementedError, RuntimeError, AssertionError, ValueError, TypeError)
    try:
        with torch.no_grad():
            attention(call)
            taken[0] = do_bench(lambda: attention(call), return_mode="median")
        out = attention(leaves)
        dout, operands = torch.randn_like(out), [leaves.q, leaves.k, leaves.v]
        taken[1] = do_bench(lambda: torch.autograd.grad(out, operands, dout, retain_graph=True), return_mode="median")
    except refusals as error:
        print(f"{attention.__name__}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    return 4 * D * call.pairs / taken[0] / 1e9, 10 * D * call.pairs / taken[1] / 1e9


@cache
def factors() -> tuple[Tensor, Tensor]:
    """Of the matrix product that rates are compared with."""
    return random(8192, 8192), random(8192, 8192)


def product_rate() -> float:
    """TFLOP/s of a matrix product of 8192^3."""
    a, b = factors()
    return 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9


def rate_table(first: str, calls: Iterator[Call], products: list[float]) -> list[str]:
    """Ours, as a share of a matrix product timed right before, and over each of the others'; forward, backward."""
    others = peers()
    over = [f"over {name}" for name in others]
    lines = [
        f"| {first} | "
        + " | ".join(f"{way} | of a product | {' | '.join(over)}" for way in ("forward", "backward"))
        + " |"
    ]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    ratios: dict[str, list[float]] = {f"{way}, {name}": [] for way in ("forward", "backward") for name in others}
    for call in calls:
        products.append(product := product_rate())
        mine, theirs = rates(ours, call), [rates(peer, call) for peer in others.values()]
        cells = []
        for i, way in enumerate(("forward", "backward")):
            cells += [f"{mine[i]:.0f}", f"{mine[i] / product:.2f}"]
            for name, rate in zip(others, theirs, strict=True):
                ratio = mine[i] / rate[i]
                cells.append("" if math.isnan(ratio) else f"{ratio:.2f}")
                ratios[f"{way}, {name}"] += [] if math.isnan(ratio) else [ratio]
        lines.append(f"| {call.what} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    means = [f"{n} {math.exp(sum(map(math.log, r)) / len(r)):.2f}" for n, r in ratios.items() if r]
    return [*lines, "", f"Geometric means: {'; '.join(means)}."]


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


def warm(part: str) -> None:
    """Have FlashAttention 4 compile what this part of the calls takes."""
    at, count = (int(n) for n in part.split("of"))
    seen: set[tuple[Any, ...]] = set()
    for call in chain(dense_calls(), other_calls()):
        kind = (call.q.shape[-1], call.causal, call.left, call.edges is None, call.grouped)
        if kind in seen:
            continue
        if len(seen) % count == at:
            out = fa4(with_leaves(call))
            out.backward(torch.randn_like(out))
        seen.add(kind)
    torch.cuda.synchronize()


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--warm", metavar="N of M")
    chosen = parser.parse_args()
    if chosen.warm:
        warm(chosen.warm)
        return
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}"
    products: list[float] = []
    dense = rate_table("head dimension | mask | S", dense_calls(), products)
    other = rate_table("call | head dimension", other_calls(), products)
    head = (
        f"{where}, commit {info.environment()['commit'][:8]}, bf16, {TOKENS} tokens, heads x head dimension {WIDTH}. "
        "TFLOP/s through the operators, share of a matrix product of 8192^3 timed before each line "
        f"({min(products):.0f} to {max(products):.0f} TFLOP/s), and ours over others:"
    )
    tables = [head, "", *dense, "", "TFLOP/s of what the mask leaves:", "", *other, ""]
    text = "\n".join([*tables, "Memory beside the inputs:", "", *memory_table()])
    print(text)
    if chosen.path:
        before, rest = chosen.path.read_text().split(BEGIN)
        chosen.path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
