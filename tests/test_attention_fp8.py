# SPDX-License-Identifier: Apache-2.0
"""flash_attn_fp8: accuracy against float64 of what the 8-bit operands stand for, layouts, scales, refusals, tracing."""

from __future__ import annotations

import math
from typing import Any

import fastkern
import pytest
import torch
from fastkern.specs import _attention_formula as formula
from torch import Tensor

F8 = torch.float8_e4m3fn
SCALES = ("q_scale", "k_scale", "v_scale")


def _to_f8(values: Tensor) -> Tensor:
    """Beyond 448 torch gives 448 or NaN, as the release and the machine are."""
    return values.clamp(-448, 448).to(F8)


@pytest.fixture(autouse=True)
def _capable(request: pytest.FixtureRequest) -> None:
    on_cuda = "device" not in request.fixturenames or request.getfixturevalue("device") == "cuda"
    if on_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("on CUDA for compute capability 9.0 alone")


def _made(device: str, *sizes: int, group: int = 2, dv: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Operands of B, S, T, H, D that use the range of the type, and their scales."""
    B, S, T, H, D = sizes
    torch.manual_seed(seed)

    def quantised(*shape: int) -> tuple[Tensor, Tensor]:
        values = torch.randn(shape)
        scale = values.abs().amax((1, 3)) / 448  # (B, heads)
        return _to_f8(values / scale[:, None, :, None]).to(device), scale.to(device)

    G = H // group
    k, k_scale = quantised(B, T, G, D)
    v, v_scale = quantised(B, T, G, D if dv is None else dv)
    q_scale = (torch.rand(B, G) + 0.5) / 100
    q = _to_f8(torch.randn(B, S, H, D) / q_scale.repeat_interleave(group, 1)[:, None, :, None])
    return {
        "q": q.to(device), "k": k, "v": v, "q_scale": q_scale.to(device), "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip


def _numbers(inputs: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as what they stand for."""
    found = []
    for name in "qkv":
        t, scale = inputs[name].to(dtype), inputs[f"{name}_scale"].to(dtype)
        found.append(t * scale.repeat_interleave(t.shape[2] // scale.shape[1], 1)[:, None, :, None])
    return found


def _yardstick(inputs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """What the same operands give in bfloat16 or, on CUDA, with weights in 8 bits as FlashAttention-3 has them."""
    q, k, v = _numbers(inputs, torch.float32)
    if q.device.type == "cpu":
        return formula.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)[0]
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * options.get("scale", 1 / math.sqrt(q.shape[-1]))
    mask = {name: options[name] for name in ("causal", "window_left", "window_right", "top_left") if name in options}
    scores = scores.masked_fill(~formula.visible(q, k, **mask), -math.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(-1e30)
    weights = torch.exp(scores - top) * 256
    out = torch.einsum("bhst,bthd->bshd", weights.to(F8).float(), v)
    return (out / weights.sum(-1).clamp_min(1).transpose(1, 2)[..., None]).bfloat16()


CASES: tuple[tuple[tuple[int, ...], dict[str, Any], dict[str, Any]], ...] = (
    ((1, 1, 1, 2, 16), {}, {}),
    ((2, 65, 130, 4, 64), {"group": 2}, {"causal": True}),
    ((1, 130, 257, 6, 128), {"group": 3}, {"window_left": 60, "window_right": 5}),
    ((2, 70, 90, 2, 48), {"dv": 80, "group": 1}, {"causal": True, "top_left": True, "scale": 0.3}),
    ((1, 100, 140, 2, 256), {"group": 1}, {"causal": True}),
    ((1, 40, 3000, 1, 128), {"group": 1}, {"scale": 0.05}),
)


@pytest.mark.parametrize(("sizes", "made", "options"), CASES, ids=lambda case: str(case) if case else "-")
def test_accuracy(device: str, sizes: tuple[int, ...], made: dict[str, Any], options: dict[str, Any]) -> None:
    inputs = _made(device, *sizes, **made)
    said = {name: options[name] for name in ("causal", "scale") if name in options}
    window = (options.get("window_left", -1), options.get("window_right", -1))
    align = "top_left" if options.get("top_left") else "bottom_right"
    out, lse = fastkern.flash_attn_fp8(**inputs, **said, window=window, causal_align=align, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()
    truth, lse_truth = formula.attention(*_numbers(inputs, torch.float64), **options)
    error = (out.double() - truth).abs()
    allowed = (_yardstick(inputs, options).double() - truth).abs().max()
    assert error.max() <= 2 * allowed + 2**-8 * truth.abs().max()
    assert error.pow(2).mean().sqrt() <= (0.02 if device == "cpu" else 0.06) * truth.pow(2).mean().sqrt() + 1e-6
    seen = lse_truth > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert (lse.double() - lse_truth)[seen].abs().max() <= (1e-4 if device == "cpu" else 1e-2)


def test_sinks_and_negative_scales(device: str) -> None:
    inputs = _made(device, 2, 33, 70, 4, 64)
    inputs["q_scale"] = -inputs["q_scale"]
    sinks = torch.tensor([1.0, -2.0, 0.5, 3.0], device=device)
    out = fastkern.flash_attn_fp8(**inputs, sinks=sinks)
    truth, _ = formula.attention(*_numbers(inputs, torch.float64), sinks=sinks.double())
    assert (out.double() - truth).pow(2).mean() <= 0.06**2 * truth.pow(2).mean()


def test_scales_of_all_shapes(device: str) -> None:
    inputs = _made(device, 3, 20, 40, 4, 32)
    plain = {name: inputs[name] for name in "qkv"}
    ones = {name: torch.ones(3, 2, device=device) for name in SCALES}
    scale = 1e-3
    first = fastkern.flash_attn_fp8(**plain, **ones, scale=scale)
    assert torch.equal(first, fastkern.flash_attn_fp8(**plain, scale=scale))
    heads = torch.tensor([0.5, 2.0], device=device)
    of_entries = fastkern.flash_attn_fp8(**plain, **{**ones, "k_scale": heads.expand(3, 2)}, scale=scale)
    assert torch.equal(of_entries, fastkern.flash_attn_fp8(**plain, k_scale=heads, scale=scale))
    assert torch.equal(of_entries, fastkern.flash_attn_fp8(**plain, q_scale=heads, scale=scale))
    strided = torch.stack([heads, -heads], 1)[:, 0]
    assert torch.equal(of_entries, fastkern.flash_attn_fp8(**plain, k_scale=strided, scale=scale))
    twice = fastkern.flash_attn_fp8(**plain, v_scale=torch.tensor(2.0, device=device), scale=scale)
    assert torch.equal(twice, 2 * first)


def test_layouts(device: str) -> None:
    inputs = _made(device, 2, 40, 60, 4, 32)
    expected = fastkern.flash_attn_fp8(**inputs, causal=True)
    heads_first = {n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    assert torch.equal(expected, fastkern.flash_attn_fp8(**{**inputs, **heads_first}, causal=True))
    columns = {n: inputs[n].mT.contiguous().mT for n in "qkv"}
    assert torch.equal(expected, fastkern.flash_attn_fp8(**{**inputs, **columns}, causal=True))
    moved = {}
    for n in "qkv":
        t = inputs[n]
        memory = torch.empty(t.numel() + 3, dtype=torch.uint8, device=device).view(F8)[3:]
        moved[n] = memory.copy_(t.flatten()).view(t.shape)
    assert torch.equal(expected, fastkern.flash_attn_fp8(**{**inputs, **moved}, causal=True))
    alone = fastkern.flash_attn_fp8(**{n: t[1:] for n, t in inputs.items()}, causal=True)
    assert torch.equal(expected[1:], alone)


def test_packed(device: str) -> None:
    """Sequences one behind the other give what each gives alone; rows of none give 0."""
    lengths_q, lengths_k = (30, 0, 140, 1), (150, 7, 129, 64)
    inputs = _made(device, 1, sum(lengths_q) + 3, sum(lengths_k) + 2, 4, 64)
    edges = [
        torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device) for n in (lengths_q, lengths_k)
    ]
    scales = {name: torch.rand(4, 2, device=device) / 50 for name in SCALES}
    packed = {n: inputs[n][0] for n in "qkv"}
    out, lse = fastkern.flash_attn_fp8(
        **packed, **scales, causal=True, cu_seqlens_q=edges[0], cu_seqlens_k=edges[1], return_lse=True
    )
    begin_q = begin_k = 0
    for b, (q, k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows_q, rows_k = slice(begin_q, begin_q + q), slice(begin_k, begin_k + k)
        one = {n: packed[n][None, rows_q if n == "q" else rows_k] for n in "qkv"}
        alone, lse_alone = fastkern.flash_attn_fp8(
            **one, **{n: t[b : b + 1] for n, t in scales.items()}, causal=True, return_lse=True
        )
        assert torch.equal(out[rows_q], alone[0])
        assert torch.equal(lse[:, rows_q], lse_alone[0])
        begin_q, begin_k = begin_q + q, begin_k + k
    assert not out[begin_q:].any()
    assert (lse[:, begin_q:] == -math.inf).all()


def test_unused_rows_change_nothing(device: str) -> None:
    inputs = _made(device, 2, 50, 140, 2, 64, group=1)
    used = {"seqused_q": torch.tensor([50, 20], dtype=torch.int32, device=device),
            "seqused_k": torch.tensor([130, 0], dtype=torch.int32, device=device)}  # fmt: skip
    expected, lse = fastkern.flash_attn_fp8(**inputs, **used, return_lse=True)
    spoiled = {**inputs}
    for name in "kv":
        bytes_ = inputs[name].view(torch.uint8).clone()
        bytes_[0, 130:] = bytes_[1] = 0x7F
        spoiled[name] = bytes_.view(F8)
    assert torch.equal(expected, fastkern.flash_attn_fp8(**spoiled, **used))
    assert not expected[1].any()
    assert (lse[1] == -math.inf).all()
    assert not expected.isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda a: a["q"].bfloat16()}, r"q must be torch\.float8_e4m3fn, got torch\.bfloat16"),
        ({"v": lambda a: a["v"].to(torch.float8_e5m2)}, r"v must be torch\.float8_e4m3fn, got torch\.float8_e5m2"),
        ({"k": lambda a: a["k"][..., :16]}, r"k must have shape \(2, T, G, 32\), got \(2, 9, 2, 16\)"),
        ({"q_scale": lambda a: a["q_scale"].double()}, r"q_scale must be torch\.float32, got torch\.float64"),
        ({"v_scale": lambda a: a["v_scale"][:, :1]}, r"v_scale must have shape \(2, 2\), \(2,\) or \(\), got \(2, 1\)"),
        ({"window": lambda a: (-2, 0)}, r"window_left must be at least -1, got -2"),
        ({"cu_seqlens_q": lambda a: torch.zeros(2, dtype=torch.int32, device=a["q"].device)}, r"cu_seqlens_k must be"),
        ({"q_scale": lambda a: a["q_scale"].requires_grad_()}, r"q_scale must not require grad"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(device: str, change: dict[str, Any], message: str) -> None:
    inputs = _made(device, 2, 5, 9, 4, 32)
    inputs |= {name: value(inputs) for name, value in change.items()}
    with pytest.raises(RuntimeError, match=f"flash_attn_fp8: {message}"):
        fastkern.flash_attn_fp8(**inputs)
    if "require grad" not in message:
        meta = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in inputs.items()}
        with pytest.raises(RuntimeError, match=f"flash_attn_fp8: {message}"):
            fastkern.flash_attn_fp8(**meta)


def test_traced(device: str) -> None:
    inputs = _made(device, 2, 20, 30, 4, 32)
    arguments = (*(inputs[n] for n in ("q", "k", "v", *SCALES)), True)
    # Its other tests multiply tensors, which torch does not do in float8.
    torch.library.opcheck(torch.ops.fastkern.flash_attn_fp8.default, arguments, test_utils="test_faketensor")
    stacked = {n: torch.stack([inputs[n], inputs[n].flip(0)]) for n in SCALES}
    plain = {n: inputs[n] for n in "qkv"}
    mapped = torch.vmap(lambda *s: fastkern.flash_attn_fp8(**plain, **dict(zip(SCALES, s, strict=True))))(
        *(stacked[n] for n in SCALES)
    )
    assert torch.equal(mapped[0], fastkern.flash_attn_fp8(**inputs))


def test_empty(device: str) -> None:
    for sizes in ((0, 4, 4, 2, 16), (2, 0, 4, 2, 16), (2, 4, 0, 2, 16)):
        B, S, T, H, D = sizes
        q, k, v = (torch.empty(B, n, H, D, device=device, dtype=torch.uint8).fill_(56).view(F8) for n in (S, T, T))
        out, lse = fastkern.flash_attn_fp8(q, k, v, return_lse=True)
        assert out.shape == q.shape
        assert not out.any()
        assert (lse == -math.inf).all()


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("D", [64, 128, 256])
def test_captured_and_repeated(D: int) -> None:
    """A replay reads what the operands hold then; every call has the same bits."""
    inputs = _made("cuda", 2, 700, 900, 8, D)
    others = _made("cuda", 2, 700, 900, 8, D, seed=1)
    expected = [fastkern.flash_attn_fp8(**each, causal=True) for each in (inputs, others)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastkern.flash_attn_fp8(**inputs, causal=True)
    for each, right in zip((inputs, others), expected, strict=True):
        for name, t in inputs.items():
            t.view(torch.uint8).copy_(each[name].view(torch.uint8))
        graph.replay()
        assert torch.equal(out, right)
    for _ in range(100):
        assert torch.equal(fastkern.flash_attn_fp8(**others, causal=True), expected[1])
