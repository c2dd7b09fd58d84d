# SPDX-License-Identifier: Apache-2.0
"""Which parameters one launch updates, and what stands between them and the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastkern import _core

GROUPS = 32  # of one launch


def is_dense(t: Tensor) -> bool:
    """Every element at an address of its own, without gaps: contiguous in some order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def conform(t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` with the strides and the device of ``like``; itself where it has them."""
    if t.dtype == dtype and t.device == like.device and t.stride() == like.stride():
        return t
    return torch.empty_like(like, dtype=dtype).copy_(t)


def stream_of(device: torch.device) -> int:
    """The address of torch's current stream; 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def address_of(t: Tensor | None) -> int:
    """Of the first element; 0 without a tensor."""
    return 0 if t is None else t.data_ptr()


@dataclass
class Entry:
    """A parameter in a bucket: what is updated (``like``), states and scales in the kernel's order, its number."""

    param: Tensor
    like: Tensor
    states: tuple[Tensor | None, ...]
    scales: tuple[Tensor, ...]
    extra: Tensor | None
    step: Tensor | None
    product: Tensor | None
    group: int
    index: int


@dataclass
class Bucket:
    """Parameters of one signature on one device: one launch a step."""

    device: torch.device
    kind: str
    rounding: str
    seed: int
    types: tuple[torch.dtype, torch.dtype, torch.dtype]  # of parameters, gradients, states
    groups: list[int] = field(default_factory=list)  # of the optimizer
    entries: list[Entry] = field(default_factory=list)
    parameters: Any = None
    workspace: Tensor | None = None
    memory: Tensor | None = None
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of parameters with gaps

    def finish(self) -> None:
        """After the last entry: the table."""
        params, likes = [e.param for e in self.entries], [e.like for e in self.entries]
        index = self.device.index if self.device.type == "cuda" else -1
        self.parameters = _core.OptimParameters(self.kind, self.rounding, *self.types, index, params, likes)
        for i, e in enumerate(self.entries):
            group = self.groups.index(e.group)
            self.parameters.set(i, e.states, e.scales, e.extra, e.step, e.product, group, e.index)
        if index >= 0:
            self.memory = torch.empty(self.parameters.bytes, dtype=torch.uint8, device=self.device)
        self.parameters.finish(self.memory)
        if self.parameters.workspace_bytes():
            self.workspace = torch.empty(self.parameters.workspace_bytes(), dtype=torch.uint8, device=self.device)
        self.copies = [(e.param, e.like) for e in self.entries if e.like is not e.param]


def odd_gradient(grad: Tensor, like: Tensor) -> Tensor:
    """A copy of a gradient whose elements lie in the order of ``like``."""
    return torch.empty_like(like, dtype=grad.dtype).copy_(grad)


def gradient_buckets(grads: Iterable[Tensor]) -> list[Bucket]:
    """For :func:`clip` and for scaling: gradients in the place of parameters."""
    buckets: dict[tuple[torch.device, torch.dtype], Bucket] = {}
    for g in grads:
        key = (g.device, g.dtype)
        if key not in buckets:
            buckets[key] = Bucket(g.device, "adam", "nearest", 0, (g.dtype, g.dtype, g.dtype), [0])
        like = g if is_dense(g) else g.contiguous()
        buckets[key].entries.append(Entry(g, like, (), (), None, None, None, 0, 0))
    for bucket in buckets.values():
        bucket.finish()
        bucket.parameters.use_params_as_grads()
    return list(buckets.values())


def clip(
    buckets: Iterable[Bucket], max_norm: float, norm_type: float, grad_scale: Callable[[torch.device], Tensor | None]
) -> tuple[Tensor, dict[torch.device, Tensor]]:
    """The norm of all gradients, and for each device what they are to be multiplied with."""
    devices: dict[torch.device, list[Bucket]] = {}
    for bucket in buckets:
        if bucket.parameters.chunks:
            devices.setdefault(bucket.device, []).append(bucket)
    largest = norm_type == float("inf")
    norms, factors = [], {}
    for device, parts in devices.items():
        stream, scale = stream_of(device), address_of(grad_scale(device))
        result = torch.empty(2, dtype=torch.float32, device=device)
        total = torch.empty(1, dtype=torch.float64, device=device)
        partials = torch.empty(max(b.parameters.chunks for b in parts), dtype=torch.float32, device=device)
        for i, bucket in enumerate(parts):
            bucket.parameters.write(stream)
            bucket.parameters.norm(
                largest, i == 0, i == len(parts) - 1, max_norm, scale, partials.data_ptr(), total.data_ptr(),
                result.data_ptr(), result.data_ptr() + 4, stream,
            )  # fmt: skip
        norms.append(result[0])
        factors[device] = result[1]
    if len(norms) <= 1:
        return (norms[0] if norms else torch.zeros(())), factors
    together = torch.stack([n.to(norms[0].device) for n in norms])
    norm = together.max() if largest else torch.linalg.vector_norm(together)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, {device: factor.to(device) for device in factors}
