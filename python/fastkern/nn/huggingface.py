# SPDX-License-Identifier: Apache-2.0
"""Attention modules of Hugging Face's BERT, GPT-2 and GPT-J, from their configurations and with their parameters.

A configuration is any object with the attributes; transformers itself is not needed. The idea is EPOI's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkern.nn.rotary import RotaryEmbedding
from fastkern.ops.attention import flash_attn
from fastkern.ops.dropout import dropout
from fastkern.ops.rope import rope

_NONE: Any = object()


def _read(config: Any, *names: str, default: Any = _NONE) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    if default is _NONE:
        raise RuntimeError(f"fastkern.nn: config must have {' or '.join(names)}, got a {type(config).__name__} without")
    return default


def _visible(mask: Tensor | None, queries: int, keys: int) -> tuple[Tensor | None, bool]:
    """What flash_attn takes for a mask, and whether it says it all: one for each query does."""
    if mask is None:
        return None, False
    if mask.dim() not in (2, 4):
        raise RuntimeError(
            f"fastkern.nn: attention_mask must have two dimensions (B, T) or four (B, 1 or H, 1 or S, T), "
            f"got shape {tuple(mask.shape)}"
        )
    if mask.dim() == 2:  # the tokenizer's: 1 for a token
        mask = (mask != 0)[:, None, None]
    elif not (mask.dtype == torch.bool or mask.is_floating_point()):
        mask = mask != 0
    return mask[..., :keys], mask.shape[-2] == queries and mask.shape[-2] > 1


class _Attention(nn.Module):
    """What the three have in common: heads, cache, mask, dropout."""

    def __init__(self, config: Any, layer_idx: int | None, dropout_p: float) -> None:
        super().__init__()
        width, heads = _read(config, "hidden_size", "n_embd"), _read(config, "num_attention_heads", "n_head")
        if width % heads != 0:
            raise RuntimeError(f"fastkern.nn.{type(self).__name__}: heads must divide hidden_size {width}, got {heads}")
        self.config, self.layer_idx = config, layer_idx
        self.embed_dim, self.num_heads, self.head_dim = width, heads, width // heads
        self.attention_dropout = dropout_p
        self.scaling = self.head_dim**-0.5

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _cache_of(self, options: dict[str, Any]) -> Any:
        """The self-attention's cache; what is not served is refused."""
        for name in ("output_attentions", "head_mask"):
            if options.get(name) not in (None, False):
                raise RuntimeError(
                    f"fastkern.nn.{type(self).__name__}: {name} must be None or False, the weights are not in memory; "
                    f"got {options[name]!r}"
                )
        cache = next(
            (options[n] for n in ("cache", "past_key_values", "layer_past") if options.get(n) is not None), None
        )
        return getattr(cache, "self_attention_cache", cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, cache: Any = None) -> Tensor:
        """(B, S, H, D) each; the cache keeps (B, H, T, D)."""
        if cache is not None:
            k, v = (t.transpose(1, 2) for t in cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
        bias, complete = _visible(mask, q.shape[1], k.shape[1])
        out = flash_attn(
            q,
            k,
            v,
            causal=causal and q.shape[1] > 1 and not complete,
            scale=self.scaling,
            bias=bias,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        assert isinstance(out, Tensor)
        return out.flatten(-2)

    def extra_repr(self) -> str:
        """What the layers do not show."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, layer_idx={self.layer_idx}"


class BertSelfAttention(_Attention):
    """``transformers.models.bert.BertSelfAttention`` by :func:`fastkern.flash_attn`; RoBERTa and ELECTRA have the same.

    Parameters: ``query``, ``key``, ``value``, each with ``weight`` and ``bias``.

    Args:
        config: has ``hidden_size``, ``num_attention_heads``, ``attention_probs_dropout_prob``.
        is_causal: as a decoder.
        layer_idx: number of the layer, for a cache.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: an attribute is missing, or the heads do not divide the width.
    """

    def __init__(
        self,
        config: Any,
        is_causal: bool = False,
        layer_idx: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, layer_idx, _read(config, "attention_probs_dropout_prob", default=0.0))
        self.is_causal = is_causal
        width = self.embed_dim
        self.query, self.key, self.value = (nn.Linear(width, width, device=device, dtype=dtype) for _ in range(3))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, cache: Any = None, **options: Any
    ) -> tuple[Tensor, None]:
        """``(output, None)``.

        Args:
            hidden_states: (B, S, hidden_size).
            attention_mask: (B, T), 1 for a token; or (B, 1 or H, 1 or S, T), added to the scores or, of bool, True for
                visible.
            cache: an object with ``update(k, v, layer_idx)``, of (B, H, T, D); also as ``past_key_values``.
            **options: ``head_mask`` and ``output_attentions`` are refused, others are not looked at.

        Returns:
            (B, S, hidden_size), and None for the weights.

        Raises:
            RuntimeError: what is refused, or a mask of another shape.
        """
        cache = self._cache_of({"cache": cache, **options})
        q, k, v = (self._heads(layer(hidden_states)) for layer in (self.query, self.key, self.value))
        return self._attend(q, k, v, attention_mask, self.is_causal, cache), None


class _Conv1D(nn.Module):
    """A linear layer with its weight as (in, out), as GPT-2's checkpoints have it."""

    def __init__(self, out: int, width: int, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, out, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class GPT2Attention(_Attention):
    """``transformers.models.gpt2.GPT2Attention`` by :func:`fastkern.flash_attn`.

    Parameters: ``c_attn`` and ``c_proj``, with ``is_cross_attention`` also ``q_attn``; weights are (in, out).

    Args:
        config: has ``hidden_size``, ``num_attention_heads``, ``attn_pdrop``, ``resid_pdrop``; ``scale_attn_weights``
            and ``scale_attn_by_inverse_layer_idx`` are read too. Scores are float32 in any case, as
            ``reorder_and_upcast_attn`` asks for.
        is_cross_attention: queries of ``hidden_states``, keys and values of ``encoder_hidden_states``.
        layer_idx: number of the layer, for a cache.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: an attribute is missing, or the heads do not divide the width.
    """

    def __init__(
        self,
        config: Any,
        is_cross_attention: bool = False,
        layer_idx: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, layer_idx, _read(config, "attn_pdrop", default=0.0))
        self.is_cross_attention = is_cross_attention
        self.residual_dropout = _read(config, "resid_pdrop", default=0.0)
        if not _read(config, "scale_attn_weights", default=True):
            self.scaling = 1.0
        if _read(config, "scale_attn_by_inverse_layer_idx", default=False):
            if layer_idx is None:
                raise RuntimeError("fastkern.nn.GPT2Attention: layer_idx must be given for this config, got None")
            self.scaling /= layer_idx + 1
        width = self.embed_dim
        self.c_attn = _Conv1D((2 if is_cross_attention else 3) * width, width, device, dtype)
        if is_cross_attention:
            self.q_attn = _Conv1D(width, width, device, dtype)
        self.c_proj = _Conv1D(width, width, device, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """``(output, None)``.

        Args:
            hidden_states: (B, S, hidden_size).
            cache: as in :meth:`BertSelfAttention.forward`. Cross-attention computes its keys anew.
            attention_mask: as in :meth:`BertSelfAttention.forward`. The mask is causal besides, unless it has a row for
                each query.
            encoder_hidden_states: (B, T, hidden_size), for cross-attention.
            encoder_attention_mask: of its rows, like ``attention_mask``.
            **options: as in :meth:`BertSelfAttention.forward`.

        Returns:
            (B, S, hidden_size), and None for the weights.

        Raises:
            RuntimeError: what is refused; ``encoder_hidden_states`` without cross-attention or the other way around.
        """
        cache = self._cache_of({"cache": cache, **options})
        if (encoder_hidden_states is None) == self.is_cross_attention:
            must = "be given with" if self.is_cross_attention else "be None without"
            raise RuntimeError(f"fastkern.nn.GPT2Attention: encoder_hidden_states must {must} is_cross_attention")
        if encoder_hidden_states is not None:
            q = self._heads(self.q_attn(hidden_states))
            k, v = (self._heads(t) for t in self.c_attn(encoder_hidden_states).split(self.embed_dim, -1))
            out = self._attend(q, k, v, encoder_attention_mask, False)
        else:
            q, k, v = (self._heads(t) for t in self.c_attn(hidden_states).split(self.embed_dim, -1))
            out = self._attend(q, k, v, attention_mask, True, cache)
        return dropout(self.c_proj(out), self.residual_dropout, self.training and self.residual_dropout > 0), None


class GPTJAttention(_Attention):
    """``transformers.models.gptj.GPTJAttention`` by :func:`fastkern.flash_attn` and :func:`fastkern.rope`.

    Parameters: ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``, a ``weight`` each.

    Args:
        config: has ``hidden_size``, ``num_attention_heads``, ``rotary_dim``, ``attn_pdrop``, ``resid_pdrop``,
            ``max_position_embeddings``.
        layer_idx: number of the layer, for a cache.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: an attribute is missing, or the heads do not divide the width.
    """

    def __init__(
        self, config: Any, layer_idx: int | None = None, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, layer_idx, _read(config, "attn_pdrop", default=0.0))
        self.residual_dropout = _read(config, "resid_pdrop", default=0.0)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(self.embed_dim, self.embed_dim, bias=False, device=device, dtype=dtype) for _ in range(4)
        )
        self.rotary = RotaryEmbedding(
            _read(config, "rotary_dim", default=self.head_dim),
            max_length=_read(config, "max_position_embeddings", "n_positions", default=2048),
            interleaved=True,
            device=device,
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """``(output, None)``.

        Args:
            hidden_states: (B, S, hidden_size).
            position_embeddings: ``(sin, cos)``, (B or 1, S, rotary_dim / 2) each, as the model passes them; None: by
                ``position_ids``.
            attention_mask: as in :meth:`GPT2Attention.forward`.
            cache: as in :meth:`BertSelfAttention.forward`.
            position_ids: (B, S) or (1, S); None: from 0 on, behind what the cache holds (its ``get_seq_length``).
            **options: as in :meth:`BertSelfAttention.forward`.

        Returns:
            (B, S, hidden_size), and None for the weights.

        Raises:
            RuntimeError: what is refused.
        """
        cache = self._cache_of({"cache": cache, **options})
        q, k, v = (self._heads(layer(hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        columns = self.rotary.rotary_dim
        if position_embeddings is not None:
            sin, cos = position_embeddings
            turned = rope(q, k, cos, sin, None, True, columns)
        else:
            if position_ids is None and cache is not None:
                start = cache.get_seq_length(self.layer_idx)
                position_ids = torch.arange(start, start + q.shape[1], device=q.device)
            cos, sin = self.rotary.tables(max(q.shape[1], self.rotary.max_length), q.device)
            turned = rope(q, k, cos, sin, position_ids, True, columns)
        out = self.out_proj(self._attend(turned[0], turned[1], v, attention_mask, True, cache))
        return dropout(out, self.residual_dropout, self.training and self.residual_dropout > 0), None
