# SPDX-License-Identifier: Apache-2.0
"""A linear layer of a gated activation that is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastkern
import pytest
import torch
import torch.nn.functional as F
from fastkern.ops._gated_linear import GATED, gated_linear
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": fastkern.swiglu,
    "geglu": fastkern.geglu,
    "geglu_tanh": lambda a, b: fastkern.geglu(a, b, approximate="tanh"),
    "reglu": fastkern.reglu,
}
HIDDEN = 37


def made(device: str, dtype: torch.dtype, packed: bool, bias: bool) -> tuple[torch.nn.Linear, Tensor, Tensor | None]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(HIDDEN, 11, bias, device=device, dtype=dtype)
    shapes = [(3, 5, 2 * HIDDEN)] if packed else [(3, 5, HIDDEN)] * 2
    a, *b = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes)
    return layer, a, b[0] if b else None


def gradients(y: Tensor, *wanted: Tensor | None, **more: Any) -> tuple[Tensor, ...]:
    dy = torch.linspace(-1, 2, y.numel(), device=y.device).view_as(y).to(y.dtype)
    found = torch.autograd.grad(y, [t for t in wanted if t is not None], dy, **more)
    assert not any(g.isnan().any() for g in found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("name", GATED)
def test_same_bits(name: str, packed: bool, bias: bool, dtype: torch.dtype, device: str) -> None:
    layer, a, b = made(device, dtype, packed, bias)
    operands = (a, b, layer.weight, layer.bias)
    y, kept = gated_linear(name, a, b, layer), layer(ACTIVATIONS[name](a, b))
    assert "GatedLinear" in type(y.grad_fn).__name__
    assert torch.equal(y, kept)
    for one, other in zip(gradients(y, *operands, retain_graph=True), gradients(kept, *operands), strict=True):
        assert torch.equal(one, other)
    again = gradients(y, a, b)  # the second time through the same graph
    assert torch.equal(again[0], gradients(layer(ACTIVATIONS[name](a, b)), a)[0])
    without = gated_linear(name, a, b, layer, with_bias=False)
    assert torch.equal(without, F.linear(ACTIVATIONS[name](a, b), layer.weight))


@pytest.mark.parametrize("module", ["GatedMLP", "patched"])
def test_activation_is_not_kept(module: str) -> None:
    if module == "GatedMLP":
        mlp: Any = fastkern.nn.SwiGLU(8, HIDDEN)
    else:
        transformers = pytest.importorskip("transformers")
        from transformers.models.llama.modeling_llama import LlamaMLP

        mlp = LlamaMLP(transformers.LlamaConfig(hidden_size=8, num_attention_heads=1, intermediate_size=HIDDEN))
        assert "swiglu" in str(fastkern.patch(mlp))
    kept: list[tuple[int, ...]] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        mlp(torch.randn(5, 8)).sum().backward()
    middles = [shape for shape in kept if shape in ((5, HIDDEN), (5, 2 * HIDDEN))]
    assert middles == ([(5, 2 * HIDDEN)] if module == "GatedMLP" else [(5, HIDDEN)] * 2)


def test_part_of_the_gradients(device: str) -> None:
    layer, a, b = made(device, torch.float32, packed=False, bias=True)
    assert b is not None
    for frozen in (a, b, layer.bias):
        frozen.requires_grad_(False)
        y = gated_linear("swiglu", a, b, layer)
        wanted = [t for t in (a, b, layer.weight, layer.bias) if t.requires_grad]
        for one, other in zip(gradients(y, *wanted), gradients(layer(fastkern.swiglu(a, b)), *wanted), strict=True):
            assert torch.equal(one, other)
        frozen.requires_grad_(True)
    layer.weight.requires_grad_(False)  # nothing to compute it again for
    assert "GatedLinear" not in type(gated_linear("swiglu", a, b, layer).grad_fn).__name__


def test_second_derivatives(device: str) -> None:
    layer, a, b = made(device, torch.float32, packed=False, bias=True)
    assert b is not None
    found = []
    for y in (gated_linear("geglu", a, b, layer), layer(F.gelu(a) * b)):
        first = gradients(y, a, b, layer.weight, create_graph=True)
        total = sum((g * g).sum() for g in first)
        assert isinstance(total, Tensor)
        found.append(torch.autograd.grad(total, (a, b, layer.weight)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_whatever_looks_on_is_called(device: str) -> None:
    """Hooks, layers that are more than a linear one, layers whose forward was replaced."""

    class Scaled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, a, b = made(device, torch.float32, packed=True, bias=True)
    wanted = layer(fastkern.swiglu(a, b))
    seen: list[Any] = []
    with layer.register_forward_hook(lambda *given: seen.append(given)):
        assert torch.equal(gated_linear("swiglu", a, b, layer), wanted)
    assert len(seen) == 1
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda *given: seen.append(given)):
        gated_linear("swiglu", a, b, layer)
    assert len(seen) == 2
    scaled = Scaled(HIDDEN, 11, device=device)
    scaled.load_state_dict(layer.state_dict())
    torch.testing.assert_close(gated_linear("swiglu", a, b, scaled), 2 * wanted)
    layer.forward = lambda x: x + 1  # type: ignore[method-assign]
    assert torch.equal(gated_linear("swiglu", a, b, layer), fastkern.swiglu(a, b) + 1)


def test_other_ways_to_call(device: str) -> None:
    """Autocast, checkpoints, torch.func, torch.compile's tracing: what the layer itself gives."""
    layer, a, b = made(device, torch.float32, packed=False, bias=True)
    assert b is not None
    with torch.autocast(device, torch.bfloat16):
        half = (a.bfloat16(), b.bfloat16())
        y, kept = gated_linear("swiglu", *half, layer), layer(fastkern.swiglu(*half))
    assert "GatedLinear" in type(y.grad_fn).__name__
    for one, other in zip(
        (y, *gradients(y, a, b, layer.weight, layer.bias)),
        (kept, *gradients(kept, a, b, layer.weight, layer.bias)),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype

    plain = gradients(layer(fastkern.swiglu(a, b)), a, b)
    again: Any = checkpoint(lambda a, b: gated_linear("swiglu", a, b, layer), a, b, use_reentrant=False)
    assert all(torch.equal(*pair) for pair in zip(gradients(again, a, b), plain, strict=True))
    by_func = torch.func.grad(lambda a: gated_linear("swiglu", a, b, layer).sum())(a.detach())
    torch.testing.assert_close(by_func, torch.autograd.grad(layer(fastkern.swiglu(a, b)).sum(), a)[0])
    traced = torch.compile(lambda a, b: gated_linear("swiglu", a, b, layer), backend="aot_eager", fullgraph=True)
    assert all(torch.equal(*pair) for pair in zip(gradients(traced(a, b), a, b), plain, strict=True))


def test_changed_in_between_is_refused() -> None:
    layer, a, b = made("cpu", torch.float32, packed=False, bias=True)
    gate = a * 1
    y = gated_linear("swiglu", gate, b, layer)
    gate.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
