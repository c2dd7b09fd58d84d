# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="fastkern" in transformers: models, generation, and masks of every kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fastkern
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24", reason="needs transformers >= 5.24")

from fastkern.integrations import transformers as ours
from harness.hf_models import DECODERS, ENCODERS, assert_near, build, inputs_of, run
from transformers import masking_utils


@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_models(name: str) -> None:
    """Logits and gradients of a padded batch are those of eager attention."""
    inputs = inputs_of(name)
    loss, logits, grads = run(build(name), inputs)
    model = build(name, "fastkern")
    assert model.config._attn_implementation == "fastkern"
    our_loss, our_logits, our_grads = run(model, inputs)
    assert_near(our_loss, loss, "loss")
    assert_near(our_logits, logits, "logits")
    assert our_grads.keys() == grads.keys()
    largest = max(float(g.abs().max()) for g in grads.values())
    for key, grad in grads.items():
        assert float((our_grads[key] - grad).abs().max()) <= 2e-5 * largest, key


@pytest.mark.parametrize("name", DECODERS)
def test_generation(name: str) -> None:
    """Greedy, left-padded, with a growing and a static cache: the same tokens."""
    inputs = {k: v for k, v in inputs_of(name).items() if k != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = build(name).eval().generate(**inputs, **options)
    model = build(name, "fastkern").eval()
    assert torch.equal(model.generate(**inputs, **options), expected)
    if name in ("mistral", "gpt_oss"):
        assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_packed_sequences(name: str) -> None:
    """Sequences told apart by position_ids, or by cu_seq_lens where a cache hides the former from transformers."""
    model = build(name, "fastkern").eval()
    ids = inputs_of(name)["input_ids"][1:]
    with torch.no_grad():
        expected = torch.cat([model(ids[:, :6]).logits, model(ids[:, 6:]).logits], 1)
        positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
        assert_near(model(ids, position_ids=positions, use_cache=False).logits, expected, "position_ids")
        starts = torch.tensor([0, 6, 13], dtype=torch.int32)
        packed: dict[str, Any] = {
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": 7,
            "max_length_k": 7,
        }
        assert_near(model(ids, position_ids=positions, **packed).logits, expected, "cu_seq_lens")


def test_switching_back() -> None:
    model, inputs = build("llama"), inputs_of("llama")
    before = run(model, inputs)[1]
    model.set_attn_implementation("fastkern")
    assert not torch.equal(run(model, inputs)[1], before)
    model.set_attn_implementation("eager")
    assert torch.equal(run(model, inputs)[1], before)


def test_autocast() -> None:
    """Under autocast rotary embeddings leave q and k in float32 and v in bfloat16: converted, as for SDPA."""
    inputs = inputs_of("llama")
    logits = {}
    for name in ("sdpa", "fastkern"):
        with torch.autocast("cpu", torch.bfloat16):
            logits[name] = run(build("llama", name), inputs)[1]
    assert_near(logits["fastkern"], logits["sdpa"], "logits", 2e-2)


# ---- the function itself ---------------------------------------------------------------------------------------------

MODULE: Any = SimpleNamespace(is_causal=True)
B, H, G, S, T, D = 2, 4, 2, 5, 7, 8


def _heads(S: int = S, T: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """As a model has them: (B, H, S, D), seen through a transposition."""
    return tuple(torch.randn(B, n, h, D, requires_grad=True).transpose(1, 2) for n, h in ((S, H), (T, G), (T, G)))  # type: ignore[return-value]


def _formula(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, softcap: float | None = None,
             sinks: Tensor | None = None) -> Tensor:  # fmt: skip
    """In float64; gives (B, S, H, D)."""
    q, k, v = q.double(), k.double().repeat_interleave(H // G, 1), v.double().repeat_interleave(H // G, 1)
    scores = q @ k.mT * D**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1).nan_to_num()[..., : k.shape[2]] @ v).transpose(1, 2)


def _some(*shape: int) -> Tensor:
    seen = torch.rand(*shape) > 0.4
    seen[..., 0] = True
    return seen


@pytest.mark.parametrize(
    ("seen", "options"),
    [
        (None, {"is_causal": False}),
        (_some(B, H, S, T), {}),
        (_some(1, 1, S, T), {"s_aux": torch.randn(H)}),
        (_some(B, 1, 1, T), {"softcap": 1.5}),
        (torch.randn(B, H, S, T), {}),
        (torch.randn(1, H, 1, T, dtype=torch.float64), {"softcap": 1.5}),
    ],
    ids=["all", "bool", "bool-sinks", "padding-softcap", "float", "float64-softcap"],
)  # fmt: skip
def test_masks(seen: Tensor | None, options: dict[str, Any]) -> None:
    q, k, v = _heads()
    out, weights = ours.attention(MODULE, q, k, v, seen, **options)
    assert weights is None
    assert out.shape == (B, S, H, D)
    expected = _formula(q, k, v, seen, options.get("softcap"), options.get("s_aux"))
    assert_near(out, expected, "out", 1e-5)
    direction = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad((out * direction).sum(), (q, k, v)),
                         torch.autograd.grad((expected * direction).sum(), (q, k, v)), strict=True):  # fmt: skip
        assert_near(got, want, "gradient", 1e-5)


def test_causal_without_a_mask() -> None:
    """Square: causal. One query: sees all. More keys than queries: the empty end of a static cache."""
    triangle = torch.ones(S, S, dtype=torch.bool).tril()
    q, k, v = _heads(S, S)
    assert_near(ours.attention(MODULE, q, k, v, None)[0], _formula(q, k, v, triangle), "square", 1e-5)
    q, k, v = _heads(1, T)
    assert_near(ours.attention(MODULE, q, k, v, None)[0], _formula(q, k, v, None), "one query", 1e-5)
    q, k, v = _heads(S, T)
    expected = _formula(q, k[:, :, :S], v[:, :, :S], triangle)
    assert_near(ours.attention(MODULE, q, k, v, None)[0], expected, "empty end", 1e-5)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
def test_position_bias(kind: str) -> None:
    q, k, v = _heads(S, S)
    bias = torch.randn(1, H, S, S, requires_grad=True)
    seen = {"bool": _some(B, 1, S, S), "float": torch.randn(B, 1, S, S)}.get(kind)
    out, _ = ours.attention(MODULE, q, k, v, seen, is_causal=kind == "causal", position_bias=bias)
    shown = torch.ones(S, S, dtype=torch.bool).tril() if kind == "causal" else seen
    if shown is None:
        total = bias
    else:
        total = bias.masked_fill(~shown, float("-inf")) if shown.dtype == torch.bool else bias + shown
    expected = _formula(q, k, v, total)
    assert_near(out, expected, kind, 1e-5)
    assert_near(*(torch.autograd.grad(o.square().sum(), bias)[0] for o in (out, expected)), "gradient", 1e-5)  # type: ignore[misc]


@pytest.mark.parametrize("width", [None, 3])
def test_marked_masks(width: int | None) -> None:
    """What the kernel does in place of a marked mask is what the mask says; masks of more than that are not marked."""
    function = masking_utils.causal_mask_function
    if width is not None:
        function = masking_utils.sliding_window_causal_mask_function(width)
    options: dict[str, Any] = {"batch_size": B, "kv_length": T, "mask_function": function, "local_size": width}
    made = ours.mask(q_length=S, q_offset=T - S, **options)
    assert made is not None
    assert getattr(made, "_fastkern_left") == (-1 if width is None else width - 1)  # noqa: B009
    q, k, v = _heads()
    assert_near(ours.attention(MODULE, q, k, v, made)[0], _formula(q, k, v, made), "marked", 1e-5)
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[0, 0] = False
    chunks = masking_utils.and_masks(function, masking_utils.chunked_overlay(4, torch.zeros(B, dtype=torch.int)))
    for other in (
        ours.mask(q_length=S, q_offset=0, **{**options, "kv_length": T + 1}, allow_is_causal_skip=False),
        ours.mask(q_length=S, q_offset=T - S, **options, attention_mask=padding),
        ours.mask(q_length=S, q_offset=T - S, **{**options, "mask_function": chunks}),
    ):
        assert other is not None
        assert not hasattr(other, "_fastkern_left")


def test_packed_with_a_mask() -> None:
    """cu_seq_lens keep sequences apart whatever else hides."""
    q, k, v = (t[:1] for t in _heads(T, T))
    starts = torch.tensor([0, 3, T])
    together = torch.block_diag(torch.ones(3, 3), torch.ones(T - 3, T - 3)).bool()
    for seen in (_some(1, 1, T, T) | torch.eye(T, dtype=torch.bool), torch.randn(1, 1, T, T)):
        out, _ = ours.attention(MODULE, q, k, v, seen, cu_seq_lens_q=starts)
        shown = seen & together if seen.dtype == torch.bool else seen.masked_fill(~together, float("-inf"))
        assert_near(out, _formula(q, k, v, shown), "out", 1e-5)
    bias = torch.randn(1, H, T, T)
    out, _ = ours.attention(MODULE, q, k, v, None, cu_seq_lens_q=starts, position_bias=bias)
    assert_near(out, _formula(q, k, v, bias.masked_fill(~together.tril(), float("-inf"))), "position_bias", 1e-5)


def test_compiled() -> None:
    """One graph, masks included."""
    inputs = [_heads(S, S), None, _heads(S, T), _some(B, 1, S, T)]
    compiled = torch.compile(ours.attention, fullgraph=True, backend="eager")
    for heads, seen in zip(inputs[::2], inputs[1::2], strict=True):
        expected, _ = ours.attention(MODULE, *heads, seen)  # type: ignore[misc, arg-type]
        assert_near(compiled(MODULE, *heads, seen)[0], expected, "out", 1e-6)  # type: ignore[misc]


def test_dropout() -> None:
    q, k, v = _heads(S, S)
    torch.manual_seed(3)
    out, _ = ours.attention(MODULE, q, k, v, None, dropout=0.4)
    torch.manual_seed(3)
    expected = fastkern.flash_attn(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, dropout_p=0.4)
    assert torch.equal(out, expected)
    assert not torch.equal(out, ours.attention(MODULE, q, k, v, None)[0])


@pytest.mark.parametrize(
    ("seen", "options", "message"),
    [
        (torch.ones(B, T), {}, "attention_mask must broadcast to .* = .2, 4, 5, 7., got shape .2, 7."),
        (torch.ones(B, 1, S, T, dtype=torch.int64), {}, "attention_mask must be None or a bool or floating .*int64"),
        (torch.ones(B, 1, S, T + 1), {}, "attention_mask must have a last dimension of T = 7, got shape"),
        (object(), {}, "attention_mask must .*, got object"),
        (None, {"output_attentions": True}, 'output_attentions must be False: .*"eager"'),
        (None, {"indices": torch.zeros(1)}, "indices must be None"),
        (None, {"cu_seq_lens_q": torch.tensor([0, S])}, "cu_seq_lens_q must be None for a batch of several rows"),
    ],
)
def test_refusals(seen: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"transformers.attention: {message}"):
        ours.attention(MODULE, *_heads(), seen, **options)
