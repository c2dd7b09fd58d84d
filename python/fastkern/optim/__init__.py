# SPDX-License-Identifier: Apache-2.0
"""Optimizers: those of torch.optim and more, each step one launch for all parameters of a signature."""

from __future__ import annotations

from fastkern.optim.adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
