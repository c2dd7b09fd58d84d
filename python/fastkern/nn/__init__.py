# SPDX-License-Identifier: Apache-2.0
"""Modules: the operators with their options and parameters kept, up to whole transformers."""

from __future__ import annotations

from fastkern.nn._packed import unpacked_state_dict
from fastkern.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastkern.nn.mlp import GEGLU, MLP, GatedMLP, SwiGLU
from fastkern.nn.norm import FusedAddNorm, GroupNorm, LayerNorm, RMSNorm
from fastkern.nn.rotary import RotaryEmbedding

__all__ = [
    "GEGLU",
    "MLP",
    "CrossEntropyLoss",
    "FusedAddNorm",
    "GatedMLP",
    "GroupNorm",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "unpacked_state_dict",
]
