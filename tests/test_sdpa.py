# SPDX-License-Identifier: Apache-2.0
"""torch's attention operators on these kernels: called directly, and registered for the CPU in place of CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fastkern
import pytest
import torch
import torch.nn.functional as F
from fastkern.integrations import sdpa
from torch import Tensor
from torch.nn import attention

aten = torch.ops.aten


def _numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def _assert_near(ours: Any, reference: Any, limit: float = 1e-5) -> None:
    assert ours.shape == reference.shape
    assert bool(ours.isfinite().all())
    error = float((ours.detach().double() - reference.detach().double()).abs().max())
    assert error <= limit * float(reference.detach().abs().max())


@pytest.fixture
def registered() -> Iterator[None]:
    overrides = sdpa._Overrides("CPU")
    yield
    overrides.remove()
    assert not sdpa._has_kernel("aten::_flash_attention_forward", "CPU")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_first", [False, True], ids=["BSHD", "BHSD"])
def test_dense(registered: None, causal: bool, heads_first: bool) -> None:
    """Through autograd's own formula, with grouped heads; strides as torch's results have them."""
    q, k, v = (_numbers(2, *((h, n) if heads_first else (n, h)), 16) for h, n in ((4, 9), (2, 9), (2, 9)))
    parts = [t if heads_first else t.transpose(1, 2) for t in (q, k, v)]
    out, lse, _, _, max_q, max_k, *_ = aten._scaled_dot_product_flash_attention(*parts, 0.0, causal, scale=0.3)
    expected = F.scaled_dot_product_attention(
        *(t.double() for t in parts), is_causal=causal, scale=0.3, enable_gqa=True
    )
    _assert_near(out, expected)
    assert out.stride() == torch.empty_like(parts[0]).stride()
    assert (lse.shape, max_q, max_k) == ((2, 4, 9), 9, 9)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((out * direction).sum(), (q, k, v))
    for ours, reference in zip(grads, torch.autograd.grad((expected * direction).sum(), (q, k, v)), strict=True):
        _assert_near(ours, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen(registered: None, dtype: torch.dtype) -> None:
    """torch.nn.attention.varlen on packed sequences of which one is empty, with a window."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q, k, v = (_numbers(10, 4, 16, dtype=dtype) for _ in range(3))
    starts, ends = torch.tensor([0, 3, 3, 10], dtype=torch.int32), [(0, 3), (3, 10)]
    out = varlen.varlen_attn(q, k, v, starts, starts, 7, 7, window_size=(2, 0))
    parts = []
    for a, b in ends:
        seen = torch.ones(b - a, b - a).tril().triu(-2).bool()
        heads = (t[a:b].double().transpose(0, 1)[None] for t in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*heads, attn_mask=seen)[0].transpose(0, 1))
    expected, limit = torch.cat(parts), 1e-5 if dtype == torch.float32 else 2e-2
    _assert_near(out, expected, limit)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((out * direction).sum(), (q, k, v))
    for ours, reference in zip(grads, torch.autograd.grad((expected * direction).sum(), (q, k, v)), strict=True):
        _assert_near(ours, reference, limit)


def test_dropout(registered: None) -> None:
    """Backward draws the mask of forward again: the gradient of v is the transposed weights, dropped as they were."""
    q, k, v = (_numbers(1, 2, 6, 8) for _ in range(3))
    torch.manual_seed(5)
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.5)[0]
    torch.manual_seed(5)
    expected = fastkern.flash_attn(*(t.transpose(1, 2) for t in (q, k, v)), dropout_p=0.5)
    assert isinstance(expected, Tensor)
    assert torch.equal(out, expected.transpose(1, 2))
    for ours, reference in zip(torch.autograd.grad(out.square().sum(), (q, k, v)),
                               torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):  # fmt: skip
        _assert_near(ours, reference)


def test_other_operators(registered: None) -> None:
    """The one without a batch of packed sequences, its backward, and the one that writes into a tensor."""
    q, k, v = (_numbers(2, 5, 4, 8) for _ in range(3))
    options = (None, None, 5, 5, 0.0, True, False)
    out, lse, state, unused, _ = aten._flash_attention_forward(q, k, v, *options, window_size_left=2)
    expected, expected_lse = fastkern.flash_attn(q, k, v, causal=True, window=(2, -1), return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    with torch.no_grad():
        grads = aten._flash_attention_backward(
            torch.ones_like(out), q, k, v, out, lse, None, None, 5, 5, 0.0, True, state, unused, window_size_left=2
        )
    for ours, reference in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert torch.equal(ours, reference)
    if hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        with torch.no_grad():
            given = torch.zeros_like(out)
            lse = aten._flash_attention_forward_no_dropout_inplace(given, q, k, v, *options, window_size_left=2)
        assert torch.equal(given, expected)
        assert torch.equal(lse, expected_lse)


def test_what_is_not_taken() -> None:
    """Goes to the kernel of before, which is there again afterwards; without one an error says so."""
    calls: list[torch.dtype] = []

    def torchs(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.dtype)
        return query * 2, query.new_zeros(1), None, None, 1, 1, None, None, None

    name, half, double = "_scaled_dot_product_flash_attention", torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8).double()
    before = torch.library.Library("aten", "IMPL")
    before.impl(name, torchs, "CPU")
    overrides = sdpa._Overrides("CPU")
    try:
        assert torch.equal(getattr(aten, name)(half, half, half)[0], half)
        assert not calls
        assert torch.equal(getattr(aten, name)(double, double, double)[0], double * 2)
        table = torch.zeros(1, 1, dtype=torch.int32)
        packed = (half[0], half[0], half[0], None, None, 2, 2, 0.0, False, False)
        with pytest.raises(RuntimeError, match=r"aten::_flash_attention_forward: .* torch has no CPU kernel"):
            aten._flash_attention_forward(*packed, alibi_slopes=table)
        with pytest.raises(RuntimeError, match="return_debug_mask must be False"):
            getattr(aten, name)(half, half, half, 0.0, False, True)
    finally:
        overrides.remove()
    getattr(aten, name)(half, half, half)
    assert calls == [torch.float64, torch.float32]
    before._destroy()


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "has_cuda_kernels", lambda: False)
    with pytest.raises(RuntimeError, match="no attention kernels for CUDA"):
        fastkern.enable_sdpa()
    assert attention.current_flash_attention_impl() is None


@pytest.mark.skipif(not hasattr(attention, "restore_flash_attention_impl"), reason="torch 2.10 restores nothing itself")
def test_switching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, nested, with another one active before, and after an exception."""
    has_kernel = sdpa._has_kernel
    monkeypatch.setattr(sdpa, "has_cuda_kernels", lambda: True)
    ours = "aten::_scaled_dot_product_flash_attention", "CUDA"
    was_there = has_kernel(*ours)

    class Handle:
        removed = 0

        def remove(self) -> None:
            Handle.removed += 1

    attention.register_flash_attention_impl("another", register_fn=Handle)
    current = attention.current_flash_attention_impl
    fastkern.disable_sdpa()
    fastkern.enable_sdpa()
    fastkern.enable_sdpa()
    assert current() == "fastkern"
    assert has_kernel(*ours)
    with fastkern.sdpa():
        assert current() == "fastkern"
    assert current() == "fastkern"
    fastkern.disable_sdpa()
    assert current() is None
    assert has_kernel(*ours) == was_there

    attention.activate_flash_attention_impl("another")

    def failing() -> None:
        with fastkern.sdpa():
            assert current() == "fastkern"
            assert Handle.removed == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert current() == "another"
    attention.restore_flash_attention_impl()
    assert current() is None


@pytest.mark.cuda
def test_on_cuda(cuda: None) -> None:
    """F.scaled_dot_product_attention itself."""
    if not sdpa.has_cuda_kernels():
        pytest.skip("no attention kernels for CUDA")
    q, k, v = (torch.randn(2, 64, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*(t.double() for t in heads), is_causal=True)
    with fastkern.sdpa(), attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*heads, is_causal=True)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    ours = fastkern.flash_attn(q, k, v, causal=True)
    assert isinstance(ours, Tensor)
    assert torch.equal(out, ours.transpose(1, 2))
    _assert_near(out, expected, 2e-2)
    for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        _assert_near(got, want, 3e-2)
