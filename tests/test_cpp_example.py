# SPDX-License-Identifier: Apache-2.0
"""The C++ example, built against the installed package as a user would, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import fastkern
import pytest
import torch

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "cpp"


def run(*command: str | Path) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def missing() -> str | None:
    """What the machine lacks to build a LibTorch program, in words."""
    for tool in ("cmake", "g++"):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    if torch.version.cuda and not shutil.which("nvcc") and not os.environ.get("CUDA_HOME"):
        return "find_package(Torch) of a CUDA build of torch needs the CUDA toolkit"
    if not Path(fastkern.get_cmake_dir(), "fastkernConfig.cmake").exists():
        return "the installed package has no CMake files"
    return None


@pytest.mark.slow
@pytest.mark.timeout(900)  # torch/torch.h takes a minute to compile on a busy machine
def test_builds_and_agrees_with_torch(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    run(
        *("cmake", "-S", SOURCE, "-B", tmp_path),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
        f"-Dfastkern_DIR={fastkern.get_cmake_dir()}",
    )
    run("cmake", "--build", tmp_path)
    output = run(tmp_path / "fastkern_example")
    losses = [float(loss) for loss in re.findall(r"^step +\d+ +loss ([\d.]+)$", output, re.MULTILINE)]
    assert len(losses) >= 2, output
    assert losses[-1] < losses[0] / 4, output
    assert "WRONG" not in output
    assert output.endswith("all good\n")
