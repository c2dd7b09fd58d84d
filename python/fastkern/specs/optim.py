# SPDX-License-Identifier: Apache-2.0
"""The operators of optimizers: what each is called with, and one step of it in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Reference = Callable[..., None]


@dataclass(frozen=True)
class OptimSpec:
    """An operator on lists of tensors.

    ``reference(p, g, t, *states, lr=..., **numbers)`` does step ``t`` (the first is 1) of one parameter in place, in
    the type of its tensors; a state that is not given is None.
    """

    name: str
    reference: Reference
    states: tuple[str, ...]  # in the operator's order
    numbers: Mapping[str, float | bool]  # after lr, in the operator's order
    optional: frozenset[str] = frozenset()  # states that may be left out
    squares: frozenset[str] = frozenset()  # states that are never negative
    scalars: frozenset[str] = frozenset()  # states of one element
    variants: tuple[Mapping[str, Any], ...] = field(default=({},))  # numbers of other calls; "without": states

    @property
    def op(self) -> Any:
        """``torch.ops.fastkern.<name>``."""
        return getattr(torch.ops.fastkern, self.name).default


def _adam(
    p: Tensor, g: Tensor, t: int, m: Tensor, v: Tensor, largest: Tensor | None, *, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, decoupled: bool = False,
) -> None:  # fmt: skip
    if decoupled:
        p.mul_(1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    if largest is not None:
        largest.copy_(torch.maximum(largest, v))
    second = v if largest is None else largest
    p.sub_(lr / (1 - beta1**t) * m / ((second / (1 - beta2**t)).sqrt() + eps))


def _adamw(*arguments: Any, **numbers: Any) -> None:
    _adam(*arguments, **numbers, decoupled=True)


def _sgd(
    p: Tensor, g: Tensor, t: int, buffer: Tensor | None, *, lr: float, momentum: float, dampening: float,
    weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    g = g + weight_decay * p
    if buffer is not None and momentum != 0.0:
        buffer.copy_(g if t == 1 else momentum * buffer + (1 - dampening) * g)
        g = g + momentum * buffer if nesterov else buffer
    p.sub_(lr * g)


def _lion(
    p: Tensor, g: Tensor, t: int, m: Tensor, *, lr: float, beta1: float, beta2: float, weight_decay: float
) -> None:
    del t
    direction = torch.sign(m + (1 - beta1) * (g - m))
    m.lerp_(g, 1 - beta2)
    p.mul_(1 - lr * weight_decay).sub_(lr * direction)


def _adagrad(
    p: Tensor, g: Tensor, t: int, total: Tensor, *, lr: float, lr_decay: float, eps: float, weight_decay: float
) -> None:
    g = g + weight_decay * p
    total.add_(g * g)
    p.sub_(lr / (1 + (t - 1) * lr_decay) * g / (total.sqrt() + eps))


def _rmsprop(
    p: Tensor, g: Tensor, t: int, square: Tensor, average: Tensor | None, buffer: Tensor | None, *, lr: float,
    alpha: float, eps: float, momentum: float, weight_decay: float,
) -> None:  # fmt: skip
    del t
    g = g + weight_decay * p
    square.lerp_(g * g, 1 - alpha)
    moment = square
    if average is not None:
        average.lerp_(g, 1 - alpha)
        moment = square - average * average
    direction = g / (moment.sqrt() + eps)
    if buffer is not None and momentum != 0.0:
        direction = buffer.mul_(momentum).add_(direction)
    p.sub_(lr * direction)


def _nadam(
    p: Tensor, g: Tensor, t: int, m: Tensor, v: Tensor, product: Tensor, *, lr: float, beta1: float, beta2: float,
    eps: float, decay_base: float, weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    if decoupled:
        p.mul_(1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    now, following = (beta1 * (1 - 0.5 * decay_base**n) for n in (t, t + 1))
    product.mul_(now)
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    denominator = (v / (1 - beta2**t)).sqrt() + eps
    done = product.item()
    p.sub_(lr * (1 - now) / (1 - done) * g / denominator)
    p.sub_(lr * following / (1 - done * following) * m / denominator)


def _radam(
    p: Tensor, g: Tensor, t: int, m: Tensor, v: Tensor, *, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    if decoupled:
        p.mul_(1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    most = 2 / (1 - beta2) - 1
    length = most - 2 * t * beta2**t / (1 - beta2**t)
    direction = m / (1 - beta1**t)
    if length > 5:
        rectified = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        direction = direction * (1 - beta2**t) ** 0.5 / (v.sqrt() + eps) * rectified**0.5
    p.sub_(lr * direction)


def _lamb(
    p: Tensor, g: Tensor, t: int, m: Tensor, v: Tensor, *, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float,
) -> None:  # fmt: skip
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    direction = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps) + weight_decay * p
    values, directions = p.norm(), direction.norm()
    ratio = (values / directions).item() if values > 0 and directions > 0 else 1.0
    p.sub_(lr * ratio * direction)


_BETAS = {"beta1": 0.9, "beta2": 0.95}
_AVERAGES = ("exp_avgs", "exp_avg_sqs")
_SQUARES = frozenset({"exp_avg_sqs", "max_exp_avg_sqs"})
_LARGEST = frozenset({"max_exp_avg_sqs"})

OPTIM_SPECS: tuple[OptimSpec, ...] = (
    *(
        OptimSpec(
            name,
            reference,
            (*_AVERAGES, "max_exp_avg_sqs"),
            {**_BETAS, "eps": 1e-6, "weight_decay": 0.1},
            optional=_LARGEST,
            squares=_SQUARES,
            variants=({"without": _LARGEST}, {}),
        )
        for name, reference in (("adamw_", _adamw), ("adam_", _adam))
    ),
    OptimSpec(
        "sgd_",
        _sgd,
        ("momentum_buffers",),
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "nesterov": False},
        variants=({}, {"dampening": 0.0, "nesterov": True}, {"momentum": 0.0}),
    ),
    OptimSpec("lion_", _lion, ("exp_avgs",), {**_BETAS, "weight_decay": 0.1}),
    OptimSpec(
        "adagrad_",
        _adagrad,
        ("state_sums",),
        {"lr_decay": 0.1, "eps": 1e-6, "weight_decay": 0.1},
        squares=frozenset({"state_sums"}),
    ),
    OptimSpec(
        "rmsprop_",
        _rmsprop,
        ("square_avgs", "grad_avgs", "momentum_buffers"),
        {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "weight_decay": 0.1},
        optional=frozenset({"grad_avgs", "momentum_buffers"}),
        squares=frozenset({"square_avgs"}),
        variants=({"without": frozenset({"grad_avgs"})}, {}, {"momentum": 0.0}),
    ),
    OptimSpec(
        "nadam_",
        _nadam,
        (*_AVERAGES, "mu_products"),
        {**_BETAS, "eps": 1e-6, "decay_base": 0.99, "weight_decay": 0.1, "decoupled": False},
        squares=_SQUARES,
        scalars=frozenset({"mu_products"}),
        variants=({}, {"decoupled": True}),
    ),
    OptimSpec(
        "radam_",
        _radam,
        _AVERAGES,
        {**_BETAS, "eps": 1e-6, "weight_decay": 0.1, "decoupled": False},
        squares=_SQUARES,
        variants=({}, {"decoupled": True, "beta2": 0.99}),
    ),
    OptimSpec("lamb_", _lamb, _AVERAGES, {**_BETAS, "eps": 1e-6, "weight_decay": 0.1}, squares=_SQUARES),
)
