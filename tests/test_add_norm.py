# SPDX-License-Identifier: Apache-2.0
"""What the rows of the spec table cannot say of the norms with a residual stream."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import fastkern
import pytest
import torch
from fastkern.ops import _philox
from fastkern.specs import SPECS, OpSpec
from harness.cases import assert_bitwise, make_inputs, pick_dims, run_forward
from harness.layouts import LAYOUTS
from torch import Tensor

ROWS = {spec.name: spec for spec in SPECS}
ADD = [spec for spec in SPECS if spec.name.startswith("add_") and not spec.name.endswith("quant")]
KINDS = ("rms", "layer")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
kinds = pytest.mark.parametrize("kind", KINDS)


def plain_of(name: str) -> Callable[..., Tensor]:
    return fastkern.layer_norm if "layer" in name else fastkern.rms_norm


@pytest.mark.parametrize(
    ("spec", "variant"), [pytest.param(s, v, id=f"{s.name}-{i}") for s in ADD for i, v in enumerate(s.variants)]
)
@all_dtypes
def test_outputs_are_the_norm_of_h(spec: OpSpec, variant: Any, dtype: torch.dtype, device: str) -> None:
    """y has the bits of the norm of h, which is why h is rounded first."""
    norm = plain_of(spec.name)
    for dims in pick_dims(spec, 6, limit=1 << 17):
        inputs = make_inputs(spec, device, dtype, dims, variant)
        *ys, h = run_forward(spec.function, inputs)
        common = {"eps": inputs["eps"], "weight_offset": inputs.get("weight_offset", 0.0)}
        for y, which in zip(ys, ("", "2"), strict=False):
            affine = {"weight": inputs.get(f"weight{which}"), "bias": inputs.get(f"bias{which}")}
            again = norm(h, **affine, **common, out_dtype=y.dtype)
            floats = [v for k, v in inputs.items() if k in ("x", "residual") and isinstance(v, Tensor)]
            one_type = len({t.dtype for t in (*floats, h, y)}) == 1
            if device == "cuda" and not (one_type and (len(ys) == 1 or h.shape[-1] <= 16384)):
                torch.testing.assert_close(y, again)  # other kernels than norm(h) takes, other order of sums
                continue
            assert_bitwise(y, again, f"{spec.name} {dims} {dtype} {variant}: y{which}")


@all_dtypes
@kinds
def test_default_dtypes(kind: str, dtype: torch.dtype, device: str) -> None:
    """h is of the dtype of the residual, or of x without one; y of the dtype of x."""
    x = torch.randn(3, 40, device=device).to(dtype)
    add = getattr(fastkern, f"add_{kind}_norm")
    for residual in (None, *(torch.randn(3, 40, device=device).to(other) for other in DTYPES)):
        y, h = add(x, residual)
        assert (y.dtype, h.dtype) == (dtype, dtype if residual is None else residual.dtype)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_philox_known_answers(device: str) -> None:
    """The vectors that Salmon and others publish with their code (Random123, philox4x32_10)."""
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    table = [
        ((0, 0, 0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]

    def word64(low: int, high: int) -> Tensor:
        value = low | high << 32
        return torch.tensor(value - (1 << 64) if value >> 63 else value, device=device)

    for (c0, c1, c2, c3, k0, k1), expected in table:
        found = _philox.words(word64(k0, k1), word64(c2, c3), word64(c0, c1))
        assert tuple(int(word) for word in found) == expected


@kinds
def test_mask(kind: str, device: str) -> None:
    """Kept or dropped element by element as the replay says, at every seed, offset and probability."""
    add = getattr(fastkern, f"add_{kind}_norm")
    x = torch.ones(37, 1003, device=device)
    for seed, offset in ((0, 0), (-1, 2**62), (2**63 - 1, -5), (123, 1)):
        for p in (1e-10, 0.1, 0.5, 0.999, 1.0):
            drawn = {"seed": torch.tensor([seed], device=device), "offset": torch.tensor(offset, device=device)}
            h = add(x, None, dropout_p=p, **drawn)[1]
            keep = _philox.keep_mask(x.shape, p, **drawn)
            assert torch.equal(h, torch.where(keep, _philox.keep_scale(p), 0.0).to(h.dtype)), (seed, offset, p)
    share = keep_share(add, x, 0.3)
    assert abs(share - 0.7) < 0.01, share


def keep_share(add: Any, x: Tensor, p: float) -> float:
    return float((add(x, None, dropout_p=p)[1] != 0).double().mean())


@kinds
def test_drawn_seeds(kind: str, device: str) -> None:
    """Without a seed torch's generator of the device gives one: another every time, the same after manual_seed."""
    add = getattr(fastkern, f"add_{kind}_norm")
    x = torch.randn(8, 256, device=device, requires_grad=True)
    torch.manual_seed(7)
    first, second = (add(x, x, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first[1], second[1])
    torch.manual_seed(7)
    again = add(x, x, dropout_p=0.5)
    assert torch.equal(first[1], again[1])
    grads = [torch.autograd.grad(h.sum(), x)[0] for _, h in (first, again)]
    assert torch.equal(*grads)
    assert set(grads[0].unique().tolist()) == {1.0, 3.0}  # through the residual, and through what was kept


@kinds
def test_offset_is_zero_by_default(kind: str, device: str) -> None:
    add = getattr(fastkern, f"add_{kind}_norm")
    x, seed = torch.randn(8, 256, device=device), torch.tensor(5, device=device)
    expected = add(x, None, dropout_p=0.5, seed=seed, offset=torch.zeros_like(seed))
    for ours, theirs in zip(add(x, None, dropout_p=0.5, seed=seed), expected, strict=True):
        assert_bitwise(ours, theirs, "no offset")


# ---- gradients -------------------------------------------------------------------------------------------------------


@kinds
def test_one_gradient_for_both(kind: str, device: str) -> None:
    """Where nothing tells the gradients of x and residual apart, they are one tensor."""
    add = getattr(fastkern, f"add_{kind}_norm")
    x, residual = (torch.randn(4, 64, device=device, requires_grad=True) for _ in range(2))
    dx, dresidual = torch.autograd.grad(sum(t.square().sum() for t in add(x, residual)), (x, residual))
    assert dx.data_ptr() == dresidual.data_ptr()
    scaled = add(x, residual, rowscale=torch.full((4,), 0.5, device=device))
    dx, dresidual = torch.autograd.grad(sum(t.square().sum() for t in scaled), (x, residual))
    assert_bitwise(dx, dresidual / 2, "half of it")


@kinds
def test_forward_mode(kind: str, device: str) -> None:
    """jvp through dropout, rowscale and both outputs, against a difference quotient in the same mask."""
    add = getattr(fastkern, f"add_{kind}_norm")
    x, residual, tangent = (torch.randn(4, 64, device=device) for _ in range(3))
    more = {"dropout_p": 0.4, "seed": torch.tensor(3, device=device), "rowscale": torch.rand(4, device=device)}
    (_, h), (dy, dh) = torch.func.jvp(lambda t: add(t, residual, **more), (x,), (tangent,))
    assert_bitwise(h, add(x, residual, **more)[1], "the primal h")
    step = 1e-2
    after, before = (add(x + sign * step * tangent, residual, **more) for sign in (1, -1))
    for found, up, down in zip((dy, dh), after, before, strict=True):
        torch.testing.assert_close(found, (up - down) / (2 * step), rtol=1e-2, atol=1e-2)


# ---- in place --------------------------------------------------------------------------------------------------------


def in_place_of(kind: str) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    return getattr(fastkern, f"add_{kind}_norm_"), getattr(fastkern, f"add_{kind}_norm")


WRITABLE = ("column_slice", "aligned_column_slice", "row_slice", "head_slice", "heads_first")
REFUSED = ("transposed", "step_slice", "expanded_leading", "expanded_middle", "expanded_last", "expanded_scalar")


@all_dtypes
@kinds
def test_in_place_is_the_same(kind: str, dtype: torch.dtype, device: str) -> None:
    """Bits of y and h as out of place, also in rows with gaps, and not a byte of the gaps written."""
    in_place, out_of_place = in_place_of(kind)
    for spec_dims in ((3, 1), (2, 5, 96), (2, 3, 4, 65), (3, 1024), (2, 8191), (1, 65536), (5, 0), (0, 7)):
        for residual_dtype in (dtype, torch.float32):
            x = torch.randn(spec_dims, device=device).to(dtype)
            weight = torch.randn(spec_dims[-1:], device=device).to(dtype)
            residual = torch.randn(spec_dims, device=device).to(residual_dtype)
            y, h = out_of_place(x, residual, weight, weight_offset=1.0, out_dtype=torch.float32)
            for name in ("dense", *WRITABLE) if residual.numel() else ("dense",):
                view = residual.clone() if name == "dense" else LAYOUTS[name](residual)
                if view is None or (name == "heads_first" and view.dim() > 3):  # three strides
                    continue
                what = f"add_{kind}_norm_ {spec_dims} {dtype} {residual_dtype} {name}"
                got = in_place(x, view, weight, weight_offset=1.0, out_dtype=torch.float32)
                assert_bitwise(got, y, f"{what}: y")
                assert_bitwise(view, h, f"{what}: h")
                whole = torch.empty(0, dtype=view.dtype, device=device).set_(view.untyped_storage())
                assert int(whole.isnan().sum()) == whole.numel() - view.numel(), f"{what}: wrote beside the rows"


@pytest.mark.parametrize("layout", REFUSED)
@kinds
def test_in_place_is_never_a_copy(kind: str, layout: str, device: str) -> None:
    in_place, _ = in_place_of(kind)
    x = torch.randn(2, 3, 4, 8, device=device)
    residual = LAYOUTS[layout](torch.randn_like(x))
    before = residual.clone()
    with pytest.raises(RuntimeError, match=rf"add_{kind}_norm_: residual must be writable in place.*with strides"):
        in_place(x, residual)
    assert_bitwise(residual, before, "refused, and left alone")


@kinds
def test_in_place_refusals(kind: str, device: str) -> None:
    in_place, _ = in_place_of(kind)
    x, residual = (torch.randn(3, 8, device=device) for _ in range(2))
    op = re.escape(f"add_{kind}_norm_: ")
    with pytest.raises(RuntimeError, match=op + "residual must not be the memory of x"):
        in_place(x, x)
    with pytest.raises(RuntimeError, match=op + "residual must be a tensor, got None"):
        in_place(x, None)
    with pytest.raises(TypeError, match=op + "x must be a torch.Tensor, got str"):
        in_place("x", residual)
    with pytest.raises(RuntimeError, match=op + r"residual must have shape \(3, 8\), got \(3, 7\)"):
        in_place(x, residual[:, :7])
    for name, arguments in {
        "x": (x.clone().requires_grad_(), residual),
        "residual": (x, residual.clone().requires_grad_()),
        "weight": (x, residual, torch.ones(8, device=device, requires_grad=True)),
    }.items():
        with pytest.raises(RuntimeError, match=op + f"{name} must not require grad"):
            in_place(*arguments)
        with torch.no_grad():
            in_place(*arguments)


@kinds
def test_in_place_is_seen_by_autograd(kind: str, device: str) -> None:
    in_place, _ = in_place_of(kind)
    residual, factor = torch.randn(3, 8, device=device), torch.ones(3, 8, device=device, requires_grad=True)
    product = residual * factor
    in_place(torch.randn(3, 8, device=device), residual)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@kinds
def test_in_place_opcheck(kind: str, device: str) -> None:
    op = getattr(torch.ops.fastkern, f"add_{kind}_norm_").default
    x, residual, weight = (torch.randn(s, device=device) for s in ((3, 8), (3, 8), (8,)))
    torch.library.opcheck(op, (x, residual, weight))
    torch.library.opcheck(op, (x, torch.randn(3, 9, device=device)[:, :8]), {"out_dtype": torch.bfloat16})


@kinds
def test_in_place_compiles(kind: str, device: str) -> None:
    """Under torch.compile the residual of the caller is what is written."""
    in_place, out_of_place = in_place_of(kind)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x: Tensor, residual: Tensor) -> Tensor:
        return in_place(x, residual) + 1

    for rows in (3, 5):
        x, residual = torch.randn(rows, 8, device=device), torch.randn(rows, 8, device=device)
        y, h = out_of_place(x, residual)
        assert_bitwise(compiled(x, residual), y + 1, "y")
        assert_bitwise(residual, h, "h")


@kinds
def test_in_place_vmap(kind: str, device: str) -> None:
    in_place, out_of_place = in_place_of(kind)
    x, residual, weight = (torch.randn(s, device=device) for s in ((4, 3, 8), (4, 3, 8), (4, 8)))
    for arguments, dims in (((x, residual), 0), ((x, residual, weight), 0), ((x[0], residual), (None, 0))):
        given = [a.clone() for a in arguments]
        got = torch.func.vmap(in_place, in_dims=dims)(*given)
        expected = torch.func.vmap(out_of_place, in_dims=dims)(*arguments)
        assert_bitwise(got, expected[0], "y")
        assert_bitwise(given[1], expected[1], "h")
    with pytest.raises(RuntimeError, match=f"add_{kind}_norm_: residual must be batched"):
        torch.func.vmap(in_place, in_dims=(0, None))(x, residual[0])
