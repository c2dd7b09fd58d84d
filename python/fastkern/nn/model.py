# SPDX-License-Identifier: Apache-2.0
"""A transformer from its configuration: training, and decoding with a cache."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkern.nn.attention import MultiheadAttention
from fastkern.nn.cache import KVCache
from fastkern.nn.norm import FusedAddNorm
from fastkern.nn.rotary import RotaryEmbedding
from fastkern.nn.transformer import TransformerBlock, TransformerConfig
from fastkern.ops.dropout import dropout
from fastkern.ops.linear_cross_entropy import linear_cross_entropy


def _fail(name: str, must: str, got: object) -> RuntimeError:
    return RuntimeError(f"fastkern.nn.Transformer: {name} must {must}, got {got!r}")


class Transformer(nn.Module):
    """An encoder, a decoder, or a decoder with cross-attention, as its configuration says, and a head for tokens.

    Args:
        config: what to build.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: tokens (B, S) or, packed, (total,) to logits (B, S, V); without a vocabulary (B, S, dim) to (B, S, dim).
    """

    def __init__(self, config: TransformerConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        vocabulary, learned = config.vocab_size, config.position == "learned"
        self.embedding = nn.Embedding(vocabulary, config.dim, **made) if vocabulary else None
        self.position_embedding = nn.Embedding(config.max_length, config.dim, **made) if learned else None
        rotary = config.make_rotary(device)
        self.blocks = nn.ModuleList(TransformerBlock(config, rotary, **made) for _ in range(config.layers))
        # of the sum of all blocks or, where each has its norms behind it, of the embedding
        self.norm = FusedAddNorm(
            config.dim,
            config.norm,
            config.norm_eps,
            bias=config.bias,
            weight_offset=config.norm_offset,
            dropout=config.dropout if config.norm_first else 0.0,
            **made,
        )
        self.lm_head = nn.Linear(config.dim, vocabulary, bias=False, **made) if vocabulary else None
        self.register_load_state_dict_pre_hook(_accept_tied)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal linear layers and embeddings of ``init_std``, biases of 0, norms of 1."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.init_std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, MultiheadAttention):
                module.reset_parameters()
                assert module.in_proj_weight is not None
                nn.init.normal_(module.in_proj_weight, std=self.config.init_std)
            elif isinstance(module, (FusedAddNorm, RotaryEmbedding)):
                module.reset_parameters()
        if self.embedding is not None and self.lm_head is not None and self.config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    # ---- forward -----------------------------------------------------------------------------------------------------

    def _embed(self, tokens: Tensor, positions: Tensor | None, attention: dict[str, Any]) -> Tensor:
        x = tokens if self.embedding is None else self.embedding(tokens)
        if self.position_embedding is not None:
            if positions is None and attention.get("cu_seqlens") is not None:
                raise _fail("positions", "be given with cu_seqlens and learned positions", None)
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)
            x = x + self.position_embedding(positions)
        if not self.config.norm_first:
            x = self.norm(x, None, x.dtype)[0]
        return dropout(x, self.config.dropout, self.training and self.config.dropout > 0)

    def hidden_states(self, tokens: Tensor, *, positions: Tensor | None = None, **attention: Any) -> Tensor:
        """What the head gets, (B, S, dim).

        Args:
            tokens: (B, S) or (total,) integers; without a vocabulary (B, S, dim) or (total, dim) vectors.
            positions: (S,), (B, S) or (1, S), packed (total,); None: from 0 on, behind what the cache holds.
            **attention: ``memory``, ``memory_seqused``, ``bias``, ``seqused_q``, ``seqused_k``, ``cu_seqlens`` and
                ``cache`` of :meth:`TransformerBlock.forward`. The cache is not advanced.

        Returns:
            (B, S, dim) or (total, dim), behind the last norm.
        """
        cache = attention.get("cache")
        if positions is None and cache is not None:
            positions = cache.positions(tokens.shape[1])
        x = self._embed(tokens, positions, attention)
        residual: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            if self.config.norm_first:
                x, residual = block(x, residual, defer=True, positions=positions, layer=layer, **attention)
            else:
                x = block(x, positions=positions, layer=layer, **attention)
        return self.norm(x, residual)[0] if self.config.norm_first else x

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.lm_head is None:
            return hidden
        logits, cap = self.lm_head(hidden), self.config.logit_softcap
        return logits if cap == 0 else cap * torch.tanh(logits / cap)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """Logits or, with targets, the loss.

        Args:
            tokens: as in :meth:`hidden_states`.
            targets: (B, S) or (total,) int64: what each place is to predict, nothing is shifted; -100 does not count.
                The logits are then made in chunks, by :func:`fastkern.linear_cross_entropy`.
            **options: as in :meth:`hidden_states`.

        Returns:
            (B, S, V) logits, without a vocabulary (B, S, dim), or with ``targets`` the mean loss, float32.

        Raises:
            RuntimeError: ``targets`` without a vocabulary; by the blocks whatever does not fit.
        """
        hidden = self.hidden_states(tokens, **options)
        if targets is None:
            return self._logits(hidden)
        if self.lm_head is None:
            raise _fail("targets", "be None without a vocabulary", tuple(targets.shape))
        weight = self.lm_head.weight.to(hidden.dtype)  # under autocast
        loss = linear_cross_entropy(hidden, weight, targets, softcap=self.config.logit_softcap)
        assert isinstance(loss, Tensor)
        return loss

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def new_cache(self, batch: int, max_length: int | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for all layers, where the parameters are.

        Args:
            batch: B.
            max_length: tokens of an entry; None: that of the configuration.
            dtype: of keys and values; None: that of the parameters.

        Raises:
            RuntimeError: by :class:`KVCache`; also an encoder.
        """
        config = self.config
        if not config.causal:
            raise _fail("config.causal", "be True for a cache", config.causal)
        kept = self.norm.weight
        assert kept is not None
        return KVCache(
            config.layers,
            batch,
            config.max_length if max_length is None else max_length,
            config.heads if config.kv_heads is None else config.kv_heads,
            config.dim // config.heads if config.head_dim is None else config.head_dim,
            device=kept.device,
            dtype=kept.dtype if dtype is None else dtype,
        )

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: KVCache, lengths: Tensor | None = None, **options: Any) -> Tensor:
        """Take the tokens of prompts into the cache.

        Args:
            tokens: (B, S), padded behind where prompts are shorter.
            cache: appended to and advanced.
            lengths: (B,) int32: how many tokens each prompt has, at least 1; None: S.
            **options: ``memory`` and ``memory_seqused``.

        Returns:
            (B, V) logits of what follows each prompt.

        Raises:
            RuntimeError: by the blocks whatever does not fit.
        """
        hidden = self.hidden_states(tokens, cache=cache, seqused_q=lengths, **options)
        cache.advance(tokens.shape[1] if lengths is None else lengths)
        if lengths is None:
            return self._logits(hidden[:, -1])
        last = (lengths.long() - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self._logits(hidden.gather(1, last)[:, 0])

    def decode(self, tokens: Tensor, cache: KVCache, **options: Any) -> Tensor:
        """A step: one token more of each entry.

        Args:
            tokens: (B,).
            cache: appended to and advanced.
            **options: as in :meth:`prefill`.

        Returns:
            (B, V) logits of what follows.

        Raises:
            RuntimeError: by the blocks whatever does not fit.
        """
        return self.prefill(tokens[:, None], cache, **options)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop: int | None = None,
        **options: Any,
    ) -> Tensor:
        """What follows prompts. Dropout is as ``train()`` and ``eval()`` say.

        Args:
            tokens: (B, S), padded behind where prompts are shorter.
            max_new_tokens: at least 1.
            lengths: (B,) int32: how many tokens each prompt has; None: S.
            temperature: 0: the likeliest token; else drawn from ``softmax(logits / temperature)`` by torch's generator.
            top_k: drawn from so many of the likeliest alone.
            stop: a token that ends an entry; what follows it is the same token. All entries run to the end of the
                longest one.
            **options: as in :meth:`prefill`.

        Returns:
            (B, up to max_new_tokens) int64.

        Raises:
            RuntimeError: a number out of its range, or more tokens than ``max_length``.
        """
        if max_new_tokens < 1:
            raise _fail("max_new_tokens", "be at least 1", max_new_tokens)
        if temperature < 0:
            raise _fail("temperature", "be at least 0", temperature)
        total = tokens.shape[1] + max_new_tokens
        if total > self.config.max_length:
            raise _fail("max_new_tokens", f"leave the sequence within max_length, {self.config.max_length}", total)
        cache = self.new_cache(tokens.shape[0], total)
        logits = self.prefill(tokens, cache, lengths, **options)
        made: list[Tensor] = []
        while True:
            following = _choose(logits, temperature, top_k)
            if stop is not None and made:
                following = torch.where(made[-1] == stop, stop, following)
            made.append(following)
            if len(made) == max_new_tokens or (stop is not None and bool((following == stop).all())):
                return torch.stack(made, 1)
            logits = self.decode(following, cache, **options)


def _choose(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(torch.softmax(logits, -1), 1)[:, 0]


def _accept_tied(module: Transformer, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints of tied embeddings may leave out the head."""
    key, embedding = f"{prefix}lm_head.weight", f"{prefix}embedding.weight"
    if module.config.tie_embeddings and embedding in state and key not in state:
        state[key] = state[embedding]
