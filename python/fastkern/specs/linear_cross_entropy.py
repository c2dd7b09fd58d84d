# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkern
from fastkern.ops.linear_cross_entropy import chunk_of
from fastkern.specs._refusals import set_to
from fastkern.specs._spec import BadCall, Inputs, OpSpec
from fastkern.specs.loss import WORDS, bytes_of, cross_entropy_reference, targets, word


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, reduction: int = 1, chunk_rows: int = 0, **options: Any
) -> Tensor:
    """fastkern.linear_cross_entropy called with the arguments of the operator."""
    if not isinstance(reduction, int) or not 0 <= reduction < len(WORDS):
        options |= {"reduction": reduction, "chunk_rows": chunk_rows}
        return torch.ops.fastkern.linear_cross_entropy(hidden, weight, target, **options)
    return fastkern.linear_cross_entropy(
        hidden, weight, target, reduction=word(reduction), chunk_rows=chunk_rows, **options
    )


def linear_inputs(
    *,
    H: int,
    V: int,
    dtype: torch.dtype,
    device: Any,
    bias: bool = False,
    class_weight: Any = None,
    soft: Any = None,
    ignore: bool = False,
    **rest: Any,
) -> Inputs:
    """Hidden states and weights that make logits of a few units."""
    sizes = tuple(rest.pop(name) for name in ("B", "M", "S") if name in rest)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype)

    inputs: Inputs = {
        "hidden": normal(*sizes, H),
        "weight": normal(V, H, scale=2 / math.sqrt(H)),
        "target": targets(sizes, V, dtype, device, soft, ignore, False),
    }
    if bias:
        inputs["bias"] = normal(V)
    if class_weight is not None:
        inputs["class_weight"] = (0.5 + torch.rand(V, device=device)).to(
            dtype if class_weight == "same" else class_weight
        )
    return inputs | rest


def linear_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: int = 1,
    chunk_rows: int = 0,
) -> Tensor:
    """Logits in the dtype of hidden; the loss of 16-bit ones in float32."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    options = (ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction)
    return cross_entropy_reference(logits, target, class_weight, *options)[0]


# ---- peers -----------------------------------------------------------------------------------------------------------


class _Products(torch.autograd.Function):
    """The three matrix products alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return torch.ones((), device=hidden.device)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden


def _products(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _Products.apply(hidden, weight)


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target)[0]


def _quack(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, target)


# Forward computes the gradients: what is timed is a step, both passes as one call.


def _step(function: Callable[..., Any], hidden: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Any:
    """The loss and the gradients of hidden and weight."""
    with torch.enable_grad():
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = function(*leaves, target)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))


def _plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(hidden, weight), target)
    return loss if loss.dtype == torch.float64 else loss.float()  # as ours: what is compared has one type


def _plain_wide(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_plain_wide, dynamic=False)


@torch.compiler.disable  # the benchmark compiles the whole, of which autograd.grad is no part
def _compiled_step(hidden: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Any:
    return _step(_compiled(), hidden, weight, target)


# ---- the row ---------------------------------------------------------------------------------------------------------


def _traffic(inputs: Inputs, backward: bool) -> int:
    """Operands read; backward: their gradients written."""
    operands = bytes_of(inputs["hidden"], inputs["weight"], inputs.get("bias"))
    return operands if backward else operands + bytes_of(inputs["target"])


def _flops(inputs: Inputs, backward: bool) -> int:
    rows = inputs["hidden"].shape[:-1].numel()
    return (4 if backward else 2) * rows * inputs["weight"].numel()


def _workspace(inputs: Inputs, backward: bool) -> int:
    """A chunk of logits, its state, values of rows; what the product of a GPU takes for itself."""
    weight, rows = inputs["weight"], inputs["hidden"].shape[:-1].numel()
    classes, itemsize = weight.shape[0], weight.element_size()
    chunk = min(inputs.get("chunk_rows") or chunk_of(rows, classes, itemsize), max(rows, 1))
    return chunk * (classes * itemsize + 16) + 32 * rows + (64 << 20)


def _bad_calls(op: str) -> tuple[BadCall, ...]:
    return (
        BadCall(
            "hidden float64", set_to(hidden=lambda a: a["hidden"].double()),
            rf"{op}: hidden must be torch\.float32, torch\.float16 or torch\.bfloat16, got torch\.float64",
        ),
        BadCall(
            "hidden scalar", set_to(hidden=lambda a: a["hidden"].flatten()[0]),
            rf"{op}: hidden must have at least one dimension",
        ),
        BadCall(
            "weight transposed", set_to(weight=lambda a: a["weight"].detach().new_ones(3, a["hidden"].shape[-1] + 1)),
            rf"{op}: weight must have shape \(V, \d+\), got \(3, \d+\)",
        ),
        BadCall(
            "weight float16", set_to(weight=lambda a: a["weight"].half()),
            rf"{op}: weight must be torch\.float32 like hidden, got torch\.float16",
        ),
        BadCall(
            "bias too long", set_to(bias=lambda a: a["weight"].detach().new_ones(a["weight"].shape[0] + 1)),
            rf"{op}: bias must have shape \(\d+,\), got \(\d+,\)",
        ),
        BadCall(
            "target too long", set_to(target=lambda a: a["target"].new_zeros(a["hidden"].shape[0] + 1)),
            rf"{op}: target must have shape \(\d+,\), got \(\d+,\)",
        ),
        BadCall(
            "class_weight too long", set_to(class_weight=lambda a: a["weight"].detach().new_ones(1)),
            rf"{op}: class_weight must have shape \(\d+,\), got \(1,\)",
        ),
        BadCall("softcap -2", set_to(softcap=lambda a: -2.0), rf"{op}: softcap must be 0 or a positive normal float32"),
        BadCall("reduction 3", set_to(reduction=lambda a: 3), rf"{op}: reduction must be 0 \(none\), .* got 3"),
        BadCall("chunk_rows -1", set_to(chunk_rows=lambda a: -1), rf"{op}: chunk_rows must be >= 0, got -1"),
    )  # fmt: skip


def _rows(*sizes: tuple[int, int, int]) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(("M", "H", "V"), s, strict=True)) for s in sizes)


LINEAR_CROSS_ENTROPY = OpSpec(
    name="linear_cross_entropy",
    family="loss",
    function=linear_cross_entropy,
    reference=linear_reference,
    baseline=linear_reference,
    make=linear_inputs,
    dims=(
        *_rows((1, 8, 2), (3, 5, 7), (5, 16, 31), (7, 33, 64), (2, 64, 129), (13, 24, 257), (31, 40, 99)),
        *_rows((9, 128, 1000), (67, 48, 130), (3, 65, 4099), (2, 8, 50257), (129, 16, 11), (6, 12, 20)),
        {"B": 2, "S": 5, "H": 32, "V": 96},
    ),
    variants=(
        {},
        {"bias": True, "ignore": True, "class_weight": torch.float32, "chunk_rows": 5},
        {"reduction": 2, "softcap": 5.0, "label_smoothing": 0.1, "chunk_rows": 4},
        {"soft": "same", "lse_square_scale": 1e-2, "bias": True},
        {"reduction": 0, "bias": True, "ignore": True, "logit_scale": 0.5, "chunk_rows": 3},
    ),
    differentiable=("hidden", "weight", "bias"),
    strided=("hidden", "weight", "target", "bias", "class_weight"),
    batched=(),
    data=("hidden",),
    traffic=_traffic,
    flops=_flops,
    bench_dims=_rows((256, 1024, 8192), (4096, 2048, 32000), (4096, 4096, 128256), (8192, 4096, 128256)),
    cpu_bench_dims=_rows((256, 256, 8192), (512, 512, 16384)),
    peers={
        "three products": partial(_step, _products),
        "liger": partial(_step, _liger),
        "quack": partial(_step, _quack),
    },
    benchmark={
        "function": partial(_step, fastkern.linear_cross_entropy),
        "baseline": partial(_step, _plain),
        "reference": _compiled_step,
        "differentiable": (),
        "traffic": lambda inputs, backward: _traffic(inputs, False) + _traffic(inputs, True),
        "flops": lambda inputs, backward: _flops(inputs, False) + _flops(inputs, True),
    },
    bad_calls=_bad_calls("linear_cross_entropy"),
    empty_dims=("M", "B", "S"),
    workspace=_workspace,
    signed_zeros=False,
    vanishing=lambda a: a["weight"].shape[0] == 1,
    # A bias's gradient is a plain sum over the rows.
    allowance=lambda a, stressed: 2e-6 if stressed else 0.0,
    reproducible=False,
    contained=False,  # 0 times NaN: of a row that is ignored, and in the sums of the weight's gradient
    unspecial=lambda a: ("max finite", "large"),  # a sum in another order overflows elsewhere
)

SPECS = (LINEAR_CROSS_ENTROPY,)
