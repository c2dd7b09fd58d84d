# SPDX-License-Identifier: Apache-2.0
"""What the attention operators refuse, and in which words.

The first variant of flash_attn has no option at all, that of flash_attn_varlen only a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkern.specs._refusals import set_to
from fastkern.specs._spec import BadCall, Inputs

_NAN, _INF = float("nan"), float("inf")
_LIST = r"torch\.float32, torch\.float16 or torch\.bfloat16"


def _new(a: Inputs, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=a["q"].device)


def _sizes(a: Inputs) -> tuple[int, int, int, int]:
    """B, S, T, H; of packed sequences 1 less than there are edges, and the rows."""
    q, k = a["q"], a["k"]
    B = a["cu_seqlens_q"].shape[0] - 1 if q.dim() == 3 else q.shape[0]
    return B, q.shape[-3], k.shape[-3], q.shape[-2]


def _wrong(name: str, argument: str, value: Callable[[Inputs], Any], message: str) -> BadCall:
    """``message`` is what follows the argument's name."""
    return BadCall(f"{argument} {name}", set_to(**{argument: value}), rf"{argument} {message}")


def _shared_bad_calls(op: str) -> tuple[BadCall, ...]:
    """Of both layouts."""

    def ints(argument: str, length: Callable[[Inputs], int]) -> tuple[BadCall, ...]:
        good = length
        return (
            _wrong(
                "int64",
                argument,
                lambda a: _new(a, good(a), dtype=torch.int64),
                r"must be torch\.int32, got torch\.int64",
            ),
            _wrong("float", argument, lambda a: _new(a, good(a)), r"must be torch\.int32, got torch\.float32"),
            _wrong(
                "too long",
                argument,
                lambda a: _new(a, good(a) + 1, dtype=torch.int32),
                r"must have shape \(\d+,\), got \(\d+,\)",
            ),
            _wrong(
                "two-dimensional",
                argument,
                lambda a: _new(a, good(a), 1, dtype=torch.int32),
                r"must have shape \(\d+,\), got \(\d+, 1\)",
            ),
        )

    def batch(a: Inputs) -> int:
        return _sizes(a)[0]

    def seed(a: Inputs) -> Tensor:
        return torch.ones((), dtype=torch.int64, device=a["q"].device)

    def seeded(name: str, message: str, **changes: Callable[[Inputs], Any]) -> BadCall:
        return BadCall(name, set_to(**{"dropout_p": lambda a: 0.1, "seed": seed, **changes}), rf"{op}: {message}")

    def slopes(*shape: Any) -> Callable[[Inputs], Tensor]:
        return lambda a: _new(a, *(size(a) for size in shape))

    probability = r"dropout_p must be at least 0 and below 1, got "
    heads = r"must have shape \(\d+,\) or \(\d+, \d+\), got "
    return (
        _wrong("integer", "q", lambda a: a["q"].int(), rf"must be {_LIST}, got torch\.int32"),
        _wrong("float64", "q", lambda a: a["q"].double(), rf"must be {_LIST}, got torch\.float64"),
        _wrong("complex", "q", lambda a: a["q"].float() + 0j, rf"must be {_LIST}, got torch\.complex64"),
        _wrong(
            "without last dimension", "q", lambda a: a["q"][..., 0], r"must have (four|three) dimensions \(.*\), got"
        ),
        _wrong(
            "with one more", "q", lambda a: a["q"][None], r"must have (four|three) dimensions \(.*\), got shape \(1"
        ),
        _wrong(
            "scalar", "q", lambda a: a["q"].flatten()[0], r"must have (four|three) dimensions \(.*\), got shape \(\)"
        ),
        _wrong(
            "without head dim", "q", lambda a: a["q"][..., :0], r"must have a last dimension of at least 1, got shape"
        ),
        _wrong("of another dtype", "k", lambda a: a["k"].half(), r"must be torch\.float32 like q, got torch\.float16"),
        _wrong("bool", "k", lambda a: a["k"].bool(), rf"must be {_LIST}, got torch\.bool"),
        _wrong(
            "of another head dim",
            "k",
            lambda a: a["k"][..., 1:],
            r"must have shape \((\d+, )?\w+, G, \d+\), got \(.*\d\)",
        ),
        _wrong("of another rank", "k", lambda a: a["k"][None], r"must have shape \((\d+, )?\w+, G, \d+\), got \(1, "),
        _wrong(
            "of heads that do not divide",
            "k",
            lambda a: torch.cat([a["k"]] * 5, -2)[..., :5, :],
            r"must have a number of heads that divides the \d+ heads of q, got 5",
        ),
        _wrong(
            "without heads",
            "k",
            lambda a: a["k"][..., :0, :],
            r"must have a number of heads that divides the \d+ heads of q, got 0",
        ),
        _wrong(
            "of another dtype", "v", lambda a: a["v"].bfloat16(), r"must be torch\.float32 like q, got torch\.bfloat16"
        ),
        _wrong("float8", "v", lambda a: a["v"].to(torch.float8_e4m3fn), rf"must be {_LIST}, got torch\.float8_e4m3fn"),
        _wrong("of fewer keys", "v", lambda a: a["v"][..., 1:, :, :], r"must have shape \(.*, Dv\), got \("),
        _wrong("of other heads", "v", lambda a: torch.cat([a["v"]] * 2, -2), r"must have shape \(.*, Dv\), got \("),
        _wrong("of another rank", "v", lambda a: a["v"][0], r"must have shape \(.*, Dv\), got \("),
        _wrong(
            "without head dim", "v", lambda a: a["v"][..., :0], r"must have a last dimension of at least 1, got shape"
        ),
        _wrong("below -1", "window_left", lambda a: -2, r"must be at least -1, got -2"),
        _wrong("below -1", "window_right", lambda a: -(2**40), r"must be at least -1, got -1099511627776"),
        _wrong("NaN", "scale", lambda a: _NAN, r"must be finite in float32, got -?nan"),
        _wrong("infinite", "scale", lambda a: _INF, r"must be finite in float32, got inf"),
        _wrong("negative", "softcap", lambda a: -1.0, r"must be 0 or a positive normal float32, got -1"),
        _wrong("NaN", "softcap", lambda a: _NAN, r"must be 0 or a positive normal float32, got -?nan"),
        _wrong("infinite", "softcap", lambda a: _INF, r"must be 0 or a positive normal float32, got inf"),
        _wrong("float32 would be 0", "softcap", lambda a: 1e-300, r"must be 0 or a positive normal float32, got 1e"),
        _wrong("float32 would be infinite", "scale", lambda a: 1e300, r"must be finite in float32, got 1e\+300"),
        _wrong(
            "float64",
            "alibi_slopes",
            lambda a: _new(a, _sizes(a)[3]).double(),
            r"must be torch\.float32.*, got torch\.float64",
        ),
        _wrong(
            "float16",
            "alibi_slopes",
            lambda a: _new(a, _sizes(a)[3]).half(),
            r"must be torch\.float32, got torch\.float16",
        ),
        _wrong("too long", "alibi_slopes", slopes(lambda a: _sizes(a)[3] + 1), heads + r"\(\d+,\)"),
        _wrong(
            "of another batch",
            "alibi_slopes",
            slopes(lambda a: batch(a) + 1, lambda a: _sizes(a)[3]),
            heads + r"\(\d+, \d+\)",
        ),
        _wrong("scalar", "alibi_slopes", slopes(), heads + r"\(\)"),
        _wrong("integer", "sinks", lambda a: _new(a, _sizes(a)[3]).int(), rf"must be {_LIST}, got torch\.int32"),
        _wrong("too short", "sinks", lambda a: _new(a, _sizes(a)[3] - 1), r"must have shape \(\d+,\), got \(\d+,\)"),
        _wrong(
            "of the batch", "sinks", lambda a: _new(a, 1, _sizes(a)[3]), r"must have shape \(\d+,\), got \(1, \d+\)"
        ),
        seeded("dropout_p 1", probability + "1", dropout_p=lambda a: 1.0),
        seeded("dropout_p below 0", probability + r"-0\.5", dropout_p=lambda a: -0.5),
        seeded("dropout_p NaN", probability + "-?nan", dropout_p=lambda a: _NAN),
        seeded("seed int32", r"seed must be torch\.int64, got torch\.int32", seed=lambda a: seed(a).int()),
        seeded("seed of two", r"seed must have one element, got 2", seed=lambda a: seed(a).expand(2)),
        seeded("offset float", r"offset must be torch\.int64, got torch\.float32", offset=lambda a: seed(a).float()),
        seeded("offset of none", r"offset must have one element, got 0", offset=lambda a: seed(a).expand(0)),
        *ints("prefix", batch),
        *ints("seqused_q", batch),
        *ints("seqused_k", batch),
    )


def attention_bad_calls(op: str) -> tuple[BadCall, ...]:
    def bias(dtype: torch.dtype, *more: int) -> Callable[[Inputs], Tensor]:
        """Of shape (B, H, S, T), each size that much larger."""

        def make(a: Inputs) -> Tensor:
            B, S, T, H = _sizes(a)
            return _new(a, *(size + extra for size, extra in zip((B, H, S, T), more, strict=True)), dtype=dtype)

        return make

    def blocks(a: Inputs, *more: int, dtype: torch.dtype = torch.bool) -> Tensor:
        _, S, T, H = _sizes(a)
        sizes = (H, -(-S // 128), -(-T // 128))
        return _new(a, *(size + extra for size, extra in zip(sizes, more, strict=True)), dtype=dtype)

    shape = r"must have shape \(.*\), got "
    return (
        *_shared_bad_calls(op),
        _wrong(
            "of another batch",
            "k",
            lambda a: torch.cat([a["k"], a["k"]]),
            r"must have shape \(\d+, T, G, \d+\), got \(",
        ),
        _wrong("integer", "bias", bias(torch.int8, 0, 0, 0, 0), r"must be .*, got torch\.int8"),
        _wrong("float64", "bias", bias(torch.float64, 0, 0, 0, 0), r"must be .*, got torch\.float64"),
        _wrong("of other keys", "bias", bias(torch.float32, 0, 0, 0, 1), shape + r"\("),
        _wrong("of other queries", "bias", bias(torch.bool, 0, 0, 1, 0), shape + r"\("),
        _wrong("of other heads", "bias", bias(torch.float16, 0, 2, 0, 0), shape + r"\("),
        _wrong("of another batch", "bias", bias(torch.float32, 1, 0, 0, 0), shape + r"\("),
        _wrong(
            "broadcast over keys", "bias", lambda a: bias(torch.float32, 0, 0, 0, 0)(a)[..., :1], shape + r"\(.*, 1\)"
        ),
        _wrong("two-dimensional", "bias", lambda a: bias(torch.float32, 0, 0, 0, 0)(a)[0, 0], shape + r"\(\d+, \d+\)"),
        _wrong(
            "float",
            "block_mask",
            lambda a: blocks(a, 0, 0, 0, dtype=torch.float32),
            r"must be torch\.bool, got torch\.float32",
        ),
        _wrong("of other queries", "block_mask", lambda a: blocks(a, 0, 1, 0), shape + r"\("),
        _wrong("of other keys", "block_mask", lambda a: blocks(a, 0, 0, 2), shape + r"\("),
        _wrong("of other heads", "block_mask", lambda a: blocks(a, 1, 0, 0), shape + r"\("),
        _wrong("two-dimensional", "block_mask", lambda a: blocks(a, 0, 0, 0)[0], shape + r"\("),
        _wrong("32", "block_size", lambda a: 32, r"must be 64 or 128, got 32"),
        _wrong("0", "block_size", lambda a: 0, r"must be 64 or 128, got 0"),
    )


def varlen_bad_calls(op: str) -> tuple[BadCall, ...]:
    def edges(argument: str) -> tuple[BadCall, ...]:
        return (
            _wrong("int64", argument, lambda a: a[argument].long(), r"must be torch\.int32, got torch\.int64"),
            _wrong("float", argument, lambda a: a[argument].float(), r"must be torch\.int32, got torch\.float32"),
            _wrong(
                "two-dimensional", argument, lambda a: a[argument][None], r"must have shape \(.*,\), got \(1, \d+\)"
            ),
        )

    return (
        *_shared_bad_calls(op),
        *edges("cu_seqlens_q"),
        *edges("cu_seqlens_k"),
        _wrong("empty", "cu_seqlens_q", lambda a: a["cu_seqlens_q"][:0], r"must have shape \(B \+ 1,\), got \(0,\)"),
        _wrong(
            "longer",
            "cu_seqlens_k",
            lambda a: torch.cat([a["cu_seqlens_k"], a["cu_seqlens_k"][-1:]]),
            r"must have shape \(\d+,\), got \(\d+,\)",
        ),
    )


def merge_bad_calls(op: str) -> tuple[BadCall, ...]:
    shape = r"must have shape \(\d+, \d+, \d+, \d+\), got \("
    return (
        _wrong("integer", "outs", lambda a: a["outs"].int(), rf"must be {_LIST}, got torch\.int32"),
        _wrong("float64", "outs", lambda a: a["outs"].double(), rf"must be {_LIST}, got torch\.float64"),
        _wrong(
            "of one part",
            "outs",
            lambda a: a["outs"][0],
            r"must have shape \(K, B, S, H, Dv\) with K at least 1, got \(",
        ),
        _wrong(
            "of no part",
            "outs",
            lambda a: a["outs"][:0],
            r"must have shape \(K, B, S, H, Dv\) with K at least 1, got \(0",
        ),
        _wrong("float16", "lses", lambda a: a["lses"].half(), r"must be torch\.float32, got torch\.float16"),
        _wrong("float64", "lses", lambda a: a["lses"].double(), r"must be .*, got torch\.float64"),
        _wrong("of other parts", "lses", lambda a: a["lses"][1:], shape),
        _wrong("like outs", "lses", lambda a: torch.cat([a["lses"]] * 2, -1), shape),
        _wrong(
            "two-dimensional",
            "lses",
            lambda a: a["lses"][0, 0],
            r"must have shape \(\d+, \d+, \d+, \d+\), got \(\d+, \d+\)",
        ),
    )
