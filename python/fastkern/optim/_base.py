# SPDX-License-Identifier: Apache-2.0
"""What all optimizers share: groups into launches, states, steps, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkern.optim import _blocks, _plan
from fastkern.optim._plan import Bucket, Entry

# beta1, beta2, eps, weight_decay, decay_base, decoupled, nesterov: what they are is the kernel's to say.
Numbers = tuple[float, float, float, float, float, bool, bool]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Kinds whose states may have 8 bits, codes and scales; whether each of them has a sign.
_CODED = {"adam": (True, False), "sgd": (True,), "lion": (True,)}
_ROUNDINGS = ("nearest", "stochastic", "kahan", "master", "remainder")
# The state that a rounding keeps, and its type (None: that of the parameter).
_EXTRAS: dict[str, tuple[str, torch.dtype | None]] = {
    "kahan": ("compensation", None),
    "master": ("master", torch.float32),
    "remainder": ("remainder", torch.int16),
}


class _Held:
    """A tensor of a checkpoint that torch is not to convert to the type of its parameter."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _hold(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    held = {
        key: {k: _Held(v) if isinstance(v, Tensor) else v for k, v in state.items()}
        if isinstance(state, dict) else state
        for key, state in state_dict["state"].items()
    }  # fmt: skip
    return {**state_dict, "state": held}


class Optimizer(torch.optim.Optimizer):
    """The base of the optimizers of this package: any number of parameters in one launch for each signature.

    A signature is a device and the types of parameters, gradients and states. Everything of
    :class:`torch.optim.Optimizer` works: groups, hooks, closures, schedulers (``lr`` a float or a tensor), checkpoints.
    """

    # So that torch.amp.GradScaler leaves unscaling and skipping to the kernel.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._plan: list[Bucket] | None = None
        self._waiting: list[Tensor] = []
        self._planned: Any = None
        for name, value in (("foreach", None), ("capturable", True), ("differentiable", False), ("fused", None)):
            defaults.setdefault(name, value)
        if defaults["differentiable"]:
            raise ValueError(f"{self._name}: differentiable must be False, got True")
        # torch.compile calls a step and does not look into it. Here, where torch loads its compiler in any case.
        cls = type(self)
        if not (hasattr(cls.step, "hooked") or hasattr(cls.step, "_torchdynamo_disable")):
            cls.step = torch.compiler.disable(cls.step)  # type: ignore[method-assign]
        super().__init__(params, defaults)

    # ---- what a subclass says ----------------------------------------------------------------------------------------

    def _kind(self, group: dict[str, Any]) -> str:
        """The name of the kernel."""
        raise NotImplementedError

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """Names of the states, in the kernel's order."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        """What the kernel takes of a group, but for the rate."""
        raise NotImplementedError

    def _has_step(self, group: dict[str, Any]) -> bool:
        """Whether parameters count their steps."""
        return True

    def _first_value(self, name: str, p: Tensor, group: dict[str, Any]) -> float:
        """What a state, or a scalar, begins with."""
        return 0.0

    def _in_plan(self, group: dict[str, Any]) -> bool:
        """Whether the plan has the group's parameters; others are for the subclass to step."""
        return True

    # ---- states ------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"fastkern.optim.{type(self).__name__}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; refuses parameters that there are no kernels for."""
        super().add_param_group(param_group)
        self._plan = None
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        rounding, state_dtype = group["rounding"], group["state_dtype"]
        if rounding not in _ROUNDINGS:
            raise ValueError(f"{self._name}: rounding must be one of {', '.join(_ROUNDINGS)}, got {rounding!r}")
        if state_dtype == "8bit":
            if (kind := self._kind(group)) not in _CODED or "min_8bit_size" not in group:
                text = "state_dtype must not be '8bit', which Adam, AdamW, SGD and Lion have"
                raise ValueError(f"{self._name}: {text}; got it for {kind}")
            if (least := group["min_8bit_size"]) < 0:
                raise ValueError(f"{self._name}: min_8bit_size must be >= 0, got {least}")
        elif state_dtype is not None and state_dtype not in _DTYPES:
            raise ValueError(f"{self._name}: state_dtype must be one of {_DTYPES}, '8bit' or None, got {state_dtype!r}")
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{self._name}: lr must have one element, got {lr.numel()}")
        if not isinstance(lr, Tensor) and not lr >= 0.0:
            raise ValueError(f"{self._name}: lr must be >= 0, got {lr}")
        for p in group["params"]:
            if p.dtype not in _DTYPES:
                raise ValueError(f"{self._name}: parameters must be float32, float16 or bfloat16, got {p.dtype}")
            if p.device.type not in ("cpu", "cuda"):
                raise ValueError(f"{self._name}: parameters must be on the CPU or a CUDA device, got {p.device}")
            if rounding in ("stochastic", "remainder") and p.dtype == torch.float16:
                raise ValueError(f"{self._name}: rounding {rounding!r} must have no float16 parameters, got one")

    def _check_positive(self, group: dict[str, Any], *names: str) -> None:
        for name in names:
            if not group[name] >= 0.0:
                raise ValueError(f"{self._name}: {name} must be >= 0, got {group[name]}")

    def _check_betas(self, group: dict[str, Any]) -> None:
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{self._name}: betas[{i}] must be in [0, 1), got {beta}")

    def _rounding(self, p: Tensor, group: dict[str, Any]) -> str:
        """Float32 parameters keep all of their value."""
        return "nearest" if p.dtype == torch.float32 else group["rounding"]

    def _state_dtype(self, p: Tensor, group: dict[str, Any]) -> torch.dtype:
        """The type of the parameter's states, uint8 for codes."""
        dtype: torch.dtype | str | None = group["state_dtype"]
        if isinstance(dtype, str):
            if not any(self._states(group)):
                return p.dtype
            return torch.uint8 if p.numel() >= group["min_8bit_size"] else torch.float32
        return dtype or p.dtype

    def _state_of(
        self, p: Tensor, like: Tensor, group: dict[str, Any]
    ) -> tuple[list[Tensor | None], list[Tensor], Tensor | None]:
        """The parameter's states, their scales and its extra, made where they are missing."""
        state, dtype = self.state[p], self._state_dtype(p, group)
        signs = _CODED.get(self._kind(group), ())
        states: list[Tensor | None] = []
        scales: list[Tensor] = []
        for i, name in enumerate(self._states(group)):
            if name is None:
                states.append(None)
                continue
            if state.get(name) is None:
                self._refuse_capture(p)
                state[name] = torch.full_like(like, self._first_value(name, p, group), dtype=dtype, requires_grad=False)
                if dtype == torch.uint8:
                    state[f"{name}_scale"] = _blocks.no_scales(like)
            found, scale = state[name], state.get(f"{name}_scale")
            if found.dtype == torch.uint8 and scale is None:
                raise RuntimeError(f"{self._name}: state {name} of 8 bits must have {name}_scale beside it, got none")
            if found.dtype == torch.uint8 and (dtype != torch.uint8 or not _blocks.fit(found, scale, like)):
                found, scale = _blocks.decode(found, scale, signed=signs[i]), None
                state.pop(f"{name}_scale")
            if dtype != torch.uint8:
                state[name] = _plan.conform(found, like, dtype)
            elif scale is None:
                state[name], scale = _blocks.encode(_plan.conform(found, like, torch.float32), signed=signs[i])
                state[f"{name}_scale"] = scale
            states.append(state[name])
            if scale is not None:
                scales.append(scale)
        extra = None
        if (rounding := self._rounding(p, group)) in _EXTRAS:
            name, kept = _EXTRAS[rounding]
            if state.get(name) is None:
                self._refuse_capture(p)
                made = torch.zeros_like(like, dtype=kept or p.dtype, requires_grad=False)
                state[name] = made.copy_(p) if rounding == "master" else made
            extra = state[name] = _plan.conform(state[name], like, kept or p.dtype)
        return states, scales, extra

    def _scalars(self, params: list[tuple[Tensor, dict[str, Any]]], name: str) -> None:
        """A scalar for each parameter that has none: neighbours in one piece of memory, for each device."""
        missing: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for p, group in params:
            found = self.state[p].get(name)
            if found is None:
                missing.setdefault(p.device, []).append((p, group))
            elif not isinstance(found, Tensor) or found.device != p.device or found.dtype != torch.float32:
                self.state[p][name] = torch.as_tensor(found, dtype=torch.float32, device=p.device).clone()
        for device, those in missing.items():
            for p, _ in those:
                self._refuse_capture(p)
            values = [self._first_value(name, p, group) for p, group in those]
            memory = torch.tensor(values, dtype=torch.float32).to(device)
            for i, (p, _) in enumerate(those):
                self.state[p][name] = memory[i]

    def _refuse_capture(self, p: Tensor) -> None:
        if p.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self._name}: the first step must come before a graph is captured, got it inside of one"
            )

    # ---- plan --------------------------------------------------------------------------------------------------------

    def _signature(self) -> list[tuple[Any, ...]]:
        """What a plan is made for."""
        return [
            (
                len(g["params"]),
                self._kind(g),
                self._states(g),
                self._has_step(g),
                g["rounding"],
                g["state_dtype"],
                g.get("min_8bit_size"),
                g["seed"],
            )
            for g in self.param_groups
        ]

    def _make_plan(self) -> list[Bucket]:
        buckets: dict[tuple[Any, ...], Bucket] = {}
        self._waiting, index = [], 0
        active: list[tuple[Tensor, dict[str, Any], int, int]] = []
        for number, group in enumerate(self.param_groups):
            self._check_group(group)
            if not self._in_plan(group):
                index += len(group["params"])
                continue
            for p in group["params"]:
                if p.grad is None and not self.state.get(p):
                    self._waiting.append(p)
                else:
                    self._check_gradient(p)
                    active.append((p, group, number, index))
                index += 1
        self._scalars([(p, group) for p, group, *_ in active if self._has_step(group)], "step")
        products = [(p, group) for p, group, *_ in active if self._kind(group) == "nadam"]
        self._scalars(products, "mu_product")
        for p, group, number, index in active:
            like = p if _plan.is_dense(p) else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            states, scales, extra = self._state_of(p, like, group)
            types = (p.dtype, p.dtype if p.grad is None else p.grad.dtype, self._state_dtype(p, group))
            rounding, kind = self._rounding(p, group), self._kind(group)
            key = (p.device, kind, rounding, group["seed"], types, number // _plan.GROUPS)
            if key not in buckets:
                buckets[key] = Bucket(p.device, kind, rounding, group["seed"], types)
            bucket = buckets[key]
            if number not in bucket.groups:
                bucket.groups.append(number)
            state = self.state[p]
            product = state["mu_product"] if kind == "nadam" else None
            step = state["step"] if self._has_step(group) else None
            bucket.entries.append(Entry(p, like, tuple(states), tuple(scales), extra, step, product, number, index))
        for bucket in buckets.values():
            bucket.finish()
        return list(buckets.values())

    def _check_gradient(self, p: Tensor) -> None:
        g = p.grad
        if g is None:
            return
        if g.layout != torch.strided:
            raise RuntimeError(
                f"{self._name}: gradients must be dense, got {g.layout} for a parameter of {tuple(p.shape)}"
            )
        if g.dtype not in _DTYPES:
            raise RuntimeError(f"{self._name}: gradients must be float32, float16 or bfloat16, got {g.dtype}")
        if g.device != p.device:
            raise RuntimeError(f"{self._name}: gradients must be on {p.device} like the parameter, got {g.device}")

    def _ready(self) -> list[Bucket]:
        """The plan, with the gradients of this step."""
        signature = self._signature()
        if self._planned != signature or any(p.grad is not None for p in self._waiting):
            self._plan = None
        for _ in range(2):
            if self._plan is None:
                self._plan, self._planned = self._make_plan(), signature
            try:
                if all(bucket.parameters.collect(_plan.odd_gradient) for bucket in self._plan):
                    return self._plan
            except RuntimeError:  # no address
                for bucket in self._plan:
                    for entry in bucket.entries:
                        self._check_gradient(entry.param)
                raise
            self._plan = None
        raise RuntimeError(f"{self._name}: parameters and gradients must stay in place during a step")

    # ---- step --------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the model again and returns the loss.
            max_norm: gradients are scaled down, inside the step and without being written, so that their norm over all
                parameters is at most this.

        Returns:
            What ``closure`` gives, or None. With ``max_norm`` the norm, a tensor of one element on the device; with
            both ``(loss, norm)``.

        Raises:
            RuntimeError: a gradient is sparse, complex or on another device than its parameter.
        """
        loss = norm = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            plan = self._ready()
            factors: dict[torch.device, Tensor] = {}
            if max_norm is not None:
                norm, factors = _plan.clip(plan, float(max_norm), 2.0, self._grad_scale)
            for bucket in plan:
                self._step_bucket(bucket, factors.get(bucket.device))
        if max_norm is None:
            return loss
        return norm if closure is None else (loss, norm)

    def _grad_scale(self, device: torch.device) -> Tensor | None:
        return self._amp("grad_scale", device)

    def _amp(self, name: str, device: torch.device) -> Tensor | None:
        """What GradScaler left for this step."""
        value = getattr(self, name, None)
        return None if value is None else value.to(device=device, dtype=torch.float32, non_blocking=True)

    def _step_bucket(self, bucket: Bucket, factor: Tensor | None) -> None:
        device = bucket.device
        scale, found = self._amp("grad_scale", device), self._amp("found_inf", device)
        groups, rates = [], []
        for number in bucket.groups:
            group = self.param_groups[number]
            lr, address = group["lr"], 0
            if isinstance(lr, Tensor):
                if lr.device == device and lr.is_cuda:
                    rates.append(lr.to(torch.float32))
                    lr, address = 0.0, rates[-1].data_ptr()
                else:
                    lr = float(lr)
            groups.append((lr, address, *self._numbers(group), bool(group.get("maximize", False))))
        for param, work in bucket.copies:
            work.copy_(param)
        stream = _plan.stream_of(device)
        parameters = bucket.parameters
        parameters.write(stream)
        parameters.step(
            groups, _plan.address_of(scale), _plan.address_of(factor), _plan.address_of(found), bucket.seed,
            _plan.address_of(bucket.workspace), stream,
        )  # fmt: skip
        for param, work in bucket.copies:
            param.copy_(work)
        torch.autograd.graph.increment_version(parameters.updated)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, also of a checkpoint of the torch optimizer of this name; states become ``state_dtype``."""
        handle = self.register_load_state_dict_pre_hook(_hold)  # after those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._waiting, self._planned = None, [], None
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            for p in group["params"]:
                if p in self.state:
                    self._load_state(p, self.state[p], group)

    def _load_state(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """What a checkpoint holds, on the parameter's device; types and strides are those of the next plan."""
        for name, value in state.items():
            if isinstance(value, _Held):
                state[name] = value.tensor.to(p.device)
            if name in ("step", "mu_product") and state[name] is not None:
                state[name] = torch.as_tensor(state[name], dtype=torch.float32, device=p.device).clone()
