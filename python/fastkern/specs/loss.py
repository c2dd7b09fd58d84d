# SPDX-License-Identifier: Apache-2.0
"""cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkern
from fastkern.specs._peers import flag_gems_cross_entropy
from fastkern.specs._refusals import set_to
from fastkern.specs._spec import BadCall, Dims, Inputs, OpSpec

WORDS = ("none", "mean", "sum")


def word(reduction: Any) -> Any:
    """The word for the operator's number; what is none stays what it is."""
    known = isinstance(reduction, int) and 0 <= reduction < len(WORDS)
    return WORDS[reduction] if known else reduction


def cross_entropy(logits: Tensor, target: Tensor, reduction: int = 1, **options: Any) -> tuple[Tensor, ...]:
    """fastkern.cross_entropy with lse and zloss, called with the arguments of the operator."""
    if not isinstance(reduction, int) or not 0 <= reduction < len(WORDS):
        return torch.ops.fastkern.cross_entropy(logits, target, reduction=reduction, **options)[:3]
    return fastkern.cross_entropy(
        logits, target, reduction=word(reduction), return_lse=True, return_z_loss=True, **options
    )


# ---- inputs ----------------------------------------------------------------------------------------------------------


def targets(
    shape: tuple[int, ...], V: int, dtype: torch.dtype, device: Any, soft: Any, ignore: bool, narrow: bool
) -> Tensor:
    """Classes, some of them -100 if ``ignore``; or probabilities in ``soft``, "same" for the dtype of the logits."""
    if soft is not None:
        p = torch.softmax(2 * torch.randn(*shape, V, device=device), -1)
        return p.to(dtype if soft == "same" else soft)
    classes = torch.randint(V, shape, device=device)
    if ignore:
        classes[torch.rand(shape, device=device) < 0.3] = -100
        classes[:1] = classes[:1].clamp_min(0)  # a row that counts
    return classes.int() if narrow else classes


def cross_entropy_inputs(
    *,
    V: int,
    dtype: torch.dtype,
    device: Any,
    weight: Any = None,
    soft: Any = None,
    ignore: bool = False,
    narrow: bool = False,
    **rest: Any,
) -> Inputs:
    """Logits, a target and what is asked for besides."""
    sizes = tuple(rest.pop(name) for name in ("B", "M", "S") if name in rest)
    inputs: Inputs = {
        "logits": (3 * torch.randn(*sizes, V, device=device)).to(dtype),
        "target": targets(sizes, V, dtype, device, soft, ignore, narrow),
    }
    if weight is not None:
        inputs["weight"] = (0.5 + torch.rand(V, device=device)).to(dtype if weight == "same" else weight)
    return inputs | rest


# ---- the same in torch -----------------------------------------------------------------------------------------------


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, lse and zloss in the dtype of the logits, around torch's own cross entropy."""
    soft, rows = target.is_floating_point(), logits.shape[:-1]
    if not soft:  # what does not count is not read
        logits = torch.where((target != ignore_index).unsqueeze(-1), logits, 0.0)
    z = logits * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    weight = None if weight is None else weight.to(z.dtype)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": WORDS[reduction]}
    if soft:
        counted = torch.ones(rows, dtype=torch.bool, device=z.device)
        loss = F.cross_entropy(
            z.reshape(-1, z.shape[-1]), target.to(z.dtype).reshape(-1, z.shape[-1]), weight, **options
        )
    else:
        counted = target != ignore_index
        wrong = counted & ((target < 0) | (target >= z.shape[-1]))  # of which torch's kernels would make a crash
        safe = torch.where(counted & ~wrong, target.long(), -100).reshape(-1)
        loss = F.cross_entropy(z.reshape(-1, z.shape[-1]), safe, weight, ignore_index=-100, **options)
        if bool(wrong.any()) and reduction:
            loss = loss * torch.nan
        elif bool(wrong.any()):
            loss = torch.where(wrong.reshape(-1), torch.nan, loss)
    lse = torch.logsumexp(z, -1)
    lse = torch.where(counted, torch.where(torch.isinf(lse), torch.nan, lse), 0.0)
    zloss = lse_square_scale * lse.square()
    if reduction == 0:
        loss = loss.reshape(rows)
    else:
        zloss = zloss.sum() / counted.sum() if reduction == 1 else zloss.sum()
    return loss + zloss, lse, zloss


def cross_entropy_torch(logits: Tensor, target: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float32."""
    return cross_entropy_reference(logits.float(), target, *args, **options)


def _mean(logits: Tensor, target: Tensor, **_: Any) -> Tensor:
    """The mean loss, in float32 for 16-bit logits."""
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def _liger(logits: Tensor, target: Tensor, **_: Any) -> Tensor:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction.apply(logits, target, None)[0]


def _quack(logits: Tensor, target: Tensor, **_: Any) -> Tensor:
    from quack import cross_entropy

    return cross_entropy(logits, target, reduction="mean")


# ---- costs -----------------------------------------------------------------------------------------------------------


def bytes_of(*tensors: Tensor | None) -> int:
    """Of those that are given."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: logits and target read. Backward: the same, and dlogits written. The rest is a few bytes a row."""
    logits, target = inputs["logits"], inputs["target"]
    rows = logits.shape[:-1].numel()
    return bytes_of(logits, target, inputs.get("weight")) + (bytes_of(logits) if backward else 0) + 12 * rows


def _workspace(inputs: Inputs, backward: bool) -> int:
    """Forward: the state; losses of rows, where they are summed, and their partial sums."""
    rows = inputs["logits"].shape[:-1].numel()
    return 4 * (3 * rows + 2) + 8 * rows + 16 * (rows // 8192 + 1)


# ---- the rows --------------------------------------------------------------------------------------------------------


def _rows(m: int, *classes: int) -> tuple[Dims, ...]:
    return tuple({"M": m, "V": v} for v in classes)


def _bad_calls(op: str) -> tuple[BadCall, ...]:
    floats = rf"{op}: (\w+) must be torch\.float32, torch\.float16 or torch\.bfloat16, got "

    def number(name: str, value: float, text: str) -> BadCall:
        change: Callable[[Inputs], Any] = lambda a: value  # noqa: E731
        return BadCall(f"{name} {value}", set_to(**{name: change}), rf"{op}: {name} must be {text}")

    return (
        BadCall("logits integer", set_to(logits=lambda a: a["logits"].long()), floats + r"torch\.int64"),
        BadCall("logits float64", set_to(logits=lambda a: a["logits"].double()), floats + r"torch\.float64"),
        BadCall(
            "logits scalar", set_to(logits=lambda a: a["logits"].flatten()[0]),
            rf"{op}: logits must have at least one dimension",
        ),
        BadCall(
            "no classes", set_to(logits=lambda a: a["logits"][:, :0]),
            rf"{op}: logits must have at least one class, got shape \(\d+, 0\)",
        ),
        BadCall(
            "target bool", set_to(target=lambda a: a["target"].bool()),
            rf"{op}: target must hold classes in torch\.int64 or torch\.int32, or .*, got torch\.bool",
        ),
        BadCall(
            "target too long", set_to(target=lambda a: a["target"].new_zeros(a["logits"].shape[0] + 1)),
            rf"{op}: target must have shape \(\d+,\), got \(\d+,\)",
        ),
        BadCall(
            "target two-dimensional", set_to(target=lambda a: a["target"][:, None]),
            rf"{op}: target must have shape \(\d+,\), got \(\d+, 1\)",
        ),
        BadCall(
            "probabilities of other classes", set_to(target=lambda a: a["logits"].detach()[:, 1:]),
            rf"{op}: target must have shape \(\d+, \d+\), got \(\d+, \d+\)",
        ),
        BadCall(
            "weight too long", set_to(weight=lambda a: a["logits"].detach().new_ones(a["logits"].shape[1] + 1)),
            rf"{op}: weight must have shape \(\d+,\), got \(\d+,\)",
        ),
        BadCall("weight integer", set_to(weight=lambda a: a["target"].new_ones(a["logits"].shape[1])), floats),
        BadCall(
            "weight requires grad",
            set_to(logits=lambda a: a["logits"].detach().requires_grad_(),
                   weight=lambda a: a["logits"].detach()[0].clone().requires_grad_()),
            rf"{op}: weight must not require grad",
        ),
        number("label_smoothing", 1.5, r"between 0 and 1, got 1\.5"),
        number("label_smoothing", float("nan"), r"between 0 and 1, got -?nan"),
        number("lse_square_scale", -1.0, r"finite in float32 and >= 0, got -1"),
        number("softcap", float("inf"), r"0 or a positive normal float32, got inf"),
        number("softcap", 1e-300, r"0 or a positive normal float32, got 1e-300"),
        number("softcap", -2.0, r"0 or a positive normal float32, got -2"),
        number("logit_scale", float("nan"), r"finite in float32, got -?nan"),
        number("reduction", 3, r"0 \(none\), 1 \(mean\) or 2 \(sum\), got 3"),
    )  # fmt: skip


CROSS_ENTROPY = OpSpec(
    name="cross_entropy",
    family="loss",
    function=cross_entropy,
    reference=cross_entropy_reference,
    baseline=cross_entropy_torch,
    make=cross_entropy_inputs,
    dims=(
        *_rows(3, 1, 2, 7, 8, 9, 31, 77, 128, 255, 1000, 1024, 1025),
        *_rows(2, 2048, 4095, 4099, 8200, 16392, 32000, 50257),
        *_rows(1, 32768, 53249, 131072, 151936, 262144),
        *(dims for m in (1, 77, 289, 1031) for dims in _rows(m, 64)),
        *_rows(61, 1536),
        *_rows(8193, 3),
        {"B": 2, "S": 5, "V": 96},
        {"B": 3, "S": 4, "V": 129},
    ),
    variants=(
        {"reduction": 0},
        {"reduction": 0, "weight": "same", "label_smoothing": 0.1, "ignore": True},
        {"reduction": 0, "lse_square_scale": 1e-2, "softcap": 5.0, "ignore": True, "narrow": True},
        {"reduction": 0, "soft": "same", "label_smoothing": 0.2},
        {"reduction": 0, "soft": torch.float32, "weight": torch.float32, "logit_scale": 0.7, "softcap": 10.0},
        {"reduction": 0, "logit_scale": -0.5, "weight": torch.bfloat16},
    ),
    differentiable=("logits",),
    strided=("logits", "target", "weight"),
    batched=("logits", "target"),
    data=("logits",),
    traffic=_traffic,
    flops=lambda inputs, backward: (6 if backward else 4) * inputs["logits"].numel(),
    bench_dims=(
        *_rows(1, 32000),
        *_rows(16384, 4096),
        *_rows(8192, 32000),
        *_rows(8192, 50304),
        *_rows(4096, 128256),
        *_rows(8192, 128256),
        *_rows(2048, 262144),
    ),
    cpu_bench_dims=(*_rows(1024, 8192), *_rows(4096, 32000)),
    bench_variant={"reduction": 1},
    peers={"liger": _liger, "quack": _quack, "flag_gems": flag_gems_cross_entropy},
    benchmark={
        "function": lambda logits, target, **_: fastkern.cross_entropy(logits, target),
        "reference": _mean,
        "baseline": lambda logits, target, **_: F.cross_entropy(logits, target).float(),
    },
    bad_calls=_bad_calls("cross_entropy"),
    empty_dims=("M", "B", "S"),
    workspace=_workspace,
    decoded=lambda inputs, outputs: outputs[:3],
    signed_zeros=False,
    # Every class counts, and differences of largest numbers overflow.
    unspecial=lambda a: ("max finite",) if a.get("label_smoothing") or a["target"].is_floating_point() else (),
)

# The same summed up: its results do not belong to the rows of a batch, and one that overflows is all there is.
CROSS_ENTROPY_REDUCED = replace(
    CROSS_ENTROPY,
    batched=(),
    unspecial=lambda a: ("max finite",),
    variants=(
        {},
        {"ignore": True, "weight": torch.float32},
        {"reduction": 2, "label_smoothing": 0.1, "lse_square_scale": 1e-3, "softcap": 8.0, "narrow": True},
        {"soft": "same", "weight": "same", "lse_square_scale": 1e-3},
        {"ignore": True, "lse_square_scale": 1e-2, "label_smoothing": 0.1, "weight": torch.bfloat16},
    ),
)

SPECS = (CROSS_ENTROPY,)
