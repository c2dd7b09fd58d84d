# SPDX-License-Identifier: Apache-2.0
"""``python -m fastkern.doctor``: a healthy machine is well, and each thing that can be wrong is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastkern
import pytest
import torch
from fastkern import _core, doctor, info, specs

DEVICE = {
    "name": "GPU", "capability": (9, 0), "multiprocessors": 132, "shared_memory_per_block": 1, "l2_bytes": 1,
    "memory_bytes": 1, "index": 0, "code": "sm_90a",
}  # fmt: skip


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    subjects = " ".join(f["subject"] for f in found["findings"])
    for name in (*doctor.TRIED, "AdamW", "libraries", "torch", "driver"):
        assert name in subjects
    assert doctor.usable_devices()[0] == "cpu"


def test_devices_are_checked_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--device", "mars"])
    assert stopped.value.code == 2
    assert "expected one of cpu" in capsys.readouterr().err


# ---- operators that are wrong ----------------------------------------------------------------------------------------


def _broken(name: str, function: Callable[..., Any]) -> tuple[specs.OpSpec, ...]:
    return tuple(dataclasses.replace(s, function=function) if s.name == name else s for s in specs.SPECS)


@pytest.mark.parametrize("kind", ["wrong", "raises"])
def test_a_broken_operator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if kind == "raises":
            raise RuntimeError("no kernel image")
        return fastkern.rms_norm(x, weight, eps) * 1.01

    monkeypatch.setattr(doctor, "TRIED", {"rms_norm": doctor.TRIED["rms_norm"]})
    monkeypatch.setattr(specs, "SPECS", _broken("rms_norm", wrong))
    assert doctor.main(["--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "WRONG  cpu: rms_norm, forward and backward" in text
    assert "forward, float32" in text
    assert ("no kernel image" in text) is (kind == "raises")
    assert "1 of " in text


def test_an_optimizer_that_does_not_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastkern.optim.AdamW, "step", lambda self: None)
    (found,) = [f for f in doctor.operators("cpu") if "AdamW" in f.subject]
    assert (found.state, "after two steps" in found.text) == (doctor.WRONG, True)


# ---- machines that are wrong -----------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[doctor.Finding]]:
    """What is found on a machine with a GPU, a driver and a CUDA build of torch, but for what is given."""

    def look(
        driver: str | None = "590.1", newest: tuple[int, int] | None = (13, 1), cuda: str | None = "13.0",
        devices: tuple[dict[str, Any], ...] = (DEVICE,), seen: int = 1, built: bool = True,
    ) -> list[doctor.Finding]:  # fmt: skip
        build = {**_core.build_info(), "cuda": built, "cuda_version": "13.0.88"}
        monkeypatch.setattr(_core, "build_info", lambda: build)
        monkeypatch.setattr(_core, "driver_version", lambda: newest)
        monkeypatch.setattr(info, "driver", lambda: driver)
        monkeypatch.setattr(info, "devices", lambda: list(devices))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        return [f for f in doctor.machine() if f.state != doctor.OK]

    return look


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"newest": (12, 8), "driver": "570.1"}, "too old for CUDA 13.0.88"),
        ({"newest": None}, "does not answer"),
        ({"devices": (), "seen": 0}, "no GPU is visible"),
        ({"devices": ({**DEVICE, "capability": (7, 5), "code": None},)}, "this build has code for"),
        ({"cuda": None}, "a build for the CPU"),
        ({"seen": 2}, "torch sees 2 GPUs, fastkern 1"),
    ],
)
def test_a_machine_that_is_wrong(
    machine: Callable[..., list[doctor.Finding]], facts: dict[str, Any], words: str
) -> None:
    (found,) = machine(**facts)
    assert found.state == doctor.WRONG
    assert words in found.text
    assert found.remedy in doctor.line(found)


def test_machines_that_are_well(machine: Callable[..., list[doctor.Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine() == []
    assert doctor.usable_devices() == ["cpu", "cuda:0"]
    assert [f.state for f in machine(driver=None)] == [doctor.NOTE]
    assert [f.state for f in machine(built=False)] == [doctor.NOTE]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    (hidden,) = machine(devices=(), seen=0)
    assert "CUDA_VISIBLE_DEVICES is '7'" in hidden.text


# ---- installations that are wrong ------------------------------------------------------------------------------------


def test_two_installations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "fastkern"
    other.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert all(f.subject != "installations" for f in doctor.installation())  # a folder of that name, no more
    (other / "_core.abi3.so").touch()
    (found,) = [f for f in doctor.installation() if f.subject == "installations"]
    assert found.state == doctor.WRONG
    assert str(other) in found.text


def test_missing_parts_and_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(f.state == doctor.OK for f in doctor.installation())
    monkeypatch.setattr(info, "libraries", lambda: {"libfastkern.so": "/nowhere/libfastkern.so (missing)"})
    build = {**_core.build_info(), "version": "0.0.1"}
    monkeypatch.setattr(_core, "build_info", lambda: build)
    wrong = {f.subject: f.text for f in doctor.installation() if f.state == doctor.WRONG}
    assert wrong.keys() == {"libraries", "versions"}
    assert "its library 0.0.1" in wrong["versions"]
