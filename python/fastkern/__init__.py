# SPDX-License-Identifier: Apache-2.0
"""fastkern: hand-written GPU (and CPU) kernels for PyTorch.

``import fastkern`` registers every operator as ``torch.ops.fastkern.*`` and does not initialise CUDA.
The documented Python functions are the same operators with defaults::

    y = fastkern.rms_norm(x, weight)            # or torch.ops.fastkern.rms_norm(x, weight)
"""

from __future__ import annotations

import gc
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkern import _core
from fastkern._library import load_operators

# What is registered stays: a collection in between would only look at all of torch's objects, in 80 ms.
_collects = gc.isenabled()
gc.disable()
try:
    load_operators(Path(_core.__file__).parent / "lib")

    # These register fakes and gradients of the loaded operators.
    from fastkern import optim as optim
    from fastkern.ops import elementwise as _elementwise
    from fastkern.ops.activation import (
        bias_act,
        clamped_swiglu,
        clamped_swiglu_static_quant,
        geglu,
        geglu_static_quant,
        gelu_and_mul,
        glu,
        reglu,
        silu_and_mul,
        swiglu,
        swiglu_static_quant,
    )
    from fastkern.ops.add_norm import (
        add_layer_norm,
        add_layer_norm_parallel,
        add_rms_norm,
        add_rms_norm_parallel,
    )
    from fastkern.ops.add_norm_inplace import add_layer_norm_, add_rms_norm_
    from fastkern.ops.attention import (
        attn_dropout_mask,
        flash_attn,
        flash_attn_varlen,
        merge_attention,
    )
    from fastkern.ops.attention_fp8 import flash_attn_fp8
    from fastkern.ops.dropout import bias_dropout_add, dropout
    from fastkern.ops.elementwise import *  # noqa: F403
    from fastkern.ops.elementwise import abs as abs  # noqa: A004
    from fastkern.ops.elementwise import pow as pow  # noqa: A004
    from fastkern.ops.group_norm import group_norm
    from fastkern.ops.linear_cross_entropy import linear_cross_entropy
    from fastkern.ops.loss import cross_entropy
    from fastkern.ops.norm import layer_norm, rms_norm
    from fastkern.ops.norm_quant import (
        add_rms_norm_dynamic_quant,
        add_rms_norm_static_quant,
        rms_norm_dynamic_quant,
        rms_norm_static_quant,
    )
    from fastkern.ops.optim import (
        adagrad_,
        adam_,
        adamw_,
        lamb_,
        lion_,
        nadam_,
        radam_,
        rmsprop_,
        sgd_,
    )
    from fastkern.ops.rope import qk_norm_rope, rope, rope_
    from fastkern.ops.rope_table import mrope_table, rope_table, rope_table_from_config
    from fastkern.ops.softmax import (
        causal_softmax,
        log_softmax,
        logsumexp,
        masked_softmax,
        softmax,
    )
finally:
    if _collects:
        gc.enable()

if TYPE_CHECKING:
    from fastkern import nn as nn
    from fastkern import torch_ops as torch_ops
    from fastkern.integrations.patch import PatchReport, patch, unpatch
    from fastkern.integrations.sdpa import disable_sdpa, enable_sdpa, sdpa
    from fastkern.profiler import profile as profile

__version__: str = _core.build_info()["version"]

__all__ = [
    "PatchReport",
    "__version__",
    "adagrad_",
    "adam_",
    "adamw_",
    "add_layer_norm",
    "add_layer_norm_",
    "add_layer_norm_parallel",
    "add_rms_norm",
    "add_rms_norm_",
    "add_rms_norm_dynamic_quant",
    "add_rms_norm_parallel",
    "add_rms_norm_static_quant",
    "attn_dropout_mask",
    "bias_act",
    "bias_dropout_add",
    "causal_softmax",
    "clamped_swiglu",
    "clamped_swiglu_static_quant",
    "cross_entropy",
    "disable_sdpa",
    "dropout",
    "enable_sdpa",
    "flash_attn",
    "flash_attn_fp8",
    "flash_attn_varlen",
    "geglu",
    "geglu_static_quant",
    "gelu_and_mul",
    "get_cmake_dir",
    "get_include",
    "get_library_dir",
    "glu",
    "group_norm",
    "lamb_",
    "layer_norm",
    "linear_cross_entropy",
    "lion_",
    "log_softmax",
    "logsumexp",
    "masked_softmax",
    "merge_attention",
    "mrope_table",
    "nadam_",
    "patch",
    "profile",
    "qk_norm_rope",
    "radam_",
    "reglu",
    "rms_norm",
    "rms_norm_dynamic_quant",
    "rms_norm_static_quant",
    "rmsprop_",
    "rope",
    "rope_",
    "rope_table",
    "rope_table_from_config",
    "sdpa",
    "sgd_",
    "silu_and_mul",
    "softmax",
    "swiglu",
    "swiglu_static_quant",
    "unpatch",
]
__all__ += _elementwise.__all__


# Imported when they are asked for, as few programs need them: a submodule, or what a module has.
_LAZY = {
    "nn": None,
    "torch_ops": None,
    "PatchReport": "integrations.patch",
    "disable_sdpa": "integrations.sdpa",
    "enable_sdpa": "integrations.sdpa",
    "patch": "integrations.patch",
    "profile": "profiler",
    "sdpa": "integrations.sdpa",
    "unpatch": "integrations.patch",
}

if not TYPE_CHECKING:  # a type checker would take every name to be there

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'fastkern' has no attribute {name!r}")
        home = _LAZY[name]
        if home is None:
            return importlib.import_module(f"fastkern.{name}")
        value = globals()[name] = getattr(importlib.import_module(f"fastkern.{home}"), name)
        return value


def get_library_dir() -> str:
    """Directory of ``libfastkern.so`` and ``libfastkern_torch.so``."""
    return str(Path(_core.__file__).parent / "lib")


def get_include() -> str:
    """Directory to put on a C++ compiler's include path; headers are ``fastkern/*.h``."""
    return str(Path(_core.__file__).parent / "include")


def get_cmake_dir() -> str:
    """Directory for ``find_package(fastkern CONFIG PATHS ...)``."""
    return str(Path(_core.__file__).parent / "lib" / "cmake" / "fastkern")
