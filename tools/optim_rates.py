# SPDX-License-Identifier: Apache-2.0
"""Rates of the optimizers on a model of 1.04e9 parameters beside torch's, and host time on many small tensors.

    python tools/optim_rates.py [docs/optim.md]

Prints tables and, with a path, puts them between their marks there. Rates count the bytes that a step must move; the
copy that they are a share of is one of the same run. Needs a CUDA device with 40 GB.
"""

from __future__ import annotations

import datetime
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastkern import optim
from triton.testing import do_bench

BEGIN, END = "<!-- rates: written by tools/optim_rates.py -->", "<!-- end of rates -->"
F32, BF16 = torch.float32, torch.bfloat16


def sizes() -> list[tuple[int, ...]]:
    """147 tensors, as of a Llama of 16 layers with a vocabulary of 32768 each way."""
    width, inner, kv = 2048, 8192, 512
    layer: list[tuple[int, ...]] = [(width, width), (kv, width), (kv, width), (width, width), (inner, width),
                                    (inner, width), (width, inner), (width,), (width,)]  # fmt: skip
    return [*layer * 16, (16384, width), (16384, width), (width,)]


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """With gradients."""
    made = [torch.nn.Parameter(torch.randn(s, device="cuda").mul_(0.02).to(dtype)) for s in sizes()]
    for p in made:
        p.grad = torch.randn(p.shape, device="cuda").mul_(1e-3).to(dtype)
    return made


def copy_rate() -> float:
    """GB/s of a copy of 4 GB."""
    source = torch.empty(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 8 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def milliseconds(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, **options: Any) -> tuple[float, int]:
    """Of a step, and how many parameters it updates."""
    those = parameters(dtype)
    max_norm = options.pop("max_norm", None)
    optimizer = make(those, **options)
    step = optimizer.step if max_norm is None else partial(optimizer.step, max_norm=max_norm)
    step()
    taken = do_bench(step, warmup=100, rep=400, return_mode="median")
    count = sum(p.numel() for p in those)
    del optimizer, those, step
    torch.cuda.empty_cache()
    return taken, count


def rate_table() -> list[str]:
    """Each optimizer beside the copy."""
    copy = copy_rate()
    master = {"rounding": "master", "state_dtype": F32}
    cases: list[tuple[str, Callable[..., torch.optim.Optimizer], torch.dtype, int, dict[str, Any]]] = [
        ("AdamW f32", optim.AdamW, F32, 28, {}),
        ("torch AdamW fused f32", torch.optim.AdamW, F32, 28, {"fused": True}),
        ("AdamW bf16", optim.AdamW, BF16, 14, {}),
        ("torch AdamW fused bf16", torch.optim.AdamW, BF16, 14, {"fused": True}),
        ("AdamW bf16, stochastic", optim.AdamW, BF16, 14, {"rounding": "stochastic"}),
        ("AdamW bf16, f32 states", optim.AdamW, BF16, 22, {"state_dtype": F32}),
        ("AdamW bf16, f32 states, stochastic", optim.AdamW, BF16, 22, {"rounding": "stochastic", "state_dtype": F32}),
        ("AdamW bf16, f32 states, Kahan", optim.AdamW, BF16, 26, {"rounding": "kahan", "state_dtype": F32}),
        ("AdamW bf16, f32 states, remainder", optim.AdamW, BF16, 26, {"rounding": "remainder", "state_dtype": F32}),
        ("AdamW bf16, f32 states, master", optim.AdamW, BF16, 28, master),
        ("AdamW bf16, 8-bit states", optim.AdamW, BF16, 10, {"state_dtype": "8bit"}),
        (
            "AdamW bf16, 8-bit states, stochastic",
            optim.AdamW,
            BF16,
            10,
            {"state_dtype": "8bit", "rounding": "stochastic"},
        ),
        ("Lion bf16, 8-bit states", optim.Lion, BF16, 8, {"state_dtype": "8bit"}),
        ("AdamW f32, amsgrad", optim.AdamW, F32, 36, {"amsgrad": True}),
        ("AdamW f32, clipped in the step", optim.AdamW, F32, 32, {"max_norm": 1.0}),
        ("SGD f32, momentum", optim.SGD, F32, 20, {"momentum": 0.9}),
        ("torch SGD fused f32, momentum", torch.optim.SGD, F32, 20, {"momentum": 0.9, "fused": True}),
        ("SGD bf16, momentum", optim.SGD, BF16, 10, {"momentum": 0.9}),
        ("Lion f32", optim.Lion, F32, 20, {}),
        ("Lion bf16", optim.Lion, BF16, 10, {}),
        ("LAMB f32", optim.LAMB, F32, 40, {}),
        ("LAMB bf16", optim.LAMB, BF16, 20, {}),
        ("Adagrad f32", optim.Adagrad, F32, 20, {}),
        ("RMSprop f32", optim.RMSprop, F32, 20, {}),
        ("NAdam f32", optim.NAdam, F32, 28, {}),
        ("RAdam f32", optim.RAdam, F32, 28, {}),
    ]
    lines = [f"A copy in the same run: {copy:.0f} GB/s.", "",
             "| optimizer | bytes a parameter | ms | GB/s | of the copy |", "|---|---|---|---|---|"]  # fmt: skip
    for name, make, dtype, size, options in cases:
        taken, count = milliseconds(make, dtype, **options)
        rate = count * size / taken / 1e6
        lines.append(f"| {name} | {size} | {taken:.2f} | {rate:.0f} | {100 * rate / copy:.0f} % |")
        print(lines[-1], flush=True)
    return lines


def host_microseconds(optimizer: torch.optim.Optimizer, those: list[torch.nn.Parameter], fresh: bool) -> float:
    """Median of the host time of a step; with `fresh` gradients, which lie elsewhere each time."""
    times = []
    kept: list[Any] = []
    for i in range(40):
        if fresh or i == 0:
            kept.append([p.grad for p in those])
            del kept[:-2]
            for p in those:
                p.grad = torch.zeros_like(p)
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[5:])


def host_table() -> list[str]:
    """Steps that are all host time."""
    lines = ["| tensors of 64 elements | gradients | AdamW, ms | torch fused, ms |", "|---|---|---|---|"]
    for count in (1000, 10_000):
        for fresh in (False, True):
            cells = []
            for make, options in ((optim.AdamW, {}), (torch.optim.AdamW, {"fused": True})):
                those = [torch.nn.Parameter(torch.zeros(64, device="cuda")) for _ in range(count)]
                cells.append(f"{host_microseconds(make(those, **options), those, fresh) / 1000:.3f}")
            lines.append(f"| {count:,} | {'new' if fresh else 'the same'} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Prints the tables, and puts them in the page that is named."""
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}."
    count = sum(torch.Size(s).numel() for s in sizes())
    lines = [f"{where} {count / 1e9:.2f}e9 parameters in {len(sizes())} tensors.", "", *rate_table(), "",
             "Host time of a step:", "", *host_table()]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
