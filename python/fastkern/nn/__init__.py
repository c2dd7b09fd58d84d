# SPDX-License-Identifier: Apache-2.0
"""Modules: the operators with their options and parameters kept, up to whole transformers."""

from __future__ import annotations

from fastkern.nn._packed import unpacked_state_dict
from fastkern.nn.attention import MultiheadAttention
from fastkern.nn.cache import KVCache
from fastkern.nn.huggingface import BertSelfAttention, GPT2Attention, GPTJAttention
from fastkern.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastkern.nn.mlp import GEGLU, MLP, GatedMLP, SwiGLU
from fastkern.nn.model import Transformer
from fastkern.nn.norm import FusedAddNorm, GroupNorm, LayerNorm, RMSNorm
from fastkern.nn.rotary import RotaryEmbedding
from fastkern.nn.transformer import TransformerBlock, TransformerConfig

__all__ = [
    "GEGLU",
    "MLP",
    "BertSelfAttention",
    "CrossEntropyLoss",
    "FusedAddNorm",
    "GPT2Attention",
    "GPTJAttention",
    "GatedMLP",
    "GroupNorm",
    "KVCache",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "Transformer",
    "TransformerBlock",
    "TransformerConfig",
    "unpacked_state_dict",
]
