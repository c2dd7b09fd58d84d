# SPDX-License-Identifier: Apache-2.0
"""What a module computes, found by running a stand-in of it on a few small numbers on the CPU.

A stand-in has the module's class and attributes, but parameters (and projections) of its own, in small; so neither
weights nor hooks nor random numbers of the model are touched, wherever they lie and whatever they are wrapped in.
Every finding is a recipe that gave the same results, or a sentence that says why there is none.
"""

from __future__ import annotations

import inspect
import warnings
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from fastkern.integrations._patched import FLOATS, Mlp, Norm

_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps", "rms_norm_eps")
_ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
_DIFFERENT = "computes something else"


def stand_in(module: nn.Module, **places: Any) -> Any:
    """An object with the class and attributes of ``module``, but for the ones given. Its ``forward`` runs no hooks.

    In training, so that what is random then shows.
    """
    made = object.__new__(type(module))
    made.__dict__ = {**module.__dict__, "training": True, **places}
    return made


def quietly(made: Any, *args: Any, **kwargs: Any) -> Any:
    """Its forward, without gradients, warnings, and random numbers of the program."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made.forward(*args, **kwargs)


def obstacle(module: nn.Module) -> str | None:
    """Why a module can not be given another forward, whatever it computes."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the object already"
    for parameter in module.parameters():
        if parameter.is_meta:
            return "its weights are on the meta device: patch after they are loaded"
        if hasattr(parameter, "device_mesh"):
            return "its weights are sharded (DTensor)"
    return None


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def agree(got: Any, want: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for rounding: that of float32, or two roundings in a 16-bit type."""
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    tolerance = 2e-5 if dtype == torch.float32 else 2**-7
    size = want.float().abs().amax(-1, keepdim=True)
    return bool(((got.float() - want.float()).abs() <= tolerance * (size + 1e-6)).all())


# ---- norms -----------------------------------------------------------------------------------------------------------


def norm(module: nn.Module, weights: bool = True) -> Norm | str | None:
    """The recipe of a norm over the last dimension; None if it does not look like a norm at all.

    ``weights``: whether they must be where a forward can use them.
    """
    own = {k: p for k, p in module._parameters.items() if p is not None}
    eps = next((k for k in _EPS if isinstance(getattr(module, k, None), float)), None)
    if eps is None and isinstance(module, nn.RMSNorm):
        eps = "eps"
    if eps is None or module._modules or module._buffers or set(own) - {"weight", "bias"}:
        return None
    shape = tuple(own["weight"].shape) if "weight" in own else tuple(getattr(module, "normalized_shape", ()))
    if len(shape) != 1:
        return "is over several dimensions" if shape else "has no weight that tells its size"
    if "bias" in own and tuple(own["bias"].shape) != shape:
        return None
    if any(p.dtype not in FLOATS for p in own.values()):
        return f"has weights of {next(p.dtype for p in own.values())}"
    blocked = obstacle(module) if weights else None
    return blocked if blocked is not None else _norm_recipe(module, own, eps, shape[0])


def _norm_recipe(module: nn.Module, own: dict[str, Any], eps: str, n: int) -> Norm | str:
    # Far from zero (is the mean taken out?), of the size of eps, and large.
    x = (numbers(3, 4, n) + 0.5) * torch.tensor([1.0, 1e-3, 30.0, 3e-4])[:, None]
    weights = {k: numbers(n, seed=1 + i) for i, k in enumerate(sorted(own))}

    def run(x_dtype: torch.dtype, w_dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
        parameters = {**dict.fromkeys(module._parameters), **{k: w.to(w_dtype) for k, w in weights.items()}}
        made = stand_in(module, _parameters=parameters)
        return made, quietly(made, x.to(x_dtype)), x.to(x_dtype)

    inherited = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    try:
        with torch.no_grad():
            runs = [(dtype, *run(dtype, dtype)) for dtype in (torch.float32, torch.bfloat16)]
            promote = False
            try:
                if own:
                    runs.append((torch.bfloat16, *run(torch.bfloat16, torch.float32)))
                    promote = getattr(runs[-1][2], "dtype", None) == torch.float32
            except (RuntimeError, TypeError):  # refuses mixed types, so what it would give does not matter
                promote = False
            for kind in ("rms", "layer"):
                for offset in (0.0, 1.0):
                    recipe = Norm(kind, eps, offset, promote, inherited)
                    if all(agree(got, recipe(made, given), dtype) for dtype, made, got, given in runs):
                        return recipe
    except Exception as error:  # the forward of any class: whatever it raises is the reason
        return f"does not run on one tensor (B, S, N): {type(error).__name__}"
    return _DIFFERENT


# ---- gated MLPs ------------------------------------------------------------------------------------------------------


def _is_linear(module: nn.Module) -> bool:
    """Something with the facts of a linear layer, wrapped or not."""
    return all(isinstance(getattr(module, k, None), int) for k in ("in_features", "out_features"))


def mlp(module: nn.Module, weights: bool = True) -> Mlp | str | None:
    """The recipe of a gated MLP; None if it does not look like one. ``weights`` as for :func:`norm`."""
    if {"gate_up_proj", "down_proj"} <= set(module._parameters):
        return "its experts are stacked parameters, not projections"
    children = {k: m for k, m in module._modules.items() if m is not None}
    linears: dict[str, Any] = {k: m for k, m in children.items() if _is_linear(m)}
    rest: dict[str, Any] = {k: m for k, m in children.items() if k not in linears}
    if len(linears) not in (2, 3) or any(p is not None for p in module._parameters.values()):
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:  # self and the input; attention takes more
        return None
    sizes = {k: (m.in_features, m.out_features) for k, m in linears.items()}
    orders = [order for order in permutations(linears) if _fits([sizes[k] for k in order])]
    if not orders:
        return None
    if len(rest) > 1 or any(next(m.parameters(), None) is not None for m in rest.values()):
        return f"has other parts: {', '.join(rest)}"
    for k, m in rest.items():
        if isinstance(m, nn.Dropout):
            return f"has other parts: {k}"
        if m._forward_hooks or m._forward_pre_hooks:
            return f"{k} has hooks, which would not run"
    blocked = obstacle(module) if weights else None
    return blocked if blocked is not None else _mlp_recipe(module, orders)


def _fits(sizes: list[tuple[int, int]]) -> bool:
    """(gate, up, down) or (packed, down)."""
    *first, down = sizes
    if len(first) == 1:
        return first[0] == (down[1], 2 * down[0])
    return first[0] == first[1] == (down[1], down[0])


def small_linear(n_in: int, n_out: int, seed: int) -> nn.Linear:
    made = nn.Linear(n_in, n_out, device="meta")
    made.weight = nn.Parameter(numbers(n_out, n_in, seed=seed))
    made.bias = nn.Parameter(numbers(n_out, seed=seed + 10))
    return made


def _mlp_recipe(module: nn.Module, orders: list[tuple[str, ...]]) -> Mlp | str:
    hidden, inner = 8, 6
    x = numbers(2, 3, hidden)
    error = None
    for order in orders:
        *first, down = order
        width = inner if len(first) == 2 else 2 * inner
        small = {k: small_linear(hidden, width, i) for i, k in enumerate(first)}
        small[down] = small_linear(inner, hidden, 5)
        made = stand_in(module, _modules={**module._modules, **small})
        with torch.no_grad():
            try:
                got = quietly(made, x)
            except Exception as caught:  # the forward of any class: whatever it raises is the reason
                error = f"does not run on one tensor with projections of other sizes: {type(caught).__name__}"
                continue
            for act in _ACTIVATIONS:
                recipe = Mlp(first[0], first[1] if len(first) == 2 else None, down, act)
                if agree(got, recipe(made, x), torch.float32):
                    return recipe
    return error or _DIFFERENT
