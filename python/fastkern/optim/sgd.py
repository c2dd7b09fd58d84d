# SPDX-License-Identifier: Apache-2.0
"""SGD and Lion: at most one state."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastkern.optim._base import Numbers, Optimizer


class SGD(Optimizer):
    r"""SGD with momentum: as :class:`torch.optim.SGD`, in one launch.

    Args:
        params: as of :class:`Adam`.
        lr: as of :class:`Adam`.
        momentum: of the buffer; 0: there is none.
        dampening: of the gradient on its way into the buffer, after the first step.
        weight_decay: times the parameter, added to the gradient.
        nesterov: Nesterov's momentum; wants a momentum and no dampening.
        maximize: steps up.
        foreach: as of :class:`Adam`, as what follows.
        differentiable: must be False.
        fused: see ``foreach``.
        state_dtype: of the buffer; as of :class:`Adam`.
        min_8bit_size: as of :class:`Adam`.
        rounding: of parameters of 16 bits.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | Literal["8bit"] | None = None,
        min_8bit_size: int = 4096,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "state_dtype": state_dtype,
            "min_8bit_size": min_8bit_size,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_positive(group, "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0.0 or group["dampening"] != 0.0):
            raise ValueError(
                f"{self._name}: nesterov must have a momentum and no dampening, got {group['momentum']} and "
                f"{group['dampening']}"
            )

    def _kind(self, group: dict[str, Any]) -> str:
        return "sgd"

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0.0 else (None,)

    def _has_step(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0.0 or group["rounding"] == "stochastic"

    def _first_value(self, name: str, p: Tensor, group: dict[str, Any]) -> float:
        # A buffer without a count is one of torch's, after its first step.
        return 1.0 if name == "step" and self.state[p].get("momentum_buffer") is not None else 0.0

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        return group["momentum"], group["dampening"], 0.0, group["weight_decay"], 0.0, False, group["nesterov"]


class Lion(Optimizer):
    r"""Lion (Chen et al., 2023): the sign of an average of gradients, with decoupled weight decay.

    .. math::
        p \leftarrow p (1 - lr \cdot wd) - lr \cdot sign(\beta_1 m + (1 - \beta_1) g), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    with sign(0) = 0.

    Args:
        params: as of :class:`Adam`.
        lr: as of :class:`Adam`; a third to a tenth of Adam's as a rule.
        betas: of the direction and of the average.
        weight_decay: times ``lr`` and the parameter.
        maximize: steps up.
        state_dtype: of the average; as of :class:`Adam`.
        min_8bit_size: as of :class:`Adam`.
        rounding: of parameters of 16 bits.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | Literal["8bit"] | None = None,
        min_8bit_size: int = 4096,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "min_8bit_size": min_8bit_size,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_betas(group)
        self._check_positive(group, "weight_decay")

    def _kind(self, group: dict[str, Any]) -> str:
        return "lion"

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg",)

    def _has_step(self, group: dict[str, Any]) -> bool:
        return group["rounding"] == "stochastic"

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        beta1, beta2 = group["betas"]
        return beta1, beta2, 0.0, group["weight_decay"], 0.0, True, False
