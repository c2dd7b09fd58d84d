# SPDX-License-Identifier: Apache-2.0
"""What torch.utils.flop_counter counts for the attention operators: their matrix products, masks not discounted.

``import fastkern`` does not import that module, which imports triton where that is installed. The formulas are
registered when somebody imports it, as its counters copy the registry when they are made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_MODULE = "torch.utils.flop_counter"

Size = Any


def _forward(pairs: Any, D: int, Dv: int) -> int:
    """Q K^T and P V. ``pairs``: of a query and a key, over all heads and entries."""
    return 2 * pairs * (D + Dv)


def _backward(pairs: Any, D: int, Dv: int) -> int:
    """Q K^T again, dO V^T, P^T dO, dS K and dS^T Q."""
    return 2 * pairs * (3 * D + 2 * Dv)


def _pairs(q: Size, k: Size) -> Any:
    B, S, H, _ = q
    return B * H * S * k[1]


def _packed_pairs(q: Tensor, k: Tensor, starts_q: Tensor, starts_k: Tensor) -> Any:
    """By the sequences' lengths; where there are none to read, as of a fake tensor, as if all were of one length."""
    if type(starts_q) is Tensor and starts_q.device.type != "meta":
        return q.shape[1] * int((starts_q.diff().long() * starts_k.diff().long()).sum())
    return q.shape[0] * k.shape[0] * q.shape[1] // max(starts_q.shape[0] - 1, 1)


def _flash_attn(q: Size, k: Size, v: Size, *options: Any, out_shape: Any = None, **named: Any) -> int:
    return _forward(_pairs(q, k), q[-1], v[-1])


def _flash_attn_bwd(
    dout: Size, dlse: Size | None, q: Size, k: Size, v: Size, *rest: Any, out_shape: Any = None, **named: Any
) -> int:
    return _backward(_pairs(q, k), q[-1], v[-1])


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *options: Any,
    out_val: Any = None,
    **named: Any,
) -> int:
    return _forward(_packed_pairs(q, k, starts_q, starts_k), q.shape[-1], v.shape[-1])


def _varlen_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *rest: Any,
    out_val: Any = None,
    **named: Any,
) -> int:
    return _backward(_packed_pairs(q, k, starts_q, starts_k), q.shape[-1], v.shape[-1])


# ---- registration ----------------------------------------------------------------------------------------------------


def _register(counter: ModuleType) -> None:
    ops, register = torch.ops.fastkern, counter.register_flop_formula
    register([ops.flash_attn, ops.flash_attn_fwd])(_flash_attn)
    register(ops.flash_attn_bwd)(_flash_attn_bwd)
    register([ops.flash_attn_varlen, ops.flash_attn_varlen_fwd], get_raw=True)(_varlen)
    register(ops.flash_attn_varlen_bwd, get_raw=True)(_varlen_bwd)


class _OnImport:
    """Finds the module like Python's own finder, once, and registers the formulas behind its execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Now, if it has been imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _OnImport())
