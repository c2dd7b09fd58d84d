# SPDX-License-Identifier: Apache-2.0
"""Tables of cos and sin for the rotary operators: plain, scaled for longer contexts, and of several position rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_OP = "rope_table"


def _fail(name: str, must: str, got: object) -> RuntimeError:
    return RuntimeError(f"fastkern::{_OP}: {name} must {must}, got {got!r}")


class _Scaling(NamedTuple):
    """What a rope_type may need; the names are those of Hugging Face's configurations, but for original_length."""

    factor: float | None = None
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: Sequence[float] | None = None
    long_factor: Sequence[float] | None = None

    def need_factor(self, rope_type: str) -> float:
        if self.factor is None or not self.factor > 0:
            raise _fail("factor", f"be above 0 for rope_type {rope_type}", self.factor)
        return float(self.factor)

    def need_length(self, rope_type: str) -> int:
        if self.original_length is None or self.original_length < 1:
            raise _fail("original_length", f"be at least 1 for rope_type {rope_type}", self.original_length)
        return self.original_length


def rope_table(
    length: int,
    rotary_dim: int,
    theta: float = 10000.0,
    rope_type: str = "default",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    **scaling: Any,
) -> tuple[Tensor, Tensor]:
    """Tables for :func:`rope`: cos and sin of ``position * theta ** (-2i / rotary_dim)``, for ``length`` positions.

    Angles are computed in float64: a float32 angle of position 30,000 is off by a thousandth.

    Args:
        length: rows of the tables, positions 0 to ``length - 1``.
        rotary_dim: columns of a head that are turned; even.
        theta: the base; above 0.
        rope_type: how the frequencies are scaled, as Hugging Face's ``rope_type`` says it:

            * ``"default"``: not at all.
            * ``"linear"``: all divided by ``factor`` (position interpolation; Chen et al., 2023).
            * ``"dynamic"``: a larger base where ``length`` is above ``original_length`` (dynamic NTK, by ``factor``).
            * ``"llama3"``: those of long waves divided by ``factor``, of short ones kept, and a ramp between
              ``original_length / low_freq_factor`` (1) and ``original_length / high_freq_factor`` (4). Llama 3.1, 2024.
            * ``"yarn"``: a ramp between those that turn ``beta_fast`` (32) and ``beta_slow`` (1) times within
              ``original_length``; both tables are multiplied by ``attention_factor``, which is, if None,
              ``0.1 * log(factor) + 1`` or a quotient of two such with ``mscale`` and ``mscale_all_dim`` for 0.1's
              multiple. ``truncate``: whether the ramp's ends are whole numbers. Peng et al., "YaRN", 2023.
            * ``"longrope"``: divided one by one by ``long_factor`` where ``length`` is above ``original_length``, else
              by ``short_factor``; both tables times ``attention_factor``, which follows from ``factor``. Ding et al.,
              2024.
        device: of the tables.
        dtype: of the tables; float32 is best, whatever q and k are.
        **scaling: ``factor``, ``original_length``, ``low_freq_factor``, ``high_freq_factor``, ``beta_fast``,
            ``beta_slow``, ``truncate``, ``attention_factor``, ``mscale``, ``mscale_all_dim``, ``short_factor``,
            ``long_factor``.

    Returns:
        ``(cos, sin)``, each (length, rotary_dim / 2).

    Raises:
        RuntimeError: a number that is out of its range, missing or of another rope_type; the message names it.
    """
    if not isinstance(length, int) or length < 0:
        raise _fail("length", "be an int of at least 0", length)
    frequencies, attention = _frequencies(rotary_dim, theta, rope_type, length, device, **scaling)
    positions = torch.arange(length, device=device, dtype=torch.float64)
    return _tables(positions[:, None] * frequencies, attention, dtype)


def mrope_table(
    positions: Tensor,
    sections: Sequence[int],
    rotary_dim: int,
    theta: float = 10000.0,
    rope_type: str = "default",
    *,
    interleaved_sections: bool = False,
    length: int = 0,
    dtype: torch.dtype = torch.float32,
    **scaling: Any,
) -> tuple[Tensor, Tensor]:
    """Tables for tokens with several positions, as time, height and width in images: a row for each token.

    Qwen2-VL's multimodal rotary embedding (Wang et al., 2024): frequency i follows the row of positions that its
    section names; :func:`rope` takes the result as it is.

    Args:
        positions: (A, B, S), or (A, S) for one sequence: A rows of positions, integers of any kind.
        sections: A numbers of frequencies, ``rotary_dim / 2`` in all (``mrope_section``): the first ones follow row 0,
            the next row 1, and so on.
        rotary_dim: as in :func:`rope_table`.
        theta: as in :func:`rope_table`.
        rope_type: as in :func:`rope_table`.
        interleaved_sections: as in Qwen3-VL, 2025: frequencies follow rows 0, 1, ..., A - 1, 0, 1, ... in turn; where a
            row's section is used up, row 0.
        length: how long the sequence is, for rope_types that ask for it.
        dtype: of the tables.
        **scaling: as in :func:`rope_table`.

    Returns:
        ``(cos, sin)``, each (B, S, rotary_dim / 2), B of 1 for one sequence, on the device of ``positions``.

    Raises:
        RuntimeError: as :func:`rope_table`; also other sections.
    """
    frequencies, attention = _frequencies(rotary_dim, theta, rope_type, length, positions.device, **scaling)
    if positions.dim() == 2:
        positions = positions[:, None]
    rows = _rows_of(sections, rotary_dim // 2, interleaved_sections)
    if positions.dim() != 3 or positions.shape[0] != len(sections):
        raise _fail("positions", f"have shape ({len(sections)}, B, S) or ({len(sections)}, S)", tuple(positions.shape))
    of_frequency = positions.double()[torch.tensor(rows, device=positions.device)]  # (rotary_dim / 2, B, S)
    return _tables(of_frequency.permute(1, 2, 0) * frequencies, attention, dtype)


def rope_table_from_config(
    config: Any,
    length: int | None = None,
    *,
    positions: Tensor | None = None,
    layer_type: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The tables that a Hugging Face configuration asks for.

    Args:
        config: a dict, or an object with attributes, as of ``config.json``: ``rope_parameters`` or ``rope_scaling``,
            ``rope_theta``, ``partial_rotary_factor``, ``head_dim`` (or ``hidden_size / num_attention_heads``),
            ``max_position_embeddings``. Of a multimodal model its ``text_config``.
        length: rows; None: ``max_position_embeddings``.
        positions: for configurations with an ``mrope_section``: see :func:`mrope_table`. None: the tables of positions
            0 to ``length - 1`` that are the same in each row, as those of text are.
        layer_type: which of several ``rope_parameters`` (``"full_attention"``, ``"sliding_attention"``).
        device: of the tables.
        dtype: of the tables.

    Returns:
        ``(cos, sin)`` as of :func:`rope_table` or, with ``positions``, as of :func:`mrope_table`.

    Raises:
        RuntimeError: what is missing, or a ``rope_type`` that is not known here.
    """
    found = _config(config, layer_type)
    if length is None:
        length = found.max_length
    if length is None:
        raise _fail("length", "be given where config has no max_position_embeddings", None)
    call: dict[str, Any] = {"rope_type": found.rope_type, "dtype": dtype, **found.scaling}
    if positions is None:
        return rope_table(length, found.rotary_dim, found.theta, device=device, **call)
    if found.sections is None:
        raise _fail("positions", "be None where config has no mrope_section", tuple(positions.shape))
    call |= {"interleaved_sections": found.interleaved_sections, "length": length}
    return mrope_table(positions.to(device), found.sections, found.rotary_dim, found.theta, **call)


def rope_table_arguments(
    config: Any, layer_type: str | None = None
) -> tuple[int, float, str, dict[str, Any], int | None]:
    """``(rotary_dim, theta, rope_type, scaling, max_length)`` of a configuration, for :func:`rope_table`.

    Args:
        config: as in :func:`rope_table_from_config`.
        layer_type: as in :func:`rope_table_from_config`.

    Returns:
        The last one may be None: the configuration does not say how long its sequences are.

    Raises:
        RuntimeError: what is missing in the configuration.
    """
    found = _config(config, layer_type)
    return found.rotary_dim, found.theta, found.rope_type, found.scaling, found.max_length


# ---- frequencies -----------------------------------------------------------------------------------------------------


def _tables(angles: Tensor, attention: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (angles.cos() * attention).to(dtype), (angles.sin() * attention).to(dtype)


def _frequencies(
    rotary_dim: int, theta: float, rope_type: str, length: int, device: Any, **scaling: Any
) -> tuple[Tensor, float]:
    """Those of the pairs, in float64, and what cos and sin are multiplied with."""
    if not isinstance(rotary_dim, int) or rotary_dim < 2 or rotary_dim % 2 != 0:
        raise _fail("rotary_dim", "be an even int of at least 2", rotary_dim)
    if not (math.isfinite(theta) and theta > 0):
        raise _fail("theta", "be finite and above 0", theta)
    if rope_type not in ROPE_TYPES:
        raise _fail("rope_type", f"be one of {', '.join(ROPE_TYPES)}", rope_type)
    unknown = scaling.keys() - set(_Scaling._fields)
    if unknown:
        raise _fail("scaling", f"be some of {', '.join(_Scaling._fields)}", sorted(unknown))
    s = _Scaling(**scaling)
    share = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    if rope_type == "dynamic":
        original = s.need_length(rope_type)
        longer = max(length, original) / original
        factor = s.need_factor(rope_type)
        if rotary_dim == 2:
            raise _fail("rotary_dim", "be above 2 for rope_type dynamic", rotary_dim)
        theta *= (factor * longer - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    plain = theta**-share
    if rope_type == "linear":
        return plain / s.need_factor(rope_type), 1.0
    if rope_type == "llama3":
        return _llama3(plain, s), 1.0
    if rope_type == "yarn":
        return _yarn(plain, rotary_dim, theta, s)
    if rope_type == "longrope":
        return _longrope(plain, length, s)
    return plain, 1.0


def _llama3(plain: Tensor, s: _Scaling) -> Tensor:
    factor, original = s.need_factor("llama3"), s.need_length("llama3")
    low, high = s.low_freq_factor, s.high_freq_factor
    if not low < high:
        raise _fail("low_freq_factor", f"be below high_freq_factor, {high}", low)
    waves = original * plain / (2 * math.pi)  # within the original length
    share = ((waves - low) / (high - low)).clamp(0, 1)
    return plain * (share + (1 - share) / factor)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(plain: Tensor, rotary_dim: int, theta: float, s: _Scaling) -> tuple[Tensor, float]:
    factor, original = s.need_factor("yarn"), s.need_length("yarn")
    if theta == 1:
        raise _fail("theta", "be other than 1 for rope_type yarn", theta)

    def pair_that_turns(times: float) -> float:
        """The number, as a real one, of the pair that turns so many times within the original length."""
        return rotary_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(s.beta_fast), pair_that_turns(s.beta_slow)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pairs = torch.arange(plain.numel(), dtype=torch.float64, device=plain.device)
    share = ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)  # of interpolation
    attention = s.attention_factor
    if attention is None:
        if s.mscale and s.mscale_all_dim:
            attention = _mscale(factor, s.mscale) / _mscale(factor, s.mscale_all_dim)
        else:
            attention = _mscale(factor)
    return plain * (share / factor + 1 - share), float(attention)


def _longrope(plain: Tensor, length: int, s: _Scaling) -> tuple[Tensor, float]:
    original = s.need_length("longrope")
    name, divisors = ("long_factor", s.long_factor) if length > original else ("short_factor", s.short_factor)
    if divisors is None or len(divisors) != plain.numel():
        raise _fail(name, f"have {plain.numel()} numbers for rope_type longrope", divisors)
    attention = s.attention_factor
    if attention is None:
        factor = s.need_factor("longrope")
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return plain / torch.tensor(divisors, dtype=torch.float64, device=plain.device), float(attention)


def _rows_of(sections: Sequence[int], pairs: int, interleaved: bool) -> list[int]:
    """The row of positions that each frequency follows."""
    if not sections or any(size < 0 for size in sections) or sum(sections) != pairs:
        raise _fail("sections", f"be numbers of at least 0 with a sum of {pairs}", list(sections))
    if not interleaved:
        return [row for row, size in enumerate(sections) for _ in range(size)]
    count = len(sections)
    return [i % count if i < sections[i % count] * count else 0 for i in range(pairs)]


# ---- configurations --------------------------------------------------------------------------------------------------


class _Config(NamedTuple):
    rotary_dim: int
    theta: float
    rope_type: str
    scaling: dict[str, Any]
    max_length: int | None
    sections: Sequence[int] | None
    interleaved_sections: bool


def _config(config: Any, layer_type: str | None) -> _Config:
    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    if get("text_config") is not None and get("num_attention_heads") is None:
        return _config(get("text_config"), layer_type)
    rope = get("rope_parameters") or get("rope_scaling") or {}
    if rope and all(isinstance(each, Mapping) for each in rope.values()):  # one for each type of layer
        if layer_type not in rope:
            raise _fail("layer_type", f"be one of {', '.join(sorted(rope))}", layer_type)
        rope = rope[layer_type]
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rope_type = "default" if rope_type == "mrope" else rope_type
    share = rope.get("partial_rotary_factor", get("partial_rotary_factor"))
    size = get("qk_rope_head_dim") or get("head_dim")
    if size is None:
        width, heads = get("hidden_size"), get("num_attention_heads")
        if width is None or not heads:
            raise _fail("config", "have a head_dim, or hidden_size and num_attention_heads", type(config).__name__)
        size = width // heads
    theta = rope.get("rope_theta", get("rope_theta"))
    max_length = get("max_position_embeddings")
    original = rope.get("original_max_position_embeddings") or get("original_max_position_embeddings")
    scaling = {name: rope[name] for name in _Scaling._fields if rope.get(name) is not None}
    if rope_type == "dynamic":
        original = max_length  # what the model was trained with
    if rope_type not in ("default", "linear"):
        scaling["original_length"] = original or max_length
    if scaling.get("factor") is None and original and max_length and rope_type in ("yarn", "longrope"):
        scaling["factor"] = max_length / original
    return _Config(
        rotary_dim=int(size * (1.0 if share is None else share)),
        theta=10000.0 if theta is None else float(theta),
        rope_type=rope_type,
        scaling=scaling,
        max_length=max_length,
        sections=rope.get("mrope_section"),
        interleaved_sections=bool(rope.get("mrope_interleaved", False)),
    )
