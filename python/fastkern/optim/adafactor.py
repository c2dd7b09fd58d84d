# SPDX-License-Identifier: Apache-2.0
"""Adafactor: second moments as products of rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkern.optim._base import Numbers
from fastkern.optim._direct import DirectOptimizer, Item, rate_of

_TINY = torch.finfo(torch.float32).tiny
# Elements of more than one parameter that are worked on at a time: where a call costs as much as the copy saves.
_STACK = {"cpu": 1 << 16, "cuda": 1 << 24}


def _stacked(those: list[Tensor]) -> Tensor:
    """All of them in float32; a view of one that is alone."""
    return (those[0].unsqueeze(0) if len(those) == 1 else torch.stack(those)).to(torch.float32)


def _mean_square(g: Tensor, dim: int) -> Tensor:
    """Without the squares in memory."""
    return torch.linalg.vector_norm(g, dim=dim, keepdim=True).square_().div_(g.shape[dim])


class Adafactor(DirectOptimizer):
    r"""Adafactor (Shazeer and Stern, 2018): as :class:`torch.optim.Adafactor`, and nothing is waited for.

    .. math::
        \beta = 1 - t^{\tau}, \quad R \leftarrow \beta R + (1 - \beta) mean_{columns}(g^2), \quad
        C \leftarrow \beta C + (1 - \beta) mean_{rows}(g^2), \quad V = R C / mean(R)

    .. math::
        u = g / \sqrt{V}, \quad \rho = min(lr, 1 / \sqrt{t}), \quad
        p \leftarrow p (1 - lr \cdot wd) - \frac{\rho \, max(\epsilon_2, rms(p))}{max(1, rms(u) / d)} u

    Of a tensor of one dimension V itself is kept; of more than two, the last two are rows and columns. Directions are
    computed in float32 by torch operations, on stacks of parameters of one shape; one launch applies them, for all
    parameters of a signature. Results repeat bit for bit.

    Args:
        params: tensors or groups; float32, float16 or bfloat16.
        lr: the most that :math:`\rho` becomes; as of :class:`Adam`.
        beta2_decay: :math:`\tau`, at most 0.
        eps: what mean(R) and the square root of V are at least (None: the epsilon of the parameter's type), and what
            rms(p) is.
        d: the largest rms of u that is left alone; the ``clip_threshold`` of the paper's other implementations.
        weight_decay: times ``lr`` and the parameter.
        foreach: taken for the sake of torch's signature: there is one way.
        maximize: steps up.
        relative_step: False: :math:`\rho` is ``lr``.
        scale_parameter: False: rms(p) and ``eps[1]`` are left out.
        warmup_init: :math:`\rho` is at most 1e-6 t, in place of ``lr``; wants ``relative_step``.
        beta1: of an average of the steps, which then takes their place; None: there is none.
        state_dtype: of V of one dimension and of that average; None: that of the parameter. R and C are float32.
        rounding: as of :class:`Adam`.
        seed: as of :class:`Adam`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        relative_step: bool = True,
        scale_parameter: bool = True,
        warmup_init: bool = False,
        beta1: float | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "relative_step": relative_step,
            "scale_parameter": scale_parameter,
            "warmup_init": warmup_init,
            "beta1": beta1,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_positive(group, "weight_decay")
        if not group["beta2_decay"] <= 0.0:
            raise ValueError(f"{self._name}: beta2_decay must be <= 0, got {group['beta2_decay']}")
        for i, eps in enumerate(group["eps"]):
            if not (eps is None and i == 0) and not eps >= 0.0:
                raise ValueError(f"{self._name}: eps[{i}] must be >= 0, got {eps}")
        if not group["d"] >= 1.0:
            raise ValueError(f"{self._name}: d must be >= 1, got {group['d']}")
        if group["beta1"] is not None and not 0.0 <= group["beta1"] < 1.0:
            raise ValueError(f"{self._name}: beta1 must be in [0, 1) or None, got {group['beta1']}")
        if group["warmup_init"] and not group["relative_step"]:
            raise ValueError(f"{self._name}: warmup_init must be False without relative_step, got True")

    def _kind(self, group: dict[str, Any]) -> str:
        return "adafactor"

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return (None,) if group["beta1"] is None else ("exp_avg",)

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        return 0.0, 0.0, 0.0, group["weight_decay"], 0.0, True, False

    def _state_of(
        self, p: Tensor, like: Tensor, group: dict[str, Any]
    ) -> tuple[list[Tensor | None], list[Tensor], Tensor | None]:
        """The average of steps, R and C, or V."""
        states, scales, extra = super()._state_of(p, like, group)
        sizes = {"variance": p.shape}
        if p.ndim > 1:
            sizes = {
                "row_var": torch.Size([*p.shape[:-1], 1]),
                "col_var": torch.Size([*p.shape[:-2], 1, p.shape[-1]]),
            }
        state = self.state[p]
        for name, shape in sizes.items():
            dtype = torch.float32 if p.ndim > 1 else group["state_dtype"] or p.dtype
            if state.get(name) is None:
                self._refuse_capture(p)
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
            state[name] = state[name].to(dtype).contiguous()
            states.append(state[name])
        return states, scales, extra

    # ---- step --------------------------------------------------------------------------------------------------------

    def _step_items(self, items: list[Item], factors: dict[torch.device, Tensor]) -> None:
        stacks: dict[tuple[Any, ...], list[Item]] = {}
        updated: list[Item] = []
        for item in items:
            if item.param.numel() > 0:
                key = (item.group, item.param.device, item.param.dtype, item.grad.dtype, item.param.shape)
                stacks.setdefault(key, []).append(item)
        directions: list[Tensor] = []
        for (number, *_), those in stacks.items():
            most = max(1, _STACK[those[0].param.device.type] // those[0].param.numel())
            for start in range(0, len(those), most):
                some = those[start : start + most]
                directions += self._directions(some, self.param_groups[number], factors).unbind()
                updated += some

        def numbers(group: dict[str, Any], device: torch.device) -> tuple[float, Tensor | None, float]:
            lr, rate = rate_of(group["lr"], device)  # with a tensor, weight decay is part of the directions
            return 1.0, None, lr * group["weight_decay"] if rate is None else 0.0

        self._apply(updated, directions, numbers)

    def _directions(self, items: list[Item], group: dict[str, Any], factors: dict[torch.device, Tensor]) -> Tensor:
        """What is taken from parameters of one shape, (k, *shape) in float32; states are brought up to date."""
        device, size = items[0].param.device, items[0].param.numel()
        each = (len(items), *[1] * items[0].param.ndim)  # a number for each parameter
        g = _stacked([item.grad for item in items])
        if (factor := factors.get(device)) is not None:
            g = g * factor
        if (scale := self._grad_scale(device)) is not None:
            g = g / scale
        if group["maximize"]:
            g = -g
        steps = torch.stack([item.step.reshape(()) for item in items if item.step is not None]) + 1.0
        u = self._normalised(items, g, steps.pow(group["beta2_decay"]).view(each), group)
        lr, rate = rate_of(group["lr"], device)
        alpha = (torch.full((), lr, device=device) if rate is None else rate).expand(len(items))
        if group["relative_step"]:
            alpha = torch.minimum(steps.rsqrt(), steps * 1e-6 if group["warmup_init"] else alpha)
        if group["scale_parameter"]:
            norms = torch._foreach_norm([item.param for item in items], 2, dtype=torch.float32)
            alpha = alpha * torch.stack(norms).div_(size**0.5).clamp_(min=group["eps"][1])
        excess = torch.linalg.vector_norm(u.view(len(items), -1), dim=1).div_(size**0.5 * group["d"]).clamp_(min=1.0)
        u.mul_((alpha / excess).view(each))
        if group["beta1"] is not None:
            u = self._renewed([item.states[0] for item in items], u, 1.0 - group["beta1"])
        if rate is not None and group["weight_decay"] != 0.0:
            u += _stacked([item.param for item in items]) * (rate * group["weight_decay"])
        return u

    def _normalised(self, items: list[Item], g: Tensor, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """Gradients over the roots of their second moments, once those have them."""
        least = torch.finfo(items[0].param.dtype).eps if group["eps"][0] is None else group["eps"][0]
        if g.ndim > 2:
            rows, columns = (
                self._renewed([item.states[state] for item in items], _mean_square(g, dim), weight)
                for state, dim in ((1, -1), (2, -2))
            )
            moments = rows.div_(rows.mean(-2, keepdim=True).clamp_(min=max(least, _TINY))) * columns
        else:
            moments = self._renewed([item.states[1] for item in items], g.square(), weight)
        return moments.clamp_(min=max(least * least, _TINY)).rsqrt_().mul_(g)

    def _renewed(self, states: list[Tensor | None], new: Tensor, weight: Tensor | float) -> Tensor:
        """The states, as a stack in float32, moved towards ``new``; they themselves too, but after an overflow."""
        kept = [state for state in states if state is not None]
        old = _stacked(kept)
        found, result = self._amp("found_inf", new.device), torch.lerp(old, new, weight)
        if found is not None:
            result = torch.where(found != 0.0, old, result)
        torch._foreach_copy_(kept, list(result.unbind()))
        return result
