# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum made orthogonal, with AdamW for what is no matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkern.optim import _plan
from fastkern.optim._base import Numbers
from fastkern.optim._direct import DirectOptimizer, GroupNumbers, Item, rate_of
from fastkern.optim._plan import Bucket, Entry

_ADJUSTMENTS = (None, "original", "match_rms_adamw")
# What a group of AdamW has of its own.
_ADAMW = ("lr", "betas", "eps", "weight_decay")


def newton_schulz(
    stack: Tensor, coefficients: tuple[float, float, float], eps: float, steps: int, scale: float = 1.0
) -> Tensor:
    r"""Each matrix of a stack made nearly orthogonal, its singular values brought close to 1.

    The quintic iteration of Jordan (2024), from the matrix divided by its Frobenius norm:

    .. math::
        X \leftarrow a X + (b A + c A^2) X, \quad A = X X^T

    Of tall matrices the smaller product :math:`X^T X` is taken, which gives the same.

    Args:
        stack: (B, M, N), float32, float16 or bfloat16; is overwritten.
        coefficients: a, b and c.
        eps: the least norm that is divided by.
        steps: iterations, at least one.
        scale: what the result is multiplied with, at no cost.

    Returns:
        (B, M, N), in the type of ``stack``; deterministic as far as torch's matrix products are.
    """
    a, b, c = coefficients
    x = stack.div_(torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp_(min=eps))
    tall = x.shape[1] > x.shape[2]
    for i in range(steps):
        last = scale if i == steps - 1 else 1.0
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, polynomial) if tall else (polynomial, x)
        x = torch.baddbmm(x, left, right, beta=a * last, alpha=last)
    return x


class Muon(DirectOptimizer):
    r"""Muon (Jordan, 2024): as :class:`torch.optim.Muon`, with AdamW for other parameters in the same object.

    .. math::
        m \leftarrow \mu m + (1 - \mu) g, \quad u = \mu m + (1 - \mu) g \text{ (nesterov)}, \quad
        p \leftarrow p (1 - lr \cdot wd) - lr \cdot s \cdot orthogonal(u)

    where s is that of ``adjust_lr_fn``. Matrices of a group with the same shape are one stack, and an iteration is
    three batched products of torch for all of them, see :func:`newton_schulz`. Momentum is one launch for all
    parameters of a signature, and so is the update.

    A group may have parameters of any shape: those that are no matrices become a group of their own behind it, with
    ``use_muon=False``, which AdamW updates, with ``adamw_lr`` and so on as its ``lr`` and so on. A group that says
    ``use_muon=False`` itself (embeddings and the last layer, as a rule) is AdamW's as it is.

    Args:
        params: tensors or groups; float32, float16 or bfloat16.
        lr: of the matrices; as of :class:`Adam`.
        weight_decay: times ``lr`` and the parameter.
        momentum: of the average of gradients.
        nesterov: looks one step ahead.
        ns_coefficients: of the iteration.
        eps: the least norm that a matrix is divided by.
        ns_steps: iterations, 1 to 99.
        adjust_lr_fn: what scales the rate of an M x N matrix: ``"original"`` or None by sqrt(max(1, M / N)),
            ``"match_rms_adamw"`` by 0.2 sqrt(max(M, N)), so that rates of AdamW fit (Liu et al., 2025).
        ns_dtype: what the iteration computes in: bfloat16, as torch's does, float16 or float32.
        flatten: takes tensors of more dimensions as matrices of their first and all the others (convolutions);
            without it AdamW updates them.
        maximize: steps up.
        adamw_lr: of parameters that AdamW updates, as the following.
        adamw_betas: see ``adamw_lr``.
        adamw_eps: see ``adamw_lr``.
        adamw_weight_decay: see ``adamw_lr``.
        state_dtype: as of :class:`Adam`, as the following.
        rounding: see ``state_dtype``.
        seed: see ``state_dtype``.

    Raises:
        ValueError: a bad option.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        flatten: bool = False,
        maximize: bool = False,
        adamw_lr: float | Tensor = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 1e-2,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "flatten": flatten,
            "maximize": maximize,
            "use_muon": True,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    # ---- groups ------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters that are no matrices become a group of their own, for AdamW."""
        group, before = dict(param_group), len(self.param_groups)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
        try:
            for part in self._parts(group):
                super().add_param_group(part)
        except (TypeError, ValueError):
            del self.param_groups[before:]
            raise

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        if not group.get("use_muon", True):
            return [self._adamw_group(group, group)]
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        if isinstance(params, set):  # which torch refuses, in words
            return [group]
        flatten = group.get("flatten", self.defaults["flatten"])
        matrices: list[Any] = []
        others: list[Any] = []
        for entry in params:
            p = entry[1] if isinstance(entry, tuple) else entry
            is_matrix = isinstance(p, Tensor) and (p.ndim == 2 or (flatten and p.ndim > 2))
            (matrices if is_matrix else others).append(entry)
        parts = [{**group, "params": matrices}] if matrices or not others else []
        if others:
            named = {name: value for name, value in group.items() if name not in _ADAMW}
            parts.append(self._adamw_group({**named, "params": others, "use_muon": False}, group))
        return parts

    def _adamw_group(self, group: dict[str, Any], of: dict[str, Any]) -> dict[str, Any]:
        """``group`` with the numbers of AdamW that are missing, of what ``of`` or the optimizer says."""
        missing = {name: of.get(f"adamw_{name}", self.defaults[f"adamw_{name}"]) for name in _ADAMW}
        return {**missing, **group}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_positive(group, "eps", "weight_decay")
        if not group["use_muon"]:
            self._check_betas(group)
            return
        self._check_positive(group, "momentum")
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(
                f"{self._name}: ns_coefficients must be three numbers, got {len(group['ns_coefficients'])}"
            )
        if not 1 <= group["ns_steps"] < 100:
            raise ValueError(f"{self._name}: ns_steps must be in [1, 100), got {group['ns_steps']}")
        if group["adjust_lr_fn"] not in _ADJUSTMENTS:
            raise ValueError(f"{self._name}: adjust_lr_fn must be one of {_ADJUSTMENTS}, got {group['adjust_lr_fn']!r}")
        if group["ns_dtype"] not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"{self._name}: ns_dtype must be torch.bfloat16, torch.float16 or torch.float32, "
                f"got {group['ns_dtype']!r}"
            )
        for p in group["params"]:
            if p.ndim < 2 or (p.ndim > 2 and not group["flatten"]):
                raise ValueError(
                    f"{self._name}: parameters of a group with use_muon must have 2 dimensions"
                    f"{' or more' if group['flatten'] else ''}, got {tuple(p.shape)}"
                )

    def _in_plan(self, group: dict[str, Any]) -> bool:
        return not group["use_muon"]

    def _kind(self, group: dict[str, Any]) -> str:
        return "muon" if group["use_muon"] else "adam"

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")

    def _has_step(self, group: dict[str, Any]) -> bool:
        return not group["use_muon"] or group["rounding"] == "stochastic"

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        if group["use_muon"]:
            return group["momentum"], 0.0, 0.0, 0.0, 0.0, False, bool(group["nesterov"])
        beta1, beta2 = group["betas"]
        return beta1, beta2, group["eps"], group["weight_decay"], 0.0, True, False

    # ---- step --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _scale(rows: int, columns: int, adjust_lr_fn: str | None) -> float:
        if adjust_lr_fn == "match_rms_adamw":
            return float(0.2 * max(rows, columns) ** 0.5)
        return float(max(1.0, rows / max(columns, 1)) ** 0.5)

    def _step_items(self, items: list[Item], factors: dict[torch.device, Tensor]) -> None:
        stacks: dict[tuple[int, torch.device, int, int], list[int]] = {}
        for i, item in enumerate(items):
            if item.param.numel() > 0:
                rows = item.param.shape[0]
                stacks.setdefault((item.group, item.param.device, rows, item.param.numel() // rows), []).append(i)
        memory = {
            key: torch.empty(
                (len(those), *key[2:]), dtype=self.param_groups[key[0]]["ns_dtype"], device=items[those[0]].grad.device
            )
            for key, those in stacks.items()
        }
        self._average(items, stacks, memory, factors)
        updated, directions = [], []
        for key, those in stacks.items():
            group = self.param_groups[key[0]]
            result = newton_schulz(
                memory.pop(key),
                group["ns_coefficients"],
                group["eps"],
                group["ns_steps"],
                self._scale(key[2], key[3], group["adjust_lr_fn"]),
            )
            updated += [items[i] for i in those]
            directions += [result[k].view(items[i].param.shape) for k, i in enumerate(those)]
        self._apply(updated, directions, lambda g, device: (*rate_of(g["lr"], device), g["weight_decay"]))

    def _average(
        self,
        items: list[Item],
        stacks: dict[tuple[int, torch.device, int, int], list[int]],
        memory: dict[tuple[int, torch.device, int, int], Tensor],
        factors: dict[torch.device, Tensor],
    ) -> None:
        """Momentum, and what of it is to be made orthogonal: written into ``memory``."""
        buckets: dict[tuple[Any, ...], tuple[Bucket, list[Tensor]]] = {}
        for key, those in stacks.items():
            number, device = key[:2]
            for place, i in zip(memory[key], those, strict=True):
                item = items[i]
                average = item.states[0]
                assert average is not None  # _states names it
                types = (place.dtype, item.grad.dtype, average.dtype)
                signature = (device, types, number // _plan.GROUPS)
                if signature not in buckets:
                    buckets[signature] = (Bucket(device, "muon", "nearest", 0, types), [])
                bucket, grads = buckets[signature]
                if number not in bucket.groups:
                    bucket.groups.append(number)
                bucket.entries.append(Entry(place, place, (average,), (), None, None, None, number, item.index))
                grads.append(item.grad)

        def numbers(group: dict[str, Any]) -> GroupNumbers:
            return 0.0, None, self._numbers(group), bool(group["maximize"])

        for bucket, grads in buckets.values():
            scale, factor = self._amp("grad_scale", bucket.device), factors.get(bucket.device)
            self._launch(bucket, grads, numbers, scale, factor)
