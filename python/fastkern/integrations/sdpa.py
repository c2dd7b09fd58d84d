# SPDX-License-Identifier: Apache-2.0
"""torch's ``scaled_dot_product_attention`` and ``varlen_attn`` on the attention kernels of this library.

torch has a place for other flash attentions (``torch.nn.attention.register_flash_attention_impl``): they take over the
CUDA kernels of the operators that its own callers end in, so that nothing has to change in a model. The operators stay
what they are to autograd, ``torch.compile``, selective checkpointing and context parallelism.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention

from fastkern import _core
from fastkern.ops import _attention_check, _philox

__all__ = ["disable_sdpa", "enable_sdpa", "sdpa"]

NAME = "fastkern"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ops = torch.ops.fastkern


# ---- the operators of torch, computed here. NotImplemented: not taken ------------------------------------------------


def _takes(query: Tensor, *others: Tensor) -> bool:
    return query.dtype in _FLOATS and all(t.dtype == query.dtype for t in others)


def _no_debug_mask(wanted: bool) -> None:
    if wanted:
        raise RuntimeError("fastkern.sdpa: return_debug_mask must be False, the weights are never in memory, got True")


def _random(query: Tensor, dropout_p: float) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Options of the kernel, and the two results in which torch keeps what backward needs to draw the mask again."""
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    if not dropout_p:
        return {}, torch.zeros(2, dtype=torch.uint64, device=query.device), unused
    seed, offset = _philox.draw("flash_attn", None, q=query)
    return (
        {"dropout_p": dropout_p, "seed": seed, "offset": offset},
        torch.stack([seed, offset]).view(torch.uint64),
        unused,
    )


def _drawn(dropout_p: float, state: Tensor) -> dict[str, Any]:
    if not dropout_p:
        return {}
    seed, offset = state.view(torch.int64).unbind()
    return {"dropout_p": dropout_p, "seed": seed, "offset": offset}


def _laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """With the strides that torch's own results have, which traced graphs rely on."""
    strides = torch.empty_like(like, device="meta").stride()
    return t if t.stride() == strides or t.shape != like.shape else torch.empty_like(like).copy_(t)


def _window(left: int | None, right: int | None) -> dict[str, int]:
    return {"window_left": -1 if left is None else left, "window_right": -1 if right is None else right}


def _dense_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_flash_attention: (B, H, S, D)."""
    if not _takes(query, key, value):
        return NotImplemented
    _no_debug_mask(return_debug_mask)
    options, state, unused = _random(query, dropout_p)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out, lse = _ops.flash_attn_fwd(q, k, v, causal=is_causal, scale=scale, **options)
    out = _laid_out_like(out.transpose(1, 2), query)
    return out, lse, None, None, query.shape[2], key.shape[2], state, unused, query.new_empty(0)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    num_splits: int | None = None,
    **others: Any,
) -> Any:
    """aten::_flash_attention_forward: (total, H, D) with cum_seq, else (B, S, H, D)."""
    if not _takes(query, key, value) or any(t is not None for t in others.values()):
        return NotImplemented
    if (cum_seq_q is None) != (cum_seq_k is None):
        return NotImplemented
    _no_debug_mask(return_debug_mask)
    options, state, unused = _random(query, dropout_p)
    options |= {"causal": is_causal, "scale": scale, "seqused_k": seqused_k}
    options |= _window(window_size_left, window_size_right)
    if cum_seq_q is None:
        out, lse = _ops.flash_attn_fwd(query, key, value, **options)
    else:
        out, lse = _ops.flash_attn_varlen_fwd(query, key, value, cum_seq_q, cum_seq_k, **options)
    return out, lse, state, unused, query.new_empty(0)


def _forward_into(out: Tensor, *args: Any, **kwargs: Any) -> Any:
    """aten::_flash_attention_forward_no_dropout_inplace."""
    results = _forward(*args, **kwargs)
    if results is NotImplemented:
        return NotImplemented
    out.copy_(results[0])
    return results[1]


def _gradients(op: Any, starts: tuple[Tensor, ...], saved: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    """``saved``: dout, q, k, v, out, lse."""
    dout, *rest = saved
    return op(dout, None, *rest, *starts, *_attention_check.Options(**options), True, True, True, False, False)[:3]


def _dense_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_flash_attention_backward."""
    if not _takes(query, key, value, grad_out, out):
        return NotImplemented
    options = {"causal": is_causal, "scale": scale, **_drawn(dropout_p, philox_seed)}
    dense = tuple(t.transpose(1, 2) for t in (grad_out, query, key, value, out))
    grads = _gradients(_ops.flash_attn_bwd, (), (*dense, logsumexp), options)
    return tuple(_laid_out_like(g.transpose(1, 2), t) for g, t in zip(grads, (query, key, value), strict=True))


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> Any:
    """aten::_flash_attention_backward."""
    if not _takes(query, key, value, grad_out, out) or (cum_seq_q is None) != (cum_seq_k is None):
        return NotImplemented
    options = {"causal": is_causal, "scale": scale, **_window(window_size_left, window_size_right)}
    options |= _drawn(dropout_p, rng_state)
    saved = (grad_out, query, key, value, out, logsumexp)
    if cum_seq_q is None or cum_seq_k is None:
        return _gradients(_ops.flash_attn_bwd, (), saved, options)
    return _gradients(_ops.flash_attn_varlen_bwd, (cum_seq_q, cum_seq_k), saved, options)


_KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _dense_forward,
    "_scaled_dot_product_flash_attention_backward": _dense_backward,
    "_flash_attention_forward": _forward,
    "_flash_attention_backward": _backward,
    "_flash_attention_forward_no_dropout_inplace": _forward_into,
}


# ---- putting them into the dispatcher --------------------------------------------------------------------------------


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


def has_cuda_kernels() -> bool:
    """Whether this build computes attention on a GPU."""
    return bool(_core.build_info()["cuda"]) and _has_kernel("fastkern::flash_attn_fwd", "CUDA")


def _routed(name: str, key: str) -> Callable[..., Any]:
    """The kernel of an operator of torch, which passes on to the one of before what it does not take."""
    function = _KERNELS[name]
    before = torch.library.get_kernel(f"aten::{name}", key) if _has_kernel(f"aten::{name}", key) else None

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        results = function(*args, **kwargs)
        if results is not NotImplemented:
            return results
        if before is None:
            raise RuntimeError(
                f"fastkern.sdpa: aten::{name}: query, key and value must be of one type of {_FLOATS}, without "
                f"block_table and alibi_slopes, and torch has no {key} kernel for others; got {args[0].dtype}"
            )
        return before.call_boxed(keyset, *args, **kwargs)

    return kernel


class _Overrides:
    """The kernels of one dispatch key, from its making until ``remove``."""

    def __init__(self, key: str) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding a previously registered kernel.*")
            for name in _KERNELS:
                if hasattr(torch.ops.aten, name):
                    self.library.impl(name, _routed(name, key), key, with_keyset=True, allow_override=True)

    def remove(self) -> None:
        """Torch's own kernels are back after this."""
        self.library._destroy()


# ---- switching -------------------------------------------------------------------------------------------------------

_active: _Overrides | None = None
_before: str | None = None  # what was active when this was enabled


def _activated() -> _Overrides:
    global _active
    _active = _Overrides("CUDA")
    return _active


def _is_current() -> bool:
    return attention.current_flash_attention_impl() == NAME


def _restore() -> None:
    """Torch's own; torch 2.10 has no function for it."""
    if hasattr(attention, "restore_flash_attention_impl"):
        attention.restore_flash_attention_impl(_raise_warn=False)
        return
    if _active is not None:
        _active.remove()
    attention._registry._FLASH_ATTENTION_ACTIVE = None


def enable_sdpa() -> None:
    """Makes torch's flash attention on CUDA that of this library, for the whole process.

    ``torch.nn.functional.scaled_dot_product_attention`` where it picks its flash backend, and
    ``torch.nn.attention.varlen.varlen_attn``, run on :func:`fastkern.flash_attn` then, forward and backward: float16
    and bfloat16 without a mask, causal or not. Everything else goes the way it went before, as do calls with a
    ``block_table`` or ``alibi_slopes``. On the CPU nothing changes.

    Raises:
        RuntimeError: this build has no attention kernels for CUDA. Nothing is changed.

    Notes:
        * Calling it twice does no harm. What was active before (``"FA3"``, say) is so again after
          :func:`disable_sdpa`.
        * A graph that ``torch.compile`` made before runs on it as well: it calls the same operators.
        * Deterministic, backward too. Dropout draws other masks than torch's kernel, from the same generator.
        * Rows that see nothing have an lse of -inf.
    """
    global _before
    if not has_cuda_kernels():
        raise RuntimeError("fastkern.enable_sdpa: this build of fastkern has no attention kernels for CUDA")
    if _is_current():
        return
    _before = attention.current_flash_attention_impl()
    attention.register_flash_attention_impl(NAME, register_fn=_activated)
    attention.activate_flash_attention_impl(NAME)


def disable_sdpa() -> None:
    """Undoes :func:`enable_sdpa`: torch's flash attention is what it was before. Without it, nothing happens."""
    global _active, _before
    if not _is_current():
        return
    _restore()
    _active = None
    if _before is not None:
        attention.activate_flash_attention_impl(_before)
    _before = None


@contextmanager
def sdpa() -> Iterator[None]:
    """:func:`enable_sdpa` for the time of a ``with``, backward passes inside included; nothing if it is enabled.

    Raises:
        RuntimeError: as :func:`enable_sdpa`.
    """
    enabled = _is_current()
    enable_sdpa()
    try:
        yield
    finally:
        if not enabled:
            disable_sdpa()
