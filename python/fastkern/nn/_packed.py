# SPDX-License-Identifier: Apache-2.0
"""Several projections as the rows of one weight: checkpoints that have them one by one, loaded and written."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Packing(NamedTuple):
    """A parameter, and the ones of other layouts that it is made of, from the first row on."""

    packed: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]


def pack(state: MutableMapping[str, Any], prefix: str, packing: Packing) -> None:
    """Replace the parts by the packed parameter where they are all there and it is not."""
    keys = [prefix + name for name in packing.parts]
    if prefix + packing.packed in state or not all(key in state for key in keys):
        return
    for key, size in zip(keys, packing.sizes, strict=True):
        if state[key].shape[0] != size:
            raise RuntimeError(
                f"fastkern.nn: {key} must have {size} rows to become part of {prefix}{packing.packed}, "
                f"got shape {tuple(state[key].shape)}"
            )
    state[prefix + packing.packed] = torch.cat([state.pop(key) for key in keys])


def rename(state: MutableMapping[str, Any], prefix: str, old: str, new: str) -> None:
    """Give a parameter that is there another name."""
    if prefix + old in state and prefix + new not in state:
        state[prefix + new] = state.pop(prefix + old)


def unpack(state: MutableMapping[str, Any], prefix: str, packing: Packing) -> None:
    """Replace the packed parameter, if it is there, by views of its parts."""
    packed = state.pop(prefix + packing.packed, None)
    if packed is not None:
        for name, part in zip(packing.parts, packed.split(packing.sizes), strict=True):
            state[prefix + name] = part


def unpacked_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with the projections one by one, under the names that Hugging Face's models give them.

    ``in_proj_weight`` becomes ``q_proj.weight``, ``k_proj.weight`` and ``v_proj.weight``, ``out_proj`` becomes
    ``o_proj``, ``gate_up_proj`` becomes ``gate_proj`` and ``up_proj``, biases likewise, in every attention and gated
    MLP of this package within ``module``. Each of them loads this layout and its own.

    Args:
        module: any module.

    Returns:
        A dict of tensors that share the parameters' memory.
    """
    state: dict[str, Tensor] = dict(module.state_dict())
    for name, child in module.named_modules():
        export = getattr(child, "export_unpacked", None)
        if callable(export):
            export(state, f"{name}." if name else "")
    return state


def linear_parts(names: Sequence[str], sizes: Sequence[int], packed: Mapping[str, str]) -> list[Packing]:
    """Packings of the weights and of the biases of linear layers; ``packed``: their names by kind."""
    return [
        Packing(packed[kind], tuple(f"{name}.{kind}" for name in names), tuple(sizes)) for kind in ("weight", "bias")
    ]
