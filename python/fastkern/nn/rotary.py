# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings as a module that keeps its tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkern.ops.rope import rope
from fastkern.ops.rope_table import rope_table, rope_table_arguments

Tables = tuple[Tensor, Tensor]


class RotaryEmbedding(nn.Module):
    """:func:`fastkern.rope` with its tables: float32 on the device of the module, made once, longer when needed.

    Su, Lu, Pan, Murtadha, Wen and Liu, "RoFormer", 2021. The tables are buffers that no state_dict has and that stay
    float32 when the module is converted.

    Args:
        rotary_dim: columns of a head that are turned; even.
        theta: the base.
        max_length: positions that there are tables for from the start. A longer call makes longer ones; under
            torch.compile it makes them anew each time, so set it to what will come.
        rope_type: as in :func:`fastkern.rope_table`. ``"dynamic"`` and ``"longrope"`` have other tables for lengths
            above ``original_length``, chosen by the length of a call.
        interleaved: pairs lie side by side (GPT-J); False: halves (Llama).
        device: of the tables.
        **scaling: as in :func:`fastkern.rope_table`.

    Raises:
        RuntimeError: by :func:`fastkern.rope_table`: a number out of its range.

    Shapes: ``module(q, k)`` with (B, S, H, D) and (B, S, G, D), or (total, H, D) and (total, G, D), gives both turned.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        rotary_dim: int,
        theta: float = 10000.0,
        max_length: int = 2048,
        rope_type: str = "default",
        *,
        interleaved: bool = False,
        device: Any = None,
        **scaling: Any,
    ) -> None:
        super().__init__()
        self.rotary_dim, self.theta, self.max_length = rotary_dim, theta, max_length
        self.rope_type, self.interleaved, self.scaling = rope_type, interleaved, scaling
        self.table_length = max_length  # what rope_types that look at it were given
        self._elsewhere: dict[torch.device, tuple[int, Tables]] = {}
        for name, table in zip(("cos", "sin"), self._table(max_length, device), strict=True):
            self.register_buffer(name, table, persistent=False)

    @classmethod
    def from_config(
        cls, config: Any, *, layer_type: str | None = None, interleaved: bool = False, device: Any = None
    ) -> RotaryEmbedding:
        """What a configuration of Hugging Face asks for, as :func:`fastkern.rope_table_from_config` reads it.

        Args:
            config: an object with attributes, or a dict.
            layer_type: which of several ``rope_parameters``.
            interleaved: no configuration says it: True for GPT-J.
            device: of the tables.

        Raises:
            RuntimeError: what is missing in the configuration.
        """
        rotary_dim, theta, rope_type, scaling, max_length = rope_table_arguments(config, layer_type)
        return cls(
            rotary_dim,
            theta,
            2048 if max_length is None else max_length,
            rope_type,
            interleaved=interleaved,
            device=device,
            **scaling,
        )

    def _table(self, length: int, device: Any) -> Tables:
        return rope_table(length, self.rotary_dim, self.theta, self.rope_type, device=device, **self.scaling)

    def reset_parameters(self) -> None:
        """The tables of ``max_length`` positions, after ``to_empty``."""
        self._keep(self.max_length, self._table(self.max_length, self.cos.device))

    def _keep(self, length: int, tables: Tables) -> None:
        self.cos, self.sin = tables
        self.table_length = length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_elsewhere": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        before = self.cos
        super()._apply(fn, recurse)
        if self.cos is not before:  # converted, moved or emptied: values that were rounded do not come back
            self._keep(self.table_length, self._table(self.table_length, self.cos.device))
        return self

    def _fits(self, length: int, made_for: int, tables: Tables) -> bool:
        """Whether these tables are those of a call of this length."""
        if length > tables[0].shape[0]:
            return False
        original = self.scaling.get("original_length")
        if original is None or self.rope_type not in ("dynamic", "longrope"):
            return True
        if length <= original or made_for <= original:
            return (length <= original) == (made_for <= original)
        return self.rope_type == "longrope" or length == made_for

    def _length_for(self, length: int) -> int:
        """How long to make the tables: longer than asked for where that does not change them."""
        original = self.scaling.get("original_length")
        if original is None or self.rope_type not in ("dynamic", "longrope"):
            return self.max_length if length <= self.max_length else 2 * length
        if length <= original:
            return original
        return length if self.rope_type == "dynamic" else max(length, self.max_length)

    def tables(self, length: int, device: torch.device | None = None) -> Tables:
        """``(cos, sin)``, each (at least ``length``, rotary_dim / 2), float32, for :func:`fastkern.rope`.

        Args:
            length: how many positions will be asked for.
            device: where; None: where the module is. Tables of other devices are kept beside the module's own.
        """
        home = device is None or device == self.cos.device
        device = self.cos.device if device is None else device
        kept = (self.table_length, (self.cos, self.sin)) if home else self._elsewhere.get(device)
        if kept is not None and self._fits(length, *kept):
            return kept[1]
        if torch.compiler.is_compiling():  # what a graph computes is not to be kept beyond it
            return self._table(length, device)
        longer = self._length_for(length)
        with torch.inference_mode(False):  # kept, so autograd must be able to save it
            tables = self._table(longer, device)
        if type(tables[0]) is not Tensor:  # a fake one, as while tracing
            return tables
        if home:
            self._keep(longer, tables)
        else:
            self._elsewhere[device] = (longer, tables)
        return tables

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The heads, turned.

        Args:
            q: (B, S, H, D) or, packed, (total, H, D), as in :func:`fastkern.rope`.
            k: (B, S, G, D) or (total, G, D), or None.
            positions: (S,), (B, S) or (1, S), packed (total,); int64 or int32. None: from 0 on.
            cu_seqlens: (sequences + 1,) int32, for packed tensors: positions begin at 0 in each sequence.
            length: the largest position and one, where ``positions`` are given: looking for it would wait for the
                device. None: ``max_length``, or S if that is more.

        Returns:
            ``(q, k)``, or q alone without k.

        Raises:
            RuntimeError: by :func:`fastkern.rope`; on the CPU also a position outside of the tables.
        """
        if length is None:
            tokens = q.shape[-3]
            length = tokens if positions is None else max(tokens, self.max_length)
        cos, sin = self.tables(length, q.device)
        return rope(q, k, cos, sin, positions, self.interleaved, self.rotary_dim, cu_seqlens)

    def extra_repr(self) -> str:
        """The arguments."""
        more = "".join(f", {name}={value!r}" for name, value in self.scaling.items())
        kind = f"rope_type={self.rope_type!r}, interleaved={self.interleaved}"
        return f"{self.rotary_dim}, theta={self.theta}, max_length={self.max_length}, {kind}{more}"
