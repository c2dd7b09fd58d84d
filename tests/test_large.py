# SPDX-License-Identifier: Apache-2.0
"""Tensors of more elements than 32 bits can number."""

from __future__ import annotations

import fastkern
import pytest
import torch
import torch.nn.functional as F

COLUMNS = 4096


@pytest.mark.cuda
@pytest.mark.large
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("bits", [31, 32])
def test_many_elements(bits: int, kind: str, cuda: None) -> None:
    """The last rows of 2^bits elements and one row more are what they are on their own, forward and backward; the
    weight gradient is that of the whole."""
    rows = 2**bits // COLUMNS + 1
    if torch.cuda.mem_get_info()[0] < rows * COLUMNS * 10:
        pytest.skip("too little memory")
    x = torch.empty(rows, COLUMNS, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    weight = torch.randn(COLUMNS, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn_like(weight).requires_grad_()
    dy = torch.empty_like(x, requires_grad=False).normal_()

    def norm(x: torch.Tensor) -> torch.Tensor:
        if kind == "rms":
            return fastkern.rms_norm(x, weight, 1e-6, bias)
        return fastkern.layer_norm(x, weight, bias, 1e-6)

    y = norm(x)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    for part in (slice(0, 3), slice(rows // 2 - 1, rows // 2 + 2), slice(rows - 3, rows)):
        own = x[part].detach().clone().requires_grad_()
        again = norm(own)
        assert torch.equal(y[part], again)
        assert torch.equal(dx[part], torch.autograd.grad(again, own, dy[part])[0])

    expected = [torch.zeros(COLUMNS, device="cuda", dtype=torch.float64) for _ in range(2)]
    for begin in range(0, rows, 1 << 14):
        part = slice(begin, begin + (1 << 14))
        h, g = x[part].detach().float(), dy[part].float()
        normal = F.rms_norm(h, (COLUMNS,), eps=1e-6) if kind == "rms" else F.layer_norm(h, (COLUMNS,), eps=1e-6)
        expected[0] += (g * normal).sum(0, dtype=torch.float64)
        expected[1] += g.sum(0, dtype=torch.float64)
    for ours, true in zip((dweight, dbias), expected, strict=True):
        scale = rows**0.5  # of a sum of as many independent products
        assert (ours.double() - true).abs().max() < scale * 2**-6
