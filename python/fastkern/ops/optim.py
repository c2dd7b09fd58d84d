# SPDX-License-Identifier: Apache-2.0
"""Steps of optimizers on lists of tensors, for those who keep parameters and states themselves.

:mod:`fastkern.optim` has the classes. What all functions here have in common:

* ``params``, ``grads`` and each list of states have one tensor a parameter, of its shape, strides and device; the
  tensors of a list are of one type, float32, float16 or bfloat16, which may be another for each list. Parameters have
  no gaps between their elements.
* ``steps``: float32 tensors of one element, the steps done so far; one is added.
* ``extras``: what ``rounding`` keeps for each parameter (see :class:`fastkern.optim.Adam`): for ``"kahan"`` tensors of
  the parameters' type, for ``"master"`` float32, for ``"remainder"`` int16; else none.
* States of ``adamw_``, ``adam_`` (without amsgrad), ``sgd_`` and ``lion_`` may be uint8, codes of blocks of 256
  elements in the order of memory; ``scales`` then has a float32 tensor of one element for each block, for each
  parameter: those of the first list of states, then those of the second. Zeros in both are states of 0.
* ``lr``: a float, or a float32 tensor of one element on the parameters' device.
* ``grad_scale``, ``grad_factor``: gradients are divided by the one and multiplied with the other; ``found_inf``: if it
  is not 0, nothing changes. Float32 tensors of one element.
* All are deterministic, change their arguments in place, return nothing, and have no gradient. On CUDA the table of the
  tensors is made and written in each call; the classes keep it. Bad arguments raise RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _schema

_ROUNDINGS = {"nearest": 0, "stochastic": 1, "kahan": 2, "master": 3, "remainder": 4}
_ops = torch.ops.fastkern

Tensors = Sequence[Tensor]


def _name_of(op: Any) -> str:
    return str(op.name()).removesuffix(".default")  # that tracing cannot follow, so for errors alone


def _run(
    op: Any,
    params: Tensors,
    grads: Tensors,
    steps: Tensors,
    states: Sequence[Tensors],
    lr: float | Tensor,
    numbers: Sequence[float | bool],
    options: dict[str, Any],
) -> None:
    maximize, rounding, seed = (
        options.pop("maximize", False),
        options.pop("rounding", "nearest"),
        options.pop("seed", 0),
    )
    extras, scales = options.pop("extras", ()), options.pop("scales", ())
    scalars = [options.pop(name, None) for name in ("grad_scale", "found_inf", "grad_factor")]
    if options:
        raise TypeError(f"{_name_of(op)}: there is no argument {next(iter(options))!r}")
    if rounding not in _ROUNDINGS:
        raise RuntimeError(f"{_name_of(op)}: rounding must be one of {', '.join(_ROUNDINGS)}, got {rounding!r}")
    if not params:
        return
    rate, tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    op(
        params, grads, steps, extras, scales, *states, rate, *numbers, maximize, _ROUNDINGS[rounding], seed, tensor,
        *scalars,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # what autograd may have saved is no longer what it was
        torch.autograd.graph.increment_version(params)


def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    max_exp_avg_sqs: Tensors = (),
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    **options: Any,
) -> None:
    """One step of AdamW; of amsgrad with ``max_exp_avg_sqs``. See the module for the rest."""
    numbers = (*betas, eps, weight_decay)
    _run(_ops.adamw_.default, params, grads, steps, (exp_avgs, exp_avg_sqs, max_exp_avg_sqs), lr, numbers, options)


def adam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    max_exp_avg_sqs: Tensors = (),
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    **options: Any,
) -> None:
    """One step of Adam, weight decay in the gradient; of amsgrad with ``max_exp_avg_sqs``."""
    numbers = (*betas, eps, weight_decay)
    _run(_ops.adam_.default, params, grads, steps, (exp_avgs, exp_avg_sqs, max_exp_avg_sqs), lr, numbers, options)


def sgd_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors = (),
    steps: Tensors = (),
    *,
    lr: float | Tensor = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    **options: Any,
) -> None:
    """One step of SGD; buffers and steps are wanted with a momentum. In step 0 the buffer becomes the gradient."""
    numbers = (momentum, dampening, weight_decay, nesterov)
    _run(_ops.sgd_.default, params, grads, steps, (momentum_buffers,), lr, numbers, options)


def lion_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    steps: Tensors = (),
    *,
    lr: float | Tensor = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    **options: Any,
) -> None:
    """One step of Lion; steps are wanted for stochastic rounding."""
    _run(_ops.lion_.default, params, grads, steps, (exp_avgs,), lr, (*betas, weight_decay), options)


def adagrad_(
    params: Tensors,
    grads: Tensors,
    state_sums: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor = 1e-2,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    **options: Any,
) -> None:
    """One step of Adagrad."""
    _run(_ops.adagrad_.default, params, grads, steps, (state_sums,), lr, (lr_decay, eps, weight_decay), options)


def rmsprop_(
    params: Tensors,
    grads: Tensors,
    square_avgs: Tensors,
    steps: Tensors,
    grad_avgs: Tensors = (),
    momentum_buffers: Tensors = (),
    *,
    lr: float | Tensor = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    **options: Any,
) -> None:
    """One step of RMSprop; centered with ``grad_avgs``; buffers are wanted with a momentum."""
    states = (square_avgs, grad_avgs, momentum_buffers)
    _run(_ops.rmsprop_.default, params, grads, steps, states, lr, (alpha, eps, momentum, weight_decay), options)


def nadam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    mu_products: Tensors,
    *,
    lr: float | Tensor = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    **options: Any,
) -> None:
    """One step of NAdam; ``mu_products``, like ``steps``, have one element, and begin with 1."""
    numbers = (*betas, eps, 0.96**momentum_decay, weight_decay, decoupled)
    _run(_ops.nadam_.default, params, grads, steps, (exp_avgs, exp_avg_sqs, mu_products), lr, numbers, options)


def radam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    **options: Any,
) -> None:
    """One step of RAdam."""
    numbers = (*betas, eps, weight_decay, decoupled)
    _run(_ops.radam_.default, params, grads, steps, (exp_avgs, exp_avg_sqs), lr, numbers, options)


def lamb_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
    **options: Any,
) -> None:
    """One step of LAMB, with a trust ratio for each parameter."""
    numbers = (*betas, eps, weight_decay)
    _run(_ops.lamb_.default, params, grads, steps, (exp_avgs, exp_avg_sqs), lr, numbers, options)


def _fake(op: str) -> Callable[..., None]:
    names = [argument.name for argument in _schema.arguments(op)]

    def fake(*arguments: Any) -> None:
        """Nothing comes back; what is on two devices is refused here, as fakes stand for the meta device as well."""
        device = None
        for name, argument in zip(names, arguments, strict=True):
            many = isinstance(argument, (list, tuple))
            for i, t in enumerate(argument if many else [argument]):
                if not isinstance(t, Tensor):
                    continue
                device = device or t.device
                if t.device != device:
                    item = f"{name}[{i}]" if many else name
                    raise RuntimeError(
                        f"fastkern::{op}: {item} must be on the same device as params[0], which is on {device}, got "
                        f"{t.device}"
                    )

    return fake


for _name in ("adamw_", "adam_", "sgd_", "lion_", "adagrad_", "rmsprop_", "nadam_", "radam_", "lamb_"):
    _schema.register_fake(_name, _fake(_name))
