# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastkern.optim._base import Numbers, Optimizer


class Adam(Optimizer):
    r"""Adam (Kingma and Ba, 2014): as :class:`torch.optim.Adam`, in one launch.

    Args:
        params: tensors or groups; float32, float16 or bfloat16, any strides.
        lr: a float or a tensor of one element (on the parameters' device it is read by the kernel).
        betas: of the averages of gradients and of their squares.
        eps: added to the denominator.
        weight_decay: times the parameter; added to the gradient or, ``decoupled_weight_decay``, times ``lr`` taken from
            the parameter.
        amsgrad: divides by the largest average of squares so far.
        maximize: steps up.
        state_dtype: of the averages; None: that of the parameter. ``"8bit"`` (not with ``amsgrad``): codes of 8 bits
            with a float32 scale for each 256 elements.
        min_8bit_size: with ``"8bit"``, parameters of fewer elements have float32 states.
        rounding: how parameters of 16 bits are kept. ``"nearest"``; ``"stochastic"`` (bfloat16: up or down by chance,
            right on average); ``"kahan"`` (what rounding took away is kept, in 16 bits more); ``"master"`` (a copy in
            float32); ``"remainder"`` (bfloat16: the lower 16 bits of that copy).
        seed: of stochastic rounding, which depends on it, the step, the parameter's number and the element alone.
        foreach: taken for the sake of torch's signature, as ``fused`` and ``capturable`` are: there is one way, and it
            can be captured.
        capturable: see ``foreach``.
        differentiable: must be False.
        fused: see ``foreach``.
        decoupled_weight_decay: as in AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = True,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | Literal["8bit"] | None = None,
        min_8bit_size: int = 4096,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "state_dtype": state_dtype,
            "min_8bit_size": min_8bit_size,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_betas(group)
        self._check_positive(group, "eps", "weight_decay")

    def _kind(self, group: dict[str, Any]) -> str:
        return "amsgrad" if group["amsgrad"] else "adam"

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        beta1, beta2 = group["betas"]
        return beta1, beta2, group["eps"], group["weight_decay"], 0.0, group["decoupled_weight_decay"], False


class AdamW(Adam):
    r"""AdamW (Loshchilov and Hutter, 2017): as :class:`torch.optim.AdamW`, in one launch.

    Arguments are those of :class:`Adam`, with decoupled weight decay.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)
