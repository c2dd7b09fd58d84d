#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a small Llama of Hugging Face's transformers on real text, as it is and after one call of fastkern.patch.

    python examples/finetune_hf.py                            # a tiny one, under a minute on a CPU
    python examples/finetune_hf.py --hidden 2048 --layers 16 --heads 32 --kv-heads 8 --batch 4 --context 4096 \
        --vocabulary 128256 --dtype bfloat16                  # 1 B parameters, for a GPU

Needs transformers. The model is built from a configuration with random weights, so nothing is downloaded; with
`--model PATH` it is a causal language model from there. The text is that of train_gpt.py, as bytes. Both runs begin
with the same weights and see the same batches; the script shows what was replaced, both losses, the time of a step and
the memory, takes the patch back, and fails if the losses part or if the model does not compute the same bits as before.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import fastkern
import fastkern.optim
import torch
import train_gpt
from torch import Tensor, nn

LIMIT = 2e-2  # relative difference of the last losses


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


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[Tensor]) -> tuple[list[float], float, float]:
    """Losses, the median of seconds a step, and the most memory in GiB (0 on the CPU)."""
    device = steps[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses, seconds = [], []
    for tokens in steps:
        begin = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # which waits for the device
        seconds.append(time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return losses, statistics.median(seconds[len(seconds) // 4 :]), memory


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens[:1]).logits


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", help="a directory to load instead of building a Llama")
    p.add_argument("--data", help="a text file; default: Python's standard library")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--vocabulary", type=int, default=256)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    if o.vocabulary < 256:
        p.error(f"--vocabulary must be at least 256, a number for each byte, got {o.vocabulary}")
    return o


def main() -> None:
    o = arguments()
    steps = batches(o)
    plain = make_model(o)
    patched = copy.deepcopy(plain)
    print(
        f"{sum(p.numel() for p in plain.parameters()):,} parameters, {o.steps} steps of {o.batch} x {o.context} tokens"
    )

    results = {"transformers": train(plain, torch.optim.AdamW(plain.parameters(), o.lr), steps)}
    del plain
    report = fastkern.patch(patched)
    print(report)
    results["fastkern"] = train(patched, fastkern.optim.AdamW(patched.parameters(), o.lr), steps)

    print(f"\n{'':14}{'first loss':>12}{'last loss':>12}{'ms a step':>12}{'tokens/s':>12}{'GiB':>8}")
    for name, (losses, seconds, memory) in results.items():
        speed = o.batch * o.context / seconds
        print(f"{name:14}{losses[0]:12.4f}{losses[-1]:12.4f}{1e3 * seconds:12.1f}{speed:12.0f}{memory:8.1f}")
    ours, theirs = (results[name][0][-1] for name in ("fastkern", "transformers"))
    if not abs(ours - theirs) <= LIMIT * abs(theirs):
        raise SystemExit(f"the losses differ by more than {LIMIT:.0%}")

    fastkern.unpatch(patched)
    untouched = make_model(o)
    untouched.load_state_dict(patched.state_dict())
    if not torch.equal(logits(patched, steps[0]), logits(untouched, steps[0])):
        raise SystemExit("after unpatch the model does not compute what it did before")
    print("unpatched: the same bits as a model that was never patched")


if __name__ == "__main__":
    main()
