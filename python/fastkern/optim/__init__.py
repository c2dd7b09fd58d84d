# SPDX-License-Identifier: Apache-2.0
"""Optimizers: those of torch.optim and more, each step one launch for all parameters of a signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastkern.optim.adam import Adam, AdamW
from fastkern.optim.adaptive import LAMB, Adagrad, NAdam, RAdam, RMSprop
from fastkern.optim.clip import clip_grad_norm_
from fastkern.optim.sgd import SGD, Lion

if TYPE_CHECKING:
    from fastkern.optim.adafactor import Adafactor
    from fastkern.optim.muon import Muon

__all__ = [
    "LAMB", "SGD", "Adafactor", "Adagrad", "Adam", "AdamW", "Lion", "Muon", "NAdam", "RAdam", "RMSprop",
    "clip_grad_norm_",
]  # fmt: skip

_LATER = {"Adafactor": "adafactor", "Muon": "muon"}  # imported where they are asked for


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
