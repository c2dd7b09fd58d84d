# SPDX-License-Identifier: Apache-2.0
"""What a row of the table holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

Dims = Mapping[str, int]
Inputs = dict[str, Any]  # argument name -> tensor, number or None; in the op's argument order
Outputs = Tensor | tuple[Tensor, ...]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

VALUES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "times 100": lambda t: 100 * t,
    "times 1e-3": lambda t: 1e-3 * t,
    "mean 100": lambda t: 100 + t / 100,
    "mean 10000": lambda t: 10_000 + t,
}


@dataclass(frozen=True)
class BadCall:
    """A call that must raise: ``change`` edits good inputs in place, ``message`` is a regex of the error's text."""

    name: str
    change: Callable[[Inputs], Any]
    message: str


@dataclass(frozen=True)
class OpSpec:
    """One operator.

    Attributes:
        name: of ``fastkern.<name>`` and ``torch.ops.fastkern.<name>``.
        family: the room it lives in: norm, softmax, attention, ...
        function: the public function.
        reference: the same computation in plain differentiable PyTorch; run in float64 it is the truth.
        baseline: what a torch user would call; run in the op's dtype its error sets the tolerance, its time the bar.
        make: inputs for given dimensions, dtype, device and variant (keyword arguments from ``variants``).
        dims: sizes to test: primes, tile sizes and their neighbours, 1.
        variants: which optional operands are there and of which kind.
        differentiable: arguments that may require grad.
        strided: arguments that may have any strides.
        batched: arguments whose leading dimension (the first one in ``dims``) is a batch that no output row may see
            the rest of; those of them that have another leading dimension in a call are shared by its batch. None:
            there is no such dimension.
        traffic: bytes a perfect kernel moves: ``traffic(inputs, backward)``.
        flops: floating-point operations: ``flops(inputs, backward)``.
        bench_dims: sizes for the benchmark.
        cpu_bench_dims: the same on the CPU; empty: those of ``bench_dims`` that are not too large.
        bench_variant: the variant that the benchmark uses.
        peers: name -> callable taking the inputs by keyword; a peer that cannot be imported raises ImportError.
        bad_calls: what must be refused.
        forward_factor, backward_factor: allowed multiple of the baseline's error.
        empty_dims: dimensions that may be 0.
        workspace: most bytes of temporary device memory a call may take beside its outputs:
            ``workspace(inputs, backward)``.
        data: the batched arguments whose values the checks change; empty: all of them.
        placed: whether a row's result depends on where in the batch it lies, as under dropout: ``placed(inputs)``.
        decoded: outputs as the numbers they stand for, where they are stored as something else:
            ``decoded(inputs, outputs)``. The reference gives numbers.
        slack: for each decoded output what it may be off by besides, element by element, as a rounded number is:
            ``slack(inputs, truth)``.
        signed_zeros: whether the sign of a zero is torch's.
        vanishing: whether the gradients of these inputs are zero but for rounding, so that there is nothing to compare
            them with: ``vanishing(inputs)``.
        dense: a dense copy of a strided argument, which must give the same bits.
        yardstick: whose error sets the tolerance, where the baseline is less accurate than need be.
        values: what is done to ``changeable`` inputs to see whether large ones, small ones and those far from a zero
            mean lose digits: name -> change.
        second_order: whether gradients have gradients; if not, asking for one must raise an error that says so.
        allowance: what a gradient, and in float32 an output, may be off by besides, as a share of its largest value,
            where intermediate values are larger or rounded more often than torch's: ``allowance(inputs, stressed)``,
            ``stressed`` if the inputs were made to lose digits.
        contained: whether NaN and infinities stand where torch's do; if not, they may stay where torch's spread, and
            spread in gradients, within their batch entry.
        unspecial: names of special values that do not do what they do in torch, as sums in another order overflow
            elsewhere: ``unspecial(inputs)``.
        devices: the types of device that there are kernels for.
        reproducible: whether results have the same bits at other addresses and beside other calls; if not, as of
            torch's matrix products, they may be off by rounding.
        inplace: whether the functions write over their inputs; results are then compared on copies of them.
        benchmark: fields of the row that are others in the benchmark, such as functions that return less.
    """

    name: str
    family: str
    function: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    baseline: Callable[..., Outputs]
    make: Callable[..., Inputs]
    dims: tuple[Dims, ...]
    variants: tuple[Mapping[str, Any], ...]
    differentiable: tuple[str, ...]
    strided: tuple[str, ...]
    batched: tuple[str, ...]
    traffic: Callable[[Inputs, bool], int]
    flops: Callable[[Inputs, bool], int]
    bench_dims: tuple[Dims, ...]
    cpu_bench_dims: tuple[Dims, ...] = ()
    bench_variant: Mapping[str, Any] = field(default_factory=dict)
    peers: Mapping[str, Callable[..., Outputs]] = field(default_factory=dict)
    bad_calls: tuple[BadCall, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    forward_factor: float = 2.0
    backward_factor: float = 3.0
    empty_dims: tuple[str, ...] = ("B", "M", "S", "H", "N")
    workspace: Callable[[Inputs, bool], int] = lambda inputs, backward: 0
    data: tuple[str, ...] = ()
    placed: Callable[[Inputs], bool] = lambda inputs: False
    decoded: Callable[[Inputs, tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda inputs, outputs: outputs
    slack: Callable[[Inputs, tuple[Tensor, ...]], tuple[Tensor | None, ...]] = lambda inputs, truth: tuple(
        None for _ in truth
    )
    signed_zeros: bool = True
    vanishing: Callable[[Inputs], bool] = lambda inputs: False
    dense: Callable[[Tensor], Tensor] = partial(torch.clone, memory_format=torch.contiguous_format)  # noqa: RUF009
    yardstick: Callable[..., Outputs] | None = None
    values: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=lambda: VALUES)
    second_order: bool = True
    allowance: Callable[[Inputs, bool], float] = lambda inputs, stressed: 0.0
    contained: bool = True
    unspecial: Callable[[Inputs], tuple[str, ...]] = lambda inputs: ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    reproducible: bool = True
    inplace: bool = False
    benchmark: Mapping[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> Any:
        """The operator itself, ``torch.ops.fastkern.<name>.default``."""
        return getattr(torch.ops.fastkern, self.name).default

    @property
    def measure(self) -> Callable[..., Outputs]:
        """Whose error sets the tolerance."""
        return self.yardstick or self.baseline

    @property
    def benchmarked(self) -> OpSpec:
        """The row as the benchmark sees it."""
        return replace(self, **self.benchmark)

    @property
    def changeable(self) -> tuple[str, ...]:
        """The batched arguments whose values the checks may change."""
        return self.data or self.batched
