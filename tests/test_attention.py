# SPDX-License-Identifier: Apache-2.0
"""What has gone wrong in other attention libraries, one test each."""

from __future__ import annotations

import math
from typing import Any

import fastkern
import pytest
import torch
from fastkern.specs import attention as rows
from harness.attention import TOLERANCE, assert_close, assert_no_nan, assert_same_bits, check, int32, made, ours, packed
from harness.layouts import OFFSETS, offset_by
from torch import Tensor

pytestmark = pytest.mark.operator(rows.FLASH_ATTN)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
POISON = (float("nan"), float("inf"), -float("inf"))


def _entry(inputs: dict[str, Tensor], b: int, S: int, T: int) -> dict[str, Tensor]:
    return {"q": inputs["q"][b, :S], "k": inputs["k"][b, :T], "v": inputs["v"][b, :T]}


# ---- what is not used is not read ------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("poison", POISON, ids=str)
def test_unused_rows_are_not_read(poison: float, dtype: torch.dtype, device: str) -> None:
    """NaN and infinities beyond seqused_q and seqused_k, in dout too, change no bit of anything."""
    clean: dict[str, Any] = made(device, dtype, 3, 70, 131, 4, 24, group=2)
    clean |= {"causal": True, "seqused_q": int32(device, 70, 33, 0), "seqused_k": int32(device, 65, 0, 131)}
    dirty = {k: v.clone() if isinstance(v, Tensor) else v for k, v in clean.items()}
    dout, dlse = torch.randn(3, 70, 4, 24, device=device).to(dtype), torch.randn(3, 4, 70, device=device)
    bad_dout, bad_dlse = dout.clone(), dlse.clone()
    for b, (S, T) in enumerate(zip((70, 33, 0), (65, 0, 131), strict=True)):
        for name, own in (("q", S), ("k", T), ("v", T)):
            dirty[name][b, own:] = poison
        bad_dout[b, S:] = poison
        bad_dlse[b, :, S:] = poison

    def run(inputs: dict[str, Any], dout: Tensor, dlse: Tensor) -> dict[str, Tensor]:
        leaves = {k: v.requires_grad_() if k in "qkv" else v for k, v in inputs.items()}
        out, lse = rows.flash_attn(**leaves)
        grads = torch.autograd.grad([out, lse], [leaves[n] for n in "qkv"], [dout, dlse])
        return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    expected = run(clean, dout, dlse)
    got = run(dirty, bad_dout, bad_dlse)
    assert_same_bits(got, expected, f"{poison} beyond the end")
    for b, (S, T) in enumerate(zip((70, 33, 0), (65, 0, 131), strict=True)):
        assert not got["out"][b, S:].any()
        assert bool((got["lse"][b, :, S:] == -math.inf).all())
        assert not got["dq"][b, S:].any()
        assert not got["dk"][b, T:].any()
        assert not got["dv"][b, T:].any()
    check(clean, "lengths of entries")


@pytest.mark.parametrize("poison", POISON, ids=str)
def test_unused_tails_of_packed_tensors_are_not_read(poison: float, device: str) -> None:
    inputs = made(device, BF16, 3, 40, 70, 4, 16, group=2)
    entries = [_entry(inputs, 0, 40, 70), _entry(inputs, 1, 3, 17), _entry(inputs, 2, 33, 1)]
    alone = ours({**packed(entries), "causal": True})
    with_tail = ours({**packed(entries, tail=21, poison=poison), "causal": True})
    assert_no_nan(with_tail)
    for name, t in with_tail.items():
        own, tail = (t[:, :-21], t[:, -21:]) if name == "lse" else (t[:-21], t[-21:])
        if name != "out" and name != "lse" and name != "dv":  # dout of the two calls is not the same
            assert not tail.any(), f"{name} of the tail"
        if name in ("out", "lse"):
            assert torch.equal(own, alone[name]), name
            assert bool((tail == (0 if name == "out" else -math.inf)).all()), f"{name} of the tail"
    assert not with_tail["dv"][-21:].any()


def test_rows_between_sequences_are_not_read(device: str) -> None:
    """cu_seqlens with seqused: gaps of NaN between the sequences."""
    inputs = made(device, F32, 1, 50, 90, 2, 16)
    flat = {k: v[0].clone() for k, v in inputs.items()}
    starts = {"cu_seqlens_q": int32(device, 0, 20, 50), "cu_seqlens_k": int32(device, 0, 40, 90)}
    used = {"seqused_q": int32(device, 11, 30), "seqused_k": int32(device, 33, 7)}
    clean = {**flat, **starts, **used, "causal": True}
    check(clean, "gaps")
    expected = {k: v for k, v in ours(clean).items() if k in ("out", "lse")}
    for name, gaps in (("q", [(11, 20)]), ("k", [(33, 40), (47, 90)]), ("v", [(33, 40), (47, 90)])):
        for begin, end in gaps:
            flat[name][begin:end] = float("nan")
    got = ours({**flat, **starts, **used, "causal": True})
    assert_no_nan(got)
    assert_same_bits({k: got[k] for k in expected}, expected, "NaN in gaps")


# ---- nothing to see --------------------------------------------------------------------------------------------------


@dtypes
def test_sequences_of_no_length(dtype: torch.dtype, device: str) -> None:
    """No queries, no keys, neither, first, last and in between."""
    inputs = made(device, dtype, 6, 40, 66, 4, 16, group=2)
    lengths = ((0, 66), (40, 0), (33, 66), (0, 0), (1, 1), (40, 0))
    entries = [_entry(inputs, b, S, T) for b, (S, T) in enumerate(lengths)]
    for options in ({}, {"causal": True}, {"window_left": 3, "window_right": 0}):
        check({**packed(entries), **options}, f"{lengths} {options}")
    nothing = packed([_entry(inputs, 0, 0, 0)] * 3)
    got = check(nothing, "no rows at all")
    assert got["out"].shape == (0, 4, 16)
    keys_only = check(packed([_entry(inputs, 0, 0, 66)]), "keys without queries")
    assert not keys_only["dk"].any()
    queries_only = check(packed([_entry(inputs, 0, 40, 0)]), "queries without keys")
    assert bool((queries_only["lse"] == -math.inf).all())


@pytest.mark.parametrize("layout", ["dense", "packed"])
@dtypes
def test_queries_that_see_nothing(dtype: torch.dtype, layout: str, device: str) -> None:
    """More queries than keys under a causal mask and under windows; NaN nowhere, zeros and -inf where expected."""
    inputs = made(device, dtype, 2, 150, 70, 4, 16, group=2)
    if layout == "packed":
        inputs = packed([_entry(inputs, 0, 150, 70), _entry(inputs, 1, 97, 5)])
    for window in ((0, 0), (5, 0), (64, 3), (-1, 0), (0, -1), (3, 64)):
        asked = {"window_left": window[0], "window_right": window[1]}
        for causal in (False, True):
            got = check({**inputs, **asked, "causal": causal}, f"window {window} causal {causal}")
            hidden = got["lse"] == -math.inf
            assert bool(hidden.any()) or (window[1] == -1 and not causal), "all rows see something"
            assert not got["out"].transpose(-2, -3)[hidden].any()
    got = check({**inputs, "causal": True, "sinks": torch.randn(4, device=device)}, "with sinks")
    assert bool(got["lse"].isfinite().all()), "a sink is always seen"


@pytest.mark.parametrize("kind", ["mask", "-inf"])
def test_rows_that_a_bias_hides(kind: str, device: str) -> None:
    """A bool mask and a float bias of -inf hide alike, whole rows and whole columns too."""
    inputs = made(device, F32, 2, 70, 67, 4, 16)
    seen = torch.rand(2, 4, 70, 67, device=device) < 0.5
    seen[:, :, 3], seen[0, 1, 60:] = False, False
    seen[..., 5] = False
    bias = seen if kind == "mask" else torch.zeros(seen.shape, device=device).masked_fill(~seen, -math.inf)
    got = check({**inputs, "bias": bias}, kind)
    assert bool((got["lse"][:, :, 3] == -math.inf).all())
    assert not got["out"][:, 3].any()
    assert not got["dk"][:, 5].any()
    if kind == "-inf":
        assert not got["dbias"][~seen].any()


def test_blocks_that_hide_everything(device: str) -> None:
    inputs = made(device, F32, 1, 130, 200, 2, 16)
    blocks = torch.zeros(2, 3, 4, dtype=torch.bool, device=device)
    blocks[1, 1, 2] = True
    got = check({**inputs, "block_mask": blocks, "block_size": 64}, "one block")
    assert bool((got["lse"][0, 0] == -math.inf).all())
    assert bool(got["lse"][0, 1, 64:128].isfinite().all())
    assert not got["dv"][0, :128].any()


# ---- lengths, scores, windows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "mask"])
@pytest.mark.parametrize("S", [64, 192, 320])
def test_bias_at_half_a_tile(S: int, kind: str, device: str) -> None:
    """S % 128 == 64 with a bias gave NaN gradients elsewhere."""
    inputs = made(device, BF16, 1, S, S, 2, 32)
    bias = torch.randn(1, 2, S, S, device=device)
    check({**inputs, "bias": bias.to(BF16) if kind == "float" else bias > -0.5}, f"S {S}")


@dtypes
@pytest.mark.parametrize("level", [-3000.0, -200.0, -89.0, 89.0, 200.0, 3000.0])
def test_far_lse(level: float, dtype: torch.dtype, device: str) -> None:
    """exp() of the LSE, and of what it is made of, is 0 or infinite in float32."""
    inputs: dict[str, Any] = made(device, dtype, 1, 70, 65, 2, 16)
    tolerance = TOLERANCE[dtype] + abs(level) * 2**-22  # of a float32 score this far from 0
    got = check(
        {**inputs, "bias": torch.full((1, 1, 1, 65), level, device=device)}, f"level {level}", tolerance=tolerance
    )
    assert float((got["lse"] - level).abs().max()) < 20
    assert float(got["dv"].abs().max()) > 0.1, "the gradients vanished"
    aligned = {**inputs, "q": torch.full_like(inputs["q"], 4.0), "k": torch.full_like(inputs["k"], level / 64)}
    check({**aligned, "scale": 1.0}, f"products of {level}", tolerance=tolerance)


def test_rising_and_falling_scores(device: str) -> None:
    """The largest key is the last one, or the first one: what was summed up before must be scaled, or all is 0."""
    inputs = made(device, F32, 1, 5, 400, 1, 8)
    slope = torch.arange(400, device=device) * 1.5
    for bias in (slope, -slope, slope.flip(0) - 600, torch.where(slope == 300, 500.0, -500.0)):
        check({**inputs, "bias": bias.reshape(1, 1, 1, 400)}, tolerance=3e-4)  # a score of 600 has that few digits


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_window_of_itself(align: str, device: str) -> None:
    """Left and right 0: each query sees one key, so it gives back that key's value."""
    inputs = made(device, F32, 2, 130, 130, 4, 16, group=2)
    out, lse = fastkern.flash_attn(**inputs, window=(0, 0), causal_align=align, return_lse=True)
    assert_no_nan({"out": out, "lse": lse})
    assert_close({"out": out}, {"out": inputs["v"].repeat_interleave(2, 2)}, 1e-6)
    causal = fastkern.flash_attn(**inputs, window=(0, -1), causal=True, causal_align=align)
    assert torch.equal(causal, out), "causal with left 0 is the same"
    check({**inputs, "window_left": 0, "top_left": align == "top_left"}, "left 0 alone")


@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 127, 129])
def test_windows_at_their_edges(S: int, device: str) -> None:
    """Off by one at either end, at the ends of tiles, for either alignment."""
    inputs = made(device, F32, 1, S, 130, 2, 8)
    for left, right in ((0, 1), (1, 0), (62, 0), (63, 1), (64, 64), (65, -1), (-1, 65), (129, 129), (130, 0)):
        for top_left in (False, True):
            check({**inputs, "window_left": left, "window_right": right, "top_left": top_left}, f"{left}, {right}")


def test_windows_larger_than_any_length(device: str) -> None:
    """Up to the largest number there is, they are no windows at all."""
    inputs = made(device, F32, 1, 70, 130, 2, 8)
    expected = ours(inputs)
    for large in (130, 2**31 - 1, 2**31, 2**62, 2**63 - 1):
        for window in ((large, large), (large, -1), (-1, large)):
            asked = {"window_left": window[0], "window_right": window[1]}
            assert_same_bits(ours({**inputs, **asked}), expected, f"window {window}")
        causal = ours({**inputs, "causal": True, "window_left": large})
        assert_same_bits(causal, ours({**inputs, "causal": True}), f"causal, left {large}")


@pytest.mark.parametrize("D", [1, 2, 3, 5, 7, 17, 31, 33, 63, 65, 100, 127, 129, 192, 255, 257, 512])
def test_any_head_dim(D: int, device: str) -> None:
    check(made(device, F32, 1, 33, 70, 2, D), f"D {D}")
    if D > 256 and device == "cuda":
        pytest.skip("in 16 bits forward only")
    check(made(device, BF16, 1, 9, 20, 2, D, V=D % 7 + 1), f"D {D}, Dv {D % 7 + 1}")


@pytest.mark.parametrize("group", [2, 3, 5, 6, 7, 11])
def test_any_group(group: int, device: str) -> None:
    for G in (1, 2):
        check({**made(device, F32, 2, 33, 70, group * G, 16, group=group), "causal": True}, f"{group} x {G}")


def test_any_scale(device: str) -> None:
    inputs = made(device, F32, 1, 17, 33, 2, 16)
    for scale in (0.0, -0.5, 1e-30, 1.0, 7.0):
        check({**inputs, "scale": scale}, f"scale {scale}")
    default = ours(inputs)
    assert_same_bits(ours({**inputs, "scale": 0.25}), default, "1 / sqrt(16)")


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_strides_beyond_32_bits(device: str) -> None:
    """Of dimensions of size 1, where no memory is needed for them; test_far_strides has those of others."""
    far = 2**40
    plain = made(device, F32, 1, 9, 20, 1, 8)
    bias = torch.randn(1, 1, 9, 20, device=device)
    views = {name: t.as_strided(t.shape, (far, 8, far + 64, 1)) for name, t in plain.items()}
    got = ours({**views, "bias": bias.as_strided(bias.shape, (far, far, 20, 1))})
    assert_same_bits(got, ours({**plain, "bias": bias}), "strides of 2**40")
    single = {k: t[:, :1] for k, t in plain.items()}
    views = {name: t.as_strided(t.shape, (-(-far // 3), far, far, 1)) for name, t in single.items()}
    assert_same_bits(ours(views), ours(single), "one row")


def test_broadcast_operands(device: str) -> None:
    """Stride 0 in any dimension but the last: one key for all heads, one entry for all."""
    one = made(device, F32, 1, 33, 70, 4, 16)
    whole = {k: t.expand(3, -1, -1, -1) for k, t in one.items()}
    whole["k"] = whole["k"][:, :, :1].expand(-1, -1, 4, -1)
    whole["v"] = whole["v"][:, :1].expand(-1, 70, -1, -1)
    assert_same_bits(ours(whole), ours({k: t.contiguous() for k, t in whole.items()}), "expanded")


@pytest.mark.parametrize("kind", ["sum", "mean of heads", "column"])
def test_gradients_of_any_strides(kind: str, device: str) -> None:
    """out.sum().backward() hands over a tensor of strides 0."""
    inputs = {k: t.requires_grad_() for k, t in made(device, F32, 2, 33, 70, 4, 16, group=2).items()}
    out, lse = fastkern.flash_attn(**inputs, return_lse=True)
    seeds = {
        "sum": torch.ones((), device=device).expand(out.shape),
        "mean of heads": torch.randn(2, 33, 1, 16, device=device).expand(out.shape),
        "column": torch.randn(2, 33, 4, 1, device=device).expand(out.shape),
    }
    dout, dlse = seeds[kind], torch.ones((), device=device).expand(lse.shape)
    got = torch.autograd.grad([out, lse], list(inputs.values()), [dout, dlse], retain_graph=True)
    dense = [dout.contiguous(), dlse.contiguous()]
    expected = torch.autograd.grad([out, lse], list(inputs.values()), dense)
    for ours_, theirs in zip(got, expected, strict=True):
        assert not bool(ours_.isnan().any())
        assert torch.equal(ours_, theirs)


@pytest.mark.parametrize("dtype", [F16, F32], ids=["f16", "f32"])
def test_unaligned_operands(dtype: torch.dtype, device: str) -> None:
    inputs: dict[str, Any] = made(device, dtype, 2, 17, 33, 2, 24)
    inputs["bias"] = torch.randn(1, 2, 17, 33, device=device).to(dtype)
    expected = ours(inputs)
    for elements in (1, 3, len(OFFSETS)):
        for name in ("q", "k", "v", "bias"):
            moved = {**inputs, name: offset_by(elements, inputs[name])}
            assert_same_bits(ours(moved), expected, f"{name} {elements} elements further on")


def test_fused_projection(device: str) -> None:
    """q, k and v as slices of one tensor, heads first or last."""
    qkv = torch.randn(2, 33, 3, 4, 16, device=device)
    q, k, v = qkv.unbind(2)
    assert_same_bits(
        ours({"q": q, "k": k, "v": v}), ours({n: t.contiguous() for n, t in zip("qkv", (q, k, v), strict=True)})
    )
    heads = torch.randn(2, 3, 4, 33, 16, device=device)
    views = {n: heads[:, i].transpose(1, 2) for i, n in enumerate("qkv")}
    assert_same_bits(ours(views), ours({n: t.contiguous() for n, t in views.items()}), "heads first")
    last = {n: t.transpose(1, 3).contiguous().transpose(1, 3) for n, t in views.items()}
    assert_same_bits(ours(last), ours(views), "a last dimension with a stride")
