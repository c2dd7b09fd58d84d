# SPDX-License-Identifier: Apache-2.0
"""Optimizers: those of torch.optim and more, each step one launch for all parameters of a signature."""

from __future__ import annotations

from fastkern.optim.adam import Adam, AdamW
from fastkern.optim.adaptive import LAMB, Adagrad, NAdam, RAdam, RMSprop
from fastkern.optim.clip import clip_grad_norm_
from fastkern.optim.sgd import SGD, Lion

__all__ = ["LAMB", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "NAdam", "RAdam", "RMSprop", "clip_grad_norm_"]
