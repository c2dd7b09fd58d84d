# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings: what a row of the table cannot say. Packed sequences, in place, refusals of data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import fastkern
import pytest
import torch
from fastkern.specs import in_float64
from fastkern.specs.rope import qk_norm_rope_reference, rope_reference
from harness.cases import assert_bitwise
from torch import Tensor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def made(device: str, dtype: torch.dtype, *shape: int, k_heads: int = 2, rows: int = 40) -> dict[str, Tensor]:
    """Q of ``shape``, k with other heads, and tables in float32."""
    torch.manual_seed(sum(shape))
    q = torch.randn(shape, device=device).to(dtype)
    k = torch.randn(*shape[:-2], k_heads, shape[-1], device=device).to(dtype)
    cos, sin = fastkern.rope_table(rows, shape[-1], device=device)
    return {"q": q, "k": k, "cos": cos, "sin": sin}


def near(got: Tensor, truth: Tensor, what: str = "") -> None:
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), truth.double(), rtol=eps, atol=4 * eps, msg=lambda m: f"{what}: {m}")


# ---- operands --------------------------------------------------------------------------------------------------------


@DTYPES
@PAIRS
def test_without_k(device: str, dtype: torch.dtype, interleaved: bool) -> None:
    a = made(device, dtype, 2, 7, 3, 64)
    q, _ = fastkern.rope(**a, interleaved=interleaved)
    assert_bitwise(fastkern.rope(a["q"], None, a["cos"], a["sin"], interleaved=interleaved), q, "rope")
    weight = torch.randn(64, device=device)
    pair = fastkern.qk_norm_rope(a["q"], a["k"], weight, None, a["cos"], a["sin"], interleaved=interleaved)
    alone = fastkern.qk_norm_rope(a["q"], None, weight, None, a["cos"], a["sin"], interleaved=interleaved)
    assert_bitwise(alone, pair[0], "qk_norm_rope")


@DTYPES
def test_forms_of_positions(device: str, dtype: torch.dtype) -> None:
    """(S,), (1, S), (B, S), both integer types and rows for each token say the same."""
    a = made(device, dtype, 3, 9, 4, 32)
    places = torch.randperm(40, device=device)[:9]
    expected = fastkern.rope(**a, positions=places)
    rows = {"cos": a["cos"][places][None], "sin": a["sin"][places][None]}
    again = [
        fastkern.rope(**a, positions=places.int()),
        fastkern.rope(**a, positions=places[None]),
        fastkern.rope(**a, positions=places.expand(3, 9)),
        fastkern.rope(**a, positions=torch.stack((places, places, places), -1).T),
        fastkern.rope(**(a | rows)),
        fastkern.rope(**(a | {name: t.expand(3, 9, 16) for name, t in rows.items()})),
        fastkern.rope(**(a | {name: torch.cat((t, t), -1) for name, t in rows.items()})),
    ]
    for number, pair in enumerate(again):
        for got, want in zip(pair, expected, strict=True):
            assert_bitwise(got, want, f"form {number}")
    for got, want in zip(expected, rope_reference(**in_float64(a), positions=places), strict=True):
        near(got, want)


@DTYPES
@PAIRS
def test_views_of_a_fused_projection(device: str, dtype: torch.dtype, interleaved: bool) -> None:
    """q and k as slices of one tensor, and heads before tokens as Hugging Face has them."""
    torch.manual_seed(0)
    fused = torch.randn(2, 9, 4 + 2 + 2, 48, device=device).to(dtype)
    q, k, _ = fused.split((4, 2, 2), dim=2)
    cos, sin = fastkern.rope_table(9, 48, device=device)
    expected = fastkern.rope(q.contiguous(), k.contiguous(), cos, sin, interleaved=interleaved)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 2).contiguous().transpose(1, 2)
    for pair in ((q, k), heads_first):
        for got, want in zip(fastkern.rope(*pair, cos, sin, interleaved=interleaved), expected, strict=True):
            assert_bitwise(got, want, "of a view")
            assert got.is_contiguous()


# ---- packed sequences ------------------------------------------------------------------------------------------------


@DTYPES
@PAIRS
@pytest.mark.parametrize("bounds", [(0, 5, 5, 17, 30), (0, 30), (3, 10, 27), (0,), (0, 1, 2)])
def test_sequences(device: str, dtype: torch.dtype, interleaved: bool, bounds: tuple[int, ...]) -> None:
    """Positions begin anew in each sequence; tokens of none stay as they are. Forward and backward."""
    a = made(device, dtype, 30, 3, 64)
    q, k = (a[name].requires_grad_() for name in ("q", "k"))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    options: dict[str, Any] = {"cos": a["cos"], "sin": a["sin"], "interleaved": interleaved}
    got = fastkern.rope(q, k, cu_seqlens=cu_seqlens, **options)
    assert [t.shape for t in got] == [q.shape, k.shape]
    for turned, x in zip(got, (q, k), strict=True):
        expected = x.detach().clone()
        for first, last in pairwise(bounds):
            expected[first:last] = fastkern.rope(x.detach()[first:last], None, **options)
        assert_bitwise(turned.detach(), expected, "sequences")
    grads = torch.autograd.grad(got, (q, k), got)  # turned back
    for grad, x in zip(grads, (q, k), strict=True):
        near(grad, x, "turned and turned back") if dtype == torch.float32 else None
    weight = torch.randn(64, device=device)
    ours = fastkern.qk_norm_rope(q.detach(), k.detach(), weight, None, cu_seqlens=cu_seqlens, **options)
    wide = in_float64({"q": q, "k": k, "q_weight": weight, "k_weight": None} | options)
    for normed, want in zip(ours, qk_norm_rope_reference(**wide, cu_seqlens=cu_seqlens), strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(normed.double(), want, rtol=eps, atol=8 * eps)


def test_packed_tokens_count_on_without_sequences(device: str) -> None:
    a = made(device, torch.float32, 30, 3, 64)
    for got, want in zip(
        fastkern.rope(**a), fastkern.rope(a["q"][None], a["k"][None], a["cos"], a["sin"]), strict=True
    ):
        assert_bitwise(got, want[0], "packed")
    places = torch.arange(30, device=device).flip(0)
    for got, want in zip(
        fastkern.rope(**a, positions=places), rope_reference(**in_float64(a), positions=places), strict=True
    ):
        near(got, want)


# ---- in place --------------------------------------------------------------------------------------------------------


@DTYPES
@PAIRS
@pytest.mark.parametrize("rotary_dim", [None, 16, 10])
def test_in_place(device: str, dtype: torch.dtype, interleaved: bool, rotary_dim: int | None) -> None:
    """The bits of rope, in a slice of a fused projection, around which nothing changes."""
    torch.manual_seed(1)
    fused = torch.randn(2, 9, 8, 48, device=device).to(dtype)
    cos, sin = fastkern.rope_table(9, rotary_dim or 48, device=device)
    options = {"interleaved": interleaved, "rotary_dim": rotary_dim}
    expected = fused.clone()
    expected[:, :, :4], expected[:, :, 4:6] = fastkern.rope(fused[:, :, :4], fused[:, :, 4:6], cos, sin, **options)
    q, k = fused[:, :, :4], fused[:, :, 4:6]
    version = fused._version
    found = fastkern.rope_(q, k, cos, sin, **options)
    assert found[0] is q
    assert found[1] is k
    assert_bitwise(fused, expected, "in place")
    assert fused._version > version
    assert fastkern.rope_(q, None, cos, sin, inverse=True, **options) is q


def test_in_place_refuses(device: str) -> None:
    a = made(device, torch.float32, 2, 5, 3, 16)
    cos, sin = a["cos"], a["sin"]
    kept = a["q"].clone()

    def refused(message: str, *call: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            fastkern.rope_(*call, cos, sin)
        assert_bitwise(a["q"], kept, message)

    refused(
        r"rope_: q must be writable in place: .*, got shape|rope_: q must be writable",
        a["q"][:, :1].expand(2, 5, 3, 16),
        None,
    )
    refused("rope_: q must be writable", a["q"].mT.contiguous().mT, None)
    refused("rope_: k must be writable", a["q"], a["k"][:, :, :1].expand(2, 5, 4, 16))
    refused("rope_: k must not be the memory of q", a["q"], a["q"])
    refused("rope_: q must not require grad", a["q"].clone().requires_grad_(), None)
    with pytest.raises(RuntimeError, match="rope_: q must be a tensor, got None"):
        fastkern.rope_(None, None, cos, sin)


def test_in_place_under_transforms(device: str) -> None:
    a = made(device, torch.float32, 3, 5, 4, 16)
    expected = fastkern.rope(**a)

    def turn(q: Tensor, k: Tensor) -> Any:
        return fastkern.rope_(q, k, a["cos"], a["sin"])

    for call in (torch.func.vmap(turn), torch.compile(turn, backend="aot_eager")):
        q, k = a["q"].clone(), a["k"].clone()
        # vmap's entries are (S, H, D): packed tokens.
        call(q, k)
        assert_bitwise(q, expected[0], "q")
        assert_bitwise(k, expected[1], "k")
    with pytest.raises(RuntimeError, match="rope_: q must be batched by vmap too"):
        torch.func.vmap(lambda k: (fastkern.rope_(a["q"][0].clone(), k, a["cos"], a["sin"]), k)[1])(a["k"].clone())
    op = torch.ops.fastkern.rope_.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (a["q"].clone(), a["k"].clone(), a["cos"], a["sin"]), test_utils=tests)
    torch.library.opcheck(op, (a["q"].clone(), None, a["cos"], a["sin"]), test_utils=tests)


# ---- bad data --------------------------------------------------------------------------------------------------------

BAD = [-1, 40, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("bad", [*BAD, 2**40, -(2**63)])
@pytest.mark.parametrize("function", [fastkern.rope, fastkern.rope_], ids=["rope", "rope_"])
def test_positions_outside_of_the_table(device: str, function: Callable[..., Any], bad: int) -> None:
    """Refused on the CPU, before anything is written; NaN in the columns that are turned on CUDA."""
    a = made(device, torch.float32, 2, 9, 3, 32)
    cos, sin = fastkern.rope_table(40, 16, device=device)
    positions = torch.arange(18, device=device).view(2, 9)
    good = fastkern.rope(a["q"], a["k"], cos, sin, positions, rotary_dim=16)
    positions[1, 4] = bad
    if bad in BAD:
        positions = positions.int()
    q, k = a["q"].clone(), a["k"].clone()
    if device == "cpu":
        words = (
            rf"{function.__name__}: positions must give positions between 0 and 39, for which cos has rows; got {bad} "
        )
        with pytest.raises(RuntimeError, match=words):
            function(q, k, cos, sin, positions, rotary_dim=16)
        assert_bitwise(q, a["q"], "nothing written")
        return
    for got, want in zip(function(q, k, cos, sin, positions, rotary_dim=16), good, strict=True):
        assert bool(got[1, 4, :, :16].isnan().all())
        want[1, 4, :, :16] = 0.0
        assert_bitwise(got.nan_to_num(0.0), want, "other tokens")


@pytest.mark.parametrize("bounds", [(-5, 3, 30), (0, 90), (20, 10, 0), (2**31 - 1, -(2**31)), (0, -7, 30)])
def test_bad_sequences_never_leave_the_table(device: str, bounds: tuple[int, ...]) -> None:
    """Anything but a crash: an error on the CPU, or numbers, or NaN."""
    a = made(device, torch.float32, 30, 3, 64, rows=25)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    try:
        got = fastkern.rope(**a, cu_seqlens=cu_seqlens)
    except RuntimeError as error:
        if device != "cpu" or "rope: cu_seqlens must give positions between 0 and 24" not in str(error):
            raise
        return
    assert [t.shape for t in got] == [a["q"].shape, a["k"].shape]
    assert bool((got[0].isnan() | (got[0].abs() < 100)).all())


def test_refusals(device: str) -> None:
    a = made(device, torch.float32, 30, 3, 64)
    starts = torch.tensor([0, 30], dtype=torch.int32, device=device)
    for message, change in (
        ("cu_seqlens must be None beside positions", {"positions": torch.arange(30, device=device)}),
        (r"cu_seqlens must have shape \(B \+ 1,\), got \(0,\)", {"cu_seqlens": starts[:0]}),
        (r"cos must have shape \(T, W\) with W 32 or 64, got \(1, 40, 32\)", {"cos": a["cos"][None]}),
        ("cos must not require grad, it has no gradient here", {"cos": a["cos"].clone().requires_grad_()}),
        ("sin must not require grad, it has no gradient here", {"sin": a["sin"].clone().requires_grad_()}),
    ):
        for function in (fastkern.rope, torch.ops.fastkern.rope):
            with pytest.raises(RuntimeError, match=f"fastkern::rope: {message}"):
                function(**{**a, "cu_seqlens": starts, **change})
    large = torch.zeros(1, 2, 1, 512, device=device)
    with pytest.raises(RuntimeError, match="rotary_dim must be a multiple of 16 in heads of 512 columns, got 510"):
        fastkern.qk_norm_rope(large, None, None, None, *fastkern.rope_table(2, 510, device=device), rotary_dim=510)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_backward_saves_tables_alone(device: str) -> None:
    """What q and k hold when backward comes does not matter."""
    a = made(device, torch.float32, 2, 9, 4, 32)
    q, k = (a[name].clone().requires_grad_() for name in ("q", "k"))
    out = fastkern.rope(q, k, a["cos"], a["sin"])
    with torch.no_grad():
        q.fill_(float("nan"))
    dys = [torch.randn_like(t) for t in out]
    back = fastkern.rope(*dys, a["cos"], a["sin"], inverse=True)
    for grad, want in zip(torch.autograd.grad(out, (q, k), dys), back, strict=True):
        assert_bitwise(grad, want, "gradient")


@PAIRS
def test_forward_mode(device: str, interleaved: bool) -> None:
    """jvp is the formula's."""
    a = made(device, torch.float32, 2, 9, 4, 32)
    weight = torch.randn(32, device=device)

    def norm(function: Callable[..., Any], q: Tensor, weight: Tensor) -> Any:
        return function(q, a["k"].to(q.dtype), weight, None, a["cos"], a["sin"], interleaved=interleaved)[0]

    tangents = torch.randn_like(a["q"]), torch.randn_like(weight)
    primals = a["q"], weight
    _, got = torch.func.jvp(lambda *x: norm(fastkern.qk_norm_rope, *x), primals, tangents)
    wide = [tuple(t.double() for t in pair) for pair in (primals, tangents)]
    _, want = torch.func.jvp(lambda *x: norm(qk_norm_rope_reference, *x), *wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)

    def turn(q: Tensor) -> Tensor:
        return fastkern.rope(q, None, a["cos"], a["sin"], interleaved=interleaved)

    _, got = torch.func.jvp(turn, (a["q"],), tangents[:1])
    torch.testing.assert_close(got, turn(tangents[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.large
def test_many_elements(cuda: None) -> None:
    """More than 2^31 elements: the first and the last tokens are what they are on their own."""
    tokens, heads, n = 2**31 // (64 * 128) + 5, 64, 128
    if torch.cuda.mem_get_info()[0] < 5 * tokens * heads * n:
        pytest.skip("too little memory")
    q = torch.empty(1, tokens, heads, n, device="cuda", dtype=torch.bfloat16).normal_()
    cos, sin = fastkern.rope_table(64, n, device="cuda")
    positions = torch.arange(tokens, device="cuda") % 64
    turned = fastkern.rope(q, None, cos, sin, positions)
    normed = fastkern.qk_norm_rope(q[:, : tokens // 2], None, None, None, cos, sin, positions=positions[: tokens // 2])
    for part in (slice(0, 3), slice(tokens // 2 - 3, tokens // 2), slice(tokens - 3, tokens)):
        own = fastkern.rope(q[:, part], None, cos, sin, positions[part])
        assert_bitwise(turned[:, part], own, f"tokens {part}")
    last = slice(tokens // 2 - 3, tokens // 2)
    own = fastkern.qk_norm_rope(q[:, last], None, None, None, cos, sin, positions=positions[last])
    assert_bitwise(normed[:, last], own, "normed")


@pytest.mark.cuda
def test_one_launch(cuda: None) -> None:
    """q and k in one kernel, without a copy, also from a fused projection."""
    fused = torch.randn(2, 64, 48, 128, device="cuda", dtype=torch.bfloat16)
    q, k, _ = fused.split((32, 8, 8), dim=2)
    cos, sin = fastkern.rope_table(64, 128, device="cuda")
    weight = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    for call in (lambda: fastkern.rope(q, k, cos, sin), lambda: fastkern.rope_(q, k, cos, sin),
                 lambda: fastkern.qk_norm_rope(q, k, weight, weight, cos, sin)):  # fmt: skip
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [name for name in kernels if "ynchronize" not in name]
        assert len(kernels) == 1, kernels
        assert "rope_kernel" in kernels[0]
