# SPDX-License-Identifier: Apache-2.0
"""What the norms refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkern.specs._spec import BadCall, Inputs


def set_to(**changes: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """A bad call's change: each argument named becomes what its function makes of the good ones."""
    return lambda a: a.update({name: change(a) for name, change in changes.items()})


def norm_bad_calls(op: str) -> tuple[BadCall, ...]:
    """What every operator of the family refuses; its first variant has a weight."""
    floats = rf"{op}: (\w+) must be torch\.float32, torch\.float16 or torch\.bfloat16, got "
    shape = rf"{op}: weight must have shape \(\d+,\) or \(\d+, \d+\), got "
    number = rf"{op}: eps must be finite and >= 0, got "
    return (
        BadCall("x integer", set_to(x=lambda a: a["x"].long()), floats + r"torch\.int64"),
        BadCall("x float64", set_to(x=lambda a: a["x"].double()), floats + r"torch\.float64"),
        BadCall("x complex", set_to(x=lambda a: a["x"].float() + 0j), floats + r"torch\.complex64"),
        BadCall("x scalar", set_to(x=lambda a: a["x"].flatten()[0]), rf"{op}: x must have at least one dimension"),
        BadCall(
            "weight too long", set_to(weight=lambda a: a["weight"].new_ones(a["x"].shape[-1] + 1)), shape + r"\(\d+,\)"
        ),
        BadCall(
            "weight for other heads",
            set_to(weight=lambda a: a["weight"].new_ones(a["x"].shape[-2] + 1, a["x"].shape[-1])),
            shape + r"\(\d+, \d+\)",
        ),
        BadCall(
            "weight three-dimensional",
            set_to(weight=lambda a: a["weight"].new_ones(1, *a["x"].shape[-2:])),
            shape + r"\(1, \d+, \d+\)",
        ),
        BadCall("weight scalar", set_to(weight=lambda a: a["weight"].flatten()[0]), shape + r"\(\)"),
        BadCall("weight integer", set_to(weight=lambda a: a["weight"].int()), floats + r"torch\.int32"),
        BadCall("weight bool", set_to(weight=lambda a: a["weight"].bool()), floats + r"torch\.bool"),
        BadCall(
            "bias unlike weight",
            set_to(bias=lambda a: a["weight"].new_ones(*a["x"].shape[-2:])),
            rf"{op}: bias must have shape \(\d+,\) like weight, got \(\d+, \d+\)",
        ),
        BadCall("bias float64", set_to(bias=lambda a: a["weight"].double()), floats + r"torch\.float64"),
        BadCall("eps negative", set_to(eps=lambda a: -1e-6), number + "-1e-06"),
        BadCall("eps NaN", set_to(eps=lambda a: float("nan")), number + "-?nan"),
        BadCall("eps infinite", set_to(eps=lambda a: float("inf")), number + "inf"),
        BadCall(
            "weight_offset infinite",
            set_to(weight_offset=lambda a: float("inf")),
            rf"{op}: weight_offset must be finite in float32, got inf",
        ),
    )


def out_dtype_bad_calls(op: str) -> tuple[BadCall, ...]:
    message = rf"{op}: out_dtype must be torch\.float32, torch\.float16 or torch\.bfloat16, got "
    return (
        BadCall("out_dtype float64", set_to(out_dtype=lambda a: torch.float64), message + r"torch\.float64"),
        BadCall("out_dtype int8", set_to(out_dtype=lambda a: torch.int8), message + r"torch\.int8"),
    )


def stream_bad_calls(op: str) -> tuple[BadCall, ...]:
    """What the residual stream refuses, dropout aside."""
    return (
        BadCall(
            "residual of another shape",
            set_to(residual=lambda a: a["x"][..., :-1]),
            rf"{op}: residual must have shape \(\d+, \d+\), got \(\d+, \d+\)",
        ),
        BadCall(
            "residual integer",
            set_to(residual=lambda a: a["x"].int()),
            rf"{op}: residual must be torch\.float32, .*, got torch\.int32",
        ),
    )


def branch_bad_calls(op: str) -> tuple[BadCall, ...]:
    """What the stream with dropout and rowscale refuses."""
    one = torch.ones((), dtype=torch.int64)
    probability = rf"{op}: dropout_p must be between 0 and 1, got "

    def seed(a: Inputs) -> Tensor:
        return one.to(a["x"].device)

    def seeded(**changes: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
        return set_to(**{"dropout_p": lambda a: 0.1, "seed": seed, **changes})

    return (
        BadCall("dropout_p above 1", seeded(dropout_p=lambda a: 1.5), probability + r"1\.5"),
        BadCall("dropout_p below 0", seeded(dropout_p=lambda a: -0.5), probability + r"-0\.5"),
        BadCall("dropout_p NaN", seeded(dropout_p=lambda a: float("nan")), probability + "-?nan"),
        BadCall(
            "seed int32", seeded(seed=lambda a: seed(a).int()), rf"{op}: seed must be torch\.int64, got torch\.int32"
        ),
        BadCall(
            "seed of two", seeded(seed=lambda a: seed(a).expand(2)), rf"{op}: seed must have one element, got 2"
        ),
        BadCall(
            "offset float", seeded(offset=lambda a: seed(a).float()), rf"{op}: offset must be torch\.int64, .*float32"
        ),
        BadCall(
            "rowscale of x's shape",
            set_to(rowscale=lambda a: a["x"].detach()),
            rf"{op}: rowscale must have shape \(\d+,\), got \(\d+, \d+\)",
        ),
        BadCall(
            "rowscale float64",
            set_to(rowscale=lambda a: a["x"].detach()[:, 0].double()),
            rf"{op}: rowscale must be .*, got torch\.float64",
        ),
        BadCall(
            "rowscale requires grad",
            set_to(x=lambda a: a["x"].detach().requires_grad_(),
                   rowscale=lambda a: a["x"].detach()[:, 0].clone().requires_grad_()),
            rf"{op}: rowscale must not require grad",
        ),
        BadCall(
            "residual_dtype float64",
            set_to(residual_dtype=lambda a: torch.float64),
            rf"{op}: residual_dtype must be torch\.float32, .*, got torch\.float64",
        ),
    )  # fmt: skip
