# SPDX-License-Identifier: Apache-2.0
"""The rotary operators: rope, qk_norm_rope."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fastkern
from fastkern.specs._refusals import set_to
from fastkern.specs._spec import BadCall, Inputs, OpSpec

# ---- inputs ----------------------------------------------------------------------------------------------------------


def rope_inputs(
    *,
    B: int,
    S: int,
    H: int,
    N: int,
    dtype: torch.dtype,
    device: Any,
    kv: int | None = None,
    table: Any = torch.float32,
    full: bool = False,
    rotary: int | None = None,
    positions: torch.dtype | None = None,
    per_token: bool = False,
    interleaved: bool = False,
    **numbers: Any,
) -> Inputs:
    """Heads of 2N, and tables of the angles of some longest sequence: half or, ``full``, each number twice.

    ``kv``: heads of k; None: about half as many as q has. ``rotary``: how many columns of a head are turned, or all.
    """
    turned = N if rotary is None else min(N, rotary // 2)
    rows = S if per_token else S + 9
    frequency = 1e4 ** (-torch.arange(turned, device=device, dtype=torch.float64) / turned)
    angle = torch.arange(rows, device=device)[:, None] * frequency
    if full:
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    tables = [t.to(dtype if table == "same" else table) for t in (angle.cos(), angle.sin())]
    cos, sin = (t[None] if per_token else t for t in tables)
    heads = (H + 1) // 2 if kv is None else kv
    q, k = (torch.randn(B, S, h, 2 * N, device=device).to(dtype) for h in (H, heads))
    inputs: Inputs = {"q": q, "k": k, "cos": cos, "sin": sin, **numbers}
    if positions is not None:
        inputs["positions"] = torch.randint(rows, (B, S), device=device).to(positions)
    if interleaved:
        inputs["interleaved"] = True
    if rotary is not None:
        inputs["rotary_dim"] = 2 * turned
    return inputs


def qk_norm_rope_inputs(
    *,
    B: int,
    S: int,
    H: int,
    N: int,
    dtype: torch.dtype,
    device: Any,
    weight: Any = "same",
    weight_offset: float = 0.0,
    eps: float = 1e-6,
    **options: Any,
) -> Inputs:
    """The same with weights around one, less the offset; ``weight``: None, "same" (the dtype of q) or a dtype."""
    made = rope_inputs(B=B, S=S, H=H, N=N, dtype=dtype, device=device, **options)

    def one() -> Tensor | None:
        if weight is None:
            return None
        values = 1.0 - weight_offset + 0.3 * torch.randn(2 * N, device=device)
        return values.to(dtype if weight == "same" else weight)

    inputs = {"q": made.pop("q"), "k": made.pop("k"), "q_weight": one(), "k_weight": one()}
    inputs |= {"cos": made.pop("cos"), "sin": made.pop("sin"), "eps": eps}
    if weight_offset:
        inputs["weight_offset"] = weight_offset
    return inputs | made


# ---- the same in torch -----------------------------------------------------------------------------------------------


def _rows_of_tokens(
    table: Tensor,
    q: Tensor,
    beside: float,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """(..., S, W): the table's row for each token; ``beside`` for tokens of no sequence, NaN without a row."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        found: list[int | None] = [None] * q.shape[0]
        for first, last in pairwise(bounds):
            for token in range(max(first, 0), min(last, q.shape[0])):
                found[token] = token - first
    elif positions is not None:
        inside = (positions >= 0) & (positions < table.shape[0])
        if table.shape[0] == 0:
            return table.new_full((*positions.shape, table.shape[-1]), float("nan"))
        picked = table[positions.clamp(0, table.shape[0] - 1).long()]
        return torch.where(inside[..., None], picked, float("nan"))
    else:
        return table if table.dim() == 3 else table[: q.shape[-3]]
    rows = [table.new_full(table.shape[-1:], beside) if p is None else table[p] for p in found]
    return torch.stack(rows) if rows else table.new_zeros(0, table.shape[-1])


def rotate_half(x: Tensor, interleaved: bool) -> Tensor:
    """What sin is multiplied with: (-b, a) for each pair (a, b)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """Hugging Face's apply_rotary_pos_emb on the first columns, in ``dtype``."""
    n = cos.shape[-1]
    turned, rest = x[..., :n].to(dtype), x[..., n:].to(dtype)
    turned = turned * cos.to(dtype).unsqueeze(-2) + rotate_half(turned, interleaved) * sin.to(dtype).unsqueeze(-2)
    return torch.cat((turned, rest), -1).to(x.dtype)


def _widened(table: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """Each number twice, the first of both."""
    half = rotary_dim // 2
    if table.shape[-1] != half:
        table = table[..., ::2] if interleaved else table[..., :half]
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def _formula(
    wide: bool,
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
) -> tuple[Tensor, ...]:
    """As Hugging Face writes it: in the dtype of q or, ``wide``, in float32 at least, rounded once."""
    dtype = torch.promote_types(q.dtype, torch.float32) if wide else q.dtype
    size = q.shape[-1] if rotary_dim is None else rotary_dim
    cos, sin = (
        _widened(_rows_of_tokens(t, q, beside, positions, cu_seqlens), size, interleaved)
        for t, beside in ((cos, 1.0), (sin, 0.0))
    )
    sin = -sin if inverse else sin
    return tuple(_turned(x, cos, sin, interleaved, dtype) for x in (q, k) if x is not None)


def rope_reference(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
) -> tuple[Tensor, ...]:
    """In float32 or float64."""
    return _formula(True, q, k, cos, sin, positions, interleaved, rotary_dim, cu_seqlens, inverse)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (weight.to(x.dtype) + weight_offset)


def _norm_formula(
    wide: bool,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    positions: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Norm, then rope: the norm in float32 at least; ``wide``: the rest too."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    own = q.dtype
    pairs = ((q, q_weight), (k, k_weight))
    normed = [_rms_norm(x.to(dtype), w, eps, weight_offset) for x, w in pairs if x is not None]
    if not wide:
        normed = [x.to(own) for x in normed]
    other = normed[1] if len(normed) > 1 else None
    found = _formula(wide, normed[0], other, cos, sin, positions, interleaved, rotary_dim, cu_seqlens)
    return tuple(x.to(own) for x in found)


def qk_norm_rope_reference(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    positions: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """In float32 or float64."""
    return _norm_formula(
        True, q, k, q_weight, k_weight, cos, sin, eps, weight_offset, positions, interleaved, rotary_dim, cu_seqlens
    )


# ---- peers -----------------------------------------------------------------------------------------------------------


def _liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Writes over q and k where it can: (B, S, H, D) seen as (B, H, S, D) is what it reads in place."""
    from liger_kernel.ops.rope import LigerRopeFunction

    tokens = q.shape[1]
    cos, sin = (torch.cat((t[:tokens], t[:tokens]), -1)[None] for t in (cos, sin))
    q, k = LigerRopeFunction.apply(q.clone().transpose(1, 2), k.clone().transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


# ---- costs -----------------------------------------------------------------------------------------------------------


def _size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _traffic(passes: int, inputs: Inputs, backward: bool) -> int:
    """Q and k read and written, each row of the tables read once; qk_norm_rope's backward reads gradients as well."""
    heads = _size(inputs["q"], inputs["k"])
    tokens = inputs["q"].shape[:-2].numel()
    cos = inputs["cos"]
    rows = min(cos.shape[:-1].numel(), tokens)
    table = 2 * rows * cos.shape[-1] * cos.element_size()
    weights = _size(inputs.get("q_weight"), inputs.get("k_weight"))
    return (
        (passes if backward else 2) * heads + table + (2 if backward else 1) * weights + _size(inputs.get("positions"))
    )


def _flops(turned: int, inputs: Inputs, backward: bool) -> int:
    elements = inputs["q"].numel() + (0 if inputs["k"] is None else inputs["k"].numel())
    return (3 + (2 if backward else 1) * turned) * elements


def _norm_workspace(inputs: Inputs, backward: bool) -> int:
    """Sums of the weight gradients: one for each block, two blocks a multiprocessor."""
    if not backward:
        return 0
    blocks = 4 * torch.cuda.get_device_properties(inputs["q"].device).multi_processor_count
    return 4 * blocks * inputs["q"].shape[-1]


def _without_k(inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The operators give two results always."""
    return outputs[:1] if inputs.get("k") is None else outputs


# ---- what is refused -------------------------------------------------------------------------------------------------


def _common_bad_calls(op: str) -> tuple[BadCall, ...]:
    floats = rf"{op}: (\w+) must be torch\.float32, torch\.float16 or torch\.bfloat16, got "
    table = rf"{op}: cos must have shape \(T, W\) or \(\d+( or 1)?, \d+, W\) with W \d+ or \d+, got "
    rotary = rf"{op}: rotary_dim must be even, at least 2 and at most the head dimension of q, \d+, got "
    place = rf"{op}: positions must have shape \(\d+,\) or \(\d+( or 1)?, \d+\), got "
    return (
        BadCall("q integer", set_to(q=lambda a: a["q"].long()), floats + r"torch\.int64"),
        BadCall("q float64", set_to(q=lambda a: a["q"].double()), floats + r"torch\.float64"),
        BadCall(
            "q two-dimensional",
            set_to(q=lambda a: a["q"].flatten(0, 2)),
            rf"{op}: q must have four dimensions \(B, S, H, D\) or three \(total, H, D\), got shape \(\d+, \d+\)",
        ),
        BadCall(
            "k of another dtype",
            set_to(k=lambda a: a["k"].bfloat16()),
            rf"{op}: k must be torch\.float32 like q, got torch\.bfloat16",
        ),
        BadCall(
            "k of other tokens",
            set_to(k=lambda a: a["k"][:, :-1]),
            rf"{op}: k must have shape \(\d+, \d+, G, \d+\), got \(\d+, \d+, \d+, \d+\)",
        ),
        BadCall(
            "k with larger heads",
            set_to(k=lambda a: torch.cat((a["k"], a["k"]), -1)),
            rf"{op}: k must have shape \(\d+, \d+, G, \d+\), got",
        ),
        BadCall(
            "k packed",
            set_to(k=lambda a: a["k"].flatten(0, 1)),
            rf"{op}: k must have shape \(\d+, \d+, G, \d+\), got \(\d+, \d+, \d+\)",
        ),
        BadCall("cos float64", set_to(cos=lambda a: a["cos"].double()), floats + r"torch\.float64"),
        BadCall("cos too wide", set_to(cos=lambda a: a["cos"].new_ones(99, 7919)), table + r"\(99, 7919\)"),
        BadCall("cos four-dimensional", set_to(cos=lambda a: a["cos"][None, None]), table + r"\(1, 1, \d+, \d+\)"),
        BadCall(
            "cos for too few tokens",
            set_to(cos=lambda a: a["cos"][:1], sin=lambda a: a["sin"][:1], positions=lambda a: None),
            rf"{op}: cos must have a row for each of \d+ positions, got shape \(1, \d+\)",
        ),
        BadCall("sin unlike cos", set_to(sin=lambda a: a["sin"][1:]), rf"{op}: sin must have shape \(\d+, \d+\), got "),
        BadCall(
            "sin of another dtype",
            set_to(sin=lambda a: a["sin"].half()),
            rf"{op}: sin must be torch\.float32 like cos, got torch\.float16",
        ),
        BadCall("rotary_dim odd", set_to(rotary_dim=lambda a: 3), rotary + "3"),
        BadCall("rotary_dim too large", set_to(rotary_dim=lambda a: a["q"].shape[-1] + 2), rotary + r"\d+"),
        BadCall("rotary_dim zero", set_to(rotary_dim=lambda a: 0), rotary + "0"),
        BadCall(
            "positions float",
            set_to(positions=lambda a: torch.zeros(a["q"].shape[1], device=a["q"].device)),
            rf"{op}: positions must be torch\.int64 or torch\.int32, got torch\.float32",
        ),
        BadCall(
            "positions of other tokens",
            set_to(positions=lambda a: torch.zeros(a["q"].shape[1] + 1, device=a["q"].device, dtype=torch.long)),
            place + r"\(\d+,\)",
        ),
        BadCall(
            "positions beside rows for each token",
            set_to(
                cos=lambda a: a["cos"][None, : a["q"].shape[1]],
                sin=lambda a: a["sin"][None, : a["q"].shape[1]],
                positions=lambda a: torch.zeros(a["q"].shape[1], device=a["q"].device, dtype=torch.long),
            ),
            rf"{op}: positions must be None where cos has a row for each token, got shape \(\d+,\)",
        ),
        BadCall(
            "cu_seqlens without packing",
            set_to(cu_seqlens=lambda a: torch.zeros(2, device=a["q"].device, dtype=torch.int32)),
            rf"{op}: cu_seqlens must be None unless q is \(total, H, D\), got shape \(2,\)",
        ),
        BadCall(
            "cu_seqlens int64",
            set_to(cu_seqlens=lambda a: torch.zeros(2, device=a["q"].device, dtype=torch.int64)),
            rf"{op}: cu_seqlens must be torch\.int32, got torch\.int64",
        ),
    )


_NORM_BAD_CALLS = (
    BadCall(
        "q_weight too long",
        set_to(q_weight=lambda a: a["q"].new_ones(a["q"].shape[-1] + 1)),
        r"qk_norm_rope: q_weight must have shape \(\d+,\), got \(\d+,\)",
    ),
    BadCall(
        "k_weight integer",
        set_to(k_weight=lambda a: a["k_weight"].int()),
        r"qk_norm_rope: k_weight must be torch\.float32, torch\.float16 or torch\.bfloat16, got torch\.int32",
    ),
    BadCall(
        "heads too large",
        set_to(q=lambda a: a["q"].new_ones(1, 2, 1, 514), k=lambda a: a["q"].new_ones(1, 2, 1, 514)),
        r"qk_norm_rope: q must have a head dimension of at most 512, got shape \(1, 2, 1, 514\)",
    ),
    BadCall("eps negative", set_to(eps=lambda a: -1.0), r"qk_norm_rope: eps must be finite and >= 0, got -1"),
    BadCall(
        "weight_offset infinite",
        set_to(weight_offset=lambda a: float("inf")),
        r"qk_norm_rope: weight_offset must be finite in float32, got inf",
    ),
)

# ---- the rows --------------------------------------------------------------------------------------------------------


def _sizes(*rows: tuple[int, int, int, int]) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(("B", "S", "H", "N"), row, strict=True)) for row in rows)


_DIMS = _sizes(
    (2, 5, 7, 11),
    (3, 17, 5, 24),
    (2, 19, 9, 32),
    (4, 13, 6, 36),
    (1, 1, 1, 64),
    (2, 33, 4, 64),
    (3, 7, 8, 40),
    (1, 127, 3, 128),
    (2, 9, 9, 4),
    (1, 31, 2, 256),
    (5, 2, 33, 8),
    (2, 65, 1, 65),
)
_BENCH_DIMS = _sizes(
    (1, 8192, 32, 64), (8, 4096, 32, 64), (1, 32768, 64, 64), (4, 4096, 16, 32), (2, 4096, 16, 128), (64, 1, 32, 64)
)
_COMMON: dict[str, Any] = {
    "family": "rope",
    "dims": _DIMS,
    "batched": ("q", "k", "positions"),
    "data": ("q", "k"),
    "bench_dims": _BENCH_DIMS,
    "cpu_bench_dims": _sizes((1, 1024, 32, 64), (4, 512, 16, 32)),
    "empty_dims": ("B", "S", "H"),
    "signed_zeros": False,  # of results that vanish
    "decoded": _without_k,
}
_F32, _BF16 = torch.float32, torch.bfloat16
_PLACES: Callable[..., Any] = partial(dict, positions=torch.int64)

ROPE = OpSpec(
    name="rope",
    function=fastkern.rope,
    reference=rope_reference,
    baseline=partial(_formula, False),
    yardstick=rope_reference,
    make=rope_inputs,
    variants=(
        {},
        _PLACES(rotary=16, full=True, table="same"),
        {"interleaved": True, "positions": torch.int32, "rotary": 12},
        {"per_token": True, "full": True, "table": _BF16},
        {"interleaved": True, "full": True, "inverse": True},
    ),
    differentiable=("q", "k"),
    strided=("q", "k", "cos", "sin", "positions"),
    traffic=partial(_traffic, 2),
    flops=partial(_flops, 0),
    bench_variant={"kv": 8},
    peers={"liger": _liger_rope},
    bad_calls=_common_bad_calls("rope"),
    **_COMMON,
)

QK_NORM_ROPE = OpSpec(
    name="qk_norm_rope",
    function=fastkern.qk_norm_rope,
    reference=qk_norm_rope_reference,
    baseline=partial(_norm_formula, False),
    yardstick=qk_norm_rope_reference,
    make=qk_norm_rope_inputs,
    variants=(
        {},
        _PLACES(rotary=16, full=True, weight=_F32, weight_offset=1.0),
        {"interleaved": True, "weight": None},
        {"per_token": True, "full": True, "table": "same", "weight": _BF16, "eps": 1e-5},
    ),
    differentiable=("q", "k", "q_weight", "k_weight"),
    strided=("q", "k", "q_weight", "k_weight", "cos", "sin", "positions"),
    traffic=partial(_traffic, 3),
    flops=partial(_flops, 6),
    bench_variant={"kv": 8},
    bad_calls=(*_common_bad_calls("qk_norm_rope"), *_NORM_BAD_CALLS),
    workspace=_norm_workspace,
    **_COMMON,
)

SPECS = (ROPE, QK_NORM_ROPE)
