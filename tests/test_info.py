# SPDX-License-Identifier: Apache-2.0
"""``python -m fastkern.info``."""

from __future__ import annotations

import json
import subprocess
import sys

import fastkern
import pytest
from fastkern import _core, info
from fastkern.specs import SPECS


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert f"{fastkern.__version__} (commit {_core.build_info()['commit']})" in text
    for spec in SPECS:
        assert f"\n  {spec.name} " in text
    if _core.build_info()["cuda"]:
        for name in ("rms_norm", "layer_norm"):
            assert f"{name} forward" in text
            assert f"{name} backward" in text
    else:
        assert "no CUDA kernels" in text


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["environment"]["fastkern"] == fastkern.__version__
    assert set(facts["operators"]) == {s.name for s in SPECS}
    assert set(facts["plans"]) == ({"rms_norm", "layer_norm"} if _core.build_info()["cuda"] else set())
    assert "missing" not in " ".join(facts["libraries"].values())


def test_needs_torch_alone() -> None:
    absent = ("rich", "typer", "matplotlib", "numpy")
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({absent!r})); sys.argv[1:] = []; "
    code += "runpy.run_module('fastkern.info', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Operators" in done.stdout


@pytest.mark.parametrize(
    ("capability", "architectures", "code"),
    [
        ((9, 0), ["80", "90a"], "sm_90a"),
        ((8, 9), ["80", "86"], "sm_86"),
        ((8, 6), ["80"], "sm_80"),
        ((10, 3), ["90a", "100"], "sm_100"),
        ((12, 1), ["80", "100"], "PTX of compute_100, compiled by the driver at first use"),
        ((9, 0), ["80"], "PTX of compute_80, compiled by the driver at first use"),
        ((11, 0), ["80", "120"], None),
        ((7, 5), ["80", "90a"], None),
        ((10, 0), ["90a"], None),
        ((9, 0), [], None),
    ],
)
def test_code_for_a_device(capability: tuple[int, int], architectures: list[str], code: str | None) -> None:
    assert info.code_for(capability, architectures) == code


def test_devices_and_plans_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device = {
        "name": "GPU", "capability": (9, 0), "multiprocessors": 132, "shared_memory_per_block": 1,
        "l2_bytes": 2**26, "memory_bytes": 2**37,
    }  # fmt: skip

    def plan(op: str, n: int, dtype: str) -> dict[str, object]:
        if not op.endswith("_bwd"):
            raise ValueError("plan: op must be something else")
        kernel = {"kernel": f"{op}_kernel", "threads_per_block": 128, "rows_per_block": 2, "resident": True}
        kernel |= {"shared_bytes": 0}
        return {**kernel, "threads_per_row": 64, "blocks_per_row": 1, "elements_per_thread": 16}

    build = {**_core.build_info(), "cuda": True}
    fake = {
        "device_count": lambda: 1, "device_info": lambda i: device, "architectures": lambda: ["80"], "plan": plan,
        "build_info": lambda: build,
    }  # fmt: skip
    for name, function in fake.items():
        monkeypatch.setattr(_core, name, function)
    text = info.text(info.report())
    assert "cuda:0  GPU, capability 9.0, 132 multiprocessors, 128 GiB, L2 64 MiB: served by PTX" in text
    assert "rms_norm forward" not in text
    assert "rms_norm_bwd_kernel" in text
    assert "short: 2 to a block" in text


def test_what_is_told_of_the_rows_of_a_plan() -> None:
    if not _core.build_info()["cuda"]:
        pytest.skip("a build without CUDA knows no plans")
    found = {n: p["why"] for n, p in info.plans()["rms_norm"]["forward"].items()}
    words = ["short", "short", "kept by one", "kept by one", "waits in shared", "a cluster of"]
    assert all(word in found[n] for n, word in zip(info.PLAN_SIZES, words, strict=True)), found
    assert "once more" in info.why(_core.plan("rms_norm", 2**22, "bfloat16"))


def test_what_is_told_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """A chunk of logits is about 1 GB, and no call has more rows in it than it has."""
    for classes, by_rows in info.chunks().items():
        for rows, chunk in by_rows.items():
            assert chunk == rows or (chunk < rows and 2**29 < chunk * classes * 2 <= 2**30)
    assert {"add_rms_norm", "rms_norm_dynamic_quant"} <= set(info.same_plans()["rms_norm"])
    assert "rms_norm" not in info.same_plans()["rms_norm"] + info.same_plans()["layer_norm"]
