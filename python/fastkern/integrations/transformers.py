# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: attention under the name ``"fastkern"``, and classes replaced before a model is built.

Importing this module registers the attention and its masks; then::

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastkern")
    model.set_attn_implementation("fastkern")      # or, of a model that is there already
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
    from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask, sliding_window_overlay
    from transformers.monkey_patching import get_patch_mapping, register_patch_mapping, unregister_patch_mapping
except ImportError as error:
    raise ImportError(
        f"fastkern.integrations.transformers needs transformers >= 5.24 (pip install 'fastkern[integrations]'): {error}"
    ) from error

from fastkern.integrations import _probe
from fastkern.integrations._patched import Patched, patched_class
from fastkern.ops.attention import flash_attn, flash_attn_varlen

__all__ = ["NAME", "attention", "mask", "patch_classes", "register", "unpatch_classes"]

NAME = "fastkern"
_WHERE = "fastkern.integrations.transformers.attention"

# What a mask made of nothing but causality and a window carries, so that the kernel can skip what it hides. Whatever
# is done to the mask gives a tensor without it, which is then taken for what it holds.
_LEFT = "_fastkern_left"
_AND = and_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__

# Kinds of sparse attention, each another meaning: ignoring them would give wrong results.
_REFUSED = ("indices", "block_indices", "sinks")


def register() -> None:
    """Makes ``attn_implementation="fastkern"`` known to transformers: the attention and the masks that it takes.

    Done by the import of this module; again does no harm. One without the other would be wrong: transformers gives a
    registered attention no mask at all, padding included, unless a maker of masks is registered under the same name.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


# ---- masks -----------------------------------------------------------------------------------------------------------


def _keys_before(function: Callable[..., Any]) -> int | None:
    """Of a causal mask: how many keys before its own a query sees, -1 for all. None for any other mask."""
    if function is causal_mask_function:
        return -1
    if getattr(function, "__code__", None) is not _AND:
        return None
    parts = [cell.cell_contents for cell in function.__closure__ or ()]
    if len(parts) != 1 or not isinstance(parts[0], tuple) or len(parts[0]) != 2:
        return None
    rest = [part for part in parts[0] if part is not causal_mask_function]
    if len(rest) != 1 or getattr(rest[0], "__code__", None) is not _WINDOW:
        return None
    width = rest[0].__closure__[0].cell_contents
    return width - 1 if isinstance(width, int) and width > 0 else None


def mask(**options: Any) -> Tensor | None:
    """The mask of a forward: that of transformers's ``sdpa``, (B, 1, S, T) bool, or None where none is needed.

    Args:
        options: those of ``transformers.masking_utils.sdpa_mask``.

    Returns:
        None for what ``is_causal`` says alone. Else a mask; one that is causal, with a window or without, and hides no
        padding is marked, and :func:`attention` then asks the kernel for a window instead of reading the mask.
    """
    made = sdpa_mask(**options)
    q_offset, padding = options.get("q_offset", 0), options.get("attention_mask")
    if made is None or torch.compiler.is_compiling() or not isinstance(q_offset, int):
        return made
    left = _keys_before(options.get("mask_function", causal_mask_function))
    last_beside_last = q_offset - options.get("kv_offset", 0) == options["kv_length"] - options["q_length"]
    if left is not None and last_beside_last and (padding is None or bool(padding.all())):
        setattr(made, _LEFT, left)
    return made


# ---- attention -------------------------------------------------------------------------------------------------------


def _refuse(name: str, must: str, got: object) -> ValueError:
    return ValueError(f"{_WHERE}: {name} must {must}, got {got}")


def _checked_mask(given: Any, sizes: tuple[int, int, int, int]) -> Tensor | None:
    if given is None:
        return None
    kind = "be None or a bool or floating point tensor of four dimensions"
    if not isinstance(given, Tensor):
        raise _refuse("attention_mask", kind, type(given).__name__)
    if given.dtype != torch.bool and not given.is_floating_point():
        raise _refuse("attention_mask", kind, given.dtype)
    if given.dim() != 4 or any(got not in (1, want) for got, want in zip(given.shape[:3], sizes[:3], strict=True)):
        raise _refuse("attention_mask", f"broadcast to (B, H, S, T) = {sizes}", f"shape {tuple(given.shape)}")
    if given.shape[3] != sizes[3]:
        raise _refuse("attention_mask", f"have a last dimension of T = {sizes[3]}", f"shape {tuple(given.shape)}")
    return given.float() if given.dtype == torch.float64 else given


def _same_sequence(starts_q: Tensor, starts_k: Tensor, S: int, T: int) -> Tensor:
    """(1, 1, S, T) bool: which query and key belong to one sequence of a packed batch."""
    numbers = [
        torch.bucketize(torch.arange(n, device=starts.device), starts, right=True)
        for n, starts in ((S, starts_q), (T, starts_k))
    ]
    return (numbers[0][:, None] == numbers[1])[None, None]


def _with_position_bias(bias: Tensor, seen: Tensor | None, causal: bool, S: int) -> Tensor:
    """One additive mask for a bias of positions and what may be seen; causal from the first key on."""
    if seen is None and causal:
        seen = torch.ones(S, bias.shape[-1], dtype=torch.bool, device=bias.device).tril()
    if seen is None:
        return bias
    return bias.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else bias + seen


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers model by :func:`fastkern.flash_attn`.

    What may be seen is said by ``attention_mask`` alone, as in transformers's own ``eager`` and ``sdpa``; without one
    the attention is causal if ``is_causal`` (or the module) says so and there is more than one query.

    Args:
        module: the attention module, of which ``is_causal`` is read.
        query: (B, H, S, D), float32, float16 or bfloat16; any strides.
        key: (B, G, T, D), G a divisor of H.
        value: (B, G, T, Dv).
        attention_mask: None, or (B, H, S, T), of which the first three may be 1: bool, True where a key is seen, or
            floating point, added to the scores.
        dropout: probability that a weight is dropped.
        scaling: of the scores; None: ``1 / sqrt(D)``.
        is_causal: None: what the module says, and True if it says nothing.
        softcap: bound of the scores; None: none.
        s_aux: (H,), a sink for each head.
        position_bias: broadcasts to (B, H, S, T); added to the scores.
        kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k``, (sequences + 1,) int32, keep the sequences of a packed batch of
            one row apart. ``sliding_window`` is in the mask already. Others are of no concern here.

    Returns:
        ``(out, None)``: (B, S, H, Dv), contiguous; attention weights are not there to be returned.

    Raises:
        ValueError: another mask; ``output_attentions``; ``cu_seq_lens_q`` of more than one row; the arguments of a
            sparse attention. The message names the argument.
        RuntimeError: as :func:`fastkern.flash_attn`.

    Notes:
        Under autocast query, key and value are converted, as those of ``scaled_dot_product_attention`` are. A row of a
        bool mask that shows nothing gives 0.
    """
    if kwargs.get("output_attentions"):
        raise _refuse("output_attentions", 'be False: the weights are never in memory, use "eager"', True)
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise _refuse(name, "be None: there is no such attention here", type(kwargs[name]).__name__)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.shape[0] == 1 and k.shape[0] > 1:  # learned queries, the same for each entry
        q = q.expand(k.shape[0], -1, -1, -1)
    S, T = q.shape[1], k.shape[1]
    seen = _checked_mask(attention_mask, (q.shape[0], q.shape[2], S, T))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and seen is None and S > 1
    if causal and T > S:  # an empty static cache behind them: query i is at position i
        k, v, T = k[:, :S], v[:, :S], S
        position_bias = None if position_bias is None else position_bias[..., :S]

    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux, "dropout_p": dropout}
    starts_q, starts_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if starts_q is not None:
        if q.shape[0] != 1:
            raise _refuse("cu_seq_lens_q", "be None for a batch of several rows", f"a batch of {q.shape[0]}")
        starts_q, starts_k = starts_q.int(), starts_q.int() if starts_k is None else starts_k.int()
        if seen is None and position_bias is None:
            out = flash_attn_varlen(q[0], k[0], v[0], starts_q, starts_k, causal=causal, **options)
            assert isinstance(out, Tensor)
            return out[None], None
        together = _same_sequence(starts_q, starts_k, S, T)
        if seen is None:
            seen, causal = together.tril() if causal else together, False
        else:
            seen = seen & together if seen.dtype == torch.bool else seen.masked_fill(~together, float("-inf"))
    if position_bias is not None:
        seen, causal = _with_position_bias(position_bias, seen, causal, S), False
    left = getattr(seen, _LEFT, None)
    if left is not None:
        seen, causal = None, True
    window = (-1 if left is None else left, -1)
    out = flash_attn(q, k, v, causal=causal, window=window, bias=seen, **options)
    assert isinstance(out, Tensor)
    return out, None


# ---- classes, before a model is built --------------------------------------------------------------------------------


def patch_classes(config: Any, *, norm: bool = True, mlp: bool = True) -> list[str]:
    """Replaces the norms and gated MLPs of an architecture in every model of it that is built from now on.

    Through transformers's own mapping, which ``from_pretrained`` and ``from_config`` follow. What
    :func:`fastkern.patch` does to the modules of one model, this does to their classes, found in a model of ``config``
    without weights; so it is there before weights are loaded, sharded or quantised.

    Args:
        config: a configuration of transformers, of any size.
        norm: RMS and layer norms of transformers's own classes (not ``torch.nn.LayerNorm``).
        mlp: gated MLPs.

    Returns:
        The names of the classes that are replaced, for :func:`unpatch_classes`. Those that are replaced already are
        left out.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    found: dict[str, set[Any]] = {}
    for module in model.modules():
        kind: Any = type(module)
        if not kind.__module__.startswith("transformers.") or isinstance(module, Patched):
            continue
        recipe: Any = _probe.norm(module, weights=False) if norm else None
        if recipe is None and mlp:
            recipe = _probe.mlp(module, weights=False)
        if recipe is not None:
            made = None if isinstance(recipe, str) else patched_class(kind, recipe)
            found.setdefault(kind.__name__, set()).add(made)
    alike = {name: made for name, (made, *others) in found.items() if made is not None and not others}
    new = {name: made for name, made in alike.items() if name not in get_patch_mapping()}
    register_patch_mapping(new)
    return list(new)


def unpatch_classes(names: list[str]) -> None:
    """Undoes :func:`patch_classes`: models built from now on have the classes of before. Those there stay as they are.

    Args:
        names: what :func:`patch_classes` returned.

    Raises:
        ValueError: a name that is not replaced.
    """
    unregister_patch_mapping(names)


register()
