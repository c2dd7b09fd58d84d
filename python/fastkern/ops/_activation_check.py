# SPDX-License-Identifier: Apache-2.0
"""The checks of cpp/torch/activation.cpp and activation_bias.cpp, in the same order and words, for the fakes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkern.ops import _check

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu")


class Options(NamedTuple):
    """What gated operators may be called with beside their tensors."""

    interleaved: bool = False
    approximate: str = "none"
    alpha: float = 1.702
    limit: float = 7.0
    up_offset: float = 1.0


def _like_a(op: str, a: Tensor, shape: Any, name: str, t: Tensor) -> None:
    _check.float_tensor(op, name, t)
    if t.dtype != a.dtype:
        raise RuntimeError(f"fastkern::{op}: {name} must be {a.dtype} like a, got {t.dtype}")
    _check.shape(op, name, t, shape)
    _check.device(op, name, t, a, "a")


def gated(op: str, a: Tensor, b: Tensor | None, options: Options, dy: Tensor | None = None) -> list[Any]:
    """What every gated operator begins with; the shape of its result."""
    _options(op, options)
    _check.float_tensor(op, "a", a)
    _check.at_least_one_dimension(op, "a", a.dim())
    shape = list(a.shape)
    if b is not None:
        _like_a(op, a, a.shape, "b", b)
        if options.interleaved:
            raise RuntimeError(f"fastkern::{op}: interleaved must be False with b, got True")
    else:
        if shape[-1] % 2 != 0:
            raise RuntimeError(
                f"fastkern::{op}: a must have an even last dimension without b, got shape {tuple(a.shape)}"
            )
        shape[-1] //= 2
    if dy is not None:
        _like_a(op, a, shape, "dy", dy)
    return shape


def _options(op: str, options: Options) -> None:
    if options.approximate not in ("none", "tanh"):
        raise RuntimeError(f'fastkern::{op}: approximate must be "none" or "tanh", got "{options.approximate}"')
    _check.finite(op, "alpha", options.alpha)
    if not options.limit > 0:
        raise RuntimeError(f"fastkern::{op}: limit must be above 0, got {options.limit}")
    _check.finite(op, "up_offset", options.up_offset)


def like_x(op: str, x: Tensor, name: str, t: Tensor, like: str = "x", same_dtype: bool = True) -> None:
    """An operand of the shape of x."""
    _check.float_tensor(op, name, t)
    if same_dtype and t.dtype != x.dtype:
        raise RuntimeError(f"fastkern::{op}: {name} must be {x.dtype} like {like}, got {t.dtype}")
    _check.shape(op, name, t, x.shape)
    _check.device(op, name, t, x, like)


def bias(op: str, x: Tensor, t: Tensor | None, like: str = "x") -> None:
    """One number for each column."""
    if t is not None:
        _check.float_tensor(op, "bias", t)
        _check.shape(op, "bias", t, x.shape[-1:])
        _check.device(op, "bias", t, x, like)


def act(op: str, name: str) -> None:
    """The activation behind a bias."""
    if name not in ACTIVATIONS:
        raise RuntimeError(
            f'fastkern::{op}: act must be "gelu", "gelu_tanh", "relu", "silu" or "quick_gelu", got "{name}"'
        )


def dropout(op: str, x: Tensor, p: float, seed: Tensor | None, offset: Tensor | None, like: str = "x") -> None:
    """A probability, and one int64 each for seed and offset."""
    if not 0 <= p <= 1:
        raise RuntimeError(f"fastkern::{op}: p must be between 0 and 1, got {p}")
    for name, t in (("seed", seed), ("offset", offset)):
        if t is not None:
            _check.one_element(op, name, t, torch.int64, x, like)
    if seed is None and p > 0:
        raise RuntimeError(f"fastkern::{op}: seed must be given with p > 0, got None")


def needed(op: str, need: bool, t: Tensor | None, argument: str, operand: str) -> None:
    """No gradient of what is not there."""
    if need and t is None:
        raise RuntimeError(f"fastkern::{op}: {argument} must be False without {operand}, got True")


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A result of the shape of x, contiguous."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_gradient(need: bool, like: Tensor | None, x: Tensor) -> Tensor:
    """A gradient as the kernels return it: without elements where it is not needed."""
    return empty(like) if need and like is not None else (x if like is None else like).new_empty(0)
