# SPDX-License-Identifier: Apache-2.0
"""Small transformers models with random weights, made from their configurations."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

transformers.logging.set_verbosity_error()

_DECODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWS = {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

# Name: class of the model, class of the configuration, what the configuration says.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 5}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_DECODER, **_WINDOWS, "query_pre_attn_scalar": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, **_WINDOWS, "attn_logit_softcapping": 2.0}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_DECODER, **_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {**_ENCODER, **_NO_DROPOUT, "vocab_size": 97}),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_ENCODER, **_NO_DROPOUT, "image_size": 12, "patch_size": 4, "num_labels": 3},
    ),
}  # fmt: skip

DECODERS = ("llama", "qwen3", "mistral", "gemma3", "gemma2", "phi3", "gpt2", "gpt_oss")
ENCODERS = ("bert", "vit")


def config_of(name: str) -> Any:
    """A configuration of its own: models that share one change each other's attention."""
    _, config, options = _MODELS[name]
    return getattr(transformers, config)(**copy.deepcopy(options))


@cache
def _weights(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = getattr(transformers, _MODELS[name][0])(config_of(name))
    moved = {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    if "lm_head.weight" in moved and model.config.tie_word_embeddings:
        moved["lm_head.weight"] = next(v for k, v in moved.items() if k.endswith(("embed_tokens.weight", "wte.weight")))
    return moved


def build(name: str, attention: str = "eager") -> Any:
    """The model with the same weights each time, norms away from one and zero; in training mode."""
    model = getattr(transformers, _MODELS[name][0])._from_config(config_of(name), attn_implementation=attention)
    model.load_state_dict(_weights(name))
    return model.train()


def inputs_of(name: str, length: int = 13) -> dict[str, Tensor]:
    """A batch of two with labels, the first entry padded on the left (on the right for an encoder)."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator), "labels": torch.tensor([0, 2])}
    ids = torch.randint(3, 97, (2, length), generator=generator)
    padding = torch.ones_like(ids)
    padding[0, -4:] = 0
    if name in DECODERS:
        padding = padding.flip(1)
    labels = ids.masked_fill(padding == 0, -100)
    labels[0, 4] = -100  # the last padded row sees nothing; what it would predict is no one's concern
    return {"input_ids": ids, "attention_mask": padding, "labels": labels}


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits where they count, gradients."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    logits = out.logits.detach()
    if "attention_mask" in inputs:
        logits = logits[inputs["attention_mask"].bool()]
    return out.loss.detach(), logits, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_near(ours: Tensor, reference: Tensor, what: str, limit: float = 2e-5) -> None:
    """Largest difference against the largest number of the reference."""
    assert bool(ours.isfinite().all()), f"{what}: not finite"
    error = float((ours.detach().float() - reference.detach().float()).abs().max())
    size = float(reference.detach().float().abs().max()) + 1e-6
    assert error <= limit * size, f"{what}: differs by {error:.3g} of {size:.3g}"
