#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a Llama of Hugging Face's transformers on real text: as it is, with Liger's patch, and after fastkern.patch.

    python examples/finetune_hf.py                            # a tiny one, under a minute on a CPU
    python examples/finetune_hf.py --hidden 2048 --layers 16 --heads 32 --kv-heads 8 --batch 4 --context 4096 \
        --vocabulary 128256 --dtype bfloat16 --lr 1e-4        # 1.2 B parameters, for a GPU

Needs transformers. The model is built from a configuration with random weights, so nothing is downloaded; with
`--model PATH` it is a causal language model from there. The text is that of train_gpt.py, as bytes. All models begin
with the same weights and see the same batches; they train in turns of some steps, so that a slow moment of the machine
meets them all. Liger (`pip install liger-kernel`) takes part where it is installed, the device is a GPU and the model
is a Llama. The script shows what was replaced, losses, time of a step and memory, takes the patch back, and fails if
the losses part or if the model does not compute the same bits as before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastkern
import fastkern.optim
import torch
import train_gpt
from torch import Tensor, nn

LIMIT = 2e-2  # relative difference of the mean losses of the last quarter


def make_model(o: argparse.Namespace) -> Any:
    """A causal language model, and the same weights every time."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise SystemExit("this example needs transformers: pip install transformers") from None
    torch.manual_seed(o.seed)
    if o.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(o.model)
    else:
        config = transformers.LlamaConfig(
            vocab_size=o.vocabulary, hidden_size=o.hidden, intermediate_size=4 * o.hidden, num_hidden_layers=o.layers,
            num_attention_heads=o.heads, num_key_value_heads=o.kv_heads, max_position_embeddings=o.context,
            tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        with o.device:
            model = transformers.LlamaForCausalLM(config)
    return model.to(o.device, getattr(torch, o.dtype)).train()


def batches(o: argparse.Namespace) -> list[Tensor]:
    """(batch, context) tokens of every step."""
    data = Path(o.data).read_bytes() if o.data else train_gpt.standard_library()
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    if len(tokens) <= o.context:
        raise SystemExit(f"too little text: {len(tokens)} bytes for --context {o.context}")
    generator = torch.Generator().manual_seed(o.seed)
    starts = torch.randint(len(tokens) - o.context, (o.steps, o.batch, 1), generator=generator)
    return list(tokens[starts + torch.arange(o.context)].to(o.device))


@contextmanager
def liger() -> Iterator[None]:
    """Liger's patch of the classes and functions of transformers's Llama, for what is built and run inside."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    names, forward = dict(vars(modeling_llama)), modeling_llama.LlamaForCausalLM.forward
    apply_liger_kernel_to_llama()
    try:
        yield
    finally:
        vars(modeling_llama).update(names)
        modeling_llama.LlamaForCausalLM.forward = forward


def why_no_liger(o: argparse.Namespace) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if o.device.type != "cuda":
        return "its kernels need a GPU"
    return "with --model: its patch is for each architecture another" if o.model else None


@dataclass
class Run:
    """One model in training, and what was measured on the way."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    around: Any = nullcontext  # a context to run it in
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # a step
    peak: int = 0  # bytes: the most in a turn, less what was there before it
    resident: int = 0  # bytes: parameters and states

    def train(self, steps: list[Tensor]) -> None:
        device = steps[0].device
        gpu = device.type == "cuda"
        before = torch.cuda.memory_allocated(device) if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        with self.around():
            for tokens in steps:
                begin = time.perf_counter()
                loss = self.model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.losses.append(loss.item())  # which waits for the device
                self.seconds.append(time.perf_counter() - begin)
        del loss
        if gpu:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(device) - before)
            self.resident = sum(t.nbytes for t in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        for state in self.optimizer.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor) and x.is_cuda)

    def row(self, o: argparse.Namespace) -> dict[str, Any]:
        seconds = statistics.median(self.seconds[o.warm_up :] or self.seconds)
        last = statistics.fmean(self.losses[-max(1, len(self.losses) // 4) :])
        memory = (self.peak + self.resident) / 2**30
        return {
            "run": self.name, "first_loss": self.losses[0], "last_losses": last, "ms_a_step": 1e3 * seconds,
            "tokens_per_s": o.batch * o.context / seconds, "peak_gib": memory,
        }  # fmt: skip


def train(o: argparse.Namespace, steps: list[Tensor]) -> list[Run]:
    """All runs, in turns; fastkern's is the last."""
    makers: dict[str, AbstractContextManager[None]] = {"transformers": nullcontext()}
    missing = why_no_liger(o)
    if missing is None:
        makers["liger"] = liger()
    else:
        print(f"liger: left out, {missing}")
    runs = []
    for name, context in makers.items():
        with context:
            model = make_model(o)
        if runs:  # whatever numbers its classes draw
            model.load_state_dict(runs[0].model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), o.lr, fused=True)
        runs.append(Run(name, model, optimizer, liger if name == "liger" else nullcontext))
    model = make_model(o)
    print(fastkern.patch(model))
    runs.append(Run("fastkern", model, fastkern.optim.AdamW(model.parameters(), o.lr)))

    # The first turn is the warm-up; what it allocates for good (states) counts as resident from then on.
    turns = [steps[: o.warm_up], *(steps[i : i + o.turn] for i in range(o.warm_up, len(steps), o.turn))]
    for i, turn in enumerate(turns):
        for run in runs[:: -1 if i % 2 else 1]:
            run.train(turn)
            if i == 0:
                run.peak = 0
    return runs


def report(o: argparse.Namespace, runs: list[Run]) -> None:
    rows = [run.row(o) for run in runs]
    print("\nmodels in turns of the same batches, forward + backward + step; AdamW: torch's fused one, and fastkern's")
    print(f"{'':14}{'first loss':>12}{'last losses':>12}{'ms a step':>12}{'tokens/s':>12}{'peak GiB':>10}")
    for row in rows:
        print("{run:14}{first_loss:12.4f}{last_losses:12.4f}{ms_a_step:12.1f}{tokens_per_s:12,.0f}{peak_gib:10.1f}"
              .format(**row))  # fmt: skip
    *others, ours = rows
    for other in others:
        speed = other["ms_a_step"] / ours["ms_a_step"]
        memory = f", {ours['peak_gib'] / other['peak_gib']:.2f}x of its memory" if other["peak_gib"] else ""
        print(f"fastkern: {speed:.2f}x the speed of {other['run']}{memory}")
    if o.json:
        facts = {k: str(v) if k == "device" else v for k, v in vars(o).items()}
        device = torch.cuda.get_device_name(o.device) if o.device.type == "cuda" else "cpu"
        parameters = sum(p.numel() for p in runs[-1].model.parameters())
        facts |= {"device_name": device, "torch": torch.__version__, "parameters": parameters}
        Path(o.json).write_text(json.dumps({"options": facts, "rows": rows}, indent=1) + "\n")
    for other in others:
        difference = abs(ours["last_losses"] - other["last_losses"])
        if not difference <= LIMIT * abs(other["last_losses"]):
            raise SystemExit(f"the losses of fastkern and {other['run']} differ by more than {LIMIT:.0%}")


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens[:1]).logits


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", help="a directory to load instead of building a Llama")
    p.add_argument("--data", help="a text file; default: Python's standard library")
    p.add_argument("--steps", type=int, default=40, help="of each model, the warm-up included")
    p.add_argument("--warm-up", type=int, default=5, metavar="N", help="steps whose time and memory do not count")
    p.add_argument("--turn", type=int, default=5, metavar="N", help="steps until it is the next model's turn")
    p.add_argument("--json", metavar="FILE", help="write the table there")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--vocabulary", type=int, default=256)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    if o.vocabulary < 256:
        p.error(f"--vocabulary must be at least 256, a number for each byte, got {o.vocabulary}")
    if not 0 < o.warm_up < o.steps or o.turn < 1:
        p.error(f"--warm-up must be in 1 to --steps - 1 and --turn positive, got {o.warm_up}, {o.steps} and {o.turn}")
    return o


def main() -> None:
    o = arguments()
    steps = batches(o)
    runs = train(o, steps)
    patched = runs[-1].model
    print(f"{sum(p.numel() for p in patched.parameters()):,} parameters, {o.dtype}, on {o.device}; "
          f"{o.steps} steps of {o.batch} x {o.context} tokens, {o.warm_up} of them to warm up")  # fmt: skip
    report(o, runs)
    del runs

    fastkern.unpatch(patched)
    untouched = make_model(o)
    untouched.load_state_dict(patched.state_dict())
    if not torch.equal(logits(patched, steps[0]), logits(untouched, steps[0])):
        raise SystemExit("after unpatch the model does not compute what it did before")
    print("unpatched: the same bits as a model that was never patched")


if __name__ == "__main__":
    main()
