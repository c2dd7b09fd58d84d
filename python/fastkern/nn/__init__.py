# SPDX-License-Identifier: Apache-2.0
"""Modules: the operators with their options kept."""

from __future__ import annotations

from fastkern.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]
