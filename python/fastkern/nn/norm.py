# SPDX-License-Identifier: Apache-2.0
"""Norms as modules: those of torch.nn with its arguments and state_dict, and one with the residual add before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkern.ops.add_norm import add_layer_norm, add_rms_norm
from fastkern.ops.group_norm import group_norm
from fastkern.ops.norm import layer_norm, rms_norm

_TORCH_RMS_EPS = torch.finfo(torch.float32).eps  # what torch.nn.RMSNorm adds without an eps, of 16 bits as well
_EPS = {"rms": 1e-6, "layer": 1e-5}


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What matrix products of ``x`` are computed in under torch.autocast; None without it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _fail(module: str, name: str, must: str, got: object) -> RuntimeError:
    return RuntimeError(f"fastkern.nn.{module}: {name} must {must}, got {got!r}")


def _as_rows(module: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    """The normalised dimensions as one."""
    if len(shape) == 1:
        return x
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise _fail(module, "x", f"have a shape that ends in {tuple(shape)}", tuple(x.shape))
    return x.flatten(-len(shape))


def _flat(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or parameter.dim() == 1 else parameter.flatten()


def _init_around(weight: Tensor | None, weight_offset: float) -> None:
    """The norm multiplies with 1 at first, whatever is added to the weight."""
    if weight is not None and weight_offset != 0:
        nn.init.constant_(weight, 1.0 - weight_offset)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` by :func:`fastkern.rms_norm`; Zhang and Sennrich, 2019.

    Args:
        normalized_shape: the last dimensions of x, an int or several.
        eps: added inside the root; None: 2**-23, as torch has it. Models of Hugging Face have 1e-5 or 1e-6.
        elementwise_affine: whether there is a ``weight``.
        weight_offset: added to the weight, in float32: 1.0 for Gemma, whose weights are stored around zero.
        device: of the weight.
        dtype: of the weight, which may be another than that of x.

    Raises:
        RuntimeError: in forward, by the operator: a dtype or shape that does not fit.

    Shapes: ``(..., *normalized_shape)`` to the same, of the dtype of x, under autocast too. Computed in float32 and
    rounded once; deterministic.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = weight_offset  # reset_parameters, which torch's __init__ calls, reads it
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """A weight that multiplies with 1."""
        super().reset_parameters()
        _init_around(self.weight, self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x."""
        eps = _TORCH_RMS_EPS if self.eps is None else self.eps
        rows = _as_rows("RMSNorm", x, self.normalized_shape)
        return rms_norm(rows, _flat(self.weight), eps, weight_offset=self.weight_offset).reshape(x.shape)

    def extra_repr(self) -> str:
        """The arguments."""
        return super().extra_repr() + (f", weight_offset={self.weight_offset}" if self.weight_offset else "")


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` by :func:`fastkern.layer_norm`; Ba, Kiros and Hinton, 2016.

    Args:
        normalized_shape: the last dimensions of x, an int or several.
        eps: added to the variance, inside the root.
        elementwise_affine: whether there is a ``weight``, and a ``bias`` if ``bias`` says so.
        bias: whether there is a ``bias``.
        device: of the parameters.
        dtype: of the parameters, which may be another than that of x.
        weight_offset: added to the weight, in float32 (LayerNorm1P of NeMo: 1.0).

    Raises:
        RuntimeError: in forward, by the operator: a dtype or shape that does not fit.

    Shapes: ``(..., *normalized_shape)`` to the same, of the dtype of x, under autocast too. Computed in float32 and
    rounded once; deterministic.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = weight_offset
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """A weight that multiplies with 1, a bias of 0."""
        super().reset_parameters()
        _init_around(self.weight, self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x."""
        rows = _as_rows("LayerNorm", x, self.normalized_shape)
        y = layer_norm(rows, _flat(self.weight), _flat(self.bias), self.eps, self.weight_offset)
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        """The arguments."""
        return super().extra_repr() + (f", weight_offset={self.weight_offset}" if self.weight_offset else "")


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` by :func:`fastkern.group_norm`, with SiLU behind it if asked for; Wu and He, 2018.

    Args:
        num_groups: divides ``num_channels``.
        num_channels: C.
        eps: added to the variance, inside the root.
        affine: whether there are ``weight`` and ``bias``.
        device: of the parameters.
        dtype: of the parameters, which may be another than that of x.
        activation: ``"none"`` or ``"silu"``.

    Raises:
        RuntimeError: ``activation`` is another; in forward, by the operator: a dtype or shape that does not fit.
        ValueError: as torch's: ``num_groups`` does not divide ``num_channels``.

    Shapes: ``(N, C, *)`` to the same, of the dtype of x; channels-last stays that. Deterministic.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        if activation not in ("none", "silu"):
            raise _fail("GroupNorm", "activation", 'be "none" or "silu"', activation)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x."""
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.activation)

    def extra_repr(self) -> str:
        """The arguments."""
        return super().extra_repr() + (f", activation={self.activation}" if self.activation != "none" else "")


class FusedAddNorm(nn.Module):
    """The seam between two parts of a pre-norm transformer: ``h = residual + dropout(x)`` and its norm, in one pass.

    By :func:`fastkern.add_rms_norm` and :func:`fastkern.add_layer_norm`. The keys of its state_dict are those of
    torch.nn.RMSNorm and LayerNorm: ``weight`` and ``bias``.

    Args:
        dim: N.
        kind: ``"rms"`` or ``"layer"``.
        eps: None: 1e-6 (rms), 1e-5 (layer).
        elementwise_affine: whether there is a ``weight``, and with ``kind="layer"`` a ``bias`` if ``bias`` says so.
        bias: whether a layer norm has a ``bias``; an RMS norm has none.
        weight_offset: added to the weight, in float32: 1.0 for Gemma.
        dropout: probability that an element of x is dropped, in training alone.
        device: of the parameters.
        dtype: of the parameters, which may be another than that of x.

    Raises:
        RuntimeError: another ``kind``, or a ``dropout`` that is no probability; in forward, by the operator.

    Shapes: ``module(x, residual)`` with (..., N) both gives ``(y, h)``, (..., N). y has the dtype of x, under autocast
    that of autocast, or ``out_dtype``; h that of the residual, which may be float32 where x has 16 bits. Without a
    residual x is the stream: h is x itself, and nothing is dropped. Deterministic but for the dropout's seed, which
    torch's generator draws.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        kind: str = "rms",
        eps: float | None = None,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        weight_offset: float = 0.0,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in _EPS:
            raise _fail("FusedAddNorm", "kind", 'be "rms" or "layer"', kind)
        if not 0 <= dropout <= 1:
            raise _fail("FusedAddNorm", "dropout", "be between 0 and 1", dropout)
        self.dim, self.kind, self.weight_offset, self.dropout = dim, kind, weight_offset, dropout
        self.eps = _EPS[kind] if eps is None else eps
        has_bias = elementwise_affine and bias and kind == "layer"
        for name, there in (("weight", elementwise_affine), ("bias", has_bias)):
            parameter = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if there else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A weight that multiplies with 1, a bias of 0."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(y, h)``: the norm and the new residual stream."""
        p = self.dropout if self.training else 0.0
        out_dtype = autocast_dtype(x) if out_dtype is None else out_dtype
        if self.kind == "rms":
            if residual is None:
                return rms_norm(x, self.weight, self.eps, None, self.weight_offset, out_dtype), x
            return add_rms_norm(
                x, residual, self.weight, self.eps, weight_offset=self.weight_offset, dropout_p=p, out_dtype=out_dtype
            )
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps, self.weight_offset, out_dtype), x
        return add_layer_norm(
            x, residual, self.weight, self.bias, self.eps, self.weight_offset, dropout_p=p, out_dtype=out_dtype
        )

    def extra_repr(self) -> str:
        """The arguments."""
        affine = f"elementwise_affine={self.weight is not None}, bias={self.bias is not None}"
        more = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        more += f", dropout={self.dropout}" if self.dropout else ""
        return f"{self.dim}, kind={self.kind!r}, eps={self.eps}, {affine}{more}"
