# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks, and what they are built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastkern.nn.attention import MultiheadAttention
from fastkern.nn.mlp import MLP, GatedMLP
from fastkern.nn.norm import FusedAddNorm
from fastkern.nn.rotary import RotaryEmbedding
from fastkern.ops._gated_linear import GATED
from fastkern.ops.attention import Window
from fastkern.ops.dropout import bias_dropout_add


def _fail(name: str, must: str, got: object) -> RuntimeError:
    return RuntimeError(f"fastkern.nn.TransformerConfig: {name} must {must}, got {got!r}")


@dataclass(frozen=True)
class TransformerConfig:
    """What a :class:`TransformerBlock` or a :class:`Transformer` is; the defaults are those of a small Llama.

    Args:
        dim: width of the residual stream.
        heads: of the attention.
        layers: how many blocks.
        vocab_size: V; 0: no embedding and no head, vectors in and out.
        kv_heads: None: ``heads``.
        head_dim: None: ``dim / heads``.
        hidden: width of the MLP; None: ``4 * dim``, of a gated one two thirds of that, as a multiple of 64.
        causal: a decoder; False: an encoder.
        cross_attention: each block also attends to ``memory``.
        norm: ``"rms"`` or ``"layer"``.
        norm_first: norms before attention and MLP, and one at the end; False: behind them, as in BERT, and one behind
            the embedding.
        norm_eps: None: 1e-6 (rms), 1e-5 (layer).
        norm_offset: added to the weights of the norms.
        activation: of the MLP: a gated one (``"swiglu"``, ``"geglu"``, ...) or a plain one (``"gelu"``, ...).
        bias: whether linear layers and layer norms have one.
        parallel: attention and MLP of the same norm, side by side, as in GPT-J.
        dropout: of the embedding and of what blocks add, in training alone.
        attention_dropout: of attention weights, in training alone.
        position: ``"rope"``, ``"learned"`` or ``"none"``.
        max_length: the longest sequence.
        rope_theta: base of the rotary embedding.
        rope_dim: columns of a head that it turns; None: all.
        rope_interleaved: in pairs, as in GPT-J.
        rope_type: as in :func:`fastkern.rope_table`.
        rope_scaling: its numbers.
        window: as in :func:`fastkern.flash_attn`.
        softcap: of the scores.
        sinks: of the attention.
        qk_norm: of the attention.
        logit_softcap: of the logits; 0: none.
        tie_embeddings: the head's weight is the embedding's.
        init_std: standard deviation of linear layers and embeddings at first.

    Raises:
        RuntimeError: values that are not known or do not go together.
    """

    dim: int
    heads: int
    layers: int = 1
    vocab_size: int = 0
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    causal: bool = True
    cross_attention: bool = False
    norm: str = "rms"
    norm_first: bool = True
    norm_eps: float | None = None
    norm_offset: float = 0.0
    activation: str = "swiglu"
    bias: bool = False
    parallel: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    position: str = "rope"
    max_length: int = 2048
    rope_theta: float = 10000.0
    rope_dim: int | None = None
    rope_interleaved: bool = False
    rope_type: str = "default"
    rope_scaling: dict[str, Any] = field(default_factory=dict, hash=False)
    window: Window = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    qk_norm: bool = False
    logit_softcap: float = 0.0
    tie_embeddings: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.position not in ("rope", "learned", "none"):
            raise _fail("position", 'be "rope", "learned" or "none"', self.position)
        for name, least in (("dim", 1), ("heads", 1), ("layers", 1), ("max_length", 1), ("vocab_size", 0)):
            if getattr(self, name) < least:
                raise _fail(name, f"be at least {least}", getattr(self, name))
        if self.parallel and (self.cross_attention or not self.norm_first):
            raise _fail("parallel", "be False with cross_attention or without norm_first", True)

    @property
    def mlp_width(self) -> int:
        """``hidden``, or what it is by default."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * self.dim // (3 * 64)) * 64 if self.activation in GATED else 4 * self.dim

    def make_rotary(self, device: Any = None) -> RotaryEmbedding | None:
        """The rotary embedding that all layers share; None for other positions."""
        if self.position != "rope":
            return None
        columns = self.head_dim if self.head_dim is not None else self.dim // self.heads
        return RotaryEmbedding(
            columns if self.rope_dim is None else self.rope_dim,
            self.rope_theta,
            self.max_length,
            self.rope_type,
            interleaved=self.rope_interleaved,
            device=device,
            **self.rope_scaling,
        )


class TransformerBlock(nn.Module):
    """Attention and MLP around a residual stream; adds, dropout and norms share kernels.

    Before the norm (``norm_first``): ``h += attn(norm1(h))``, ``h += cross_attn(norm_cross(h), memory)``,
    ``h += mlp(norm2(h))``; ``parallel``: ``h += attn(norm1(h)) + mlp(norm1(h))``. Each add is one pass with the norm
    that follows; the last one with the next block's, if ``defer`` and ``residual`` connect them. Behind it:
    ``x = norm1(x + attn(x))``, ``x = norm2(x + mlp(x))``.

    Args:
        config: what to build.
        rotary: shared with other blocks; None: of its own, if ``config`` wants one.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: (B, S, dim) or, with ``cu_seqlens``, (total, dim) to the same. Under autocast the residual stream keeps the
    type of x.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rotary: RotaryEmbedding | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        def norm() -> FusedAddNorm:
            options: dict[str, Any] = {"bias": config.bias, "weight_offset": config.norm_offset}
            return FusedAddNorm(config.dim, config.norm, config.norm_eps, dropout=config.dropout, **options, **made)

        def attention(**more: Any) -> MultiheadAttention:
            heads: dict[str, Any] = {"head_dim": config.head_dim, "bias": config.bias, "softcap": config.softcap}
            heads |= {"dropout": config.attention_dropout}
            return MultiheadAttention(config.dim, config.heads, config.kv_heads, **heads, **more, **made)

        self.norm1 = norm()
        self.attn = attention(
            causal=config.causal,
            window=config.window,
            sinks=config.sinks,
            qk_norm=config.qk_norm,
            qk_norm_offset=config.norm_offset,
            rotary=config.make_rotary(device) if rotary is None else rotary,
        )
        self.norm_cross = norm() if config.cross_attention else None
        self.cross_attn = attention() if config.cross_attention else None
        self.norm2 = None if config.parallel else norm()
        kind: type[GatedMLP | MLP] = GatedMLP if config.activation in GATED else MLP
        self.mlp = kind(config.dim, config.mlp_width, config.activation, config.bias, **made)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        defer: bool = False,
        memory: Tensor | None = None,
        memory_seqused: Tensor | None = None,
        **attention: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The stream behind this block.

        Args:
            x: (B, S, dim) or (total, dim): the residual stream or, with ``residual``, what is still to be added to it.
            residual: what the block before gave with ``defer``.
            defer: give ``(x, residual)`` and leave the last add to the next block's norm (``norm_first`` alone).
            memory: (B, T, dim), for cross-attention.
            memory_seqused: (B,) int32: how many of its rows an entry has.
            **attention: ``bias``, ``positions``, ``seqused_q``, ``seqused_k``, ``cu_seqlens``, ``cache`` and ``layer``
                of :meth:`MultiheadAttention.forward`.

        Returns:
            The stream; with ``defer`` ``(x, residual)``.

        Raises:
            RuntimeError: ``memory`` without cross-attention or the other way around; ``defer`` or ``residual`` where
                norms are behind.
        """
        config = self.config
        if (memory is None) == config.cross_attention:
            must = "be given with" if memory is None else "be None without"
            raise RuntimeError(f"fastkern.nn.TransformerBlock: memory must {must} cross_attention")
        if not config.norm_first:
            if defer or residual is not None:
                raise RuntimeError("fastkern.nn.TransformerBlock: defer and residual need norm_first")
            return self._norm_behind(x, memory, memory_seqused, attention)
        y, h = self.norm1(x, residual)
        out = self.attn(y, **attention)
        if self.norm_cross is not None and self.cross_attn is not None:
            y, h = self.norm_cross(out, h)
            out = self.cross_attn(y, memory, seqused_k=memory_seqused)
        if self.norm2 is not None:
            y, h = self.norm2(out, h)
        else:
            h = bias_dropout_add(out, None, h, config.dropout, self.training)
        if defer:
            return self.mlp(y), h
        out, bias = self.mlp.without_bias(y)
        return bias_dropout_add(out, bias, h, config.dropout, self.training)

    def _norm_behind(
        self, x: Tensor, memory: Tensor | None, memory_seqused: Tensor | None, attention: dict[str, Any]
    ) -> Tensor:
        """The stream is what norms give, so it keeps its type."""
        kept = x.dtype
        x, _ = self.norm1(self.attn(x, **attention), x, kept)
        if self.norm_cross is not None and self.cross_attn is not None:
            x, _ = self.norm_cross(self.cross_attn(x, memory, seqused_k=memory_seqused), x, kept)
        assert self.norm2 is not None
        return self.norm2(self.mlp(x), x, kept)[0]
