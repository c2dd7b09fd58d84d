# SPDX-License-Identifier: Apache-2.0
"""Gated activations, bias_act and dropout: what the rows of the table cannot say."""

from __future__ import annotations

import math
from collections.abc import Callable

import fastkern
import pytest
import torch
from fastkern.ops import _philox
from torch import Tensor
from torch.nn import functional

Function = Callable[..., Tensor]


def _int64(value: int, device: str) -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


# ---- layouts and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu", "glu", "clamped_swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_split(device: str, name: str, dtype: torch.dtype) -> None:
    """A packed input gives the bits of two, and its gradient is packed as it is."""
    function: Function = getattr(fastkern, name)
    for shape in ((3, 7), (2, 5, 64), (1, 1001)):
        a, b = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        dy = torch.randn(shape, device=device).to(dtype)
        a.requires_grad_(), b.requires_grad_()
        y = function(a, b)
        da, db = torch.autograd.grad(y, (a, b), dy)
        packings = [(torch.cat([a, b], -1).detach(), torch.cat([da, db], -1), {})]
        if name != "glu":
            pairs = torch.stack([a, b], -1).flatten(-2).detach()
            packings.append((pairs, torch.stack([da, db], -1).flatten(-2), {"interleaved": True}))
        for x, expected, options in packings:
            found = function(x.requires_grad_(), **options)
            (dx,) = torch.autograd.grad(found, (x,), dy)
            assert torch.equal(found, y), (name, shape, options)
            assert torch.equal(dx, expected), (name, shape, options)
            assert dx.is_contiguous()


def test_names_of_others(device: str) -> None:
    """FlagGems's and vLLM's names, and torch's own glu."""
    a, b = torch.randn(2, 5, 24, device=device).unbind()
    assert torch.equal(fastkern.silu_and_mul(a, b), fastkern.swiglu(a, b))
    assert torch.equal(fastkern.gelu_and_mul(a, b, "tanh"), fastkern.geglu(a, b, approximate="tanh"))
    assert torch.equal(fastkern.silu_and_mul(torch.cat([a, b], -1)), fastkern.swiglu(a, b))
    torch.testing.assert_close(fastkern.glu(torch.cat([a, b], -1)), functional.glu(torch.cat([a, b], -1)))


def test_gpt_oss(device: str) -> None:
    """The formula of GPT-OSS, on values that both clamps cut."""
    x = 8 * torch.randn(64, 2 * 33, device=device)
    g, u = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    expected = g * torch.sigmoid(1.702 * g) * (u + 1)
    torch.testing.assert_close(fastkern.clamped_swiglu(x, interleaved=True), expected)
    no_limit = fastkern.clamped_swiglu(x, alpha=1.0, limit=math.inf, up_offset=0.0, interleaved=True)
    torch.testing.assert_close(no_limit, fastkern.swiglu(x, interleaved=True))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_keeps_small_results(device: str, approximate: str) -> None:
    """Far to the left GELU is small, and still right to a few digits: 1 + erf would be 0 there."""
    z = -torch.linspace(0.0, 12.0, 4001, device=device, dtype=torch.float64)
    truth = z * torch.special.erfc(-z / math.sqrt(2)) / 2
    if approximate == "tanh":
        truth = z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    found = fastkern.geglu(z.float(), torch.ones_like(z.float()), approximate=approximate).double()
    seen = truth.abs() > 1e-30  # below that float32 itself runs out of exponent
    assert float(((found - truth) / truth)[seen].abs().max()) < 3e-5


def test_bias_gradient_of_rounded_numbers(device: str) -> None:
    """Sums over many rows are taken of numbers that are not rounded before, and in float32."""
    x = torch.randn(5000, 8, device=device, dtype=torch.bfloat16)
    bias = torch.zeros(8, device=device, dtype=torch.float32, requires_grad=True)
    dy = torch.ones_like(x)
    (found,) = torch.autograd.grad(fastkern.bias_act(x, bias, "gelu"), (bias,), dy)
    wide = x.double().requires_grad_()
    (slopes,) = torch.autograd.grad(functional.gelu(wide).sum(), (wide,))
    torch.testing.assert_close(found.double(), slopes.sum(0), rtol=2e-5, atol=1e-3)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def _binomial_p(kept: int, count: int, p: float) -> float:
    """Two-sided probability of a result at least as far from the mean, by the normal distribution."""
    deviation = math.sqrt(count * p * (1 - p))
    return math.erfc(abs(kept - count * (1 - p)) / deviation / math.sqrt(2))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(device: str, p: float) -> None:
    """Each element is kept with probability 1 - p over many seeds, all together, and next to kept ones."""
    count, draws = 96, 2000
    x = torch.ones(count, device=device)
    kept = torch.stack([fastkern.dropout(x, p, seed=_int64(s, device)) != 0 for s in range(draws)])
    for element in kept.sum(0).tolist():
        assert _binomial_p(element, draws, p) > 1e-8
    assert _binomial_p(int(kept.sum()), count * draws, p) > 1e-8
    both = int((kept[:, 1:] & kept[:, :-1]).sum())
    assert _binomial_p(both, (count - 1) * draws, 1 - (1 - p) ** 2) > 1e-8
    offsets = torch.stack([fastkern.dropout(x, p, offset=_int64(s, device), seed=_int64(7, device)) for s in (0, 1)])
    assert not torch.equal(offsets[0], offsets[1])


def test_dropout_is_the_mask_of_philox(device: str) -> None:
    """Whatever the strides: element number e is what decides."""
    seed, offset = _int64(-5, device), _int64(2**40 + 3, device)
    for shape in ((3, 7), (5, 1001), (2, 3, 64), (4099,), ()):
        keep = _philox.keep_mask(shape, 0.3, seed, offset)
        x = torch.ones(shape, device=device)
        assert torch.equal(fastkern.dropout(x, 0.3, seed=seed, offset=offset) != 0, keep)
        if x.dim() > 1:
            assert torch.equal(fastkern.dropout(x.mT.contiguous().mT, 0.3, seed=seed, offset=offset) != 0, keep)
        if x.dim():
            y = fastkern.bias_dropout_add(x, None, torch.zeros_like(x), 0.3, seed=seed, offset=offset)
            assert torch.equal(y != 0, keep)


def test_backward_draws_the_same_mask(device: str) -> None:
    torch.manual_seed(3)
    x = torch.ones(17, 129, device=device, requires_grad=True)
    y = fastkern.dropout(x, 0.4)
    (dx,) = torch.autograd.grad(y, (x,), torch.ones_like(y))
    assert torch.equal(y, dx)
    torch.manual_seed(3)
    assert torch.equal(fastkern.dropout(x, 0.4), y)
    assert not torch.equal(fastkern.dropout(x, 0.4), y)


def test_dropout_in_evaluation(device: str) -> None:
    x = torch.randn(3, 5, device=device)
    bias, residual = torch.randn(5, device=device), torch.randn(3, 5, device=device)
    assert fastkern.dropout(x, 0.5, training=False) is x
    torch.testing.assert_close(fastkern.bias_dropout_add(x, bias, residual, 0.5, training=False), residual + (x + bias))


@pytest.mark.cuda
def test_the_same_mask_on_both(cuda: None) -> None:
    seed, offset = torch.tensor(11), torch.tensor(5)
    x = torch.randn(33, 1001)
    ours = fastkern.dropout(x.cuda(), 0.3, seed=seed.cuda(), offset=offset.cuda())
    assert torch.equal(ours.cpu(), fastkern.dropout(x, 0.3, seed=seed, offset=offset))


@pytest.mark.cuda
def test_a_graph_draws_anew(cuda: None) -> None:
    """A captured call reads seed and offset where they lie."""
    x = torch.ones(64, 1000, device="cuda", requires_grad=True)
    seed, step = torch.tensor(7, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")

    def call() -> tuple[Tensor, Tensor]:
        y = fastkern.dropout(x, 0.3, seed=seed, offset=step)
        return y, torch.autograd.grad(y, (x,), torch.ones_like(y))[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = call()
    results = []
    for value in (0, 1, 0):
        step.fill_(value)
        graph.replay()
        assert torch.equal(y, dx)
        results.append(y.clone())
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31(cuda: None) -> None:
    """Offsets are 64-bit: the last elements of a large tensor are those of a small one."""
    n = 2**31 + 520
    if torch.cuda.mem_get_info()[0] < 8 * n:
        pytest.skip("too little memory")
    x = torch.zeros(n, device="cuda", dtype=torch.bfloat16)
    tail = torch.randn(1000, device="cuda").bfloat16()
    x[-1000:] = tail
    y = fastkern.swiglu(x, x)
    assert torch.equal(y[-1000:], fastkern.swiglu(tail, tail))
    assert not y[:-1000].any()
    seed = torch.tensor(3, device="cuda")
    kept = fastkern.dropout(x.fill_(1.0), 0.5, seed=seed)
    blocks = torch.arange((n - 512) // 4, n // 4, device="cuda")
    words = torch.stack(_philox.words(seed, torch.zeros_like(seed), blocks), -1).flatten()
    assert torch.equal(kept[n - 512 :] != 0, words >= 2**31)
