# SPDX-License-Identifier: Apache-2.0
"""flash_attn, flash_attn_varlen, merge_attention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastkern
from fastkern.specs import _attention_formula as formula
from fastkern.specs._attention_refusals import attention_bad_calls, merge_bad_calls, varlen_bad_calls
from fastkern.specs._peers import flash_attention, xformers_attention
from fastkern.specs._spec import Dims, Inputs, OpSpec

# ---- the functions, called with the arguments of the operators -------------------------------------------------------


def flash_attn(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """fastkern.flash_attn with its lse."""
    return fastkern.flash_attn(*args, **_in_words(options), return_lse=True)


def flash_attn_varlen(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """fastkern.flash_attn_varlen with its lse."""
    return fastkern.flash_attn_varlen(*args, **_in_words(options), return_lse=True)


def _in_words(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the operator as the function wants them."""
    options["window"] = (options.pop("window_left", -1), options.pop("window_right", -1))
    options["causal_align"] = _alignment(options.pop("top_left", False))
    return options


def _alignment(top_left: Any) -> Any:
    """The word for it; what is no bool stays what it is."""
    return {True: "top_left", False: "bottom_right"}[top_left] if isinstance(top_left, bool) else top_left


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _normal(*shape: int, dtype: torch.dtype, device: Any) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def _integers(high: Iterable[int], device: Any) -> Tensor:
    """One from 0 to each of the numbers."""
    return torch.tensor([int(torch.randint(h + 1, ())) for h in high], dtype=torch.int32).to(device)


def _bias(kind: str, sizes: dict[str, int], dtype: torch.dtype, device: Any) -> Tensor:
    """``kind`` has a letter for each dimension, 1 where it is broadcast: "BHST", "1H1T", ..."""
    shape = [sizes.get(letter, 1) for letter in kind]
    if dtype == torch.bool:
        seen = torch.rand(shape, device=device) < 0.7
        seen[:, :, :1] &= shape[2] == 1  # a query that sees nothing
        return seen
    return _normal(*shape, dtype=dtype, device=device)


def _slopes(kind: str, sizes: dict[str, int], device: Any) -> Tensor:
    H = sizes["H"]
    slopes = 2 ** (-8 * torch.arange(1, H + 1, device=device) / max(H, 1))
    return slopes if kind == "H" else slopes * (1 + torch.arange(sizes["B"], device=device)[:, None] / 4)


def _options(
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: Any,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    top_left: bool = False,
    scale: float | None = None,
    bias: str | None = None,
    bias_dtype: torch.dtype | None = None,
    alibi: str | None = None,
    softcap: float = 0.0,
    sinks: Any = None,
    dropout: float = 0.0,
    prefix: bool = False,
    blocks: str | None = None,
    used: bool = False,
    lengths: tuple[list[int], list[int]] | None = None,
) -> Inputs:
    """What is asked for besides q, k and v, in the operator's words; what equals its default is left out."""
    B, S, T, H = (sizes[name] for name in "BSTH")
    lengths = ([S] * B, [T] * B) if lengths is None else lengths
    options: Inputs = {"causal": True} if causal else {}
    if window is not None:
        options |= {"window_left": window[0], "window_right": window[1]}
    if scale is not None:
        options["scale"] = scale
    if bias is not None:
        options["bias"] = _bias(bias, sizes, bias_dtype or dtype, device)
    if alibi is not None:
        options["alibi_slopes"] = _slopes(alibi, sizes, device)
    if softcap:
        options["softcap"] = softcap
    if sinks is not None:
        options["sinks"] = _normal(H, dtype=dtype if sinks == "same" else sinks, device=device)
    if dropout:
        options |= {
            "dropout_p": dropout,
            "seed": torch.tensor(0x9E3779B97F4A7C15 - 2**64, device=device),
            "offset": torch.tensor([2**33 + 5], device=device),
        }
    if top_left:
        options["top_left"] = True
    if prefix:
        options["prefix"] = _integers(lengths[1], device)
    if blocks is not None:
        shape = (H if blocks == "H" else 1, -(-S // 64), -(-T // 64))
        options |= {"block_mask": torch.rand(shape, device=device) < 0.7, "block_size": 64}
    if used:
        options |= {"seqused_q": _integers(lengths[0], device), "seqused_k": _integers(lengths[1], device)}
    return options


def _value_dim(D: int, change: str) -> int:
    return {"same": D, "more": D + 6 if D <= 250 else D, "less": max(2 * D // 3, 1)}[change]


def attention_inputs(
    *, B: int, S: int, T: int, H: int, D: int, dtype: torch.dtype, device: Any, group: int = 1, V: str = "same",
    **asked: Any,
) -> Inputs:  # fmt: skip
    """``group`` query heads share a key head or, where that does not divide them, as many as their common divisor."""
    G = H // math.gcd(H, group) if H else 1
    return {
        "q": _normal(B, S, H, D, dtype=dtype, device=device),
        "k": _normal(B, T, G, D, dtype=dtype, device=device),
        "v": _normal(B, T, G, _value_dim(D, V), dtype=dtype, device=device),
        **_options({"B": B, "S": S, "T": T, "H": H}, dtype, device, **asked),
    }


def _several(B: int, longest: int, shift: int) -> list[int]:
    """B lengths, from none at all to the longest."""
    pattern = (longest, longest // 2 + 1, 0, 1, longest - 1, longest)
    return [min(max(pattern[(b + shift) % len(pattern)], 0), longest) for b in range(B)]


def varlen_inputs(
    *, B: int, S: int, T: int, H: int, D: int, dtype: torch.dtype, device: Any, group: int = 1, V: str = "same",
    tail: int = 0, equal: bool = False, **asked: Any,
) -> Inputs:  # fmt: skip
    """Sequences of several lengths, or all of the same, and ``tail`` rows that are in none."""
    lengths = ([S] * B, [T] * B) if equal else (_several(B, S, 0), _several(B, T, 1))
    G = H // math.gcd(H, group) if H else 1
    edges = [torch.tensor([0, *own], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device) for own in lengths]
    rows_q, rows_k = (sum(own) + tail for own in lengths)
    return {
        "q": _normal(rows_q, H, D, dtype=dtype, device=device),
        "k": _normal(rows_k, G, D, dtype=dtype, device=device),
        "v": _normal(rows_k, G, _value_dim(D, V), dtype=dtype, device=device),
        "cu_seqlens_q": edges[0],
        "cu_seqlens_k": edges[1],
        **_options({"B": B, "S": S, "T": T, "H": H}, dtype, device, lengths=lengths, **asked),
    }


def merge_inputs(
    *, K: int, B: int, S: int, H: int, V: int, dtype: torch.dtype, device: Any, empty: bool = False
) -> Inputs:
    """With ``empty`` some parts saw nothing, and for some rows none did."""
    lses = torch.randn(K, B, H, S, device=device) * 2
    if empty:
        lses = lses.masked_fill(torch.rand(lses.shape, device=device) < 0.3, -math.inf)
        lses[..., :1] = -math.inf
    outs = _normal(K, B, S, H, V, dtype=dtype, device=device)
    return {"outs": outs.masked_fill((lses == -math.inf).transpose(-1, -2)[..., None], 0), "lses": lses}


# ---- costs -----------------------------------------------------------------------------------------------------------


def _size(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: all inputs read, out and lse written. Backward: with out, lse and dout read, the gradients written."""
    q, v = inputs["q"], inputs["v"]
    rows = q.shape[:-1].numel()
    out, lse = rows * v.shape[-1] * q.element_size(), 4 * rows
    read = _size(*inputs.values())
    if not backward:
        return read + out + lse
    gradients = _size(*(inputs.get(name) for name in _DIFFERENTIABLE))
    return read + 2 * out + lse + gradients


def _pairs(inputs: Inputs) -> int:
    """Query rows times keys, over all entries; half of them under a causal mask, as everybody counts."""
    q, k = inputs["q"], inputs["k"]
    if q.dim() == 4:
        pairs = q.shape[0] * q.shape[1] * k.shape[1]
    else:
        edges = (inputs["cu_seqlens_q"].diff(), inputs["cu_seqlens_k"].diff())
        pairs = int((edges[0].long() * edges[1].long()).sum())
    return pairs // 2 if inputs.get("causal") else pairs


def _flops(inputs: Inputs, backward: bool) -> int:
    """Of the products alone: two forward, five backward."""
    q, v = inputs["q"], inputs["v"]
    D, V = q.shape[-1], v.shape[-1]
    return 2 * _pairs(inputs) * q.shape[-2] * (3 * D + 2 * V if backward else D + V)


def _workspace(inputs: Inputs, backward: bool) -> int:
    """On CUDA. Backward: the softmax and delta of each row, sums of dq in float32, who has added to them.

    Above 128 columns on Hopper gradients of scores instead of these sums, in at most 1 GiB.
    Forward, of operands whose last dimension is dense, nothing but an offset of dropout.
    """
    q, v = inputs["q"], inputs["v"]
    few = 1024
    if not backward:
        return few
    batch, heads = (inputs["cu_seqlens_q"].numel() - 1 if q.dim() == 3 else q.shape[0]), q.shape[-2]
    rows = q.shape[:-1].numel()
    if q.dtype == torch.float32:
        return 8 * rows + few
    columns = next(n for n in (32, 64, 96, 128, 192, 256) if n >= max(q.shape[-1], v.shape[-1]))
    sums = (rows + 128 * (batch + 1) * heads) * columns * 4
    turns = (rows // 32 + 2 * (batch + 1) * heads) * 4
    if columns > 128 and q.dim() == 4:
        tiles = batch * heads * -(-q.shape[1] // 64) * -(-inputs["k"].shape[1] // 64)
        sums = max(sums, min(tiles * 64 * 64 * 2, 1 << 30))
    return 8 * rows + sums + turns + few


def _merge_traffic(inputs: Inputs, backward: bool) -> int:
    """Forward: the parts read, one written. Backward: also the whole and its gradient read, those of the parts written.

    The whole is as large as one part.
    """
    parts = _size(*inputs.values())
    whole = parts // max(inputs["outs"].shape[0], 1)
    return 2 * parts + 2 * whole if backward else parts + whole


# ---- peers -----------------------------------------------------------------------------------------------------------


def _torch_kernels(backend: SDPBackend) -> Any:
    """Torch's operator, made to take these kernels of its own."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if q.device.type != "cuda":
            raise ImportError("of torch for CUDA alone")
        with sdpa_kernel(backend):
            return formula.torch_attention(q, k, v, **options)

    return attention


# ---- the rows --------------------------------------------------------------------------------------------------------

_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
_NAMES = ("B", "S", "T", "H", "D")


def _sizes(*numbers: tuple[int, ...]) -> tuple[Dims, ...]:
    return tuple(dict(zip(_NAMES, row, strict=True)) for row in numbers)


# Large, but not so large that a float32 score has no digits left to tell keys apart by.
_VALUES = {"times 4": lambda t: 4 * t, "times 1e-3": lambda t: 1e-3 * t, "mean 1": lambda t: 1 + t}


def _allowance(inputs: Inputs, stressed: bool) -> float:
    """In float32 1e-5, as the products are sums in another order than torch's.

    In 16 bits: backward reads the output again, which is rounded. That is an error of a row's sum of dout * out, and
    all gradients but that of v are what is left when that sum is taken away from others as large.
    """
    if inputs["q"].dtype == torch.float32:
        return 2e-4 if stressed else 1e-5
    return (16 if stressed else 1) * torch.finfo(inputs["q"].dtype).eps


def _unspecial(inputs: Inputs) -> tuple[str, ...]:
    """On CUDA a float32 is split into two numbers, of infinity and NaN or of which a denormal has none.

    And scores of bfloat16 operands are multiplied and lessened in one step, whose rounding "large" ones do not survive.
    """
    if not inputs["q"].is_cuda:
        return ("max finite",)
    if inputs["q"].dtype == torch.float32:
        return ("max finite", "one +inf", "one -inf", "both inf", "denormals")
    return ("max finite", "large") if inputs["q"].dtype == torch.bfloat16 else ("max finite",)


_DIMS = _sizes(
    # Four for one compiled graph: in the first one no two numbers are the same, those of key heads and so on included.
    (7, 5, 11, 12, 9),
    (3, 16, 9, 6, 12),
    (2, 17, 33, 6, 16),
    (4, 31, 63, 6, 40),
    (2, 3, 5, 4, 8),
    (3, 5, 7, 4, 8),
    (1, 1, 9, 6, 24),
    # Ends of tiles and what is beside them.
    (1, 64, 64, 2, 32),
    (1, 65, 15, 2, 32),
    (1, 1, 257, 2, 64),
    (1, 127, 129, 2, 64),
    (1, 63, 131, 2, 128),
    (1, 192, 128, 2, 72),
    (1, 33, 31, 2, 256),
    (2, 9, 13, 6, 24),
)
_VARIANTS: tuple[Inputs, ...] = (
    {},
    {"causal": True, "group": 2},
    {"window": (7, 3), "group": 3, "used": True},
    {"bias": "BHST", "causal": True},
    {"bias": "1H1T", "bias_dtype": torch.float32, "group": 2, "softcap": 30.0},
    {"bias": "B1ST", "bias_dtype": torch.bool, "causal": True, "top_left": True, "scale": 0.3},
    {"alibi": "BH", "causal": True, "softcap": 50.0},
    {"sinks": "same", "window": (5, 0), "group": 2},
    {"dropout": 0.3, "causal": True, "V": "more"},
    {"prefix": True, "causal": True, "V": "less", "alibi": "H"},
    {"blocks": "H", "window": (-1, 2), "sinks": torch.float32, "used": True},
)

# What dense and packed attention have in common.
_COMMON: dict[str, Any] = {
    "family": "attention",
    "traffic": _traffic,
    "flops": _flops,
    "workspace": _workspace,
    "empty_dims": ("B", "S", "T"),
    "data": ("q", "k", "v"),
    "signed_zeros": False,  # a sum over keys has its own
    "values": _VALUES,
    "second_order": False,
    "allowance": _allowance,
    "contained": False,  # 0 times NaN: of a row and what is hidden from it
    "unspecial": _unspecial,
}

FLASH_ATTN = OpSpec(
    name="flash_attn",
    function=flash_attn,
    reference=formula.attention,
    baseline=formula.attention_torch,
    make=attention_inputs,
    dims=_DIMS,
    variants=_VARIANTS,
    differentiable=_DIFFERENTIABLE,
    strided=("q", "k", "v", "bias", "alibi_slopes", "sinks"),
    batched=("q", "k", "v", "bias", "alibi_slopes", "prefix", "seqused_q", "seqused_k"),
    bench_dims=_sizes(
        (1, 64, 64, 4, 64),
        (32, 512, 512, 32, 64),
        (8, 2048, 2048, 32, 64),
        (1, 16384, 16384, 32, 64),
        (32, 512, 512, 16, 128),
        (8, 2048, 2048, 16, 128),
        (4, 4096, 4096, 16, 128),
        (1, 16384, 16384, 16, 128),
        (4, 4096, 4096, 8, 256),
        (1, 16384, 16384, 8, 256),
        (1, 1, 8192, 32, 128),
    ),
    cpu_bench_dims=_sizes((2, 1024, 1024, 8, 64), (1, 4096, 4096, 8, 128)),
    bench_variant={"causal": True},
    peers={
        "torch flash": _torch_kernels(SDPBackend.FLASH_ATTENTION),
        "torch cudnn": _torch_kernels(SDPBackend.CUDNN_ATTENTION),
        "flash_attn": flash_attention,
        "xformers": xformers_attention,
    },
    benchmark={
        "function": lambda *args, **options: flash_attn(*args, **options)[0],
        "reference": lambda *args, **options: formula.attention(*args, **options)[0],
        "baseline": formula.torch_attention,
    },
    bad_calls=attention_bad_calls("flash_attn"),
    placed=lambda inputs: bool(inputs.get("dropout_p")),
    **_COMMON,
)

FLASH_ATTN_VARLEN = OpSpec(
    name="flash_attn_varlen",
    function=flash_attn_varlen,
    reference=formula.varlen,
    baseline=formula.varlen_torch,
    make=varlen_inputs,
    dims=_sizes(
        (7, 5, 11, 12, 9),
        (3, 16, 9, 6, 12),
        (5, 17, 31, 6, 16),
        (4, 33, 65, 6, 40),
        (2, 3, 5, 4, 8),
        (3, 5, 7, 4, 8),
        (1, 1, 9, 6, 24),
        (2, 127, 64, 2, 32),
        (2, 130, 129, 2, 128),
        (3, 9, 13, 6, 24),
    ),
    variants=(
        {"causal": True, "group": 2},
        {"tail": 5, "window": (4, 4), "alibi": "BH"},
        {"used": True, "causal": True, "group": 3, "softcap": 30.0, "tail": 2},
        {"sinks": "same", "dropout": 0.2, "V": "more"},
        {"prefix": True, "causal": True, "V": "less", "sinks": torch.float32, "top_left": True},
    ),
    differentiable=("q", "k", "v", "sinks"),
    strided=("q", "k", "v", "alibi_slopes", "sinks"),
    batched=(),
    bench_dims=_sizes((2, 64, 64, 4, 64), (8, 2048, 2048, 16, 128), (32, 512, 512, 16, 128), (64, 256, 256, 32, 64)),
    cpu_bench_dims=_sizes((4, 512, 512, 8, 64), (2, 2048, 2048, 8, 128)),
    bench_variant={"causal": True, "equal": True},
    benchmark={
        "function": lambda *args, **options: flash_attn_varlen(*args, **options)[0],
        "reference": lambda *args, **options: formula.varlen(*args, **options)[0],
        "baseline": formula.torch_varlen,
    },
    bad_calls=varlen_bad_calls("flash_attn_varlen"),
    **_COMMON,
)

MERGE_ATTENTION = OpSpec(
    name="merge_attention",
    family="attention",
    function=fastkern.merge_attention,
    reference=formula.merge,
    baseline=formula.merge,
    make=merge_inputs,
    dims=tuple(
        dict(zip(("K", "B", "S", "H", "V"), row, strict=True))
        for row in (
            (2, 1, 3, 4, 8),
            (2, 3, 5, 4, 7),
            (3, 2, 17, 4, 16),
            (5, 4, 9, 6, 40),
            (7, 2, 33, 3, 64),
            (1, 1, 129, 2, 128),
            (16, 1, 2, 3, 257),
            (3, 2, 7, 5, 24),
        )
    ),
    variants=({}, {"empty": True}),
    differentiable=("outs", "lses"),
    strided=("outs", "lses"),
    unspecial=lambda inputs: ("max finite",),  # dout . outs overflows in one order of the sum, not in the other
    batched=(),
    traffic=_merge_traffic,
    flops=lambda inputs, backward: (6 if backward else 2) * inputs["outs"].numel(),
    bench_dims=tuple(
        {"K": k, "B": b, "S": s, "H": 32, "V": 128} for k, b, s in ((4, 1, 64), (16, 16, 1), (4, 1, 8192))
    ),
    cpu_bench_dims=({"K": 4, "B": 1, "S": 1024, "H": 8, "V": 64},),
    bad_calls=merge_bad_calls("merge_attention"),
    empty_dims=("B", "S", "H"),
    data=("outs",),
    signed_zeros=False,
)

SPECS = (FLASH_ATTN, FLASH_ATTN_VARLEN, MERGE_ATTENTION)
