# SPDX-License-Identifier: Apache-2.0
"""fastkern.patch: what is replaced and what is left, that results stay, and that unpatch leaves no trace."""

from __future__ import annotations

import collections
import copy
import inspect
import io
import logging
import pickle
from typing import Any

import fastkern
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.24", reason="needs transformers >= 5.24")

from fastkern.integrations import _patched, _rotary
from fastkern.integrations import transformers as classes
from harness.hf_models import DECODERS, assert_near, build, config_of, inputs_of, run
from transformers.models.llama import modeling_llama

# Replaced in each model of two layers: what, how often.
REPLACED = {
    "llama": {"norm": 5, "mlp": 2, "attention": 1, "loss": 1, "rotary": 2},
    "qwen3": {"norm": 9, "mlp": 2, "attention": 1, "loss": 1, "rotary": 2},
    "mistral": {"norm": 5, "mlp": 2, "attention": 1, "loss": 1, "rotary": 2},
    "gemma3": {"norm": 13, "mlp": 2, "attention": 1, "loss": 1, "rotary": 2},
    "gemma2": {"norm": 9, "mlp": 2, "attention": 1, "rotary": 2},
    "phi3": {"norm": 5, "mlp": 2, "attention": 1, "loss": 1, "rotary": 2},
    "gpt2": {"norm": 5, "attention": 1, "loss": 1},
    "gpt_oss": {"norm": 5, "attention": 1, "loss": 1, "rotary": 2},
    "bert": {"norm": 6, "attention": 1},
    "vit": {"norm": 5, "attention": 1},
}

LEFT = {"gemma2": ["loss"], "gpt_oss": ["mlp", "mlp"]}


def _trace(model: nn.Module) -> Any:
    """Everything about a model that patching might leave behind."""
    modules = [(path, type(m), sorted(m.__dict__), type(m).forward) for path, m in model.named_modules()]
    config: Any = model.config
    return modules, list(model.state_dict()), config._attn_implementation_internal, config.to_dict()


@pytest.mark.parametrize("name", REPLACED)
def test_models(name: str) -> None:
    model, inputs = build(name), inputs_of(name)
    before, trace, signature = run(model, inputs), _trace(model), inspect.signature(model.forward)
    report = fastkern.patch(model, return_logits=True)
    assert collections.Counter(e.what for e in report.replaced) == REPLACED[name]
    assert [e.what for e in report.left] == LEFT.get(name, [])
    assert list(model.state_dict()) == trace[1]
    assert inspect.signature(model.forward) == signature
    loss, logits, grads = run(model, inputs)
    assert_near(loss, before[0], "loss")
    assert_near(logits, before[1], "logits")
    largest = max(float(g.abs().max()) for g in before[2].values())
    assert grads.keys() == before[2].keys()
    for key, grad in grads.items():
        assert float((grad - before[2][key]).abs().max()) <= 3e-5 * largest, key

    fastkern.unpatch(model)
    assert _trace(model) == trace
    after = run(model, inputs)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert all(torch.equal(after[2][key], grad) for key, grad in before[2].items())


@pytest.mark.parametrize("name", [name for name in DECODERS if "loss" in REPLACED[name]])
def test_loss_without_logits(name: str) -> None:
    """In training: no logits, the same loss and gradients; in evaluation logits."""
    model, inputs = build(name), inputs_of(name)
    model.zero_grad()
    expected = model(**inputs, num_items_in_batch=11).loss
    expected.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    fastkern.patch(model, norm=False, mlp=False, attention=False, rotary=False)
    out = model(**inputs, num_items_in_batch=11)
    assert out.logits is None
    out.loss.backward()
    assert_near(out.loss, expected, "loss")
    largest = max(float(g.abs().max()) for g in grads.values())
    for key, parameter in model.named_parameters():
        assert float((parameter.grad - grads[key]).abs().max()) <= 2e-5 * largest, key
    assert model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.shape[-1] == 97
    assert model.eval()(**inputs).logits.shape[-1] == 97
    fastkern.unpatch(model)
    assert _trace(model) == _trace(build(name).eval())


def test_loss_in_other_calls() -> None:
    """Tuples, another loss function, an adapter around the head, a failing call."""
    model, inputs = build("llama"), inputs_of("llama")
    fastkern.patch(model)
    expected = model(**inputs).loss
    assert [t.shape for t in model(**inputs, return_dict=False, use_cache=False)] == [()]
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(labels=inputs["labels"])
    assert model(input_ids=inputs["input_ids"]).logits.shape[-1] == 97
    model.loss_function = lambda logits, **kwargs: logits.square().sum()
    assert_near(model(**inputs).loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
                .logits.square().sum(), "loss")  # fmt: skip
    del model._loss_function

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Any:
            return self.base(x)

    model.lm_head = Adapter(model.lm_head)
    out = model(**inputs)
    assert out.logits.shape[-1] == 97
    assert_near(out.loss, expected, "loss")


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_16_bits(autocast: bool) -> None:
    """No farther from float32 than the model as it was, in logits and gradients, and the same loss without logits."""
    inputs, errors, losses = inputs_of("gemma3"), [], []
    _, reference, grads = run(build("gemma3"), inputs)
    for patched in (False, True, True):
        model = build("gemma3") if autocast else build("gemma3").bfloat16()
        if patched:
            fastkern.patch(model, return_logits=len(errors) < 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**inputs)
        out.loss.backward()
        losses.append(out.loss.detach())
        rows = inputs["attention_mask"].bool()
        parts = [(p.grad, grads[k]) for k, p in model.named_parameters()]
        if out.logits is not None:
            parts.append((out.logits[rows], reference))
        squares = [float((ours.detach().float() - want).square().sum() / want.square().sum()) for ours, want in parts]
        assert all(square == square for square in squares)
        errors.append(squares)
    assert out.logits is None
    assert torch.equal(losses[1], losses[2])
    for name, before, *after in zip([*grads, "logits"], *errors[:2], strict=True):
        assert max(after) <= 2**2 * before + 1e-5, name


def test_training_curve() -> None:
    """Fifty steps: the same losses."""
    curves = []
    for patched in (False, True):
        model, inputs = build("llama"), inputs_of("llama")
        if patched:
            fastkern.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.3 * curves[0][0]
    assert_near(curves[1], curves[0], "losses", 1e-3)


def test_compiled_model() -> None:
    """One graph, the loss without logits and the rotary positions included."""
    model, inputs = build("llama"), inputs_of("llama")
    expected = run(model, inputs)
    fastkern.patch(model)
    model.zero_grad()
    calls: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    out = torch.compile(model, fullgraph=True, backend=backend)(**inputs)
    assert sum("fastkern.rope" in call for call in calls) == 2, calls
    assert out.logits is None
    out.loss.backward()
    assert_near(out.loss, expected[0], "loss")
    assert_near(model.lm_head.weight.grad, expected[2]["lm_head.weight"], "gradient")


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_generation(name: str) -> None:
    inputs = {k: v for k, v in inputs_of(name).items() if k != "labels"}
    model = build(name).eval()
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    fastkern.patch(model)
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_copies() -> None:
    """A copy, a pickle and a checkpoint of a patched model; each is unpatched by itself."""
    model, inputs = build("llama"), inputs_of("llama")
    before = run(model, inputs)[1]
    fastkern.patch(model, return_logits=True)
    expected = run(model, inputs)[1]
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert torch.equal(run(other, inputs)[1], expected)
        fastkern.unpatch(other)
        assert torch.equal(run(other, inputs)[1], before)
    assert torch.equal(run(model, inputs)[1], expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    build("llama").load_state_dict(torch.load(file, weights_only=True))


def test_gradient_checkpointing() -> None:
    model, inputs = build("llama"), inputs_of("llama")
    fastkern.patch(model, return_logits=True)
    expected = run(model, inputs)
    model.activation_checkpointing_enable()
    again = run(model, {**inputs, "use_cache": False})  # type: ignore[dict-item]
    assert torch.equal(again[0], expected[0])
    assert all(torch.equal(again[2][key], grad) for key, grad in expected[2].items())


def test_rotary(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One model alone; with a cache and a projection of another's; what computes something else is left."""
    file, inputs = modeling_llama, inputs_of("llama")
    own, other = file.apply_rotary_pos_emb, build("llama")
    model = build("llama")
    only: dict[str, Any] = {"norm": False, "mlp": False, "attention": False, "loss": False}
    fastkern.patch(model, **only)
    assert file.apply_rotary_pos_emb is own
    before, after = run(other, inputs), run(model, inputs)
    assert not torch.equal(before[1], after[1])
    assert_near(after[1], before[1], "logits")
    turned: list[int] = []
    monkeypatch.setattr(_rotary, "rope", lambda *given, **options: turned.append(1) or fastkern.rope(*given, **options))
    for m in (model, other):
        m.eval()
        projection = m.model.layers[0].self_attn.q_proj
        m.model.layers[0].self_attn.q_proj = nn.Sequential(projection, nn.Tanh())
    ids = inputs["input_ids"][1:]
    cached = model(ids[:, :9]).past_key_values
    assert_near(model(ids[:, 9:], past_key_values=cached).logits, other(ids).logits[:, 9:], "cache")
    assert len(turned) == 4
    _patched._said.clear()
    with caplog.at_level(logging.WARNING, "fastkern"):
        model.double()(ids)
    assert len(turned) == 4
    assert "apply_rotary_pos_emb: it is called itself for torch.float64" in caplog.text

    def left(why: str) -> None:
        assert {e.why for e in fastkern.patch(build("llama"), **only).left} == {why}

    monkeypatch.setattr(file, "apply_rotary_pos_emb", lambda q, k, cos, sin: own(q, k, cos, -sin))
    left("its rotary function computes something else")
    monkeypatch.setattr(file, "apply_rotary_pos_emb", own)
    tables = file.LlamaRotaryEmbedding.forward
    monkeypatch.setattr(file.LlamaRotaryEmbedding, "forward",
                        lambda *given: tuple(t + torch.arange(t.shape[-1]) for t in tables(*given)))  # fmt: skip
    left("its tables are not of an angle for each pair")


def test_again_and_in_parts() -> None:
    model = build("llama")
    first = fastkern.patch(model, mlp=False, attention=False, loss=False, rotary=False, exclude=["model.layers.0.*"])
    assert {e.path for e in first.replaced} == {
        "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm"
    }  # fmt: skip
    assert {e.why for e in first.left} == {"excluded"}
    second = fastkern.patch(model)
    wanted = {"norm": 2, "mlp": 2, "attention": 1, "loss": 1, "rotary": 2}
    assert collections.Counter(e.what for e in second.replaced) == wanted
    third = fastkern.patch(model)
    assert not third.replaced
    assert {e.why for e in third.left} == {"is patched already"}
    assert "left: is patched already" in str(third)
    fastkern.unpatch(model)
    assert not any(isinstance(m, _patched.Patched) for m in model.modules())
    fastkern.unpatch(model)


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"patch: model must be a torch\.nn\.Module, got dict"):
        fastkern.patch({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unpatch: model must be a torch\.nn\.Module, got int"):
        fastkern.unpatch(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="exclude must be several patterns, got the string 'x'"):
        fastkern.patch(nn.Linear(2, 2), exclude="x")
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    fastkern.patch(model)
    model[1].__class__ = type("Sharded", (type(model[1]),), {})
    with pytest.raises(RuntimeError, match=r"the class of 1 must be .*, got Sharded"):
        fastkern.unpatch(model)
    assert isinstance(model[0], _patched.Patched)


def test_classes() -> None:
    """Before a model is built, and gone again for the next one."""
    before, inputs = build("llama"), inputs_of("llama")
    names = classes.patch_classes(config_of("llama"))
    try:
        assert set(names) == {"LlamaRMSNorm", "LlamaMLP"}
        assert classes.patch_classes(config_of("llama")) == []
        model = build("llama")
    finally:
        classes.unpatch_classes(names)
    assert sum(isinstance(m, _patched.Patched) for m in model.modules()) == 7
    expected = run(before, inputs)
    assert_near(run(model, inputs)[1], expected[1], "logits")
    fastkern.unpatch(model)
    assert torch.equal(run(model, inputs)[1], expected[1])
    assert not any(isinstance(m, _patched.Patched) for m in build("llama").modules())


# ---- modules of no one's library -------------------------------------------------------------------------------------


class Norm(nn.Module):
    """A norm by a formula of x, weight and eps."""

    def __init__(self, formula: Any, n: int = 16) -> None:
        super().__init__()
        self.weight, self.eps, self.formula = nn.Parameter(torch.ones(n)), 1e-5, formula

    def forward(self, x: Tensor) -> Any:
        return self.formula(x, self.weight, self.eps)


def _rms(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


NORMS = {
    "rms": (lambda x, w, eps: w * _rms(x.float(), eps).to(x.dtype), ("rms", 0.0, True)),
    "one plus": (lambda x, w, eps: ((1 + w.float()) * _rms(x.float(), eps)).to(x.dtype), ("rms", 1.0, False)),
    "eps outside": (lambda x, w, eps: w * x / (x.square().mean(-1, keepdim=True).sqrt() + eps), None),
    "no mean": (lambda x, w, eps: w * x * (x.square().sum(-1, keepdim=True) + eps).rsqrt(), None),
    "two plus": (lambda x, w, eps: (2 + w) * _rms(x, eps), None),
    "16 bits": (lambda x, w, eps: _rms(x.bfloat16(), eps).to(x.dtype) * w, None),
    "a pair": (lambda x, w, eps: (w * _rms(x, eps), x), None),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_known_by_what_they_compute(name: str) -> None:
    formula, wanted = NORMS[name]
    model = nn.ModuleDict({"norm": Norm(formula)})
    [entry] = fastkern.patch(model).entries
    if wanted is None:
        assert entry.by is None
        assert entry.why == "computes something else"
        assert type(model["norm"]) is Norm
        return
    assert entry.by == f"fastkern.{wanted[0]}_norm"
    recipe = model["norm"]._fastkern_recipe
    assert (recipe.kind, recipe.weight_offset, recipe.promote) == wanted
    for x_type in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 16).to(x_type)
        model["norm"].eps = 0.5  # read at every call
        expected = formula(x, model["norm"].weight, 0.5)
        assert model["norm"](x).dtype == expected.dtype
        assert_near(model["norm"](x), expected, name, 1e-2 if x_type == torch.bfloat16 else 1e-6)


def test_torch_norms() -> None:
    """Every kind of torch's; those over several dimensions, channels or batches stay."""
    model = nn.ModuleDict({
        "layer": nn.LayerNorm(12), "no bias": nn.LayerNorm(12, bias=False),
        "bare": nn.LayerNorm(12, elementwise_affine=False), "rms": nn.RMSNorm(12), "rms eps": nn.RMSNorm(12, eps=1e-3),
        "two": nn.LayerNorm((3, 12)), "group": nn.GroupNorm(3, 12), "batch": nn.BatchNorm1d(12),
        "f64": nn.LayerNorm(12).double(), "meta": nn.LayerNorm(12, device="meta"),
    })  # fmt: skip
    x = torch.randn(2, 3, 12)
    names = ("layer", "no bias", "bare", "rms", "rms eps")
    expected = {name: model[name](x) for name in names}
    report = fastkern.patch(model)
    assert {e.path for e in report.replaced} == set(names)
    for name in names:
        assert_near(model[name](x), expected[name], name, 1e-6)
    reasons = {e.path: e.why for e in report.left}
    assert reasons["two"] == "is over several dimensions"
    assert reasons["f64"] == "has weights of torch.float64"
    assert "meta device" in reasons["meta"]


class Gated(nn.Module):
    def __init__(self, act: Any, names: tuple[str, ...] = ("gate", "up", "down"), sizes: tuple[int, int] = (8, 10)):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(*(sizes[::-1] if name == names[-1] else sizes)))
        self.act, self.names = act, names

    def forward(self, x: Tensor) -> Any:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act(gate(x)) * up(x))


class Dropping(Gated):
    def forward(self, x: Tensor) -> Any:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize(
    ("module", "by"),
    [
        (Gated(nn.SiLU()), "fastkern.swiglu"),
        (Gated(nn.ReLU(), ("w1", "w3", "w2")), "fastkern.reglu"),
        (Gated(nn.GELU("tanh"), ("b", "a", "c"), (8, 8)), "fastkern.geglu"),
        (Gated(nn.functional.gelu, sizes=(8, 6)), "fastkern.geglu"),
        (Gated(nn.Sigmoid()), None),
        (Gated(nn.Dropout(0.5)), None),
        (Dropping(nn.SiLU()).eval(), None),
    ],
    ids=["silu", "relu", "square", "function", "sigmoid", "dropout", "in training"],
)
def test_mlps_are_known_by_what_they_compute(module: nn.Module, by: str | None) -> None:
    module = copy.deepcopy(module)
    x = torch.randn(3, 8)
    expected = module(x)
    state = torch.get_rng_state()
    [entry] = fastkern.patch(module).entries
    assert torch.equal(torch.get_rng_state(), state)
    assert entry.by == by
    if by is not None:
        assert_near(module(x), expected, by, 1e-6)


def test_projections_and_hooks_are_called() -> None:
    """Those that replace a projection before or after, and the hooks of everything."""

    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
            self.a = nn.Linear(base.in_features, 2)
            self.b = nn.Linear(2, base.out_features)

        def forward(self, x: Tensor) -> Any:
            return self.base(x) + self.b(self.a(x))

    model = Gated(nn.SiLU())
    model.gate = LowRank(model.gate)
    x, seen = torch.randn(3, 8), []
    for part in (model, model.up, model.down):
        part.register_forward_hook(lambda *given: seen.append(1))
    [entry] = fastkern.patch(model).replaced
    assert not seen
    assert entry.by == "fastkern.swiglu"
    model.up = LowRank(model.up)
    out = model(x)
    assert len(seen) == 3
    assert_near(out, Gated.forward(model, x), "out", 1e-6)

    hooked = Gated(nn.SiLU())
    hooked.act.register_forward_hook(lambda *given: None)
    [entry] = fastkern.patch(hooked).left
    assert entry.why == "act has hooks, which would not run"
    moved = nn.LayerNorm(4)
    moved.forward = lambda x: x  # type: ignore[method-assign]
    [entry] = fastkern.patch(moved).left
    assert "replaced on the object" in entry.why


def test_odd_calls_take_the_old_forward(caplog: pytest.LogCaptureFixture) -> None:
    norm = nn.LayerNorm(4)
    fastkern.patch(norm)
    x = torch.randn(2, 4)
    _patched._said.clear()
    with caplog.at_level(logging.WARNING, "fastkern"):
        for _ in range(2):
            assert torch.equal(norm(input=x), nn.functional.layer_norm(x, (4,)))
    assert [r.getMessage() for r in caplog.records] == [
        "LayerNorm: its own forward is taken for a call with other arguments than one tensor"
    ]
    assert norm.double()(x.double()).dtype == torch.float64


def test_compiled() -> None:
    model = nn.Sequential(nn.RMSNorm(8), Gated(nn.SiLU()))
    x = torch.randn(3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = compiled(x)
    fastkern.patch(model)
    assert_near(compiled(x), expected, "out", 1e-6)
    fastkern.unpatch(model)
    assert torch.equal(compiled(x), expected)
