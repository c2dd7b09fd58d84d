# SPDX-License-Identifier: Apache-2.0
"""Rates of attention beside torch's kernels and FlashAttention 4's, of calls that skip, and memory.

    python tools/attention_rates.py [docs/attention_hopper.md]

Prints tables and, with a path, puts them between their marks there. Rates count the pairs of a query and a key that the
mask leaves, for causal masks half of all; a matrix product of 8192^3 of the same run is beside them. Needs a CUDA
device. FlashAttention 4 is there if the package flash-attn-4 is; it compiles at a call, which its own cache
(FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1) keeps: `--warm N of M` makes every M-th of its calls, for processes side by
side, and prints nothing.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
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
Inputs = dict[str, Any]

# ---- attention of each library, of the arguments that fastkern's has -------------------------------------------------


def ours(most: int = 0, **inputs: Any) -> Tensor:
    """Of (B, S, H, D) or packed tensors, which need not know the longest sequence."""
    return (rows.flash_attn_varlen if "cu_seqlens_q" in inputs else rows.flash_attn)(**inputs)[0]


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, causal: bool, edges: Tensor, most: int, left: int) -> Tensor:
    """Torch's FlashAttention 2 of packed tensors."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    more: dict[str, Any] = {"window_size": (left, 0 if causal else -1)} if "window_size" in known else {}
    if not more and left >= 0:
        raise NotImplementedError("windows")
    if not more:
        more = {"is_causal": causal}
    if q.shape[1] != k.shape[1]:
        more["enable_gqa"] = True
    return varlen_attn(q, k, v, edges, edges, most, most, **more)


def fa2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_left: int = -1,
    cu_seqlens_q: Tensor | None = None,
    most: int = 0,
    **_: Any,
) -> Tensor:
    """Torch's FlashAttention 2."""
    if cu_seqlens_q is not None:
        return torch_varlen(q, k, v, causal, cu_seqlens_q, most, window_left)
    if window_left >= 0:
        edges = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32, device=q.device)
        return torch_varlen(*(t.flatten(0, 1) for t in (q, k, v)), causal, edges, q.shape[1], window_left).view(q.shape)
    return sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, causal)


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, **more: Any) -> Tensor:
    """cuDNN's, through torch, which gives it neither windows nor packed tensors."""
    if more:
        raise NotImplementedError(str(list(more)))
    return sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, causal)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The operator of torch, made to take these kernels."""
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]
        )
    return out.transpose(1, 2)


def fa4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_left: int = -1,
    cu_seqlens_q: Tensor | None = None,
    most: int = 0,
    **_: Any,
) -> Tensor:
    """FlashAttention 4's own functions."""
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

    more: dict[str, Any] = {"causal": causal and window_left < 0}
    if window_left >= 0:
        more["window_size"] = (window_left, 0 if causal else None)
    if cu_seqlens_q is not None:
        more |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_q, "max_seqlen_q": most, "max_seqlen_k": most}
    out = (flash_attn_func if cu_seqlens_q is None else flash_attn_varlen_func)(q, k, v, **more)
    return out[0] if isinstance(out, tuple) else out


def peers() -> dict[str, Attention]:
    """Those that are installed."""
    those: dict[str, Attention] = {"FA2": fa2, "cuDNN": cudnn}
    if find_spec("flash_attn") and find_spec("flash_attn.cute"):
        those["FA4"] = fa4
    return those


# ---- calls -----------------------------------------------------------------------------------------------------------


def dense_calls() -> Iterator[tuple[str, int, Inputs]]:
    """What, pairs, arguments."""
    for D, causal in ((64, False), (64, True), (128, False), (128, True), (256, False), (256, True)):
        for S in (512, 1024, 2048, 4096, 8192, 16384):
            B, H = TOKENS // S, WIDTH // D
            inputs: Inputs = {n: torch.randn(B, S, H, D, device="cuda", dtype=BF16) for n in "qkv"}
            inputs["causal"] = causal
            pairs = B * H * S * S // (2 if causal else 1)
            yield f"{D} | {'causal' if causal else 'full'} | {S}", pairs, inputs


def windowed(S: int, left: int) -> int:
    """Pairs under a causal window of ``left`` keys before a query."""
    return sum(min(i, left) + 1 for i in range(S))


def lengths(count: int, longest: int) -> list[int]:
    """Sequences from 16 tokens to ``longest``, in equal steps of their logarithm, in no order."""
    step = math.log(longest / 16) / (count - 1)
    return [round(16 * math.exp(step * ((29 * i + 7) % count))) for i in range(count)]  # 29: no factor of count


def packed(many: list[int], H: int, D: int) -> tuple[int, Inputs]:
    """Pairs under a causal mask, arguments."""
    edges = torch.tensor([0, *many]).cumsum(0).int().cuda()
    inputs: Inputs = {n: torch.randn(sum(many), H, D, device="cuda", dtype=BF16) for n in "qkv"}
    inputs |= {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "causal": True, "most": max(many)}
    return H * sum(n * (n + 1) // 2 for n in many), inputs


def other_calls() -> Iterator[tuple[str, int, Inputs]]:
    """Grouped heads, windows, packed sequences."""
    for S in (2048, 8192):
        B, H = TOKENS // S, 64
        inputs: Inputs = {n: torch.randn(B, S, H if n == "q" else 8, 128, device="cuda", dtype=BF16) for n in "qkv"}
        yield f"64 heads, 8 of keys, causal, S {S} | 128", B * H * S * (S + 1) // 2, inputs | {"causal": True}
    for D in (64, 128):
        H = WIDTH // D
        inputs = {n: torch.randn(1, TOKENS, H, D, device="cuda", dtype=BF16) for n in "qkv"}
        for left in (1024, 4096):
            pairs = H * windowed(TOKENS, left)
            yield f"causal, window {left}, S {TOKENS} | {D}", pairs, inputs | {"causal": True, "window_left": left}
        yield (f"causal, 64 packed sequences of 16 to 8192 | {D}", *packed(lengths(64, 8192), H, D))


# ---- measuring -------------------------------------------------------------------------------------------------------


def rates(attention: Attention, inputs: Inputs, pairs: int) -> tuple[float, float]:
    """TFLOP/s of forward and of backward; nan where there is no such call."""
    D = inputs["q"].shape[-1]
    leaves = {n: t.detach().requires_grad_() if n in "qkv" else t for n, t in inputs.items()}
    taken = [math.nan, math.nan]
    try:
        with torch.no_grad():
            attention(**inputs)
            taken[0] = do_bench(lambda: attention(**inputs), return_mode="median")
        out = attention(**leaves)
        dout, operands = torch.randn_like(out), [leaves[n] for n in "qkv"]
        taken[1] = do_bench(lambda: torch.autograd.grad(out, operands, dout, retain_graph=True), return_mode="median")
    except (NotImplementedError, RuntimeError, AssertionError, ValueError, TypeError) as error:
        print(f"{attention.__name__}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    return 4 * D * pairs / taken[0] / 1e9, 10 * D * pairs / taken[1] / 1e9


def product_rate() -> float:
    """TFLOP/s of a matrix product of 8192^3."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    return 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9


def rate_table(first: str, calls: Iterator[tuple[str, int, Inputs]], product: float) -> list[str]:
    """Ours, as a share of the matrix product, and over each of the others'; forward, backward."""
    others = peers()
    over = [f"over {name}" for name in others]
    lines = [
        f"| {first} | "
        + " | ".join(f"{way} | of a product | {' | '.join(over)}" for way in ("forward", "backward"))
        + " |"
    ]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    ratios: dict[str, list[float]] = {f"{way}, {name}": [] for way in ("forward", "backward") for name in others}
    for what, pairs, inputs in calls:
        mine, theirs = rates(ours, inputs, pairs), [rates(peer, inputs, pairs) for peer in others.values()]
        cells = []
        for i, way in enumerate(("forward", "backward")):
            cells += [f"{mine[i]:.0f}", f"{mine[i] / product:.2f}"]
            for name, rate in zip(others, theirs, strict=True):
                ratio = mine[i] / rate[i]
                cells.append("" if math.isnan(ratio) else f"{ratio:.2f}")
                ratios[f"{way}, {name}"] += [] if math.isnan(ratio) else [ratio]
        lines.append(f"| {what} | {' | '.join(cells)} |")
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
    kinds: dict[tuple[Any, ...], Inputs] = {}
    for _, _, inputs in (*dense_calls(), *other_calls()):
        kind = (inputs["q"].shape[-1], inputs["q"].dim(), *(inputs.get(n) for n in ("causal", "window_left")))
        kinds.setdefault((*kind, inputs["q"].shape[-2] == inputs["k"].shape[-2]), inputs)
    for inputs in list(kinds.values())[at::count]:
        leaves = {n: t.detach().requires_grad_() if n in "qkv" else t for n, t in inputs.items()}
        out = fa4(**leaves)
        out.backward(torch.randn_like(out))
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
    product = product_rate()
    head = (
        f"{where}, commit {info.environment()['commit'][:8]}, bf16, {TOKENS} tokens, heads x head dimension {WIDTH}. "
        f"TFLOP/s through the operators, share of a matrix product of 8192^3 ({product:.0f} TFLOP/s), and ours over "
        "others:"
    )
    dense = rate_table("head dimension | mask | S", dense_calls(), product)
    other = rate_table("call | head dimension", other_calls(), product)
    tables = [head, "", *dense, "", "TFLOP/s of what the mask leaves:", "", *other, ""]
    text = "\n".join([*tables, "Memory beside the inputs:", "", *memory_table()])
    print(text)
    if chosen.path:
        before, rest = chosen.path.read_text().split(BEGIN)
        chosen.path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
