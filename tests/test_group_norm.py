# SPDX-License-Identifier: Apache-2.0
"""What a row cannot say of group_norm: the channels-last layout, the layout of results, saved statistics."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import fastkern
import pytest
import torch
import torch.nn.functional as F
from fastkern.specs.group_norm import GROUP_NORM, group_norm_inputs, keep_channels_last
from harness import gpu, layouts, numerics, runtime, special, transforms
from harness.cases import Variant, assert_bitwise, make_inputs, run_backward, variant_text
from torch import Tensor


def _torch_row_major(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """torch's CPU kernel for channels-last sums squares, which overflow elsewhere than differences do."""
    return GROUP_NORM.baseline(x.contiguous(), *args, **kwargs)


# The same row on channels-last tensors: what the harness checks of it holds for them, too. (A batching rule may make
# them contiguous: a vmap over them is compared with a loop in test_vmap_over_channels_last.)
LAST = replace(
    GROUP_NORM,
    make=partial(group_norm_inputs, channels_last=True),
    baseline=_torch_row_major,
    dims=tuple(dims for dims in GROUP_NORM.dims if len(dims) > 2),
)

rows = pytest.mark.parametrize(
    ("dtype", "variant"),
    [
        pytest.param(d, v, id=f"{str(d).removeprefix('torch.')}-{variant_text(v)}")
        for i, d in enumerate(LAST.dtypes)
        for j, v in enumerate(LAST.variants)
        if j == 0 or (i + j) % len(LAST.dtypes) == 0
    ],
)
one_row = pytest.mark.parametrize(("dtype", "variant"), [pytest.param(torch.bfloat16, LAST.variants[1], id="bf16")])


@rows
def test_accuracy(device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_forward_accuracy(LAST, device, dtype, variant)
    numerics.check_backward_accuracy(LAST, device, dtype, variant)


@rows
def test_value_ranges(device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_value_ranges(LAST, device, dtype, variant)


@rows
def test_special_values(device: str, dtype: torch.dtype, variant: Variant) -> None:
    special.check_special_values(LAST, device, dtype, variant)


@rows
def test_sizes(device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_empty(LAST, device, dtype, variant)
    numerics.check_size_one(LAST, device, dtype, variant)


@rows
def test_batch_invariance(device: str, dtype: torch.dtype, variant: Variant) -> None:
    numerics.check_batch_invariance(LAST, device, dtype, variant)


@rows
def test_layouts(device: str, dtype: torch.dtype, variant: Variant) -> None:
    layouts.check_layouts(LAST, device, dtype, variant)


@rows
def test_memory(device: str, dtype: torch.dtype, variant: Variant) -> None:
    runtime.check_poisoned_memory(LAST, device, dtype, variant)
    runtime.check_canaries(LAST, device, dtype, variant)


@rows
def test_direct_op(device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_direct_op(LAST, device, dtype, variant)


@one_row
def test_opcheck(device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_opcheck(LAST, device, dtype, variant)


@one_row
def test_compile(device: str, dtype: torch.dtype, variant: Variant) -> None:
    transforms.check_compile(LAST, device, dtype, variant)


@one_row
def test_determinism(device: str, dtype: torch.dtype, variant: Variant) -> None:
    for dims in LAST.dims[::3]:
        runtime.check_determinism(LAST, device, dtype, variant, 200 if device == "cuda" else 10, dims)


@one_row
def test_thread_counts(dtype: torch.dtype, variant: Variant) -> None:
    runtime.check_thread_counts(LAST, dtype, variant)


@pytest.mark.cuda
@rows
def test_on_the_gpu(cuda: None, dtype: torch.dtype, variant: Variant) -> None:
    gpu.check_side_stream(LAST, dtype, variant)
    gpu.check_cuda_graph(LAST, dtype, variant)
    gpu.check_no_synchronisation(LAST, dtype, variant)
    gpu.check_peak_memory(LAST, dtype, variant)
    gpu.check_no_leak(LAST, dtype, variant)


# ---- the layout of results -------------------------------------------------------------------------------------------

_SHAPES = ((2, 8, 5), (2, 8, 5, 7), (2, 8, 3, 5, 7), (1, 8, 5, 7), (2, 8, 1, 1), (2, 1, 5, 7), (2, 8, 5, 1), (2, 8))
_LAYOUTS = {
    "contiguous": lambda t: t,
    "channels-last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "sliced channels-last": lambda t: t.repeat_interleave(2, 0).movedim(1, -1).contiguous().movedim(-1, 1)[::2],
}


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels-last"])
def test_results_have_the_layout_of_x(device: str, shape: tuple[int, ...], layout: str, grad_layout: str) -> None:
    x = _LAYOUTS[layout](torch.randn(shape, device=device)).detach().requires_grad_()
    dy = _LAYOUTS[grad_layout](torch.randn(shape, device=device))
    last = x.dim() > 2 and x.movedim(1, -1).is_contiguous() and not x.is_contiguous()
    expected = keep_channels_last(x.detach()).stride()
    for function in (fastkern.group_norm, torch.ops.fastkern.group_norm.default):
        y = function(x, math_groups(shape[1]))
        (dx,) = torch.autograd.grad(y, x, dy)
        assert y.stride() == expected
        assert dx.stride() == expected
        assert last == (y.dim() > 2 and y.movedim(1, -1).is_contiguous() and not y.is_contiguous())
        torch.testing.assert_close(y, torch.group_norm(x, math_groups(shape[1])))


def math_groups(channels: int) -> int:
    return 2 if channels % 2 == 0 else 1


def test_a_gradient_in_another_layout_has_the_same_bits(device: str) -> None:
    for make in (GROUP_NORM.make, LAST.make):
        spec = replace(GROUP_NORM, make=make)
        inputs = make_inputs(spec, device, torch.bfloat16, {"B": 2, "C": 20, "H": 9, "W": 7}, GROUP_NORM.variants[1])
        names = ["x", "weight", "bias"]
        dy = torch.randn_like(inputs["x"])
        grads = [
            run_backward(fastkern.group_norm, inputs, names, [_LAYOUTS[name](dy.contiguous())])[1] for name in _LAYOUTS
        ]
        for other in grads[1:]:
            for name in names:
                assert_bitwise(other[name], grads[0][name], name)


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [{"B": 2, "C": 20, "H": 9, "W": 7}, {"B": 1, "C": 8, "S": 40000}], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_saved_statistics(device: str, dims: dict[str, int], channels_last: bool) -> None:
    """They are what torch finds, and a backward without them has the same bits."""
    inputs = group_norm_inputs(
        **dims, dtype=torch.float32, device=device, channels_last=channels_last, activation="silu"
    )
    arguments = tuple(inputs.values())
    y, stats = torch.ops.fastkern.group_norm_fwd_stats(*arguments)
    assert_bitwise(y, fastkern.group_norm(*arguments), "y")
    rows_ = inputs["x"].double().reshape(dims["B"], inputs["num_groups"], -1)
    torch.testing.assert_close(stats[..., 0].double(), rows_.mean(-1), atol=1e-6, rtol=1e-5)
    rstd = (rows_.var(-1, correction=0) + inputs["eps"]).rsqrt()
    torch.testing.assert_close(stats[..., 1].double(), rstd, atol=0, rtol=1e-5)

    def backward(saved: Tensor | None) -> Any:
        x, groups, weight, bias, eps, activation = arguments
        dy = torch.ones_like(x)
        return torch.ops.fastkern.group_norm_bwd(dy, x, groups, weight, bias, saved, eps, activation)

    for with_stats, without in zip(backward(stats), backward(None), strict=True):
        assert_bitwise(with_stats, without, "gradient")


def test_bad_statistics_are_refused(device: str) -> None:
    x = torch.randn(2, 8, 5, device=device)
    bwd = torch.ops.fastkern.group_norm_bwd
    for stats, message in (
        (torch.zeros(2, 4, device=device), r"stats must have shape \(2, 4, 2\), got \(2, 4\)"),
        (torch.zeros(2, 4, 2, device=device, dtype=torch.float16), r"stats must be torch\.float32, got torch\.float16"),
        (torch.zeros(2, 4, 2, device=device, dtype=torch.int32), r"stats must be torch\.float32, .*, got torch\.int32"),
    ):
        for tensors in ((x, stats), (x.to("meta"), stats.to("meta"))):
            with pytest.raises(RuntimeError, match=f"group_norm_bwd: {message}"):
                bwd(tensors[0], tensors[0], 4, None, None, tensors[1], 1e-5, "none", True, False, False)


def test_fwd_stats_has_its_gradient(device: str) -> None:
    """Which compiled calls take: torch.ops.fastkern.group_norm_fwd_stats, its statistics not differentiable."""
    inputs = make_inputs(GROUP_NORM, device, torch.float32, {"B": 2, "C": 8, "S": 30}, GROUP_NORM.variants[1])
    arguments = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    y, stats = torch.ops.fastkern.group_norm_fwd_stats(**arguments)
    assert not stats.requires_grad
    leaves = [arguments[name] for name in ("x", "weight", "bias")]
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(fastkern.group_norm(**arguments), leaves, dy)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        assert_bitwise(ours, theirs, "gradient")
    torch.library.opcheck(torch.ops.fastkern.group_norm_fwd_stats.default, (), arguments)


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_vmap_over_channels_last(device: str) -> None:
    xs = torch.randn(3, 2, 5, 7, 8, device=device).movedim(-1, 2)  # a batch of channels-last tensors
    weight = torch.randn(3, 8, device=device)
    got = torch.vmap(lambda x: fastkern.group_norm(x, 4))(xs)
    torch.testing.assert_close(got, torch.stack([F.group_norm(x, 4) for x in xs]))
    got = torch.vmap(lambda x, w: fastkern.group_norm(x, 4, w))(xs, weight)
    torch.testing.assert_close(got, torch.stack([F.group_norm(x, 4, w) for x, w in zip(xs, weight, strict=True)]))


def test_tokens_are_read_in_place(device: str) -> None:
    """(N, L, C) transposed, as in an attention block: nothing is copied, and back it is contiguous."""
    tokens = torch.randn(2, 33, 24, device=device)
    y = fastkern.group_norm(tokens.transpose(1, 2), 3).transpose(1, 2)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.group_norm(tokens.transpose(1, 2), 3).transpose(1, 2))


def test_strings_do_not_leak() -> None:
    """The activation crosses torch's boundary as a string that the operator owns."""
    import resource

    x = torch.randn(1, 2)

    def grown(calls: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(calls):
            torch.ops.fastkern.group_norm_fwd(x, 1, None, None, 1e-5, "silu")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    grown(1000)
    assert grown(100_000) < 2048  # KiB; 32 bytes a call would be 3125
