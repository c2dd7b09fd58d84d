# SPDX-License-Identifier: Apache-2.0
"""rms_norm in plain PyTorch, honest or with one classic fault, planted in place of the compiled kernels.

The seam is the dispatcher: a Python kernel registered over the library's one, and taken away again. Nothing of it is
in the shipped library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Weight = Tensor | None


class Honest:
    """The two kernels, without bias or offset; a fault overrides one of the small steps they are made of.

    Means are taken in float64: torch's own float32 ones depend, on CUDA, on how many rows there are.
    """

    def load_x(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def load_dy(self, dy: Tensor) -> Tensor:
        return dy.contiguous()

    def mean_square(self, x: Tensor) -> Tensor:
        return x.double().square().mean(-1, keepdim=True).float()

    def rstd(self, x: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(self.mean_square(x) + eps)

    def store(self, y: Tensor, dtype: torch.dtype, x: Tensor) -> Tensor:
        return y.to(dtype)

    def dx(self, g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return rstd * (g - xhat * (g * xhat).double().mean(-1, keepdim=True).float())

    def dweight(self, products: Tensor) -> Tensor:
        return products.sum(0)

    def forward(self, x: Tensor, weight: Weight = None, eps: float = 1e-6, *more: Any) -> Tensor:
        values = self.load_x(x)
        y = values.float() * self.rstd(values, eps)
        return self.store(y if weight is None else y * weight.float(), x.dtype, values)

    def backward(self, dy: Tensor, x: Tensor, weight: Weight, bias: Weight, eps: float, weight_offset: float,
                 need_dx: bool, need_dweight: bool, need_dbias: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert bias is None
        assert weight_offset == 0
        values, grad = self.load_x(x), self.load_dy(dy).float()
        rstd = self.rstd(values, eps)
        xhat = values.float() * rstd
        kind = x.dtype if weight is None else weight.dtype
        dx, dweight = x.new_empty(0), x.new_empty(0, dtype=kind)
        if need_dx:
            dx = self.dx(grad if weight is None else grad * weight.float(), xhat, rstd).to(x.dtype)
        if need_dweight:
            dweight = self.dweight((grad * xhat).reshape(-1, x.shape[-1])).to(kind)
        return dx, dweight, x.new_empty(0)


def _as_if_dense(t: Tensor) -> Tensor:
    """What a kernel reads that takes the address and ignores the strides (as far as the memory goes)."""
    dense = torch.empty(t.shape, device="meta").stride()
    last = t.storage_offset() + t.numel()
    fits = last * t.element_size() <= t.untyped_storage().nbytes()
    return t.as_strided(t.shape, dense).contiguous() if fits else t.contiguous()


class OffByOneTail(Honest):
    def store(self, y: Tensor, dtype: torch.dtype, x: Tensor) -> Tensor:
        out = y.to(dtype)
        if out.shape[-1] % (16 // out.element_size()):
            out[..., -1:] = x[..., -1:]
        return out


class UnwrittenTail(Honest):
    def store(self, y: Tensor, dtype: torch.dtype, x: Tensor) -> Tensor:
        out = torch.empty_like(y, dtype=dtype)
        keep = out.shape[-1] - (1 if out.shape[-1] % 8 else 0)
        out[..., :keep] = y[..., :keep].to(dtype)
        return out


class IgnoredStrideOfX(Honest):
    def load_x(self, x: Tensor) -> Tensor:
        return _as_if_dense(x)


class IgnoredStrideOfGradOut(Honest):
    def load_dy(self, dy: Tensor) -> Tensor:
        return _as_if_dense(dy)


class OffsetsOf32Bits(Honest):
    def load_x(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or abs(x.stride(0)) * (x.shape[0] - 1) < 2**31:
            return x.contiguous()
        elements = x.untyped_storage().nbytes() // x.element_size()
        rows = []
        for row in range(x.shape[0]):
            wrapped = (row * x.stride(0) + 2**31) % 2**32 - 2**31
            start = (x.storage_offset() + wrapped) % (elements - x[0].numel())  # a kernel would fault here
            rows.append(x.as_strided(x.shape[1:], x.stride()[1:], start))
        return torch.stack(rows)


class MissingEps(Honest):
    def rstd(self, x: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(self.mean_square(x))


class StatisticIn16Bits(Honest):
    def mean_square(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return super().mean_square(x)
        lanes = torch.nn.functional.pad(x.square(), (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
        total = torch.zeros_like(lanes[..., 0, :])
        for step in range(lanes.shape[-2]):
            total += lanes[..., step, :]
        return total.sum(-1, keepdim=True).float() / x.shape[-1]


class WeightGradientWithoutLastRows(Honest):
    def dweight(self, products: Tensor) -> Tensor:
        rows = products.shape[0]
        return super().dweight(products[: rows - rows % 16] if rows > 16 else products)


class StatisticOfFirstRow(Honest):
    def mean_square(self, x: Tensor) -> Tensor:
        return super().mean_square(x)[:1].expand(*x.shape[:-1], 1)


class MissingTermOfDx(Honest):
    def dx(self, g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return rstd * g


class DifferentEveryTime(Honest):
    def mean_square(self, x: Tensor) -> Tensor:
        exact = super().mean_square(x)
        return exact * (1 + torch.randn_like(exact) * 1e-6)


class WritesItsInput(Honest):
    def forward(self, x: Tensor, weight: Weight = None, eps: float = 1e-6, *more: Any) -> Tensor:
        y = super().forward(x, weight, eps)
        if x.numel():
            x.detach().flatten()[-1:].zero_()
        return y


class WrongStream(Honest):
    """Runs on the default stream, in no order with the caller's. CUDA only."""

    def forward(self, x: Tensor, weight: Weight = None, eps: float = 1e-6, *more: Any) -> Tensor:
        with torch.cuda.stream(torch.cuda.default_stream(x.device)):
            return super().forward(x, weight, eps)


class WrongStreamOfBackward(Honest):
    def backward(self, dy: Tensor, x: Tensor, *more: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.stream(torch.cuda.default_stream(x.device)):
            return super().backward(dy, x, *more, **keywords)


class HiddenSynchronisation(Honest):
    def rstd(self, x: Tensor, eps: float) -> Tensor:
        torch.cuda.current_stream().synchronize()
        return super().rstd(x, eps)


class ExtraMemory(Honest):
    def load_x(self, x: Tensor) -> Tensor:
        return x.float().clone().clone().to(x.dtype)


@contextmanager
def planted(kernels: Honest, device: str) -> Iterator[None]:
    """``torch.ops.fastkern.rms_norm*`` run these kernels on the device until the context ends."""
    parameters: dict[str, Callable[..., Any]] = {
        "rms_norm": kernels.forward,
        "rms_norm_fwd": kernels.forward,
        "rms_norm_bwd": kernels.backward,
    }
    library = torch.library.Library("fastkern", "IMPL")
    takes_override = "allow_override" in inspect.signature(library.impl).parameters
    try:
        for name, kernel in parameters.items():
            library.impl(name, kernel, device.upper(), **({"allow_override": True} if takes_override else {}))
        yield
    finally:
        library._destroy()
