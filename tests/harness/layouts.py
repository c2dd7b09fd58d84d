# SPDX-License-Identifier: Apache-2.0
"""The same values at other strides and addresses must give bitwise the same results, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastkern.specs import Dims, Inputs, OpSpec
from torch import Tensor

from harness.cases import (
    Variant,
    assert_all_same,
    case_text,
    make_grad_outs,
    make_inputs,
    pick_dims,
    run_all,
    strided_names,
    volume,
)

# A layout takes a tensor and gives one of the same shape and dtype at other strides, or None where the rank does not
# allow it. What lies around the values is NaN, the largest integer or True, so that a read past them shows. Expanded
# layouts change the values.
Layout = Callable[[Tensor], Tensor | None]

GRAD_OUT = "grad_out "


def _surroundings(t: Tensor, *sizes: int) -> Tensor:
    filler = float("nan") if t.is_floating_point() else t.dtype == torch.bool or torch.iinfo(t.dtype).max
    return torch.full(sizes, filler, dtype=t.dtype, device=t.device)


def transposed(t: Tensor) -> Tensor | None:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() >= 2 else None


def column_slice(t: Tensor) -> Tensor | None:
    view = _surroundings(t, *t.shape[:-1], t.shape[-1] + 5)[..., 3 : 3 + t.shape[-1]]
    return view.copy_(t)


def aligned_column_slice(t: Tensor) -> Tensor | None:
    """Rows whose pitch keeps 16-byte alignment: the vector path, with a stride."""
    view = _surroundings(t, *t.shape[:-1], -(-t.shape[-1] // 8) * 8 + 16)[..., 8 : 8 + t.shape[-1]]
    return view.copy_(t)


def row_slice(t: Tensor) -> Tensor | None:
    if t.dim() < 2:
        return None
    return _surroundings(t, 2 * t.shape[0] + 1, *t.shape[1:])[1::2].copy_(t)


def step_slice(t: Tensor) -> Tensor | None:
    return _surroundings(t, *t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)


def head_slice(t: Tensor) -> Tensor | None:
    """The middle third of a fused projection: (..., S, 3 * H, N)[..., H : 2 * H, :]."""
    if t.dim() < 3:
        return None
    heads = t.shape[-2]
    return _surroundings(t, *t.shape[:-2], 3 * heads, t.shape[-1])[..., heads : 2 * heads, :].copy_(t)


def heads_first(t: Tensor) -> Tensor | None:
    """Values stored as (..., H, S, N) and seen as (..., S, H, N), sliced from a fused projection."""
    if t.dim() < 3:
        return None
    stored = _surroundings(t, *t.shape[:-3], 3 * t.shape[-2], t.shape[-3], t.shape[-1])
    return stored[..., t.shape[-2] : 2 * t.shape[-2], :, :].transpose(-2, -3).copy_(t)


def reversed_dims(t: Tensor) -> Tensor | None:
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order) if t.dim() >= 3 else None


def expanded_leading(t: Tensor) -> Tensor | None:
    return t[:1].clone().expand(t.shape) if t.dim() >= 2 else None


def expanded_middle(t: Tensor) -> Tensor | None:
    return t[:, :1].clone().expand(t.shape) if t.dim() >= 3 else None


def expanded_last(t: Tensor) -> Tensor | None:
    return t[..., :1].clone().expand(t.shape)


def expanded_scalar(t: Tensor) -> Tensor | None:
    """What ``y.sum().backward()`` hands over."""
    return t.flatten()[0].clone().expand(t.shape)


def offset_by(elements: int, t: Tensor) -> Tensor:
    buffer = _surroundings(t, t.numel() + 32)
    return buffer[elements : elements + t.numel()].view(t.shape).copy_(t)


LAYOUTS: dict[str, Layout] = {
    layout.__name__: layout
    for layout in (
        transposed,
        column_slice,
        aligned_column_slice,
        row_slice,
        step_slice,
        head_slice,
        heads_first,
        reversed_dims,
        expanded_leading,
        expanded_middle,
        expanded_last,
        expanded_scalar,
    )
}
OFFSETS: dict[str, Layout] = {f"offset {k}": partial(offset_by, k) for k in range(1, 16)}


def _with(inputs: Inputs, grad_outs: list[Tensor], name: str, value: Tensor) -> tuple[Inputs, list[Tensor]]:
    if name.startswith(GRAD_OUT):
        index = int(name.removeprefix(GRAD_OUT))
        return inputs, [value if i == index else g for i, g in enumerate(grad_outs)]
    return {**inputs, name: value}, grad_outs


def _get(inputs: Inputs, grad_outs: list[Tensor], name: str) -> Tensor:
    return grad_outs[int(name.removeprefix(GRAD_OUT))] if name.startswith(GRAD_OUT) else inputs[name]


def _operands(spec: OpSpec, inputs: Inputs, grad_outs: list[Tensor]) -> Iterator[list[str]]:
    """Each strided operand alone, then all together."""
    names = [*strided_names(spec, inputs), *(f"{GRAD_OUT}{i}" for i in range(len(grad_outs)))]
    yield from ([name] for name in names)
    yield names


def compare_layout(spec: OpSpec, inputs: Inputs, grad_outs: list[Tensor], names: list[str], layout: Layout,
                   what: str) -> None:  # fmt: skip
    dense, dense_grads = inputs, grad_outs
    strided, strided_grads = inputs, grad_outs
    changed = False
    for name in names:
        operand = _get(inputs, grad_outs, name)
        view = layout(operand) if operand.dim() else None
        if view is None:
            continue
        changed = True
        copy = spec.dense(view)
        strided, strided_grads = _with(strided, strided_grads, name, view)
        dense, dense_grads = _with(dense, dense_grads, name, copy)
    if changed:
        assert_all_same(spec, run_all(spec, strided, strided_grads), run_all(spec, dense, dense_grads), what)


def check_layouts(
    spec: OpSpec,
    device: str,
    dtype: torch.dtype,
    variant: Variant,
    layouts: dict[str, Layout] = LAYOUTS,
    sizes: list[Dims] | None = None,
) -> None:
    for dims in pick_dims(spec, 8, limit=1 << 16) if sizes is None else sizes:
        inputs = make_inputs(spec, device, dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        for names in _operands(spec, inputs, grad_outs):
            for label, layout in layouts.items():
                what = f"{case_text(spec, dims, dtype, variant)}: {label} {' and '.join(names)}"
                compare_layout(spec, inputs, grad_outs, names, layout, what)


def check_offsets(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    check_layouts(spec, device, dtype, variant, OFFSETS, pick_dims(spec, 4, limit=1 << 14))


# ---- far rows --------------------------------------------------------------------------------------------------------


def far_apart(buffer: Tensor, t: Tensor) -> Tensor | None:
    """``t`` with its leading entries so far apart that the last one starts past 2**31 elements; few entries only,
    because each one touches a page."""
    if t.dim() == 0 or not 2 <= t.shape[0] <= 16:
        return None
    stride = -(-(2**31 + 8) // (t.shape[0] - 1)) // 8 * 8 + 8
    if (t.shape[0] - 1) * stride + t.numel() > buffer.numel():
        return None
    inner = torch.empty(t.shape[1:], device="meta").stride()
    return buffer.as_strided(t.shape, (stride, *inner)).copy_(t)


def check_far_strides(spec: OpSpec, device: str, dtype: torch.dtype, variant: Variant) -> None:
    """Offsets above 2**31 elements with tiny data: the memory in between is reserved but never touched."""
    buffer = torch.empty(2**31 + (1 << 18), dtype=dtype, device=device)
    layouts = {"far apart": partial(far_apart, buffer)}
    near = [d for d in spec.dims if 2 <= next(iter(d.values())) <= 3 and volume(d) <= 1 << 16]
    for dims in near[:: max(1, len(near) // 8)]:
        inputs = make_inputs(spec, device, dtype, dims, variant)
        grad_outs = make_grad_outs(spec, inputs)
        for names in _operands(spec, inputs, grad_outs):
            same = [n for n in names if _get(inputs, grad_outs, n).dtype == dtype]
            for name in same:  # one at a time: they would share the buffer
                what = f"{case_text(spec, dims, dtype, variant)}: {name} with rows 2**31 elements apart"
                compare_layout(spec, inputs, grad_outs, [name], layouts["far apart"], what)
