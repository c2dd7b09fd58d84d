#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generate text for several prompts at once, with a cache of keys and values.

    python examples/generate.py                               # trains a small GPT for some seconds, then writes
    python examples/generate.py --steps 2000 --temperature 0.8 --prompt "def main" --prompt "class Reader:"

The model is that of train_gpt.py. Prompts of different lengths are one batch: row b has `lengths[b]` tokens in the
cache and `new[b]` in this call, `seqused_q` and `seqused_k` say so to the attention, and what lies behind them is never
read. So the prompts and each single token go through one function, `Decoder.advance`.

In the end the logits of all tokens that were written are computed again by plain PyTorch, without a cache, one sequence
at a time and without padding; the script fails if they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import fastkern
import torch
import train_gpt
from torch import Tensor

PROMPTS = ("import ", "class Reader:\n    def __init__(self", "def main():\n", "    for name in ")
LIMIT = 1e-4  # of the difference between two computations of a logit in float32, relative to the largest


class Decoder:
    """A model and the keys and values of the tokens that it has seen.

    Args:
        model: with B sequences in mind.
        batch: B.
        capacity: the most tokens of a sequence.
    """

    def __init__(self, model: train_gpt.GPT, batch: int, capacity: int) -> None:
        weight, block = model.head.weight, model.blocks[0]
        self.model, self.capacity = model, capacity
        shape = (len(model.blocks), batch, capacity, block.heads[1], block.head_dim)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        self.rows = torch.arange(batch, device=weight.device)[:, None]
        self.cos, self.sin = fastkern.rope_table(capacity, block.head_dim, device=weight.device)

    @torch.no_grad()
    def advance(self, tokens: Tensor, new: Tensor) -> Tensor:
        """Take the first `new[b]` of tokens (B, S) into row b; the logits after the last of them, (B, vocab)."""
        model, total = self.model, self.lengths + new
        positions = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        positions = positions.clamp(max=self.capacity - 1)  # what pads a row may lie beyond the end
        branch, x = None, model.embedding(tokens)
        for block, keys, values in zip(model.blocks, self.keys, self.values, strict=True):
            y, x = model.kernels.add_norm(branch, x, block.norm_attention)
            q, k, v = block.qkv(y).unflatten(-1, (-1, block.head_dim)).split(block.heads, dim=-2)
            q, k = fastkern.rope(q, k, self.cos, self.sin, positions)
            keys[self.rows, positions], values[self.rows, positions] = k, v
            y = fastkern.flash_attn(q, keys, values, causal=True, seqused_q=new, seqused_k=total)
            y, x = model.kernels.add_norm(block.attention_out(y.flatten(-2)), x, block.norm_mlp)
            branch = block.mlp_out(model.kernels.swiglu(block.gate_up(y)))
        self.lengths = total
        y, _ = model.kernels.add_norm(branch, x, model.norm)
        return model.head(y[self.rows[:, 0], new.long() - 1])


def pick(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token for each row: the likeliest, or one by chance."""
    logits = logits[:, :256].float().cpu()  # a vocabulary above 256 is padding
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def generate(
    model: train_gpt.GPT, prompts: Sequence[Sequence[int]], count: int, temperature: float, seed: int = 0
) -> tuple[list[list[int]], Tensor]:
    """Write `count` tokens behind each prompt; the rows, and the logits (B, count, vocab) that they are from."""
    device, generator = model.head.weight.device, torch.Generator().manual_seed(seed)
    new = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    decoder = Decoder(model, len(prompts), longest + count)
    rows, steps = [list(prompt) for prompt in prompts], []
    for _ in range(count):
        steps.append(decoder.advance(tokens, new))
        tokens, new = pick(steps[-1], temperature, generator)[:, None].to(device), torch.ones_like(new)
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            row.append(token)
    return rows, torch.stack(steps, dim=1)


@torch.no_grad()
def without_cache(model: train_gpt.GPT, row: Sequence[int], count: int) -> Tensor:
    """The logits (count, vocab) that the last `count` tokens of a row were picked from."""
    tokens = torch.tensor([row[:-1]], device=model.head.weight.device)
    return model.head(model.hidden(tokens)[0, -count:])


def largest_difference(model: train_gpt.GPT, rows: Sequence[Sequence[int]], logits: Tensor) -> float:
    """Between logits (B, count, vocab) and those of a model without a cache, relative to the largest logit."""
    expected = torch.stack([without_cache(model, row, logits.shape[1]) for row in rows])
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    return difference if math.isfinite(difference) else math.inf


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given more than once")
    parser.add_argument(
        "--tokens", type=int, default=100, metavar="N", help="to write behind each (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: always the likeliest token")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of training (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    parser.add_argument("--data", metavar="FILE", help="text to train on (default: Python's standard library)")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(argv)
    if o.tokens < 1:
        parser.error(f"--tokens {o.tokens}: must be positive")
    if not 0 <= o.temperature < math.inf:
        parser.error(f"--temperature {o.temperature}: must be at least 0")
    if any(not prompt for prompt in o.prompt or ()):
        parser.error("--prompt: must not be empty")
    return o


def main(argv: Sequence[str] | None = None) -> None:
    o = parse(argv)
    options = ["--model", "small", "--kernels", "fastkern", "--steps", str(o.steps), "--seed", str(o.seed)]
    for name in ("device", "data"):
        options += [f"--{name}", getattr(o, name)] if getattr(o, name) else []
    training = train_gpt.parse(options)
    prompts = [list(prompt.encode()) for prompt in o.prompt or PROMPTS]
    longest = max(map(len, prompts)) + o.tokens
    text = train_gpt.Text(training)
    (run,) = train_gpt.train(training, text, [train_gpt.fastkern_kernels()])
    model = run.model

    start = run.finished()
    rows, logits = generate(model, prompts, o.tokens, o.temperature, o.seed)
    seconds = run.finished() - start
    for prompt, row in zip(prompts, rows, strict=True):
        written = bytes(row[len(prompt) :]).decode(errors="replace")
        print(f"\n{bytes(prompt).decode()!r} is followed by\n{written}")

    start = time.perf_counter()
    without_cache(model, rows[0], 1)
    again = run.finished() - start
    print(f"\n{len(rows)} sequences of up to {longest} tokens")
    print(f"    speed: {len(rows) * o.tokens / seconds:,.0f} tokens/s; without a cache the last ones: {1 / again:,.0f}")
    training.context = longest
    reference = train_gpt.GPT(training, train_gpt.Kernels()).to(training.device)
    reference.load_state_dict(model.state_dict())
    difference = largest_difference(reference, rows, logits)
    if difference > LIMIT:
        raise SystemExit(f"error: the cache changes the logits by {difference:.1e}, the limit is {LIMIT:.0e}")
    print(f"    agree: plain PyTorch without a cache, relative difference of the logits {difference:.1e}")


if __name__ == "__main__":
    main()
