# SPDX-License-Identifier: Apache-2.0
"""Adagrad, RMSprop, NAdam, RAdam and LAMB."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkern.optim._base import Numbers, Optimizer


class Adagrad(Optimizer):
    r"""Adagrad (Duchi et al., 2011): as :class:`torch.optim.Adagrad`, in one launch.

    Args:
        params: as of :class:`Adam`.
        lr: as of :class:`Adam`.
        lr_decay: the rate is divided by 1 + (step - 1) * lr_decay.
        weight_decay: times the parameter, added to the gradient.
        initial_accumulator_value: what the sum of squares begins with.
        eps: added to the denominator.
        maximize: steps up.
        foreach: as of :class:`Adam`, as what follows.
        differentiable: must be False.
        fused: see ``foreach``.
        state_dtype: of the sum.
        rounding: of parameters of 16 bits.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_positive(group, "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def _kind(self, group: dict[str, Any]) -> str:
        return "adagrad"

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("sum",)

    def _first_value(self, name: str, p: Tensor, group: dict[str, Any]) -> float:
        return group["initial_accumulator_value"] if name == "sum" else 0.0

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        return group["lr_decay"], 0.0, group["eps"], group["weight_decay"], 0.0, False, False


class RMSprop(Optimizer):
    r"""RMSprop (Hinton, 2012): as :class:`torch.optim.RMSprop`, in one launch.

    Args:
        params: as of :class:`Adam`.
        lr: as of :class:`Adam`.
        alpha: of the average of squares.
        eps: added to the denominator.
        weight_decay: times the parameter, added to the gradient.
        momentum: of a buffer of steps; 0: there is none.
        centered: divides by the deviation instead.
        capturable: as of :class:`Adam`, as ``foreach``.
        foreach: see ``capturable``.
        maximize: steps up.
        differentiable: must be False.
        state_dtype: of all states.
        rounding: of parameters of 16 bits.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = True,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_positive(group, "alpha", "eps", "weight_decay", "momentum")

    def _kind(self, group: dict[str, Any]) -> str:
        return "rmsprop"

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return (
            "square_avg",
            "grad_avg" if group["centered"] else None,
            "momentum_buffer" if group["momentum"] != 0.0 else None,
        )

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        return group["momentum"], group["alpha"], group["eps"], group["weight_decay"], 0.0, False, False


class _Adamlike(Optimizer):
    """Two averages, betas, eps."""

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_betas(group)
        self._check_positive(group, "eps", "weight_decay")

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        beta1, beta2 = group["betas"]
        decoupled = bool(group.get("decoupled_weight_decay", False))
        return beta1, beta2, group["eps"], group["weight_decay"], self._decay_base(group), decoupled, False

    def _decay_base(self, group: dict[str, Any]) -> float:
        return 0.0


class NAdam(_Adamlike):
    r"""NAdam (Dozat, 2016): as :class:`torch.optim.NAdam`, in one launch.

    Args:
        params: as of :class:`Adam`.
        lr: as of :class:`Adam`.
        betas: as of :class:`Adam`.
        eps: as of :class:`Adam`.
        weight_decay: as of :class:`Adam`.
        momentum_decay: how fast the momentum grows towards beta1.
        decoupled_weight_decay: as in AdamW.
        foreach: as of :class:`Adam`, as ``capturable``.
        maximize: steps up.
        capturable: see ``foreach``.
        differentiable: must be False.
        state_dtype: of the averages.
        rounding: of parameters of 16 bits.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = True,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_positive(group, "momentum_decay")

    def _kind(self, group: dict[str, Any]) -> str:
        return "nadam"

    def _first_value(self, name: str, p: Tensor, group: dict[str, Any]) -> float:
        return 1.0 if name == "mu_product" else 0.0

    def _decay_base(self, group: dict[str, Any]) -> float:
        return 0.96 ** group["momentum_decay"]


class RAdam(_Adamlike):
    r"""RAdam (Liu et al., 2019): as :class:`torch.optim.RAdam`, in one launch.

    Args:
        params: as of :class:`Adam`.
        lr: as of :class:`Adam`.
        betas: as of :class:`Adam`.
        eps: as of :class:`Adam`.
        weight_decay: as of :class:`Adam`.
        decoupled_weight_decay: as in AdamW.
        foreach: as of :class:`Adam`, as ``capturable``.
        maximize: steps up.
        capturable: see ``foreach``.
        differentiable: must be False.
        state_dtype: of the averages.
        rounding: of parameters of 16 bits.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = True,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _kind(self, group: dict[str, Any]) -> str:
        return "radam"


class LAMB(_Adamlike):
    r"""LAMB (You et al., 2019): Adam's direction, scaled for each parameter by the ratio of the norms.

    .. math::
        u = \hat m / (\sqrt{\hat v} + eps) + wd \cdot p, \quad p \leftarrow p - lr \frac{|p|}{|u|} u

    The ratio is 1 where either norm is 0. Norms are deterministic.

    Args:
        params: as of :class:`Adam`.
        lr: as of :class:`Adam`.
        betas: as of :class:`Adam`.
        eps: added to the denominator.
        weight_decay: part of the direction.
        maximize: steps up.
        state_dtype: of the averages.
        rounding: of parameters of 16 bits.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _kind(self, group: dict[str, Any]) -> str:
        return "lamb"
