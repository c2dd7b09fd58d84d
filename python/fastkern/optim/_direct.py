# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose directions torch computes, for stacks of equal shapes; one launch then applies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkern.optim import _plan
from fastkern.optim._base import Numbers, Optimizer
from fastkern.optim._plan import Bucket, Entry

# A group's rate, the rate's tensor (None: the number counts), the other numbers, whether it steps up.
GroupNumbers = tuple[float, Tensor | None, Numbers, bool]


@dataclass
class Item:
    """A parameter with a gradient in this step; the gradient, the states and ``like`` are contiguous."""

    param: Tensor
    like: Tensor  # the parameter, or memory for a copy of one that is not contiguous
    grad: Tensor
    states: tuple[Tensor | None, ...]
    extra: Tensor | None
    step: Tensor | None
    group: int
    index: int


def rate_of(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """A number or, for a tensor on the parameters' GPU, the tensor: nothing is waited for."""
    if not isinstance(lr, Tensor):
        return lr, None
    if lr.is_cuda and lr.device == device:
        return 0.0, lr.to(torch.float32).reshape(())
    return float(lr), None


class DirectOptimizer(Optimizer):
    """What such optimizers share: a step, its clipping, and the last launch."""

    def _in_plan(self, group: dict[str, Any]) -> bool:
        return False

    def _step_items(self, items: list[Item], factors: dict[torch.device, Tensor]) -> None:
        """A step of the parameters that are in no plan; ``factors`` clip."""
        raise NotImplementedError

    def _items(self) -> list[Item]:
        found: list[tuple[Tensor, Tensor, dict[str, Any], int, int]] = []
        index = 0
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None and not self._in_plan(group):
                    self._check_gradient(p)
                    found.append((p, p.grad, group, number, index))
                index += 1
        self._scalars([(p, group) for p, _, group, *_ in found if self._has_step(group)], "step")
        items = []
        for p, grad, group, number, index in found:
            like = p if p.is_contiguous() else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            states, _, extra = self._state_of(p, like, group)
            step = self.state[p]["step"] if self._has_step(group) else None
            items.append(Item(p, like, grad.contiguous(), tuple(states), extra, step, number, index))
        return items

    def step(self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None) -> Any:
        """One step; see :meth:`fastkern.optim._base.Optimizer.step`."""
        loss = norm = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            plan, items = self._ready(), self._items()
            factors: dict[torch.device, Tensor] = {}
            if max_norm is not None:
                buckets = [*plan, *_plan.gradient_buckets([item.grad for item in items])]
                norm, factors = _plan.clip(buckets, float(max_norm), 2.0, self._grad_scale)
            for bucket in plan:
                self._step_bucket(bucket, factors.get(bucket.device))
            self._step_items(items, factors)
        if max_norm is None:
            return loss
        return norm if closure is None else (loss, norm)

    def _launch(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        numbers: Callable[[dict[str, Any]], GroupNumbers],
        scale: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        """One launch of a bucket with gradients that are no attributes of its parameters."""
        bucket.finish()
        parameters, stream = bucket.parameters, _plan.stream_of(bucket.device)
        parameters.use_grads(grads)
        found = self._amp("found_inf", bucket.device)
        groups, rates = [], []
        for number in bucket.groups:
            lr, rate, others, maximize = numbers(self.param_groups[number])
            rates.append(rate)
            groups.append((lr, _plan.address_of(rate), *others, maximize))
        for param, work in bucket.copies:
            work.copy_(param)
        parameters.write(stream)
        parameters.step(
            groups, _plan.address_of(scale), _plan.address_of(factor), _plan.address_of(found), bucket.seed, 0, stream
        )
        for param, work in bucket.copies:
            param.copy_(work)
        torch.autograd.graph.increment_version(parameters.updated)

    def _apply(
        self,
        items: Sequence[Item],
        directions: Sequence[Tensor],
        numbers: Callable[[dict[str, Any], torch.device], tuple[float, Tensor | None, float]],
    ) -> None:
        """Makes parameters ``p - lr * (direction + weight_decay * p)``, rounded as they are kept, and counts the step.

        ``numbers`` gives a group's ``(lr, lr's tensor, weight_decay)``. Directions are contiguous.
        """
        buckets: dict[tuple[Any, ...], tuple[Bucket, list[Tensor]]] = {}
        for item, direction in zip(items, directions, strict=True):
            p, group = item.param, self.param_groups[item.group]
            rounding, types = self._rounding(p, group), (p.dtype, direction.dtype, torch.float32)
            key = (p.device, rounding, group["seed"], types, item.step is None, item.group // _plan.GROUPS)
            if key not in buckets:
                buckets[key] = (Bucket(p.device, "sgd", rounding, group["seed"], types), [])
            bucket, grads = buckets[key]
            if item.group not in bucket.groups:
                bucket.groups.append(item.group)
            bucket.entries.append(Entry(p, item.like, (), (), item.extra, item.step, None, item.group, item.index))
            grads.append(direction)

        for bucket, grads in buckets.values():

            def of_group(group: dict[str, Any], device: torch.device = bucket.device) -> GroupNumbers:
                lr, rate, decay = numbers(group, device)
                return lr, rate, (0.0, 0.0, 0.0, decay, 0.0, False, False), False

            self._launch(bucket, grads, of_group)
