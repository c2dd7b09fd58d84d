# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention with its projections."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkern.nn import _packed
from fastkern.nn.cache import KVCache
from fastkern.nn.norm import RMSNorm
from fastkern.nn.rotary import RotaryEmbedding
from fastkern.ops.attention import Window, flash_attn, flash_attn_varlen
from fastkern.ops.rope import qk_norm_rope, rope


def _fail(name: str, must: str, got: object) -> RuntimeError:
    return RuntimeError(f"fastkern.nn.MultiheadAttention: {name} must {must}, got {got!r}")


class MultiheadAttention(nn.Module):
    """Self- and cross-attention by :func:`fastkern.flash_attn`: projections, rotary embedding, cache and all.

    Vaswani et al., "Attention Is All You Need", 2017; grouped heads: Ainslie et al., "GQA", 2023. Parameters are those
    of ``torch.nn.MultiheadAttention``: ``in_proj_weight``, ``in_proj_bias`` (with ``kdim`` or ``vdim``:
    ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``), ``out_proj``. ``load_state_dict`` also takes ``q_proj``,
    ``k_proj``, ``v_proj`` and ``o_proj`` of Hugging Face's models, and a packed ``qkv_proj``;
    :func:`fastkern.nn.unpacked_state_dict` writes the former. Unlike torch's module this one takes the batch first,
    gives the result alone, no weights, and is told what is visible by flash_attn's arguments.

    Args:
        embed_dim: E of the query and of the result.
        num_heads: H.
        num_kv_heads: G, divides H; None: H; 1: multi-query attention.
        head_dim: D; None: ``E / H``.
        bias: whether the projections to q, k and v have one.
        out_bias: whether the last one has; None: as ``bias``.
        dropout: probability that a weight is dropped, in training alone.
        causal: a query sees no key after it.
        window: how many keys before and after its position a query sees; None or -1: all.
        scale: of the scores; None: ``1 / sqrt(D)``.
        softcap: bound of the scores, as in Gemma 2; 0: none.
        sinks: a learned score of each head for nothing, as in GPT-OSS: parameter ``sinks`` (H,), 0 at first.
        rotary: turns q and k, for self-attention; layers may share one.
        qk_norm: an RMS norm of each head of q and k before that, as in Qwen3: ``q_norm.weight``, ``k_norm.weight``.
        qk_norm_eps: its eps.
        qk_norm_offset: its ``weight_offset``: 1.0 for Gemma 3.
        kdim: width of the keys' source, for cross-attention; None: E.
        vdim: width of the values' source; None: E.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: numbers of heads that do not divide, a ``dropout`` that is no probability.

    Under autocast projections and attention are in its type; softmax and norms are float32 inside in any case.
    Deterministic, but for the dropout's seed. :meth:`forward` says the shapes.
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    sinks: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        window: Window = (-1, -1),
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: bool = False,
        rotary: RotaryEmbedding | None = None,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        qk_norm_offset: float = 0.0,
        kdim: int | None = None,
        vdim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or groups < 1 or num_heads % groups != 0:
            raise _fail("num_kv_heads", f"divide the {num_heads} heads", groups)
        if head_dim is None and embed_dim % num_heads != 0:
            raise _fail("num_heads", f"divide the embed_dim of {embed_dim} where there is no head_dim", num_heads)
        if not 0 <= dropout < 1:
            raise _fail("dropout", "be at least 0 and below 1", dropout)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, groups
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.dropout, self.causal, self.window = dropout, causal, window
        self.scale, self.softcap = scale, softcap
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self._sizes = (num_heads * self.head_dim, groups * self.head_dim, groups * self.head_dim)
        sources = (embed_dim, embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim)
        self._one_source = sources == (embed_dim,) * 3
        shapes: dict[str, tuple[int, int]] = {"in_proj_weight": (sum(self._sizes), embed_dim)}
        if not self._one_source:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            shapes = dict(zip(names, zip(self._sizes, sources, strict=True), strict=True))
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            empty = nn.Parameter(torch.empty(shapes[name], **made)) if name in shapes else None
            self.register_parameter(name, empty)
        for name, size in (("in_proj_bias", sum(self._sizes) if bias else 0), ("sinks", num_heads if sinks else 0)):
            self.register_parameter(name, nn.Parameter(torch.empty(size, **made)) if size else None)
        self.out_proj = nn.Linear(self._sizes[0], embed_dim, bias if out_bias is None else out_bias, **made)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, qk_norm_eps, weight_offset=qk_norm_offset, **made) if qk_norm else None
            for _ in range(2)
        )
        self.rotary = rotary
        self.register_load_state_dict_pre_hook(_accept)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.MultiheadAttention does."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        self.out_proj.reset_parameters()
        for zero in (self.in_proj_bias, self.out_proj.bias, self.sinks):
            if zero is not None:
                nn.init.zeros_(zero)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    @property
    def packings(self) -> list[_packed.Packing]:
        """How the packed parameters are made of Hugging Face's."""
        parts = ("q_proj", "k_proj", "v_proj")
        both = _packed.linear_parts(parts, self._sizes, {"weight": "in_proj_weight", "bias": "in_proj_bias"})
        return both if self._one_source else both[1:]

    def export_unpacked(self, state: MutableMapping[str, Any], prefix: str = "") -> None:
        """Replace the parameters of ``state`` by Hugging Face's."""
        for packing in self.packings:
            _packed.unpack(state, prefix, packing)
        for name in "qkv":
            _packed.rename(state, prefix, f"{name}_proj_weight", f"{name}_proj.weight")
        for kind in ("weight", "bias"):
            _packed.rename(state, prefix, f"out_proj.{kind}", f"o_proj.{kind}")

    # ---- forward -----------------------------------------------------------------------------------------------------

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v with their heads apart: views of one product where one source gives several of them."""
        sizes, weight, bias = self._sizes, self.in_proj_weight, self.in_proj_bias
        if weight is not None and key is query and value is query:
            flat = list(F.linear(query, weight, bias).split(sizes, -1))
        elif weight is not None and value is key:
            first, rest = weight.split((sizes[0], sizes[1] + sizes[2]))
            first_bias, rest_bias = (None, None) if bias is None else bias.split((sizes[0], sizes[1] + sizes[2]))
            flat = [F.linear(query, first, first_bias), *F.linear(key, rest, rest_bias).split(sizes[1:], -1)]
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if weight is None else weight.split(sizes)
            biases = (None, None, None) if bias is None else bias.split(sizes)
            flat = [
                F.linear(source, w, b)
                for source, w, b in zip((query, key, value), weights, biases, strict=True)
                if w is not None
            ]
        return [t.unflatten(-1, (-1, self.head_dim)) for t in flat]

    def _turn(
        self, q: Tensor, k: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, length: int | None
    ) -> tuple[Tensor, Tensor]:
        """Norm and rotation of the heads."""
        rotary, q_norm, k_norm = self.rotary, self.q_norm, self.k_norm
        if rotary is None:
            return (q, k) if q_norm is None or k_norm is None else (q_norm(q), k_norm(k))
        if length is None:
            length = q.shape[-3] if positions is None else max(q.shape[-3], rotary.max_length)
        where: dict[str, Any] = {"positions": positions, "cu_seqlens": cu_seqlens}
        where |= {"interleaved": rotary.interleaved, "rotary_dim": rotary.rotary_dim}
        cos, sin = rotary.tables(length, q.device)
        if q_norm is None or k_norm is None:
            turned = rope(q, k, cos, sin, **where)
        else:
            assert q_norm.eps is not None
            eps, offset = q_norm.eps, q_norm.weight_offset
            turned = qk_norm_rope(q, k, q_norm.weight, k_norm.weight, cos, sin, eps, offset, **where)
        return turned[0], turned[1]

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """The attention of these sequences.

        Args:
            query: (B, S, E) or, with ``cu_seqlens``, (total, E).
            key: (B, T, kdim), what keys are made of; None: ``query``, self-attention.
            value: (B, T, vdim); None: ``key``.
            bias: (B, H, S, T) with ones where it is the same: added to the scores, or of bool, True for visible.
            positions: (S,), (B, S) or (1, S) int64 or int32, for ``rotary``. None: from 0 on, behind what the cache
                holds. Beyond the tables of ``rotary``: an error on the CPU, NaN on CUDA.
            seqused_q: (B,) int32: how many queries of an entry there are; the result of the others is that of no key.
                None: in self-attention as ``seqused_k``, else all.
            seqused_k: (B,) int32: how many keys of an entry there are, where sequences are padded behind. Not with
                ``cache``, which knows.
            cu_seqlens: (sequences + 1,) int32: where packed sequences begin and end, as in
                :func:`fastkern.flash_attn_varlen`.
            cu_seqlens_k: the same of ``key``; None: ``cu_seqlens``.
            cache: keys and values of earlier tokens. Those of these are appended; :meth:`KVCache.advance` is the
                caller's to say.
            layer: which layer of the cache.

        Returns:
            (B, S, E) or (total, E).

        Raises:
            RuntimeError: arguments that do not go together, and by the operators whatever does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        crossing = key is not query
        if crossing and (self.rotary is not None or cache is not None):
            raise _fail("key", "be None with a rotary embedding or a cache", tuple(key.shape))
        if cu_seqlens is not None and not (bias is None and cache is None and seqused_k is None):
            raise _fail("cu_seqlens", "be None with a bias, a cache or seqused_k", tuple(cu_seqlens.shape))
        if cache is not None and seqused_k is not None:
            raise _fail("seqused_k", "be None with a cache", tuple(seqused_k.shape))
        q, k, v = self._project(query, key, value)
        length = None
        if cache is not None:
            length = cache.max_length
            positions = cache.positions(q.shape[1]) if positions is None else positions
        q, k = self._turn(q, k, positions, None if positions is not None else cu_seqlens, length)
        if cache is not None:
            new = q.shape[1]
            k, v = cache.append(k, v, layer)
            seqused_k = cache.seqused(new if seqused_q is None else seqused_q)
        elif seqused_q is None and not crossing:
            seqused_q = seqused_k
        options: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        made_in = q.dtype
        q = q.to(k.dtype)  # the cache may keep another type
        if cu_seqlens is not None:
            ends = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
            out = flash_attn_varlen(q, k, v, cu_seqlens, ends, **options)
        else:
            out = flash_attn(q, k, v, bias=bias, seqused_q=seqused_q, seqused_k=seqused_k, **options)
        assert isinstance(out, Tensor)
        return self.out_proj(out.to(made_in).flatten(-2))

    def extra_repr(self) -> str:
        """The arguments that are not seen in the layers."""
        heads = f"{self.embed_dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        more = f", dropout={self.dropout}, causal={self.causal}, window={self.window}, softcap={self.softcap}"
        return f"{heads}, bias={self.in_proj_bias is not None}{more}, sinks={self.sinks is not None}"


def _accept(module: MultiheadAttention, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    for kind in ("weight", "bias"):
        _packed.rename(state, prefix, f"qkv_proj.{kind}", f"in_proj_{kind}")
        _packed.rename(state, prefix, f"o_proj.{kind}", f"out_proj.{kind}")
    for packing in module.packings:
        _packed.pack(state, prefix, packing)
    if module.in_proj_weight is None:
        for name in "qkv":
            _packed.rename(state, prefix, f"{name}_proj.weight", f"{name}_proj_weight")
