# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.fastkern`` with types: ``from fastkern import torch_ops; torch_ops.rms_norm(x, weight)``.

Each name is the operator itself, the same object as in ``torch.ops.fastkern``. Type checkers read ``torch_ops.pyi``,
one signature an overload, where ``torch.ops`` tells them nothing. The functions of ``fastkern`` have defaults and
documentation; these are the bare operators below them.
"""

from __future__ import annotations

from typing import Any

import torch


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'fastkern.torch_ops' has no attribute {name!r}")
    return getattr(torch.ops.fastkern, name)


def __dir__() -> list[str]:
    names = (n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastkern::"))
    return sorted({n.removeprefix("fastkern::").split(".")[0] for n in names})
