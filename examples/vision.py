#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a small vision transformer, written with fastkern's functions, to tell patterns apart.

    python examples/vision.py                 # half a minute on two cores, to more than 90 % of unseen images

The images are made here: 32 x 32 pixels in colour, of stripes in three directions, checkers, discs and frames, of
random size, place and colours, under noise. The transformer is the usual one: patches, layer norms before attention and
before an MLP with GELU, the mean of all patches. Seams between the halves of a block are one pass each:
`add_layer_norm` adds the branch to the residual stream, with dropout, and norms the sum; `bias_act` adds the bias of a
linear layer before GELU.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import fastkern
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = ("horizontal stripes", "vertical stripes", "diagonal stripes", "checkers", "disc", "frame")
SIZE, PATCH = 32, 4


def make_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32) with values of about -1 to 1, and their classes (count,)."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    y, x = (t.expand(count, SIZE, SIZE) for t in torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="ij"))
    period, phase = uniform(5, 11, 1, 1), uniform(0, 2 * math.pi, 2, 1, 1)
    wave_y, wave_x = (2 * math.pi * t / period + phase[:, i] for i, t in enumerate((y, x)))
    radius, centre = uniform(6, 12, 1, 1), uniform(11, 21, 2, 1, 1)
    dy, dx = y - centre[:, 0], x - centre[:, 1]
    edge = torch.maximum(dy.abs(), dx.abs())
    drawings = (
        wave_y.sin() > 0,
        wave_x.sin() > 0,
        (wave_y + wave_x).sin() > 0,
        wave_y.sin() * wave_x.sin() > 0,
        dy.square() + dx.square() < radius.square(),
        (edge < radius) & (edge > radius - 3),
    )
    inside = torch.stack(drawings, dim=1)[torch.arange(count), labels]
    tint, contrast = uniform(-0.5, 0.5, 3, 1, 1), uniform(0.3, 0.8, 3, 1, 1)
    light = uniform(-1, 1, 1, 1, 1) > 0
    images = tint + torch.where(inside[:, None] == light, contrast, -contrast)
    return images + 0.2 * torch.randn(images.shape, generator=generator), labels


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the last sum is left to the next block, whose norm does it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, branch: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        y, x = add_norm(branch, x, self.norm_attention, self.dropout * self.training)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        branch = self.attention_out(fastkern.flash_attn(q, k, v).flatten(-2))
        y, x = add_norm(branch, x, self.norm_mlp, self.dropout * self.training)
        return self.mlp_out(fastkern.bias_act(F.linear(y, self.mlp_in.weight), self.mlp_in.bias, "gelu")), x


def add_norm(branch: Tensor, x: Tensor | None, norm: nn.LayerNorm, dropout: float) -> tuple[Tensor, Tensor]:
    """The normed sum and the sum; at the first block there is no residual stream yet."""
    return fastkern.add_layer_norm(branch, x, norm.weight, norm.bias, norm.eps, dropout_p=dropout)


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4, dropout: float = 0.05) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH * PATCH, width)
        self.positions = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, 6) of images (B, 3, 32, 32)."""
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, 3, 8, 8, 4, 4)
        branch, x = self.patches(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)) + self.positions, None
        for block in self.blocks:
            branch, x = block(branch, x)
        y, _ = add_norm(branch, x, self.norm, 0.0)
        return self.head(y.mean(1))


@torch.no_grad()
def predictions(model: VisionTransformer, images: Tensor) -> Tensor:
    model.eval()
    classes = torch.cat([model(part).argmax(-1) for part in images.split(256)])
    model.train()
    return classes


def train(o: argparse.Namespace) -> tuple[VisionTransformer, float]:
    """A trained model, and the share of unseen images that it tells right."""
    generator = torch.Generator().manual_seed(o.seed)
    torch.manual_seed(o.seed)
    images, labels = (t.to(o.device) for t in make_images(o.images, generator))
    unseen, truth = (t.to(o.device) for t in make_images(600, generator))
    model = VisionTransformer().to(o.device)
    optimizer = fastkern.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=o.steps, pct_start=0.1)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {o.images:,} images, on {o.device}")
    start = time.perf_counter()
    for step in range(1, o.steps + 1):
        chosen = torch.randint(o.images, (o.batch,), generator=generator).to(o.device)
        loss = fastkern.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.05)
        loss.backward()
        optimizer.step(max_norm=1.0)
        optimizer.zero_grad()
        scheduler.step()
        if step % max(1, o.steps // 4) == 0 or step == o.steps:
            right = predictions(model, unseen) == truth
            seconds = time.perf_counter() - start
            print(f"step {step:4}: loss {loss:.3f}, {right.float().mean():6.1%} right, {seconds:.0f} s", flush=True)
    for number, name in enumerate(CLASSES):
        print(f"{name:>20}: {right[truth == number].float().mean():6.1%}")
    return model, right.float().mean().item()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    for name, default, meaning in (
        ("steps", 240, "of training"),
        ("batch", 64, "images a step"),
        ("images", 4096, "to train on"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(argv)
    for name in ("steps", "batch", "images"):
        if getattr(o, name) < 1:
            parser.error(f"--{name} {getattr(o, name)}: must be positive")
    return o


if __name__ == "__main__":
    _, accuracy = train(parse())
    if accuracy < 0.9:
        raise SystemExit(f"error: {accuracy:.1%} of unseen images are right, 90 % are expected of the default options")
