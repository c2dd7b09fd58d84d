# SPDX-License-Identifier: Apache-2.0
"""Gated activations, and the bias in front of an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastkern.ops import _activation_check as _own
from fastkern.ops import _batching, _check, _gradient, _schema

_ops = torch.ops.fastkern
_swiglu_fwd = _ops.swiglu_fwd.default
_geglu_fwd = _ops.geglu_fwd.default
_reglu_fwd = _ops.reglu_fwd.default
_glu_fwd = _ops.glu_fwd.default
_clamped_swiglu_fwd = _ops.clamped_swiglu_fwd.default
_bias_act_fwd = _ops.bias_act_fwd.default
_swiglu_static_quant = _ops.swiglu_static_quant.default
_geglu_static_quant = _ops.geglu_static_quant.default
_clamped_swiglu_static_quant = _ops.clamped_swiglu_static_quant.default


def swiglu(a: Tensor, b: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """SwiGLU: ``silu(a) * b``, with ``silu(a) = a * sigmoid(a)`` (Shazeer, "GLU Variants Improve Transformer", 2020).

    The middle of Llama's MLP, ``swiglu(gate_proj(x), up_proj(x))``. The same operator is
    ``torch.ops.fastkern.swiglu``; this function leaves out the autograd wrapper when no gradient is needed.

    Args:
        a: (..., N), what goes through the activation; or, without ``b``, a packed (..., 2N) with both. float32, float16
            or bfloat16, on the CPU or a CUDA device. Any strides and storage offset; rows are read in place when the
            last dimension is dense and the leading ones merge into at most two strides, otherwise a dense copy is made.
        b: (..., N), of the shape, dtype and device of ``a``; any strides. None: ``a`` is packed.
        interleaved: how a packed ``a`` is packed. False: as halves, ``a[..., :N]`` through the activation and
            ``a[..., N:]`` multiplied; True: as pairs, ``a[..., 0::2]`` through the activation and ``a[..., 1::2]``.

    Returns:
        (..., N), contiguous, the dtype of ``a``. Computed in float32 and rounded once.

    Raises:
        RuntimeError: a dtype, shape or device other than the above; the message names the argument.
        TypeError: an operand is no tensor.

    Notes:
        * Deterministic, forward and backward; no element depends on another.
        * Backward saves the inputs and computes the activation again. The gradient of a packed input is packed in the
          same way, and written by one kernel.
        * Under autocast the dtypes given are kept.
        * Works under ``torch.compile``, ``torch.export``, ``torch.func`` (``vmap``, ``grad``, ``jvp``) and CUDA graph
          capture. Forward mode and second derivatives take plain PyTorch formulas; ``torch.ops.fastkern.swiglu``
          itself has no forward mode.
    """
    if _gradient.wanted("swiglu", ("a", "b"), a, b):
        return _swiglu_with_gradient(a, b, interleaved)
    return _swiglu_fwd(a, b, interleaved)


def geglu(a: Tensor, b: Tensor | None = None, approximate: str = "none", interleaved: bool = False) -> Tensor:
    """GeGLU: ``gelu(a) * b``. The same operator is ``torch.ops.fastkern.geglu``.

    Args:
        a: as in :func:`swiglu`.
        b: as in :func:`swiglu`.
        approximate: of GELU, as in ``torch.nn.functional.gelu``: "none" for ``a * (1 + erf(a / sqrt(2))) / 2`` or
            "tanh" for ``a * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 * a**3))) / 2``.
        interleaved: as in :func:`swiglu`.

    Returns:
        As :func:`swiglu`.

    Raises:
        RuntimeError: as in :func:`swiglu`; another ``approximate``.
        TypeError: as in :func:`swiglu`.

    Notes:
        What is said of :func:`swiglu` holds here.
    """
    if _gradient.wanted("geglu", ("a", "b"), a, b):
        return _geglu_with_gradient(a, b, approximate, interleaved)
    return _geglu_fwd(a, b, approximate, interleaved)


def reglu(a: Tensor, b: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """ReGLU: ``relu(a) * b``. The same operator is ``torch.ops.fastkern.reglu``.

    Args:
        a: as in :func:`swiglu`.
        b: as in :func:`swiglu`.
        interleaved: as in :func:`swiglu`.

    Returns:
        As :func:`swiglu`.

    Raises:
        RuntimeError: as in :func:`swiglu`.
        TypeError: as in :func:`swiglu`.

    Notes:
        What is said of :func:`swiglu` holds here.
    """
    if _gradient.wanted("reglu", ("a", "b"), a, b):
        return _reglu_with_gradient(a, b, interleaved)
    return _reglu_fwd(a, b, interleaved)


def glu(a: Tensor, b: Tensor | None = None) -> Tensor:
    """GLU: ``a * sigmoid(b)``. Of a packed ``a`` what ``torch.nn.functional.glu`` computes over the last dimension.

    Mind the order, which is torch's: here the second operand is the gate. The same operator is
    ``torch.ops.fastkern.glu``.

    Args:
        a: (..., N), what is multiplied; or, without ``b``, a packed (..., 2N) of two halves. Else as in :func:`swiglu`.
        b: (..., N), what goes through the sigmoid; None: ``a`` is packed.

    Returns:
        As :func:`swiglu`.

    Raises:
        RuntimeError: as in :func:`swiglu`.
        TypeError: as in :func:`swiglu`.

    Notes:
        What is said of :func:`swiglu` holds here.
    """
    if _gradient.wanted("glu", ("a", "b"), a, b):
        return _glu_with_gradient(a, b)
    return _glu_fwd(a, b)


def clamped_swiglu(
    a: Tensor,
    b: Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    up_offset: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """The SwiGLU of GPT-OSS: ``g * sigmoid(alpha * g) * (u + 1)``, of clamped ``g = min(a, limit)`` and ``u``.

    ``u = clamp(b, -limit, limit)``. GPT-OSS packs its inputs as pairs: ``interleaved=True``. The same operator is
    ``torch.ops.fastkern.clamped_swiglu``.

    Args:
        a: as in :func:`swiglu`.
        b: as in :func:`swiglu`.
        alpha: what the gate is multiplied with in the sigmoid; finite.
        limit: above 0; ``float("inf")`` for none.
        up_offset: what is added to the clamped ``b``; finite.
        interleaved: as in :func:`swiglu`.

    Returns:
        As :func:`swiglu`.

    Raises:
        RuntimeError: as in :func:`swiglu`; a number other than the above.
        TypeError: as in :func:`swiglu`.

    Notes:
        What is said of :func:`swiglu` holds here. As of ``torch.clamp``, the gradient of what was clamped is 0, and
        that at a limit goes through.
    """
    if _gradient.wanted("clamped_swiglu", ("a", "b"), a, b):
        return _clamped_swiglu_with_gradient(a, b, alpha, limit, up_offset, interleaved)
    return _clamped_swiglu_fwd(a, b, alpha, limit, up_offset, interleaved)


silu_and_mul = swiglu
gelu_and_mul = geglu


def swiglu_static_quant(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    interleaved: bool = False,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Tensor:
    """:func:`swiglu`, quantised with a given scale: ``q * scale`` is the result, within half a step. Forward only.

    Args:
        a: as in :func:`swiglu`.
        b: as in :func:`swiglu`; None: ``a`` is packed.
        scale: one float32 on the device of ``a``, above 0. It is read on the device: no synchronisation.
        interleaved: as in :func:`swiglu`.
        quant_dtype: torch.float8_e4m3fn or torch.int8.

    Returns:
        q (..., N) of ``quant_dtype``, contiguous. Computed in float32, divided by the scale and rounded once, to
        nearest even. What does not fit saturates, to 448 (float8) or 127 (int8) and their negatives.

    Raises:
        RuntimeError: as in :func:`swiglu`; also if an operand requires grad and gradients are on.
        TypeError: as in :func:`swiglu`.
    """
    _check.no_gradient("swiglu_static_quant", a=a, b=b, scale=scale)
    return _swiglu_static_quant(a, b, scale, interleaved, quant_dtype)


def geglu_static_quant(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    approximate: str = "none",
    interleaved: bool = False,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Tensor:
    """:func:`geglu`, quantised as in :func:`swiglu_static_quant`. Forward only.

    Args:
        a: as in :func:`swiglu`.
        b: as in :func:`swiglu`; None: ``a`` is packed.
        scale: as in :func:`swiglu_static_quant`.
        approximate: as in :func:`geglu`.
        interleaved: as in :func:`swiglu`.
        quant_dtype: torch.float8_e4m3fn or torch.int8.

    Returns:
        As :func:`swiglu_static_quant`.

    Raises:
        RuntimeError: as in :func:`swiglu_static_quant` and :func:`geglu`.
        TypeError: as in :func:`swiglu`.
    """
    _check.no_gradient("geglu_static_quant", a=a, b=b, scale=scale)
    return _geglu_static_quant(a, b, scale, approximate, interleaved, quant_dtype)


def clamped_swiglu_static_quant(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    alpha: float = 1.702,
    limit: float = 7.0,
    up_offset: float = 1.0,
    interleaved: bool = False,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Tensor:
    """:func:`clamped_swiglu`, quantised as in :func:`swiglu_static_quant`. Forward only.

    Args:
        a: as in :func:`swiglu`.
        b: as in :func:`swiglu`; None: ``a`` is packed.
        scale: as in :func:`swiglu_static_quant`.
        alpha: as in :func:`clamped_swiglu`.
        limit: as in :func:`clamped_swiglu`.
        up_offset: as in :func:`clamped_swiglu`.
        interleaved: as in :func:`swiglu`.
        quant_dtype: torch.float8_e4m3fn or torch.int8.

    Returns:
        As :func:`swiglu_static_quant`.

    Raises:
        RuntimeError: as in :func:`swiglu_static_quant` and :func:`clamped_swiglu`.
        TypeError: as in :func:`swiglu`.
    """
    _check.no_gradient("clamped_swiglu_static_quant", a=a, b=b, scale=scale)
    return _clamped_swiglu_static_quant(a, b, scale, alpha, limit, up_offset, interleaved, quant_dtype)


def bias_act(x: Tensor, bias: Tensor | None = None, act: str = "gelu") -> Tensor:
    """An activation behind a bias: ``act(x + bias)``. Megatron's and EPOI's fused bias and GELU.

    The same operator is ``torch.ops.fastkern.bias_act``.

    Args:
        x: (..., N), float32, float16 or bfloat16, on the CPU or a CUDA device; strides as in :func:`swiglu`. As a rule
            the product of a linear layer without its bias.
        bias: (N,), float32, float16 or bfloat16; None: none.
        act: "gelu" (with erf), "gelu_tanh", "relu", "silu" or "quick_gelu" (``z * sigmoid(1.702 * z)``).

    Returns:
        (..., N), contiguous, the dtype of ``x``. ``x + bias`` is not rounded before the activation.

    Raises:
        RuntimeError: a dtype, shape, device or name other than the above; the message names the argument.
        TypeError: an operand is no tensor.

    Notes:
        * Deterministic, forward and backward. The gradient of ``bias`` is summed up in the pass that writes the one of
          ``x``, of numbers that are not rounded before, in an order that depends on sizes and dtype alone.
        * Backward saves ``x`` and ``bias``.
        * What is said of :func:`swiglu` on autocast and transforms holds here.
    """
    if _gradient.wanted("bias_act", ("x", "bias"), x, bias):
        return _bias_act_with_gradient(x, bias, act)
    return _bias_act_fwd(x, bias, act)


# ---- in torch operations ---------------------------------------------------------------------------------------------

_ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def _gated_formula(op: str, a: Tensor, b: Tensor | None, options: _own.Options) -> Tensor:
    """In differentiable torch operations, in float32, rounded once."""
    dtype = a.dtype
    if b is None:
        a, b = (a[..., 0::2], a[..., 1::2]) if options.interleaved else a.chunk(2, -1)
    a, b = a.float(), b.float()
    if op == "swiglu":
        y = functional.silu(a) * b
    elif op == "geglu":
        y = functional.gelu(a, approximate=options.approximate) * b
    elif op == "reglu":
        y = functional.relu(a) * b
    elif op == "glu":
        y = a * torch.sigmoid(b)
    else:
        g, u = a.clamp(max=options.limit), b.clamp(-options.limit, options.limit)
        y = g * torch.sigmoid(options.alpha * g) * (u + options.up_offset)
    return y.to(dtype)


def differentiable(
    formula: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], needs: tuple[bool, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of a formula that have gradients themselves."""
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(formula(*tensors), wanted, dy, create_graph=True))
    return tuple(next(found) if need and t is not None else None for t, need in zip(tensors, needs, strict=True))


# ---- gated -----------------------------------------------------------------------------------------------------------


def _options_of(names: list[str], values: tuple[Any, ...]) -> _own.Options:
    fields = dict(zip(names, values, strict=True))
    return _own.Options(**{k: v for k, v in fields.items() if k in _own.Options._fields})


def _register(op: str) -> Any:
    """Fakes, gradient and batching of a gated activation; returns the function with a gradient."""
    bwd = getattr(_ops, f"{op}_bwd").default
    names = [argument.name for argument in _schema.arguments(op)]
    bwd_names = [argument.name for argument in _schema.arguments(f"{op}_bwd")]

    def check(*arguments: Any) -> list[Any]:
        return _own.gated(op, arguments[0], arguments[1], _options_of(names, arguments))

    def fake(*arguments: Any) -> Tensor:
        sizes = check(*arguments)  # before the first of them is taken for a tensor
        return arguments[0].new_empty(sizes)

    def check_bwd(dy: Tensor, a: Tensor, b: Tensor | None, *rest: Any) -> None:
        _own.gated(f"{op}_bwd", a, b, _options_of(bwd_names, (dy, a, b, *rest)), dy)
        _own.needed(f"{op}_bwd", rest[-1], b, "need_db", "b")

    def fake_bwd(dy: Tensor, a: Tensor, b: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        check_bwd(dy, a, b, *rest)
        return _own.empty_gradient(rest[-2], a, a), _own.empty_gradient(rest[-1], b, a)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.options = inputs[2:]

    def grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], b is not None and ctx.needs_input_grad[1])
        rest = (None,) * len(ctx.options)
        if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
            options = _options_of(names, (a, b, *ctx.options))
            return *differentiable(lambda a, b: _gated_formula(op, a, b, options), (a, b), needs, dy), *rest
        da, db = bwd(dy, a, b, *ctx.options, *needs)
        return da if needs[0] else None, db if needs[1] else None, *rest

    def composite(*arguments: Any) -> Tensor:
        check(*arguments)
        return _gated_formula(op, arguments[0], arguments[1], _options_of(names, arguments))

    for name in (op, f"{op}_fwd"):
        _schema.register_fake(name, fake)
        _batching.register(name, rows=("a", "b"), check=check)
    _schema.register_fake(f"{op}_bwd", fake_bwd)
    _batching.register(f"{op}_bwd")
    return _gradient.register(op, save=save, grad=grad, composite=composite)


_swiglu_with_gradient = _register("swiglu")
_geglu_with_gradient = _register("geglu")
_reglu_with_gradient = _register("reglu")
_glu_with_gradient = _register("glu")
_clamped_swiglu_with_gradient = _register("clamped_swiglu")


def _register_quant(op: str) -> None:
    names = [argument.name for argument in _schema.arguments(op)]

    def check(*arguments: Any) -> tuple[list[Any], torch.dtype]:
        fields = dict(zip(names, arguments, strict=True))
        a = fields["a"]
        shape = _own.gated(op, a, fields["b"], _options_of(names, arguments))
        _check.one_element(op, "scale", fields["scale"], torch.float32, a)
        return shape, _check.quant_dtype(op, "quant_dtype", fields["quant_dtype"])

    def fake(*arguments: Any) -> Tensor:
        shape, dtype = check(*arguments)
        return arguments[0].new_empty(shape, dtype=dtype)

    _schema.register_fake(op, fake)
    _batching.register(op, rows=("a", "b"), check=check)


for _op in ("swiglu_static_quant", "geglu_static_quant", "clamped_swiglu_static_quant"):
    _register_quant(_op)


# ---- bias and activation ---------------------------------------------------------------------------------------------


def _bias_act_check(x: Tensor, bias: Tensor | None, act: str) -> None:
    op = "bias_act"
    _check.float_tensor(op, "x", x)
    _check.at_least_one_dimension(op, "x", x.dim())
    _own.bias(op, x, bias)
    _own.act(op, act)


def _bias_act_fake(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    _bias_act_check(x, bias, act)
    return _own.empty(x)


def _bias_act_bwd_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, act: str, need_dx: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    op = "bias_act_bwd"
    _check.float_tensor(op, "x", x)
    _check.at_least_one_dimension(op, "x", x.dim())
    _own.like_x(op, x, "dy", dy)
    _own.bias(op, x, bias)
    _own.act(op, act)
    _own.needed(op, need_dbias, bias, "need_dbias", "bias")
    return _own.empty_gradient(need_dx, x, x), _own.empty_gradient(need_dbias, bias, x)


def _bias_act_formula(act: str, x: Tensor, bias: Tensor | None) -> Tensor:
    z = x.float() if bias is None else x.float() + bias.float()
    return _ACT[act](z).to(x.dtype)


def _bias_act_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.act = inputs
    ctx.save_for_backward(x, bias)


def _bias_act_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], bias is not None and ctx.needs_input_grad[1])
    if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
        act = ctx.act
        return *differentiable(lambda x, bias: _bias_act_formula(act, x, bias), (x, bias), needs, dy), None
    dx, dbias = _ops.bias_act_bwd(dy, x, bias, ctx.act, *needs)
    return dx if needs[0] else None, dbias if needs[1] else None, None


def _bias_act_composite(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    _bias_act_check(x, bias, act)
    return _bias_act_formula(act, x, bias)


for _name in ("bias_act", "bias_act_fwd"):
    _schema.register_fake(_name, _bias_act_fake)
    _batching.register(_name, rows=("x",), check=_bias_act_check)
_schema.register_fake("bias_act_bwd", _bias_act_bwd_fake)
_batching.register("bias_act_bwd")
_bias_act_with_gradient = _gradient.register(
    "bias_act", save=_bias_act_save, grad=_bias_act_grad, composite=_bias_act_composite
)
