# SPDX-License-Identifier: Apache-2.0
"""What the rows of the softmax family cannot say: dimensions, special values, masks as models have them, long rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastkern
import pytest
import torch
from harness.cases import assert_bitwise
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")

Function = Callable[..., Tensor]
PAIRS: dict[str, tuple[Function, Function]] = {
    "softmax": (fastkern.softmax, torch.softmax),
    "log_softmax": (fastkern.log_softmax, torch.log_softmax),
    "logsumexp": (fastkern.logsumexp, torch.logsumexp),
}
pairs = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    assert not bool((got.isnan() & ~expected.isnan()).any())
    rtol = 2e-5 if dtype == torch.float32 else 2.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=rtol / 4, equal_nan=True)


def _hidden_above(queries: int, n: int, device: str) -> Tensor:
    return ~torch.ones(queries, n, dtype=torch.bool, device=device).tril(n - queries)


# ---- dimensions ------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(7,), (3, 5), (5, 1), (1, 5), (2, 3, 4), (3, 1, 5), (2, 33, 3, 1), (2, 3, 17, 66)])
@pairs
def test_every_dimension(ours: Function, theirs: Function, shape: tuple[int, ...], dtype: torch.dtype,
                         device: str) -> None:  # fmt: skip
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    for dim in range(-len(shape), len(shape)):
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        got, expected = ours(a, dim), theirs(b, dim)
        _close(got, expected, dtype)
        dy = torch.randn(expected.shape, device=device).to(dtype)
        (da,) = torch.autograd.grad(got, a, dy)
        (db,) = torch.autograd.grad(expected, b, dy.double())
        tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(da.double(), db, rtol=tolerance, atol=tolerance * float(1 + dy.abs().max()))


@pairs
def test_dimension_and_permuted_memory(ours: Function, theirs: Function, device: str) -> None:
    """A view gives the bits of its dense copy, whatever the dimension."""
    stored = torch.randn(6, 5, 4, 7, device=device)
    for view in (stored.permute(3, 1, 0, 2), stored[:, 1:4, ::2], stored.transpose(1, 3)[1:, 2:]):
        for dim in range(view.dim()):
            assert_bitwise(ours(view, dim), ours(view.contiguous(), dim), f"dim {dim}")


def test_keepdim(device: str) -> None:
    x = torch.randn(3, 5, 7, device=device)
    for dim in (0, 1, 2, -1):
        got = fastkern.logsumexp(x, dim, keepdim=True)
        assert_bitwise(got, fastkern.logsumexp(x, dim).unsqueeze(dim), f"dim {dim}")


@pairs
def test_batching_of_counted_dimensions(ours: Function, theirs: Function, device: str) -> None:
    """vmap: a dimension counted from the front is one of the entry, not of the batch."""
    x = torch.randn(4, 3, 5, device=device)
    for dim in (0, 1, -1, -2):
        for batch in (0, 1, 2):
            got = torch.func.vmap(lambda t, dim=dim: ours(t, dim), in_dims=batch)(x)
            expected = torch.stack([ours(t, dim) for t in x.unbind(batch)])
            assert_bitwise(got, expected, f"dim {dim}, batch {batch}")


def test_batched_masks(device: str) -> None:
    x = torch.randn(4, 2, 3, 9, device=device)
    for mask in (torch.rand(4, 3, 9, device=device) < 0.6, torch.randn(4, 9, device=device)):
        got = torch.func.vmap(fastkern.masked_softmax)(x, mask)
        expected = torch.stack([fastkern.masked_softmax(t, m) for t, m in zip(x, mask, strict=True)])
        assert_bitwise(got, expected, f"mask of {tuple(mask.shape)}")
        got = torch.func.vmap(fastkern.masked_softmax, in_dims=(None, 0))(x[0], mask)
        expected = torch.stack([fastkern.masked_softmax(x[0], m) for m in mask])
        assert_bitwise(got, expected, f"one x, mask of {tuple(mask.shape)}")


# ---- dtype= ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("n", [5, 77, 9001])
def test_dtype(name: str, source: torch.dtype, target: torch.dtype, n: int, device: str) -> None:
    """x is converted first: the result is that of x.to(dtype), to a rounding of another order of sums."""
    ours, theirs = PAIRS[name]
    x = (5 * torch.randn(3, n, device=device)).to(source)
    got = ours(x, -1, target)
    assert got.dtype == target
    _close(got, theirs(x.to(target).double(), -1), target)
    a = x.clone().requires_grad_()
    dy = torch.randn(3, n, device=device).to(target)
    (da,) = torch.autograd.grad(ours(a, -1, target), a, dy)
    b = x.to(target).double().requires_grad_()
    (db,) = torch.autograd.grad(theirs(b, -1), b, dy.double())
    assert da.dtype == source
    widest = max(torch.finfo(source).eps, torch.finfo(target).eps)
    torch.testing.assert_close(
        da.double(), db, rtol=8 * widest + 1e-5, atol=(8 * widest + 1e-5) * float(db.abs().max())
    )


# ---- special values --------------------------------------------------------------------------------------------------

ROWS = {
    "all -inf": [-INF, -INF, -INF, -INF],
    "one -inf": [-INF, 0.0, 1.0, 2.0],
    "one finite": [-INF, -INF, 3.0, -INF],
    "one +inf": [0.0, INF, 1.0, -3.0],
    "both": [INF, -INF, 0.0, 0.0],
    "all +inf": [INF, INF, INF, INF],
    "one NaN": [0.0, NAN, 1.0, 2.0],
    "NaN and -inf": [NAN, -INF, -INF, -INF],
    "NaN and +inf": [NAN, INF, 0.0, 0.0],
    "far apart": [-3e38, 3e38, 0.0, 1.0],
    "largest": [3e38, 3e38, 3e38, 3e38],
    "ordinary": [0.5, -0.5, 2.0, 1.0],
}


@pytest.mark.parametrize("repeat", [1, 33, 300, 4001, 24577])
@pytest.mark.parametrize("layout", ["last", "middle"])
@pairs
def test_infinities(ours: Function, theirs: Function, layout: str, repeat: int, device: str) -> None:
    """As torch: rows in one warp, in a block, in shared memory, in a cluster; and other dimensions."""
    x = torch.tensor(list(ROWS.values()), device=device).repeat_interleave(repeat, 1)
    if layout == "middle":
        x = x.unsqueeze(-1).expand(-1, -1, 3).contiguous()
    dim = -1 if layout == "last" else 1
    got, expected = ours(x, dim), theirs(x.double(), dim).float()
    for i, name in enumerate(ROWS):
        torch.testing.assert_close(got[i], expected[i], rtol=1e-5, atol=1e-7, equal_nan=True, msg=f"row: {name}")


def test_logsumexp_of_nothing(device: str) -> None:
    for dim, shape in ((1, (3, 0)), (0, (0, 3)), (1, (2, 0, 3))):
        x = torch.empty(shape, device=device, requires_grad=True)
        got = fastkern.logsumexp(x, dim)
        assert torch.equal(got, torch.full_like(got, -INF))
        assert torch.autograd.grad(got.sum(), x)[0].shape == shape
    assert fastkern.logsumexp(torch.empty(0, 5, device=device), 1).shape == (0,)
    assert fastkern.softmax(torch.empty(3, 0, device=device)).shape == (3, 0)


# ---- what a softmax is -----------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (289, 2), (77, 77), (8192, 77), (289, 1000), (5, 32000), (3, 50257),
                                         (2, 128256), (1, 151936), (1, 262144)])  # fmt: skip
def test_rows_sum_to_one(rows: int, n: int, dtype: torch.dtype, device: str) -> None:
    x = (4 * torch.randn(rows, n, device=device)).to(dtype)
    y = fastkern.softmax(x, -1, torch.float32)
    assert bool(torch.isfinite(y).all())
    assert bool((y >= 0).all())
    assert float((y.double().sum(-1) - 1).abs().max()) < 1e-4
    assert float((fastkern.log_softmax(x, -1, torch.float32).double().exp().sum(-1) - 1).abs().max()) < 1e-4


@pytest.mark.parametrize("shift", [-1000.0, 8.0, 4096.0, 2.0**20])
@pytest.mark.parametrize("n", [3, 77, 1000, 9001, 128256])
def test_shift_invariance(n: int, shift: float, device: str) -> None:
    """Of values to which the shift can be added without a rounding."""
    x = torch.randint(-40, 40, (3, n), device=device) / 8.0
    for ours in (fastkern.softmax, fastkern.log_softmax):
        assert_bitwise(ours(x + shift), ours(x), f"{ours.__name__} + {shift}")
    torch.testing.assert_close(
        fastkern.logsumexp(x + shift) - shift, fastkern.logsumexp(x), rtol=1e-5, atol=2e-7 * abs(shift)
    )


# ---- masks -----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "n"),
    [(2, 3, 5, 7), (2, 2, 33, 64), (1, 2, 65, 33), (2, 1, 3, 1000), (1, 1, 4, 9001)],
)
def test_masks_as_models_have_them(batch: int, heads: int, queries: int, n: int, dtype: torch.dtype,
                                   device: str) -> None:  # fmt: skip
    """Padding, causal and both, broadcast over heads, queries and batch; bool, Megatron's inverse, and added ones."""
    x = torch.randn(batch, heads, queries, n, device=device).to(dtype)
    padding = torch.arange(n, device=device) < torch.tensor([[n], [n // 2 + 1]], device=device)[:batch]
    causal = ~_hidden_above(queries, n, device)
    megatron = ~(padding[:, None, None] & causal)  # True: hidden
    masks = {
        "padding": padding[:, None, None],
        "causal": causal,
        "both, Megatron's": ~megatron,
        "one a query": causal[:, :1],
        "a head": torch.rand(heads, 1, n, device=device) < 0.5,
    }
    for name, keep in masks.items():
        z = (x.double() * 0.125).masked_fill(~keep, -INF)
        hidden = (z == -INF).all(-1, keepdim=True)
        expected = torch.softmax(z, -1).masked_fill(hidden, 0.0)
        got = fastkern.masked_softmax(x, keep, 0.125)
        _close(got, expected, dtype)
        assert bool((got[hidden.expand_as(got)] == 0).all()), name
        added = torch.zeros(keep.shape, device=device, dtype=dtype).masked_fill(~keep, -INF)
        assert_bitwise(fastkern.masked_softmax(x, added, 0.125), got, f"{name}, added")
        wide = keep.expand_as(x)
        assert_bitwise(fastkern.masked_softmax(x, wide.contiguous(), 0.125), got, f"{name}, written out")
        assert_bitwise(fastkern.masked_softmax(x, wide.movedim(1, 3).contiguous().movedim(3, 1), 0.125), got, name)
    assert_bitwise(fastkern.causal_softmax(x, 0.125), fastkern.masked_softmax(x, causal, 0.125), "causal_softmax")
    assert_bitwise(fastkern.masked_softmax(x), fastkern.softmax(x), "no mask")


def test_hidden_rows(device: str) -> None:
    """Rows that see nothing are 0 with a gradient of 0, and what is hidden is not looked at."""
    for n in (5, 77, 3000, 9001, 70001):
        x = torch.randn(2, 4, n, device=device)
        keep = torch.rand(2, 4, n, device=device) < 0.5
        keep[0, 1] = False
        x[~keep] = NAN
        x.requires_grad_()
        y = fastkern.masked_softmax(x, keep)
        assert bool(torch.isfinite(y).all())
        assert bool((y[~keep] == 0).all())
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert bool(torch.isfinite(dx).all())
        assert bool((dx[~keep] == 0).all())
        assert bool((dx[keep] != 0).any())

        hidden = _hidden_above(9, 5, device)  # the first four rows see nothing
        z = torch.randn(2, 9, 5, device=device).masked_fill(hidden, NAN).requires_grad_()
        y = fastkern.causal_softmax(z)
        assert bool((y[:, :4] == 0).all())
        assert bool(torch.isfinite(y).all())
        dy = torch.randn_like(y).masked_fill(hidden, NAN)
        (dz,) = torch.autograd.grad(y, z, dy)
        assert bool(torch.isfinite(dz).all())
        assert bool((dz[:, :4] == 0).all())


def test_gradient_of_a_mask_is_refused(device: str) -> None:
    x = torch.randn(3, 5, device=device)
    mask = torch.zeros(3, 5, device=device, requires_grad=True)
    for call in (fastkern.masked_softmax, torch.ops.fastkern.masked_softmax):
        for first in (x, x.clone().requires_grad_()):
            with pytest.raises(RuntimeError, match="masked_softmax: mask must not require grad"):
                call(first, mask)
    with torch.no_grad():
        fastkern.masked_softmax(x, mask)
    fastkern.masked_softmax(x, mask.detach())


# ---- sizes, repeats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [77, 4096, 8200, 40001, 262144, 800003])
@dtypes
def test_same_bits_again(n: int, dtype: torch.dtype, device: str) -> None:
    """And alone, and from memory that is not aligned."""
    x = torch.randn(3, n, device=device).to(dtype)
    dy = torch.randn(3, n, device=device).to(dtype)

    def run(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {"logsumexp": fastkern.logsumexp(x)}
        for ours in (fastkern.softmax, fastkern.log_softmax):
            leaf = x.detach().requires_grad_()
            y = ours(leaf)
            results |= {ours.__name__: y.detach(), f"grad of {ours.__name__}": torch.autograd.grad(y, leaf, dy)[0]}
        return results

    whole = run(x, dy)
    shifted = torch.empty(3 * n + 1, device=device, dtype=dtype)[1:].view(3, n).copy_(x)
    for name, again in run(shifted, dy).items():
        assert_bitwise(again, whole[name], f"{name}, one element off")
    for name, alone in run(x[1:2], dy[1:2]).items():
        assert_bitwise(alone, whole[name][1:2], f"{name}, alone")


@pytest.mark.parametrize("shape", [(7,), (3, 0), (2, 5, 3), (3, 1, 4)])
@pairs
def test_float64_on_the_cpu(ours: Function, theirs: Function, shape: tuple[int, ...]) -> None:
    """As accurate as torch, first and second derivatives, strides, and beside narrower types."""
    x = 3 * torch.randn(shape, dtype=torch.float64).transpose(0, -1)
    for dim in range(x.dim()):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, expected = ours(a, dim), theirs(b, dim)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(ours(x, dim), expected.detach(), rtol=1e-13, atol=1e-14)
        dy = torch.randn_like(expected)
        (da,), (db,) = torch.autograd.grad(got, a, dy), torch.autograd.grad(expected, b, dy)
        torch.testing.assert_close(da, db, rtol=1e-12, atol=1e-14)
        if a.numel():
            torch.autograd.gradcheck(lambda t, d=dim: ours(t, d), (a,))
            torch.autograd.gradgradcheck(lambda t, d=dim: ours(t, d), (a,))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_float64_beside_narrower_types(name: str) -> None:
    ours, theirs = PAIRS[name]
    x = torch.randn(3, 9)
    for given, dtype in (
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float16),
    ):
        a = x.to(given).requires_grad_()
        got, expected = ours(a, 1, dtype), theirs(a.detach().to(dtype).double(), 1)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-3, atol=1e-14)
        (da,) = torch.autograd.grad(got.sum() if name == "log_softmax" else (got * got).sum(), a)
        assert da.dtype == given
        assert bool(da.isfinite().all())


@pairs
def test_float64_special_values(ours: Function, theirs: Function) -> None:
    x = torch.tensor([[0.0, -INF, 1.0], [-INF, -INF, -INF], [INF, 0.0, 1.0], [NAN, 0.0, 1.0], [700.0, 710.0, -800.0]])
    torch.testing.assert_close(ours(x.double(), 1), theirs(x.double(), 1), rtol=1e-13, atol=0.0, equal_nan=True)
    torch.testing.assert_close(ours(x.double().T, 0), theirs(x.double().T, 0), rtol=1e-13, atol=0.0, equal_nan=True)


@pytest.mark.cuda
@pairs
def test_float64_is_refused_on_cuda(ours: Function, theirs: Function, cuda: None) -> None:
    with pytest.raises(
        RuntimeError, match=r"x must be torch\.float32, torch\.float16 or torch\.bfloat16, got torch\.float64"
    ):
        ours(torch.ones(2, 3, device="cuda", dtype=torch.float64))


def test_large_results_are_streamed() -> None:
    """64 MiB and more go past the caches: the same bits as of the part, whatever the address of a row."""
    for dtype, n in ((torch.float32, 4099), (torch.bfloat16, 8201)):
        rows = (64 << 20) // (n * dtype.itemsize) + 1
        x = torch.randn(4, n).to(dtype).repeat(rows // 4 + 1, 1)
        for ours in (fastkern.softmax, fastkern.log_softmax):
            part, whole = x[:4].clone().requires_grad_(), x.requires_grad_()
            a, b = ours(part), ours(whole)
            assert_bitwise(b[-4:].detach(), a.detach(), "forward")
            dy = torch.randn(4, n).to(dtype)
            (da,) = torch.autograd.grad(a, part, dy)
            (db,) = torch.autograd.grad(b, whole, dy.repeat(x.shape[0] // 4, 1))
            assert_bitwise(db[-4:], da, "backward")


@pytest.mark.cuda
@pytest.mark.large
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_one_row_of_more_than_31_bits(name: str, cuda: None) -> None:
    """A row of 2^31 + 1 float16: one large value at each end among equal ones, so that all results are known."""
    n = 2**31 + 1
    if torch.cuda.mem_get_info()[0] < 9 * n:
        pytest.skip("too little memory")
    x = torch.zeros(1, n, device="cuda", dtype=torch.float16)
    x[0, 0] = x[0, -1] = 22.0
    lse = float(torch.logsumexp(torch.tensor([22.0, 22.0, float(torch.tensor(n - 2.0).double().log())]).double(), 0))
    if name == "logsumexp":
        assert abs(float(fastkern.logsumexp(x)) - lse) < 2e-2
        return
    y = getattr(fastkern, name)(x)
    for at, value in ((0, 22.0), (-1, 22.0), (1, 0.0), (n // 2, 0.0), (-2, 0.0)):
        expected = value - lse if name == "log_softmax" else float(torch.tensor(value - lse).exp())
        assert abs(float(y[0, at]) - expected) <= 2e-3 * abs(expected) + 6e-8, at
    del x
    out: Any = torch.zeros_like(y)
    out[0, -1] = 1.0
    bwd = getattr(torch.ops.fastkern, f"{name}_bwd")
    dx = bwd(out, y, -1)
    last = float(y[0, -1])
    expected = last * (1 - last) if name == "softmax" else 1 - float(torch.tensor(last).exp())
    assert abs(float(dx[0, -1]) - expected) <= 4e-3
