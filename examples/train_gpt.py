#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a small byte-level GPT on real text: with fastkern's kernels, with PyTorch's, or with both side by side.

    python examples/train_gpt.py                              # both, on the GPU if there is one: about a minute
    python examples/train_gpt.py --kernels fastkern --steps 5000 --data shakespeare.txt
    python examples/train_gpt.py --model 124m --compile       # 124 M parameters, 32 x 1024 tokens a step, bfloat16
    python examples/train_gpt.py --model 124m --compile also --steps 100 --table build/train_gpt.md
    python examples/train_gpt.py --kernels fastkern --optimizer lion

The text is the source code of Python's standard library, which every machine has, or --data FILE. The model is a modern
decoder: RMSNorm, rotary positions, grouped-query causal attention, SwiGLU. All that it computes with, but for plain
matrix products, is a table, `Kernels`: changing the kernels is changing the table. `--kernels both` trains two models
from the same initial weights on the same batches, shows their losses and speeds, draws them, and fails if the two did
not learn the same. `--compile also` adds a model under torch.compile for each, all in turns of some steps in one run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- kernels ---------------------------------------------------------------------------------------------------------


def torch_add_norm(branch: Tensor | None, stream: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The seam between two halves of a block: the residual stream with the branch added to it, normed and as it is."""
    stream = stream if branch is None else stream + branch
    return F.rms_norm(stream, weight.shape, weight, 1e-6), stream


def torch_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions: q (B, S, H, D) and k (B, S, G, D) turned by the angles whose cos and sin are (S, D/2)."""
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]
    halves = [x.chunk(2, dim=-1) for x in (q, k)]
    q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1) for a, b in halves)
    return q, k


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q (B, S, H, D) over k and v (B, S, G, D); H is a multiple of G."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def torch_optimizer(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(groups, fused=True, **options)


def torch_step(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """A step with gradients scaled down to a norm of at most `max_norm`."""
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    optimizer.step()


@dataclass(frozen=True)
class Kernels:
    """All that the model and its training compute with, apart from plain matrix products. The defaults are PyTorch."""

    name: str = "torch"
    add_norm: Callable[[Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]] = torch_add_norm
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = torch_rope
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = torch_attention
    swiglu: Callable[[Tensor], Tensor] = torch_swiglu
    linear_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = torch_linear_cross_entropy
    optimizer: Callable[..., torch.optim.Optimizer] = torch_optimizer
    step: Callable[[torch.optim.Optimizer, float], None] = torch_step


def fastkern_kernels() -> Kernels:
    try:
        import fastkern
    except ModuleNotFoundError as error:
        raise SystemExit(f"fastkern cannot be imported ({error}): `pip install .`, or use --kernels torch") from None

    def autocast(x: Tensor) -> torch.dtype:
        """What torch's matrix products take at this moment; fastkern keeps the types that it is given."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    def add_norm(branch: Tensor | None, stream: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if branch is None:
            return fastkern.rms_norm(stream, weight, out_dtype=autocast(stream)), stream
        return fastkern.add_rms_norm(branch, stream, weight, out_dtype=autocast(stream))

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        dtype = autocast(hidden)
        return fastkern.linear_cross_entropy(hidden.to(dtype), weight.to(dtype), target)

    def optimizer(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        return getattr(fastkern.optim, name)(groups, **options)

    return Kernels(
        name="fastkern",
        add_norm=add_norm,
        rope=fastkern.rope,
        attention=partial(fastkern.flash_attn, causal=True),
        swiglu=fastkern.swiglu,
        linear_cross_entropy=linear_cross_entropy,
        optimizer=optimizer,
        step=lambda optimizer, max_norm: optimizer.step(max_norm=max_norm),
    )


# ---- model -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The last sum is left to the next block, whose norm does it in the same pass: a block takes and gives a branch and
    the residual stream that it is still to be added to.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels, self.head_dim, self.heads = kernels, width // heads, [heads, kv_heads, kv_heads]
        hidden = math.ceil(width * 8 / 3 / 64) * 64  # as many weights as an MLP of 4 x the width without a gate
        self.norm_attention, self.norm_mlp = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.qkv = nn.Linear(width, sum(self.heads) * self.head_dim, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, branch: Tensor | None, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        y, x = self.kernels.add_norm(branch, x, self.norm_attention)
        q, k, v = self.qkv(y).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=-2)
        q, k = self.kernels.rope(q, k, cos, sin)
        branch = self.attention_out(self.kernels.attention(q, k, v).flatten(-2))
        y, x = self.kernels.add_norm(branch, x, self.norm_mlp)
        return self.mlp_out(self.kernels.swiglu(self.gate_up(y))), x


class GPT(nn.Module):
    def __init__(self, o: argparse.Namespace, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.embedding = nn.Embedding(o.vocab, o.width)
        self.blocks = nn.ModuleList(Block(o.width, o.heads, o.kv_heads, kernels) for _ in range(o.layers))
        self.norm = nn.Parameter(torch.ones(o.width))
        self.head = nn.Linear(o.width, o.vocab, bias=False)
        if not o.untied:
            self.head.weight = self.embedding.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # as GPT-2, whose width is 768; what is added to the residual stream starts smaller
                scale = 1 / math.sqrt(2 * o.layers) if name.endswith("_out.weight") else 1.0
                nn.init.normal_(weight, std=0.02 * math.sqrt(768 / o.width) * scale)
        half = o.width // o.heads // 2
        angles = torch.outer(torch.arange(o.context), 10000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head is applied to: (B, S, width) of tokens (B, S)."""
        branch, x, length = None, self.embedding(tokens), tokens.shape[1]
        for block in self.blocks:
            branch, x = block(branch, x, self.cos[:length], self.sin[:length])
        return self.kernels.add_norm(branch, x, self.norm)[0]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """The mean cross entropy of targets (B, S) or, without targets, the logits of the next token (B, vocab)."""
        x = self.hidden(tokens)
        if targets is None:
            return self.head(x[:, -1])
        return self.kernels.linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())


# ---- text ------------------------------------------------------------------------------------------------------------


def standard_library() -> bytes:
    """Python's standard library, in a fixed shuffled order, without its tests, its tables and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names = sorted((zlib.crc32(name.encode()), name) for name in names if skip.isdisjoint(name.split("/")))
    return b"\n".join((root / name).read_bytes() for _, name in names)


class Text:
    """Bytes, the last twentieth for validation, and batches of them: tokens and targets, (batch, context) each."""

    def __init__(self, o: argparse.Namespace) -> None:
        name = o.data or f"the standard library in {sysconfig.get_path('stdlib')}"
        try:
            data = Path(o.data).read_bytes() if o.data else standard_library()
        except OSError as error:
            raise SystemExit(f"cannot read the text {name}: {error.strerror}") from None
        self.options, cut = o, len(data) * 19 // 20
        if len(data) - cut <= o.context + 1:
            raise SystemExit(
                f"too little text: {name} has {len(data):,} bytes; the twentieth of them kept for validation is not "
                f"more than --context {o.context}: give a longer --data FILE or a smaller --context"
            )
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(o.device)
        self.training, self.validation = tokens[:cut], tokens[cut:]
        print(f"text: {name}, {len(self.training):,} bytes for training and {len(self.validation):,} for validation")

    def windows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        window = text[
            starts.to(text.device)[:, None] + torch.arange(self.options.context + 1, device=text.device)
        ].long()
        return window[:, :-1], window[:, 1:]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a training step, at random; the same for every model."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
        limit = len(self.training) - self.options.context
        return self.windows(self.training, torch.randint(limit, (self.options.batch,), generator=generator))

    def validation_batches(self, count: int = 8) -> list[tuple[Tensor, Tensor]]:
        last = len(self.validation) - self.options.context - 1
        starts = torch.linspace(0, last, count * self.options.batch, dtype=torch.float64).long()
        return [self.windows(self.validation, part) for part in starts.chunk(count)]


# ---- training --------------------------------------------------------------------------------------------------------


WIDTH = 17  # of a column


@dataclass
class Run:
    """One model in training, and what was measured on the way."""

    kernels: Kernels
    options: argparse.Namespace
    compiled: bool = False
    losses: list[float] = field(default_factory=list)  # nats/byte, one a step
    gradients: dict[str, float] = field(default_factory=dict)  # norm of each weight's gradient in the first step
    speeds: list[float] = field(default_factory=list)  # tokens/s, one a block of steps
    validation: float = math.nan
    peak: int = 0  # bytes of the GPU, the most in any block but the first: its own, whatever other runs hold

    @property
    def name(self) -> str:
        return self.kernels.name + (" compiled" if self.compiled and self.options.compile == "also" else "")

    def __post_init__(self) -> None:
        o = self.options
        torch.manual_seed(o.seed)  # the same initial weights, whatever the kernels
        self.model = GPT(o, self.kernels).to(o.device)
        self.forward = torch.compile(self.model) if self.compiled else self.model
        self.autocast = torch.autocast(o.device.type, getattr(torch, o.dtype), enabled=o.dtype != "float32")
        groups = [[p for p in self.model.parameters() if p.dim() == dim] for dim in (1, 2)]
        decay = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.0, 0.1), strict=True)]
        name, rate, options = OPTIMIZERS[o.optimizer]
        if o.states and self.kernels.name != "torch":
            options = {**options, "state_dtype": o.states if o.states == "8bit" else getattr(torch, o.states)}
        self.optimizer = self.kernels.optimizer(name, decay, lr=o.lr * rate, **options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)

    def schedule(self, step: int) -> float:
        """A linear warm-up over a twentieth of the steps, under a cosine down to a tenth of the learning rate."""
        return min((step + 1) / (self.options.steps / 20), 0.55 + 0.45 * math.cos(math.pi * step / self.options.steps))

    def train(self, text: Text, steps: range) -> None:
        losses, before = [], self.memory()
        start = self.finished()
        for step in steps:
            with self.autocast:
                loss = self.forward(*text.batch(step))
            loss.backward()
            losses.append(loss.detach())
            if step == 0:
                gradients = {name: weight.grad for name, weight in self.model.named_parameters()}
                self.gradients = {name: 0.0 if g is None else g.norm().item() for name, g in gradients.items()}
            self.kernels.step(self.optimizer, 1.0)
            self.optimizer.zero_grad()
            self.scheduler.step()
        self.speeds.append(len(steps) * self.options.batch * self.options.context / (self.finished() - start))
        self.losses += torch.stack(losses).tolist()  # only now, as reading a value waits for the GPU
        if before is not None and steps.start > 0:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.options.device) - before)

    def memory(self) -> int | None:
        """Bytes of the GPU in use that are not this run's weights and optimizer states; the peak begins anew."""
        if self.options.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.options.device)
        states = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        own = [*self.model.parameters(), *self.model.buffers(), *(x for x in states if x.is_cuda)]
        return torch.cuda.memory_allocated(self.options.device) - sum(x.nbytes for x in own)

    def finished(self) -> float:
        """The time when the device has done all its work."""
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)
        return time.perf_counter()

    @torch.no_grad()
    def validate(self, text: Text) -> None:
        with self.autocast:
            self.validation = torch.stack([self.model(*batch) for batch in text.validation_batches()]).mean().item()

    @torch.no_grad()
    def sample(self, prompt: str, length: int, temperature: float) -> str:
        tokens, generator = list(prompt.encode()), torch.Generator().manual_seed(self.options.seed)
        for _ in range(length):
            with self.autocast:
                logits = self.model(torch.tensor([tokens[-self.options.context :]], device=self.options.device))
            chances = (logits[0, :256].float().cpu() / temperature).softmax(0)  # a vocabulary above 256 is padding
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        text = bytes(tokens).decode(errors="replace")
        return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def train(o: argparse.Namespace, text: Text, tables: Sequence[Kernels]) -> list[Run]:
    """Train a model per table, in turns of a block of steps, so that a slow moment of the machine meets them all."""
    ways = {"": (False,), "all": (True,), "also": (False, True)}[o.compile]
    runs = [Run(kernels, o, compiled) for compiled in ways for kernels in tables]
    print(f"model: {sum(p.numel() for p in runs[0].model.parameters()):,} parameters, {o.dtype}, on {o.device}")
    print("\nloss in nats/byte, mean over the steps since the row before")
    print("  step", *(f"{run.name:>{WIDTH}}" for run in runs), *["  difference"] * (len(runs) == 2))
    block, start = math.ceil(o.steps / 20), 0
    for turn, stop in enumerate(sorted({1, *range(block, o.steps, block), o.steps})):
        for run in runs[:: -1 if turn % 2 else 1]:
            run.train(text, range(start, stop))
        row = [statistics.fmean(run.losses[start:]) for run in runs]
        difference = [f"{row[-1] - row[0]:+12.6f}"] * (len(row) == 2)
        print(f"{stop:6}", *(f"{x:{WIDTH}.4f}" for x in row), *difference, flush=True)
        start = stop
    for run in runs:
        run.speeds = run.speeds[1:] or run.speeds  # without the first step, which warms up
        run.validate(text)
    return runs


# ---- report ----------------------------------------------------------------------------------------------------------


def rows(runs: Sequence[Run]) -> list[dict[str, str | float]]:
    """What was measured. Speeds compare blocks of steps that were run in turns, and take the median."""

    def last(run: Run) -> float:
        return statistics.fmean(run.losses[-max(1, len(run.losses) // 20) :])

    return [
        {
            "kernels": run.name,
            "training loss": last(run),
            "validation loss": run.validation,
            "difference": max(abs(last(run) / last(runs[0]) - 1), abs(run.validation / runs[0].validation - 1)),
            "tokens/s": statistics.median(run.speeds),
            "speed": statistics.median(b / a for a, b in zip(runs[0].speeds, run.speeds, strict=True)),
            "GiB": run.peak / 2**30,
        }
        for run in runs
    ]


def table(runs: Sequence[Run]) -> str:
    """A row for each run, compared with the first."""
    lines = [f"{'kernels':<17} training loss   validation loss     tokens/s    speed   difference  peak GiB"]
    for row in rows(runs):
        numbers = (
            "{training loss:14.4f}{validation loss:18.4f}{tokens/s:13,.0f}{speed:8.2f}x{difference:13.3%}{GiB:10.1f}"
        )
        lines.append(f"{row['kernels']:<17}{numbers.format(**row)}")
    if len(runs) == 4:
        ratio = statistics.median(b / a for a, b in zip(runs[2].speeds, runs[3].speeds, strict=True))
        lines.append(f"{runs[3].name}: {ratio:.2f}x the speed of {runs[2].name}")
    return "\n".join(lines)


def write_table(runs: Sequence[Run], path: Path) -> str:
    """The rows and what they were measured on, as Markdown, or as JSON if the file is called that; the path."""
    o, made = runs[0].options, rows(runs)
    where = torch.cuda.get_device_name(o.device) if o.device.type == "cuda" else "CPU"
    facts = {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in vars(o).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        device = {"device_name": where, "torch": torch.__version__}
        path.write_text(json.dumps({"options": facts | device, "rows": made}, indent=1) + "\n")
        return str(path)
    lines = [
        f"{where}, torch {torch.__version__}: {sum(p.numel() for p in runs[0].model.parameters()):,} parameters, "
        f"{o.dtype}, {o.batch} x {o.context} tokens a step, {o.steps} steps, {o.optimizer}",
        "",
        "| kernels | tokens/s | speed | peak GiB | training loss | validation loss | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    row = (
        "| {kernels} | {tokens/s:,.0f} | {speed:.2f}x | {GiB:.1f} | {training loss:.4f} | {validation loss:.4f} "
        "| {difference:.2%} |"
    )
    path.write_text("\n".join([*lines, *(row.format(**one) for one in made)]) + "\n")
    return str(path)


class DisagreementError(AssertionError):
    """Two tables of kernels did not train the same model."""


def assert_agreement(a: Run, b: Run) -> str:
    """Raise `DisagreementError` unless two runs agree, to rounding where they start and in the mean later; the figures.

    Training amplifies every difference, rounding included, so only the first step of two correct runs agrees to
    rounding. It shows a wrong kernel at once: the loss a wrong forward, the gradients a wrong backward. In the whole
    run, it is what the models learn that must be the same: the loss of each tenth of it and of validation.
    """
    rounding, learning = {"float32": (1e-4, 0.005), "bfloat16": (0.02, 0.01)}[a.options.dtype]
    first = [("loss of step 1", a.losses[0], b.losses[0])]
    first += [(f"gradient of {name} in step 1", norm, b.gradients[name]) for name, norm in a.gradients.items()]
    later = [("validation loss", a.validation, b.validation)]
    steps, parts = len(a.losses), min(10, len(a.losses))
    for start, stop in pairwise(steps * i // parts for i in range(parts + 1)):
        means = (statistics.fmean(run.losses[start:stop]) for run in (a, b))
        later.append((f"mean loss of steps {start + 1} to {stop}", *means))
    figures, wrong = [], []
    for checks, limit in ((first, rounding), (later, learning)):
        errors = [abs(x - y) / max(abs(x), 1e-30) for _, x, y in checks]
        wrong += [f"{what}: {x:.6g}, {y:.6g}" for (what, x, y), e in zip(checks, errors, strict=True) if not e <= limit]
        figures.append(f"{max(errors):.1e} (limit {limit:.0e})")
    if wrong:
        raise DisagreementError("\n  ".join([f"{a.name} and {b.name} disagree", *wrong]))
    return f"relative difference of the first step {figures[0]}, of the losses later {figures[1]}"


def plot(runs: Sequence[Run], path: Path) -> str:
    """Draw the losses and the speeds; says where, or why not."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "none, as matplotlib is not installed (pip install matplotlib)"
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    styles = [("#a9b8cc", 6.0), ("#d1495b", 1.6), ("#5c7899", 3.0), ("#7a1f2b", 1.2)]
    for run, (colour, width) in zip(runs, styles[1:2] if len(runs) == 1 else styles, strict=False):
        losses, reach = run.losses, len(run.losses) // 100
        smooth = [statistics.fmean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]
        label = f"{run.name} (validation {run.validation:.3f})"
        left.plot(range(1, len(smooth) + 1), smooth, color=colour, linewidth=width, label=label)
        speed = statistics.median(run.speeds)
        bar = right.bar(run.name.replace(" ", "\n"), speed, color=colour, width=0.6)
        right.bar_label(bar, [f"{speed:,.0f}"], padding=3)
    left.set(title="training loss, nats/byte", xlabel="step")
    left.legend(frameon=False)
    left.grid(alpha=0.25)
    right.set(title="tokens/s", yticks=[])
    right.margins(x=0.25, y=0.12)
    left.spines[["top", "right"]].set_visible(False)
    right.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return str(path)


# ---- command line ----------------------------------------------------------------------------------------------------

# The class, its learning rate in units of --lr, and what else it is given.
OPTIMIZERS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "adamw": ("AdamW", 1.0, {"betas": (0.9, 0.95)}),
    "sgd": ("SGD", 30.0, {"momentum": 0.9}),
    "lion": ("Lion", 0.1, {"betas": (0.9, 0.99)}),
}

DEFAULTS: dict[str, tuple[int | float | str, int | float | str, str]] = {  # option: small, 124m, meaning
    "steps": (400, 300, "training steps"),
    "batch": (8, 32, "sequences a step"),
    "context": (128, 1024, "bytes a sequence"),
    "layers": (4, 12, "decoder blocks"),
    "width": (128, 768, "length of a token's vector"),
    "heads": (4, 12, "query heads"),
    "kv_heads": (2, 12, "key and value heads; fewer than --heads is grouped-query attention"),
    "vocab": (256, 50304, "rows of embedding and head; above 256 they only cost what a large model's do"),
    "lr": (3e-3, 1e-3, "highest learning rate"),
    "dtype": ("float32", "bfloat16", "float32, or bfloat16 by autocast"),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked; what cannot work is answered in words."""
    summary, _, text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", choices=("fastkern", "torch", "both"), default="both")
    parser.add_argument(
        "--model", choices=("small", "124m"), help="defaults of what follows (124m on a GPU, else small)"
    )
    for name, (small, large, meaning) in DEFAULTS.items():
        choices = ("float32", "bfloat16") if name == "dtype" else None
        text = f"{meaning} ({small}, 124m: {large})"
        parser.add_argument("--" + name.replace("_", "-"), type=type(small), choices=choices, metavar="X", help=text)
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="torch has no lion")
    states, meaning = ("float32", "bfloat16", "8bit"), "fastkern's optimizer states (default: the weights' type)"
    parser.add_argument("--states", choices=states, help=meaning)
    parser.add_argument("--untied", action="store_true", help="a head of its own instead of the embedding's weights")
    meaning = "train the models under torch.compile; also: one of each without and one with it"
    parser.add_argument("--compile", nargs="?", const="all", default="", choices=("all", "also"), help=meaning)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", metavar="FILE", help="text to train on (default: Python's standard library)")
    parser.add_argument("--plot", metavar="FILE", default="build/train_gpt.png", help="picture (default: %(default)s)")
    parser.add_argument("--table", metavar="FILE", help="write speeds, memory and losses there: Markdown, or .json")
    parser.add_argument("--sample-bytes", type=int, default=400, metavar="N", help="text to write at the end")
    o = parser.parse_args(argv)

    gpus = torch.cuda.device_count()
    try:
        o.device = torch.device(o.device or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        parser.error(f"--device {o.device}: not a device; cpu, cuda or cuda:N is")
    if o.device.type not in ("cpu", "cuda"):
        parser.error(f"--device {o.device}: fastkern has kernels for cpu and cuda")
    if o.device.type == "cuda" and (o.device.index or 0) >= gpus:
        parser.error(f"--device {o.device}: PyTorch {torch.__version__} sees {gpus} GPUs; --device cpu always works")
    o.model = o.model or ("124m" if o.device.type == "cuda" else "small")
    for name, (small, large, _) in DEFAULTS.items():
        if getattr(o, name) is None:
            setattr(o, name, large if o.model == "124m" else small)
    for name in ("steps", "batch", "context", "layers", "width", "heads", "kv_heads", "lr"):
        if not 0 < getattr(o, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(o, name)}: must be positive")
    if o.width % (2 * o.heads):
        parser.error(f"--width {o.width} is not a multiple of 2 x --heads {o.heads}: rotary positions turn pairs")
    if o.heads % o.kv_heads:
        parser.error(f"--heads {o.heads} is not a multiple of --kv-heads {o.kv_heads}")
    if o.optimizer == "lion" and o.kernels != "fastkern":
        parser.error(f"--optimizer lion: torch has none; --kernels fastkern has, got --kernels {o.kernels}")
    if o.vocab < 256:
        parser.error(f"--vocab {o.vocab}: a byte has 256 values")
    return o


def main(argv: Sequence[str] | None = None) -> None:
    o = parse(argv)
    makers = {"torch": Kernels, "fastkern": fastkern_kernels}
    tables = [make() for name, make in makers.items() if o.kernels in (name, "both")]
    try:
        runs = train(o, Text(o), tables)
    except torch.OutOfMemoryError:
        raise SystemExit("out of GPU memory: try a smaller --batch or --context, or --model small") from None
    print(f"\n{table(runs)}\n")
    print(f"    plot: {plot(runs, Path(o.plot))}")
    if o.table:
        print(f"   table: {write_table(runs, Path(o.table))}")
    for run in runs[1:]:
        print(f"   agree: {assert_agreement(runs[0], run)}{f' ({run.name})' if len(runs) > 2 else ''}")
    if o.sample_bytes > 0:
        prompt = "\n" if o.data else "class Reader:\n    def __init__(self"
        print(f"\n{runs[-1].name} writes:\n\n{runs[-1].sample(prompt, o.sample_bytes, temperature=0.8)}")


if __name__ == "__main__":
    try:
        main()
    except DisagreementError as error:
        raise SystemExit(f"error: {error}") from None
