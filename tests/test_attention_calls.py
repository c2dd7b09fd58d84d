# SPDX-License-Identifier: Apache-2.0
"""Wrong index data and wrong arguments, what NaN does, torch.compile and export over lengths, the flop counter."""

from __future__ import annotations

import math
from typing import Any

import fastkern
import pytest
import torch
from fastkern.specs import attention as rows
from harness.attention import assert_close, assert_no_nan, assert_same_bits, check, int32, made, ours, packed, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.operator(rows.FLASH_ATTN)


HUGE, TINY = 2**31 - 1, -(2**31)

# ---- wrong index data: cut to the tensors ----------------------------------------------------------------------------

# Edges whose sequences, cut to 40 rows, do not overlap.
EDGES = (
    (0, 10, 40, HUGE),
    (-7, 10, 20, 41),
    (TINY, TINY, 0, 40),
    (HUGE, HUGE, HUGE, HUGE),
    (TINY, HUGE, HUGE, HUGE),
    (30, 10, 5, 5),
    (40, 0, 0, 0),
    (0, 0, 0, 0),
    (35, 38, 38, 1000),
)


@pytest.mark.parametrize("edges_k", EDGES, ids=str)
@pytest.mark.parametrize("edges_q", EDGES, ids=str)
def test_wrong_edges_are_cut(edges_q: tuple[int, ...], edges_k: tuple[int, ...], device: str) -> None:
    flat = {name: t[0] for name, t in made(device, torch.float32, 1, 40, 40, 2, 8).items()}
    edges = {"cu_seqlens_q": int32(device, *edges_q), "cu_seqlens_k": int32(device, *edges_k)}
    check(flat | edges, f"{edges_q} {edges_k}")
    check({**flat, **edges, "causal": True, "window_left": 3}, f"{edges_q} {edges_k}")


@pytest.mark.parametrize("edges", [(0, 30, 10, 40), (HUGE, 0, TINY, 40), (0, 40, 0, 40), (40, -1, 40, -1)], ids=str)
def test_sequences_that_overlap(edges: tuple[int, ...], device: str) -> None:
    """Which of them a row gets is not said; no NaN, and nothing beside the tensors is touched."""
    flat = {name: t[0] for name, t in made(device, torch.float32, 1, 40, 40, 2, 8).items()}
    for q, k in ((edges, edges), (edges, (0, 10, 20, 40)), ((0, 10, 20, 40), edges)):
        got = ours(flat | {"cu_seqlens_q": int32(device, *q), "cu_seqlens_k": int32(device, *k)})
        assert_no_nan(got, f"{q} {k}")


@pytest.mark.parametrize("value", [HUGE, 41, 40, 39, 0, -1, TINY])
def test_wrong_lengths_are_cut(value: int, device: str) -> None:
    inputs: dict[str, Any] = made(device, torch.float32, 2, 40, 70, 2, 8)
    used = int32(device, value, 20)
    for names in (("seqused_q",), ("seqused_k",), ("seqused_q", "seqused_k")):
        for options in ({}, {"causal": True}):
            check({**inputs, **dict.fromkeys(names, used), **options}, f"{names} {value}")
    flat = packed([{n: t[0] for n, t in inputs.items()}, {n: t[1, :20] for n, t in inputs.items()}])
    check({**flat, "seqused_q": used, "seqused_k": used, "causal": True}, f"packed, {value}")


@pytest.mark.parametrize("value", [HUGE, 71, 70, 1, 0, -1, TINY])
def test_wrong_prefixes_are_cut(value: int, device: str) -> None:
    inputs: dict[str, Any] = made(device, torch.float32, 2, 40, 70, 2, 8)
    prefix = int32(device, value, 20)
    check({**inputs, "prefix": prefix, "causal": True}, f"{value}")
    check({**inputs, "prefix": prefix, "causal": True, "seqused_k": int32(device, 33, 70)}, f"{value}, with lengths")


# ---- NaN and infinities ----------------------------------------------------------------------------------------------


def test_what_is_seen_and_nan_shows(device: str) -> None:
    """NaN in what a query sees is NaN in its row; it stays in the entry and, of a query, in the row."""
    clean = made(device, torch.float32, 3, 70, 70, 4, 16, group=2)
    before, lse_before = rows.flash_attn(**clean, causal=True)
    for name, row in (("q", 33), ("k", 20), ("v", 20)):
        dirty = {k: t.clone() for k, t in clean.items()}
        dirty[name][1, row, 1, 3] = math.nan
        out, lse = rows.flash_attn(**dirty, causal=True)
        heads = [1] if name == "q" else [2, 3]
        seen = out[1, row:, heads] if name != "q" else out[1, row : row + 1, heads]
        shown = seen[..., 3] if name == "v" else seen
        assert bool(shown.isnan().all()), f"NaN in {name} does not show"
        assert torch.equal(out[[0, 2]], before[[0, 2]]), f"NaN in {name} left its entry"
        assert torch.equal(lse[[0, 2]], lse_before[[0, 2]])
        others = [h for h in range(4) if h not in heads]
        assert torch.equal(out[1][:, others], before[1][:, others]), f"NaN in {name} left its heads"
        if name == "q":
            assert int(out.isnan().any(-1).sum()) == 1
            assert int(lse.isnan().sum()) == 1


def test_no_gradient_from_rows_that_see_nothing(device: str) -> None:
    """Whatever theirs is: a loss on the lse gives them an infinite dlse, as lse is -inf there."""
    inputs = made(device, torch.float32, 2, 70, 33, 2, 8)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    out, lse = rows.flash_attn(**leaves, causal=True)
    hidden = lse == -math.inf
    assert bool(hidden.any())
    dout = torch.randn_like(out)
    expected = torch.autograd.grad([out, lse], list(leaves.values()), [dout, torch.zeros_like(lse)], retain_graph=True)
    for value in (math.inf, -math.inf, math.nan):
        dlse = torch.zeros_like(lse).masked_fill(hidden, value)
        bad_dout = dout.masked_fill(hidden.transpose(1, 2)[..., None], value)
        got = torch.autograd.grad([out, lse], list(leaves.values()), [bad_dout, dlse], retain_graph=True)
        assert_same_bits(dict(zip("qkv", got, strict=True)), dict(zip("qkv", expected, strict=True)), f"{value}")


# ---- arguments -------------------------------------------------------------------------------------------------------

SIZES = st.integers(0, 4)


@settings(max_examples=min(settings.default.max_examples, 400))
@given(st.data())
def test_shapes_are_taken_or_refused(data: st.DataObject) -> None:
    """Of any sizes: a result of the right shape without NaN, or an error that names the operator and an argument; and
    meta tensors are told the same in the same words."""

    def near(size: int) -> int:
        return data.draw(st.sampled_from([size] * 6 + [size + 1, max(size - 1, 0), 1]))

    B, S, T, G, D, V = (data.draw(SIZES) for _ in range(6))
    H = G * data.draw(st.integers(1, 3))
    shapes = {
        "q": (B, S, H, D),
        "k": (near(B), T, near(G), near(D)),
        "v": (near(B), near(T), near(G), V),
    }
    optional = {
        "bias": (near(B), near(H), near(S), near(T)),
        "alibi_slopes": (near(H),) if data.draw(st.booleans()) else (near(B), near(H)),
        "sinks": (near(H),),
        "prefix": (near(B),),
        "seqused_q": (near(B),),
        "seqused_k": (near(B),),
        "block_mask": (near(H), near(-(-S // 128)), near(-(-T // 128))),
    }
    shapes |= {name: shape for name, shape in optional.items() if data.draw(st.integers(0, 4)) == 0}
    inputs: dict[str, Any] = {name: torch.ones(shape) for name, shape in shapes.items()}
    for name in ("prefix", "seqused_q", "seqused_k"):
        if name in inputs:
            inputs[name] = inputs[name].int()
    if "block_mask" in inputs:
        inputs["block_mask"] = inputs["block_mask"].bool()
    numbers = {
        "window": st.sampled_from([(-1, -1), (0, 3), (None, 1), (-2, 0), (5, -7)]),
        "softcap": st.sampled_from([0.0, 20.0, -1.0, math.inf]),
        "scale": st.sampled_from([None, 0.3, math.nan]),
        "causal": st.booleans(),
        "causal_align": st.sampled_from(["top_left", "bottom_right", "bottom_left"]),
    }
    for name, values in numbers.items():
        if data.draw(st.integers(0, 5)) == 0:
            inputs[name] = data.draw(values)

    def fits(name: str, *wanted: tuple[int, ...]) -> bool:
        got = shapes.get(name)
        return got is None or (len(got) == len(wanted) and all(g in w for g, w in zip(got, wanted, strict=True)))

    groups = shapes["k"][2]
    good = (
        D > 0 < V
        and fits("k", (B,), (T,), (groups,), (D,))
        and fits("v", (B,), (T,), (groups,), (V,))
        and (H % groups == 0 if groups else H == 0)
        and fits("bias", (B, 1), (H, 1), (S, 1), (T,))
        and (fits("alibi_slopes", (H,)) or fits("alibi_slopes", (B,), (H,)))
        and fits("sinks", (H,))
        and all(fits(name, (B,)) for name in ("prefix", "seqused_q", "seqused_k"))
        and fits("block_mask", (H, 1), (-(-S // 128),), (-(-T // 128),))
        and all(w is None or w >= -1 for w in inputs.get("window", ()))
        and 0 <= inputs.get("softcap", 0) < math.inf
        and not math.isnan(inputs.get("scale") or 0)
        and inputs.get("causal_align") != "bottom_left"
    )
    told = []
    for kind in ("cpu", "meta"):
        given = {k: v.to(kind) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        if good:
            out, lse = fastkern.flash_attn(**given, return_lse=True)
            assert (out.shape, lse.shape) == ((B, S, H, V), (B, H, S))
            assert kind == "meta" or not bool(out.isnan().any())
        else:
            with pytest.raises((RuntimeError, TypeError)) as caught:
                fastkern.flash_attn(**given)
            told.append(str(caught.value).splitlines()[0])
    if not good:
        name = told[0].removeprefix("fastkern::flash_attn: ").split()[0]
        assert name in inputs | {"window_left": 0, "window_right": 0}, told[0]
        assert told[0] == told[1], "meta tensors hear something else"


def test_slopes_have_no_gradient(device: str) -> None:
    inputs = made(device, torch.float32, 1, 5, 7, 2, 8)
    slopes = torch.ones(2, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="fastkern::flash_attn: alibi_slopes must not require grad"):
        fastkern.flash_attn(**inputs, alibi_slopes=slopes)
    with torch.no_grad():
        fastkern.flash_attn(**inputs, alibi_slopes=slopes)


@pytest.mark.parametrize("name", ["bias", "block_mask"])
def test_packed_sequences_take_no_matrices(name: str, device: str) -> None:
    inputs = packed([{n: t[0] for n, t in made(device, torch.float32, 1, 5, 7, 2, 8).items()}])
    matrix = torch.ones(1, 1, 5, 7, device=device, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=f"fastkern::flash_attn_varlen: {name} must be None"):
        torch.ops.fastkern.flash_attn_varlen(**inputs, **{name: matrix})
    with pytest.raises(TypeError, match=name):
        fastkern.flash_attn_varlen(**inputs, **{name: matrix})


@pytest.mark.parametrize("wrong", [3, (1,), (1, 2, 3), "ab", None, ("a", 1), (1.5, 0)], ids=repr)
def test_windows_are_pairs(wrong: Any, device: str) -> None:
    inputs = made(device, torch.float32, 1, 5, 7, 2, 8)
    with pytest.raises((TypeError, RuntimeError), match="flash_attn"):
        fastkern.flash_attn(**inputs, window=wrong)
    expected = fastkern.flash_attn(**inputs)
    for good in ((None, None), [None, -1], (-1, 7)):
        assert torch.equal(fastkern.flash_attn(**inputs, window=good), expected)


# ---- torch.compile and export ----------------------------------------------------------------------------------------


def _gradients(function: Any, inputs: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    leaves = {k: t.detach().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}
    out, lse = function(**leaves, **more)
    names = [k for k, t in leaves.items() if t.requires_grad]
    grads = torch.autograd.grad(out.sum() + lse.clamp_min(-1).sum(), [leaves[k] for k in names])
    return {"out": out.detach(), "lse": lse.detach(), **{f"d{k}": g for k, g in zip(names, grads, strict=True)}}


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "window_left": 9}, {"softcap": 20.0, "top_left": True, "causal": True}], ids=str
)
def test_one_graph_for_all_lengths(options: dict[str, Any], device: str) -> None:
    """Also for S == T and for one query, after graphs of other lengths."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, bias: rows.flash_attn(q, k, v, bias=bias, **options),
        fullgraph=True, dynamic=True, backend=counter,
    )  # fmt: skip
    for B, S, T in ((2, 17, 33), (3, 40, 90), (5, 130, 64), (2, 65, 65)):
        inputs = made(device, torch.float32, B, S, T, 6, 16, group=2) | {"bias": torch.randn(1, 6, 1, T, device=device)}
        expected = _gradients(lambda **leaves: rows.flash_attn(**leaves, **options), inputs)
        # Else dynamo traces a float first as a symbol and then again as the constant it turns out to be.
        with torch._dynamo.config.patch(specialize_float=True):
            assert_same_bits(_gradients(compiled, inputs), expected, f"{B} {S} {T}")
    assert counter.frame_count == 1, f"{counter.frame_count} graphs"


def test_one_graph_for_all_packed_lengths(device: str) -> None:
    """The longest lengths are numbers that change every step; they must not make a new graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(max_q: int, max_k: int, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        return fastkern.flash_attn_varlen(
            **inputs, max_seqlen_q=max_q, max_seqlen_k=max_k, causal=True, return_lse=True
        )  # type: ignore[return-value]

    for lengths in (((17, 33), (5, 9)), ((40, 90), (3, 7), (50, 64)), ((130, 64), (1, 0), (0, 20), (66, 66))):
        entries = [
            {n: t[0] for n, t in made(device, torch.float32, 1, S, T, 8, 16, group=2, seed=S).items()}
            for S, T in lengths
        ]
        inputs = packed(entries)
        expected = _gradients(rows.flash_attn_varlen, inputs, causal=True)
        most = [max(pair[i] for pair in lengths) for i in (0, 1)]
        with torch._dynamo.config.patch(specialize_float=True):
            assert_same_bits(_gradients(compiled, inputs, max_q=most[0], max_k=most[1]), expected, f"{lengths}")
    assert counter.frame_count == 1, f"{counter.frame_count} graphs"


def test_export_with_dynamic_lengths(device: str) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return fastkern.flash_attn(q, k, v, causal=True, window=(20, 0), return_lse=True)

    B, S, T = (torch.export.Dim(name, min=2, max=4096) for name in "BST")
    shapes = {"q": {0: B, 1: S}, "k": {0: B, 1: T}, "v": {0: B, 1: T}}
    example = made(device, torch.float32, 2, 17, 33, 6, 16, group=2)
    program = torch.export.export(Attention(), tuple(example.values()), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(target.startswith("fastkern.flash_attn") for target in targets), targets
    for sizes in ((2, 17, 33), (3, 40, 2), (5, 130, 64)):
        inputs = made(device, torch.float32, *sizes, 6, 16, group=2)
        got = dict(zip(("out", "lse"), program.module()(*inputs.values()), strict=True))
        expected = fastkern.flash_attn(**inputs, causal=True, window=(20, 0), return_lse=True)
        assert_same_bits(got, dict(zip(("out", "lse"), expected, strict=True)), f"{sizes}")


def test_export_of_packed_sequences(device: str) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Any:
            return fastkern.flash_attn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True)

    def inputs(*lengths: tuple[int, int]) -> dict[str, Tensor]:
        return packed([{n: t[0] for n, t in made(device, torch.float32, 1, S, T, 6, 16).items()} for S, T in lengths])

    rows_q, rows_k, edges = (torch.export.Dim(name, min=2, max=4096) for name in ("rows_q", "rows_k", "edges"))
    shapes = {
        "q": {0: rows_q},
        "k": {0: rows_k},
        "v": {0: rows_k},
        "cu_seqlens_q": {0: edges},
        "cu_seqlens_k": {0: edges},
    }
    program = torch.export.export(Attention(), tuple(inputs((17, 33), (5, 9)).values()), dynamic_shapes=shapes)
    other = inputs((40, 70), (3, 0), (64, 65))
    got = program.module()(*other.values())
    assert not bool(got.isnan().any())
    assert torch.equal(got, fastkern.flash_attn_varlen(**other, causal=True))


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_flops(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = {k: t.requires_grad_() for k, t in made(device, torch.float32, 2, 17, 33, 6, 16, group=2, V=24).items()}
    with FlopCounterMode(display=False) as counter:
        out = fastkern.flash_attn(**inputs)
        forward = counter.get_total_flops()
        out.sum().backward()
    pairs = 2 * 6 * 17 * 33
    assert forward == 2 * pairs * (16 + 24)
    assert counter.get_total_flops() - forward == 2 * pairs * (3 * 16 + 2 * 24)
    row = rows.FLASH_ATTN
    assert (row.flops(inputs, False), row.flops(inputs, True)) == (forward, counter.get_total_flops() - forward)


def test_close_to_torch(device: str) -> None:
    """The one thing that everybody has."""
    inputs = made(device, torch.float32, 2, 130, 130, 6, 32)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in inputs.values()), is_causal=True
    )
    got = fastkern.flash_attn(**inputs, causal=True)
    assert_close({"out": got}, {"out": theirs.transpose(1, 2)}, 1e-5)
    assert_close({"out": got}, {"out": truth(inputs | {"causal": True}, use_lse=False)["out"]}, 1e-5)
