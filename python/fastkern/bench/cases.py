# SPDX-License-Identifier: Apache-2.0
"""What is measured: one operator at one size, and the providers of the same computation."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkern.specs import Dims, Inputs, OpSpec

Call = Callable[[], Any]
Function = Callable[..., Any]

OURS, BASELINE, COMPILED = "fastkern", "torch", "torch.compile"
SEED = 0


def provider_names(spec: OpSpec) -> tuple[str, ...]:
    """Columns of an operator's tables: ours, torch, the compiled reference, the peers of its row in the spec table."""
    return (OURS, BASELINE, COMPILED, *spec.peers)


def provider(spec: OpSpec, name: str) -> Function:
    """The function behind a column. ``torch.compile`` gives a fresh one each time, to be specialised for one size.

    Of the reference, or of the yardstick where the reference leaves out how results are stored.
    """
    if name == OURS:
        return spec.function
    if name == BASELINE:
        return spec.baseline
    if name == COMPILED:
        return torch.compile(spec.yardstick or spec.reference, dynamic=False)
    return spec.peers[name]


def missing(spec: OpSpec, name: str, device: torch.device) -> str | None:
    """Why a peer is not installed, or None when it is. Peers import at call time, so this calls it on a small input."""
    if name not in spec.peers:
        return None
    case = Case(spec, smallest(spec, device), spec.dtypes[-1], device)
    try:
        spec.peers[name](**case.inputs)
    except ImportError as error:
        return str(error)
    except Exception:  # installed; what it refuses is told per size
        return None
    return None


def elements(dims: Dims) -> int:
    """A size's rank: the product of its dimensions."""
    return math.prod(dims.values())


def known_sizes(spec: OpSpec, device: torch.device) -> tuple[Dims, ...]:
    """The row's sizes, on the CPU those for it as well."""
    return (*spec.bench_dims, *(d for d in spec.cpu_bench_dims if device.type == "cpu" and d not in spec.bench_dims))


def smallest(spec: OpSpec, device: torch.device) -> Dims:
    """The smallest of them, where host time is all there is."""
    return min(known_sizes(spec, device), key=elements)


def label(dims: Dims) -> str:
    """``16384x4096``."""
    return "x".join(map(str, dims.values()))


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors among a function's outputs."""
    return [y for y in (outputs if isinstance(outputs, (tuple, list)) else (outputs,)) if isinstance(y, Tensor)]


class Case:
    """One operator at one size, dtype and device: the inputs, and calls on them."""

    def __init__(self, spec: OpSpec, dims: Dims, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(SEED)
        self.spec, self.dims = spec, dims
        self.inputs: Inputs = spec.make(**dims, dtype=dtype, device=device, **spec.bench_variant)
        self.learned = [n for n in spec.differentiable if isinstance(self.inputs.get(n), Tensor)]
        self.leaves: Inputs = self.with_grad(self.inputs)
        self._grad_outputs: list[Tensor] | None = None

    def with_grad(self, inputs: Inputs) -> Inputs:
        """The same values as leaves of a new graph."""
        return {k: v.detach().requires_grad_() if k in self.learned else v for k, v in inputs.items()}

    @property
    def grad_outputs(self) -> list[Tensor]:
        """One gradient for each differentiable output, the same for every provider."""
        if self._grad_outputs is None:
            torch.manual_seed(SEED + 1)
            self._grad_outputs = [
                torch.randn_like(y) for y in tensors(self.spec.baseline(**self.leaves)) if y.requires_grad
            ]
        return self._grad_outputs

    def forward(self, function: Function) -> Call:
        """A call without gradients."""
        return lambda: function(**self.inputs)

    def once(self, function: Function) -> Any:
        """The result of one call without gradients, on inputs that nothing has written over."""
        if not self.spec.inplace:
            return function(**self.inputs)
        return function(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in self.inputs.items()})

    def forward_with_grad(self, function: Function) -> Call:
        """A call that records the graph for backward."""
        return lambda: function(**self.leaves)

    def backward(self, function: Function) -> Call:
        """Runs forward once; the call is backward alone, through autograd for every provider alike.

        Its leaves are new ones: autograd remembers the stream on which a leaf was first used, and a captured backward
        must not touch any but the capturing stream.
        """
        leaves, grads = self.with_grad(self.inputs), self.grad_outputs
        outputs = tensors(function(**leaves))
        return lambda: self.gradients(outputs, leaves, grads, retain_graph=True)

    def both(self, function: Function) -> Call:
        """Forward and backward as in a training step."""
        grads = self.grad_outputs
        return lambda: self.gradients(tensors(function(**self.leaves)), self.leaves, grads)

    def gradients(
        self, outputs: list[Tensor], leaves: Inputs, grads: list[Tensor], retain_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the differentiable inputs, None where an input has none."""
        return torch.autograd.grad(
            [y for y in outputs if y.requires_grad],
            [leaves[n] for n in self.learned],
            grads,
            retain_graph=retain_graph,
            allow_unused=True,
        )

    def traffic(self, backward: bool) -> int:
        """Bytes that a perfect kernel moves."""
        return int(self.spec.traffic(self.inputs, backward))

    def flops(self, backward: bool) -> int:
        """Floating-point operations of the job."""
        return int(self.spec.flops(self.inputs, backward))

    def release(self) -> None:
        """Give the memory back before the next size is made."""
        self.inputs, self.leaves, self._grad_outputs = {}, {}, None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
