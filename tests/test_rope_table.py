# SPDX-License-Identifier: Apache-2.0
"""Tables of rotary embeddings against the formulas as papers and Hugging Face's transformers write them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import fastkern
import pytest
import torch
from torch import Tensor

D, THETA = 64, 500000.0


def plain(dim: int = D, theta: float = THETA) -> Tensor:
    return torch.tensor([1.0 / theta ** (i / dim) for i in range(0, dim, 2)], dtype=torch.float64)


def llama3(factor: float, low: float, high: float, old: int) -> Tensor:
    found = []
    for f in plain().tolist():
        wave = 2 * math.pi / f
        if wave < old / high:
            found.append(f)
        elif wave > old / low:
            found.append(f / factor)
        else:
            smooth = (old / wave - low) / (high - low)
            found.append((1 - smooth) * f / factor + smooth * f)
    return torch.tensor(found, dtype=torch.float64)


def yarn(factor: float, old: int, fast: float = 32, slow: float = 1, truncate: bool = True) -> Tensor:
    def correction(rotations: float) -> float:
        return D * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = correction(fast), correction(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(D // 2)]
    base = plain().tolist()
    return torch.tensor([f / factor * r + f * (1 - r) for f, r in zip(base, ramp, strict=True)], dtype=torch.float64)


def dynamic(factor: float, old: int, length: int) -> Tensor:
    theta = THETA * ((factor * max(length, old) / old) - (factor - 1)) ** (D / (D - 2))
    return plain(theta=theta)


def mscale(scale: float, m: float = 1.0) -> float:
    return 0.1 * m * math.log(scale) + 1.0


CASES: list[tuple[dict[str, Any], Tensor, float]] = [
    ({}, plain(), 1.0),
    ({"rope_type": "linear", "factor": 4.0}, plain() / 4, 1.0),
    ({"rope_type": "dynamic", "factor": 2.0, "original_length": 64}, dynamic(2.0, 64, 200), 1.0),
    ({"rope_type": "dynamic", "factor": 2.0, "original_length": 4096}, plain(), 1.0),
    (
        {"rope_type": "llama3", "factor": 8.0, "original_length": 8192},
        llama3(8.0, 1.0, 4.0, 8192),
        1.0,
    ),
    (
        {"rope_type": "llama3", "factor": 32.0, "original_length": 4096, "low_freq_factor": 2.0,
         "high_freq_factor": 8.0},
        llama3(32.0, 2.0, 8.0, 4096),
        1.0,
    ),
    ({"rope_type": "yarn", "factor": 4.0, "original_length": 32768}, yarn(4.0, 32768), mscale(4.0)),
    (
        {"rope_type": "yarn", "factor": 40.0, "original_length": 4096, "mscale": 1.0, "mscale_all_dim": 0.707},
        yarn(40.0, 4096),
        mscale(40.0) / mscale(40.0, 0.707),
    ),
    (
        {"rope_type": "yarn", "factor": 32.0, "original_length": 4096, "beta_fast": 24, "beta_slow": 2,
         "truncate": False, "attention_factor": 1.25},
        yarn(32.0, 4096, 24, 2, False),
        1.25,
    ),
    (
        {"rope_type": "longrope", "factor": 32.0, "original_length": 128, "short_factor": [1.0] * 32,
         "long_factor": [1.0 + i for i in range(32)]},
        plain() / torch.arange(1, 33),
        math.sqrt(1 + math.log(32) / math.log(128)),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "frequencies", "attention"), CASES, ids=lambda v: str(v)[:40])
def test_formulas(device: str, scaling: dict[str, Any], frequencies: Tensor, attention: float) -> None:
    cos, sin = fastkern.rope_table(200, D, THETA, device=device, **scaling)
    assert (cos.shape, cos.dtype, cos.device.type) == ((200, D // 2), torch.float32, device)
    angles = torch.arange(200, dtype=torch.float64)[:, None] * frequencies
    for got, want in ((cos, angles.cos()), (sin, angles.sin())):
        torch.testing.assert_close(got.cpu().double(), want * attention, rtol=1e-6, atol=2e-7)


def test_angles_are_not_rounded() -> None:
    """Position 131,071 of the fastest pair turns by 131,071 radians."""
    cos, _ = fastkern.rope_table(131072, 8)
    assert abs(float(cos[-1, 0]) - math.cos(131071)) < 1e-7
    narrow, _ = fastkern.rope_table(131072, 8, dtype=torch.bfloat16)
    assert torch.equal(narrow, cos.bfloat16())


@pytest.mark.parametrize("interleaved", [False, True])
def test_sections(device: str, interleaved: bool) -> None:
    """Frequencies follow the rows of positions that their sections name."""
    sections = (12, 10, 10)
    positions = torch.randint(100, (3, 2, 7), device=device)
    cos, sin = fastkern.mrope_table(positions, sections, D, THETA, interleaved_sections=interleaved)
    tables = [fastkern.rope_table(100, D, THETA, device=device)[i] for i in range(2)]
    rows = [0] * 12 + [1] * 10 + [2] * 10
    if interleaved:
        rows = [0] * 32
        for row in (1, 2):
            for i in range(row, 3 * sections[row], 3):
                rows[i] = row
    for got, table in zip((cos, sin), tables, strict=True):
        assert got.shape == (2, 7, D // 2)
        for pair, row in enumerate(rows):
            torch.testing.assert_close(got[..., pair], table[positions[row]][..., pair], rtol=0, atol=0)
    same = torch.arange(7, device=device).expand(3, 1, 7)  # text: all rows alike
    cos, _ = fastkern.mrope_table(same, sections, D, THETA, interleaved_sections=interleaved)
    assert torch.equal(cos[0], fastkern.rope_table(7, D, THETA, device=device)[0])
    q = torch.randn(2, 7, 4, D, device=device)
    assert fastkern.rope(q, None, *fastkern.mrope_table(positions, sections, D)).shape == q.shape


LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}  # fmt: skip
CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, float, dict[str, Any]]]] = {
    "plain": ({"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 50, "rope_theta": 1e6},
              (D, 1e6, {})),
    "no theta": ({"head_dim": 64, "max_position_embeddings": 50, "rope_scaling": None}, (D, 1e4, {})),
    "llama3": ({"head_dim": 64, "max_position_embeddings": 50, "rope_theta": THETA, "rope_scaling": LLAMA},
               (D, THETA, {"rope_type": "llama3", "factor": 8.0, "original_length": 8192})),
    "parameters": ({"head_dim": 128, "max_position_embeddings": 50,
                    "rope_parameters": LLAMA | {"rope_theta": THETA, "partial_rotary_factor": 0.5}},
                   (D, THETA, {"rope_type": "llama3", "factor": 8.0, "original_length": 8192})),
    "type": ({"head_dim": 64, "max_position_embeddings": 50, "rope_scaling": {"type": "linear", "factor": 2.0}},
             (D, 1e4, {"rope_type": "linear", "factor": 2.0})),
    "yarn": ({"qk_rope_head_dim": 64, "head_dim": 192, "max_position_embeddings": 40,
              "rope_scaling": {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16,
                               "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}},
             (D, 1e4, {"rope_type": "yarn", "factor": 40.0, "original_length": 16, "attention_factor": 1.0})),
    "yarn without factor": ({"head_dim": 64, "max_position_embeddings": 80,
                             "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 20}},
                            (D, 1e4, {"rope_type": "yarn", "factor": 4.0, "original_length": 20})),
    "dynamic": ({"head_dim": 64, "max_position_embeddings": 20, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
                (D, 1e4, {"rope_type": "dynamic", "factor": 2.0, "original_length": 20})),
    "longrope": ({"head_dim": 64, "max_position_embeddings": 40, "original_max_position_embeddings": 20,
                  "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}},
                 (D, 1e4, {"rope_type": "longrope", "factor": 2.0, "original_length": 20,
                           "short_factor": [1.0] * 32, "long_factor": [2.0] * 32})),
    "text of images": ({"vision_config": {}, "text_config": {"num_attention_heads": 4, "head_dim": 64,
                                                             "max_position_embeddings": 50, "rope_theta": THETA}},
                       (D, THETA, {})),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [None, 30])
def test_configurations(name: str, length: int | None) -> None:
    """As a dict and as an object."""
    config, (dim, theta, scaling) = CONFIGS[name]
    text = config.get("text_config", config)
    expected = fastkern.rope_table(length or text["max_position_embeddings"], dim, theta, **scaling)
    nested = {k: SimpleNamespace(**v) if k == "text_config" else v for k, v in config.items()}
    for given in (config, SimpleNamespace(**nested)):
        for got, want in zip(fastkern.rope_table_from_config(given, length), expected, strict=True):
            assert torch.equal(got, want)


def test_configurations_of_several_layers_and_sections() -> None:
    layers = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    config = {"head_dim": 64, "max_position_embeddings": 9, "rope_parameters": layers}
    got = fastkern.rope_table_from_config(config, layer_type="sliding_attention")
    assert torch.equal(got[0], fastkern.rope_table(9, 64)[0])
    with pytest.raises(RuntimeError, match="layer_type must be one of full_attention, sliding_attention, got None"):
        fastkern.rope_table_from_config(config)
    rope = {"type": "mrope", "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    config = {"head_dim": 64, "max_position_embeddings": 9, "rope_theta": 1e6, "rope_scaling": rope}
    positions = torch.randint(9, (3, 2, 5))
    got = fastkern.rope_table_from_config(config, positions=positions)
    want = fastkern.mrope_table(positions, (12, 10, 10), 64, 1e6, interleaved_sections=True)
    assert torch.equal(torch.stack(got), torch.stack(want))
    assert torch.equal(fastkern.rope_table_from_config(config)[0], fastkern.rope_table(9, 64, 1e6)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"length": -1}, "length must be an int of at least 0, got -1"),
        ({"rotary_dim": 7}, "rotary_dim must be an even int of at least 2, got 7"),
        ({"theta": 0.0}, "theta must be finite and above 0, got 0.0"),
        ({"rope_type": "axial"}, "rope_type must be one of default, linear, .*, got 'axial'"),
        ({"rope_type": "linear"}, "factor must be above 0 for rope_type linear, got None"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_length must be at least 1 for rope_type yarn, got None"),
        ({"rope_type": "longrope", "original_length": 4}, "long_factor must have 4 numbers for rope_type longrope"),
        ({"strength": 4.0}, r"scaling must be some of factor, .*, got \['strength'\]"),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_length": 9, "low_freq_factor": 4.0},
            "low_freq_factor must be below high_freq_factor, 4.0, got 4.0",
        ),
    ],
)
def test_refusals(call: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"fastkern::rope_table: {message}"):
        fastkern.rope_table(**{"length": 9, "rotary_dim": 8, **call})


def test_refusals_of_sections() -> None:
    with pytest.raises(RuntimeError, match=r"sections must be numbers of at least 0 with a sum of 4, got \[1, 2\]"):
        fastkern.mrope_table(torch.zeros(2, 1, 3), (1, 2), 8)
    with pytest.raises(RuntimeError, match=r"positions must have shape \(2, B, S\) or \(2, S\), got \(3, 1, 3\)"):
        fastkern.mrope_table(torch.zeros(3, 1, 3), (2, 2), 8)


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_against_transformers(name: str) -> None:
    """The frequencies that the library itself computes, in float32."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope: dict[str, Any] = {"rope_type": name, "rope_theta": THETA, "factor": 4.0}
    if name in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = 4096
    if name == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if name == "longrope":
        rope |= {"short_factor": [1.0 + i / 9 for i in range(32)], "long_factor": [2.0 + i for i in range(32)]}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=16384, rope_parameters=rope
    )
    frequencies, attention = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), seq_len=16384)
    cos, sin = fastkern.rope_table_from_config(config)
    angles = frequencies.double()  # of position 1
    torch.testing.assert_close(cos[1].double(), angles.cos() * attention, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin[1].double(), angles.sin() * attention, rtol=1e-6, atol=1e-6)
