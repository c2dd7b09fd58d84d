# SPDX-License-Identifier: Apache-2.0
"""Any model, its modules replaced by these kernels where they compute the same, and given back."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastkern.integrations import _loss, _probe, _rotary
from fastkern.integrations._patched import Patched, patched_class
from fastkern.integrations.sdpa import has_cuda_kernels

__all__ = ["PatchReport", "patch", "unpatch"]

_ATTENTION = "_fastkern_attention"  # on the model: configurations and the attention that they named


@dataclass(frozen=True)
class Entry:
    """One module, and what was done with it."""

    path: str  # of the module in the model; "" for the model itself
    module: str  # its class
    what: str  # norm, mlp, attention, rotary or loss
    by: str | None  # what took its place; None: it was left
    why: str  # why it was left; "" where it was not


@dataclass
class PatchReport:
    """What :func:`fastkern.patch` did. ``print(report)`` shows it as a table, one line for modules of a kind.

    Attributes:
        entries: one for each module that was replaced or looked as if it could be.
    """

    entries: list[Entry] = field(default_factory=list)

    @property
    def replaced(self) -> list[Entry]:
        """The modules that were replaced."""
        return [e for e in self.entries if e.by is not None]

    @property
    def left(self) -> list[Entry]:
        """The modules that were left as they are, each with the reason."""
        return [e for e in self.entries if e.by is None]

    def __str__(self) -> str:
        kinds: dict[tuple[str, str, str], list[str]] = {}
        for e in self.entries:
            kinds.setdefault((e.what, e.module, e.by or f"left: {e.why}"), []).append(e.path or "(the model)")
        rows = [("part", "class", "now", "count", "first")]
        rows += [(*kind, str(len(paths)), paths[0]) for kind, paths in kinds.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def patch(
    model: nn.Module,
    *,
    norm: bool = True,
    mlp: bool = True,
    attention: bool = True,
    loss: bool = True,
    rotary: bool = True,
    return_logits: bool | None = None,
    exclude: Iterable[str] = (),
) -> PatchReport:
    """Replaces the parts of a model that these kernels compute as well, in this object alone.

    A part is recognised by what it computes, not by its name: a small stand-in of each module is run on the CPU and
    compared, so models that nobody has heard of are served, and what differs is left alone. A replaced module keeps
    its parameters, hooks and ``state_dict``; it has another class, derived from its own. :func:`fastkern.unpatch`
    undoes it.

    Args:
        model: any module; for ``attention`` and ``loss`` a model of transformers.
        norm: RMS and layer norms over the last dimension, with their weight, 1 + weight or none, and a bias or none.
        mlp: gated MLPs ``down(act(gate(x)) * up(x))``, act being SiLU, GELU (either) or ReLU, gate and up apart or
            packed as halves. The projections are called as the modules that they are, so LoRA or quantisation in
            their place is served.
        attention: ``set_attn_implementation("fastkern")``; see :mod:`fastkern.integrations.transformers`. It is kept
            in the configuration: a model that shares this one's configuration object changes with it.
        loss: the head and the loss of a causal language model by :func:`fastkern.linear_cross_entropy`, without the
            logits, where ``labels`` are given by name.
        rotary: rotary positions by :func:`fastkern.rope`, in attention modules that call ``apply_rotary_pos_emb`` of
            their file, where that turns halves as in Llama. The module keeps the code of its forward.
        return_logits: whether the output of such a call has logits. None: in evaluation, not in training; there
            ``output.logits`` is None then, and tuples are without them. True: always, the loss alone is replaced.
        exclude: patterns of module paths (``fnmatch``) to leave alone, such as ``"model.layers.0.*"``.

    Returns:
        A :class:`PatchReport`: what was replaced, what not and why.

    Raises:
        TypeError: ``model`` is no module, or ``exclude`` is a string.

    Notes:
        * Results differ by rounding alone: 16-bit norms and MLPs are rounded once, where torch rounds several times.
        * Works under gradient checkpointing, ``torch.compile``, ``train()`` and ``eval()``; ``copy.deepcopy`` and
          pickle give a patched model again. Patch before the model is sharded or wrapped.
        * A patched model can be patched again, with more parts switched on.
        * What an attention's file has under other names is that of the time of the call: whoever replaces a function
          in the file afterwards does not reach a module whose rotary positions are patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastkern.patch: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(exclude, str):
        raise TypeError(f"fastkern.patch: exclude must be several patterns, got the string {exclude!r}")
    patterns, report = tuple(exclude), PatchReport()
    for path, module in list(model.named_modules()):
        found: tuple[str, Any] | None = None
        if norm:
            found = ("norm", _probe.norm(module))
        if mlp and (found is None or found[1] is None):
            found = ("mlp", _probe.mlp(module))
        if loss and (found is None or found[1] is None):
            found = ("loss", _loss.loss(module, return_logits))
        if rotary and (found is None or found[1] is None):
            found = ("rotary", _rotary.rotary(module, model.modules()))
        if found is None or found[1] is None:
            continue
        what, recipe = found
        if isinstance(module, Patched):
            recipe = "is patched already"
        elif any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            recipe = "excluded"
        kind: Any = type(module)
        if isinstance(recipe, str):
            report.entries.append(Entry(path, kind.__name__, what, None, recipe))
            continue
        if what == "loss":
            linear: Any = nn.Linear
            getattr(module, recipe.head).__class__ = patched_class(linear, _loss.Head())
        module.__class__ = patched_class(kind, recipe)
        report.entries.append(Entry(path, kind.__name__, what, recipe.by, ""))
    if attention:
        _switch_attention(model, report)
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes :func:`fastkern.patch`, whatever was patched: classes, forwards and the attention are those of before.

    A model that is not patched stays as it is.

    Args:
        model: what was patched, a part of it, or what contains it.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: a module's class was changed again after it was patched (by ``fully_shard``, for one). Nothing is
            undone then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastkern.unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        if isinstance(module, Patched) and "_fastkern_recipe" not in type(module).__dict__:
            raise RuntimeError(
                f"fastkern.unpatch: the class of {path or 'the model'} must be the one that fastkern.patch gave it, "
                f"got {type(module).__name__}, made of it afterwards: undo that first"
            )
    for module in model.modules():
        if isinstance(module, Patched):
            module.__class__ = module._fastkern_base
            module.__dict__.pop("_fastkern_put_off", None)
        for config, before in reversed(module.__dict__.pop(_ATTENTION, ())):
            config._attn_implementation_internal = before


# ---- attention -------------------------------------------------------------------------------------------------------


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration that says what attention a part of the model uses, once."""
    found: dict[int, Any] = {}
    own: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    waiting = [config for config in own if hasattr(config, "_attn_implementation_internal")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
            waiting += [part for part in parts if hasattr(part, "_attn_implementation_internal")]
    return list(found.values())


def _switch_attention(model: Any, report: PatchReport) -> None:
    if "transformers" not in sys.modules or not _configs(model):
        return
    # Of the type: a wrapper may pass attributes on.
    owner = next((m for m in model.modules() if hasattr(type(m), "set_attn_implementation")), None)
    if owner is None:
        return
    name, path = type(owner).__name__, next(path for path, m in model.named_modules() if m is owner)
    device = next((p.device.type for p in owner.parameters()), "cpu")
    if device == "cuda" and not has_cuda_kernels():
        report.entries.append(Entry(path, name, "attention", None, "this build has no attention kernels for CUDA"))
        return
    from fastkern.integrations.transformers import NAME

    configs = [(config, config._attn_implementation_internal) for config in _configs(owner)]
    if all(before == NAME for _, before in configs):
        report.entries.append(Entry(path, name, "attention", None, "is patched already"))
        return
    owner.set_attn_implementation(NAME)
    changed = [(c, before) for c, before in configs if c._attn_implementation_internal != before]
    if not changed:
        why = "its attention does not go through transformers's AttentionInterface"
        report.entries.append(Entry(path, name, "attention", None, why))
        return
    owner.__dict__.setdefault(_ATTENTION, []).extend(changed)
    report.entries.append(Entry(path, name, "attention", "fastkern.flash_attn", ""))
