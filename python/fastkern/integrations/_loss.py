# SPDX-License-Identifier: Apache-2.0
"""The loss of a causal language model without its logits: transformers's forward, with the head put off to the loss.

While labels are given and logits are not wanted, the head passes the hidden states on; the model's own forward hands
them to its loss function, and that computes head and loss together. So whatever else the forward does stays as it is.
Whether a model does nothing with the logits in between is tried before, with a small stand-in for its base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkern.integrations._patched import FLOATS, Patched, patched_class, say_once
from fastkern.integrations._probe import numbers, obstacle, quietly, small_linear, stand_in
from fastkern.ops.linear_cross_entropy import linear_cross_entropy, rows_in
from fastkern.ops.loss import cross_entropy


class HeadForward(Patched):
    """``forward`` of a linear layer that can be put off."""

    weight: Tensor
    _fastkern_put_off = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or the hidden states as they came."""
        return x if self._fastkern_put_off else self._fastkern_base.forward(self, x)


@dataclass(frozen=True)
class Head:
    """A linear layer as the head of a language model."""

    forward = HeadForward


class LossForward(Patched):
    """``forward`` and ``loss_function`` of a causal language model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As before; the logits are left out (None) where only the loss is wanted."""
        recipe: Loss = self._fastkern_recipe
        head = getattr(self, recipe.head)
        wanted = recipe.return_logits
        if wanted is None:
            wanted = not self.training  # type: ignore[attr-defined]
        if kwargs.get("labels") is None or wanted or "_loss_function" in self.__dict__ or not _can_put_off(head):
            return self._fastkern_base.forward(self, *args, **kwargs)
        head._fastkern_put_off = True
        try:
            out = self._fastkern_base.forward(self, *args, **kwargs)
        finally:
            head._fastkern_put_off = False
        if isinstance(out, tuple):  # (loss, logits, ...)
            return (out[0], *out[2:])
        return type(out)(**{k: v for k, v in out.items() if k != "logits"})

    @property
    def loss_function(self) -> Any:
        """That of the class unless another one was set."""
        if "_loss_function" in self.__dict__:
            return self.__dict__["_loss_function"]
        return partial(_causal_loss, getattr(self, self._fastkern_recipe.head))

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self.__dict__["_loss_function"] = value


@dataclass(frozen=True)
class Loss:
    """The name of the head, and whether logits are returned: None for in evaluation alone."""

    head: str
    return_logits: bool | None
    forward = LossForward
    by = "fastkern.linear_cross_entropy"


def _can_put_off(head: Any) -> bool:
    if not isinstance(head, HeadForward):
        say_once(f"the head of the model is a {type(head).__name__} by now: its logits are computed before the loss")
        return False
    if hasattr(head.weight, "device_mesh"):  # a DTensor
        say_once("the weight of the head is sharded by now: its logits are computed before the loss")
        return False
    return not (head._forward_hooks or head._forward_pre_hooks)  # type: ignore[attr-defined]


def _causal_loss(
    head: Any,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Transformers's ForCausalLMLoss; ``logits`` are hidden states where the head is put off."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    if getattr(head, "_fastkern_put_off", False):
        hidden, weight, bias = logits.reshape(-1, logits.shape[-1]), head.weight, head.bias
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        bias = None if bias is None else bias.to(dtype)
        # 256 MiB of logits: beside a model's activations memory is dearer than some time of the products.
        chunk_rows = rows_in(256 << 20, weight.shape[0], dtype.itemsize)
        loss = linear_cross_entropy(
            hidden.to(dtype), weight.to(dtype), target, bias, ignore_index=ignore_index, reduction=reduction,
            chunk_rows=chunk_rows,
        )  # fmt: skip
    else:
        rows = logits.reshape(-1, vocab_size)
        loss = cross_entropy(rows, target, ignore_index=ignore_index, reduction=reduction)
    assert isinstance(loss, Tensor)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


# ---- finding it ------------------------------------------------------------------------------------------------------


class _Hidden(dict[str, Any]):
    """What a base model gives, as far as anyone asks."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)
        self.last_hidden_state = hidden

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return (self.last_hidden_state,)[key]
        return self.last_hidden_state if key in (0, "last_hidden_state") else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Base(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Hidden(self.hidden)


def loss(model: nn.Module, return_logits: bool | None) -> Loss | str | None:
    """The recipe of a causal language model of transformers; None if it does not look like one."""
    get_head = getattr(model, "get_output_embeddings", None)
    if not hasattr(type(model), "loss_function") or get_head is None or get_head() is None:
        return None
    named = (getattr(model, "loss_type", None) or "") == "ForCausalLM" or "LMHead" in type(model).__name__
    if not named or not hasattr(getattr(model, "config", None), "get_text_config"):
        return None
    head = get_head()
    name = next((k for k, m in model._modules.items() if m is head), None)
    if name is None:
        return "its head is no part of its own"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}"
    if "_loss_function" in model.__dict__:
        return "it was given a loss function of its own"
    blocked = obstacle(model)
    if blocked is not None:
        return blocked
    if head.weight.dtype not in FLOATS:
        return f"its head has weights of {head.weight.dtype}"
    if head._forward_hooks or head._forward_pre_hooks:
        return "its head has hooks, which would not run"
    return _try_loss(model, Loss(name, return_logits))


def _try_loss(model: Any, recipe: Loss) -> Loss | str:
    prefix, classes = getattr(model, "base_model_prefix", ""), int(model.config.get_text_config().vocab_size)
    if prefix not in model._modules:
        return "its base model is no part of its own"
    width = 8
    hidden = numbers(2, 5, width) * 3
    small = small_linear(width, classes, 1)
    if getattr(model, recipe.head).bias is None:
        small.bias = None  # type: ignore[assignment]
    made = stand_in(model, _modules={**model._modules, prefix: _Base(hidden), recipe.head: small})
    put_off = stand_in(small)
    linear: Any = nn.Linear
    put_off.__class__ = patched_class(linear, Head())
    ours = stand_in(model, _modules={**made._modules, recipe.head: put_off})
    kind: Any = type(model)
    ours.__class__ = patched_class(kind, Loss(recipe.head, False))
    labels = torch.arange(10).reshape(2, 5) * 7 % min(classes, 50)
    labels[0, 3] = -100
    ids = torch.zeros_like(labels)
    calls: list[dict[str, Any]] = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 3},
        {"labels": labels, "shift_labels": labels.flip(1)},
    ]
    with torch.no_grad():
        for extra in calls:
            try:
                want, got = (quietly(m, input_ids=ids, **extra)["loss"] for m in (made, ours))
            except Exception as error:  # the forward of any class: whatever it raises is the reason
                return f"its forward does not run with a stand-in for the base model: {type(error).__name__}: {error}"
            if float((got - want).abs()) > 2e-5 * float(want.abs()):
                return "it changes the logits before the loss, or computes another loss"
    return recipe
