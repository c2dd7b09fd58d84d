# SPDX-License-Identifier: Apache-2.0
"""The table of operators: one row drives an op's tests and its benchmark.

A row says what the op computes (a plain-PyTorch reference, evaluated in float64), what torch offers for the same job
in the same dtype, how to make inputs, which sizes matter, how many bytes and flops a call must cost, and which bad
arguments must be refused in which words.
"""

from __future__ import annotations

from fastkern.specs import (
    activation,
    add_norm,
    attention,
    dropout,
    group_norm,
    linear_cross_entropy,
    loss,
    norm,
    norm_quant,
    pointwise,
    rope,
    softmax,
)
from fastkern.specs._accuracy import assert_accurate, in_float64
from fastkern.specs._spec import FLOAT_DTYPES, BadCall, Dims, Inputs, OpSpec, Outputs
from fastkern.specs.norm import RMS_NORM

SPECS: tuple[OpSpec, ...] = (
    *norm.SPECS,
    *add_norm.SPECS,
    *norm_quant.SPECS,
    *group_norm.SPECS,
    *attention.SPECS,
    *softmax.SPECS,
    *loss.SPECS,
    *linear_cross_entropy.SPECS,
    *rope.SPECS,
    *pointwise.SPECS,
    *activation.SPECS,
    *dropout.SPECS,
)

__all__ = [
    "FLOAT_DTYPES",
    "RMS_NORM",
    "SPECS",
    "BadCall",
    "Dims",
    "Inputs",
    "OpSpec",
    "Outputs",
    "assert_accurate",
    "in_float64",
]
