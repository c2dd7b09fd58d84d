# SPDX-License-Identifier: Apache-2.0
"""Rows of the benchmark for optimizers: a step on one tensor of P parameters, in place.

They are in no table of tests: the optimizers have tests of their own. What a step costs on a model's list of tensors,
and in every kind of 16-bit rounding, is measured by tools/optim_rates.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastkern
from fastkern.specs import Inputs, OpSpec, Outputs

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2


def _make(*, P: int, dtype: torch.dtype, device: Any) -> Inputs:
    """A parameter, its gradient, and states as after some steps."""
    param, grad, exp_avg, exp_avg_sq = (torch.randn(P, device=device) for _ in range(4))
    tensors = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq.square()}
    step = torch.tensor(9.0, device=device)
    return {**{name: t.to(dtype) for name, t in tensors.items()}, "step": step}


def adamw(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> Outputs:
    """Ours."""
    options: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    fastkern.adamw_([param], [grad], [exp_avg], [exp_avg_sq], [step], **options)
    return param, exp_avg, exp_avg_sq


def adamw_reference(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> Outputs:
    """The formula."""
    step.add_(1)
    exp_avg.mul_(BETAS[0]).add_(grad, alpha=1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).add_(grad * grad, alpha=1 - BETAS[1])
    first, second = 1 - BETAS[0] ** step, 1 - BETAS[1] ** step
    update = (exp_avg / first) / ((exp_avg_sq / second).sqrt() + EPS)
    param.mul_(1 - LR * DECAY).sub_((LR * update).to(param.dtype))
    return param, exp_avg, exp_avg_sq


def _torch(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, **kind: Any) -> Outputs:
    from torch.optim.adamw import adamw as step_of

    step_of(
        [param], [grad], [exp_avg], [exp_avg_sq], [], [step],
        amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=LR, weight_decay=DECAY, eps=EPS, maximize=False,
        capturable=step.is_cuda, **kind,
    )  # fmt: skip
    return param, exp_avg, exp_avg_sq


def adamw_torch(**inputs: Any) -> Outputs:
    """Torch's fused step."""
    return _torch(**inputs, fused=True)


def adamw_foreach(**inputs: Any) -> Outputs:
    """Torch's step of several kernels over a list."""
    return _torch(**inputs, foreach=True)


def adamw_apex(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> Outputs:
    """Apex's fused step; its count is a number of the host."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    overflow = torch.zeros(1, dtype=torch.int32, device=param.device)
    lists = [[grad], [param], [exp_avg], [exp_avg_sq]]
    multi_tensor_applier(amp_C.multi_tensor_adam, overflow, lists, LR, *BETAS, EPS, 10, 1, True, DECAY)
    return param, exp_avg, exp_avg_sq


def adamw_bitsandbytes(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> Outputs:
    """Bitsandbytes's step with 32-bit states; its count is a number of the host."""
    from bitsandbytes.functional import optimizer_update_32bit

    optimizer_update_32bit(
        "adam", grad, param, exp_avg, BETAS[0], EPS, 10, LR, state2=exp_avg_sq, beta2=BETAS[1], weight_decay=DECAY
    )
    return param, exp_avg, exp_avg_sq


ADAMW = OpSpec(
    name="adamw_",
    family="optim",
    function=adamw,
    reference=adamw_reference,
    baseline=adamw_torch,
    make=_make,
    dims=(),
    variants=({},),
    differentiable=(),
    strided=(),
    batched=(),
    # Parameter and states read and written, the gradient read.
    traffic=lambda inputs, backward: 7 * inputs["param"].numel() * inputs["param"].element_size(),
    flops=lambda inputs, backward: 15 * inputs["param"].numel(),
    bench_dims=tuple({"P": 1 << power} for power in (16, 20, 24, 26, 28)),
    cpu_bench_dims=tuple({"P": 1 << power} for power in (16, 20, 24)),
    peers={"torch foreach": adamw_foreach, "apex": adamw_apex, "bitsandbytes": adamw_bitsandbytes},
    dtypes=(torch.float32, torch.bfloat16),
    inplace=True,
)

SPECS = (ADAMW,)
