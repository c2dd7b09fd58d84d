# SPDX-License-Identifier: Apache-2.0
"""Gradients of bias, sinks and lse, dropout, parts put together, what must not depend on neighbours."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import fastkern
import pytest
import torch
from fastkern.specs import _attention_formula as formula
from fastkern.specs import attention as rows
from harness.attention import assert_close, assert_no_nan, assert_same_bits, check, made, ours, packed, truth
from torch import Tensor

pytestmark = pytest.mark.operator(rows.FLASH_ATTN)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["".join(k) for k in product("B1", "H1", "S1")])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_bias_gradient_of_each_shape(kind: str, dtype: torch.dtype, device: str) -> None:
    """Summed over what is broadcast, in the dtype of the bias, for a bias of size 1 and for an expanded one."""
    inputs = made(device, F32, 3, 66, 70, 4, 16, group=2)
    sizes = {"B": 3, "H": 4, "S": 66}
    bias = torch.randn([sizes.get(c, 1) for c in kind] + [70], device=device).to(dtype)
    for options in ({}, {"causal": True, "softcap": 5.0}):
        got = ours({**inputs, "bias": bias, **options})
        expected = truth({**inputs, "bias": bias, **options})
        assert got["dbias"].shape == bias.shape
        assert got["dbias"].dtype == dtype
        exact = {name: t.to(got[name].dtype) for name, t in expected.items()}
        assert_close(got, exact, 1e-5 if dtype == F32 else 2e-2, kind)
        leaf = bias.clone().requires_grad_()
        leaves = {k: t.requires_grad_() for k, t in inputs.items()}
        out = fastkern.flash_attn(**leaves, bias=leaf.expand(3, 4, 66, 70), causal=bool(options),
                                  softcap=options.get("softcap", 0.0))  # fmt: skip
        assert_close({"out": out.detach()}, {"out": got["out"]}, 1e-6, "expanded bias")


def test_gradient_through_lse_alone(device: str) -> None:
    """Of the normaliser, as for a z-loss: softmax times k, and times q."""
    inputs = made(device, F32, 2, 33, 70, 4, 16, group=2)
    for options in ({}, {"causal": True}, {"softcap": 3.0}, {"window_left": 5}):
        leaves = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
        wide = {k: t.detach().double().requires_grad_() for k, t in inputs.items()}
        weight = torch.randn(2, 4, 33, device=device)
        _, lse = rows.flash_attn(**leaves, **options)
        _, exact = formula.attention(**wide, **options)
        got = torch.autograd.grad((lse.masked_fill(lse == -math.inf, 0) * weight).sum(), list(leaves.values()))
        expected = torch.autograd.grad(
            (exact.masked_fill(exact == -math.inf, 0) * weight).sum(), [wide["q"], wide["k"]]
        )
        assert_close(dict(zip("qk", got, strict=False)), dict(zip("qk", expected, strict=True)), 1e-5)
        assert not got[2].any(), "lse does not depend on v"
        assert got[0].any(), "no gradient at all"


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
def test_sinks(dtype: torch.dtype, device: str) -> None:
    """A sink takes probability and gives nothing: as one more key with value 0 would."""
    inputs: dict[str, Any] = made(device, dtype, 2, 33, 70, 4, 16, group=2)
    sinks = torch.tensor([-5.0, 0.0, 3.0, 40.0], device=device)
    for kind in {dtype, F32}:
        for options in (
            {},
            {"causal": True},
            {"window_left": 3, "window_right": 0},
            {"bias": torch.randn(1, 4, 1, 70)},
        ):
            asked = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
            got = check({**inputs, "sinks": sinks.to(kind), **asked}, f"{kind} {list(options)}")
            assert got["dsinks"].shape == (4,)
            assert got["dsinks"].dtype == kind
            assert got["dsinks"].any()
    # -inf is no sink.
    nothing = ours({**inputs, "sinks": torch.full((4,), -math.inf, device=device)})
    assert not nothing.pop("dsinks").any()
    assert_same_bits(nothing, ours(inputs), "sinks of -inf")


# ---- dropout ---------------------------------------------------------------------------------------------------------


def _seed(device: str, value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 2**-20])
def test_dropout_mask_is_that_of_philox(p: float, device: str) -> None:
    seed, offset = _seed(device, -(2**63) + 12345), _seed(device, 2**40 + 1)
    got = fastkern.attn_dropout_mask(3, 2, 65, 131, p, seed, offset)
    assert got.dtype == torch.bool
    assert torch.equal(got, formula.dropout_mask(3, 2, 65, 131, p, seed, offset))
    again = fastkern.attn_dropout_mask(3, 2, 65, 131, p, seed)
    assert torch.equal(again, formula.dropout_mask(3, 2, 65, 131, p, seed))
    small = fastkern.attn_dropout_mask(1, 2, 3, 130, p, seed, offset)
    assert torch.equal(small[..., :130], got[:1, :, :3, :130]), "a larger S or T changes no element"


def test_attention_drops_what_the_mask_says(device: str) -> None:
    """All scores 0 and v the identity: out is the probabilities themselves."""
    B, S, T, H, p = 2, 70, 131, 3, 0.3
    seed, offset = _seed(device, 77), _seed(device, 5)
    keep = fastkern.attn_dropout_mask(B, H, S, T, p, seed, offset)
    q, k = torch.zeros(B, S, H, 8, device=device), torch.randn(B, T, H, 8, device=device)
    v = torch.eye(T, device=device)[None, :, None].expand(B, T, H, T)
    out, lse = fastkern.flash_attn(q, k, v, dropout_p=p, seed=seed, offset=offset, return_lse=True)
    assert torch.equal(out.transpose(1, 2) != 0, keep)
    assert_close({"out": out.transpose(1, 2)}, {"out": keep / (T * (1 - p))}, 1e-6)
    assert_close({"lse": lse}, {"lse": torch.full_like(lse, math.log(T))}, 1e-6, "dropout does not change the lse")
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    starts = [torch.arange(B + 1, dtype=torch.int32, device=device) * n for n in (S, T)]
    same = fastkern.flash_attn_varlen(*flat, *starts, dropout_p=p, seed=seed, offset=offset)
    assert torch.equal(same, out.flatten(0, 1)), "packed"


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_left": 9, "window_right": 9}], ids=str)
def test_dropout_gradients(options: dict[str, Any], device: str) -> None:
    inputs: dict[str, Any] = made(device, F32, 2, 70, 131, 4, 16, group=2)
    inputs |= {"dropout_p": 0.4, "seed": _seed(device, 3), "bias": torch.randn(1, 4, 70, 131, device=device), **options}
    check(inputs, f"{options}")


def test_each_element_is_dropped_as_often_as_asked(device: str) -> None:
    """Over many seeds: each element's count is binomial, and neighbours have nothing to do with each other."""
    p, count = 0.3, 400
    masks = torch.stack([fastkern.attn_dropout_mask(2, 2, 16, 23, p, _seed(device, s)) for s in range(count)]).double()
    z = (masks.sum(0) - count * (1 - p)) / math.sqrt(count * p * (1 - p))
    assert float(z.abs().max()) < 5, "an element is dropped too often or too seldom"
    assert abs(float(z.square().mean()) - 1) < 0.2, "the counts do not spread as independent draws do"
    centred = masks - (1 - p)
    for dim in range(5):
        a, b = centred.narrow(dim, 1, masks.shape[dim] - 1), centred.narrow(dim, 0, masks.shape[dim] - 1)
        correlation = float((a * b).mean()) / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(a.numel()), f"neighbours along dimension {dim} are related"


def test_dropout_draws_a_seed(device: str) -> None:
    inputs = made(device, F32, 1, 20, 30, 2, 8)
    torch.manual_seed(4)
    first, second = (fastkern.flash_attn(**inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(fastkern.flash_attn(**inputs, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    assert torch.equal(fastkern.flash_attn(**inputs, dropout_p=0.0), fastkern.flash_attn(**inputs))


# ---- parts of the keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [False, True], ids=["run", "traced"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": lambda t: t.half()}, r"merge_attention_bwd: dout must be torch\.float32, got torch\.float16"),
        ({"dout": lambda t: t[:, 1:]}, r"merge_attention_bwd: dout must have shape \(2, 5, 4, 8\), got \(2, 4, 4, 8\)"),
        ({"dlse": lambda t: t.bfloat16()}, r"merge_attention_bwd: dlse must be torch\.float32, got torch\.bfloat16"),
        ({"dlse": lambda t: t.mT}, r"merge_attention_bwd: dlse must have shape \(2, 4, 5\), got \(2, 5, 4\)"),
        ({"outs": lambda t: t[0]}, r"merge_attention_bwd: outs must have shape \(K, B, S, H, Dv\)"),
        ({"lses": lambda t: t.mT}, r"merge_attention_bwd: lses must have shape \(3, 2, 4, 5\), got \(3, 2, 5, 4\)"),
    ],
    ids=["dout_type", "dout_shape", "dlse_type", "dlse_shape", "outs_rank", "lses_shape"],
)
def test_merge_gradient_refuses(change: dict[str, Any], message: str, meta: bool) -> None:
    arguments = {
        "dout": torch.randn(2, 5, 4, 8),
        "dlse": torch.randn(2, 4, 5),
        "outs": torch.randn(3, 2, 5, 4, 8),
        "lses": torch.randn(3, 2, 4, 5),
    }
    arguments |= {name: wrong(arguments[name]) for name, wrong in change.items()}
    if meta:
        arguments = {name: t.to("meta") for name, t in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastkern.merge_attention_bwd(**arguments)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("cuts", [(70,), (1, 70), (64, 65, 70), (10, 10, 33, 70)], ids=str)
def test_merged_parts_are_the_whole(cuts: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Of a causal mask too, where parts see nothing, and with their gradients."""
    inputs: dict[str, Any] = made(device, dtype, 2, 66, 70, 4, 16, group=2)
    seen = torch.arange(70, device=device) <= torch.arange(66, device=device)[:, None] + 4

    def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            rows.flash_attn(q, k[:, begin:end], v[:, begin:end], bias=seen[None, None, :, begin:end])
            for begin, end in zip((0, *cuts[:-1]), cuts, strict=True)
        ]
        return fastkern.merge_attention([out for out, _ in parts], [lse for _, lse in parts])

    from harness.attention import results_of

    got, whole = results_of(merged, inputs), truth({**inputs, "causal": True})
    assert_close(got, whole, {F32: 1e-5, F16: 4e-3, BF16: 3e-2}[dtype], f"{cuts}")


def test_merge_of_tensors_is_that_of_lists(device: str) -> None:
    outs, lses = torch.randn(3, 2, 5, 4, 8, device=device), torch.randn(3, 2, 4, 5, device=device)
    got = fastkern.merge_attention(outs, lses)
    for ours_, theirs in zip(got, fastkern.merge_attention(list(outs), tuple(lses)), strict=True):
        assert torch.equal(ours_, theirs)
    lses[:, 0, 0, 0] = -math.inf
    lses[1] = -math.inf
    out, lse = fastkern.merge_attention(outs, lses)
    assert_no_nan({"out": out, "lse": lse})
    assert not out[0, 0, 0].any()
    assert float(lse[0, 0, 0]) == -math.inf


# ---- nobody else's business ------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_left": 20, "window_right": 4},
    "softcap": {"softcap": 5.0, "causal": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_neighbours_change_nothing(options: dict[str, Any], device: str) -> None:
    """An entry has the same bits alone, in any batch, at any place, and packed among sequences of any length.

    But for dk and dv: they are summed over queries, in an order that may depend on the number of entries.
    """
    inputs = made(device, BF16, 9, 70, 131, 4, 24, group=2)
    whole = fastkern_outputs(inputs, options)
    for b in (0, 1, 8):
        alone = fastkern_outputs({k: t[b : b + 1] for k, t in inputs.items()}, options)
        other = {k: torch.randn_like(t) for k, t in inputs.items()}
        for k, t in other.items():
            t[b] = inputs[k][b]
        among = fastkern_outputs(other, options)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert not bool(whole[name].isnan().any()), name
            if name in ("dk", "dv"):
                assert_close({name: alone[name][0]}, {name: whole[name][b]}, 2**-7, f"entry {b} alone")
            else:
                assert torch.equal(alone[name][0], whole[name][b]), f"{name} of entry {b} alone"
            assert torch.equal(among[name][b], whole[name][b]), f"{name} of entry {b} among others"
    for before, after in ((0, 0), (1, 3), (63, 1), (64, 64), (65, 200)):
        entry = {k: t[4] for k, t in inputs.items()}
        side = [
            {k: torch.randn(n, *t.shape[1:], device=device).to(BF16) for k, t in entry.items()} for n in (before, after)
        ]
        got = fastkern_outputs(packed([side[0], entry, side[1]]), options, at=before)
        assert_no_nan(got, f"after {before} rows")
        for name in ("out", "dq"):
            assert torch.equal(got[name][before : before + 70], whole[name][4]), f"{name} after {before} rows"
        for name in ("dk", "dv"):
            assert_close(
                {name: got[name][before : before + 131]}, {name: whole[name][4]}, 2**-7, f"after {before} rows"
            )


def fastkern_outputs(inputs: dict[str, Any], options: dict[str, Any], at: int | None = None) -> dict[str, Tensor]:
    """Everything, for a dout and dlse that depend on nothing but the place of a row in its sequence."""
    leaves = {k: t.detach().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}
    function = rows.flash_attn if at is None else rows.flash_attn_varlen
    out, lse = function(**leaves, **options)
    i = torch.arange(out.shape[0 if at is not None else 1], device=out.device) - (at or 0)
    wave = torch.sin(i[:, None, None] * 0.7 + torch.arange(out.shape[-1], device=out.device) * 0.3)
    dout = wave.expand(out.shape).to(out.dtype)
    dlse = torch.cos(i * 0.2).expand(lse.shape)
    grads = torch.autograd.grad([out, lse], [leaves[n] for n in "qkv"], [dout, dlse])
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def test_other_queries_change_nothing(device: str) -> None:
    """From 1 to 17 queries, and to 70: each has the bits that it has alone."""
    inputs = made(device, BF16, 1, 70, 131, 4, 32, group=4)
    out, lse = rows.flash_attn(**inputs)
    last, last_lse = rows.flash_attn(**inputs, causal=True)
    assert_no_nan({"out": out, "last": last})
    for count in range(1, 18):
        some, some_lse = rows.flash_attn(inputs["q"][:, :count], inputs["k"], inputs["v"])
        assert torch.equal(some, out[:, :count]), f"{count} queries"
        assert torch.equal(some_lse, lse[..., :count])
        some, some_lse = rows.flash_attn(inputs["q"][:, -count:], inputs["k"], inputs["v"], causal=True)
        assert torch.equal(some, last[:, -count:]), f"the last {count} queries"
        assert torch.equal(some_lse, last_lse[..., -count:])


@pytest.mark.parametrize("name", OPTIONS)
def test_repeats_have_the_same_bits(name: str, device: str) -> None:
    inputs: dict[str, Any] = made(device, BF16, 2, 130, 200, 6, 32, group=3)
    inputs |= {
        "bias": torch.randn(1, 1, 1, 200, device=device),
        "sinks": torch.randn(6, device=device),
        **OPTIONS[name],
    }
    first = ours(inputs)
    for _ in range(100 if device == "cuda" else 20):
        assert_same_bits(ours(inputs), first, "again")


def test_no_gradient_changes_nothing_else(device: str) -> None:
    """Each gradient has the same bits whatever else wants one."""
    inputs: dict[str, Any] = made(device, F32, 2, 33, 70, 4, 16, group=2)
    inputs |= {"bias": torch.randn(1, 4, 33, 70, device=device), "sinks": torch.randn(4, device=device)}
    every = ours(inputs)
    dout = torch.randn(2, 33, 4, 16, generator=torch.Generator().manual_seed(1)).to(device)
    for name in ("q", "k", "v", "bias", "sinks"):
        leaves = {k: t.detach().requires_grad_(k == name) for k, t in inputs.items()}
        out, _ = rows.flash_attn(**leaves)
        alone = torch.autograd.grad(out, leaves[name], dout)[0]
        assert_close({name: alone}, {name: truth(inputs, use_lse=False)[f"d{name}"]}, 1e-5)
    assert set(every) == {"out", "lse", "dq", "dk", "dv", "dbias", "dsinks"}
