# SPDX-License-Identifier: Apache-2.0
"""cross_entropy and linear_cross_entropy: what their rows of the table cannot say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastkern
import pytest
import torch
import torch.nn.functional as F
from fastkern.specs import Inputs, assert_accurate, in_float64
from fastkern.specs.linear_cross_entropy import linear_cross_entropy, linear_inputs, linear_reference
from fastkern.specs.loss import (
    CROSS_ENTROPY_REDUCED,
    cross_entropy,
    cross_entropy_inputs,
    cross_entropy_reference,
    cross_entropy_torch,
)
from harness import gpu, layouts, numerics, runtime, special, transforms
from harness.cases import Variant, assert_bitwise, variant_text
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# ---- sums over rows: the harness's checks on the reduced row ---------------------------------------------------------

_CHECKS: dict[str, Callable[..., None]] = {
    "forward": numerics.check_forward_accuracy,
    "backward": numerics.check_backward_accuracy,
    "values": numerics.check_value_ranges,
    "unwanted": numerics.check_unwanted_gradients,
    "unused": numerics.check_unused_outputs,
    "double": numerics.check_double_backward,
    "special": special.check_special_values,
    "empty": numerics.check_empty,
    "size one": numerics.check_size_one,
    "layouts": layouts.check_layouts,
    "poison": runtime.check_poisoned_memory,
    "canaries": runtime.check_canaries,
    "opcheck": transforms.check_opcheck,
    "direct": transforms.check_direct_op,
    "compile": transforms.check_compile,
    "vmap": transforms.check_vmap,
    "batched gradients": transforms.check_batched_gradients,
}
_CUDA_CHECKS: dict[str, Callable[..., None]] = {
    "side stream": gpu.check_side_stream,
    "graph": gpu.check_cuda_graph,
    "no synchronisation": gpu.check_no_synchronisation,
    "peak memory": gpu.check_peak_memory,
    "no leak": gpu.check_no_leak,
}
_variants = pytest.mark.parametrize(
    ("variant", "dtype"),
    [pytest.param(v, DTYPES[i % 3], id=variant_text(v)) for i, v in enumerate(CROSS_ENTROPY_REDUCED.variants)],
)


@pytest.mark.parametrize("check", _CHECKS)
@_variants
def test_reduced(check: str, device: str, dtype: torch.dtype, variant: Variant) -> None:
    _CHECKS[check](CROSS_ENTROPY_REDUCED, device, dtype, variant)


@pytest.mark.cuda
@pytest.mark.parametrize("check", _CUDA_CHECKS)
@_variants
def test_reduced_on_cuda(check: str, cuda: None, dtype: torch.dtype, variant: Variant) -> None:
    _CUDA_CHECKS[check](CROSS_ENTROPY_REDUCED, dtype, variant)


# ---- rows of every length, all options -------------------------------------------------------------------------------


def _loss_and_gradient(function: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, Tensor]:
    leaf = inputs["logits"].detach().requires_grad_()
    loss = function(**{**inputs, "logits": leaf})[0]
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def _assert_right(inputs: Inputs, what: str, function: Callable[..., Any] = cross_entropy) -> None:
    ours = _loss_and_gradient(function, inputs)
    theirs = _loss_and_gradient(cross_entropy_torch, inputs)
    truth = _loss_and_gradient(cross_entropy_reference, in_float64(inputs))
    # Of one sum torch's own error is luck.
    assert_accurate(ours[0], theirs[0], truth[0], 2, ulps=4, what=f"{what}: loss")
    # Of one class a softmax and a target cancel but for rounding.
    slack = torch.full_like(truth[1], 2e-7) if inputs["logits"].shape[-1] == 1 else None
    assert_accurate(ours[1], theirs[1], truth[1], 3, ulps=2, what=f"{what}: gradient", slack=slack)


_SIZES = [
    (m, v)
    for v in (1, 2, 77, 1000, 32000, 50257, 128256, 151936, 262144)
    for m in (0, 1, 77, 289, 8192)
    if m * v <= 1 << 22 or (m == 8192 and v == 1000)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "v"), _SIZES)
def test_sizes(m: int, v: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(m + v)
    for options in ({}, {"reduction": 2, "label_smoothing": 0.1, "lse_square_scale": 1e-3, "weight": "same"}):
        inputs = cross_entropy_inputs(M=m, V=v, dtype=dtype, device=device, ignore=True, **options)
        _assert_right(inputs, f"{m} x {v} {dtype} {options}")


@pytest.mark.cuda
@pytest.mark.parametrize("v", [32000, 50257, 128256, 262144])
def test_many_long_rows(v: int, cuda: None) -> None:
    inputs = cross_entropy_inputs(M=2048, V=v, dtype=torch.bfloat16, device="cuda", ignore=True)
    _assert_right(inputs, f"2048 x {v}")


@given(data=st.data())
def test_options_together(data: st.DataObject) -> None:
    draw: Callable[..., Any] = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    soft = draw(None, None, "same", torch.float32, torch.bfloat16)
    inputs = cross_entropy_inputs(
        M=draw(1, 3, 7), V=draw(1, 2, 13, 64, 1001), dtype=draw(*DTYPES), device="cpu",
        weight=draw(None, "same", torch.float32), soft=soft, ignore=draw(False, True), narrow=draw(False, True),
        label_smoothing=draw(0.0, 0.1, 1.0), lse_square_scale=draw(0.0, 1e-3, 0.5), softcap=draw(0.0, 2.0, 30.0),
        logit_scale=draw(1.0, 0.25, -1.5, 0.0), reduction=draw(0, 1, 2),
    )  # fmt: skip
    torch.manual_seed(data.draw(st.integers(0, 99)))
    function: Callable[..., Any] = draw(cross_entropy, _in_place) if inputs["reduction"] else cross_entropy
    ours = _loss_and_gradient(function, inputs)
    theirs = _loss_and_gradient(cross_entropy_torch, inputs)
    truth = _loss_and_gradient(cross_entropy_reference, in_float64(inputs))
    # Few values, of which torch's errors are luck, and gradients that vanish but for rounding.
    assert_accurate(ours[0], theirs[0], truth[0], 4, ulps=16, what="loss")
    size = max(1.0, float(inputs["logit_scale"])) * torch.finfo(ours[1].dtype).eps
    assert bool((ours[1].double() - truth[1]).abs().max() <= 8 * size + 4 * (theirs[1].double() - truth[1]).abs().max())


@pytest.mark.cuda
@pytest.mark.large
def test_more_logits_than_32_bits_can_number(cuda: None) -> None:
    """Rows are what they are alone, forward and backward, and the gradient over the logits is the same."""
    rows, v = 2**32 // 131072 + 3, 131072
    if torch.cuda.mem_get_info()[0] < rows * v * 5:
        pytest.skip("too little memory")
    logits = torch.empty(rows, v, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.randint(v, (rows,), device="cuda")
    loss = fastkern.cross_entropy(logits, target, reduction="none")
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    for part in (slice(0, 3), slice(rows // 2 - 1, rows // 2 + 2), slice(rows - 3, rows)):
        own = logits[part].detach().clone().requires_grad_()
        again = fastkern.cross_entropy(own, target[part], reduction="none")
        assert torch.equal(loss[part], again)
        assert torch.equal(grad[part], torch.autograd.grad(again, own, torch.ones_like(again))[0])
    expected = grad[-3:].float()
    del grad
    torch.ops.fastkern.cross_entropy_grad_(logits.detach(), target, reduction=2)
    assert bool(((logits.detach()[-3:].float() - expected).abs() <= 2**-8 * expected.abs() + 1e-9).all())


# ---- what torch says -------------------------------------------------------------------------------------------------


def test_nothing_counts(device: str) -> None:
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    target = torch.full((3,), -100, device=device)
    assert fastkern.cross_entropy(logits, target).isnan()
    assert fastkern.cross_entropy(logits, target, reduction="sum") == 0
    loss = fastkern.cross_entropy(logits, target, reduction="none")
    assert loss.tolist() == [0, 0, 0]
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert bool((grad == 0).all())
    assert fastkern.cross_entropy(logits[:0], target[:0]).isnan()
    assert fastkern.cross_entropy(logits[:0], target[:0], reduction="sum") == 0


def test_rows_that_do_not_count_are_not_read(device: str) -> None:
    logits = torch.randn(4, 100, device=device)
    logits[1] = torch.nan
    target = torch.tensor([3, 7, 99, 0], device=device)
    loss = fastkern.cross_entropy(logits.requires_grad_(), target, ignore_index=7)
    assert loss.isfinite()
    (grad,) = torch.autograd.grad(loss, logits)
    assert bool((grad[1] == 0).all() & grad.isfinite().all())


@pytest.mark.parametrize("v", [5, 1000, 70000])
@pytest.mark.parametrize("wrong", [-1, "V", 2**31 + 7, -(2**40), 2**62])
def test_classes_that_there_are_not(v: int, wrong: Any, device: str) -> None:
    wrong = v if wrong == "V" else wrong
    logits = torch.randn(3, v, device=device, requires_grad=True)
    target = torch.tensor([1, wrong, 2], device=device)
    weight = torch.ones(v, device=device)
    for options in ({}, {"weight": weight}, {"label_smoothing": 0.1}):
        if device == "cpu":
            with pytest.raises(RuntimeError, match=rf"target must hold classes from 0 to {v - 1} .*, got {wrong}"):
                fastkern.cross_entropy(logits, target, **options)
            continue
        loss = fastkern.cross_entropy(logits, target, reduction="none", **options)
        assert loss.isnan().tolist() == [False, True, False]
        (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        assert bool(grad[[0, 2]].isfinite().all())
        assert bool(grad[1].isnan().all())
        assert fastkern.cross_entropy(logits, target, **options).isnan()
        copy = logits * 1.0
        assert fastkern.cross_entropy(copy, target, inplace_backward=True, **options).isnan()


def test_infinite_logits(device: str) -> None:
    for values in ([1.0, -torch.inf, 2.0], [-torch.inf] * 3, [torch.inf, 1.0, 2.0], [-torch.inf, 3.0, -torch.inf]):
        for t in range(3):
            logits = torch.tensor([values], device=device, requires_grad=True)
            target = torch.tensor([t], device=device)
            ours, theirs = fastkern.cross_entropy(logits, target), F.cross_entropy(logits, target)
            assert torch.equal(ours.isnan(), theirs.isnan()), (values, t)
            assert torch.equal(ours.isinf(), theirs.isinf()), (values, t)
            grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
            assert torch.equal(grads[0].isnan(), grads[1].isnan()), (values, t)


def test_losses_near_zero_keep_their_digits(device: str) -> None:
    """A class far above the others, with logits far from zero."""
    for shift in (0.0, 1000.0):
        logits = torch.zeros(1, 100, device=device)
        logits[0, 5] = 16.0
        logits = (logits + shift).requires_grad_()
        loss = fastkern.cross_entropy(logits, torch.tensor([5], device=device))
        expected = F.cross_entropy(logits.double(), torch.tensor([5], device=device))
        assert abs(loss.item() / expected.item() - 1) < 1e-2
        (grad,) = torch.autograd.grad(loss, logits)
        (wanted,) = torch.autograd.grad(expected, logits)
        assert bool(((grad - wanted).abs() < 2e-7).all())


@pytest.mark.parametrize("v", [257, 30000, 60000])
def test_rows_do_not_depend_on_the_batch(v: int, device: str) -> None:
    logits = torch.randn(300, v, device=device).bfloat16() if v < 1000 else torch.randn(9, v, device=device)
    target = torch.randint(v, logits.shape[:1], device=device)
    whole = fastkern.cross_entropy(logits, target, reduction="none", return_lse=True)
    for i in (0, 5, 8):
        alone = fastkern.cross_entropy(logits[i : i + 1], target[i : i + 1], reduction="none", return_lse=True)
        for ours, theirs in zip(alone, whole, strict=True):
            assert_bitwise(ours, theirs[i : i + 1], f"row {i}")


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_compiled_gradients_with_ignored_rows(device: str) -> None:
    """One graph for several sizes; the gradients are those of the eager call, of torch and of nothing ignored."""
    torch._dynamo.reset()

    def step(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return fastkern.cross_entropy(x @ w, target, ignore_index=-1) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9, 14):
        x, w = torch.randn(rows, 8, device=device), torch.randn(8, 33, device=device)
        target = torch.randint(33, (rows,), device=device)
        target[::3] = -1
        grads = []
        for function in (compiled, step, lambda x, w, t: F.cross_entropy(x @ w, t, ignore_index=-1) * 2):
            leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
            grads.append(torch.autograd.grad(function(*leaves, target), leaves))
        for ours, eager, theirs in zip(*grads, strict=True):
            assert_bitwise(ours, eager, f"{rows} rows")
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---- the gradient over the logits ------------------------------------------------------------------------------------


def _in_place(**inputs: Any) -> tuple[Tensor, ...]:
    """cross_entropy of a copy that is overwritten."""
    inputs["logits"] = inputs["logits"] * 1.0
    return cross_entropy(**inputs, inplace_backward=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "v"), [(1, 1), (3, 77), (5, 4099), (3, 32000), (2, 50257), (2, 128256), (1, 262144)])
def test_in_place(m: int, v: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(v)
    for options in ({}, {"reduction": 2, "softcap": 5.0}, {"soft": "same", "label_smoothing": 0.1},
                    {"weight": torch.float32, "lse_square_scale": 1e-3, "ignore": True}):  # fmt: skip
        inputs = cross_entropy_inputs(M=m, V=v, dtype=dtype, device=device, **options)
        _assert_right(inputs, f"{m} x {v} {dtype} {options}", _in_place)


def test_in_place_overwrites_the_logits(device: str) -> None:
    leaf = torch.randn(4, 100, device=device, requires_grad=True)
    target = torch.randint(100, (4,), device=device)
    logits = leaf * 1.0
    before = logits.detach().clone()
    loss = fastkern.cross_entropy(logits, target, inplace_backward=True)
    assert not torch.equal(logits, before)
    with torch.no_grad():  # nobody wants a gradient: the logits stay
        again = before.clone()
        fastkern.cross_entropy(again, target, inplace_backward=True)
        assert_bitwise(again, before, "logits without a gradient")
    (grad,) = torch.autograd.grad(loss * 0.5, leaf)
    assert grad.data_ptr() == logits.data_ptr() or bool(grad.isfinite().all())
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, target) * 0.5, leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


def test_in_place_runs_backward_once(device: str) -> None:
    logits = torch.randn(4, 10, device=device, requires_grad=True) * 1.0
    loss = fastkern.cross_entropy(logits, torch.zeros(4, dtype=torch.long, device=device), inplace_backward=True)
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"used already|modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_in_place_tells_autograd(device: str) -> None:
    """Who saved the logits finds out that they have changed."""
    leaf = torch.randn(4, 10, device=device, requires_grad=True)
    logits = leaf.exp()  # which saves its result
    loss = fastkern.cross_entropy(logits, torch.zeros(4, dtype=torch.long, device=device), inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


def test_in_place_refuses(device: str) -> None:
    leaf = torch.randn(4, 10, device=device, requires_grad=True)
    target = torch.zeros(4, dtype=torch.long, device=device)

    def call(logits: Tensor, target: Tensor = target, **options: Any) -> Any:
        return fastkern.cross_entropy(logits, target, inplace_backward=True, **options)

    with pytest.raises(RuntimeError, match="got a leaf that requires grad"):
        call(leaf)
    with pytest.raises(RuntimeError, match="got a leaf that requires grad"):
        call(leaf.view(2, 2, 10), target.view(2, 2))
    other = leaf * 1.0
    with pytest.raises(RuntimeError, match="got a part of another tensor"):
        call(other[:2], target[:2])
    with pytest.raises(RuntimeError, match="got a tensor that is not contiguous"):
        call(other[:1].expand(4, 10))
    with pytest.raises(RuntimeError, match="got a tensor that is not contiguous"):
        call((leaf.t() * 1.0).contiguous().t())
    with pytest.raises(RuntimeError, match="inplace_backward must be False with reduction='none'"):
        call(other, reduction="none")
    call(other.view(2, 2, 10), target.view(2, 2)).backward()  # the whole of it in another shape
    assert leaf.grad is not None


def test_in_place_compiled(device: str) -> None:
    """There it changes nothing: the compiler plans the memory."""
    torch._dynamo.reset()
    target = torch.tensor([1, -100, 3], device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        return fastkern.cross_entropy(x * 1.0, target, inplace_backward=True)

    leaf = torch.randn(3, 7, device=device, requires_grad=True)
    (ours,) = torch.autograd.grad(step(leaf), leaf)
    (theirs,) = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.cuda
@pytest.mark.parametrize("v", [1000, 50257, 128256])
def test_in_place_under_graph_capture(v: int, cuda: None) -> None:
    leaf = torch.randn(64, v, device="cuda").bfloat16().requires_grad_()
    target = torch.randint(v, (64,), device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        loss = fastkern.cross_entropy(leaf * 1.0, target, inplace_backward=True)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for ours, theirs in zip(got, expected, strict=True):
        assert_bitwise(ours, theirs, f"captured, {v} classes")


# ---- words -----------------------------------------------------------------------------------------------------------


def test_outputs_asked_for() -> None:
    logits, target = torch.randn(2, 3, 10), torch.randint(10, (2, 3))
    loss, lse = fastkern.cross_entropy(logits, target, return_lse=True)
    assert (loss.shape, lse.shape) == ((), (2, 3))
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    loss, zloss = fastkern.cross_entropy(logits, target, lse_square_scale=0.1, return_z_loss=True)
    torch.testing.assert_close(zloss, 0.1 * lse.square().mean())
    torch.testing.assert_close(loss, F.cross_entropy(logits.view(6, 10), target.view(6)) + zloss)
    assert fastkern.cross_entropy(torch.randn(7), torch.tensor(3), reduction="none").shape == ()


def test_unknown_reduction() -> None:
    with pytest.raises(RuntimeError, match="reduction must be 'none', 'mean' or 'sum', got 'average'"):
        fastkern.cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.long), reduction="average")
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got list"):
        fastkern.cross_entropy(torch.randn(2, 3), [0, 1])  # type: ignore[arg-type]


def test_target_is_not_differentiable() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="target must not require grad"):
        fastkern.cross_entropy(logits, torch.softmax(torch.randn(2, 3), -1).requires_grad_())


# ---- linear_cross_entropy --------------------------------------------------------------------------------------------


def _linear_case(rows: int, H: int, V: int, dtype: torch.dtype, device: str, **more: Any) -> Inputs:
    inputs = linear_inputs(M=rows, H=H, V=V, dtype=dtype, device=device, **more)
    return {k: v.requires_grad_() if k in ("hidden", "weight", "bias") else v for k, v in inputs.items()}


def _linear_gradients(inputs: Inputs, **more: Any) -> tuple[Tensor, ...]:
    leaves = [inputs[k] for k in ("hidden", "weight", "bias") if k in inputs]
    loss = linear_cross_entropy(**inputs, **more)
    return loss.detach(), *torch.autograd.grad(2 * loss.sum(), leaves)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_nothing(dtype: torch.dtype, reduction: int, device: str) -> None:
    inputs = _linear_case(37, 24, 101, dtype, device, bias=True, ignore=True, reduction=reduction)
    whole = _linear_gradients(inputs)
    for chunk_rows in (1, 7, 36, 37, 1000):
        for ours, expected in zip(_linear_gradients(inputs, chunk_rows=chunk_rows), whole, strict=True):
            atol = 4 * torch.finfo(ours.dtype).eps * float(expected.abs().max()) * (37 / min(chunk_rows, 37)) ** 0.5
            torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


def test_linear_backward_more_than_once(device: str) -> None:
    inputs = _linear_case(9, 16, 33, torch.float32, device, bias=True)
    leaves = [inputs[k] for k in ("hidden", "weight", "bias")]
    loss = linear_cross_entropy(**inputs)
    for factor in (3.0, 0.5, 1.0):
        grads = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        expected = torch.autograd.grad(factor * linear_reference(**inputs), leaves)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_linear_accumulates(device: str) -> None:
    """What backward gives away is nobody's later."""
    inputs = _linear_case(9, 16, 33, torch.float32, device)
    for _ in range(2):
        linear_cross_entropy(**inputs).backward(retain_graph=True)
    expected = 2 * torch.autograd.grad(linear_reference(**inputs), inputs["weight"])[0]
    torch.testing.assert_close(inputs["weight"].grad, expected, rtol=1e-4, atol=1e-5)


def test_linear_outputs_asked_for(device: str) -> None:
    inputs = _linear_case(5, 8, 21, torch.float32, device)
    hidden, weight, target = inputs["hidden"], inputs["weight"], inputs["target"]
    options = {"lse_square_scale": 0.1, "return_lse": True, "return_z_loss": True}
    ours = fastkern.linear_cross_entropy(hidden, weight, target, chunk_rows=2, **options)
    for got, expected in zip(ours, fastkern.cross_entropy(hidden @ weight.t(), target, **options), strict=True):
        torch.testing.assert_close(got, expected)
    assert [t.requires_grad for t in ours] == [True, False, False]
    with pytest.raises(RuntimeError, match="class_weight must not require grad"):
        fastkern.linear_cross_entropy(
            hidden, weight, target, class_weight=torch.ones(21, device=device).requires_grad_()
        )


def test_linear_compiled(device: str) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return fastkern.linear_cross_entropy(torch.relu(x), w, target, ignore_index=-1, chunk_rows=4) * 3

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9, 14):
        x = torch.randn(rows, 8, device=device, requires_grad=True)
        w = torch.randn(33, 8, device=device, requires_grad=True)
        target = torch.randint(33, (rows,), device=device)
        target[::3] = -1
        ours = torch.autograd.grad(compiled(x, w, target), [x, w])
        for got, expected in zip(ours, torch.autograd.grad(step(x, w, target), [x, w]), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_linear_memory(cuda: None) -> None:
    """At most 1 GiB beside the gradients."""
    rows, H, V = 8192, 4096, 128256
    hidden = torch.randn(rows, H, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(V, H, device="cuda") / H**0.5).bfloat16().requires_grad_()
    target = torch.randint(V, (rows,), device="cuda")
    fastkern.linear_cross_entropy(hidden[:256], weight, target[:256]).backward()  # the workspace of torch's products
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fastkern.linear_cross_entropy(hidden, weight, target).backward()
    gradients = sum(t.numel() * t.element_size() for t in (hidden, weight))
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1 << 30


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_modules(device: str) -> None:
    weight = torch.rand(21, device=device)
    layer = torch.nn.Linear(8, 21, device=device)
    hidden, target = torch.randn(2, 5, 8, device=device), torch.randint(21, (2, 5), device=device)
    plain = fastkern.nn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction="sum").to(device)
    fused = fastkern.nn.LinearCrossEntropyLoss(weight, label_smoothing=0.1, reduction="sum", chunk_rows=3).to(device)
    logits = layer(hidden)
    expected = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction="sum")(logits.mT, target)
    torch.testing.assert_close(plain(logits, target), expected)
    torch.testing.assert_close(fused(hidden, layer.weight, target, layer.bias), expected)
    assert list(plain.state_dict()) == ["weight"]
    assert "reduction='sum'" in repr(fused)
    overwriting = fastkern.nn.CrossEntropyLoss(inplace_backward=True, return_lse=True)
    loss, lse = overwriting(layer(hidden) * 1.0, target)
    loss.backward()
    assert layer.weight.grad is not None
    assert lse.shape == (2, 5)
    with pytest.raises(RuntimeError, match="label_smoothing must be between 0 and 1, got 2"):
        fastkern.nn.CrossEntropyLoss(label_smoothing=2.0)
