# SPDX-License-Identifier: Apache-2.0
"""``fastkern.profile``: what it notes, what it makes of torch's events, what it leaves alone."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastkern
import pytest
import torch
from fastkern import profiler
from fastkern.bench.timing import Ceiling


@pytest.fixture(autouse=True)
def _ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "_ceiling", lambda device, dtypes: Ceiling(10.0, 1, dict.fromkeys(dtypes, 0.01)))


def _step(x: torch.Tensor, w: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = fastkern.rms_norm(x, w)
    out = fastkern.flash_attn(q, q, q, causal=True)
    (y.sum() + out.square().sum()).backward()
    fastkern.triu(x.detach())
    return y.detach(), out.detach(), x.grad, w.grad, q.grad


def test_a_training_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def inputs() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        shapes = ((8, 96), (96,), (1, 16, 2, 32))
        return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]

    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = fastkern.optim.AdamW([weight])
    weight.grad = torch.ones(1000)
    plain = _step(*inputs())
    with caplog.at_level(logging.INFO, "fastkern"), fastkern.profile(tmp_path / "out") as prof:
        seen = _step(*inputs())
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True)), "profiling changes results"
    if not torch.cuda.is_available():
        assert "no memory snapshot" in caplog.text

    rows = {row.op: row for row in prof.rows}
    assert rows.keys() == {
        "rms_norm_fwd", "rms_norm_bwd", "flash_attn_fwd", "flash_attn_bwd", "triu", "AdamW.step"
    }  # fmt: skip
    assert rows["rms_norm_fwd"].bytes == 4 * (2 * 8 * 96 + 96)
    assert rows["rms_norm_bwd"].bytes == 4 * (3 * 8 * 96 + 2 * 96)
    assert rows["triu"].bytes == 4 * 2 * 8 * 96
    assert rows["AdamW.step"].bytes == 4 * 1000 * 7
    assert {op for op, row in rows.items() if row.counted == "arguments"} == {"triu", "AdamW.step"}
    assert all(row.calls == 1 and row.us > 0 and row.gbps and row.percent for row in prof.rows)
    for row in prof.rows:
        assert row.gbps == pytest.approx(row.bytes / row.us / 1e3)
        assert row.ceiling == ("matmul" if row.op.startswith("flash_attn") else "copy")
    assert rows["rms_norm_fwd"].percent == pytest.approx(100 * rows["rms_norm_fwd"].gbps / 10)
    assert [row.us for row in prof.rows] == sorted((row.us for row in prof.rows), reverse=True)

    text = str(prof).splitlines()
    assert {line.split()[0] for line in text[2:]} == rows.keys()
    assert json.loads(prof.files["ops"].read_text(encoding="utf-8")) == prof.data()
    trace = json.loads(prof.files["trace"].read_text(encoding="utf-8"))
    assert "fastkern::rms_norm_fwd" in {e.get("name") for e in trace["traceEvents"]}


def _event(name: str, cpu: float, device: float = 0.0, *children: Any) -> SimpleNamespace:
    return SimpleNamespace(name=name, cpu_time_total=cpu, device_time_total=device, cpu_children=list(children))


def test_times_are_the_innermost_calls_and_the_devices_where_there_is_one() -> None:
    inner = _event("fastkern::gelu", 7.0, 2.0, _event("aten::empty", 1.0))
    outer = _event("fastkern::gelu", 30.0, 2.0, _event("PythonDispatchMode", 25.0, 2.0, inner))
    step = _event("Optimizer.step#Lion.step", 11.0, 3.0)
    events = [outer, outer.cpu_children[0], inner, *inner.cpu_children, step, _event("aten::gelu", 5.0)]
    assert profiler._times(events, set()) == {"gelu": 7.0, "Lion.step": 11.0}
    assert profiler._times(events, {"gelu"}) == {"gelu": 2.0, "Lion.step": 11.0}


def test_what_cannot_be_told_is_a_dash() -> None:
    calls = [profiler._Call("triu", 10, None, "arguments", "int64", torch.device("cpu"))]
    row = profiler._row("triu", calls, 0.0, {})
    assert (row.gbps, row.tflops, row.ceiling, row.percent) == (None, None, None, None)
    assert profiler.table([row]).splitlines()[-1].split()[-6:] == ["0", "-", "-", "-", "-", "arguments"]
    assert "no fastkern operator" in profiler.table([])


def test_without_triton_there_are_no_ceilings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(profiler.importlib.util, "find_spec", lambda name: None)
    calls = [profiler._Call("gelu", 10, 1, "formula", "float32", torch.device(d)) for d in ("cpu", "cuda:0")]
    assert profiler.profile._measured(calls[:1]).keys() == {torch.device("cpu")}
    assert profiler.profile._measured(calls) == {}
    assert "needs triton" in caplog.text


def test_an_error_inside_leaves_nothing_behind(tmp_path: Path) -> None:
    prof = fastkern.profile(tmp_path / "out")
    with pytest.raises(RuntimeError, match="rms_norm"), prof:
        fastkern.rms_norm(torch.ones(2, 3), torch.ones(4))
    assert prof.rows == []
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="profile: entered before"), prof:
        pass
    with fastkern.profile(ceilings=False) as again:
        fastkern.rms_norm(torch.ones(2, 3))
    assert [(row.op, row.calls, row.ceiling) for row in again.rows] == [("rms_norm_fwd", 1, None)]
    assert again.files == {}


def test_it_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, fastkern; assert 'fastkern.profiler' not in sys.modules; fastkern.profile"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'profiles'"):
        _ = fastkern.profiles
