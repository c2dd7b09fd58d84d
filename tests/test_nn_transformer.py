# SPDX-License-Identifier: Apache-2.0
"""Blocks beside the same in plain torch; whole transformers: loss, packing, decoding; Hugging Face's attentions."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastkern import nn
from harness.modules import assert_like, run, turned
from torch import Tensor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])

CONFIGS = {
    "llama": nn.TransformerConfig(16, 4, kv_heads=2, hidden=24),
    "gpt2": nn.TransformerConfig(16, 2, norm="layer", activation="gelu_tanh", bias=True, position="learned"),
    "bert": nn.TransformerConfig(
        16, 2, norm="layer", activation="gelu", bias=True, position="none", causal=False, norm_first=False
    ),
    "gpt-j": nn.TransformerConfig(16, 2, norm="layer", activation="gelu_tanh", bias=True, parallel=True),
    "t5": nn.TransformerConfig(16, 2, activation="geglu", position="none", cross_attention=True),
    "t5-behind": nn.TransformerConfig(
        16, 2, activation="gelu", cross_attention=True, norm_first=False, position="none"
    ),
}


class PlainBlock(torch.nn.Module):
    """The block written down with torch's modules; parameters have our names but for packed ones."""

    def __init__(self, config: nn.TransformerConfig) -> None:
        super().__init__()
        self.c, E, D = config, config.dim, config.dim // config.heads
        G = config.kv_heads or config.heads

        def norm() -> torch.nn.Module:
            return torch.nn.RMSNorm(E, 1e-6) if config.norm == "rms" else torch.nn.LayerNorm(E)

        def attention() -> torch.nn.ModuleDict:
            sizes = {"q_proj": (E, E), "k_proj": (E, G * D), "v_proj": (E, G * D), "o_proj": (E, E)}
            return torch.nn.ModuleDict({n: torch.nn.Linear(*size, config.bias) for n, size in sizes.items()})

        self.norm1, self.attn = norm(), attention()
        if config.cross_attention:
            self.norm_cross, self.cross_attn = norm(), attention()
        if not config.parallel:
            self.norm2 = norm()
        width, gated = config.mlp_width, config.activation in ("swiglu", "geglu")
        sizes = {"fc1": (E, width), "fc2": (width, E)}
        if gated:
            sizes = {"gate_proj": (E, width), "up_proj": (E, width), "down_proj": (width, E)}
        self.mlp = torch.nn.ModuleDict({n: torch.nn.Linear(*size, config.bias) for n, size in sizes.items()})

    def attend(self, m: torch.nn.ModuleDict, x: Tensor, source: Tensor, causal: bool, rotate: bool) -> Tensor:
        q, k, v = (m[n](t).unflatten(-1, (-1, self.c.dim // self.c.heads)) for n, t in
                   (("q_proj", x), ("k_proj", source), ("v_proj", source)))  # fmt: skip
        if rotate:
            q, k = (turned(t, torch.arange(x.shape[1])) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return m["o_proj"](out.transpose(1, 2).flatten(-2))

    def feed(self, x: Tensor) -> Tensor:
        if "fc1" in self.mlp:
            z = self.mlp["fc1"](x)
            return self.mlp["fc2"](F.gelu(z, approximate="tanh" if self.c.activation == "gelu_tanh" else "none"))
        act = F.silu if self.c.activation == "swiglu" else F.gelu
        return self.mlp["down_proj"](act(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        c, rotate = self.c, self.c.position == "rope"
        steps = [(self.norm1, lambda y: self.attend(self.attn, y, y, c.causal, rotate))]
        if memory is not None:
            steps += [(self.norm_cross, lambda y: self.attend(self.cross_attn, y, memory, False, False))]
        if c.parallel:
            y = self.norm1(x)
            return x + steps[0][1](y) + self.feed(y)
        for norm, step in [*steps, (self.norm2, self.feed)]:
            x = x + step(norm(x)) if c.norm_first else norm(x + step(x))
        return x


@DTYPES
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks(name: str, dtype: torch.dtype, device: str) -> None:
    config = CONFIGS[name]
    theirs = PlainBlock(config).to(device, dtype)
    ours = nn.TransformerBlock(config, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 16, device=device, dtype=dtype)
    memory = torch.randn(2, 5, 16, device=device, dtype=dtype) if config.cross_attention else None

    class Ours(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ours

        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            return self.block(x, memory=memory)

    inputs = [x] if memory is None else [x, memory]
    # a chain of 16-bit roundings: where the two round differently, either may be the lucky one
    slack = 2.0 if dtype == torch.float32 else 4.0
    assert_like(Ours(), theirs, *inputs, names=lambda name: name.removeprefix("block."), slack=slack)
    if config.norm_first and dtype == torch.float32:
        branch, residual = ours(x, defer=True, memory=memory)
        torch.testing.assert_close(branch + residual, ours(x, memory=memory))
    if not config.norm_first:
        with pytest.raises(RuntimeError, match="defer and residual need norm_first"):
            ours(x, defer=True, memory=memory)


def test_dropout_is_where_it_belongs() -> None:
    block = nn.TransformerBlock(nn.TransformerConfig(16, 2, dropout=1.0))
    x = torch.randn(2, 3, 16)
    assert torch.equal(block(x), x)  # all that blocks add is dropped, the stream is not
    assert not torch.equal(block.eval()(x), x)
    model = nn.Transformer(nn.TransformerConfig(16, 2, layers=2, vocab_size=11, dropout=1.0))
    tokens = torch.randint(11, (2, 3))
    assert not model(tokens).any()  # the embedding is, too
    assert model.eval()(tokens).any()


def small(**more: Any) -> nn.Transformer:
    config = nn.TransformerConfig(16, 4, layers=2, vocab_size=23, kv_heads=2, max_length=32, init_std=0.2)
    return nn.Transformer(replace(config, **more))


@pytest.mark.parametrize(
    "more",
    [
        {"qk_norm": True, "window": (4, 0), "logit_softcap": 5.0, "norm_offset": 1.0},
        {"norm": "layer", "activation": "gelu", "bias": True, "position": "learned", "tie_embeddings": False},
        {"norm_first": False, "sinks": True, "activation": "geglu"},
        {"cross_attention": True, "parallel": False},
    ],
    ids=["gemma", "gpt2", "behind", "memory"],
)
def test_decoding_is_the_whole_sequence(more: dict[str, Any], device: str) -> None:
    model = small(**more).to(device)
    tokens = torch.randint(23, (3, 6), device=device)
    lengths = torch.tensor([6, 2, 4], dtype=torch.int32, device=device)
    options = {"memory": torch.randn(3, 5, 16, device=device)} if model.config.cross_attention else {}
    made = model.generate(tokens, 4, lengths=lengths, **options)
    for i, n in enumerate(lengths.tolist()):
        row = tokens[i : i + 1, :n]
        mine = {name: value[i : i + 1] for name, value in options.items()}
        for following in made[i]:
            logits = model(row, **mine)[0, -1].detach()
            best = logits.max()
            assert logits[following] >= best - 1e-4  # the likeliest, or as good as that
            row = torch.cat([row, following.view(1, 1)], 1)
    cache = model.new_cache(3)
    first = model.prefill(tokens, cache, lengths, **options)
    torch.testing.assert_close(first[0], model(tokens[:1], **{k: v[:1] for k, v in options.items()})[0, -1])
    assert cache.lengths.tolist() == lengths.tolist()


def test_generate_options() -> None:
    model, tokens = small(), torch.randint(23, (2, 4))
    greedy = model.generate(tokens, 6)
    assert torch.equal(model.generate(tokens, 6, temperature=0.7, top_k=1), greedy)
    stopped = model.generate(tokens, 6, stop=int(greedy[0, 1]))
    ends = (stopped == greedy[0, 1]).int().argmax(1)
    assert torch.equal(stopped[0, : ends[0] + 1], greedy[0, : ends[0] + 1])
    assert (stopped[0, ends[0] :] == greedy[0, 1]).all()
    for arguments, message in (
        ((tokens, 0), "max_new_tokens must be at least 1, got 0"),
        ((tokens, 40), "max_new_tokens must leave the sequence within max_length, 32, got 44"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.generate(*arguments)
    with pytest.raises(RuntimeError, match=r"config.causal must be True for a cache, got False"):
        small(causal=False).new_cache(1)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_loss_and_packing(softcap: float) -> None:
    model = small(logit_softcap=softcap)
    tokens, targets = torch.randint(23, (2, 6)), torch.randint(23, (2, 6))
    targets[0, 2] = -100
    wanted = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, wanted)
    gradients = [torch.autograd.grad(each, list(model.parameters())) for each in (loss, wanted)]
    for (name, _), ours, theirs in zip(model.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    starts = torch.tensor([0, 6, 10], dtype=torch.int32)
    packed = torch.cat([tokens[0], tokens[1, :4]])
    torch.testing.assert_close(model(packed, cu_seqlens=starts)[6:], model(tokens[1:, :4])[0])
    assert model.embedding is not None
    assert model.lm_head is not None
    assert model.lm_head.weight is model.embedding.weight
    state = model.state_dict()
    state.pop("lm_head.weight")
    other = small(logit_softcap=softcap)
    other.load_state_dict(state)
    assert torch.equal(other(tokens), model(tokens))


def test_vectors_in_and_out() -> None:
    encoder = nn.Transformer(nn.TransformerConfig(16, 2, layers=2, causal=False, position="learned", max_length=8))
    x = torch.randn(2, 5, 16)
    assert encoder(x).shape == x.shape
    lengths = torch.tensor([5, 3], dtype=torch.int32)
    torch.testing.assert_close(encoder(x, seqused_k=lengths)[1, :3], encoder(x[1:, :3])[0])
    with pytest.raises(RuntimeError, match="targets must be None without a vocabulary"):
        encoder(x, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(RuntimeError, match="positions must be given with cu_seqlens and learned positions"):
        encoder(x[0], cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="memory must be None without cross_attention"):
        encoder(x, memory=x)
    for name, wrong in (("position", "sinus"), ("layers", 0), ("parallel", True)):
        with pytest.raises(RuntimeError, match=f"TransformerConfig: {name} must"):
            replace(nn.TransformerConfig(16, 2, norm_first=False), **{name: wrong})


def test_trains_under_autocast_and_copies() -> None:
    model = small(dropout=0.1, norm="layer", bias=True, activation="gelu", attention_dropout=0.1)
    tokens = torch.randint(23, (4, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0], losses
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens), model(tokens))
        other.load_state_dict(nn.unpacked_state_dict(model))
    empty = nn.Transformer(model.config, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert empty(tokens).isfinite().all()


def test_compiles_whole() -> None:
    model = small(qk_norm=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, targets = torch.randint(23, (2, 6)), torch.randint(23, (2, 6))
    ours, theirs = run(compiled, (tokens, targets)), run(model, (tokens, targets))
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# ---- Hugging Face's attentions ---------------------------------------------------------------------------------------


def _config(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=24, num_attention_heads=3, **more)


def test_huggingface_keys_and_refusals() -> None:
    config = _config(rotary_dim=4, attn_pdrop=0.0, resid_pdrop=0.0, attention_probs_dropout_prob=0.1)
    bert, gpt2, gptj = nn.BertSelfAttention(config), nn.GPT2Attention(config), nn.GPTJAttention(config)
    both = ("weight", "bias")
    assert list(bert.state_dict()) == [f"{n}.{kind}" for n in ("query", "key", "value") for kind in both]
    assert list(gpt2.state_dict()) == [f"{n}.{kind}" for n in ("c_attn", "c_proj") for kind in both]
    assert list(gptj.state_dict()) == [f"{n}_proj.weight" for n in ("q", "k", "v", "out")]
    x = torch.randn(2, 5, 24)
    assert not torch.equal(bert(x)[0], bert(x)[0])
    assert torch.equal(bert.eval()(x)[0], bert(x)[0])
    with pytest.raises(RuntimeError, match="BertSelfAttention: output_attentions must be None or False"):
        bert(x, output_attentions=True)
    with pytest.raises(RuntimeError, match="attention_mask must have two dimensions"):
        gptj(x, attention_mask=torch.ones(2, 5, 5))
    with pytest.raises(RuntimeError, match="config must have hidden_size or n_embd"):
        nn.GPT2Attention(SimpleNamespace())
    with pytest.raises(RuntimeError, match="encoder_hidden_states must be None without"):
        gpt2(x, encoder_hidden_states=x)
    short = x[:, :3]
    torch.testing.assert_close(gptj(x, attention_mask=torch.ones(2, 5))[0][:, :3], gptj(short)[0])  # causal besides


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gpt2-cross", "gptj"])
def test_like_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertSelfAttention
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJRotaryEmbedding

    size: dict[str, Any] = {"n_embd": 24, "n_head": 3, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    x, mask = torch.randn(2, 5, 24), torch.ones(2, 1, 5, 5).tril().log()
    mask[1, :, :, 0] = torch.finfo(torch.float32).min
    options: dict[str, Any] = {"attention_mask": mask}
    if kind == "bert":
        config = transformers.BertConfig(hidden_size=24, num_attention_heads=3, attention_probs_dropout_prob=0.0)
        theirs, ours = BertSelfAttention(config, layer_idx=0), nn.BertSelfAttention(config, layer_idx=0)
    elif kind == "gptj":
        config = transformers.GPTJConfig(rotary_dim=4, **size)
        theirs, ours = GPTJAttention(config, 0), nn.GPTJAttention(config, 0)
        ids = torch.tensor([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]])
        options["position_embeddings"] = GPTJRotaryEmbedding(config)(x, ids)
        alone = ours(x, attention_mask=mask, position_ids=ids)[0]
        torch.testing.assert_close(alone, ours(x, **options)[0], rtol=1e-5, atol=1e-6)
    else:
        config = transformers.GPT2Config(**size)
        crossing = {"is_cross_attention": kind == "gpt2-cross", "layer_idx": 0}
        theirs, ours = GPT2Attention(config, **crossing), nn.GPT2Attention(config, **crossing)
        if crossing["is_cross_attention"]:
            options = {"encoder_hidden_states": torch.randn(2, 7, 24)}
    config._attn_implementation = "eager"
    ours.load_state_dict(theirs.state_dict())
    outputs = [module(x, **options)[0] for module in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    if kind in ("bert", "gptj"):  # step by step with transformers' own cache
        caches = [transformers.DynamicCache() for _ in range(2)]
        for module, cache in zip((ours, theirs), caches, strict=True):
            for step in range(3):
                here = {k: tuple(t[:, step : step + 1] for t in v) for k, v in options.items() if k != "attention_mask"}
                out = module(x[:, step : step + 1], cache=cache, attention_mask=None, **here)[0]
            outputs.append(out)
        torch.testing.assert_close(*outputs[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", [{"norm_eps": 0.5}, {"rope_dim": 4}, {"rope_interleaved": True}], ids=str)
def test_numbers_of_a_configuration_reach_the_kernels(option: dict[str, Any], device: str) -> None:
    """The same weights under another number give something else."""
    sizes: dict[str, Any] = {"dim": 16, "heads": 2, "hidden": 32}
    plain = nn.TransformerBlock(nn.TransformerConfig(**sizes), device=device)
    other = nn.TransformerBlock(nn.TransformerConfig(**sizes, **option), device=device)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3)).to(device)
    assert (plain(x) - other(x)).abs().max() > 1e-4
