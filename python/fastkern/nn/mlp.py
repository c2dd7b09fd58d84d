# SPDX-License-Identifier: Apache-2.0
"""The MLPs of transformers: gated with one packed weight, and plain with the bias inside the activation."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkern.nn import _packed
from fastkern.ops._gated_linear import GATED, gated_linear
from fastkern.ops.activation import bias_act

PLAIN = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu")
_HF_PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu"}


def plain_activation(name: str) -> str:
    """The activation of :func:`fastkern.bias_act` that Hugging Face's ``hidden_act`` means."""
    return _HF_PLAIN.get(name, name)


def _refuse_activation(module: str, activation: str, known: Any) -> RuntimeError:
    return RuntimeError(f"fastkern.nn.{module}: activation must be one of {', '.join(known)}, got {activation!r}")


class GatedMLP(nn.Module):
    """``down_proj(act(gate) * up)`` with ``gate, up = gate_up_proj(x)``: one product for both, one kernel behind it.

    Shazeer, "GLU Variants Improve Transformer", 2020; the layout is Phi-3's. ``load_state_dict`` takes this layout
    (``gate_up_proj``, ``down_proj``), Llama's in Hugging Face's models (``gate_proj``, ``up_proj``, ``down_proj``) and
    its own (``w1``, ``w3``, ``w2``), and xFormers' (``w12``, ``w3``). :func:`fastkern.nn.unpacked_state_dict` writes
    Hugging Face's.

    Args:
        dim: N of x.
        hidden: width of gate and of up.
        activation: ``"swiglu"``, ``"geglu"`` (with erf), ``"geglu_tanh"`` or ``"reglu"``.
        bias: whether the projections have one.
        out_dim: N of the result; None: ``dim``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: another activation.

    Shapes: (..., dim) to (..., out_dim). Under autocast all of it is in the type of autocast. In eager mode the
    activation is not kept for the backward pass, which computes it again.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "swiglu",
        bias: bool = False,
        *,
        out_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in GATED:
            raise _refuse_activation("GatedMLP", activation, GATED)
        self.activation = activation
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_up_proj = nn.Linear(dim, 2 * hidden, **made)
        self.down_proj = nn.Linear(hidden, dim if out_dim is None else out_dim, **made)
        self.register_load_state_dict_pre_hook(_accept_gated)

    @property
    def packings(self) -> list[_packed.Packing]:
        """How ``gate_up_proj`` is made of Hugging Face's two."""
        half = self.gate_up_proj.out_features // 2
        packed = {"weight": "gate_up_proj.weight", "bias": "gate_up_proj.bias"}
        return _packed.linear_parts(("gate_proj", "up_proj"), (half, half), packed)

    def reset_parameters(self) -> None:
        """As torch.nn.Linear does."""
        self.gate_up_proj.reset_parameters()
        self.down_proj.reset_parameters()

    def export_unpacked(self, state: MutableMapping[str, Any], prefix: str = "") -> None:
        """Replace the packed parameters of ``state`` by Hugging Face's."""
        for packing in self.packings:
            _packed.unpack(state, prefix, packing)

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The result without the last bias, and that bias, for who adds it in another kernel."""
        down = self.down_proj
        adds_its_own = type(down) is not nn.Linear
        y = gated_linear(self.activation, self.gate_up_proj(x), None, down, with_bias=adds_its_own)
        return y, None if adds_its_own else down.bias

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of x."""
        return gated_linear(self.activation, self.gate_up_proj(x), None, self.down_proj)

    def extra_repr(self) -> str:
        """The activation; the rest is in the layers."""
        return f"activation={self.activation!r}"


def _accept_gated(module: GatedMLP, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    for kind in ("weight", "bias"):
        if f"{prefix}w12.{kind}" in state:  # xFormers: w3 is the last one
            _packed.rename(state, prefix, f"w12.{kind}", f"gate_up_proj.{kind}")
            _packed.rename(state, prefix, f"w3.{kind}", f"down_proj.{kind}")
        for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            _packed.rename(state, prefix, f"{old}.{kind}", f"{new}.{kind}")
    for packing in module.packings:
        _packed.pack(state, prefix, packing)


class SwiGLU(GatedMLP):
    """:class:`GatedMLP` with SiLU: the MLP of Llama, Mistral and Qwen. Arguments: as there."""

    def __init__(self, dim: int, hidden: int, bias: bool = False, **more: Any) -> None:
        super().__init__(dim, hidden, "swiglu", bias, **more)


class GEGLU(GatedMLP):
    """:class:`GatedMLP` with GELU, ``approximate="tanh"`` for Gemma's. Arguments: as there."""

    def __init__(self, dim: int, hidden: int, bias: bool = False, approximate: str = "none", **more: Any) -> None:
        if approximate not in ("none", "tanh"):
            raise RuntimeError(f'fastkern.nn.GEGLU: approximate must be "none" or "tanh", got {approximate!r}')
        super().__init__(dim, hidden, "geglu" if approximate == "none" else "geglu_tanh", bias, **more)


class MLP(nn.Module):
    """``fc2(act(fc1(x)))``, the MLP of BERT, GPT-2 and ViT; bias and activation are one kernel.

    ``load_state_dict`` also takes GPT-2's names and transposed weights (``c_fc``, ``c_proj``) and GPT-J's (``fc_in``,
    ``fc_out``).

    Args:
        dim: N of x.
        hidden: width in between.
        activation: ``"gelu"`` (with erf), ``"gelu_tanh"``, ``"relu"``, ``"silu"`` or ``"quick_gelu"``, or a
            ``hidden_act`` of Hugging Face that means one of them, such as ``"gelu_new"``.
        bias: whether the layers have one.
        out_dim: N of the result; None: ``dim``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: another activation.

    Shapes: (..., dim) to (..., out_dim). Under autocast all of it is in the type of autocast.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "gelu",
        bias: bool = True,
        *,
        out_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = plain_activation(activation)
        if self.activation not in PLAIN:
            raise _refuse_activation("MLP", activation, (*PLAIN, *_HF_PLAIN))
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **made)
        self.fc2 = nn.Linear(hidden, dim if out_dim is None else out_dim, **made)
        self.register_load_state_dict_pre_hook(_accept_plain)

    def reset_parameters(self) -> None:
        """As torch.nn.Linear does."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def _middle(self, x: Tensor) -> Tensor:
        z, bias = _without_bias(self.fc1, x)
        return bias_act(z, bias, self.activation)

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The result without the last bias, and that bias, for who adds it in another kernel."""
        return _without_bias(self.fc2, self._middle(x))

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of x."""
        return self.fc2(self._middle(x))

    def extra_repr(self) -> str:
        """The activation; the rest is in the layers."""
        return f"activation={self.activation!r}"


def _accept_plain(module: MLP, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    for new, linear, transposed in (("fc1", "fc_in", "c_fc"), ("fc2", "fc_out", "c_proj")):
        if f"{prefix}{transposed}.weight" in state:  # GPT-2's Conv1D keeps (in, out)
            state[f"{prefix}{new}.weight"] = state.pop(f"{prefix}{transposed}.weight").t()
            _packed.rename(state, prefix, f"{transposed}.bias", f"{new}.bias")
        for kind in ("weight", "bias"):
            _packed.rename(state, prefix, f"{linear}.{kind}", f"{new}.{kind}")


def _without_bias(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A product and the bias that is still to be added; what stands in for a linear layer adds its own."""
    if type(layer) is not nn.Linear:
        return layer(x), None
    return F.linear(x, layer.weight), layer.bias
